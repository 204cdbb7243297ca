"""Small things in large pictures, in the manner of V* (Wu and Xie 2023): what colour one has, where it lies from
another, what is written beside it. Seen small, a picture does not tell; whoever looks closer at the right place can.

These worlds are not among :func:`mmagent.worlds.catalogue.all_worlds`: their pictures have up to 3,500 visual tokens,
more than a pack of small presets holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmagent.worlds import grading
from mmagent.worlds.canvas import SHAPES, Canvas, grounds, palette
from mmagent.worlds.examples import Idea, Seeded
from mmagent.worlds.things import Thing, draw_things, finished, places

SIZES = ((480, 640), (960, 1280), (1440, 1920))
"""Height and width of a level's pictures."""
_CROWD = (24, 40, 60)
_SMALL = (7, 9, 11)
"""Radius of what is asked about, in pixels; its neighbours have three to six times as much."""
_ROOM = 4.0
"""Small things keep a place of so many radii around them, for a sign and for the sight of them."""
LETTERS = "ACEFHKLMNPRTUXY"
SIGN = 11
"""Height of the writing on a sign in pixels."""


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("search/attribute", "search", len(SIZES), _attribute, grading.word),
        Seeded("search/position", "search", len(SIZES), _position, grading.word),
        Seeded("search/read", "search", len(SIZES), _read, grading.word),
    )


def _scene(random: np.random.Generator, level: int, small: int) -> tuple[list[Thing], list[Thing]] | None:
    """``small`` small things, each the only one of its shape, and a crowd of large ones of other shapes."""
    shapes = [SHAPES[int(n)] for n in random.permutation(len(SHAPES))]
    colours = palette(random, 4)
    radius = _SMALL[level]
    large = [int(r) for r in random.integers(3 * radius, 6 * radius, _CROWD[level])]
    found = places(random, [round(_ROOM * radius)] * small + large, SIZES[level], apart=1.02)
    if found is None:
        return None
    things = [
        Thing(shapes[n], colours[int(random.integers(4))], x, y, radius) for n, (x, y) in enumerate(found[:small])
    ]
    crowd = [
        Thing(shapes[small + int(random.integers(len(SHAPES) - small))], colours[int(random.integers(4))], x, y, r)
        for (x, y), r in zip(found[small:], large, strict=True)
    ]
    return things, crowd


def _idea(
    question: str, answer: str, scene: tuple[list[Thing], list[Thing]], meant: Sequence[Thing], level: int,
    signs: Sequence[str] = (),
) -> Idea:  # fmt: skip
    things, crowd = scene

    def paint(random: np.random.Generator) -> Sequence[np.ndarray]:
        ground, ink = grounds(random, dark=0.0)
        canvas = draw_things([*crowd, *things], SIZES[level], ground, ink)
        for thing, words in zip(things, signs, strict=False):
            _hang(canvas, thing, words)
        return finished(canvas, random)

    boxes = tuple(replace(thing.region, coordinates=_around(thing, bool(signs))) for thing in meant)
    return Idea(question, answer, (things, crowd, tuple(signs)), paint, boxes=boxes)


def _around(thing: Thing, signed: bool) -> tuple[float, float, float, float]:
    """Where everything is that the question about ``thing`` needs."""
    x1, y1, x2, y2 = thing.box
    if signed:
        x1, x2, y2 = min(x1, thing.x - 2.2 * SIGN), max(x2, thing.x + 2.2 * SIGN), y2 + 2.2 * SIGN
    return x1, y1, x2, y2


def _hang(canvas: Canvas, thing: Thing, words: str) -> None:
    """A white sign with ``words`` under ``thing``."""
    x, y = thing.x, thing.box[3] + 2 + 0.6 * SIGN
    width, height = 2.0 * SIGN, 0.75 * SIGN
    corners = [(x - width, y - height), (x + width, y - height), (x + width, y + height), (x - width, y + height)]
    canvas.polygon(corners, (255, 255, 255), (40, 40, 40), 1.0)
    canvas.text(x, y, words, SIGN, (20, 20, 20), "mm")


def _attribute(random: np.random.Generator, level: int) -> Idea | None:
    scene = _scene(random, level, 1)
    if scene is None:
        return None
    (thing,), crowd = scene
    colours = sorted({thing.colour, *(other.colour for other in crowd)})
    if len(colours) < 4:
        return None
    question = f"What colour is the only {thing.shape}? Answer with one of {', '.join(colours)}."
    return _idea(question, thing.colour, scene, (thing,), level)


def _position(random: np.random.Generator, level: int) -> Idea | None:
    scene = _scene(random, level, 2)
    if scene is None:
        return None
    one, other = scene[0]
    least = 0.08 * SIZES[level][0]
    if abs(one.x - other.x) < least or abs(one.y - other.y) < least:
        return None
    answer = f"{'upper' if one.y < other.y else 'lower'} {'left' if one.x < other.x else 'right'}"
    question = (
        f"Seen from the only {other.shape}, where is the only {one.shape}? Answer with one of upper left, upper right, "
        "lower left, lower right."
    )
    return _idea(question, answer, scene, (one, other), level)


def _read(random: np.random.Generator, level: int) -> Idea | None:
    scene = _scene(random, level, 3)
    if scene is None:
        return None
    signs = ["".join(LETTERS[int(n)] for n in random.integers(len(LETTERS), size=4)) for _ in scene[0]]
    if len(set(signs)) < len(signs):
        return None
    question = f"What is written on the sign under the only {scene[0][0].shape}? Answer with its four letters."
    return _idea(question, signs[0], scene, scene[0][:1], level, signs)
