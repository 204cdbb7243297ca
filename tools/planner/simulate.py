"""Packs drawn at random and dealt to many ranks: how full they are, and how much longer the slowest rank works.

Documents are packed and packs are dealt by the library's own functions (:func:`mmagent.packing.select` and
:func:`mmagent.balance.deal`), as :class:`data_pipelines.stream.PackStream` calls them, and images are traded by
:func:`mmagent.models.vision_balance.plan_images`; nothing is read or decoded. A pool of packs is made once, and worlds
larger than it draw from it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.balance import CostWeights, deal, max_over_mean
from mmagent.models.vision_balance import VisionBalanceConfig, plan_images
from mmagent.packing import Size, select
from mmagent.types import Cost

WAITING = 64
"""Documents that wait to be chosen from, as in :class:`data_pipelines.stream.StreamConfig`."""

POOL = 1536
"""Packs that are really packed."""

TRADING = VisionBalanceConfig().ranks
"""Neighbours that trade images."""


@dataclass(frozen=True)
class Mix:
    """Documents: log-normal lengths of ``mean`` tokens (deviation ``spread`` of the logarithm), cut at a whole
    pack. Half of them hold images, which make up the share of all tokens that gives a pack ``patches`` on average;
    an image has ``frame`` patches on average, with a deviation of 0.7 of the logarithm, ``merge`` patches a visual
    token."""

    mean: int
    spread: float
    patches: int
    frame: int
    merge: int = 4


@dataclass(frozen=True)
class Pack:
    """``size`` in tokens and patches, ``cost`` as the balance sees it, how many ``documents``, patches of
    ``frames``."""

    size: Size
    cost: Cost
    documents: int
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Dealt:
    """One way of dealing: packs of ``group`` ranks are dealt by cost (1: as they come). ``together``: work of the
    heaviest rank over the mean, for ranks that meet at the end of a step; ``apart``: the same for ranks that meet
    after every micro-batch, as sharded ones do; ``moved``: the latter once eight neighbours have traded images,
    None without any."""

    ranks: int
    group: int
    together: float
    apart: float
    moved: float | None


@dataclass(frozen=True)
class Simulated:
    """``fill`` share of the token budget; ``documents`` a pack; ``vision``: by size of the world, patches of the
    heaviest rank over the mean as packs come."""

    fill: float
    documents: float
    dealt: tuple[Dealt, ...]
    vision: dict[int, float]


def simulate(
    weights: CostWeights,
    budget: Size,
    mix: Mix,
    worlds: tuple[int, ...],
    groups: tuple[int, ...] = (1, 8, 64, 0),
    micro_batches: int = 4,
    seed: int = 0,
    pool: int = POOL,
    progress: Callable[[str], None] = lambda _: None,
) -> Simulated:
    """``weights`` of a model (:func:`mmagent.models.flops.cost_weights`). ``budget`` of a micro-batch, of which
    every rank of every world gets ``micro_batches`` a step; groups of 0 are whole worlds, those larger than one are
    left out."""
    generator = np.random.default_rng(seed)
    packs = _packs(generator, budget, mix, pool, progress)
    dealt, vision = [], {}
    for ranks in worlds:
        number = ranks * micro_batches
        drawn = generator.choice(len(packs), number, replace=number > len(packs))
        own = [packs[n] for n in drawn]
        for group in dict.fromkeys(group or ranks for group in groups):
            if group <= ranks and ranks % group == 0:
                progress(f"dealing packs to {ranks:,} ranks, {group} at a time")
                dealt.append(_deal(own, ranks, group, weights, bool(mix.patches)))
        if mix.patches:
            vision[ranks] = max_over_mean([sum(p.size.patches for p in own[r::ranks]) for r in range(ranks)])
    full = float(np.mean([pack.size.tokens for pack in packs]) / budget.tokens)
    return Simulated(full, float(np.mean([pack.documents for pack in packs])), tuple(dealt), vision)


def _deal(packs: Sequence[Pack], ranks: int, group: int, weights: CostWeights, images: bool) -> Dealt:
    """Packs dealt among ``group`` neighbours at a time; then, in every micro-batch, images traded among eight."""
    rounds = len(packs) // ranks
    order: list[list[Pack]] = []  # by rank
    for start in range(0, ranks, group):
        block = packs[start * rounds : (start + group) * rounds]
        if group == 1:
            order.append(list(block))
        else:
            costs = [weights(pack.cost) for pack in block]
            order += [[block[n] for n in own] for own in deal(costs, group)]
    table = np.array([[weights(pack.cost) for pack in own] for own in order])
    mean = table.mean()
    moved = None
    if images and group == TRADING:  # as the stream deals by default
        moved = float(_traded(order, weights).max(0).sum() / (mean * rounds))
    together, apart = table.sum(1).max() / (mean * rounds), table.max(0).sum() / (mean * rounds)
    return Dealt(ranks, group, float(together), float(apart), moved)


def _traded(order: Sequence[Sequence[Pack]], weights: CostWeights) -> np.ndarray:
    """``(ranks, rounds)``: work once :func:`mmagent.models.vision_balance.plan_images` has moved images."""
    work = np.array([[weights.text(pack.cost) for pack in own] for own in order])
    for start in range(0, len(order), TRADING):
        for at in range(len(order[0])):
            grids = [[(1, 2, frame // 2) for frame in own[at].frames] for own in order[start : start + TRADING]]
            work[start : start + TRADING, at] += plan_images(grids, weights).after
    return work


def _packs(
    generator: np.random.Generator, budget: Size, mix: Mix, count: int, progress: Callable[[str], None]
) -> list[Pack]:
    """Packs of one logical stream after another, each from its own queue of waiting documents."""
    packs: list[Pack] = []
    waiting: list[tuple[Size, tuple[int, ...]]] = []
    start = time.monotonic()
    while len(packs) < count:
        while len(waiting) < WAITING or sum(size.tokens for size, _ in waiting) < 2 * budget.tokens:
            waiting.append(_document(generator, budget, mix))
        chosen = set(select([size for size, _ in waiting], budget))
        taken = [waiting[n] for n in chosen]
        waiting = [one for n, one in enumerate(waiting) if n not in chosen]
        frames = [patches for _, own in taken for patches in own]
        size = Size(sum(s.tokens for s, _ in taken), sum(frames))
        squares = sum(s.tokens**2 for s, _ in taken)
        cost = Cost(sum(n * n for n in frames), size.patches, squares, size.tokens)
        packs.append(Pack(size, cost, len(taken), tuple(frames)))
        if len(packs) % 128 == 0:
            left = (time.monotonic() - start) / len(packs) * (count - len(packs))
            progress(f"packing: {len(packs):,} of {count:,} packs, {left:.0f} s left")
    return packs


def _document(generator: np.random.Generator, budget: Size, mix: Mix) -> tuple[Size, tuple[int, ...]]:
    """Size of a document and patches of its frames, within the budget."""
    length = min(max(round(mix.mean * float(generator.lognormal(-(mix.spread**2) / 2, mix.spread))), 2), budget.tokens)
    visual = mix.patches / mix.merge / budget.tokens
    frames: list[int] = []
    room = min(length * min(2 * visual, 0.9), budget.patches / mix.merge) if generator.random() < 0.5 else 0.0
    while room > 0:
        patches = mix.merge * max(round(mix.frame / mix.merge * float(generator.lognormal(-0.245, 0.7))), 1)
        if patches / mix.merge > room:
            if generator.random() * patches / mix.merge > room:  # by chance, so that the share is kept on average
                break
            patches = mix.merge * max(int(min(patches / mix.merge, length - 1, budget.patches / mix.merge)), 1)
        frames.append(patches)
        room -= patches / mix.merge
    while sum(frames) > budget.patches or sum(frames) / mix.merge > length - 1:
        frames.pop()
    return Size(length, sum(frames)), tuple(frames)
