"""Paper for the drawn questions: shapes with smooth edges, text in fonts that every installation has, and colours.

Places are pixels of the finished picture, ``(x, y)`` with y downwards; fractions of a pixel count.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmagent.worlds.drawing import COLOURS, once

Points = Sequence[tuple[float, float]]
Paint = Sequence[int]
FINE = 2
"""Pixels drawn for one shown, either way."""
FACES = {
    "sans": "DejaVuSans.ttf",
    "bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "mono": "DejaVuSansMono.ttf",
    "times": "STIXGeneral.ttf",
}
"""Typefaces, in the files that matplotlib installs; beside them there is ``plain``, Pillow's own."""
PAPERS = ((255, 255, 255), (250, 250, 246), (246, 248, 252), (252, 246, 238), (240, 240, 240))
NIGHTS = ((28, 30, 38), (18, 26, 40), (36, 36, 36))
INKS = ("red", "green", "blue", "purple", "orange", "black")
"""Of :data:`~mmagent.worlds.drawing.COLOURS`, those that nobody confuses on light paper."""


@once
def face(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface at ``size`` pixels. Raises ``ValueError`` where matplotlib, which brings them, is missing."""
    if name == "plain":
        return ImageFont.load_default(size)
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"typeface {name!r}: matplotlib, which brings it, is not installed")
    path = Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / FACES[name]
    return ImageFont.truetype(str(path), size)


def text_width(words: str, size: float, name: str = "plain") -> float:
    """Pixels from the left to the right of one line of text."""
    return face(name, max(round(size * FINE), 4)).getlength(words) / FINE


class Canvas:
    """A picture in the making, ``height`` x ``width`` pixels of ``ground``."""

    def __init__(self, height: int, width: int, ground: Paint = (255, 255, 255)):
        self.height, self.width, self.ground = height, width, tuple(ground)
        self._picture = Image.new("RGB", (width * FINE, height * FINE), self.ground)
        self._pen = ImageDraw.Draw(self._picture)

    def pixels(self) -> np.ndarray:
        """``(height, width, 3)`` uint8."""
        return np.asarray(self._picture.reduce(FINE))

    def line(self, points: Points, thick: float, paint: Paint) -> None:
        self._pen.line([self._at(p) for p in points], tuple(paint), max(round(thick * FINE), 1), joint="curve")

    def dashes(self, points: Points, thick: float, paint: Paint, dash: float = 5.0) -> None:
        """A line of dashes as long as the gaps between them."""
        for (x1, y1), (x2, y2) in pairwise(points):
            length = math.hypot(x2 - x1, y2 - y1)
            for n in range(0, math.ceil(length / dash), 2):
                a, b = n * dash / length, min((n + 1) * dash / length, 1.0)
                ends = [(x1 + (x2 - x1) * t, y1 + (y2 - y1) * t) for t in (a, b)]
                self.line(ends, thick, paint)

    def polygon(self, points: Points, paint: Paint | None, outline: Paint | None = None, thick: float = 1.0) -> None:
        corners = [self._at(p) for p in points]
        if paint is not None:
            self._pen.polygon(corners, tuple(paint))
        if outline is not None:
            self._pen.line([*corners, *corners[:2]], tuple(outline), max(round(thick * FINE), 1), joint="curve")

    def rectangle(
        self, box: Sequence[float], paint: Paint | None, outline: Paint | None = None, thick: float = 1.0
    ) -> None:
        x1, y1, x2, y2 = box
        self.polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], paint, outline, thick)

    def disc(
        self, x: float, y: float, radius: float, paint: Paint | None, outline: Paint | None = None, thick: float = 1.0
    ) -> None:
        box = (*self._at((x - radius, y - radius)), *self._at((x + radius, y + radius)))
        width = 0 if outline is None else max(round(thick * FINE), 1)
        self._pen.ellipse(box, None if paint is None else tuple(paint), tuple(outline) if outline else None, width)

    def arc(self, x: float, y: float, radius: float, first: float, last: float, thick: float, paint: Paint) -> None:
        """From ``first`` to ``last`` degrees, clockwise from the right."""
        box = (*self._at((x - radius, y - radius)), *self._at((x + radius, y + radius)))
        self._pen.arc(box, first, last, tuple(paint), max(round(thick * FINE), 1))

    def text(
        self, x: float, y: float, words: str, size: float, paint: Paint, anchor: str = "la", name: str = "plain"
    ) -> tuple[float, float, float, float]:
        """One line, placed by Pillow's ``anchor``; returns the box around its ink."""
        letters = face(name, max(round(size * FINE), 4))
        self._pen.text(self._at((x, y)), words, tuple(paint), letters, anchor)
        box = self._pen.textbbox(self._at((x, y)), words, letters, anchor)
        return tuple(value / FINE for value in box)

    def paste(self, pixels: np.ndarray, x: int, y: int) -> None:
        """Put a finished picture with its corner at ``(x, y)``."""
        image = Image.fromarray(pixels).resize(
            (pixels.shape[1] * FINE, pixels.shape[0] * FINE), Image.Resampling.NEAREST
        )
        self._picture.paste(image, (x * FINE, y * FINE))

    def _at(self, point: tuple[float, float]) -> tuple[float, float]:
        return point[0] * FINE, point[1] * FINE


SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
PLURALS = {"cross": "crosses"}


def plural(noun: str) -> str:
    """Of one of :data:`SHAPES`, and of other regular nouns."""
    return PLURALS.get(noun, f"{noun}s")


def shape_points(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The outline of one of :data:`SHAPES` but the circle, within ``radius`` of its centre."""
    if shape == "star":
        spokes = [(radius * (1.0 if k % 2 == 0 else 0.42), k * math.pi / 5) for k in range(10)]
        return [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in spokes]
    unit = {
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0.0, -0.95), (0.92, 0.75), (-0.92, 0.75)],
        "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
        "cross": [
            (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
            (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
        ],
    }[shape]  # fmt: skip
    return [(x + radius * a, y + radius * b) for a, b in unit]


def draw_shape(
    canvas: Canvas, shape: str, x: float, y: float, radius: float, paint: Paint, outline: Paint | None = None
) -> None:
    """One of :data:`SHAPES`."""
    if shape == "circle":
        canvas.disc(x, y, radius * 0.9, paint, outline, 1.2)
    else:
        canvas.polygon(shape_points(shape, x, y, radius), paint, outline, 1.2)


def shape_box(shape: str, x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    """The box around what :func:`draw_shape` draws, in pixels."""
    if shape == "circle":
        return x - radius * 0.9, y - radius * 0.9, x + radius * 0.9, y + radius * 0.9
    xs, ys = zip(*shape_points(shape, x, y, radius), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def grounds(random: np.random.Generator, dark: float = 0.25) -> tuple[Paint, Paint]:
    """A ground and an ink that reads on it; dark grounds with probability ``dark``."""
    if random.random() < dark:
        return NIGHTS[int(random.integers(len(NIGHTS)))], (232, 232, 236)
    return PAPERS[int(random.integers(len(PAPERS)))], (34, 34, 40)


def palette(random: np.random.Generator, count: int, ground: Paint = (255, 255, 255)) -> list[str]:
    """``count`` different names of colours that stand out from ``ground``."""
    far = [
        name
        for name, paint in COLOURS.items()
        if name not in ("white", "black") and sum((a - b) ** 2 for a, b in zip(paint, ground, strict=True)) > 110**2
    ]
    return [far[int(n)] for n in random.permutation(len(far))[:count]]


def grainy(pixels: np.ndarray, random: np.random.Generator, share: float = 0.2) -> np.ndarray:
    """The picture, a ``share`` of them with a little noise, as cameras and compression leave it: of all it would be
    too many, as nothing costs a shard more bytes."""
    if random.random() >= share:
        return pixels
    noise = random.standard_normal(pixels.shape[:2], dtype=np.float32)[..., None] * float(random.uniform(0.5, 3.0))
    return np.clip(pixels + np.rint(noise).astype(np.int16), 0, 255).astype(np.uint8)
