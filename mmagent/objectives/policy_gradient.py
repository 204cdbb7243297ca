"""Reinforcement learning from packed trajectories: one clipped surrogate over the tokens that the policy sampled.

The log-probs recomputed here are compared with those of the sampler at every step (``drift``). The router is
followed but not pushed: its bias keeps what supervised training gave it. An MTP loss, where wanted, learns from the
sampled tokens without touching trunk, embedding table or head, because entropy collapses when it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmagent import dist
from mmagent.losses.language import draft_metrics, language_counts
from mmagent.losses.policy import clipped_value, generalised_advantages, reverse_kl
from mmagent.models.agent_model import AgentModel
from mmagent.models.flops import model_flops
from mmagent.models.layers import Linear, collect_roles
from mmagent.models.moe import check_replay
from mmagent.objectives.surrogates import Surrogate, SurrogateConfig, Tokens
from mmagent.ops.cross_entropy import TokenLoss, linear_cross_entropies, selected_logprobs
from mmagent.ops.shift import shift
from mmagent.trajectories import PolicyBatch
from mmagent.types import IGNORE, ModelOutput, PackedBatch, ParamRole, Ratio, Segments, StepOutput

DRIFT_UNIT = 1e-9
"""Nats; ranks compare their largest drift in whole units."""


@dataclass
class PolicyGradientConfig(SurrogateConfig):
    """Beside the :class:`~mmagent.objectives.surrogates.SurrogateConfig`: ``temperature`` must be the sampler's.
    ``entropy_weight`` rewards the entropy of what tokens are drawn from (Williams and Peng 1991): where a policy no
    longer tries, groups have one reward, which teaches nothing. ``kl_weight`` holds the policy near a reference model;
    ``distill_weight`` adds ``sg[log pi_reference / pi]`` to every token's advantage (on-policy distillation, the
    reference being the teacher). ``replay_floor``: of the way from chance to full, how far every router of a
    micro-batch, and all routers over a trajectory, must agree with the experts that they are made to replay; less is an
    error, for then the record is of other tokens, layers or weights. ``entropy_weight``, ``kl_weight``,
    ``distill_weight`` and ``mtp_weight`` are off at 0."""

    temperature: float = 1.0
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    distill_weight: float = 0.0
    mtp_weight: float = 0.0
    replay_floor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"policy.temperature must be positive, got {self.temperature}")
        if not 0 <= self.replay_floor <= 1:
            raise ValueError(f"policy.replay_floor {self.replay_floor} must lie in [0, 1]")
        if self.entropy_weight < 0:
            raise ValueError(f"policy.entropy_weight: {self.entropy_weight} would reward a policy for not trying")

    @property
    def needs_reference(self) -> bool:
        """Whether batches must bring reference log-probs."""
        return bool(self.kl_weight or self.distill_weight)


class _Replayed(NamedTuple):
    """Of one micro-batch: choices that routers would have made themselves and all that were replayed, a layer
    ``(M, 2)`` and a trajectory ``(N, 2)``."""

    layers_M2: Tensor
    trajectories_N2: Tensor
    keys: tuple[str, ...]


class PolicyGradient(nn.Module):
    """Implements :class:`mmagent.protocols.Objective` over :class:`~mmagent.trajectories.PolicyBatch`.

    ``barred``: the ids that the sampler could not draw (``vocab.barred(rows)``), so that both normalise alike.
    """

    def __init__(self, model: AgentModel, config: PolicyGradientConfig, barred: Sequence[int] = ()):
        super().__init__()
        if model.config.denoises:
            raise ValueError("policy: this model says blocks, whose tokens are asked for by BlockPolicyGradient")
        self.model, self.config, self.barred = model, config, tuple(barred)
        self.depths = model.config.mtp.depths if config.mtp_weight else 0
        self.surrogate = Surrogate(config)
        self.critic = Linear(model.head_weight.shape[1], 1, bias=True) if config.critic.weight else None
        if self.critic is not None:
            nn.init.zeros_(self.critic.weight)
            self.critic.to(model.head_weight.device)
        # a largest value cannot be summed over micro-batches: it waits for after_step
        self._drift_peak: Tensor | None = None
        self._replayed: list[_Replayed] = []

    @property
    def needs_reference(self) -> bool:
        """Whether it asks what another model says."""
        return self.config.needs_reference

    @property
    def remembers(self) -> bool:
        """Whether later updates of a step need to know what the model said before the first (:meth:`remember`)."""
        return self.config.ratio == "trainer" or self.critic is not None

    @property
    def shares_prompts(self) -> bool:
        """Whether trajectories of a group may have their prompt in common."""
        return not self.depths

    @property
    def weights(self) -> Mapping[str, float]:
        beside = {"entropy": self.config.entropy_weight, "kl": self.config.kl_weight}
        beside["value"] = self.config.critic.weight
        weights = {"policy": 1.0, **{name: weight for name, weight in beside.items() if weight}}
        return weights | {f"mtp_{k}": self.config.mtp_weight / self.depths for k in range(1, self.depths + 1)}

    def prepare(self, micro_batches: Sequence[PolicyBatch], forward: Callable[[PolicyBatch], StepOutput]) -> None:
        """Let the model's ranks agree who encodes which images, where they trade them."""
        self.model.prepare([batch.stream for batch in micro_batches])

    def counts(self, batch: PolicyBatch) -> dict[str, Tensor]:
        if batch.routed_experts is not None:
            decoder = self.model.config.decoder
            check_replay(batch.routed_experts, decoder.moe_layers, decoder.moe)
        segments = batch.stream.segments
        count = self.surrogate.count(segments.ids()[self._sampled(batch.stream)], len(segments))
        counts = {name: count for name in self.weights if name in ("policy", "entropy", "kl", "value")}
        _, *depths = language_counts(batch.stream.labels, batch.stream.segments, self.depths)
        return counts | {f"mtp_{k}": depth for k, depth in enumerate(depths, start=1)}

    def flops(self, batch: PolicyBatch) -> float:
        """Useful operations of a step over ``batch``, its sampling apart; see :mod:`mmagent.models.flops`."""
        return model_flops(self.model, batch.stream, mtp=self.depths > 0)

    def forward(self, batch: PolicyBatch) -> StepOutput:
        stream, segments = batch.stream, batch.stream.segments
        output = self.model(stream, mtp=self.depths > 0, routed=batch.routed_experts, detach_mtp=True)
        targets = shift(stream.labels, 1, segments)
        rows = (targets != IGNORE).nonzero().squeeze(1)
        logprobs, entropy = selected_logprobs(
            output.hidden, self.model.head_weight, targets, self.config.temperature, self.barred
        )
        logprobs, entropy = logprobs[rows], entropy[rows]
        behavior, advantages = (_at(x, segments, rows) for x in (batch.behavior_logprobs, batch.advantages))
        owner = segments.ids()[rows]
        old = self._old(logprobs, behavior, batch, rows)
        weights = self.surrogate.reduce(owner, len(segments))
        sums, reference = {}, self._reference(batch, rows)
        if self.critic is not None:
            values = self._values(output.hidden[rows])
            before = values.detach() if batch.old_values is None else _at(batch.old_values, segments, rows)
            sums["value"], advantages = self._critic_sum(values, before, advantages, owner, weights)
        if self.config.distill_weight:
            advantages = advantages + self.config.distill_weight * (reference - logprobs.detach())
        correction = self.surrogate.correct(logprobs.detach() if self.config.ratio == "sampler" else old, behavior)
        kept = weights if correction is None else weights * correction
        policy = self.surrogate(Tokens(logprobs, old, behavior, advantages, kept, owner, len(segments)))
        sums["policy"] = policy.loss
        if self.config.entropy_weight:
            sums["entropy"] = -(entropy * weights).sum()
        if self.config.kl_weight:
            sums["kl"] = reverse_kl(logprobs, reference, weights)
        mtp = self._mtp(output, stream)
        sums |= {f"mtp_{depth}": loss.total for depth, loss in enumerate(mtp, start=1)}
        if self.training and torch.is_grad_enabled():
            if batch.routed_experts is not None:
                trajectories = output.replayed.new_zeros(len(segments), 2)
                trajectories.index_add_(0, segments.ids(), output.replayed.sum(1))
                self._replayed.append(_Replayed(output.replayed.sum(0), trajectories, stream.keys))
            if rows.numel():
                peak = (logprobs.detach() - behavior).abs().max()
                self._drift_peak = peak if self._drift_peak is None else torch.maximum(self._drift_peak, peak)
        with torch.no_grad():
            metrics = _metrics(logprobs, behavior, entropy, policy.clipped)
            if self.model.images is not None:
                metrics |= self.model.images.metrics
            if batch.routed_experts is not None:
                metrics["router/replay_agreement"] = Ratio(*output.replayed.sum((0, 1)).unbind())
            return StepOutput(sums, metrics | draft_metrics(targets, mtp, stream.visual_slots, segments))

    def forget(self) -> None:
        """Drop drift and replays of a step that is not taken."""
        self._drift_peak, self._replayed = None, []

    def after_step(self) -> dict[str, float]:
        """The largest drift of one token over all ranks. The router bias stays where supervised training left it."""
        mine = 0.0 if self._drift_peak is None else self._drift_peak.item()
        self._drift_peak = None
        peaks = dist.gather_ints(round(mine / DRIFT_UNIT), self.model.head_weight.device)
        return {"drift_peak": max(peaks) * DRIFT_UNIT}

    def objections(self) -> list[str]:
        """Of each micro-batch since the last call, the router and the trajectory that agree least with the experts
        recorded for them, where that is less than ``replay_floor`` asks: an average would hide one of many."""
        replays, self._replayed = self._replayed, []
        moe, names = self.model.config.decoder.moe, self.model.router_names()
        found = []
        for i, replay in enumerate(replays):
            keys = [f"trajectory {key}" for key in replay.keys]  # a padded tail, the last row, records nothing
            for rows, labels in ((replay.layers_M2, names), (replay.trajectories_N2, keys)):
                worst = _disagreement(rows.tolist(), labels, moe.top_k / moe.experts, self.config.replay_floor)
                if worst:
                    found.append(f"micro-batch {i} of {replay.keys[:3]}...: {worst}")
        return found

    def _sampled(self, stream: PackedBatch) -> Tensor:
        return shift(stream.labels, 1, stream.segments) != IGNORE

    def _old(self, logprobs: Tensor, behavior: Tensor, batch: PolicyBatch, rows: Tensor) -> Tensor:
        """What ratios are taken against."""
        if self.config.ratio == "sampler":
            return behavior if self.config.loss != "reinforce" else logprobs.detach()
        if batch.old_logprobs is None:
            return logprobs.detach()
        return _at(batch.old_logprobs, batch.stream.segments, rows)

    def _reference(self, batch: PolicyBatch, rows: Tensor) -> Tensor:
        if batch.reference_logprobs is None:
            if self.config.needs_reference:
                told = (
                    f"pack of {batch.keys[:3]}...: kl_weight and distill_weight need reference log-probs in the batch"
                )
                raise ValueError(told)
            return rows.new_zeros(0, dtype=torch.float32)
        return _at(batch.reference_logprobs, batch.stream.segments, rows)

    def _values(self, hidden_ND: Tensor) -> Tensor:
        """``(N,)``: what the critic expects, before each sampled token, of the rest of its trajectory."""
        assert self.critic is not None
        seen = hidden_ND if self.config.critic.trunk else hidden_ND.detach()
        with torch.autocast(seen.device.type, enabled=False):
            return self.critic(seen.float()).squeeze(1)

    def _critic_sum(
        self, values: Tensor, before: Tensor, rewards: Tensor, owner: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The critic's loss, and the advantages that ``before`` makes of rewards: a trajectory's comes with its last
        token."""
        config = self.config.critic
        last = torch.ones_like(owner, dtype=torch.bool)
        last[:-1] = owner[1:] != owner[:-1]
        rewards = torch.where(last, rewards, 0.0)
        advantages, returns = generalised_advantages(before, rewards, owner, gamma=config.gamma, decay=config.decay)
        return clipped_value(values, before, returns, weights, clip=config.clip), advantages

    def roles(self) -> Mapping[str, ParamRole]:
        """Of the model's parameters and the critic's."""
        roles = {f"model.{name}": role for name, role in self.model.roles().items()}
        return roles if self.critic is None else roles | collect_roles(self.critic, "critic", "critic.")

    def blocks(self) -> Iterable[nn.Module]:
        return self.model.blocks()

    def leaves(self) -> Iterable[nn.Module]:
        return self.model.leaves()

    @torch.no_grad()
    def remember(self, batch: PolicyBatch, reference: bool = False) -> PolicyBatch:
        """``batch`` with what model and critic say of its sampled tokens now, as ``old_logprobs`` and ``old_values``:
        for the second update of a step and later ones. ``reference``: as ``reference_logprobs`` instead, this model
        being another.
        """
        stream, segments = batch.stream, batch.stream.segments
        hidden = self.model(stream, mtp=False, routed=batch.routed_experts).hidden
        targets = shift(stream.labels, 1, segments)
        rows = (targets != IGNORE).nonzero().squeeze(1)
        said, _ = selected_logprobs(hidden, self.model.head_weight, targets, self.config.temperature, self.barred)
        places = shift(torch.arange(targets.shape[0], device=targets.device), 1, segments)[rows]
        logprobs = torch.zeros_like(said).index_copy(0, places, said[rows])
        if reference:
            return replace(batch, reference_logprobs=logprobs)
        values = None
        if self.critic is not None:
            values = torch.zeros_like(said).index_copy(0, places, self._values(hidden[rows]))
        return replace(batch, old_logprobs=logprobs, old_values=values)

    def _mtp(self, output: ModelOutput, stream: PackedBatch) -> tuple[TokenLoss, ...]:
        targets = [shift(stream.labels, depth, stream.segments) for depth in range(2, len(output.mtp_hidden) + 2)]
        return linear_cross_entropies(output.mtp_hidden, self.model.head_weight.detach(), targets)


def _at(values: Tensor, segments: Segments, rows: Tensor) -> Tensor:
    """``(N,)``: what ``values (T,)`` hold of the tokens that are predicted at ``rows``."""
    return shift(values, 1, segments, fill=0)[rows]


def _disagreement(rows: Sequence[Sequence[float]], names: Sequence[str], chance: float, floor: float) -> str:
    """The worst of ``rows`` of (agreed, recorded) that are below ``floor`` of the way from ``chance`` to 1 by more than
    three standard deviations of as many independent choices: a short trajectory may be that low by accident."""
    least = chance + floor * (1 - chance)
    below = [
        (agreed / recorded, recorded, name)
        for (agreed, recorded), name in zip(rows, names, strict=False)
        if recorded and agreed < least * recorded - 3 * math.sqrt(recorded * least * (1 - least))
    ]
    if not below:
        return ""
    share, recorded, name = min(below)
    judged = sum(n > 0 for _, n in rows)
    return (
        f"replay: {name} agrees with {share:.0%} of {recorded:.0f} recorded experts, where chance is {chance:.0%}: the "
        f"record is of other tokens, layers or weights (replay_floor {floor}; {len(below)} of {judged} are below)"
    )


def _metrics(logprobs: Tensor, behavior: Tensor, entropy: Tensor, clipped: Tensor) -> dict[str, Ratio]:
    """Over sampled tokens. ``drift``: mean distance of the sampler's log-probs from the trainer's; ``drift_outliers``:
    share of tokens whose probabilities differ by more than a factor of two; ``approx_kl``: the estimator ``r - 1 - log
    r`` of how far the policy is from the one that sampled."""
    tokens = torch.tensor(float(logprobs.shape[0]), device=logprobs.device)
    difference = logprobs.detach() - behavior
    return {
        "entropy": Ratio(entropy.detach().sum(), tokens),
        "clip_fraction": Ratio(clipped.float(), tokens),
        "drift": Ratio(difference.abs().sum(), tokens),
        "drift_outliers": Ratio((difference.abs() > math.log(2)).float().sum(), tokens),
        "approx_kl": Ratio((difference.exp() - 1 - difference).sum(), tokens),
    }
