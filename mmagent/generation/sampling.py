"""From logits to tokens: each sequence draws from its own streams of random numbers, with drafts or without.

The number that decides token ``n`` of a sequence is a hash of ``(seed, n)``. It depends on nothing else in the
batch, needs no generator object per sequence, and is the same on every device.

With drafts (:func:`accept`), what is sampled has the very distribution that it has without, however wrong the drafts
are: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.trajectories import Limits

DRAW, DRAFT, ACCEPT = 0, 1, 2
"""Streams of :func:`uniforms`: what draws a token (plainly, or after a rejected draft), proposes one, or judges one."""

MOST_STOPS = 4096
"""Characters of all stop strings of a request; each byte of them is a node of what looks for them."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_COLDEST, _HOTTEST = 2.0**-100, 2.0**100
"""Temperatures beyond have the same distribution as these, and their quotients leave float32."""
_LIKELIEST = 256
"""Tokens that are put in order first, where a share of probability is asked for; a trained model's 95 % are fewer."""
_BLOCK, _MANY = 256, 1 << 13
"""Above so many ids the cumulative distribution is looked up in blocks. By ids, not by rows: what is drawn for a row
must not depend on how many others there are."""
_SEED = 1 << 63
_LARGEST = float(np.finfo(np.float32).max)


def check_limits(limits: Limits, key: str) -> None:
    """Raises ``ValueError`` naming the request ``key`` and the field that no completion can be sampled with."""

    def need(good: bool, field: str, rule: str) -> None:
        if not good:
            raise ValueError(f"{key}: {field} must be {rule}, got {repr(getattr(limits, field))[:200]}")

    def whole(value: object, least: int, end: int = _SEED) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < end

    def within(value: object, good: Sequence[float]) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and good[0] <= value <= good[1]

    need(whole(limits.max_tokens, 1), "max_tokens", "a whole number of at least 1")
    need(within(limits.temperature, (0, _LARGEST)), "temperature", "a finite number of at least 0")
    need(within(limits.top_p, (0, 1)) and limits.top_p > 0, "top_p", "above 0 and at most 1")
    need(whole(limits.top_k, 0), "top_k", "a whole number of at least 0 (0: all)")
    need(within(limits.min_p, (0, 1)) and limits.min_p < 1, "min_p", "at least 0 and below 1")
    need(whole(limits.seed, -_SEED), "seed", "a signed integer of 64 bits")
    need(not isinstance(limits.stop_ids, str), "stop_ids", "a sequence of ids")
    need(all(whole(index, 0) for index in limits.stop_ids), "stop_ids", "ids of at least 0")
    need(not isinstance(limits.stop_strings, str), "stop_strings", "a sequence of strings")
    need(
        all(map(_is_text, limits.stop_strings)), "stop_strings", "strings of at least one character, without surrogates"
    )
    need(sum(map(len, limits.stop_strings)) <= MOST_STOPS, "stop_strings", f"at most {MOST_STOPS} characters together")


def _is_text(value: object) -> bool:
    """A lone half of a surrogate pair, which JSON can spell, is no text: it has no bytes."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= c <= "\udfff" for c in value)


def uniforms(seeds: np.ndarray, counters: np.ndarray, stream: int = DRAW) -> np.ndarray:
    """float64 in [0, 1) from integer seeds and counters (broadcast): splitmix64 (Steele et al. 2014), twice over, and
    once more for a stream that is not the first. Numbers of different streams are independent of each other."""
    with np.errstate(over="ignore"):
        state = _scramble(np.asarray(seeds, dtype=np.int64).view(np.uint64))
        state = _scramble(state + np.asarray(counters, dtype=np.int64).view(np.uint64))
        if stream:
            state = _scramble(state + np.uint64(stream))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scramble(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------- distributions


def finite_scores(logits_SV: Tensor, barred: Tensor) -> tuple[Tensor, Tensor]:
    """``logits (S, V)``, changed in place, minus infinity where an id is barred; and ``(S,)`` bool, which rows are
    sick: there is nothing finite to sample from, and zeros stand there."""
    sick = ~logits_SV.index_fill_(1, barred, float("-inf")).amax(-1).isfinite()  # of NaN and infinity the most is that
    if bool(sick.any()):
        logits_SV[sick] = 0
    return logits_SV, sick


def sample(
    logits_SV: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
    uniform: Tensor,
    top_k: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability.

    ``logits`` fp32 with minus infinity where an id is barred; ``temperature (S,)``, 0 for the most likely token (the
    first of equals); ``top_p``, ``top_k``, ``min_p (S,)`` as :func:`narrow` takes them; ``uniform (S,)`` float64 in
    [0, 1) decides, by the inverse of the cumulative distribution.

    The log-probability is that of the distribution *before* it is narrowed, at the row's temperature (1 for a greedy
    row): what a trainer recomputes from the same logits.
    """
    greedy = _greedy(temperature)
    logprobs = _logprobs(logits_SV, temperature, greedy)
    if greedy is not None and greedy.device.type == "cpu" and bool(greedy.all()):
        ids = logits_SV.argmax(-1)
    else:
        ids = draw(_probabilities(logprobs, greedy, top_p, top_k, min_p), uniform)
        if greedy is not None:
            ids = torch.where(greedy, logits_SV.argmax(-1), ids)
    return ids, logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)


def distribution(
    logits_SV: Tensor,
    temperature: Tensor,
    top_p: Tensor | None = None,
    top_k: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`sample` draws from: log-probabilities ``(S, V)`` as it records them, and the probabilities ``(S, V)``
    of what is drawn, narrowed. All of a greedy row's probability is on its most likely token, the first of equals.

    ``draw(distribution(...)[1], uniform)`` are the ids of ``sample(...)``.
    """
    greedy = _greedy(temperature)
    logprobs = _logprobs(logits_SV, temperature, greedy)
    probabilities = _probabilities(logprobs, greedy, top_p, top_k, min_p)
    if greedy is not None:
        best = logits_SV.argmax(-1, keepdim=True)  # of logits: probabilities may be rounded to equals
        probabilities.masked_fill_(greedy.unsqueeze(1), 0.0)
        probabilities.scatter_(1, best, torch.where(greedy.unsqueeze(1), 1.0, probabilities.gather(1, best)))
    return logprobs, probabilities


def _greedy(temperature: Tensor) -> Tensor | None:
    """Which rows are; None where none is, as far as it costs nothing to know: a device would have to be waited for."""
    greedy = temperature == 0
    return greedy if temperature.device.type != "cpu" or bool(greedy.any()) else None


def _logprobs(logits_SV: Tensor, temperature: Tensor, greedy: Tensor | None) -> Tensor:
    divisor = temperature.clamp(_COLDEST, _HOTTEST)
    if greedy is not None:
        divisor = torch.where(greedy, 1.0, divisor)
    return torch.log_softmax(logits_SV / divisor.unsqueeze(1), dim=-1)


def _probabilities(
    logprobs_SV: Tensor, greedy: Tensor | None, top_p: Tensor | None, top_k: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """A new tensor of them; only rows that ask for it are narrowed."""
    probabilities = logprobs_SV.exp()
    asked = [column != idle for column, idle in ((top_p, 1), (top_k, 0), (min_p, 0)) if column is not None]
    if asked:
        some = torch.stack(asked).any(0)
        rows = (some if greedy is None else some & ~greedy).nonzero().squeeze(1)
        if rows.numel() == len(some):
            probabilities = narrow(probabilities, top_p, top_k, min_p)
        elif rows.numel():
            columns = (None if column is None else column[rows] for column in (top_p, top_k, min_p))
            probabilities[rows] = narrow(probabilities[rows], *columns)
    return probabilities


def draw(weights_SV: Tensor, uniform: Tensor) -> Tensor:
    """``(S,)`` ids: row ``s`` has id ``v`` with a probability proportional to ``weights[s, v] >= 0``, by the inverse of
    the cumulative distribution at ``uniform (S,)`` float64 in [0, 1). An id of weight 0 is never drawn."""
    V, device = weights_SV.shape[1], weights_SV.device
    uniform = uniform.double().unsqueeze(1)
    if V <= _MANY:
        cumulative = weights_SV.cumsum(-1, dtype=torch.float64)  # fp32 would lose the tail of a large vocabulary
        point = uniform * cumulative[:, -1:]  # below the end, as uniform is below 1
        return torch.searchsorted(cumulative, point, right=True).squeeze(1)
    # first the block, then the place in it: the cumulative distribution need not be written out
    whole = V - V % _BLOCK
    sums = weights_SV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)
    if whole < V:
        sums = torch.cat([sums, weights_SV[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], dim=1)
    ends = F.pad(sums.cumsum(-1), (1, 0))
    point = uniform * ends[:, -1:]
    block = torch.searchsorted(ends[:, 1:].contiguous(), point, right=True)
    places = block * _BLOCK + torch.arange(_BLOCK, device=device)
    weights = torch.where(places < V, weights_SV.gather(1, places.clamp(max=V - 1)), 0.0)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    below = torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(()))  # the block's sum is rounded otherwise
    rest = torch.minimum(point - ends.gather(1, block), below)
    return (block * _BLOCK + torch.searchsorted(cumulative, rest, right=True)).squeeze(1)


# ---------------------------------------------------------------------------------------------- narrowing


def narrow(
    probabilities_SV: Tensor, top_p: Tensor | None = None, top_k: Tensor | None = None, min_p: Tensor | None = None
) -> Tensor:
    """The distribution over the likeliest tokens alone, as transformers' warpers narrow it, and in their order.

    ``top_k (S,)`` keeps so many tokens (0: all); then ``top_p (S,)`` the smallest set of likeliest ones whose share of
    what is left reaches it; then ``min_p (S,)`` those of at least this share of the likeliest one's probability. Of
    equals at the edge of ``top_k`` or ``top_p`` the smaller ids stay, and never more than were asked for (transformers
    keeps all equals at the edge of top-k, and those its sort puts last at that of top-p). ``min_p`` parts no equals.
    None: not asked for, by any row.
    """
    kept: Tensor | None = None
    if top_p is not None or top_k is not None:
        kept = _leading(probabilities_SV, *_edge(probabilities_SV, top_p, top_k))
    if min_p is not None:
        likely = probabilities_SV >= min_p.unsqueeze(1) * probabilities_SV.amax(-1, keepdim=True)
        kept = likely if kept is None else kept & likely
    if kept is None:
        return probabilities_SV
    narrowed = torch.where(kept, probabilities_SV, 0.0)
    return (narrowed / narrowed.sum(-1, keepdim=True, dtype=torch.float64)).to(narrowed.dtype)


def _edge(probabilities_SV: Tensor, top_p: Tensor | None, top_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many tokens stay, ``(S,)``, and the probability of the least of them, ``(S,)``."""
    S, V = probabilities_SV.shape
    device = probabilities_SV.device
    most = torch.full((S,), V, device=device) if top_k is None else torch.where(top_k > 0, top_k, V).clamp(max=V)
    share = torch.full((S,), math.inf, dtype=torch.float64, device=device)
    if top_p is not None:
        share = torch.where(top_p < 1, top_p.double(), math.inf)  # sums are rounded; 1 must keep everything
    # the order of all tokens is dear, and a few of the likeliest settle nearly every row
    cut = most < V
    least_width = 1 if top_p is None else _LIKELIEST
    width = V if V <= 2 * _LIKELIEST else max(least_width, int(torch.where(cut, most, 0).max()))
    count, least, known = _prefix(probabilities_SV.topk(width).values, most, share, V)
    idle = ~cut & (share == math.inf)  # rows that ask for neither
    count, least = torch.where(idle, V, count), torch.where(idle, -1.0, least)
    rows = (~(known | idle)).nonzero().squeeze(1)
    if rows.numel():
        ordered = probabilities_SV[rows].sort(dim=-1, descending=True).values
        count[rows], least[rows], _ = _prefix(ordered, most[rows], share[rows], V)
    return count, least


def _prefix(ordered_SC: Tensor, most: Tensor, share: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """From the C largest probabilities of each row: how many stay, the least of them, and whether C were enough."""
    width = ordered_SC.shape[1]
    cumulative = ordered_SC.cumsum(-1, dtype=torch.float64)
    held = cumulative.gather(1, most.clamp(max=width).unsqueeze(1) - 1).squeeze(1)
    limit = share * torch.where(most < size, held, 1.0)
    before = F.pad(cumulative[:, :-1], (1, 0))
    count = torch.minimum((before < limit.unsqueeze(1)).sum(-1), most).clamp_min(1)  # float32 rounds 1e-50 to 0
    least = ordered_SC.gather(1, count.unsqueeze(1) - 1).squeeze(1)
    return count, least, (most <= width) | (cumulative[:, -1] >= limit)


def _leading(probabilities_SV: Tensor, count: Tensor, least: Tensor) -> Tensor:
    """Where the ``count (S,)`` likeliest tokens of each row are, of equals the smaller ids."""
    above = probabilities_SV > least.unsqueeze(1)
    equal = probabilities_SV == least.unsqueeze(1)
    room = count - above.sum(-1)
    if bool(((equal.sum(-1) > room) & (least > 0)).any()):
        equal &= equal.cumsum(-1) <= room.unsqueeze(1)
    return above | equal


# ---------------------------------------------------------------------------------------------- drafts


@dataclass(frozen=True)
class Drafts:
    """Tokens proposed for S rows, at most K for each: ``ids (S, K)``, of which row ``s`` has the first ``counts (S,)``
    (what lies behind must be ids, and is not read).

    ``probabilities (S, K, V)`` are those that each was drawn from, given the ones before it. None: each was chosen,
    not drawn (the likeliest, say), which is as exact and needs no room.

    How many drafts a row has may depend on all that came before, its earlier drafts included. Whether one is *kept*
    must not depend on that draft itself: it would no longer have the distribution that it was drawn from.

    ``others``, by row and draft, are tried in place of it: where it is refused, and one of them is what comes in its
    stead, then what comes behind that is known, too.
    """

    ids: Tensor
    counts: Tensor
    probabilities: Tensor | None = None
    others: list[list[list[int]]] | None = None

    def listed(self) -> list[list[int]]:
        """The drafts of each row."""
        return [ids[:count] for ids, count in zip(self.ids.tolist(), self.counts.tolist(), strict=True)]


def accept(target_SKV: Tensor, drafts: Drafts, uniform_SK: Tensor, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts of each row stay, ``(S,)``, and the id that comes after them, ``(S,)``.

    ``target (S, K + 1, V)`` are the probabilities (:func:`distribution`) at the place of each draft, given those before
    it, and at the one behind the last; row ``s`` has the first ``counts[s] + 1``. Draft ``x`` stays with probability
    ``min(1, target(x) / draft(x))``. In place of the first that does not comes a token drawn from what the target has
    more than the draft, ``max(target - draft, 0)``; behind the last that stays, one drawn from the target. Each token
    then has the target's distribution, given those before it.

    ``uniform (S, K)`` float64 in [0, 1), stream :data:`ACCEPT`, judge the drafts, each numbered by its place;
    ``uniform (S,)``, stream :data:`DRAW`, draw, numbered by the first place that was open. They depend neither on each
    other nor on what drew the drafts (stream :data:`DRAFT`, by place). Numbers of places that stay open have decided
    nothing and serve again. Without drafts the id is that of :func:`sample`.

    Greedy rows need nothing special: all of their target's probability is on one token, so a draft stays if it is that
    token, and that token replaces it if not.
    """
    S, K = drafts.ids.shape
    assert target_SKV.shape[:2] == (S, K + 1), "one place more than drafts"
    chosen = drafts.ids.unsqueeze(2)
    target = target_SKV[:, :K].gather(2, chosen).squeeze(2).double()
    draft = 1.0 if drafts.probabilities is None else drafts.probabilities.gather(2, chosen).squeeze(2).double()
    proposed = torch.arange(K, device=target.device) < drafts.counts.unsqueeze(1)
    # a product, not a quotient: a draft of probability 0 is no division by it, and equals always stay, as u < 1
    stays = proposed & (uniform_SK.double() * draft < target)
    accepted = stays.long().cumprod(1).sum(1)
    rows = torch.arange(S, device=target.device)
    weights = target_SKV[rows, accepted]
    if K:
        weights = _without(weights, drafts, rows, accepted)
    return accepted, draw(weights, uniform_S)


def _without(target_SV: Tensor, drafts: Drafts, rows: Tensor, accepted: Tensor) -> Tensor:
    """What the target has more than the draft it refused; the target itself where it refused none."""
    refused = (accepted < drafts.counts).unsqueeze(1)
    place = accepted.clamp(max=drafts.ids.shape[1] - 1)
    if drafts.probabilities is None:
        rest = target_SV.scatter(1, drafts.ids[rows, place].unsqueeze(1), 0.0)
    else:
        rest = (target_SV - drafts.probabilities[rows, place]).clamp_min(0.0)
    # Equal distributions that were rounded apart can refuse, once in some 10^7 times, and leave nothing.
    refused = refused & (rest.amax(-1, keepdim=True) > 0)
    return torch.where(refused, rest, target_SV)
