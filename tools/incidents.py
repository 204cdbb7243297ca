"""What went wrong in a run, and the documents it went wrong with.

    python tools/incidents.py runs/pretrain
    python tools/incidents.py runs/pretrain --step 412 --data runs/data/pretrain --show runs/incident

Lists the incidents of ``RUN/incidents.jsonl``. ``--data`` (a folder of shards, or of folders of shards; may be given
several times) finds the documents of an incident by their keys and prints them; ``--show`` also writes their images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

from data_pipelines.shards import ShardSet  # noqa: E402
from mmagent.train.incidents import Incident, read_incidents  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where there is no incident to show, or none of the documents is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="only the incidents of this step, as logs number them")
    parser.add_argument("--data", type=Path, action="append", default=[], help="where shards lie")
    parser.add_argument("--show", type=Path, help="a folder for the images of the documents")
    parser.add_argument("--most", type=int, default=8, help="documents of an incident that are printed (default 8)")
    options = parser.parse_args(argv)
    if not (options.run / "config.yaml").is_file():
        parser.error(f"{options.run} holds no run (no config.yaml)")
    for folder in options.data:
        if not shard_folders(folder):
            parser.error(f"--data {folder} holds no shards (no *.tar in it or in its folders)")
    try:
        known = read_incidents(options.run / "incidents.jsonl")
    except ValueError as error:
        parser.error(str(error))
    incidents = [incident for incident in known if options.step in (None, incident.step + 1)]
    if not incidents:
        print(f"{options.run}: no incidents" + (f" at step {options.step}" if options.step else ""), file=sys.stderr)
        return 1
    for incident in incidents:
        print(incident.paragraph(options.run, most=options.most) + "\n")
    if options.data:
        wanted = wanted_keys(incidents, options.most)
        asked = len(wanted)
        for folder in options.data:
            for sample in find(folder, wanted):
                wanted.discard(sample["__key__"])
                describe(sample, options.show)
        if wanted:
            print(f"not found: {', '.join(sorted(wanted))}", file=sys.stderr)
            return int(len(wanted) == asked)
    return 0


def wanted_keys(incidents: Sequence[Incident], most: int) -> set[str]:
    """The first ``most`` documents of every incident, those of the worst micro-batches first."""
    wanted: set[str] = set()
    for incident in incidents:
        keys = dict.fromkeys(key for finding in incident.findings for key in finding.documents)
        wanted |= set(list(keys)[:most])
    return wanted


def shard_folders(folder: Path) -> list[Path]:
    """``folder`` itself where shards lie in it, else those of its folders that hold some."""
    return [folder] if any(folder.glob("*.tar")) else sorted({path.parent for path in folder.glob("*/*.tar")})


def find(folder: Path, keys: set[str]) -> Iterator[dict[str, Any]]:
    """Samples of ``keys`` in the shards at ``folder`` and in its folders. Reads all shards until they are found."""
    left, tty = set(keys), sys.stderr.isatty()
    for place in shard_folders(folder):
        samples = ShardSet(place)
        for n in range(len(samples)):
            if not left:
                return
            if tty and n % 1000 == 0:
                print(f"\r{place}: {n} of {len(samples)} samples, {len(left)} to find", end="", file=sys.stderr)
            sample = samples.read(n)
            if sample["__key__"] in left:
                left.discard(sample["__key__"])
                yield sample
        if tty:
            print(file=sys.stderr)


def describe(sample: dict[str, Any], show: Path | None) -> None:
    """Its text as it lies in the shard, and what lies beside it, with ``show`` in files."""
    key = sample["__key__"]
    print(f"==== {key}\n{sample.get('json', b'').decode(errors='replace')}")
    for extension, data in sample.items():
        if extension in ("__key__", "json"):
            continue
        where = ""
        if show is not None:
            show.mkdir(parents=True, exist_ok=True)
            path = show / f"{key.replace('/', '_')}.{extension}"
            path.write_bytes(data)
            where = f": {path}"
        print(f"{extension} ({len(data)} bytes){where}")


if __name__ == "__main__":
    raise SystemExit(main())
