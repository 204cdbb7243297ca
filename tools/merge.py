"""Merge checkpoints of one training run, or model folders, into a new model folder (PMA, arXiv 2505.12082).

    python tools/merge.py runs/pretrain --into runs/merged --count 10
    python tools/merge.py runs/pretrain --into runs/merged --count 3 --before 4200
    python tools/merge.py runs/a/agent runs/b/agent --into runs/merged --kind wma

A run's newest whole checkpoints are merged (keep=10 keeps as many), and what stands beside the weights comes from the
agent or encoder that the run left, or from --like. Folders are given oldest first. Sums are taken in float32, over
parameters and the router's bias, piece by piece: memory in use does not grow with the model. All must be one
trajectory, or at least have one ancestor: that cannot be seen in weights. Compare the result with the best single
checkpoint on held-out data before you use it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

from mmagent.engine.checkpoint import steps  # noqa: E402
from mmagent.engine.merging import KINDS, MergeConfig, merged_checkpoints, merged_folders  # noqa: E402
from mmagent.files import new_folder  # noqa: E402
from mmagent.ops.tensor_files import INDEX, Stored, TensorFiles, WeightsError, weight_files, write_files  # noqa: E402
from tools.convert import SHARD_SIZE, Progress, size  # noqa: E402

LEFT = ("agent", "encoder")
"""Folders that a finished run leaves."""


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        config = MergeConfig(args.kind, args.count or max(len(args.sources), 2), args.alpha)
        like = args.like or _like(args.sources)
        if args.into.exists() and (not args.into.is_dir() or any(args.into.iterdir())):
            raise ValueError(f"{args.into} is there already: name a new folder")
        with _merged(args, config) as (told, tensors):
            write(args.into, like, tensors, args.shard_size)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{args.into}: {args.kind} of {told}")
    return 0


def write(into: Path, like: Path, tensors: Mapping[str, Stored], shard_size: int | None) -> None:
    """``tensors`` as a folder like ``like``, whose tensors they must have in name, shape and dtype."""
    with TensorFiles(like) as files:
        chosen = _named_as(files, tensors, like)
    total, done = sum(tensor.nbytes for tensor in chosen), 0
    progress = Progress()

    def count(written: int) -> None:
        nonlocal done
        done += written
        progress(done, total)

    weights = {path.name for path in weight_files(like)} | {INDEX}
    with new_folder(into) as beside:
        for path in like.iterdir():
            if path.is_file() and path.name not in weights:
                shutil.copyfile(path, beside / path.name)
        write_files(beside, chosen, shard_size, count)


def _named_as(files: Mapping[str, Stored], tensors: Mapping[str, Stored], like: Path) -> list[Stored]:
    """Those of ``tensors`` that ``files`` names, under its names: a checkpoint may hold them below a prefix."""
    first = next(iter(files))
    prefixes = [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + name in tensors for name in files)]
    if len(prefixes) != 1:
        raise WeightsError(f"the checkpoints hold {len(prefixes)} models with the tensors of {like}, such as {first}")
    chosen = []
    for name, file in files.items():
        tensor = tensors[prefixes[0] + name]
        if (tensor.shape, tensor.dtype) != (file.shape, file.dtype):
            told = f"{tensor.shape} {tensor.dtype}, in {like} {file.shape} {file.dtype}"
            raise WeightsError(f"{tensor.name} is {told}: it is another model, or saved in another dtype")
        chosen.append(Stored(name, tensor.shape, tensor.dtype, tensor.place, tensor.read))
    return chosen


@contextmanager
def _merged(args: argparse.Namespace, config: MergeConfig) -> Iterator[tuple[str, Mapping[str, Stored]]]:
    if not _is_run(args.sources[0]):
        if args.before is not None or (args.count and args.count != len(args.sources)):
            raise ValueError("--count and --before choose among a run's checkpoints; folders are all merged")
        with merged_folders(args.sources, config) as tensors:
            yield f"{len(args.sources)} folders", tensors
        return
    if len(args.sources) > 1:
        raise ValueError("name one run, or several model folders")
    root = args.sources[0] / "checkpoints"
    with merged_checkpoints(root, args.module, config, args.before) as merged:
        yield f"steps {', '.join(map(str, merged.steps))}", merged.tensors


def _is_run(folder: Path) -> bool:
    return bool(steps(folder / "checkpoints"))


def _like(sources: Sequence[Path]) -> Path:
    if not _is_run(sources[0]):
        if len(sources) < 2:
            raise ValueError(f"{sources[0]} holds no checkpoints: name a run, or at least two model folders")
        return sources[-1]
    found = [sources[0] / name for name in LEFT if (sources[0] / name).is_dir()]
    if len(found) != 1:
        raise ValueError(f"{sources[0]} has left no model yet: name a folder of the same model, --like FOLDER")
    return found[0]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="a run, or model folders, oldest first")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument(
        "--kind", choices=KINDS, default="sma", help="all alike, the newest most, by place: %(default)s"
    )
    parser.add_argument("--count", type=int, default=0, metavar="N", help="checkpoints of a run (default: 2)")
    parser.add_argument("--before", type=int, metavar="STEP", help="only checkpoints of earlier steps: before a spike")
    parser.add_argument("--alpha", type=float, default=0.2, help="weight of the newest, of ema (default: %(default)s)")
    parser.add_argument("--module", default="model", help="of a run's parts: model, objective (default: %(default)s)")
    parser.add_argument("--like", type=Path, metavar="FOLDER", help="where configuration and vocabulary come from")
    parser.add_argument("--shard-size", type=size, default=SHARD_SIZE, metavar="BYTES", help="most of a file (5G)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
