"""Where a run's figures go: a line for people, files of JSON lines, TensorBoard, Weights & Biases. All are hooks."""

from __future__ import annotations

import importlib.util
import json
import secrets
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mmagent import dist
from mmagent.files import write_text

if TYPE_CHECKING:  # stages without a language model need not load one
    from mmagent.objectives.routed import RoutedObjective

Record = dict[str, float]
MACHINE = ("time/", "memory/", "data/retries")
"""How the names of figures begin that depend on the machine, and not on the seed alone."""


class Progress:
    """One line with the step, ``figures`` of the record, tokens a second, seconds a step and the time left. These three
    are of one window: the last 32 steps with all that happened between them (validation, saving), without a process's
    first, which warms up. On a terminal it is redrawn; elsewhere a plain line is written every ``interval`` seconds,
    and for the first, the second and the last step."""

    segment = "logging"

    def __init__(
        self,
        title: str,
        steps: int,
        *,
        figures: Sequence[str] = ("loss",),
        interval: float = 20.0,
        out: TextIO | None = None,
    ):
        self.title, self.steps, self.figures, self.interval = title, steps, tuple(figures), interval
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self._last_step_at: float | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=32)  # seconds from call to call, and tokens of the step
        self._written_at = -float("inf")

    def __call__(self, step: int, record: Record) -> None:
        if not dist.is_main():
            return
        now = time.monotonic()
        if self._last_step_at is not None:  # the first step would mislead
            self._recent.append((now - self._last_step_at, _tokens(record)))
        self._last_step_at = now
        last = step >= self.steps
        if self.live:
            end = "\n" if last else ""
            self.out.write(f"\r{self.line(step, record)}\x1b[K{end}")
        elif last or len(self._recent) == 1 or now - self._written_at >= self.interval:
            self._written_at = now
            self.out.write(self.line(step, record) + "\n")
        self.out.flush()

    def line(self, step: int, record: Record) -> str:
        """The line for ``step`` of a run."""
        window = self._recent or [(record["time/step"], _tokens(record))]
        whole = sum(seconds for seconds, _ in window)
        seconds, rate = whole / len(window), sum(tokens for _, tokens in window) / whole if whole else 0.0
        left = f"{_clock(seconds * (self.steps - step))} left" if self._recent else "warming up"
        left = "done" if step >= self.steps else left
        filled = int(20 * step / max(self.steps, 1))
        figures = "  ".join(f"{name} {record[name]:.4g}" for name in self.figures if name in record)
        return (
            f"{self.title} [{'=' * filled:<20}] {step}/{self.steps}  {figures}  "
            f"{_short(rate)} tok/s  {seconds:.2f} s/step  {left}"
        )


def _tokens(record: Record) -> float:
    """Of a step of all ranks."""
    return record["time/tokens_per_second"] * record["time/step"]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _short(value: float) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"


class JsonlLog:
    """One JSON object a step in ``path``: what the seed decides; and beside it, in ``<stem>.time.jsonl``, what the
    machine decides. Each step stands in them exactly once, however often the run is killed and resumed: lines from
    the step resumed at onwards, whole or torn, are dropped at the first call, and where a running one goes back.
    ``time/wall`` there: seconds since the last call, all that happened between two steps included."""

    segment = "logging"

    def __init__(self, path: str | Path):
        self.path, self._last, self._called = Path(path), 0, 0.0
        self._files: dict[Path, TextIO] = {}

    def __call__(self, step: int, record: Record) -> None:
        if not dist.is_main():
            return
        timing = self.path.with_suffix(".time.jsonl")
        rows = {self.path: {"step": step}, timing: {"step": step}}
        for name, value in record.items():
            rows[timing if name.startswith(MACHINE) else self.path][name] = value
        now, before = time.monotonic(), self._called
        if before:
            rows[timing]["time/wall"] = now - before
        self._called = now
        if step <= self._last:  # rolled back
            self.close()
        self._last = step
        for path, row in rows.items():
            if path not in self._files:
                path.parent.mkdir(parents=True, exist_ok=True)
                drop_from(path, step)
                self._files[path] = path.open("a")
            self._files[path].write(json.dumps(row) + "\n")
            self._files[path].flush()  # a killed process loses nothing that the kernel has

    def close(self) -> None:
        """Let go of the files; the next call opens them anew."""
        while self._files:
            self._files.popitem()[1].close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log; a torn last line is left out. Raises ``ValueError`` naming file and line of one that is no
    row: a kill tears none but the last."""
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no row of a log ({error}); mend or delete it") from error
    return rows


def drop_from(path: Path, step: int) -> None:
    """Leave of a log the rows before ``step``: those after it will be written again."""
    kept = [row for row in read_jsonl(path) if row["step"] < step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


class RouterLog:
    """One JSON object a call in ``path``: how many tokens every expert of every layer served in the step. What
    ``tools/router_load.py`` draws. ``objective`` has ``router_load (M, E)`` and a ``model`` with ``router_names()``; a
    step without experts, or that was left out, writes nothing. Runs that resume or go back replace what follows."""

    segment = "logging"

    def __init__(self, path: str | Path, objective: RoutedObjective):
        self.path, self.objective = Path(path), objective
        self._last: int | None = None

    def __call__(self, step: int, record: Record) -> None:
        load = self.objective.router_load
        if load is None or not dist.is_main():
            return
        if self._last is None or step <= self._last:
            drop_from(self.path, step)
        self._last = step
        row = {"step": step, "layers": self.objective.model.router_names(), "load": load.tolist()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class TensorBoardLog:
    """Every figure as a TensorBoard scalar. Runs that resume or go back overwrite what follows."""

    segment = "logging"

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._writer: Any = None
        self._last = 0

    def __call__(self, step: int, record: Record) -> None:
        if not dist.is_main():
            return
        if self._writer is not None and step <= self._last:
            self._writer.close()
            self._writer = None
        self._last = step
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(self.directory), purge_step=step)
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WandbLog:
    """Every figure to Weights & Biases, as a run of ``project`` named ``name``. A resumed run goes on in the same one:
    its id lies in ``<directory>/wandb.json``. Where there is no network, ``WANDB_MODE=offline`` keeps all under
    ``<directory>/wandb`` for ``wandb sync``. Raises ``ValueError`` at once where the package is missing.

    What was sent cannot be taken back there, and what is sent for an earlier step of its own count is dropped without a
    word. So that count goes its own way, and charts are drawn over the figure ``step``: what a run that was killed or
    went back does again is drawn again, beside what it did before.
    """

    segment = "logging"

    def __init__(self, directory: str | Path, project: str, name: str, steps: int, config: str = ""):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "watch.wandb: the package wandb is not installed; pip install 'mmagent[wandb]', or leave it empty"
            )
        self.directory, self.project, self.name, self.steps = Path(directory), project, name, steps
        self.config = config
        self._run: Any = None

    def __call__(self, step: int, record: Record) -> None:
        if not dist.is_main():
            return
        if self._run is None:
            self._run = self._begin()
        self._run.log({**record, "step": step})
        if step >= self.steps:
            self._run.finish()

    def _begin(self) -> Any:
        import wandb  # slow to import

        note = self.directory / "wandb.json"
        if not note.exists():
            write_text(note, json.dumps({"id": secrets.token_hex(4)}))
        run = wandb.init(
            project=self.project,
            name=self.name,
            id=json.loads(note.read_text())["id"],
            resume="allow",
            dir=str(self.directory),
            config={"yaml": self.config},
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run
