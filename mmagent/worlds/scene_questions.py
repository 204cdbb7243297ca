"""Questions about a drawn scene whose answers are colours and shapes: attributes, places and neighbours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmagent.worlds import grading
from mmagent.worlds.canvas import SHAPES, grounds, palette
from mmagent.worlds.examples import Idea, Seeded
from mmagent.worlds.things import Thing, draw_things, finished, places, regions

_SIZE = (252, 252)


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (Seeded("scenes/attribute", "vqa", 3, _attribute, grading.word),)


def _attribute(random: np.random.Generator, level: int) -> Idea | None:
    """0: the colour of a shape, or the shape of a colour; 1: of what stands farthest to a side; 2: of what stands
    nearest to another."""
    count = (4, 6, 8)[level]
    radii = [int(r) for r in random.integers(13, 25, size=count)]
    found = places(random, radii, _SIZE)
    if found is None:
        return None
    colours = palette(random, 6)
    things = [
        Thing(str(random.choice(SHAPES)), str(random.choice(colours)), x, y, r)
        for (x, y), r in zip(found, radii, strict=True)
    ]
    kinds = (_by_name, _by_place, _by_neighbour)[level](random, things)
    if not kinds:
        return None
    asked, thing = kinds[int(random.integers(len(kinds)))]
    what, answer = asked[0], thing.colour if asked[0] == "colour" else thing.shape
    choice = ", ".join(sorted({t.colour for t in things} | set(colours)) if what == "colour" else SHAPES)
    question = f"{asked[1]} Answer with one of: {choice}."

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        return finished(draw_things(things, _SIZE, *grounds(looks, dark=0.0)), looks)

    steps = f"It is the {thing.name}."
    return Idea(question, answer, things, paint, boxes=regions([thing]), reasoning=steps)


Asked = list[tuple[tuple[str, str], Thing]]


def _by_name(random: np.random.Generator, things: Sequence[Thing]) -> Asked:
    shapes, colours = Counter(t.shape for t in things), Counter(t.colour for t in things)
    out: Asked = [(("colour", f"What colour is the {t.shape}?"), t) for t in things if shapes[t.shape] == 1]
    return out + [(("shape", f"What shape is {t.colour}?"), t) for t in things if colours[t.colour] == 1]


def _by_place(random: np.random.Generator, things: Sequence[Thing]) -> Asked:
    out: Asked = []
    ways = {
        "farthest to the left": lambda t: t.x, "farthest to the right": lambda t: -t.x, "highest up": lambda t: t.y,
        "lowest down": lambda t: -t.y,
    }  # fmt: skip
    for words, key in ways.items():
        first, second = sorted(things, key=key)[:2]
        if abs(key(first) - key(second)) >= 12:
            out += [
                ((what, f"What {what} is the thing whose middle is {words}?"), first) for what in ("colour", "shape")
            ]
    return out


def _by_neighbour(random: np.random.Generator, things: Sequence[Thing]) -> Asked:
    out: Asked = []
    names = Counter(t.name for t in things)
    for thing in things:
        if names[thing.name] > 1:
            continue
        away = sorted((math.hypot(t.x - thing.x, t.y - thing.y), n) for n, t in enumerate(things) if t is not thing)
        if away[1][0] - away[0][0] >= 15:
            nearest = things[away[0][1]]
            out += [((w, f"What {w} is the thing nearest to the {thing.name}?"), nearest) for w in ("colour", "shape")]
    return out
