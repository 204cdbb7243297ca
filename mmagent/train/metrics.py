"""From the micro-batches of all ranks to the numbers of one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmagent.dist import World
from mmagent.protocols import Objective
from mmagent.train.incidents import Finding, Refused
from mmagent.types import StepOutput

VOLUME = ("tokens", "patches", "documents", "flops")
"""Figures of a step's record that say how much was done."""


def keys_of(batch: Any) -> tuple[str, ...]:
    """The names of a batch's samples, for errors; empty for types of a user's own that have none."""
    keys = getattr(batch, "keys", ())
    return tuple(keys) if isinstance(keys, tuple | list) else ()


def volume_of(batch: Any) -> dict[str, float]:
    """How much a batch holds: tokens and patches (padding is none), and documents."""
    tokens, patches = getattr(batch, "num_tokens", 0), getattr(batch, "num_patches", 0)
    return {"tokens": tokens, "patches": patches, "documents": len(keys_of(batch))}


def pace(seconds: float, amounts: Mapping[str, float]) -> dict[str, float]:
    """How long a step took, and how much of what is named it did a second."""
    return {"time/step": seconds, **{f"time/{name}_per_second": amount / seconds for name, amount in amounts.items()}}


def rollout_pace(seconds: float, record: Mapping[str, float], sampled: float) -> dict[str, float]:
    """:func:`pace` of a step that played before it trained, and the share of its time that the rollouts took."""
    amounts = {"tokens": record.get("tokens", 0.0), "sampled": sampled}
    return {**pace(seconds, amounts), "time/rollout_share": record["time/rollout"] / seconds}


@dataclass(frozen=True)
class StepResult:
    """Global figures of one step: ``losses`` are sums over counts, ``loss`` their weighted total; terms that nothing
    counted and metrics with nothing to divide by are left out. ``volume`` holds tokens, patches and documents, and the
    ``flops`` of objectives that are :class:`~mmagent.protocols.Measured`."""

    loss: float
    losses: dict[str, float]
    metrics: dict[str, float]
    counts: dict[str, float]
    volume: dict[str, float]
    grad_norm: float
    role_norms: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, float]:
        """One flat row for logs."""
        losses = {f"loss/{term}": value for term, value in self.losses.items()}
        norms = {"grad_norm": self.grad_norm, **{f"grad_norm/{role}": value for role, value in self.role_norms.items()}}
        return {**self.metrics, "loss": self.loss, **losses, **self.volume, **norms}


class Totals:
    """Sums over micro-batches, then over ranks in one collective, divided at the very end."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor | float] = {}
        self.objections: list[str] = []  # of this rank, to the step as a whole
        self._per_batch: list[tuple[Mapping[str, Tensor], tuple[str, ...]]] = []

    def add(self, batch: Any, output: StepOutput, work: Mapping[str, float] | None = None) -> None:
        """Take in one micro-batch, and its ``work``, such as flops."""
        sums = {name: value.detach() for name, value in output.sums.items()}
        self._per_batch.append((sums, keys_of(batch)))
        for name, value in sums.items():
            self._add(f"sum/{name}", value)
        for name, ratio in output.metrics.items():
            self._add(f"numerator/{name}", ratio.numerator)
            self._add(f"denominator/{name}", ratio.denominator)
        for name, value in {**volume_of(batch), **(work or {})}.items():
            self._add(f"volume/{name}", value)

    def _add(self, name: str, value: Tensor | float) -> None:
        value = value.detach().double() if isinstance(value, Tensor) else float(value)
        self.values[name] = self.values.get(name, 0.0) + value

    def reduce(self, world: World) -> dict[str, dict[str, float]]:
        """``{"sum": {...}, "metrics": {...}, "volume": {...}}`` over all ranks.

        Metrics whose denominator is zero everywhere are left out. Raises :class:`Refused` on every rank when a sum is
        not finite, naming rank, micro-batch, term and samples, and ``ValueError`` when any rank objects.
        """
        flat = world.sum(self.values | {"objections": len(self.objections)}, layout="totals")
        objections = flat.pop("objections")
        parts: dict[str, dict[str, float]] = {"sum": {}, "numerator": {}, "denominator": {}, "volume": {}}
        for name, value in flat.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value / world.context if kind == "volume" else value  # each of a context has it all
        if not torch.tensor(list(parts["sum"].values())).isfinite().all():
            self._raise_not_finite(world)
        if objections:
            raise ValueError("\n".join(of_all_ranks(self.objections, world)))
        metrics = {n: parts["numerator"][n] / d for n, d in parts["denominator"].items() if d}
        return {"sum": parts["sum"], "metrics": metrics, "volume": parts["volume"]}

    def _raise_not_finite(self, world: World) -> None:
        mine = [
            (i, f"{term} is {value.item()}", keys)
            for i, (sums, keys) in enumerate(self._per_batch)
            for term, value in sums.items()
            if not torch.isfinite(value)
        ]
        raise Refused("not_finite", "the loss is not finite", findings_of(mine, world))

    def sums(self) -> list[dict[str, float]]:
        """Of each micro-batch of this rank: the sum of every term."""
        return [{term: value.item() for term, value in sums.items()} for sums, _ in self._per_batch]

    @contextmanager
    def naming(self, world: World) -> Iterator[None]:
        """A ``FloatingPointError`` that every rank raises in the block, for a gradient, becomes :class:`Refused`: it
        names all samples of the step, for a gradient does not tell whose it is."""
        try:
            yield
        except FloatingPointError as error:
            mine = [(i, str(error), keys) for i, (_, keys) in enumerate(self._per_batch)]
            raise Refused("not_finite", str(error), findings_of(mine, world)) from error


def findings_of(mine: Sequence[tuple[int, str, Sequence[str]]], world: World) -> list[Finding]:
    """Of every rank's ``(micro-batch, what, samples)`` the findings, in order of ranks. A collective."""
    everyone = enumerate(world.gather_objects([[i, what, list(keys)] for i, what, keys in mine]))
    return [Finding(rank, i, what, tuple(keys)) for rank, some in everyone for i, what, keys in some]


def of_all_ranks(lines: Sequence[str], world: World) -> list[str]:
    """The ``lines`` of every rank on every rank, each with the rank that it is of."""
    everyone = enumerate(world.gather_objects(list(lines)))
    return [f"rank {rank}, {line}" for rank, some in everyone for line in some]


def counts_of(objective: Objective, micro_batches: Sequence[Any]) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Counts of the micro-batches, and what the objective says of those that it refuses: peers wait for both."""
    counted, refused = [], []
    for i, batch in enumerate(micro_batches):
        try:
            counted.append(objective.counts(batch))
        except ValueError as error:
            refused.append(f"micro-batch {i}: {error}")
    return counted, refused


def global_counts(
    counts: Sequence[Mapping[str, Tensor]], refused: Sequence[str], terms: Sequence[str], world: World
) -> dict[str, Tensor]:
    """``{term: ()}`` float64 on the device: counts over all micro-batches and ranks, in one collective.

    ``refused``: what this rank could not count, in words; the other ranks learn of it in the same collective. Raises
    ``ValueError`` on all of them then, when an objective counts other terms than it weighs, or when ranks bring
    different numbers of micro-batches, which would leave some waiting for others for ever.
    """
    for some in counts:
        if set(some) != set(terms):
            raise ValueError(f"the objective counts {sorted(some)}, but its weights are for {sorted(terms)}")
    n = len(counts) + len(refused)
    rows = [[torch.as_tensor(c[t]).to(world.device, torch.float64).reshape(()) for t in terms] for c in counts]
    summed = [torch.stack(column).sum() for column in zip(*rows, strict=True)] if rows else [0.0] * len(terms)
    header = (len(refused), n, n * n)
    vector = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=world.device) for x in (*summed, *header)])
    world.all_reduce(vector)
    if (refused or world.size > 1) and vector[-3] > 0:
        raise ValueError("\n".join(of_all_ranks(refused, world)))
    if world.size > 1 and world.size * int(vector[-1]) != int(vector[-2]) ** 2:
        raise ValueError(f"ranks bring {world.gather_objects(n)} micro-batches to one step: the numbers must be equal")
    return dict(zip(terms, vector[:-3].unbind(), strict=True))


def mean_losses(
    sums: Mapping[str, float], counts: Mapping[str, Tensor], weights: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """The weighted total and each term's sum over its count; terms that nothing counted are left out."""
    divisors = {term: float(count) for term, count in counts.items()}
    losses = {term: sums[term] / n for term, n in divisors.items() if n > 0}
    return sum(weights[term] * value for term, value in losses.items()), losses
