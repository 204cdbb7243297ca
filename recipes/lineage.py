"""Chain stages into one plan that can be killed at any moment and goes on where it was.

A stage is a command and the folder it leaves. A stage that has finished carries a stamp with the fingerprint
of its command, of the preset it names, and of every stage before it; when one of them has changed, the stage runs
again, and so does all that stands on it.
Before the next stage starts, a hand-over check opens the folder the way the next stage will.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent.files import write_text
from recipes.processes import MARK, no_orphans, only_one


class LineageError(RuntimeError):
    """A stage that failed or handed over something the next one cannot use; the message says what to do."""


@dataclass(frozen=True)
class Stage:
    """``arguments`` follow ``torchrun ... -m`` (or ``python -m`` where ``processes`` is 0); ``output`` is the folder
    it leaves; ``check(output)`` raises ``ValueError`` when that is unusable; ``share`` is its part of the whole
    time, in any unit, for the estimate of the time left."""

    name: str
    about: str
    arguments: tuple[str, ...]
    output: Path
    check: Callable[[Path], object]
    share: float = 1.0
    processes: int = 1

    def command(self) -> list[str]:
        if self.processes == 0:
            return [sys.executable, "-m", *self.arguments]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}", "-m"]
        return [sys.executable, *launcher, *self.arguments]

    def preset(self) -> str:
        """What ``--preset NAME`` stands for: all that the function NAME of the stage's module returns."""
        module, *rest = self.arguments
        if "--preset" not in rest:
            return ""
        return repr(getattr(importlib.import_module(module), rest[rest.index("--preset") + 1])())


def run_lineage(stages: Sequence[Stage], root: Path, say: Callable[[str], None] = print) -> dict[str, float]:
    """Run what is not done yet, in order. Returns wall seconds a stage, earlier interrupted attempts included.

    Raises :class:`LineageError` naming the stage. :class:`recipes.processes.Busy` when a
    second lineage is started on the same ``root``. SIGTERM and SIGHUP end it as Ctrl-C does, workers included.
    """
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root), no_orphans(root):
        seconds: dict[str, float] = {}
        fingerprint, left = "", sum(stage.share for stage in stages)
        for number, stage in enumerate(stages, 1):
            told = [fingerprint, stage.arguments, stage.preset()]
            fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
            ledger = root / "stages" / f"{stage.name}.json"
            past = _read(ledger)
            title = f"[{number}/{len(stages)}] {stage.name}: {stage.about}"
            if past.get("fingerprint") == fingerprint and past.get("done") and _usable(stage):
                say(f"{title} (done before, {past['seconds']:.0f} s)")
            else:
                if past and past.get("fingerprint") != fingerprint:
                    say(f"{title}: its command, its preset or a stage before it has changed, so it starts afresh")
                    shutil.rmtree(stage.output, ignore_errors=True)
                    past = {}
                spent = sum(seconds.values())
                rate = spent / done if (done := sum(s.share for s in stages) - left) and spent else 1.0
                say(f"{title} (about {_clock(left * rate)} left in all)")
                past = _run(stage, fingerprint, ledger, past.get("seconds", 0.0), root)
                _hand_over(stage)
                _write(ledger, {**past, "done": True})
            seconds[stage.name] = past["seconds"]
            left -= stage.share
        return seconds


def _run(stage: Stage, fingerprint: str, ledger: Path, before: float, root: Path) -> dict[str, Any]:
    started = time.monotonic()
    # what torchrun sets for several anyway, with a banner a stage; of one it would be taken at its word
    threads = {"OMP_NUM_THREADS": "1"} if stage.processes > 1 else {}
    environment = {**threads, **os.environ, MARK: str(root.resolve())}
    process = subprocess.Popen(stage.command(), env=environment, start_new_session=True)
    try:
        while True:
            state = {"fingerprint": fingerprint, "seconds": before + time.monotonic() - started, "done": False}
            _write(ledger, state)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=5)
                break
    except BaseException:  # an interrupt here must reach the workers, that they can save what they have
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        raise
    if code:
        raise LineageError(
            f"stage {stage.name} ended with exit code {code}; its messages are above. Mend the cause and start the "
            f"same command again: finished stages are kept, this one goes on from its last checkpoint."
        )
    return {**state, "seconds": before + time.monotonic() - started}


def _usable(stage: Stage) -> bool:
    try:
        stage.check(stage.output)
    except (ValueError, OSError):
        return False
    return True


def _hand_over(stage: Stage) -> None:
    try:
        stage.check(stage.output)
    except (ValueError, OSError) as error:
        raise LineageError(f"stage {stage.name} left {stage.output} unusable for the next: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # a torn ledger costs one stage's skip, nothing else
        return {}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
