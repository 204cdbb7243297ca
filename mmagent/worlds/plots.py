"""Plots whose numbers can be read back: what is drawn as data, a renderer, and the little language that says it.

The charts of :mod:`mmagent.worlds.charts` are for encoders to look at: what their axes say is decoration. Here every
number, name and colour is there to be asked for.

The language is JSON: ``{"type": "bar", "title": ..., "x": [...], "series": {name: {"colour": ..., "values": [...]}}}``;
a pie has one series without a colour of its own, its slices taking ``colours``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.worlds.canvas import Canvas, Paint, grainy, grounds, palette, text_width
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.passages import pick
from mmagent.worlds.words import CITIES, MONTHS, NOUNS

KINDS = ("bar", "barh", "line", "pie")
HEIGHT, WIDTH = 280, 364
_TITLES = ("Sales", "Visitors", "Rainfall", "Orders", "Exports", "Patients", "Energy use", "Downloads", "Members")
_NAMES = (
    MONTHS,
    ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    tuple(city for city in CITIES if len(city) <= 5 and city.isascii()),
    ("2015", "2016", "2017", "2018", "2019", "2020", "2021", "2022", "2023", "2024"),
)
_ORDERED = (0, 1, 3)  # of the names above, those that come in an order
_SERIES = tuple(noun for noun in NOUNS if len(noun) <= 6 and noun not in COLOURS)


@dataclass(frozen=True)
class Plot:
    """``values (series, names)`` are multiples of ``unit`` within the axis 0 to ``top``, which has a labelled line at
    every ``tick``; a unit is at least four pixels. Of a pie they are percentages. ``colours`` are of the series, a
    pie's of the slices. ``printed``: the numbers stand beside their marks."""

    kind: str
    title: str
    names: tuple[str, ...]
    series: tuple[str, ...]
    colours: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    unit: int
    tick: int
    top: int
    printed: bool

    def __post_init__(self) -> None:
        assert self.kind == "pie" or (150 * self.unit >= 4 * self.top and self.top % self.tick == 0)


def draw_plot(random: np.random.Generator, level: int, kinds: Sequence[str] = KINDS) -> Plot:
    """A plot with random numbers. Level 0 has one series with its numbers printed, 1 values on the lines of the grid, 2
    up to two series halfway between as well, 3 up to three series and fifths."""
    kind = kinds[int(random.integers(len(kinds)))]
    group = int(random.integers(len(_NAMES)))
    count = int(random.integers(3, (5, 6, 6, 7)[level]))
    if group in _ORDERED:
        start = int(random.integers(len(_NAMES[group]) - count + 1))
        names = _NAMES[group][start : start + count]
    else:
        names = tuple(pick(random, _NAMES[group], count))
    title = _TITLES[int(random.integers(len(_TITLES)))]
    if kind == "pie":
        shares = _shares(random, min(count, 5))
        names = names[: len(shares)]
        return Plot(kind, title, names, (title,), tuple(palette(random, len(names))), (shares,), 1, 1, 100, level < 2)
    most = (1, 1, 2, 3)[level]
    series = tuple(pick(random, _SERIES, most if level < 2 else int(random.integers(2, most + 1))))
    tick = int(random.choice((1, 2, 5, 10, 20, 50, 100))) * (1 if level < 2 else 10)
    steps, parts = int(random.integers(4, 7)), (2, 1, 2, 5)[level]
    unit = max(tick // parts, 1)
    top = tick * steps
    while True:  # lines that meet at a name would hide each other's dots
        values = tuple(tuple(int(v) * unit for v in random.integers(1, top // unit, count)) for _ in series)
        if kind != "line" or apart(values):
            break
    return Plot(
        kind, title, names, series, tuple(palette(random, len(series))), values, unit, tick, top, level == 0
    )  # fmt: skip


def apart(values: Sequence[Sequence[int]]) -> bool:
    """Whether no two series have the same value at a name."""
    return all(len(set(here)) == len(here) for here in zip(*values, strict=True))


def _shares(random: np.random.Generator, count: int) -> tuple[int, ...]:
    """Percentages of a pie, each at least 6 and at least 4 away from the others, 100 together."""
    while True:
        cuts = np.sort(random.choice(np.arange(6, 95), count - 1, replace=False)) if count > 1 else np.array([])
        shares = np.diff(np.concatenate([[0], cuts, [100]])).astype(int)
        ordered = np.sort(shares)
        if ordered[0] >= 6 and (count == 1 or int(np.diff(ordered).min()) >= 4):
            return tuple(int(share) for share in shares)


def paint_plot(plot: Plot, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Its picture, ``(280, 364, 3)`` uint8, in random looks."""
    ground, ink = grounds(random)
    canvas = Canvas(HEIGHT, WIDTH, ground)
    face, size = ("plain", "sans", "serif")[int(random.integers(3))], float(random.integers(11, 13))
    canvas.text(WIDTH / 2, 8, plot.title, size * 1.25, ink, "ma", face)
    if plot.kind == "pie":
        _paint_pie(canvas, plot, ink, face, size, ring=bool(random.random() < 0.3))
        return (grainy(canvas.pixels(), random),)
    top = 8 + size * 2
    if len(plot.series) > 1:
        top = _legend(canvas, plot, ink, face, size, top)
    across = plot.kind == "barh"
    widest = max(text_width(name, size, face) for name in (plot.names if across else [str(plot.top)]))
    area = (16 + widest, top + 8, WIDTH - 20.0, HEIGHT - size * 2.2)
    _paint_axes(canvas, plot, area, ink, ground, face, size)
    if plot.kind == "line":
        _paint_lines(canvas, plot, area, ink, face, size)
    else:
        _paint_bars(canvas, plot, area, ink, face, size)
    return (grainy(canvas.pixels(), random),)


def _legend(canvas: Canvas, plot: Plot, ink: Paint, face: str, size: float, top: float) -> float:
    x = 24.0
    for name, colour in zip(plot.series, plot.colours, strict=True):
        canvas.rectangle((x, top + 2, x + size, top + 2 + size), COLOURS[colour])
        canvas.text(x + size + 5, top + 2 + size / 2, name, size, ink, "lm", face)
        x += size + 5 + text_width(name, size, face) + 18
    return top + size + 6


def _paint_axes(
    canvas: Canvas, plot: Plot, area: Sequence[float], ink: Paint, ground: Paint, face: str, size: float
) -> None:
    left, top, right, bottom = area
    faint = [round(0.8 * g + 0.2 * i) for g, i in zip(ground, ink, strict=True)]
    for value in range(0, plot.top + 1, plot.tick):
        share = value / plot.top
        if plot.kind == "barh":
            x = left + share * (right - left)
            canvas.line([(x, top), (x, bottom)], 1.0, faint)
            canvas.text(x, bottom + 5, str(value), size, ink, "ma", face)
        else:
            y = bottom - share * (bottom - top)
            canvas.line([(left, y), (right, y)], 1.0, faint)
            canvas.text(left - 5, y, str(value), size, ink, "rm", face)
    for n, name in enumerate(plot.names):
        if plot.kind == "barh":
            canvas.text(left - 5, top + (bottom - top) * (n + 0.5) / len(plot.names), name, size, ink, "rm", face)
        else:
            canvas.text(left + (right - left) * (n + 0.5) / len(plot.names), bottom + 5, name, size, ink, "ma", face)
    canvas.line([(left, top), (left, bottom), (right, bottom)], 1.2, ink)


def _paint_bars(canvas: Canvas, plot: Plot, area: Sequence[float], ink: Paint, face: str, size: float) -> None:
    left, top, right, bottom = area
    across = plot.kind == "barh"
    room = ((bottom - top) if across else (right - left)) / len(plot.names)
    thick = room * 0.7 / len(plot.series)
    for s, (colour, values) in enumerate(zip(plot.colours, plot.values, strict=True)):
        for n, value in enumerate(values):
            low = (top if across else left) + room * (n + 0.15) + thick * s
            share = value / plot.top
            if across:
                end = left + share * (right - left)
                canvas.rectangle((left, low, end, low + thick), COLOURS[colour])
            else:
                end = bottom - share * (bottom - top)
                canvas.rectangle((low, end, low + thick, bottom), COLOURS[colour])
            if plot.printed and across:
                canvas.text(end + 3, low + thick / 2, str(value), size, ink, "lm", face)
            elif plot.printed:
                canvas.text(low + thick / 2, end - 2, str(value), size, ink, "mb", face)


def _paint_lines(canvas: Canvas, plot: Plot, area: Sequence[float], ink: Paint, face: str, size: float) -> None:
    left, top, right, bottom = area
    for colour, values in zip(plot.colours, plot.values, strict=True):
        points = [
            (left + (right - left) * (n + 0.5) / len(values), bottom - value / plot.top * (bottom - top))
            for n, value in enumerate(values)
        ]
        canvas.line(points, 2.0, COLOURS[colour])
        for (x, y), value in zip(points, values, strict=True):
            canvas.disc(x, y, 3.5, COLOURS[colour])
            if plot.printed:
                canvas.text(x, y - 6, str(value), size, ink, "mb", face)


def _paint_pie(canvas: Canvas, plot: Plot, ink: Paint, face: str, size: float, ring: bool) -> None:
    x, y, radius = 126.0, HEIGHT / 2 + 14, 100.0
    edges = np.concatenate([[0.0], np.cumsum(plot.values[0])]) * 3.6 - 90
    for n, colour in enumerate(plot.colours):
        sweep = np.radians(np.linspace(edges[n], edges[n + 1], 60))
        rim = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in sweep]
        canvas.polygon([(x, y), *rim], COLOURS[colour], canvas.ground, 1.5)
    if ring:
        canvas.disc(x, y, radius * 0.45, canvas.ground)
    for n, (name, colour, share) in enumerate(zip(plot.names, plot.colours, plot.values[0], strict=True)):
        line = y + (n - (len(plot.names) - 1) / 2) * size * 2
        canvas.rectangle((252, line - 6, 264, line + 6), COLOURS[colour])
        canvas.text(270, line, f"{name}: {share}%" if plot.printed else name, size, ink, "lm", face)


def to_json(plot: Plot) -> str:
    """The plot in the little language, on a few lines."""
    head = {"type": plot.kind, "title": plot.title}
    if plot.kind == "pie":
        body: dict[str, object] = {"x": plot.names, "colours": plot.colours, "values": plot.values[0]}
    else:
        series = zip(plot.series, plot.colours, plot.values, strict=True)
        body = {"x": plot.names, "series": {n: {"colour": c, "values": v} for n, c, v in series}}
    return json.dumps(head | body)


def fields_of(said: Mapping[str, object]) -> dict[str, object]:
    """What a text of the language says, one entry a fact: kind, title, colour and number by series and name."""
    out: dict[str, object] = {"type": said.get("type"), "title": said.get("title")}
    names = [str(name)[:40] for name in _listed(said.get("x"))]
    out["x"] = tuple(names)
    if "series" not in said:
        out |= {("colour", n): c for n, c in zip(names, _listed(said.get("colours")), strict=False)}
        out |= {("value", n): v for n, v in zip(names, _listed(said.get("values")), strict=False)}
        return out
    series = said["series"]
    for name, one in list(series.items())[:20] if isinstance(series, Mapping) else ():
        if isinstance(one, Mapping):
            out["colour", name] = one.get("colour")
            out |= {("value", name, n): v for n, v in zip(names, _listed(one.get("values")), strict=False)}
    return out


def _listed(value: object) -> list[object]:
    return list(value)[:50] if isinstance(value, list) else []
