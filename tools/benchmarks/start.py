"""How soon a run trains, and what watching it costs: imports, the first step cold and warm, steps with hooks.

`import mmagent` is compared with `import torch`, `import recipes.pretrain` with the parts of torch that any sharded
training loads. The first step is that of `recipes.pretrain --preset laptop` as a user starts it, alone and by
`torchrun` on two ranks, over shards made beforehand, with no bytecode at all (cold) and with it (warm). Its peer is the
budget of ten seconds after imports; its parts stand beside the whole time from the command to the end of the step: the
launcher, imports, `torch._dynamo` (which torch imports for any optimizer), opening data, building the model, the step.

What hooks cost is measured within one run of the recipe (:mod:`tools.benchmarks.recipe_run`): blocks of steps with all
hooks but the one that saves, and without any, in pairs by lot; on the clock, by processor time (which neighbours on the
machine disturb less), and as the time that is spent in hooks themselves.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.benchmarks.recipe_run import BLOCK, WARM
from tools.benchmarks.row import Row, Settings

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 10.0
"""Seconds that the first step may take after imports."""
SHARE = 2.0
"""Per cent of a step that hooks may take."""
PARTS = ("launcher", "imports", "dynamo", "data", "model", "step")
"""Of the time to the first step, in order; what is left is ``other``."""
PAIRS = 8
"""Pairs of blocks a turn."""


def rows(settings: Settings) -> Iterator[Row]:
    """``spread`` of processes is over turns; see :func:`hook_rows` for that of steps."""
    turns = 1 if settings.quick else settings.repeats
    yield _paired("import mmagent", "import mmagent", "import torch", turns)
    parts = "import torch, torch.distributed.tensor, torch.distributed.fsdp, torch.nn.parallel"
    yield _paired("import recipes.pretrain", "import recipes.pretrain", parts, turns)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        _make(data)
        for ranks in (1,) if settings.quick else (1, 2):
            for cold in (True, False):
                starts = [_start(data, ranks, cold) for _ in range(turns)]
                yield from start_rows(f"first step, {'cold' if cold else 'warm'}, ranks: {ranks}", starts)
        for preset in ("debug",) if settings.quick else ("debug", "laptop"):
            found = _hooks(data, preset, 2 if settings.quick else turns * PAIRS)
            yield from hook_rows(f"{preset} steps with all hooks", found)


def start_rows(name: str, starts: Sequence[dict[str, float]]) -> Iterator[Row]:
    """The first step after imports beside its budget, then each part beside the whole. Medians over ``starts``."""
    after = [start["after imports"] for start in starts]
    median = statistics.median(after)
    yield Row(f"{name}, after imports", median, BUDGET, "budget", BUDGET / median, "s", _spread(after))
    whole = statistics.median(start["whole"] for start in starts)
    for part in (*PARTS, "other"):
        taken = [start[part] for start in starts]
        middle = statistics.median(taken)
        if middle > 0:
            yield Row(f"{name}: {part}", middle, whole, "from the command", whole / middle, "s", _spread(taken))


def hook_rows(name: str, found: dict[str, Any]) -> Iterator[Row]:
    """Steps a second with hooks and without, by the clock and by processor time; the share that is the hooks' own. The
    spread of the first two is half the 95 % interval of the median of pairs: a cost within it is not shown."""
    pairs = found["pairs"]
    for n, kind in enumerate(("", ", processor time")):
        ratios = sorted(pair["without"][n] / pair["with"][n] for pair in pairs)
        away = round(0.98 * len(ratios) ** 0.5)  # places from the middle, by the binomial distribution
        low, high = (ratios[min(max(len(ratios) // 2 + side, 0), len(ratios) - 1)] for side in (-away, away))
        pace = {side: BLOCK / statistics.median(pair[side][n] for pair in pairs) for side in ("with", "without")}
        ratio = statistics.median(ratios)
        spread = (high - low) / 2 / ratio
        yield Row(name + kind, pace["with"], pace["without"], "without", ratio, "steps/s", spread)
    shares = [100 * own / (own + step) for own, step in found["own"]]
    mean = 100 * sum(own for own, _ in found["own"]) / sum(own + step for own, step in found["own"])
    yield Row(f"{name}: their own time", mean, SHARE, "budget", SHARE / mean, "% of a step", _spread(shares))


def _spread(values: Sequence[float]) -> float:
    """Half the range between quartiles, over the median."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / (statistics.median(ordered) or 1.0)


def _make(folder: Path) -> None:
    """Shards of sources that need no browser, and their vocabulary: ten seconds."""
    from data_pipelines.build import BuildConfig, build

    counts = {"captions": 150, "interleaved": 60, "text": 300}
    build(BuildConfig(folder=str(folder), pretrain=counts, browser="none", vocab_size=2048))


def _start(data: Path, ranks: int, cold: bool) -> dict[str, float]:
    """Seconds by part of one start, all of them as ``whole``."""
    with tempfile.TemporaryDirectory() as folder:
        how = {"PYTHONPYCACHEPREFIX": str(Path(folder) / "bytecode")} if cold else {}
        started = time.time()
        parts = _run(data, Path(folder), "start", "laptop", ranks, 1, **how)
    # the system tells the start of a process in hundredths of a second: it may come before the command
    parts["launcher"] = max(parts.pop("began") - started, 0.0) if ranks > 1 else 0.0
    parts["whole"] = parts["launcher"] + parts["imports"] + parts["after imports"]
    parts["other"] = max(parts["whole"] - sum(parts[part] for part in PARTS), 0.0)
    return parts


def _hooks(data: Path, preset: str, pairs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return _run(data, Path(folder), "hooks", preset, 1, WARM + 2 * BLOCK * pairs)


def _run(data: Path, folder: Path, what: str, preset: str, ranks: int, steps: int, **environment: str) -> Any:
    """What :mod:`tools.benchmarks.recipe_run` reports of so many steps."""
    module = ["-m", "tools.benchmarks.recipe_run", str(folder / "report.json"), what, "--preset", preset]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    given = [f"tokenizer={data}/tokenizer.json", f"data.folder={data}/pretrain", f"output={folder}/run"]
    given += [f"phases=[{{name: all, steps: {steps}}}]"]
    if preset == "debug":  # packs that hold the longest text
        given += ["model.vocab_size=2048", "data.tokens_per_step=2048", "data.tokens_per_microbatch=2048"]
    _output([sys.executable, *launcher, *module, *given], **environment)
    return json.loads((folder / "report.json").read_text())


def _paired(name: str, ours: str, peer: str, turns: int) -> Row:
    """Seconds of two programs, each in processes of its own."""
    pairs = [(_seconds(ours), _seconds(peer)) for _ in range(turns)]
    ratios = sorted(b / a for a, b in pairs)
    ratio = statistics.median(ratios)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return Row(name, *medians, peer.split(",")[0], ratio, "s", (ratios[-1] - ratios[0]) / 2 / ratio)


def _seconds(program: str) -> float:
    """What ``program`` takes in a fresh interpreter, the interpreter's own start apart."""
    timed = f"import time; started = time.perf_counter(); {program}; print(time.perf_counter() - started)"
    return float(_output([sys.executable, "-c", timed]).splitlines()[-1])


def _output(command: list[str], **environment: str) -> str:
    """What ``command`` prints. Raises ``RuntimeError`` with the end of its errors where it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    how = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, cwd=ROOT, env=how, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout
