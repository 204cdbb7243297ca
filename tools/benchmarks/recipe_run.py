"""``recipes.pretrain`` in a process of its own, with a clock in it: what the bench of starting runs.

    python -m tools.benchmarks.recipe_run REPORT start|hooks --preset laptop key=value ...

``start`` notes how long each part took until the end of the first step. ``hooks`` tells hooks of some steps and not of
others: blocks of :data:`BLOCK` steps in pairs, by lot with hooks first or without, so that whatever else the machine
does falls on both alike. Between steps without hooks Python's garbage collector runs when it likes, as it would.
REPORT is a JSON file, written by rank 0.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 3
"""Steps on end with hooks or without: what a hook leaves behind for the next step, such as cold caches, counts too."""
WARM = 2
"""Steps before the first pair, all with hooks."""


class Start:
    """Seconds until the end of step 1, by part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def install(self) -> None:
        """Have the recipe's parts timed as they are built."""
        from recipes import language_stage as stage

        def dynamo(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            importlib.import_module("torch._dynamo")  # what any optimizer of torch does when it is made
            self._note("dynamo", started)
            return optimizer(*given, **named)

        stage.new_agent = self._timed("model", stage.new_agent)
        optimizer = self._timed("model", stage.build_optimizer)
        stage.build_optimizer = dynamo
        stage.build_engine = self._timed("model", stage.build_engine)
        stage.PackStream = self._timed("data", stage.PackStream)  # type: ignore[misc, assignment]

    def _note(self, part: str, started: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started

    def _timed(self, part: str, call: Callable) -> Callable:
        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            made = call(*given, **named)
            self._note(part, started)
            return made

        return timed

    def tell(self, hooks: Any, run: Any, step: int, record: dict[str, float]) -> None:
        """In place of :func:`mmagent.train.hooks.tell`."""
        from mmagent.train import hooks as usual
        from mmagent.train import launch
        from mmagent.train.environment import process_start

        if "step" not in self.parts:
            now, began = time.time(), process_start()
            assert launch.launched is not None
            self.parts["data"] += record["time/data"]
            self.parts["step"] = record["time/step"] - record["time/data"]
            self.parts |= {"imports": launch.launched - began, "after imports": now - launch.launched, "began": began}
        usual.tell(hooks, run, step, record)

    def report(self) -> dict[str, Any]:
        return self.parts


class Hooks:
    """Seconds of blocks of steps with hooks and without."""

    def __init__(self) -> None:
        self.lot = random.Random(0)  # the same on every rank
        self.pairs: list[dict[str, list[float]]] = []
        self.own: list[tuple[float, float]] = []
        self._since: tuple[float, float] | None = None
        self._told = 0
        self._order: list[bool] = []

    def install(self) -> None:
        """Nothing but :meth:`tell`."""

    def tell(self, hooks: Any, run: Any, step: int, record: dict[str, float]) -> None:
        """In place of :func:`mmagent.train.hooks.tell`: all hooks but the one that saves, or none."""
        from mmagent.train import hooks as usual

        self._told += 1
        here = (self._told - WARM - 1) % (2 * BLOCK)
        if self._told > WARM and here == 0:
            self.pairs.append({"with": [0.0, 0.0], "without": [0.0, 0.0]})
            first = self.lot.random() < 0.5
            self._order = [first] * BLOCK + [not first] * BLOCK
        hooked = self._told <= WARM or self._order[here]
        if hooked:
            started = time.perf_counter()
            usual.tell([hook for hook in hooks if not isinstance(hook, usual.SaveHook)], run, step, record)
            if self._told > WARM:
                self.own.append((time.perf_counter() - started, record["time/step"]))
        now = time.perf_counter(), time.process_time()
        if self._told > WARM and self._since is not None:
            for n in range(2):
                self.pairs[-1]["with" if hooked else "without"][n] += now[n] - self._since[n]
        self._since = now
        following = self._order[here + 1] if self._told > WARM and here + 1 < 2 * BLOCK else hooked
        gc.disable() if following else gc.enable()

    def report(self) -> dict[str, Any]:
        """Of pairs ``[wall, processor]`` seconds of a block, and of every step with hooks theirs and its own."""
        whole = self.pairs if (self._told - WARM) % (2 * BLOCK) == 0 else self.pairs[:-1]
        return {"pairs": whole, "own": self.own}


def main() -> None:
    """Train, then write what was found."""
    report, what, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    import recipes.pretrain
    from mmagent.train import loop
    from mmagent.train.launch import launch

    clock = {"start": Start, "hooks": Hooks}[what]()
    clock.install()
    loop.tell = clock.tell
    launch(recipes.pretrain.main)
    if os.environ.get("RANK", "0") == "0":
        Path(report).write_text(json.dumps(clock.report()))


if __name__ == "__main__":
    main()
