"""Packs are as full as promised, on laws of lengths that others have published, and no document waits for ever."""

from __future__ import annotations

from functools import partial

import pytest

from mmagent.packing import Size, fill_gap, select
from tools.benchmarks import balance, packing


@pytest.mark.parametrize(("longest", "padding"), [(512, 0.5), (128, 0.89)], ids=["Wikipedia", "CoLA"])
def test_packs_of_published_lengths_are_full(longest, padding):
    lengths = packing.padded_share(longest, 1 - padding)
    assert sum(size.tokens for size in lengths) / len(lengths) / longest == pytest.approx(1 - padding, abs=0.01)
    budget = Size(longest, 1)
    ours = packing.chosen(packing.looped(lengths), budget, 150, select)
    assert ours.fill >= 98.0  # the aim, where a pack is no longer than the longest document
    assert ours.fill > packing.next_fit(packing.looped(lengths), budget, 150).fill
    assert ours.wait <= packing.LOOK_AHEAD


def test_packs_of_many_images_are_full_whatever_their_tail():
    for tail in packing.TAILS:
        sizes = partial(packing.many_images, tail)
        ours = packing.chosen(sizes(), balance.BUDGET, 60, select)
        assert ours.fill >= 98.0
        assert ours.fill >= packing.first_fit(sizes(), balance.BUDGET, 60).fill - 0.5


def test_the_best_fill_lets_documents_wait_longer():
    """Why ours is no plain knapsack."""
    lengths = packing.padded_share(512, 0.5)
    ours, best = (packing.chosen(packing.looped(lengths), Size(512, 1), 400, way) for way in (select, fill_gap))
    assert best.fill >= ours.fill
    assert best.wait > ours.wait
