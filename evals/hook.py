"""A suite as a hook of a training loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from evals.runner import Options, evaluate_now
from evals.suite import Agent, Suite
from evals.summary import summarise
from mmagent.dist import World


class EvaluationHook:
    """Called after every step as ``hook(step, metrics)``.

    Every ``every`` steps it runs ``suite`` and adds to ``metrics``: ``eval/NAME`` (the score), ``eval/NAME/low``,
    ``eval/NAME/high`` and ``eval/NAME/errors``. ``agent`` makes the one who is judged, told the step so that its pins
    can name it. Training goes on as if nothing had happened: random states and the modes of ``model`` are put back.

    On several ranks the main one evaluates and the others wait, no longer than the time limit of their collectives; an
    error of its is raised on all. The model must be whole on each rank (plain, or DDP with the unwrapped module inside
    ``agent``).

    A run killed within an evaluation finishes it from where it was, once it is back at that step: rows lie in
    ``folder/step-N/NAME``.
    """

    def __init__(
        self,
        suite: Suite,
        agent: Callable[[int], Agent],
        model: nn.Module,
        folder: Path,
        *,
        every: int,
        options: Options | None = None,
        world: World | None = None,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.suite, self.agent, self.model, self.folder, self.every = suite, agent, model, Path(folder), every
        self.options = options or Options(progress=False)
        self.world = world

    def __call__(self, step: int, metrics: dict) -> None:
        if step % self.every:
            return
        if self.world is None or self.world.size == 1:
            metrics.update(self.evaluate(step))
            return
        found: dict[str, float] = {}
        failed: Exception | None = None
        if self.world.is_main:
            try:
                found = self.evaluate(step)
            except Exception as error:  # raised below, once the others know that nobody comes
                failed = error
        told = failed and f"{type(failed).__name__}: {failed}"
        found, told = self.world.gather_objects([found, told])[0]  # also the barrier: nobody trains on meanwhile
        if failed is not None:
            raise failed
        if told:
            raise ValueError(f"rank 0 could not evaluate: {told}")
        metrics.update(found)

    def evaluate(self, step: int) -> dict[str, float]:
        """Run the suite now and return the metrics."""
        with undisturbed(self.model):
            self.model.eval()
            run = evaluate_now(
                self.suite, self.agent(step), self.folder / f"step-{step:08d}" / self.suite.name, self.options
            )
        summary = summarise(run.rows)
        name = f"eval/{self.suite.name}"
        return {
            name: summary.score.mean,
            f"{name}/low": summary.score.low,
            f"{name}/high": summary.score.high,
            f"{name}/errors": float(summary.errors),
        }


def smaller(suite: Suite, per_task: int) -> Suite:
    """The same suite with fewer items a task, for use while training."""
    return replace(suite, per_task=per_task)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back every random state and each module's mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
