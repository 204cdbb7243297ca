"""A recipe for test_resume_check.py: ``toy_recipe.py [forgets=true] output=FOLDER`` trains the toy for twenty steps."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mmagent import dist
from mmagent.train.hooks import JsonlLog, SaveHook
from mmagent.train.loop import fit
from tests.engine_kit import toy_run


def main(told: dict[str, str]) -> None:
    world = dist.init(timeout=60, threads=1)
    folder = Path(told["output"])
    toy = toy_run(folder, world)
    if told.get("forgets"):
        toy.stream.load_state_dict = lambda state: None  # type: ignore[method-assign]
    hooks = [toy.run.log, JsonlLog(folder / "log.jsonl"), SaveHook(toy.run, 2), lambda step, record: time.sleep(0.05)]
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=20, hooks=hooks)


if __name__ == "__main__":
    main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
