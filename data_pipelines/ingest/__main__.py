"""Make shards of what you have, and say what could not be used and why:

    python -m data_pipelines.ingest SOURCE... --to FOLDER [--style STYLE] [--source NAME] [options]

A SOURCE is a file, or a folder of files: images (captions beside them in NAME.txt, one a line, or in NAME.json, or in a
table), JSON lines, JSON lists, CSV, TSV, parquet, webdataset tars, PDF, videos; a data set that `datasets` saved; or
datasets:ID[:SPLIT] for one that it loads. The style of the rows is recognised file by file by their columns and said;
--style names another. The id of a row stands at the end of its record's key. FOLDER, which is new or empty, gets the
shards, report.json, report.html, and refused.jsonl with every row that was refused. One FOLDER is one component of a
mixture: several SOURCEs in it want one name, --source. Nothing is downloaded, and no file outside of a SOURCE is read.
Killed, the same command goes on and ends with the same bytes. Finished, it begins anew where files that rows name were
missing and have come; of input that has changed it wants --anew.

Exit status: 0; 1 when more than --max-share was refused, or nothing was written; 2 for a source that cannot be read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from data_pipelines.ingest.report import Tally, table
from data_pipelines.ingest.run import IngestConfig, ingest
from data_pipelines.ingest.sources import SourceError
from data_pipelines.ingest.styles import STYLES
from data_pipelines.ingest.video import VideoConfig
from data_pipelines.shards import ShardError
from data_pipelines.workers import LimitsConfig


def _column(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=COLUMN")
    return name, column


def parser() -> argparse.ArgumentParser:
    """The command line; its help is meant to be read."""
    out = argparse.ArgumentParser(
        "python -m data_pipelines.ingest",
        "%(prog)s SOURCE... --to FOLDER [options] (--help tells of them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("sources", nargs="+", metavar="SOURCE", help="files and folders, as many as there are")
    out.add_argument("--to", required=True, metavar="FOLDER", help="where the shards go")
    out.add_argument("--style", choices=("auto", *STYLES), default="auto", help="how rows are read (default: auto)")
    out.add_argument(
        "--source", default="", metavar="NAME", help="what the records call their source (default: SOURCE's name)"
    )
    out.add_argument("--max-share", type=float, default=0.01, metavar="SHARE", help="refused of all (default: 0.01)")
    out.add_argument("--anew", action="store_true", help="delete what an ingestion left in FOLDER, and begin anew")
    rows = out.add_argument_group("reading rows")
    rows.add_argument(
        "--prompt", default="", metavar="TEXT",
        help="ask this of captioned images, videos and pages; without it they become documents: image, then text",
    )  # fmt: skip
    rows.add_argument(
        "--column", type=_column, action="append", default=[], metavar="NAME=COLUMN",
        help="read COLUMN as what is usually called NAME: --column text=alt",
    )  # fmt: skip
    rows.add_argument(
        "--coordinates", choices=("thousandths", "pixels"), default="",
        help="what bbox_2d and point_2d are in: thousandths of the image (Qwen3-VL), or pixels of the image as the "
        "published code of Qwen2.5-VL resizes it (at most 1280 * 28 * 28); without it they are refused",
    )  # fmt: skip
    rows.add_argument("--images", default="", metavar="FOLDER", help="what paths in rows are relative to")
    rows.add_argument("--allow-outside", action="store_true", help="let paths and links lead out of that folder")
    rows.add_argument("--headers-only", action="store_true", help="trust images whose headers are sound")
    looks = out.add_argument_group("videos and pages")
    looks.add_argument(
        "--fps", type=float, default=1.0, metavar="N",
        help="frames a second: 1 (default), 2 where the order of events matters, 5 for motion",
    )  # fmt: skip
    looks.add_argument(
        "--video-tokens", type=int, default=VideoConfig().tokens, metavar="N",
        help="visual tokens of a whole video: frames get 640 to 128 each, then there are fewer (default: %(default)s)",
    )  # fmt: skip
    looks.add_argument(
        "--dpi", type=int, default=144, metavar="N",
        help="at which pages are drawn (default: 144, about 2,500 visual tokens an A4 page; 88 gives 962)",
    )  # fmt: skip
    limits = out.add_argument_group("limits")
    limits.add_argument(
        "--processes", type=int, default=min(os.cpu_count() or 1, 8), metavar="N",
        help="that read rows (default: %(default)s); 0 reads without them, and without limits",
    )  # fmt: skip
    limits.add_argument(
        "--seconds", type=float, default=120, metavar="S", help="of processor time a row (default: 120)"
    )
    limits.add_argument("--megabytes", type=int, default=4096, metavar="MB", help="of memory a row (default: 4096)")
    limits.add_argument("--shard-samples", type=int, default=10_000, metavar="N", help="at most (default: 10000)")
    limits.add_argument("--shard-bytes", type=int, default=1 << 28, metavar="N", help="at most (default: 268435456)")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    try:
        config = IngestConfig(
            args.sources, args.to, args.style, args.source, args.prompt, args.images, args.allow_outside,
            dict(args.column), args.coordinates, not args.headers_only, args.dpi,
            VideoConfig(args.fps, args.video_tokens), LimitsConfig(args.processes, args.seconds, args.megabytes),
            args.shard_samples, args.shard_bytes, args.anew,
        )  # fmt: skip
        if not 0 <= args.max_share <= 1:
            raise ValueError(f"--max-share {args.max_share} must lie in [0, 1]")
    except ValueError as error:
        options.error(str(error))
    try:
        report = ingest(config)
    except (SourceError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a storage that is gone
        print(f"error: {error}; the same command goes on in {args.to}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on in {args.to}", file=sys.stderr)
        return 130
    tally = Tally.of(report)
    print(table(report, args.to))
    if not tally.records:
        print("nothing was written", file=sys.stderr)
        return 1
    if tally.share > args.max_share:
        print(f"{tally.share:.2%} refused, more than --max-share {args.max_share:.2%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
