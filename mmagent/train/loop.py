"""The loop around :func:`mmagent.train.step.train_step`: resume, step, call the hooks, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmagent.protocols import Engine, Objective
from mmagent.train.hooks import tell
from mmagent.train.metrics import VOLUME, pace
from mmagent.train.run import Run

Hook = Callable[[int, dict[str, float]], None]
"""Called after every step, on every rank, with the number of steps done and the step's record, which it may extend
for the hooks after it. Names that start with ``time/`` or ``memory/`` depend on the machine; all others on the seed
alone. The time it takes counts to its ``segment``, where it has one, of the run's."""


def fit(
    run: Run,
    objective: Objective,
    engine: Engine,
    stream: Iterator[Sequence[Any]],
    *,
    steps: int,
    last: int | None = None,
    schedule: Callable[[int], float] = lambda step: 1.0,
    role_schedules: Mapping[str, Callable[[int], float]] | None = None,
    hooks: Sequence[Hook] = (),
) -> None:
    """Train from where ``run`` stands up to ``steps``, and save at the end. A run that is there already returns.
    Where this is one phase of a longer run, ``last`` is where that ends; a checkpoint past the end is a ``ValueError``.

    ``stream`` yields the micro-batches of a step, as many on every rank; list it in ``run.parts`` so that it goes on
    where it stopped; what it has in ``metrics`` joins the record. ``schedule(step)`` multiplies every learning rate, or
    every one but those of the roles in ``role_schedules``, which have schedules of their own.
    Hooks run in order, those that save (``hook.saves``) last, so that no checkpoint knows a step that a log does not.
    """
    hooks = sorted(hooks, key=lambda hook: getattr(hook, "saves", False))
    objective.train()  # type: ignore[attr-defined]
    first = run.resume(steps if last is None else last)
    for step in run.guard.steps(first, steps):
        started = time.perf_counter()
        with run.segments("data"):
            micro_batches = next(stream, None)
        if micro_batches is None:
            raise ValueError(f"the stream ended after {step} of {steps} steps")
        waited = time.perf_counter() - started
        scales = {role: own(step) for role, own in (role_schedules or {}).items()}
        lr_scale = schedule(step)
        taken = run.guard.step(step, objective, engine, micro_batches, lr_scale, scales)
        if taken is None:
            continue
        done = {name: taken[name] for name in VOLUME if name in taken}
        done["tokens"] = done.get("tokens") or done.get("patches", 0.0)
        timing = {**pace(time.perf_counter() - started, done), "time/data": waited}
        rates = {"lr_scale": lr_scale, **{f"lr_scale/{role}": scale for role, scale in scales.items()}}
        record = {**getattr(stream, "metrics", {}), **taken, **rates, **timing}
        tell(hooks, run, step + 1, record)
    if first < steps:
        run.finish(steps)
