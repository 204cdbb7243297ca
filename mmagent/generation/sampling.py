"""From logits to tokens: each sequence draws from its own stream of random numbers.

The number that decides token ``n`` of a sequence is a hash of ``(seed, n)``. It depends on nothing else in the
batch, needs no generator object per sequence, and is the same on every device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """``(S,)`` float64 in [0, 1) from integer seeds and counters: splitmix64 (Steele et al. 2014), twice over."""
    with np.errstate(over="ignore"):
        state = _scramble(np.asarray(seeds, dtype=np.int64).view(np.uint64))
        state = _scramble(state + np.asarray(counters, dtype=np.int64).view(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scramble(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def sample(logits_SV: Tensor, temperature: Tensor, top_p: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability.

    ``logits`` fp32 with minus infinity where an id is barred; ``temperature (S,)``, 0 for the most likely token;
    ``top_p (S,)`` keeps the smallest set of most likely tokens that holds so much probability (None: all);
    ``uniform (S,)`` float64 in [0, 1) decides, by the inverse of the cumulative distribution.

    The log-probability is that of the distribution *before* ``top_p``, at the row's temperature (1 for a greedy
    row): what a trainer recomputes from the same logits.
    """
    greedy = temperature == 0
    scaled = logits_SV / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    logprobs = torch.log_softmax(scaled, dim=-1)
    probabilities = logprobs.exp()
    if top_p is not None:
        probabilities = nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)  # fp32 would lose the tail of a large vocabulary
    point = uniform.double().unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, point, right=True).squeeze(1)
    ids = torch.where(greedy, logits_SV.argmax(-1), drawn)
    return ids, logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)


def nucleus(probabilities_SV: Tensor, top_p: Tensor) -> Tensor:
    """Zero what is outside the smallest set of most likely tokens whose probability reaches ``top_p (S,)``."""
    limit = torch.where(top_p >= 1, float("inf"), top_p.double())  # sums are rounded; 1 must keep everything
    ordered, order = probabilities_SV.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    kept = torch.where(before < limit.unsqueeze(1), ordered, 0.0)
    return torch.zeros_like(probabilities_SV).scatter_(1, order, kept)
