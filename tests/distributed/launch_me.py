"""A short toy training for a launcher to start: ``launch_me.py <folder>``. Its log is the run."""

from __future__ import annotations

import sys
from pathlib import Path

from mmagent import dist
from mmagent.train.launch import launch
from mmagent.train.logs import JsonlLog
from mmagent.train.loop import fit
from tests.engine_kit import toy_run


def main() -> None:
    world = dist.init(threads=1)
    toy = toy_run(Path(sys.argv[1]), world, "ddp" if world.size > 1 else "none")
    log = JsonlLog(Path(sys.argv[1]) / "log.jsonl")
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=3, hooks=[log])
    dist.shutdown()


if __name__ == "__main__":
    launch(main)
