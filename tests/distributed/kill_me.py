"""A training process for test_kill.py: ``kill_me.py FOLDER STEPS PARALLEL [--slow]``; run alone or by torchrun."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mmagent import dist
from mmagent.train.hooks import JsonlLog, SaveHook
from mmagent.train.loop import fit
from tests.engine_kit import toy_run


def main(folder: str, steps: str, parallel: str, *flags: str) -> None:
    world = dist.init(timeout=60, threads=1)
    toy = toy_run(Path(folder), world, parallel)
    hooks = [SaveHook(toy.run, 2), JsonlLog(Path(folder) / "metrics.jsonl")]
    if "--slow" in flags:  # so that a kill lands anywhere within the run
        hooks.append(lambda step, record: time.sleep(0.02))
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=int(steps), hooks=hooks)


if __name__ == "__main__":
    main(*sys.argv[1:])
