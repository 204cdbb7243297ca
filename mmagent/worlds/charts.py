"""Seeded charts with exact truth: what is drawn, in which colours, how the data runs, and what every pixel belongs to.

A chart is a function of ``(split, seed)`` alone, and no two splits share one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmagent.worlds.drawing import COLOURS, article, font, generator, grown, random_size

CHARTS = ("bar chart", "line chart", "area chart", "scatter plot", "histogram", "pie chart")
TRENDS = ("rising", "falling", "peaked", "dipping", "level")
PARTS = ("ground", "axis", "text", "mark")
MOST_SERIES, MOST_SLICES = 3, 6

_TOPICS = (
    *("sales", "votes", "rain", "price", "speed", "users", "cost", "heat", "noise", "weight", "visits", "score"),
    *("errors", "profit", "orders", "load", "age", "height", "power", "traffic", "growth", "wages", "rent", "debt"),
)
_LABELS = ("abcdefghij", "ABCDEFGHIJ", "0123456789", "JFMAMJJASO", "MTWTFSSMTW")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_FINE = 2  # pixels drawn for one shown, either way
_GROUNDS = ((255, 255, 255), (248, 248, 250), (250, 246, 236), (232, 238, 244), (34, 36, 44), (18, 30, 48))
Box = tuple[float, float, float, float]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """``image (h, w, 3)`` uint8, its ``caption``, its ``kind`` in :data:`CHARTS`; the number of ``series`` (slices of a
    pie); the ``trend`` in :data:`TRENDS` of the series that the caption names first (-1 for a pie); the number of that
    series' (the largest slice's) ``colour`` in :data:`COLOURS`; and ``parts (h, w)`` int64, numbers in :data:`PARTS`.
    A pixel is a mark's that a mark touches, else text's, else an axis'; text owns the box around its letters, and a
    grid is part of the axes."""

    image: np.ndarray
    caption: str
    kind: int
    series: int
    trend: int
    colour: int
    parts: np.ndarray

    def regions(self, reach: int = 4) -> np.ndarray:
        """``parts`` with every part grown by ``reach`` pixels, marks over text over axes: so that a patch which a thin
        line crosses is one that shows a line."""
        return grown(self.parts, reach)


@dataclass(frozen=True)
class _Series:
    """Values in [0, 1]; ``colour`` names one of :data:`COLOURS`."""

    colour: str
    trend: int
    values: np.ndarray


class _Canvas:
    """A picture drawn finely and the map of its parts, by the same calls in the same pixels."""

    def __init__(self, height: int, width: int, ground: tuple[int, int, int]):
        self.height, self.width = height, width
        fine = (width * _FINE, height * _FINE)
        self.picture, self.map = Image.new("RGB", fine, ground), Image.new("L", fine)
        self._pens = (ImageDraw.Draw(self.picture), ImageDraw.Draw(self.map))

    def parts(self) -> np.ndarray:
        """``(height, width)`` int64: of what touches a pixel, marks before text before axes."""
        fine = np.asarray(self.map).reshape(self.height, _FINE, self.width, _FINE)
        return fine.max(axis=(1, 3)).astype(np.int64)

    def _fills(self, paint: Sequence[int], part: str) -> Iterator[tuple[ImageDraw.ImageDraw, Any]]:
        return zip(self._pens, (tuple(paint), PARTS.index(part)), strict=True)

    def line(self, points: Points, thick: float, paint: Sequence[int], part: str) -> None:
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        for pen, fill in self._fills(paint, part):
            pen.line(fine, fill=fill, width=max(round(thick * _FINE), 1), joint="curve")

    def polygon(self, points: Points, paint: Sequence[int]) -> None:
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        for pen, fill in self._fills(paint, "mark"):
            pen.polygon(fine, fill=fill)

    def square(self, x: float, y: float, radius: float, paint: Sequence[int]) -> None:
        for pen, fill in self._fills(paint, "mark"):
            pen.rectangle(_around(x, y, radius), fill=fill)

    def disc(self, x: float, y: float, radius: float, paint: Sequence[int], part: str = "mark") -> None:
        for pen, fill in self._fills(paint, part):
            pen.ellipse(_around(x, y, radius), fill=fill)

    def text(self, x: float, y: float, words: str, size: float, paint: Sequence[int], anchor: str = "la") -> float:
        """Write at ``(x, y)`` and return how wide it was."""
        letters, place = font(max(round(size * _FINE), 6)), (x * _FINE, y * _FINE)
        box = self._pens[0].textbbox(place, words, font=letters, anchor=anchor)
        self._pens[0].text(place, words, fill=tuple(paint), font=letters, anchor=anchor)
        self._pens[1].rectangle(box, fill=PARTS.index("text"))
        return (box[2] - box[0]) / _FINE


def _around(x: float, y: float, radius: float) -> Box:
    return (x - radius) * _FINE, (y - radius) * _FINE, (x + radius) * _FINE, (y + radius) * _FINE


def draw_chart(seed: int, split: str = "train", size: tuple[int, int] | None = None, kind: str | None = None) -> Chart:
    """One chart with random data, colours, axes and words. ``size`` is ``(height, width)`` pixels; ``kind`` one of
    :data:`CHARTS`, None draws it, too. Raises ``ValueError`` for another."""
    random = generator("chart", seed, split)
    drawn = CHARTS[int(random.integers(len(CHARTS)))]
    if kind is not None and kind not in CHARTS:
        raise ValueError(f"chart kind {kind!r} is none of {CHARTS}")
    kind = drawn if kind is None else kind
    height, width = size or random_size(random)
    ground = _GROUNDS[int(random.integers(len(_GROUNDS)))]
    dark = sum(ground) < 3 * 128
    ink = (225, 225, 230) if dark else (40, 40, 48)
    canvas = _Canvas(height, width, ground)
    topic = _TOPICS[int(random.integers(len(_TOPICS)))]
    letter = float(random.uniform(0.07, 0.1)) * min(height, width)
    titled = bool(random.random() < 0.6)
    top = letter * (1.7 if titled else 0.6)
    colours = _colours(random, dark)
    if kind == "pie chart":
        said, count, colour = _pie(canvas, random, colours, ink, ground, letter, (0, top, width, height))
        trend = -1
    else:
        series = _data(random, kind, colours)
        box = _axes(canvas, random, series, ink, ground, letter, top, kind)
        _MARKS[kind](canvas, random, series, box)
        marks = {"line chart": "line", "area chart": "area", "scatter plot": "dots"}.get(kind, "bars")
        said = " and ".join(f"{TRENDS[s.trend]} {s.colour} {marks}" for s in series)
        count, colour, trend = len(series), list(COLOURS).index(series[0].colour), series[0].trend
    if titled:
        canvas.text(width / 2, letter * 0.4, topic, letter * 1.1, ink, "ma")
    image = np.asarray(canvas.picture.reduce(_FINE)).astype(np.int16)
    image += np.rint(random.normal(0.0, float(random.uniform(0.0, 3.0)), (height, width, 1))).astype(np.int16)
    caption = f"{article(kind)}{f' of {topic}' if titled else ''}: {said}"
    return Chart(
        np.clip(image, 0, 255).astype(np.uint8), caption, CHARTS.index(kind), count, trend, colour, canvas.parts()
    )


def _colours(random: np.random.Generator, dark: bool) -> list[str]:
    """All that stand out from the ground, in any order."""
    names = [name for name in COLOURS if name != ("black" if dark else "white")]
    return [names[n] for n in random.permutation(len(names))]


def _data(random: np.random.Generator, kind: str, colours: Sequence[str]) -> list[_Series]:
    most = {"histogram": 1, "area chart": 2, "bar chart": 2}.get(kind, MOST_SERIES)
    least, greatest = {"histogram": (8, 14), "scatter plot": (10, 25), "bar chart": (4, 8)}.get(kind, (5, 12))
    points, series = int(random.integers(least, greatest + 1)), []
    for n in range(int(random.integers(1, most + 1))):
        trend = int(random.integers(len(TRENDS)))
        x = np.linspace(0, 1, points)
        hill = 1 - (2 * x - 1) ** 2
        run = {"rising": x, "falling": 1 - x, "peaked": hill, "dipping": 1 - hill, "level": np.full(points, 0.5)}
        span = float(random.uniform(0.55, 0.75))
        values = 0.12 + span * run[TRENDS[trend]] + float(random.uniform(0.0, 0.85 - span))
        values = np.clip(values + random.normal(0, 0.035, points), 0.05, 0.98)
        series.append(_Series(colours[n], trend, values * (0.6 if kind == "area chart" and n else 1.0)))
    return series


def _axes(
    canvas: _Canvas, random: np.random.Generator, series: Sequence[_Series], ink: Sequence[int],
    ground: Sequence[int], letter: float, top: float, kind: str,
) -> Box:  # fmt: skip
    """Draw grid, axes, labels and maybe a legend; return the box that the data fills, in pixels."""
    numbered, named = random.random(2) < 0.8
    legend = bool(random.random() < 0.5)
    left, bottom = letter * (1.9 if numbered else 0.8), canvas.height - letter * (1.6 if named else 0.8)
    right = canvas.width - letter * 0.8
    if legend:
        x = left + letter * 0.5
        for n, one in enumerate(series):
            canvas.square(x, top + letter * 0.5, letter * 0.35, COLOURS[one.colour])
            x += letter * 0.7
            x += canvas.text(x, top + letter * 0.5, f"{'xyz'[n]}{n + 1}", letter * 0.9, ink, "lm") + letter * 0.8
        top += letter * 1.4
    thick = max(letter * 0.1, 0.75)
    ticks = int(random.integers(3, 6))
    faint = [round(0.82 * g + 0.18 * i) for g, i in zip(ground, ink, strict=True)]
    grid, step = bool(random.random() < 0.5), int(random.choice((1, 2, 5, 10, 20)))
    for n in range(ticks):
        y = bottom - (bottom - top) * n / (ticks - 1)
        if grid and n:
            canvas.line([(left, y), (right, y)], thick * 0.7, faint, "axis")
        if numbered:
            canvas.text(left - letter * 0.25, y, str(n * step), letter * 0.85, ink, "rm")
    if named:
        labels = _LABELS[int(random.integers(len(_LABELS)))]
        count = min(len(series[0].values), len(labels)) if kind == "bar chart" else int(random.integers(4, 8))
        for n in range(count):
            x = left + (right - left) * (n + 0.5) / count
            canvas.text(x, bottom + letter * 0.3, labels[n], letter * 0.85, ink, "ma")
    canvas.line([(left, bottom), (right, bottom)], thick, ink, "axis")
    if random.random() < 0.75:
        canvas.line([(left, top), (left, bottom)], thick, ink, "axis")
    return left + thick, top, right, bottom - thick


def _bars(canvas: _Canvas, random: np.random.Generator, series: Sequence[_Series], box: Box) -> None:
    """Groups with gaps between them."""
    _columns(canvas, series, box, float(random.uniform(0.55, 0.75)))


def _histogram(canvas: _Canvas, random: np.random.Generator, series: Sequence[_Series], box: Box) -> None:
    """Bins without gaps; where they are outlined, thinly."""
    _columns(canvas, series, box, 1.0 if random.integers(2) else 0.93)


def _columns(canvas: _Canvas, series: Sequence[_Series], box: Box, filled: float) -> None:
    left, top, right, bottom = box
    room = (right - left) / len(series[0].values)
    wide = room * filled / len(series)
    closed = 0.5 if filled == 1.0 else 0.0  # pixels by which neighbours overlap, so that rounding leaves no seam
    for n, one in enumerate(series):
        for place, value in enumerate(one.values):
            x = left + room * (place + (1 - filled) / 2) + wide * n
            y = bottom - value * (bottom - top)
            canvas.polygon(
                [(x, y), (x + wide + closed, y), (x + wide + closed, bottom), (x, bottom)], COLOURS[one.colour]
            )


def _curve(one: _Series, box: Box) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    last = len(one.values) - 1
    return [(left + (right - left) * n / last, bottom - v * (bottom - top)) for n, v in enumerate(one.values.tolist())]


def _lines(canvas: _Canvas, random: np.random.Generator, series: Sequence[_Series], box: Box) -> None:
    thick = float(random.uniform(0.014, 0.03)) * min(canvas.height, canvas.width)
    dotted = bool(random.integers(2))
    for one in series:
        points = _curve(one, box)
        canvas.line(points, thick, COLOURS[one.colour], "mark")
        for x, y in points if dotted else ():
            canvas.disc(x, y, thick * 1.3, COLOURS[one.colour])


def _areas(canvas: _Canvas, random: np.random.Generator, series: Sequence[_Series], box: Box) -> None:
    """The lower of two lies before the higher."""
    for one in series:
        points = _curve(one, box)
        canvas.polygon([*points, (points[-1][0], box[3]), (points[0][0], box[3])], COLOURS[one.colour])


def _dots(canvas: _Canvas, random: np.random.Generator, series: Sequence[_Series], box: Box) -> None:
    left, top, right, bottom = box
    radius = float(random.uniform(0.014, 0.026)) * min(canvas.height, canvas.width)
    for n, one in enumerate(series):
        spread = random.normal(0, 0.03, (2, len(one.values)))
        for (x, y), sideways, up in zip(_curve(one, box), *spread, strict=True):
            x, y = x + sideways * (right - left), y + up * (bottom - top)
            x, y = min(max(x, left + radius), right - radius), min(max(y, top + radius), bottom - radius)
            (canvas.square if n == 1 else canvas.disc)(x, y, radius, COLOURS[one.colour])


_MARKS = {
    "bar chart": _bars,
    "line chart": _lines,
    "area chart": _areas,
    "scatter plot": _dots,
    "histogram": _histogram,
}


def _pie(
    canvas: _Canvas, random: np.random.Generator, colours: Sequence[str], ink: Sequence[int], ground: Sequence[int],
    letter: float, box: Box,
) -> tuple[str, int, int]:  # fmt: skip
    """Draw a pie, or a ring, and say it: the words, how many slices, the number of the largest one's colour."""
    left, top, right, bottom = box
    count = int(random.integers(2, MOST_SLICES + 1))
    shares = random.uniform(0.35, 1.0, count)
    largest = int(random.integers(count))
    shares[largest] = shares.max() * float(random.uniform(1.4, 2.2))
    edges = np.concatenate([[0.0], np.cumsum(shares / shares.sum())]) * 360 + float(random.uniform(0, 360))
    legend = bool(random.random() < 0.5)
    radius = float(random.uniform(0.36, 0.45)) * min((right - left) * (0.8 if legend else 1.0), bottom - top)
    x, y = left + radius + letter * 0.6 if legend else (left + right) / 2, (top + bottom) / 2
    for n in range(count):
        sweep = np.radians(np.linspace(edges[n], edges[n + 1], max(int(edges[n + 1] - edges[n]) // 6, 2)))
        rim = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in sweep]
        canvas.polygon([(x, y), *rim], COLOURS[colours[n]])
    if random.random() < 0.3:
        canvas.disc(x, y, radius * float(random.uniform(0.35, 0.6)), ground, "ground")
    if legend:
        for n in range(count):
            line = (top + bottom) / 2 + (n - (count - 1) / 2) * letter * 1.25
            canvas.square(x + radius + letter, line, letter * 0.35, COLOURS[colours[n]])
            canvas.text(x + radius + letter * 1.6, line, f"{'abcdef'[n]}{n + 1}", letter * 0.9, ink, "lm")
    said = f"{_NUMBERS[count]} slices, the largest {colours[largest]}"
    return said, count, list(COLOURS).index(colours[largest])
