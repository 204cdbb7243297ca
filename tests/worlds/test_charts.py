"""Charts: the same for ever, and what they say of themselves is what their pixels show."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from mmagent.worlds.charts import CHARTS, MOST_SERIES, MOST_SLICES, PARTS, TRENDS, Chart, draw_chart
from mmagent.worlds.drawing import COLOURS

MARK = PARTS.index("mark")
ALL = np.array(list(COLOURS.values()), dtype=np.float64)


def _nearest(pixels: np.ndarray) -> np.ndarray:
    return np.linalg.norm(pixels[:, None].astype(np.float64) - ALL, axis=2).argmin(axis=1)


def _heights(chart: Chart) -> np.ndarray:
    """Mark pixels in each column that has some, without what stands alone near the top: the legend."""
    marks = chart.parts == MARK
    bottom = np.flatnonzero(marks.any(axis=1)).max()
    standing = np.logical_and.accumulate(marks[: bottom + 1][::-1], axis=0)  # what reaches down to the axis
    heights = standing.sum(axis=0)
    return heights[heights > 1]


def test_a_seed_gives_the_same_chart_for_ever_and_splits_share_none():
    one, two = draw_chart(3), draw_chart(3)
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.parts, two.parts)
    assert one.caption == two.caption
    seen = {s: {zlib.crc32(draw_chart(n, s).image.tobytes()) for n in range(60)} for s in ("train", "test")}
    assert len(seen["train"]) == len(seen["test"]) == 60
    assert not seen["train"] & seen["test"]
    with pytest.raises(ValueError, match="'dev' is none of"):
        draw_chart(0, "dev")
    with pytest.raises(ValueError, match="'radar' is none of"):
        draw_chart(0, kind="radar")


def test_every_kind_trend_and_count_occurs_and_is_named():
    charts = [draw_chart(seed, size=(112, 112)) for seed in range(250)]
    assert {c.kind for c in charts} == set(range(len(CHARTS)))
    assert {c.trend for c in charts} == set(range(-1, len(TRENDS)))
    assert {c.series for c in charts} == set(range(1, max(MOST_SERIES, MOST_SLICES) + 1))
    for chart in charts:
        kind = CHARTS[chart.kind]
        assert kind in chart.caption
        said = chart.caption.split(": ")[1]
        colour = list(COLOURS)[chart.colour]
        if kind == "pie chart":
            assert chart.trend == -1
            assert said.endswith(f"the largest {colour}")
        else:
            assert said.startswith(f"{TRENDS[chart.trend]} {colour} ")
            assert said.count(" and ") == chart.series - 1


@pytest.mark.parametrize("kind", ["bar chart", "histogram", "area chart"])
def test_the_data_run_as_the_trend_says(kind):
    checked = set()
    for seed in range(80):
        chart = draw_chart(seed, size=(112, 160), kind=kind)
        if chart.series > 1:
            continue
        heights = _heights(chart)
        first, middle, last = (part.mean() for part in np.array_split(heights, [len(heights) // 3, -len(heights) // 3]))
        tall = chart.parts.shape[0]
        shown = {
            "rising": last > middle > first,
            "falling": first > middle > last,
            "peaked": middle > max(first, last) + 0.1 * tall,
            "dipping": middle < min(first, last) - 0.1 * tall,
            "level": max(first, middle, last) - min(first, middle, last) < 0.1 * tall,
        }
        assert shown[TRENDS[chart.trend]], (seed, TRENDS[chart.trend], first, middle, last)
        checked.add(chart.trend)
    assert checked == set(range(len(TRENDS)))


def test_marks_have_the_colours_that_are_named():
    """Only pixels whose neighbours are marks, too: what lies on a border is mixed with the ground."""
    for seed in range(60):
        chart = draw_chart(seed, size=(160, 160))
        inner = chart.parts == MARK
        for axis in (0, 1):
            inner &= np.roll(inner, 1, axis) & np.roll(inner, -1, axis)
        found = np.bincount(_nearest(chart.image[inner]), minlength=len(COLOURS)) / max(inner.sum(), 1)
        named = {n for n, name in enumerate(COLOURS) if f" {name}" in chart.caption.split(":")[1]}
        if CHARTS[chart.kind] == "pie chart":
            assert found.argmax() == chart.colour
            assert (found > 0.03).sum() == chart.series
        elif inner.sum() > 50:
            assert found[sorted(named)].sum() > 0.85  # the seams of a histogram are finer than a pixel


def test_the_ground_is_empty_and_every_part_is_there():
    """Pixels far from every part have one colour but for the noise."""
    seen = set()
    for seed in range(40):
        chart = draw_chart(seed, size=(140, 180))
        seen |= set(np.unique(chart.parts))
        empty = chart.image[chart.regions(2) == 0].astype(np.float64)
        assert (np.abs(empty - np.median(empty, axis=0)).max(axis=1) < 20).all()  # noise is 3 at most: six deviations
        grown = chart.regions()
        assert (grown[chart.parts == MARK] == MARK).all()
        assert (grown >= chart.parts).all()
    assert seen == set(range(len(PARTS)))


def test_sizes_are_what_was_asked_for():
    for size in ((28, 28), (40, 200), (300, 60), (224, 224)):
        for seed in range(12):
            chart = draw_chart(seed, size=size)
            assert chart.image.shape == (*size, 3)
            assert chart.parts.shape == size
            assert chart.image.dtype == np.uint8
