"""The loop around :func:`mmagent.train.step.train_step`: resume, step, call the hooks, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmagent.protocols import Engine, Objective
from mmagent.train.metrics import pace
from mmagent.train.run import Run
from mmagent.train.step import train_step

Hook = Callable[[int, dict[str, float]], None]
"""Called after every step, on every rank, with the number of steps done and the step's record, which it may extend
for the hooks after it. Names that start with ``time/`` depend on the machine; all others on the seed alone."""


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
    for step in range(first, steps):
        started = time.perf_counter()
        micro_batches = next(stream, None)
        if micro_batches is None:
            raise ValueError(f"the stream ended after {step} of {steps} steps")
        waited = time.perf_counter() - started
        scales = {role: own(step) for role, own in (role_schedules or {}).items()}
        lr_scale = schedule(step)
        result = train_step(objective, engine, micro_batches, run.world, lr_scale, scales)
        done = {"tokens": result.volume["tokens"] or result.volume["patches"]}
        timing = {**pace(time.perf_counter() - started, done), "time/data": waited}
        rates = {"lr_scale": lr_scale, **{f"lr_scale/{role}": scale for role, scale in scales.items()}}
        record = {**getattr(stream, "metrics", {}), **result.record(), **rates, **timing}
        for hook in hooks:
            hook(step + 1, record)
    if first < steps:
        run.save(steps)
