"""What a pack costs, and which rank takes it: ranks wait for the slowest, so a step takes as long as the heaviest.

A cost is four numbers (:class:`~mmagent.types.Cost`); :class:`CostWeights` make one of them. They come from a model's
config (:func:`mmagent.models.flops.cost_weights`), or from times measured on the machine at hand
(:func:`fit_weights`). Everything here is deterministic: ranks that know the same costs come to the same answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations
from typing import NamedTuple

import numpy as np

from mmagent.types import Cost


@dataclass
class CostWeights:
    """Time of one unit of each term of :class:`~mmagent.types.Cost`, in any unit of time or operations.

    A transformer layer of width ``w`` spends about ``24 w^2`` operations a token outside attention and
    ``4 w n`` inside it over ``n`` keys (half of that when causal). Defaults are those of a 24-layer encoder
    of width 1024 (per patch) and a 46-layer decoder of width 4096 (per token), scaled to one token = 1.
    """

    patches_squared: float = 5.3e-6
    patches: float = 0.033
    tokens_squared: float = 2.0e-5
    tokens: float = 1.0

    def __post_init__(self) -> None:
        if not min(astuple(self)) >= 0:
            raise ValueError(f"cost: weights must not be negative, got {self}")

    def __call__(self, cost: Cost) -> float:
        """One comparable number."""
        return self.vision(cost) + self.text(cost)

    def vision(self, cost: Cost) -> float:
        """The encoder's part."""
        return self.patches_squared * cost.patches_squared + self.patches * cost.patches

    def text(self, cost: Cost) -> float:
        """The decoder's part."""
        return self.tokens_squared * cost.tokens_squared + self.tokens * cost.tokens

    @staticmethod
    def of(encoder_width: int, encoder_layers: int, decoder_width: int, decoder_layers: int) -> CostWeights:
        """Weights of a model with dense layers (for a mixture of experts, pass the width of equal active size)."""
        token = 24 * decoder_width**2 * decoder_layers
        return CostWeights(
            patches_squared=4 * encoder_width * encoder_layers / token,
            patches=24 * encoder_width**2 * encoder_layers / token,
            tokens_squared=2 * decoder_width * decoder_layers / token,
            tokens=1.0,
        )


class Fit(NamedTuple):
    """``weights`` in seconds, the seconds that every pack takes whatever it holds (``start``), and the ``error``:
    the root mean square of what the fit misses, over the mean of what was measured."""

    weights: CostWeights
    start: float
    error: float


def fit_weights(costs: Sequence[Cost], seconds: Sequence[float]) -> Fit:
    """The weights under which ``costs`` come nearest to measured ``seconds``, by least squares of relative errors.

    No weight is negative: with so few of them the best choice of which are zero is found by trying all. Raises
    ``ValueError`` for fewer measurements than there are weights, and for times that are not positive.
    """
    if len(costs) != len(seconds) or len(costs) < 6:
        raise ValueError(f"cost: {len(costs)} packs and {len(seconds)} times: a fit wants at least six of both")
    times = np.asarray(seconds, dtype=float)
    if not (times > 0).all():
        raise ValueError(f"cost: a measured time of {times.min()} s")
    columns = np.array([(*cost, 1) for cost in costs], dtype=float) / times[:, None]
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)  # squares are many orders larger than counts
    ones, best = np.ones(len(times)), (np.inf, np.zeros(5))
    for size in range(1, 6):
        for chosen in map(list, combinations(range(5), size)):
            found = np.linalg.lstsq(columns[:, chosen] / scale[chosen], ones, rcond=None)[0]
            missed = float(np.square(columns[:, chosen] / scale[chosen] @ found - 1).sum())
            if (found >= 0).all() and missed < best[0] * (1 - 1e-9):
                values = np.zeros(5)
                values[chosen] = found / scale[chosen]
                best = (missed, values)
    *weights, start = best[1].tolist()
    predicted = (columns @ best[1]) * times
    error = float(np.sqrt(np.square(predicted - times).mean()) / times.mean())
    return Fit(CostWeights(*weights), start, error)


def max_over_mean(loads: Sequence[float]) -> float:
    """How much longer the heaviest takes than all would if they shared evenly; 1 is perfect (and for no load)."""
    mean = sum(loads) / max(len(loads), 1)
    return max(loads) / mean if mean > 0 else 1.0


def deal(costs: Sequence[float], ranks: int, min_gain: float = 0.02) -> list[list[int]]:
    """Deal packs to ranks, equally many to each: indices of ``costs`` by rank, from heavy to light.

    From the heaviest pack down, each goes to the rank with the least work that still wants one; then the heaviest rank
    swaps packs with others while the heavier of the two becomes lighter. That is for ranks that wait for one another
    at the end of a step. Those that do so in every micro-batch (sharded parameters, shared experts, images that
    travel) meet with equals, as all take their heaviest first.

    Dealing in turn (pack ``n`` to rank ``n % ranks``, heavy ones first, too) is kept where either way of waiting would
    take longer, or neither gets shorter by ``min_gain``: a rank then trains on what it reads itself. Raises
    ``ValueError`` when the packs cannot be dealt evenly.
    """
    if ranks < 1 or len(costs) % ranks:
        raise ValueError(f"{len(costs)} packs cannot be dealt evenly to {ranks} ranks")
    values = np.asarray(costs, dtype=float)
    heavy_first = np.lexsort((np.arange(len(values)), -values))
    in_turn = [heavy_first[heavy_first % ranks == rank].tolist() for rank in range(ranks)]
    if not values.any():
        return in_turn
    dealt = _even_out(values, _lightest_first(values, heavy_first, ranks))
    before, after = values[np.array(in_turn).T], values[dealt]
    gains = [1 - time(after) / time(before) for time in (_at_the_end, _every_round)]
    return dealt.T.tolist() if min(gains) > -1e-9 and max(gains) > min_gain else in_turn


def _at_the_end(costs: np.ndarray) -> float:
    """The time of ``costs (rounds, ranks)`` where ranks wait for one another at the end alone."""
    return float(costs.sum(axis=0).max())


def _every_round(costs: np.ndarray) -> float:
    """And where they do so after every round."""
    return float(costs.max(axis=1).sum())


def _lightest_first(values: np.ndarray, heavy_first: np.ndarray, ranks: int) -> np.ndarray:
    """``(rounds, ranks)``: a sorted greedy (LPT) under equal numbers."""
    rounds = len(values) // ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    open_ranks = [(0.0, rank) for rank in range(ranks)]
    for n in heavy_first.tolist():
        load, rank = heapq.heappop(open_ranks)
        dealt[rank].append(n)
        if len(dealt[rank]) < rounds:
            heapq.heappush(open_ranks, (load + float(values[n]), rank))
    return np.array(dealt).T


def _even_out(values: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Swap packs of the heaviest rank while the heavier of the two that swap becomes lighter. Within half a percent of
    the mean that ends: what is left is not worth rounds of less equal packs."""
    cost = values[dealt]
    for _ in range(min(4 * cost.shape[1], 1000)):
        loads = cost.sum(axis=0)
        heaviest = int(loads.argmax())
        if loads[heaviest] <= 1.005 * loads.mean():
            break
        light = np.sort(np.argpartition(loads, min(256, len(loads)) - 1)[:256])  # of thousands, the rest help no more
        given = cost[:, heaviest, None, None] - cost[:, light]  # (its rounds, rounds, ranks): what it would get rid of
        # of the two ranks the heavier, above what the heaviest has now
        after = np.where(given > 0, np.maximum(-given, given - (loads[heaviest] - loads[light])), np.inf)
        mine, theirs, other = np.unravel_index(int(after.argmin()), after.shape)
        if not after[mine, theirs, other] < -1e-9 * loads[heaviest]:
            break
        other = light[other]
        dealt[mine, heaviest], dealt[theirs, other] = dealt[theirs, other], dealt[mine, heaviest]
        for rank in (heaviest, other):
            dealt[:, rank] = dealt[np.lexsort((dealt[:, rank], -values[dealt[:, rank]])), rank]
            cost[:, rank] = values[dealt[:, rank]]
    return dealt


assert [field.name for field in fields(CostWeights)] == list(Cost._fields), "weights and terms in one order"
