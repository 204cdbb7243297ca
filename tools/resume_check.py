"""Prove that a recipe resumes exactly: N + M steps at one go against N, kill -9, M, compared bit by bit.

    python tools/resume_check.py pretrain --preset debug encoder=runs/align/encoder data.folder=runs/data/pretrain \\
        tokenizer=runs/data/tokenizer.json
    python tools/resume_check.py rl --preset debug --kills 5 --ranks 2 init=runs/sft/agent steps=6

RECIPE is a module of recipes (teachers, distill_encoder, align_encoder, pretrain, sft, rl) or the path of another one;
overrides are its own. It runs once undisturbed and once killed --kills times: at random moments of its start-up, of a
step and of the writing of a checkpoint, with all its processes, from --seed. Then everything that the two left is
compared: the last checkpoints (weights, optimizer, averages, streams, random generators of every rank), the logs, in
which no step may be missing or double, and the folders that the recipe hands on. The first difference is printed; the
status is 0 where there is none, 1 where there is one, and 2 where a run failed. All is kept under --work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # a script starts with its own folder there, not with the repository
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mmagent.engine import checkpoint  # noqa: E402
from mmagent.engine.pieces import PieceFiles  # noqa: E402
from mmagent.train.hooks import read_jsonl  # noqa: E402

LOG = "log.jsonl"
OF_THE_MACHINE = (".time.jsonl", "ranks.jsonl")
"""Ends of the names of logs that hold times: in these only the steps are compared."""
NOT_COMPARED = ("checkpoints", "tensorboard", "profile", "wandb", "environment")


class Failed(RuntimeError):
    """A run that did not end as it should; the message says how, with the end of what it said."""


@dataclass
class Seen:
    """What was compared, and the first difference in each place."""

    tensors: int = 0
    values: int = 0
    rows: int = 0
    files: int = 0
    differences: list[str] = field(default_factory=list)


class Moment(NamedTuple):
    """When to kill: ``after`` so many steps, in a ``share`` of what follows: the start-up where none are asked for, the
    writing of the next checkpoint (``writing``), or a step."""

    after: int
    share: float
    writing: bool

    def __str__(self) -> str:
        where = "into the writing of a checkpoint" if self.writing else "into a step"
        where = where if self.after else "into its start-up"
        return f"after step {self.after}, {self.share:.0%} {where}"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 16)
    work = args.work or Path(tempfile.mkdtemp(prefix="resume-check-"))
    work.mkdir(parents=True, exist_ok=True)
    print(f"{args.recipe}: {args.kills} kills, --seed {seed}, in {work}", flush=True)
    try:
        seen = check(command(args.recipe, args.preset, args.ranks, args.overrides), work, args.kills, seed)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counted = f"{seen.tensors} tensors, {seen.values} other values, {seen.rows} log rows, {seen.files} files"
    if seen.differences:
        print("different:", *seen.differences, f"(compared: {counted})", sep="\n  ")
        return 1
    print(f"equal: {counted}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="a module of recipes, or a module's path")
    parser.add_argument(
        "overrides", nargs="*", metavar="NAME=VALUE", help="as the recipe takes them, and its YAML files"
    )
    parser.add_argument("--preset", help="of the recipe (default: its own)")
    parser.add_argument("--ranks", type=int, default=1, help="processes under torchrun (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=3, help="how often it is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the moments (default: a new one, which is printed)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where both runs go (default: a new folder)")
    args = parser.parse_intermixed_args(argv)
    if args.kills < 1 or args.ranks < 1:
        parser.error("--kills and --ranks must be at least 1")
    if any(override.startswith("output=") for override in args.overrides):
        parser.error("output= is what --work is for")
    return args


def command(recipe: str, preset: str | None, ranks: int, overrides: list[str]) -> list[str]:
    """How a user would launch it, but for its output."""
    module = recipe if "." in recipe else f"recipes.{recipe}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", module, *(["--preset", preset] if preset else []), *overrides]


def check(launch: list[str], work: Path, kills: int, seed: int) -> Seen:
    """Both runs, and what differs. Raises :class:`Failed`."""
    run, whole, parts = work / "run", work / "whole", work / "parts"
    for folder in (run, whole, parts):
        shutil.rmtree(folder, ignore_errors=True)
    launch = [*launch, f"output={run}"]  # one path for both, as configurations are compared as well
    started = time.monotonic()
    _finish(_start(launch, work / "whole.txt"), work / "whole.txt")
    took, steps = time.monotonic() - started, _steps(run)
    if steps < 1:
        raise Failed(f"it left no {LOG}, or an empty one, in {run}")
    print(f"undisturbed: {steps} steps in {took:.1f} s; about {(kills + 1) * took:.0f} s for the other", flush=True)
    run.rename(whole)
    killed, pace = 0, _pace(whole, took)
    for attempt in range(5):
        dice = random.Random(seed + attempt)
        for _ in range(kills):
            process = _start(launch, work / "parts.txt")
            if not _kill(process, run, _moment(dice, steps), pace):
                _finish(process, work / "parts.txt")
                break
            killed += 1
        if killed:
            break
        print("it ended before it could be killed: once more", flush=True)
        shutil.rmtree(run)
    if not killed:
        raise Failed("it always ended before it could be killed: give it more steps")
    if killed == kills:
        _finish(_start(launch, work / "parts.txt"), work / "parts.txt")
    print(f"killed {killed} times and resumed to its end: {time.monotonic() - started:.1f} s", flush=True)
    run.rename(parts)
    return compare(whole, parts)


# ---------------------------------------------------------------------------------------------- running and killing


class Pace(NamedTuple):
    """Seconds until the first step, of a step, and of the writing of a checkpoint."""

    start: float
    step: float
    writing: float


def _pace(run: Path, took: float) -> Pace:
    rows = read_jsonl(run / LOG.replace(".jsonl", ".time.jsonl"))
    seconds = [row.get("time/step", 0.0) for row in rows]
    writing = [row["time/checkpoint_write"] for row in rows if "time/checkpoint_write" in row]
    return Pace(max(took - sum(seconds), 0.1), max(seconds[-1], 0.01), max([*writing, 0.02]))


def _moment(dice: random.Random, steps: int) -> Moment:
    return Moment(dice.randrange(steps), dice.random(), dice.random() < 0.5)


def _start(launch: list[str], said: Path) -> subprocess.Popen[bytes]:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    with said.open("ab") as out:
        return subprocess.Popen(launch, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def _finish(process: subprocess.Popen[bytes], said: Path) -> None:
    try:
        status = process.wait()
    except BaseException:
        _kill_all(process)
        raise
    if status:
        raise Failed(f"a run ended with status {status}; its last words, of {said}:\n{said.read_text()[-2000:]}")


def _kill(process: subprocess.Popen[bytes], run: Path, moment: Moment, pace: Pace) -> bool:
    """Kill it at the ``moment``; false where it ended before."""
    print(f"  kill -9 {moment}", flush=True)
    log, before = run / LOG, _changed(run / LOG)
    if moment.after:
        while process.poll() is None and (_changed(log) == before or _steps(run) < moment.after):
            time.sleep(0.002)
        if moment.writing:
            patience = time.monotonic() + 20 * pace.step
            while process.poll() is None and time.monotonic() < patience and not _being_written(run):
                time.sleep(0.0005)
            time.sleep(moment.share * pace.writing)
        else:
            time.sleep(moment.share * pace.step)
    else:
        deadline = time.monotonic() + moment.share * pace.start
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    if process.poll() is not None:
        return False
    _kill_all(process)
    return True


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started, at one time: those that began a session of their own, too."""
    every, news = [process.pid], [process.pid]
    while news:
        news = [child for parent in news for child in _children(parent)]
        every += news
    for number in every:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself
            continue
    process.wait()


def _children(parent: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            found += [int(number) for number in file.read_text().split()]
        except OSError:  # gone meanwhile
            continue
    return found


def _being_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".writing-*"))


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _steps(run: Path) -> int:
    rows = read_jsonl(run / LOG)
    return rows[-1]["step"] if rows else 0


# ---------------------------------------------------------------------------------------------- comparing


def compare(whole: Path, parts: Path) -> Seen:
    """Everything that two runs left, of which the first difference of each place is told."""
    seen = Seen()
    names = [{file.relative_to(root) for file in _files(root)} for root in (whole, parts)]
    logs = {name for name in names[0] | names[1] if name.suffix == ".jsonl"}
    for name in sorted(logs, key=lambda name: (name != Path(LOG), name)):  # figures of steps before all others
        _note(seen, str(name), _compare_logs(whole / name, parts / name, seen))
    _note(seen, "checkpoints", _compare_checkpoints(whole / "checkpoints", parts / "checkpoints", seen))
    for name in sorted((names[0] | names[1]) - logs):
        _note(seen, str(name), _compare_files(whole / name, parts / name, seen))
    return seen


def _note(seen: Seen, place: str, differences: Iterator[str]) -> None:
    for difference in differences:
        seen.differences.append(f"{place}: {difference}")
        return


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.name.startswith(NOT_COMPARED):
            continue
        yield from (file for file in sorted(path.rglob("*")) if file.is_file()) if path.is_dir() else [path]


def _compare_logs(whole: Path, parts: Path, seen: Seen) -> Iterator[str]:
    one, other = (read_jsonl(path) for path in (whole, parts))
    if one and "step" not in one[0]:  # samples that could not be used: in the order in which threads met them
        seen.rows += len(one)
        texts = [Counter(json.dumps(row) for row in rows) for rows in (one, other)]
        missing, extra = texts[0] - texts[1], texts[1] - texts[0]
        yield from (f"{row} is missing" for row in missing)
        yield from (f"{row} is there in addition" for row in extra)
        return
    steps = [_steps_in(rows) for rows in (one, other)]
    if steps[0] != steps[1]:
        yield f"it has the steps {_ranges(steps[1])}, undisturbed {_ranges(steps[0])}"
        return
    seen.rows += len(other)
    if whole.name.endswith(OF_THE_MACHINE):
        return
    for a, b in zip(one, other, strict=False):
        for name in dict.fromkeys([*a, *b]):
            if json.dumps(a.get(name)) != json.dumps(b.get(name)):  # NaN is equal to NaN
                yield f"step {a['step']}: {name} is {b.get(name)}, undisturbed {a.get(name)}"


def _steps_in(rows: list[dict[str, Any]]) -> list[int]:
    """A row is about one step, or about several."""
    return [step for row in rows for step in row.get("steps", [row["step"]])]


def _ranges(steps: list[int]) -> str:
    out, first = [], 0
    for n in range(len(steps)):
        if n + 1 == len(steps) or steps[n + 1] != steps[n] + 1:
            out.append(f"{steps[first]}" if first == n else f"{steps[first]}-{steps[n]}")
            first = n + 1
    return ", ".join(out) or "none"


def _compare_checkpoints(whole: Path, parts: Path, seen: Seen) -> Iterator[str]:
    folders = [checkpoint.latest(root)[0] for root in (whole, parts)]
    if folders[0] is None or folders[1] is None or folders[0].name != folders[1].name:
        yield f"the newest is {folders[1]}, undisturbed {folders[0]}"
        return
    one, other = (checkpoint.read_manifest(folder) for folder in folders if folder)
    for name in ("world_size", "modules"):
        if one[name] != other[name]:
            yield f"{name} is {other[name]}, undisturbed {one[name]}"
    for part in dict.fromkeys([*one["parts"], *other["parts"]]):
        stores = [checkpoint.tensors_of(folder, m, part) for folder, m in zip(folders, (one, other), strict=True)]
        yield from (f"{part}: {told}" for told in _compare_tensors(*stores, seen))
    for name in sorted(n for n in one["files"] if n.endswith(".pt")):
        if name in other["files"]:
            states = [checkpoint.read_state(folder / name) for folder in folders]
            yield from _compare_states(*states, name.removesuffix(".pt"), seen)
        else:
            yield f"{name} is missing"


def _compare_tensors(one: PieceFiles, other: PieceFiles, seen: Seen) -> Iterator[str]:
    for name in dict.fromkeys([*one, *other]):
        if name not in one or name not in other:
            yield f"{name} is {'missing' if name in one else 'there in addition'}"
            continue
        seen.tensors += 1
        yield from (f"{name}{told}" for told in _compare_values(one[name].whole(), other[name].whole()))


def _compare_values(one: Tensor, other: Tensor) -> Iterator[str]:
    """Bit by bit: NaN is equal to the same NaN, and 0 is not -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        yield f" is {other.dtype} {tuple(other.shape)}, undisturbed {one.dtype} {tuple(one.shape)}"
        return
    bits = [tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.itemsize) for tensor in (one, other)]
    unequal = (bits[0] != bits[1]).any(1)
    if unequal.any():
        first = int(unequal.nonzero()[0])
        index = [int(n) for n in torch.unravel_index(torch.tensor(first), one.shape)] if one.ndim else []
        a, b = (tensor.reshape(-1)[first].item() for tensor in (one, other))
        yield f"{index} is {b!r}, undisturbed {a!r} ({int(unequal.sum())} of {one.numel()} differ)"


def _compare_states(one: Any, other: Any, path: str, seen: Seen) -> Iterator[str]:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        seen.tensors += 1
        yield from (f"{path}{told}" for told in _compare_values(one, other))
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            if key not in one or key not in other:
                yield f"{path}.{key} is {'missing' if key in one else 'there in addition'}"
            else:
                yield from _compare_states(one[key], other[key], f"{path}.{key}", seen)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for n, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _compare_states(a, b, f"{path}[{n}]", seen)
    else:
        seen.values += 1
        if repr(one) != repr(other):  # of plain values; NaN is equal to NaN
            yield f"{path} is {other!r}, undisturbed {one!r}"


def _compare_files(whole: Path, parts: Path, seen: Seen) -> Iterator[str]:
    if not whole.is_file() or not parts.is_file():
        yield "it is missing" if whole.is_file() else "it is there in addition"
        return
    seen.files += 1
    if whole.suffix == ".safetensors":
        yield from _compare_tensors(PieceFiles([whole]), PieceFiles([parts]), seen)
    elif whole.read_bytes() != parts.read_bytes():
        yield "its content differs"


if __name__ == "__main__":
    sys.exit(main())
