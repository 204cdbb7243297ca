"""Icons: symbols that differ, whole, and of the colour their caption names."""

from __future__ import annotations

import zlib
from itertools import combinations

import numpy as np
import pytest

from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.icons import ICONS, _symbol, draw_icon


def test_a_seed_gives_the_same_icon_for_ever_and_splits_share_none():
    one, two = draw_icon(3), draw_icon(3)
    assert np.array_equal(one.image, two.image)
    assert one.caption == two.caption
    seen = {s: {zlib.crc32(draw_icon(n, s).image.tobytes()) for n in range(60)} for s in ("train", "test")}
    assert len(seen["train"]) == len(seen["test"]) == 60
    assert not seen["train"] & seen["test"]
    with pytest.raises(ValueError, match="'dev' is none of"):
        draw_icon(0, "dev")


@pytest.mark.parametrize("outline", [False, True])
def test_no_two_symbols_look_alike(outline):
    drawn = {n: _symbol(s, (48, 48), 40, 0.0, 8, outline, 96, 96) > 0.5 for n, s in ICONS.items()}
    for one, two in combinations(drawn, 2):
        overlap = (drawn[one] & drawn[two]).sum() / (drawn[one] | drawn[two]).sum()
        assert overlap < 0.8, (one, two)


def test_a_symbol_is_whole_and_has_its_colour():
    seen = set()
    for seed in range(400):
        icon = draw_icon(seed, size=(112, 112))
        name, colour = list(ICONS)[icon.icon], list(COLOURS)[icon.colour]
        assert f"{colour} {name} icon on " in icon.caption
        assert not np.concatenate([icon.inside[0], icon.inside[-1], icon.inside[:, 0], icon.inside[:, -1]]).any()
        core = icon.inside.copy()
        for axis in (0, 1):
            core &= np.roll(icon.inside, 1, axis) & np.roll(icon.inside, -1, axis)
        if core.sum() > 20:  # thin outlines have no pixel that is not mixed with the ground
            assert np.abs(icon.image[core].mean(axis=0) - COLOURS[colour]).max() < 12
        seen.add(icon.icon)
    assert seen == set(range(len(ICONS)))


def test_levels_grade_the_difficulty():
    grounds = set()
    for seed in range(40):
        rows, columns = np.nonzero(draw_icon(seed, size=(112, 112), level=0).inside)
        assert 20 < (rows.min() + rows.max()) / 2 < 92  # about the middle: a minus is flat, a pin hangs a little
        assert columns.max() - columns.min() > 20
        caption = draw_icon(seed, size=(112, 112), level=0).caption
        assert caption.endswith(" ground")
        grounds.add(draw_icon(seed, size=(112, 112), level=1).caption.split(" on ")[1].split()[2])
    assert grounds == {"ground", "disc", "tile"}
    with pytest.raises(ValueError, match="levels 0 to 1, not 2"):
        draw_icon(0, level=2)


def test_sizes_are_what_was_asked_for():
    for size in ((28, 28), (40, 200), (224, 160)):
        icon = draw_icon(1, size=size)
        assert icon.image.shape == (*size, 3)
        assert icon.inside.shape == size
        assert icon.inside.any()
