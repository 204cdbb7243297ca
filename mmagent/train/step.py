"""The one step that distillation, contrastive, pretraining, fine-tuning and RL share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mmagent.dist import World
from mmagent.protocols import Engine, Measured, Objective, Objects, Prepared
from mmagent.train.metrics import StepResult, Totals, counts_of, global_counts, mean_losses
from mmagent.train.segments import Segments
from mmagent.types import StepOutput

begun = threading.Event()
"""Set once this process has begun a step, or other work: no error after that is one of setting up."""


def train_step(
    objective: Objective,
    engine: Engine,
    micro_batches: Sequence[Any],
    world: World,
    lr_scale: float = 1.0,
    role_scales: Mapping[str, float] | None = None,
    segments: Segments | None = None,
    judge: Callable[[float, Totals], None] = lambda loss, totals: None,
) -> StepResult:
    """Count, then back-propagate ``sum_k w_k * S_k / C_k`` for every micro-batch, then step.

    ``S_k`` is a micro-batch's sum of term k, ``C_k`` the count over all micro-batches and ranks, so the gradient does
    not depend on how the samples are split. Every rank brings equally many micro-batches. An objective that is
    :class:`~mmagent.protocols.Prepared` sees all of them first. Raises on all ranks, before any weight has changed:
    :class:`~mmagent.train.incidents.Refused` (a ``FloatingPointError``) for a loss or gradient that is not finite,
    ``ValueError`` where it refuses to count a micro-batch, or :class:`~mmagent.protocols.Objects` to the step, and what
    ``judge`` raises at the sight of the loss. ``segments`` learn where the time goes.
    """
    begun.set()
    segments = segments or Segments()
    if not micro_batches:
        raise ValueError("a step needs at least one micro-batch")
    terms = sorted(objective.weights)
    with segments("count"):
        counts = global_counts(*counts_of(objective, micro_batches), terms, world)
    # a term that nothing counts has a sum of zero: dividing by one keeps it, and its graph, harmless
    scales = {t: (objective.weights[t] / torch.where(counts[t] > 0, counts[t], 1.0)).float() for t in terms}

    def forward(batch: Any) -> StepOutput:
        return engine.forward(batch.to(world.device, non_blocking=True))

    if isinstance(objective, Prepared):
        with segments("prepare"):
            objective.prepare(micro_batches, forward)
    totals = Totals()
    for i, batch in enumerate(micro_batches):
        with segments("reduce"), engine.micro_step(last=i + 1 == len(micro_batches)):
            with segments("forward"):
                output = forward(batch)
            if set(output.sums) != set(terms):
                raise ValueError(f"the objective returned sums {sorted(output.sums)}, but its weights are for {terms}")
            weighted = sum(output.sums[t] * scales[t] for t in terms)
            with segments.backward(weighted):
                engine.backward(weighted)
        totals.add(batch, output, {"flops": objective.flops(batch)} if isinstance(objective, Measured) else None)
    with segments("reduce"):
        if isinstance(objective, Objects):
            totals.objections.extend(objective.objections())
        total = totals.reduce(world)
    loss, losses = mean_losses(total["sum"], counts, objective.weights)
    judge(loss, totals)
    with segments("optimizer"), totals.naming(world):
        grad_norm = engine.step(lr_scale, role_scales)
    with segments("after"):
        metrics = total["metrics"] | dict(objective.after_step() or {})
    host = {term: count.item() for term, count in counts.items()}
    return StepResult(loss, losses, metrics, host, total["volume"], grad_norm, getattr(engine, "role_norms", {}))
