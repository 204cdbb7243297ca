"""Counting shapes: all of them, those of an attribute, those that are none of it, and which there are more of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mmagent.worlds import grading
from mmagent.worlds.canvas import SHAPES, grounds, palette, plural
from mmagent.worlds.examples import Idea, Seeded
from mmagent.worlds.things import Thing, draw_things, finished, many, places, regions

_SIZES = ((168, 168), (196, 224), (252, 252), (280, 336))
_COUNTS = ((1, 6), (3, 10), (6, 15), (10, 22))
_RADII = ((14, 24), (12, 20), (11, 18), (10, 18))


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("counting/objects", "counting", len(_SIZES), _count, grading.number),
        Seeded("counting/compare", "counting", 3, _compare, grading.word),
    )


def _scene(random: np.random.Generator, level: int) -> list[Thing] | None:
    """Level 0 has one kind of thing, 1 one colour, 2 all of them, and in 3 they overlap by up to a third."""
    count = int(random.integers(*_COUNTS[level]))
    shapes = [SHAPES[int(n)] for n in random.permutation(len(SHAPES))[: (1, 3, 4, 5)[level]]]
    colours = palette(random, (1, 1, 3, 4)[level])
    if level == 3:  # two sizes that nobody confuses
        radii = [int(r) for r in random.choice((10, 19), count)]
    else:
        radii = [int(r) for r in random.integers(*_RADII[level], count)]
    found = places(random, radii, _SIZES[level], apart=0.68 if level == 3 else 1.15)
    if found is None:
        return None
    kinds = zip(random.integers(len(shapes), size=count), random.integers(len(colours), size=count), strict=True)
    return [
        Thing(shapes[int(s)], colours[int(c)], x, y, r)
        for (s, c), (x, y), r in zip(kinds, found, radii, strict=True)
    ]  # fmt: skip


def _painter(things: Sequence[Thing], size: tuple[int, int]) -> Callable[[np.random.Generator], Sequence[np.ndarray]]:
    def paint(random: np.random.Generator) -> Sequence[np.ndarray]:
        ground, ink = grounds(random, dark=0.0)
        return finished(draw_things(things, size, ground, ink), random)

    return paint


def _questions(random: np.random.Generator, things: Sequence[Thing], level: int) -> tuple[str, list[Thing]]:
    """What is asked for in words, and the things that are meant."""
    thing = things[int(random.integers(len(things)))]
    by_shape = [t for t in things if t.shape == thing.shape]
    by_colour = [t for t in things if t.colour == thing.colour]
    kinds: list[tuple[str, list[Thing]]] = [(f"{plural(thing.shape)} are there", by_shape)]
    if level >= 2:
        both = [t for t in by_shape if t.colour == thing.colour]
        kinds += [(f"{thing.colour} shapes are there", by_colour)]
        kinds += [(f"{thing.colour} {plural(thing.shape)} are there", both)] * 2
        kinds += [(f"shapes are not {thing.colour}", [t for t in things if t.colour != thing.colour])]
    if level >= 3:
        large = [t for t in things if t.radius > 14]
        kinds += [
            ("large shapes are there", large),
            ("small shapes are there", [t for t in things if t.radius <= 14]),
            (f"large {plural(thing.shape)} are there", [t for t in large if t.shape == thing.shape]),
        ]
    return kinds[int(random.integers(len(kinds)))]


def _count(random: np.random.Generator, level: int) -> Idea | None:
    things = _scene(random, level)
    if things is None:
        return None
    words, meant = _questions(random, things, level)
    listed = "; ".join(f"{n}: {thing.name}" for n, thing in enumerate(_in_rows(meant), start=1))
    reasoning = f"From top to bottom I find {listed}. That makes {len(meant)}." if meant else "I find none."
    return Idea(
        f"How many {words}? Answer with a number.", str(len(meant)), tuple(things), _painter(things, _SIZES[level]),
        boxes=regions(meant), reasoning=reasoning,
    )  # fmt: skip


def _in_rows(things: Sequence[Thing]) -> list[Thing]:
    return sorted(things, key=lambda thing: (thing.y, thing.x))


def _compare(random: np.random.Generator, level: int) -> Idea | None:
    things = _scene(random, level + 1)
    if things is None:
        return None
    by = "shape" if level == 0 or random.random() < 0.5 else "colour"
    counts = Counter(thing.shape if by == "shape" else thing.colour for thing in things)
    ranked = counts.most_common()
    if len(ranked) < 2 or ranked[0][1] == ranked[1][1]:
        return None
    said = ", ".join(many(kind if by == "shape" else f"{kind} shape", n) for kind, n in sorted(counts.items()))
    asked = "Which shape is there most of?" if by == "shape" else "Which colour do most of the shapes have?"
    return Idea(
        f"{asked} Answer with one word.", ranked[0][0], tuple(things), _painter(things, _SIZES[level + 1]),
        boxes=regions(things), reasoning=f"There are {said}.",
    )  # fmt: skip
