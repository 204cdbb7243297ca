"""Which policy-gradient loss, off-policy correction and reduction: built in by name, or a user's own by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmagent.config import locate
from mmagent.losses.policy import PolicySum, cispo, gspo, importance_weights, ppo_clip, reinforce, two_sided

LOSSES = ("ppo", "gspo", "cispo", "two_sided", "reinforce")
REDUCTIONS = ("trajectory", "token", "constant")


class Tokens(NamedTuple):
    """What a loss sees of one micro-batch: everything ``(N,)``, over the sampled tokens in order. ``logprobs`` carry
    gradient. ``old``: the log-probs that ratios are taken against; ``behavior``: those under which tokens were drawn.
    ``weights``: the reduction times the off-policy correction. ``rows``: the trajectory of each token, in
    ``0..trajectories-1``."""

    logprobs: Tensor
    old: Tensor
    behavior: Tensor
    advantages: Tensor
    weights: Tensor
    rows: Tensor
    trajectories: int


Loss = Callable[[Tokens, Any], PolicySum]
"""``(tokens, config)`` to a sum with gradient and the number of tokens that a clip silenced."""
Correction = Callable[[Tensor, Tensor], Tensor]
"""``(trainer, behavior)``, log-probs, both ``(N,)`` and detached, to a weight ``(N,)`` for each token."""
Reduction = Callable[[Tensor, int], Tensor]
"""``(rows, trajectories)`` to a weight ``(N,)`` for each token. The loss is divided by their sum over all ranks."""


@dataclass
class CriticConfig:
    """PPO's critic: one linear layer over the trunk's hidden states, learning with ``weight`` (0: none). It turns
    rewards into advantages (``gamma``, ``decay``: lambda of GAE), so it wants ``collector.advantages.estimator=raw``.
    ``clip`` holds a value near what it was before a step's first update, where it has several (0: no clip). ``trunk``:
    whether its gradient reaches the trunk."""

    weight: float = 0.0
    gamma: float = 1.0
    decay: float = 0.95
    clip: float = 0.2
    trunk: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.decay <= 1) or self.weight < 0 or self.clip < 0:
            raise ValueError(f"policy.critic: gamma and decay lie in [0, 1], weight and clip are not negative: {self}")


@dataclass
class SurrogateConfig:
    """``loss``: ``ppo``, ``gspo``, ``cispo``, ``two_sided``, ``reinforce``, or the import path of a :data:`Loss`.

    ``reduction``: mean over trajectories of their token means (``trajectory``), mean over all tokens (``token``), sum
    over tokens divided by trajectories times ``constant_tokens`` (``constant``, Dr. GRPO), or the path of a
    :data:`Reduction`. ``clip_low`` and ``clip_high`` are for ratios of tokens; ``gspo`` clips those of whole sequences,
    which move far less, and wants about 3e-4 and 4e-4 (arXiv 2507.18071).

    ``ratio``: what policies are compared with. ``sampler``: the log-probs that were sampled under; staleness, updates
    and the engine's rounding are then one ratio. ``trainer``: the trainer's own before the step's first update
    (``old_logprobs`` of a batch, or where it has none the log-probs at hand, which is right for one update a step); how
    the sampler differs from that is left to the correction.

    The correction multiplies every token's weight: ``importance_cap`` truncates the ratio of trainer to sampler
    (truncated importance sampling), ``importance_band`` drops tokens whose ratio leaves it (IcePop: [0.5, 2]),
    ``correction`` is the path of a :data:`Correction` in their place. Without ``trainer`` ratios the cap is for
    ``reinforce`` alone: the other losses hold the ratio themselves. ``dual_clip`` and ``importance_cap`` are off at 0.
    """

    loss: str = "ppo"
    reduction: str = "trajectory"
    constant_tokens: int = 32
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    cispo_cap: float = 5.0
    ratio: str = "sampler"
    importance_cap: float = 2.0
    importance_band: tuple[float, float] | None = None
    correction: str = ""
    critic: CriticConfig = field(default_factory=CriticConfig)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES and ":" not in self.loss:
            raise ValueError(f"policy loss {self.loss!r} is none of {', '.join(LOSSES)}, and no import path")
        if self.reduction not in REDUCTIONS and ":" not in self.reduction:
            raise ValueError(f"reduction {self.reduction!r} is none of {', '.join(REDUCTIONS)}, and no import path")
        if self.ratio not in ("sampler", "trainer"):
            raise ValueError(f"policy.ratio {self.ratio!r} is neither sampler nor trainer")
        if self.constant_tokens < 1:
            raise ValueError(f"policy: constant_tokens must be positive, got {self.constant_tokens}")


class Surrogate:
    """The loss, correction and reduction that a config names; paths are imported once, and must take what is asked."""

    def __init__(self, config: SurrogateConfig):
        self.config = config
        self._loss = own(config.loss, "policy.loss", 2)
        self._reduction = own(config.reduction, "policy.reduction", 2)
        self._correction = own(config.correction, "policy.correction", 2)

    def reduce(self, rows: Tensor, trajectories: int) -> Tensor:
        """``(N,)``: the weight of each token."""
        if self._reduction is not None:
            weights = self._reduction(rows, trajectories)
            if weights.shape != rows.shape or not bool((weights >= 0).all()):
                told = f"policy.reduction {self.config.reduction!r} must give one weight, not negative, a token"
                raise ValueError(f"{told}: got {tuple(weights.shape)} for {rows.shape[0]} tokens")
            return weights.detach().float()
        if self.config.reduction != "trajectory":
            return torch.ones(rows.shape, device=rows.device)
        return 1.0 / torch.bincount(rows, minlength=trajectories)[rows].float()

    def count(self, rows: Tensor, trajectories: int) -> Tensor:
        """What the weighted sum is divided by, a scalar."""
        if self._reduction is not None:
            return self.reduce(rows, trajectories).sum()
        if self.config.reduction == "token":
            return torch.tensor(rows.numel())
        count = int(rows.unique().numel())
        return torch.tensor(count * (self.config.constant_tokens if self.config.reduction == "constant" else 1))

    def correct(self, logprobs: Tensor, behavior: Tensor) -> Tensor | None:
        """``(N,)`` weights for what the sampler did otherwise than the trainer, whose ``logprobs`` these are, or None
        for all ones."""
        config = self.config
        if self._correction is not None:
            weights = self._correction(logprobs.detach(), behavior)
            if weights.shape != logprobs.shape:
                told = f"policy.correction {config.correction!r} must give one weight a token"
                raise ValueError(f"{told}: got {tuple(weights.shape)} for {logprobs.shape[0]} tokens")
            return weights.detach()
        cap = config.importance_cap if config.loss == "reinforce" or config.ratio == "trainer" else 0.0
        if not cap and config.importance_band is None:
            return None
        weights = importance_weights(logprobs, behavior, cap=cap or None, band=config.importance_band)
        return weights if cap else (weights > 0).float()

    def __call__(self, tokens: Tokens) -> PolicySum:
        config = self.config
        if self._loss is not None:
            return self._loss(tokens, config)
        logprobs, old, _, advantages, weights, rows, trajectories = tokens
        bounds = {"low": config.clip_low, "high": config.clip_high}
        if config.loss == "ppo":
            return ppo_clip(logprobs, old, advantages, weights, **bounds, dual=config.dual_clip or None)
        if config.loss == "gspo":
            return gspo(logprobs, old, advantages, weights, rows, trajectories, **bounds)
        if config.loss == "two_sided":
            return two_sided(logprobs, old, advantages, weights, **bounds)
        if config.loss == "cispo":
            return cispo(logprobs, old, advantages, weights, cap=config.cispo_cap)
        return reinforce(logprobs, advantages, weights)


def own(path: str, key: str, takes: int) -> Callable[..., Any] | None:
    """What a user has named by import path under the config's ``key``, None where ``path`` is none.

    Raises ``ConfigError`` where there is nothing at the path, and ``ValueError`` for what does not take ``takes``
    positional arguments."""
    if ":" not in path:
        return None
    found = locate(path)
    try:
        inspect.signature(found).bind(*range(takes))
    except TypeError as error:
        raise ValueError(f"{key}: {path} must take {takes} positional arguments ({error})") from error
    return found
