"""Policy-gradient losses: pure functions from per-token tensors to sums.

Every tensor is ``(N,)`` over the sampled tokens alone (no prompt, no padding). ``logprobs`` carry gradient;
``behavior`` are the log-probs under which the token was drawn. ``weights`` decide the reduction: 1 for a sum
over tokens, ``1 / length`` of the token's trajectory for a sum of per-trajectory means. With ``r =
exp(logprobs - behavior)`` and advantage ``A``:

- PPO clip with separate bounds (Schulman et al. 2017; DAPO's clip-higher): ``-min(r A, clip(r, 1-low, 1+high) A)``;
  dual clip (Ye et al. 2020) bounds the loss of a token with ``A < 0`` by ``-c A``.
- GSPO (Zheng et al. 2025): one ratio a trajectory, ``s = exp(mean(logprobs - behavior))``, clipped as above.
- CISPO (MiniMax-M1 2025): ``-sg[min(r, cap)] A logprobs``: no token loses its gradient.
- Two-sided masking (GLM-5, arXiv 2602.15763): ``-sg[r] A logprobs`` where ``1 - low < r < 1 + high``, else nothing: for
  ratios against the sampler's own log-probs, where no older policy of the trainer's is known.
- REINFORCE: ``-A logprobs``, with an importance weight where the sampler and the trainer disagree.

PPO's critic: :func:`generalised_advantages` (Schulman et al. 2016) and :func:`clipped_value`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before the exponential: one broken token must not become an infinity."""


class PolicySum(NamedTuple):
    """``loss ()`` carries gradient; ``clipped ()`` counts the tokens whose gradient the clip removed."""

    loss: Tensor
    clipped: Tensor


def _ratio(logprobs: Tensor, behavior: Tensor) -> Tensor:
    return (logprobs - behavior).clamp(-RATIO_LIMIT, RATIO_LIMIT).exp()


def _clipped_sum(
    ratio: Tensor, advantages: Tensor, weights: Tensor, low: float, high: float, dual: float | None
) -> PolicySum:
    plain = ratio * advantages
    bounded = ratio.clamp(1 - low, 1 + high) * advantages
    objective = torch.minimum(plain, bounded)
    clipped = bounded < plain
    if dual is not None:
        floor = dual * advantages
        below = (advantages < 0) & (objective < floor)
        objective = torch.where(below, floor, objective)
        clipped = clipped | below
    return PolicySum(-(objective * weights).sum(), (clipped & (weights > 0)).sum())


def ppo_clip(
    logprobs: Tensor,
    behavior: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
    dual: float | None = None,
) -> PolicySum:
    """Per-token clipped surrogate; GRPO is this with group-relative advantages. ``dual`` is c > 1, or None."""
    if dual is not None and dual <= 1:
        raise ValueError(f"dual clip must exceed 1, got {dual}")
    return _clipped_sum(_ratio(logprobs, behavior), advantages, weights, low, high, dual)


def gspo(
    logprobs: Tensor,
    behavior: Tensor,
    advantages: Tensor,
    weights: Tensor,
    rows: Tensor,
    trajectories: int,
    *,
    low: float = 3e-4,
    high: float = 4e-4,
) -> PolicySum:
    """Sequence-ratio surrogate. ``rows (N,)`` int64: the trajectory of every token, in ``0..trajectories-1``.

    Written per token as ``sg[s] * exp(logprobs - sg[logprobs])`` (GSPO-token), whose gradient equals that of
    the sequence form when a trajectory's tokens share one advantage.
    """
    zeros = torch.zeros(trajectories, dtype=torch.float32, device=logprobs.device)
    difference = (logprobs - behavior).detach()
    lengths = zeros.index_add(0, rows, torch.ones_like(difference)).clamp(min=1)
    mean = zeros.index_add(0, rows, difference) / lengths
    sequence = mean.clamp(-RATIO_LIMIT, RATIO_LIMIT).exp()[rows]
    ratio = sequence * (logprobs - logprobs.detach()).exp()
    return _clipped_sum(ratio, advantages, weights, low, high, None)


def cispo(logprobs: Tensor, behavior: Tensor, advantages: Tensor, weights: Tensor, *, cap: float = 5.0) -> PolicySum:
    """REINFORCE under a capped importance weight that carries no gradient."""
    ratio = _ratio(logprobs.detach(), behavior)
    loss = -(ratio.clamp(max=cap) * advantages * logprobs * weights).sum()
    return PolicySum(loss, ((ratio > cap) & (weights > 0)).sum())


def two_sided(
    logprobs: Tensor,
    behavior: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
) -> PolicySum:
    """REINFORCE under the importance weight, without the tokens whose ratio has left ``(1 - low, 1 + high)``, whichever
    way their advantage points."""
    ratio = _ratio(logprobs.detach(), behavior)
    inside = (ratio > 1 - low) & (ratio < 1 + high)
    loss = -(torch.where(inside, ratio, 0.0) * advantages * logprobs * weights).sum()
    return PolicySum(loss, (~inside & (weights > 0)).sum())


def reinforce(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> PolicySum:
    """The plain estimator; multiply ``weights`` by :func:`importance_weights` when sampler and trainer differ."""
    return PolicySum(-(advantages * logprobs * weights).sum(), torch.zeros((), device=logprobs.device))


def importance_weights(
    logprobs: Tensor, behavior: Tensor, *, cap: float | None = 2.0, band: tuple[float, float] | None = None
) -> Tensor:
    """``(N,)`` detached weights that correct for a sampler which is not the trainer.

    ``cap`` truncates the ratio from above (truncated importance sampling). ``band (lowest, highest)`` gives
    weight zero to tokens whose ratio leaves it (IcePop masks outside [1/2, 2]).
    """
    ratio = _ratio(logprobs.detach(), behavior)
    weights = ratio if cap is None else ratio.clamp(max=cap)
    if band is not None:
        lowest, highest = band
        if not 0 <= lowest < highest:
            raise ValueError(f"band must be two rising ratios, got {band}")
        weights = torch.where((ratio >= lowest) & (ratio <= highest), weights, 0.0)
    return weights


def reverse_kl(logprobs: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """Sum of the unbiased, never negative estimator ``exp(d) - d - 1`` with ``d = reference - logprobs`` (k3)."""
    d = (reference - logprobs).clamp(-RATIO_LIMIT, RATIO_LIMIT)
    return ((d.exp() - d - 1) * weights).sum()


def generalised_advantages(
    values: Tensor, rewards: Tensor, rows: Tensor, *, gamma: float = 1.0, decay: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``(N,)``, detached, of tokens whose trajectories ``rows (N,)`` stand one behind another,
    each in order. ``values`` are the critic's before each token, ``rewards`` what came right after it: ``A_t = d_t +
    gamma decay A_(t+1)`` with ``d_t = r_t + gamma V_(t+1) - V_t``, nothing behind the last token; returns ``A + V``.
    """
    value, reward, row = values.detach().double().tolist(), rewards.detach().double().tolist(), rows.tolist()
    out = [0.0] * len(value)
    carried = following = 0.0
    for t in reversed(range(len(value))):
        if t + 1 == len(value) or row[t + 1] != row[t]:
            carried = following = 0.0
        carried = reward[t] + gamma * following - value[t] + gamma * decay * carried
        out[t], following = carried, value[t]
    advantages = torch.tensor(out, dtype=torch.float64, device=values.device)
    return advantages.float(), (advantages + values.detach().double()).float()


def clipped_value(values: Tensor, before: Tensor, returns: Tensor, weights: Tensor, *, clip: float = 0.2) -> Tensor:
    """Sum of ``max((V - R)^2, (clip(V, before - clip, before + clip) - R)^2) / 2``: a critic that has moved away from
    what it said ``before`` learns no further that way. ``clip`` 0: the plain square."""
    error = (values - returns) ** 2
    if clip:
        bounded = before + (values - before).clamp(-clip, clip)
        error = torch.maximum(error, (bounded - returns) ** 2)
    return 0.5 * (error * weights).sum()
