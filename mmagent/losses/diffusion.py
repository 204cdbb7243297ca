"""The loss of discrete diffusion: weighted cross-entropy of tokens at their own places, as sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmagent.ops.cross_entropy import selected_logprobs


@dataclass(frozen=True)
class DiffusionLoss:
    """``sums {term: ()}`` carry gradient; ``nll (T,)`` fp32 is each target's negative log-probability, ``entropy (T,)``
    that of its distribution, both detached and 0 where there is no target."""

    sums: dict[str, Tensor]
    nll: Tensor
    entropy: Tensor


def diffusion_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights: Mapping[str, Tensor],
    barred: Sequence[int],
    chunk: int = 0,
) -> DiffusionLoss:
    """``sum_t w_t * -log p(target_t)`` of every term's ``weights (T,)``. No shift: a place is asked for its own token.
    ``barred`` ids, the mask among them, have probability zero."""
    logprobs, entropy = selected_logprobs(hidden_TD, weight_VD, targets_T, barred_ids=barred, chunk=chunk)
    sums = {term: -(logprobs * weight).sum() for term, weight in weights.items()}
    return DiffusionLoss(sums, -logprobs.detach(), entropy.detach())
