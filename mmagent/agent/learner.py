"""From the groups of a collection to the updates of a step: packs, what other models say of them, one update each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmagent.agent.advantages import Group
from mmagent.agent.batching import rank_batches
from mmagent.agent.codec import Codec
from mmagent.dist import World
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.block_policy import BlockPolicyGradient
from mmagent.objectives.policy_gradient import PolicyGradient
from mmagent.packing import Size
from mmagent.trajectories import PolicyBatch

Take = Callable[..., dict[str, float] | None]
"""``take(packs, part=n)`` makes update ``n`` of a step and returns its record; None where the run has gone back."""


class Reference:
    """A frozen model that lies in the host's memory but for the moment it is asked: ``prefetch`` begins to bring it to
    the trainer's device, ``fill`` asks it, and lets it go."""

    def __init__(self, model: AgentModel, objective: PolicyGradient, world: World):
        self.objective = PolicyGradient(model.eval().requires_grad_(False), objective.config, objective.barred)
        self.device = world.device
        self._coming: Future[nn.Module] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmagent-reference")

    def prefetch(self) -> None:
        """Begin, while packs are being built."""
        if self._coming is None:
            self._coming = self._thread.submit(self.objective.to, self.device)

    def fill(self, parts: Sequence[Sequence[PolicyBatch]], precision: Any) -> list[list[PolicyBatch]]:
        """The packs of every update with ``reference_logprobs``."""
        self.prefetch()
        assert self._coming is not None
        self._coming.result()
        self._coming = None
        with precision:
            filled = [[_with(self.objective, batch, self.device, reference=True) for batch in packs] for packs in parts]
        self.objective.to("cpu")
        return filled


class Learner:
    """Makes the updates of a step for ``objective``: ``updates`` of them, each over every ``updates``-th group.

    Before the first of several, what the model and its critic say of the packs of the later ones is written into them,
    where ratios or advantages are made of it. ``dealing``: how packs are shared among ranks
    (:func:`~mmagent.agent.batching.rank_batches`). ``dtype``: the engine's.
    """

    def __init__(
        self,
        objective: PolicyGradient | BlockPolicyGradient,
        codec: Codec,
        world: World,
        budget: Size,
        *,
        dtype: str = "float32",
        estimator: str = "grpo",
        updates: int = 1,
        reference: AgentModel | None = None,
        dealing: dict[str, Any] | None = None,
    ):
        if objective.critic is not None and estimator != "raw":
            raise ValueError(f"policy.critic makes advantages of rewards: set estimator=raw, not {estimator!r}")
        if objective.needs_reference and reference is None:
            raise ValueError("policy.kl_weight and policy.distill_weight need a reference: name its folder")
        if updates > 1 and isinstance(objective, BlockPolicyGradient):
            raise ValueError(f"updates={updates}: nothing corrects blocks for weights that moved since they were said")
        self.objective, self.codec, self.world, self.updates = objective, codec, world, updates
        self.reference = Reference(reference, objective, world) if reference is not None else None
        self.how = {
            "budget": budget,
            "estimator": estimator,
            "share_prompts": objective.shares_prompts,
            **(dealing or {}),
        }
        self._half = dtype == "bfloat16"

    @property
    def parts(self) -> dict[str, Any]:
        """What a run's checkpoints keep beside the model."""
        return {} if self.objective.critic is None else {"critic": self.objective.critic}

    def packs(self, groups: Sequence[Group]) -> list[list[PolicyBatch]]:
        """Micro-batches of every update. A collective."""
        if self.reference is not None:
            self.reference.prefetch()
        parts = [
            rank_batches(groups[n :: self.updates], self.world, self.codec, **self.how) for n in range(self.updates)
        ]
        if self.reference is not None:
            parts = self.reference.fill(parts, self._precision())
        if self.updates > 1 and self.objective.remembers:
            parts = [parts[0], *(self._remembered(packs) for packs in parts[1:])]
        return parts

    def learn(self, groups: Sequence[Group], take: Take, temperature: float | None = None) -> dict[str, float]:
        """All updates of a step; the record of the last. ``temperature`` that its trajectories were sampled at, where
        that changes: probabilities are of what was drawn from. Raises ``ValueError`` for another than 1 where the model
        says blocks."""
        if temperature is not None and isinstance(self.objective, PolicyGradient):
            self.objective.config.temperature = temperature
        elif temperature not in (None, 1.0):
            raise ValueError(f"a model that says blocks is reinforced at a temperature of 1, not {temperature}")
        record: dict[str, float] = {}
        for part, packs in enumerate(self.packs(groups)):
            if packs:
                record |= take(packs, part=part) or {}
        return record

    def _remembered(self, packs: Sequence[PolicyBatch]) -> list[PolicyBatch]:
        self.objective.prepare(packs, self.objective)
        with self._precision():
            return [_with(self.objective, batch, self.world.device) for batch in packs]

    def _precision(self) -> Any:
        kind = self.world.device.type
        return torch.autocast(kind, torch.bfloat16) if self._half else nullcontext()


def _with(objective: PolicyGradient, batch: PolicyBatch, device: torch.device, reference: bool = False) -> PolicyBatch:
    """``batch``, where it is, with what the objective says of it on ``device``."""
    said = objective.remember(batch.to(device), reference)
    names = ("reference_logprobs",) if reference else ("old_logprobs", "old_values")
    values = {name: getattr(said, name) for name in names}
    return replace(batch, **{name: None if value is None else value.cpu() for name, value in values.items()})
