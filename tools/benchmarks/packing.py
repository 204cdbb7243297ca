"""How full packs are, by ours and by other ways, over the same documents in the same order.

`next fit` closes a pack at the first document that does not fit; `first fit` keeps sixteen packs open, puts a document
into the first that has room, and closes the fullest where none has; `knapsack` takes, from the same look-ahead as ours,
the documents that fill a pack best, and lets others wait for ever (`longest wait` says how long). Fill is of the budget
that is fuller, tokens or patches: of documents with many images the other one cannot be full.

`shipped` is the laptop's pretraining mix at its weights and budgets. `Wikipedia` and `CoLA` have the share of padding
that arXiv 2107.02027 reports for them at 512 and 128 tokens (50 % and 89 %), with lengths of a log-normal law, cut at
the longest; a pack is as long as the longest document, as there. `many images` is the mix of `balance`: how many images
a document has follows a Pareto law, whose exponent is named.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count as count_up
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.build import BuildConfig, build, laptop
from data_pipelines.mixture import SourceConfig
from data_pipelines.stream import PackStream
from mmagent.packing import Size, fill_gap, select
from mmagent.vocab import Vocab
from recipes import pretrain
from recipes.quickstart_mix import SHARES
from tools.benchmarks import balance
from tools.benchmarks.row import Row, Settings

LOOK_AHEAD = 64
OPEN = 16
TAILS = (1.6, 1.2, 0.9)


class Packed(NamedTuple):
    """``fill``: percent, mean over packs; ``wait``: packs that the document longest overtaken waited for; ``seconds``
    of choosing a pack, median."""

    fill: float
    wait: int
    seconds: float


Choose = Callable[[Sequence[Size], Size], list[int]]


def chosen(sizes: Iterator[Size], budget: Size, packs: int, choose: Choose, look_ahead: int = LOOK_AHEAD) -> Packed:
    """Packs of what waits, filled up as the stream does: so many documents and two packs of tokens at least."""
    waiting: list[tuple[int, Size]] = []
    fills, waits, times = [], [0], []
    for number in range(packs):
        tokens = sum(size.tokens for _, size in waiting)
        while len(waiting) < look_ahead or tokens < 2 * budget.tokens:
            waiting.append((number, next(sizes)))
            tokens += waiting[-1][1].tokens
        started = time.perf_counter()
        taken = set(choose([size for _, size in waiting], budget))
        times.append(time.perf_counter() - started)
        fills.append(fullness([waiting[n][1] for n in taken], budget))
        waiting = [entry for n, entry in enumerate(waiting) if n not in taken]
        waits.append(number - waiting[0][0])
    return Packed(100 * float(np.mean(fills)), max(waits), statistics.median(times))


def fullness(sizes: Sequence[Size], budget: Size) -> float:
    return max(sum(s.tokens for s in sizes) / budget.tokens, sum(s.patches for s in sizes) / budget.patches)


def next_fit(sizes: Iterator[Size], budget: Size, packs: int) -> Packed:
    fills: list[float] = []
    pack: list[Size] = []
    room = budget
    for size in sizes:
        if not size.fits(room):
            fills.append(fullness(pack, budget))
            pack, room = [], budget
            if len(fills) == packs:
                break
        pack.append(size)
        room = room.less(size)
    return Packed(100 * float(np.mean(fills)), 0, 0.0)


def first_fit(sizes: Iterator[Size], budget: Size, packs: int) -> Packed:
    fills: list[float] = []
    opened: list[tuple[list[Size], Size]] = []
    for size in sizes:
        at = next((n for n, (_, room) in enumerate(opened) if size.fits(room)), None)
        if at is None:
            if len(opened) == OPEN:
                fullest = max(range(OPEN), key=lambda n: fullness(opened[n][0], budget))
                fills.append(fullness(opened.pop(fullest)[0], budget))
                if len(fills) == packs:
                    break
            opened.append(([size], budget.less(size)))
        else:
            pack, room = opened[at]
            opened[at] = ([*pack, size], room.less(size))
    return Packed(100 * float(np.mean(fills)), 0, 0.0)


def compared(name: str, sizes: Callable[[], Iterator[Size]], budget: Size, packs: int) -> Iterator[Row]:
    """Rows against each of the others; ``sizes`` begins the same stream anew."""
    ours = chosen(sizes(), budget, packs, select)
    best = chosen(sizes(), budget, packs, fill_gap)
    for peer, packed in (
        ("next fit", next_fit(sizes(), budget, packs)),
        ("first fit", first_fit(sizes(), budget, packs)),
        ("knapsack", best),
    ):
        yield Row(f"fill, {name}", ours.fill, packed.fill, peer, ours.fill / packed.fill, "%", 0.0)
    waits = best.wait / max(ours.wait, 1)
    yield Row(f"longest wait, {name}", ours.wait, best.wait, "knapsack", waits, "packs", 0.0)
    yield Row(
        f"choosing, {name}", 1e3 * ours.seconds, 1e3 * best.seconds, "knapsack", best.seconds / ours.seconds, "ms", 0.0
    )


def rows(settings: Settings) -> Iterator[Row]:
    packs = 100 if settings.quick else 2000
    shipped, budget = shipped_sizes(200 if settings.quick else 1200)
    yield from compared("shipped", partial(looped, shipped), budget, packs)
    for name, longest, padding in (("Wikipedia", 512, 0.5), ("CoLA", 128, 0.89)):
        lengths = padded_share(longest, 1 - padding)
        yield from compared(name, partial(looped, lengths), Size(longest, 1), packs)
    for tail in TAILS[1:2] if settings.quick else TAILS:
        yield from compared(f"many images, {tail}", partial(many_images, tail), balance.BUDGET, packs)


def many_images(tail: float) -> Iterator[Size]:
    return (item.size for item in balance.documents(0, balance.BUDGET, tail))


def looped(sizes: Sequence[Size]) -> Iterator[Size]:
    """Over and over, each time in another order."""
    random = np.random.default_rng(0)
    while True:
        for n in random.permutation(len(sizes)):
            yield sizes[n]


def padded_share(longest: int, share: float, count: int = 20_000) -> list[Size]:
    """Lengths whose mean is ``share`` of ``longest``: log-normal with a standard deviation of .8 in the logarithm, the
    median found by bisection, what is longer cut at the longest."""
    normal = np.random.default_rng(0).standard_normal(count)
    low, high = 1.0, 16.0 * longest
    while high / low > 1.0001:
        median = (low * high) ** 0.5
        lengths = np.clip(median * np.exp(0.8 * normal), 1, longest).round()
        low, high = (median, high) if lengths.mean() < share * longest else (low, median)
    return [Size(int(length), 0) for length in lengths]


def shipped_sizes(count: int) -> tuple[list[Size], Size]:
    """What the laptop's pretraining reads, at its weights, and its budget; sources are made here, small."""
    with tempfile.TemporaryDirectory() as folder:
        made = {name: max(whole * count // 12_000, 20) for name, whole in laptop().pretrain.items()}
        build(BuildConfig(folder=folder, pretrain=made))
        found = {path.parent.name for path in Path(folder).glob("pretrain/*/*.tar")}  # no screens without a browser
        sources = {name: SourceConfig(weight=SHARES["pretrain"][name]) for name in found}
        trained = pretrain.laptop()
        data = replace(trained.data, folder=f"{folder}/pretrain", sources=sources, prefetch=0)
        packer = next(iter(PackStream(data, Vocab.load(Path(folder)), trained.geometry)._packers.values()))
        plans = (packer.next() for _ in count_up())
        return list(islice((w.draft.size for plan in plans for w in plan.documents), 2 * count)), data.budget
