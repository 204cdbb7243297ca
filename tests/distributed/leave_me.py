"""A training process for test_leaving.py: ``leave_me.py FOLDER STEPS WHERE``, slow in one place, so that a signal lands
there; and for torchrun: ``WHERE`` ``die-N`` kills rank N in the middle of its seventh step, in its first life."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mmagent import dist
from mmagent.engine import saving
from mmagent.train.hooks import JsonlLog, LeaveOnSignal, SaveHook
from mmagent.train.loop import fit
from tests.engine_kit import toy_run

SLOW = 0.2


def main(folder: str, steps: str, where: str) -> None:
    world = dist.init(timeout=60, threads=1)
    toy = toy_run(Path(folder), world)
    hooks = [JsonlLog(Path(folder) / "metrics.jsonl"), SaveHook(toy.run, 3)]
    hooks.append(LeaveOnSignal(toy.run, patience=1.0 if where == "stuck" else 600.0))
    forward, write = toy.objective.forward, saving.write_pieces

    def wait(place: str) -> None:
        if where == place:
            (Path(folder) / "here").touch()
            time.sleep(SLOW)

    class Slow(type(toy.stream)):
        def __next__(self):
            wait("data")
            while where == "stuck" and self.position == 8:
                (Path(folder) / "here").touch()
                time.sleep(0.05)
            return super().__next__()

    def slow_write(*args):
        wait("saving")
        return write(*args)

    def dying_forward(batch):
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if where == f"die-{world.rank}" and toy.stream.position == 14 and not restarted:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(batch)

    toy.stream.__class__ = Slow
    saving.write_pieces = slow_write
    toy.objective.forward = dying_forward
    hooks.insert(0, lambda step, record: wait("validation"))
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=int(steps), hooks=hooks)
    dist.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
