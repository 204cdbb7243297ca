"""Reinforcement learning from packed trajectories: one clipped surrogate over the tokens that the policy sampled.

The log-probs recomputed here are compared with those of the sampler at every step (``drift``). The router is
followed but not pushed: its bias keeps what supervised training gave it. An MTP loss, where wanted, learns from the
sampled tokens without touching trunk, embedding table or head, because entropy collapses when it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmagent import dist
from mmagent.losses.language import draft_metrics, language_counts
from mmagent.losses.policy import PolicySum, cispo, gspo, importance_weights, ppo_clip, reinforce, reverse_kl
from mmagent.models.agent_model import AgentModel
from mmagent.models.flops import model_flops
from mmagent.models.moe import check_replay
from mmagent.ops.cross_entropy import TokenLoss, linear_cross_entropies, selected_logprobs
from mmagent.ops.shift import shift
from mmagent.trajectories import PolicyBatch
from mmagent.types import IGNORE, ModelOutput, PackedBatch, Ratio, StepOutput

LOSSES = ("ppo", "gspo", "cispo", "reinforce")
REDUCTIONS = ("trajectory", "token", "constant")
DRIFT_UNIT = 1e-9
"""Nats; ranks compare their largest drift in whole units."""


@dataclass
class PolicyGradientConfig:
    """``loss``: the surrogate. ``reduction``: mean over trajectories of their token means (``trajectory``), mean over
    all tokens (``token``), or sum over tokens divided by trajectories times ``constant_tokens`` (``constant``, Dr.
    GRPO). ``clip_low`` and ``clip_high`` are for ratios of tokens; ``gspo`` clips those of whole sequences, which move
    far less, and wants about 3e-4 and 4e-4 (arXiv 2507.18071). ``temperature`` must be the sampler's.
    ``importance_cap`` truncates the weight of REINFORCE's tokens; ``importance_band`` drops, under any loss, tokens
    whose ratio leaves it (IcePop). ``entropy_weight`` rewards the entropy of what tokens are drawn from (Williams
    and Peng 1991): where a policy no longer tries, groups have one reward, which teaches nothing. ``replay_floor``:
    of the way from chance to full, how far every router of a micro-batch, and all routers over a trajectory, must agree
    with the experts that they are made to replay; less is an error, for then the record is of other tokens, layers or
    weights. ``dual_clip``,
    ``importance_cap``, ``entropy_weight``, ``kl_weight`` and ``mtp_weight`` are off at 0."""

    loss: str = "ppo"
    reduction: str = "trajectory"
    constant_tokens: int = 32
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    cispo_cap: float = 5.0
    importance_cap: float = 2.0
    importance_band: tuple[float, float] | None = None
    temperature: float = 1.0
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    mtp_weight: float = 0.0
    replay_floor: float = 0.5

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"policy loss {self.loss!r} is none of {', '.join(LOSSES)}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction {self.reduction!r} is none of {', '.join(REDUCTIONS)}")
        if self.constant_tokens < 1 or self.temperature <= 0:
            raise ValueError(f"policy: constant_tokens and temperature must be positive, got {self}")
        if not 0 <= self.replay_floor <= 1:
            raise ValueError(f"policy.replay_floor {self.replay_floor} must lie in [0, 1]")
        if self.entropy_weight < 0:
            raise ValueError(f"policy.entropy_weight: {self.entropy_weight} would reward a policy for not trying")


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
        # a largest value cannot be summed over micro-batches: it waits for after_step
        self._drift_peak: Tensor | None = None
        self._replayed: list[_Replayed] = []

    @property
    def shares_prompts(self) -> bool:
        """Whether trajectories of a group may have their prompt in common."""
        return not self.depths

    @property
    def weights(self) -> Mapping[str, float]:
        beside = {"entropy": self.config.entropy_weight, "kl": self.config.kl_weight}
        weights = {"policy": 1.0, **{name: weight for name, weight in beside.items() if weight}}
        return weights | {f"mtp_{k}": self.config.mtp_weight / self.depths for k in range(1, self.depths + 1)}

    def prepare(self, micro_batches: Sequence[PolicyBatch], forward: Callable[[PolicyBatch], StepOutput]) -> None:
        """Let the model's ranks agree who encodes which images, where they trade them."""
        self.model.prepare([batch.stream for batch in micro_batches])

    def counts(self, batch: PolicyBatch) -> dict[str, Tensor]:
        if batch.routed_experts is not None:
            decoder = self.model.config.decoder
            check_replay(batch.routed_experts, decoder.moe_layers, decoder.moe)
        sampled = self._sampled(batch.stream)
        if self.config.reduction == "token":
            count = sampled.sum()
        else:
            count = batch.stream.segments.ids()[sampled].unique().numel()
            count = torch.tensor(count * (self.config.constant_tokens if self.config.reduction == "constant" else 1))
        counts = {name: count for name in self.weights if name in ("policy", "entropy", "kl")}
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
        behavior, advantages = (
            shift(x, 1, segments, fill=0)[rows] for x in (batch.behavior_logprobs, batch.advantages)
        )
        owner = segments.ids()[rows]
        weights = self._token_weights(owner, len(segments))
        policy = self._policy(logprobs, behavior, advantages, weights, owner, len(segments))
        sums = {"policy": policy.loss}
        if self.config.entropy_weight:
            sums["entropy"] = -(entropy * weights).sum()
        if self.config.kl_weight:
            if batch.reference_logprobs is None:
                raise ValueError(f"pack of {stream.keys[:3]}...: kl_weight needs reference log-probs in the batch")
            reference = shift(batch.reference_logprobs, 1, segments, fill=0)[rows]
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

    def _token_weights(self, owner: Tensor, trajectories: int) -> Tensor:
        """1, or one over the number of sampled tokens of the token's trajectory."""
        if self.config.reduction != "trajectory":
            return torch.ones(owner.shape, device=owner.device)
        return 1.0 / torch.bincount(owner, minlength=trajectories)[owner].float()

    def _policy(
        self, logprobs: Tensor, behavior: Tensor, advantages: Tensor, weights: Tensor, owner: Tensor, trajectories: int
    ) -> PolicySum:
        config = self.config
        if config.importance_band is not None:
            inside = importance_weights(logprobs, behavior, cap=None, band=config.importance_band) > 0
            weights = weights * inside
        if config.loss == "ppo":
            bounds = {"low": config.clip_low, "high": config.clip_high, "dual": config.dual_clip or None}
            return ppo_clip(logprobs, behavior, advantages, weights, **bounds)
        if config.loss == "gspo":
            bounds = {"low": config.clip_low, "high": config.clip_high}
            return gspo(logprobs, behavior, advantages, weights, owner, trajectories, **bounds)
        if config.loss == "cispo":
            return cispo(logprobs, behavior, advantages, weights, cap=config.cispo_cap)
        if config.importance_cap:
            weights = weights * importance_weights(logprobs, behavior, cap=config.importance_cap)
        return reinforce(logprobs, advantages, weights)

    def _mtp(self, output: ModelOutput, stream: PackedBatch) -> tuple[TokenLoss, ...]:
        targets = [shift(stream.labels, depth, stream.segments) for depth in range(2, len(output.mtp_hidden) + 2)]
        return linear_cross_entropies(output.mtp_hidden, self.model.head_weight.detach(), targets)


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
