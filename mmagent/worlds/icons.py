"""Seeded icons: the symbols that screens are full of, in any colour, size and style, on a ground, a disc or a tile.

They are drawn here, stroke by stroke, so that no font has to be installed and one symbol comes both filled and in
outline. A picture is a function of ``(split, seed)`` alone, and no two splits share one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mmagent.worlds.drawing import COLOURS, article, far_apart, generator, random_size

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Icon:
    """``image (h, w, 3)`` uint8, its ``caption``, the number of its ``icon`` in :data:`ICONS` and of its ``colour`` in
    :data:`COLOURS`, and ``inside (h, w)`` bool: the pixels of the symbol."""

    image: np.ndarray
    caption: str
    icon: int
    colour: int
    inside: np.ndarray


@dataclass(frozen=True)
class _Stroke:
    """``points`` in [-1, 1], y downwards. ``use``: a ``line``, an ``area`` (filled or in outline, as the style is), a
    ``solid`` that is always filled; a ``hole`` is an area and a ``groove`` a line that is cut out of what is filled,
    and drawn like any other where the style is outline."""

    use: str
    points: Points


def _line(*points: tuple[float, float]) -> _Stroke:
    return _Stroke("line", points)


def _groove(*points: tuple[float, float]) -> _Stroke:
    return _Stroke("groove", points)


def _area(*points: tuple[float, float]) -> _Stroke:
    return _Stroke("area", points)


def _bow(x: float, y: float, radius: float, first: float = 0.0, last: float = 360.0, tall: float = 1.0) -> Points:
    """Points of an arc, in degrees, clockwise from the right."""
    angles = np.linspace(math.radians(first), math.radians(last), 25)
    return [(x + radius * math.cos(a), y + tall * radius * math.sin(a)) for a in angles]


def _disc(x: float, y: float, radius: float, use: str = "area") -> _Stroke:
    return _Stroke(use, _bow(x, y, radius))


def _arc(x: float, y: float, radius: float, first: float, last: float) -> _Stroke:
    return _Stroke("line", _bow(x, y, radius, first, last))


def _box(left: float, top: float, right: float, bottom: float, use: str = "area") -> _Stroke:
    return _Stroke(use, [(left, top), (right, top), (right, bottom), (left, bottom)])


def _spiked(spikes: int, outer: float, inner: float, flat: float = 0.0) -> list[tuple[float, float]]:
    """A star; ``flat`` (radians) makes its tips teeth."""
    points = []
    for k in range(2 * spikes):
        angle, radius = k * math.pi / spikes - math.pi / 2, outer if k % 2 == 0 else inner
        around = (angle - flat, angle + flat) if flat else (angle,)
        points += [(radius * math.cos(a), radius * math.sin(a)) for a in around]
    return points


_HEART = [
    (1.0 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5)
    for t in np.linspace(0, 2 * math.pi, 40, endpoint=False)
]
_DROP = [(0.0, -1.0), *_bow(0, 0.3, 0.65, -30, 210)]
_MOON = [*_bow(0, 0, 0.9, 7.5, 262.5), *_bow(0.32, -0.32, 0.72, -127.3, -322.7)]  # two circles that meet there
_CLOUD = [*_bow(-0.5, 0.25, 0.4, 90, 250), *_bow(-0.05, -0.1, 0.5, 200, 340), *_bow(0.55, 0.25, 0.4, -70, 90)]
_BELL = [(-0.8, 0.5), *_bow(0, -0.25, 0.55, 180, 360), (0.8, 0.5)]
_SHIELD = [(0, -0.95), (0.8, -0.65), (0.75, 0.1), (0.45, 0.6), (0, 0.95), (-0.45, 0.6), (-0.75, 0.1), (-0.8, -0.65)]
_PIN = [(0.0, 0.95), *_bow(0, -0.3, 0.62, 150, 390)]
_HOUSE = [(-0.65, 0.85), (-0.65, -0.05), (-0.95, -0.05), (0, -0.9), (0.95, -0.05), (0.65, -0.05), (0.65, 0.85)]
_BOLT = [(0.2, -1.0), (-0.6, 0.15), (-0.05, 0.15), (-0.25, 1.0), (0.6, -0.25), (0.05, -0.25)]
_TAG = [(-0.9, -0.9), (0.0, -0.9), (0.9, 0.05), (0.05, 0.9), (-0.9, 0.0)]
_PAGE = [(-0.65, -0.95), (0.25, -0.95), (0.65, -0.5), (0.65, 0.95), (-0.65, 0.95)]
_FOLDER = [(-0.95, -0.65), (-0.25, -0.65), (0.0, -0.4), (0.95, -0.4), (0.95, 0.7), (-0.95, 0.7)]
_SPEAKER = [(-0.9, -0.3), (-0.5, -0.3), (0.0, -0.75), (0.0, 0.75), (-0.5, 0.3), (-0.9, 0.3)]
_BULB = [(-0.3, 0.5), *_bow(0, -0.3, 0.65, 120, 420), (0.3, 0.5)]
_UMBRELLA = _bow(0, 0, 0.95, 180, 360)
_RAYS = [_line((0.65 * x, 0.65 * y), (0.95 * x, 0.95 * y)) for x, y in _bow(0, 0, 1)[:-1:3]]

ICONS: dict[str, tuple[_Stroke, ...]] = {
    "arrow up": (_line((0, 0.9), (0, -0.85)), _line((-0.6, -0.25), (0, -0.85), (0.6, -0.25))),
    "arrow down": (_line((0, -0.9), (0, 0.85)), _line((-0.6, 0.25), (0, 0.85), (0.6, 0.25))),
    "arrow left": (_line((0.9, 0), (-0.85, 0)), _line((-0.25, -0.6), (-0.85, 0), (-0.25, 0.6))),
    "arrow right": (_line((-0.9, 0), (0.85, 0)), _line((0.25, -0.6), (0.85, 0), (0.25, 0.6))),
    "battery": (
        _box(-0.95, -0.45, 0.75, 0.45), _box(0.75, -0.2, 0.97, 0.2, "solid"), _box(-0.7, -0.2, 0.1, 0.2, "hole"),
    ),
    "bell": (_area(*_BELL), _disc(0, 0.75, 0.2, "solid"), _line((0, -0.95), (0, -0.75))),
    "bin": (
        _area((-0.65, -0.4), (0.65, -0.4), (0.5, 0.95), (-0.5, 0.95)), _line((-0.85, -0.6), (0.85, -0.6)),
        _line((-0.25, -0.85), (0.25, -0.85)),
    ),
    "bolt": (_area(*_BOLT),),
    "bulb": (_area(*_BULB), _line((-0.28, 0.72), (0.28, 0.72)), _line((-0.15, 0.93), (0.15, 0.93))),
    "camera": (
        _box(-0.95, -0.45, 0.95, 0.75), _box(-0.35, -0.72, 0.35, -0.45, "solid"), _disc(0, 0.15, 0.36, "hole"),
    ),
    "cart": (
        _line((-0.95, -0.75), (-0.65, -0.75), (-0.35, 0.35), (0.7, 0.35)),
        _area((-0.55, -0.45), (0.9, -0.45), (0.7, 0.15), (-0.4, 0.15)), _disc(-0.2, 0.72, 0.17, "solid"),
        _disc(0.55, 0.72, 0.17, "solid"),
    ),
    "chart": (_box(-0.85, 0.1, -0.4, 0.85), _box(-0.22, -0.4, 0.22, 0.85), _box(0.4, -0.85, 0.85, 0.85)),
    "clock": (_disc(0, 0, 0.9), _groove((0, -0.55), (0, 0), (0.4, 0.2))),
    "cloud": (_area(*_CLOUD),),
    "cross": (_line((-0.75, -0.75), (0.75, 0.75)), _line((0.75, -0.75), (-0.75, 0.75))),
    "download": (
        _line((0, -0.95), (0, 0.3)), _line((-0.45, -0.15), (0, 0.3), (0.45, -0.15)),
        _line((-0.85, 0.4), (-0.85, 0.85), (0.85, 0.85), (0.85, 0.4)),
    ),
    "drop": (_area(*_DROP),),
    "envelope": (_box(-0.95, -0.65, 0.95, 0.65), _groove((-0.95, -0.65), (0, 0.15), (0.95, -0.65))),
    "eye": (_area(*_bow(0, 0.55, 1.1, 210, 330), *_bow(0, -0.55, 1.1, 30, 150)), _disc(0, 0, 0.3, "hole")),
    "flag": (
        _line((-0.7, -0.95), (-0.7, 0.95)),
        _area((-0.7, -0.85), (0.85, -0.85), (0.5, -0.4), (0.85, 0.05), (-0.7, 0.05)),
    ),
    "folder": (_area(*_FOLDER),),
    "gear": (_area(*_spiked(8, 0.95, 0.68, 0.16)), _disc(0, 0, 0.3, "hole")),
    "heart": (_area(*_HEART),),
    "house": (_area(*_HOUSE), _box(-0.2, 0.3, 0.2, 0.85, "hole")),
    "key": (
        _disc(-0.5, 0, 0.42), _disc(-0.5, 0, 0.14, "hole"), _line((-0.08, 0), (0.9, 0), (0.9, 0.35)),
        _line((0.5, 0), (0.5, 0.3)),
    ),
    "lock": (
        _box(-0.65, -0.1, 0.65, 0.9), _arc(0, -0.3, 0.42, 180, 360), _line((-0.42, -0.3), (-0.42, -0.1)),
        _line((0.42, -0.3), (0.42, -0.1)), _disc(0, 0.4, 0.14, "hole"),
    ),
    "magnifier": (_arc(-0.2, -0.2, 0.62, 0, 360), _line((0.28, 0.28), (0.9, 0.9))),
    "menu": (_line((-0.85, -0.6), (0.85, -0.6)), _line((-0.85, 0), (0.85, 0)), _line((-0.85, 0.6), (0.85, 0.6))),
    "minus": (_line((-0.85, 0), (0.85, 0)),),
    "moon": (_area(*_MOON),),
    "note": (
        _disc(-0.5, 0.65, 0.3), _disc(0.5, 0.5, 0.3), _line((-0.22, 0.65), (-0.22, -0.7), (0.78, -0.85), (0.78, 0.5)),
    ),
    "page": (_area(*_PAGE), *(_groove((-0.3, y), (0.3, y)) for y in (-0.15, 0.2, 0.55))),
    "pause": (_box(-0.65, -0.8, -0.18, 0.8), _box(0.18, -0.8, 0.65, 0.8)),
    "pencil": (
        _area((-0.9, 0.9), (-0.75, 0.35), (0.5, -0.9), (0.9, -0.5), (-0.35, 0.75)), _groove((0.2, -0.6), (0.6, -0.2)),
    ),
    "person": (_disc(0, -0.45, 0.42), _area(*_bow(0, 0.95, 0.85, 180, 360))),
    "pin": (_area(*_PIN), _disc(0, -0.3, 0.22, "hole")),
    "play": (_area((-0.6, -0.85), (0.85, 0), (-0.6, 0.85)),),
    "plus": (_line((-0.85, 0), (0.85, 0)), _line((0, -0.85), (0, 0.85))),
    "power": (_arc(0, 0.05, 0.75, -50, 230), _line((0, -0.95), (0, 0))),
    "shield": (_area(*_SHIELD),),
    "speaker": (_area(*_SPEAKER), _arc(0.05, 0, 0.45, -50, 50), _arc(0.05, 0, 0.85, -50, 50)),
    "star": (_area(*_spiked(5, 1.0, 0.42)),),
    "sun": (_disc(0, 0, 0.42), *_RAYS),
    "tag": (_area(*_TAG), _disc(-0.5, -0.5, 0.17, "hole")),
    "tick": (_line((-0.85, 0.1), (-0.25, 0.65), (0.85, -0.6)),),
    "umbrella": (_area(*_UMBRELLA), _line((0, -0.95), (0, 0.7), *_bow(0.2, 0.7, 0.2, 180, 0))),
    "wifi": (*(_arc(0, 0.7, r, 225, 315) for r in (0.55, 1.0, 1.45)), _disc(0, 0.7, 0.15, "solid")),
}  # fmt: skip
"""Every symbol with its strokes."""

_GROUNDS = ("ground", "disc", "tile")
_FINE = 3  # pixels drawn for one shown, either way


LEVELS = 2


def draw_icon(seed: int, split: str = "train", size: tuple[int, int] | None = None, level: int | None = None) -> Icon:
    """One icon. ``size`` is ``(height, width)`` pixels. ``level`` 0 shows it large and upright in the middle of a plain
    ground, 1 at any place, turned by up to a sixth of a right angle, maybe on a disc or a tile; None draws the level,
    too. Raises ``ValueError`` for others."""
    random = generator("icon", seed, split)
    drawn = int(random.integers(LEVELS))
    if level is not None and not 0 <= level < LEVELS:
        raise ValueError(f"icons have levels 0 to {LEVELS - 1}, not {level}")
    easy = (drawn if level is None else level) == 0
    height, width = size or random_size(random)
    icon = int(random.integers(len(ICONS)))
    name, colours = list(ICONS)[icon], list(COLOURS)
    colour = int(random.integers(len(colours)))
    grounds = [other for other in colours if far_apart(other, colours[colour])]
    tint = grounds[int(random.integers(len(grounds)))]
    under = "ground" if easy else _GROUNDS[int(random.integers(len(_GROUNDS)))]
    around = [other for other in colours if far_apart(other, tint)]
    behind = tint if under == "ground" else around[int(random.integers(len(around)))]
    radius = float(random.uniform(0.3 if easy else 0.2, 0.35)) * min(height, width)
    reach = 1.4 * radius  # the farthest corner of a symbol, half a stroke included
    outline, thick = bool(random.integers(2)), float(random.uniform(0.16, 0.28)) * radius
    if easy:
        centre, turn = [height / 2, width / 2], 0.0
    else:
        centre = [float(random.uniform(reach, side - reach)) for side in (height, width)]
        turn = float(random.uniform(-1, 1)) * math.pi / 12
    image = np.empty((height, width, 3), dtype=np.float32)
    image[:] = COLOURS[behind]
    if under != "ground":
        _paint(image, _backing(under, centre, reach * (0.9 if under == "tile" else 1.0), height, width), COLOURS[tint])
    share = _symbol(ICONS[name], centre, radius, turn, thick, outline, height, width)
    _paint(image, share, COLOURS[colours[colour]])
    image += random.normal(0.0, float(random.uniform(0.5, 5.0)), (height, width, 1)).astype(np.float32)
    place = f"{article(tint)} {under}" + (f" before {behind}" if under != "ground" else "")
    caption = f"{article(f'{colours[colour]} {name}')} icon on {place}"
    return Icon(np.clip(image, 0, 255).astype(np.uint8), caption, icon, colour, share > 0.5)


def _paint(image: np.ndarray, share: np.ndarray, colour: Sequence[int]) -> None:
    """Lay ``colour`` over ``image (h, w, 3)``, as much as ``share (h, w)`` in [0, 1] says."""
    image += share[..., None] * (np.asarray(colour, np.float32) - image)


def _backing(under: str, centre: Sequence[float], reach: float, height: int, width: int) -> np.ndarray:
    canvas = Image.new("L", (width * _FINE, height * _FINE))
    y, x = (c * _FINE for c in centre)
    box, draw = (x - reach * _FINE, y - reach * _FINE, x + reach * _FINE, y + reach * _FINE), ImageDraw.Draw(canvas)
    if under == "disc":
        draw.ellipse(box, fill=255)
    else:
        draw.rounded_rectangle(box, reach * _FINE * 0.3, fill=255)
    return np.asarray(canvas.reduce(_FINE), dtype=np.float32) / 255


def _symbol(
    strokes: Sequence[_Stroke], centre: Sequence[float], radius: float, turn: float, thick: float, outline: bool,
    height: int, width: int,
) -> np.ndarray:  # fmt: skip
    """``(height, width)`` float32 in [0, 1]: how much of every pixel the strokes cover."""
    canvas = Image.new("L", (width * _FINE, height * _FINE))
    draw = ImageDraw.Draw(canvas)
    cos, sin = math.cos(turn), math.sin(turn)
    turned = np.array([[cos, sin], [-sin, cos]]) * radius * _FINE
    wide = max(thick * _FINE, _FINE)
    for stroke in strokes:
        points = np.asarray(stroke.points, dtype=np.float64) @ turned + np.array([centre[1], centre[0]]) * _FINE
        corners = [(float(x), float(y)) for x, y in points]
        ink = 0 if stroke.use in ("hole", "groove") and not outline else 255
        if stroke.use == "solid" or (stroke.use in ("area", "hole") and not outline):
            draw.polygon(corners, fill=ink)
        else:
            _pen(draw, corners if stroke.use in ("line", "groove") else [*corners, corners[0]], wide, ink)
    return np.asarray(canvas.reduce(_FINE), dtype=np.float32) / 255


def _pen(draw: ImageDraw.ImageDraw, points: Points, wide: float, ink: int) -> None:
    """A line with round ends."""
    draw.line(points, fill=ink, width=round(wide), joint="curve")
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), fill=ink)
