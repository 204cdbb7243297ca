"""A training process for test_watchdog.py: ``hang_me.py FOLDER WHAT RANK``, where one rank at its fourth step naps,
stops, spins or raises; run by torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mmagent import dist
from mmagent.train.health import HealthConfig
from mmagent.train.loop import fit
from tests.engine_kit import toy_run

HANG_AFTER = 3.0


class Trouble:
    """A hook with a segment of its own."""

    segment = "trouble"

    def __init__(self, what: str):
        self.what = what

    def __call__(self, step: int, record: dict[str, float]) -> None:
        if step != 4:
            return
        if self.what == "nap":
            time.sleep(1000)
        elif self.what == "stop":
            time.sleep(HANG_AFTER / 3)  # a few beats, so that it was seen here
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.what == "spin":
            while True:
                sum(range(1000))
        elif self.what == "raise":
            raise RuntimeError("one rank alone has an error")
        elif self.what == "work":  # all of them, longer than the limit: they move
            ends, n = time.monotonic() + 2 * HANG_AFTER, 0
            while time.monotonic() < ends:
                for i in range(1000):
                    n = (31 * n + i) % 1_000_003


def main(folder: str, what: str, rank: str) -> None:
    world = dist.init(timeout=60, threads=1)
    toy = toy_run(Path(folder), world, health=HealthConfig(hang_after=HANG_AFTER))
    hooks = [Trouble(what)] if what == "work" or world.rank == int(rank) else []
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=6, hooks=hooks)
    dist.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
