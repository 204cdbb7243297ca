"""Puzzles over pictures: pieces to be put into order, and what differs between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmagent.chat import Image, Text
from mmagent.records import Region
from mmagent.worlds import grading
from mmagent.worlds.canvas import SHAPES, Canvas, draw_shape, grainy, grounds, palette
from mmagent.worlds.drawing import COLOURS, article
from mmagent.worlds.examples import Idea, Seeded
from mmagent.worlds.things import Thing, box_text, draw_things, frame_box, places

_SIZE = (196, 196)
_TINTS = ((230, 120, 110), (120, 170, 230), (240, 210, 120), (130, 200, 140), (190, 140, 210), (245, 245, 240))


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("puzzles/jigsaw", "spatial-relation", 3, _jigsaw, grading.items),
        Seeded("puzzles/difference", "spot-the-difference", 3, _difference, grading.box),
        Seeded("puzzles/differences", "spot-the-difference", 3, _differences, grading.number),
        Seeded("puzzles/missing", "multi-image-comparison", 3, _missing, grading.word),
    )


def _things(random: np.random.Generator, count: int, radii: tuple[int, int] = (12, 19)) -> list[Thing] | None:
    sizes = [int(r) for r in random.integers(*radii, count)]
    found = places(random, sizes, _SIZE, 1.2)
    if found is None:
        return None
    names = palette(random, 6)
    shapes, colours = random.integers(len(SHAPES), size=count), random.integers(len(names), size=count)
    return [
        Thing(SHAPES[int(s)], names[int(c)], x, y, r)
        for s, c, (x, y), r in zip(shapes, colours, found, sizes, strict=True)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- jigsaws


def _jigsaw(random: np.random.Generator, level: int) -> Idea | None:
    """A picture whose four corners have tints of their own, with shapes across its cuts, in rows of pieces."""
    rows, cols = ((1, 3), (2, 2), (2, 3))[level]
    tints = tuple(int(n) for n in random.permutation(len(_TINTS))[:4])
    things = _things(random, 5 + level, (14, 25))
    if things is None:
        return None
    across = [t for t in things if _crosses(t.x, t.radius, cols) or _crosses(t.y, t.radius, rows)]
    if len(across) < 2 + level:
        return None
    order = [
        int(n) for n in random.permutation(rows * cols)
    ]  # the piece that stands at each place of the mixed picture
    if order == sorted(order):
        return None
    letters = "ABCDEF"[: rows * cols]

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        return (_draw_pieces(_tinted(things, tints), rows, cols, order, looks),)

    question = (
        f"The picture was cut into {rows * cols} pieces, {rows} row{'s' if rows > 1 else ''} of {cols}, and mixed. "
        "Which letters lie where in the whole? Answer from the top left, row by row, with commas between."
    )
    answer = ", ".join(letters[order.index(piece)] for piece in range(rows * cols))
    return Idea(question, answer, (tuple(things), tints, tuple(order), rows), paint)


def _crosses(middle: int, radius: int, pieces: int) -> bool:
    cuts = [_SIZE[0] * n / pieces for n in range(1, pieces)]
    return any(abs(middle - cut) < 0.6 * radius for cut in cuts)


def _tinted(things: Sequence[Thing], tints: Sequence[int]) -> np.ndarray:
    """The whole picture."""
    corners = np.array([_TINTS[n] for n in tints], dtype=np.float32).reshape(2, 2, 3)
    down, across = (np.linspace(0, 1, side, dtype=np.float32) for side in _SIZE)
    top = corners[0, 0] + across[:, None] * (corners[0, 1] - corners[0, 0])
    bottom = corners[1, 0] + across[:, None] * (corners[1, 1] - corners[1, 0])
    sheet = np.rint(top[None] + down[:, None, None] * (bottom - top)[None]).astype(np.uint8)
    canvas = Canvas(*_SIZE)
    canvas.paste(sheet, 0, 0)
    for thing in things:
        draw_shape(canvas, thing.shape, thing.x, thing.y, thing.radius, COLOURS[thing.colour], (30, 30, 30))
    return canvas.pixels()


def _draw_pieces(
    whole: np.ndarray, rows: int, cols: int, order: Sequence[int], random: np.random.Generator
) -> np.ndarray:
    tall, wide, gap, head = _SIZE[0] // rows, _SIZE[1] // cols, 10, 18
    ground, ink = grounds(random)
    canvas = Canvas(rows * (tall + gap + head) + gap, cols * (wide + gap) + gap, ground)
    for place, piece in enumerate(order):
        x, y = gap + place % cols * (wide + gap), gap + place // cols * (tall + gap + head)
        top, left = piece // cols * tall, piece % cols * wide
        canvas.text(x + wide / 2, y, "ABCDEF"[place], 14, ink, "ma", "bold")
        canvas.paste(whole[top : top + tall, left : left + wide], x, y + head)
    return grainy(canvas.pixels(), random)


# ---------------------------------------------------------------------------------------------- differences


_COUNTS = (4, 7, 11)


def _changed(random: np.random.Generator, thing: Thing) -> Thing:
    """Of another colour or another shape."""
    if random.random() < 0.5:
        others = [name for name in palette(random, 6) if name != thing.colour]
        return replace(thing, colour=others[0])
    others = [shape for shape in SHAPES if shape != thing.shape]
    return replace(thing, shape=others[int(random.integers(len(others)))])


def _two(random: np.random.Generator, one: Sequence[Thing], other: Sequence[Thing]) -> tuple[np.ndarray, ...]:
    ground, ink = grounds(random, dark=0.0)
    return tuple(grainy(draw_things(things, _SIZE, ground, ink).pixels(), random, 0.0) for things in (one, other))


_HEAD = (Text("Picture 1:\n"), Image(), Text("\nPicture 2:\n"), Image())


def _difference(random: np.random.Generator, level: int) -> Idea | None:
    things = _things(random, _COUNTS[level])
    if things is None:
        return None
    n = int(random.integers(len(things)))
    other = [_changed(random, t) if k == n else t for k, t in enumerate(things)]
    question = (
        "\nOne shape differs between the pictures. Give its box in picture 2 as x1,y1,x2,y2, in thousandths of the "
        "picture's width and height (0 to 999)."
    )
    box = frame_box(other[n].box, _SIZE)
    region = Region(1, other[n].box, f"was {things[n].name}, is {other[n].name}")
    facts = (tuple(things), tuple(other))
    reasoning = f"What is {article(things[n].name)} in picture 1 is {article(other[n].name)} in picture 2."
    return Idea(
        (*_HEAD, Text(question)), box_text(box), facts, lambda looks: _two(looks, things, other),
        boxes=(region,), reasoning=reasoning,
    )  # fmt: skip


def _differences(random: np.random.Generator, level: int) -> Idea | None:
    things = _things(random, _COUNTS[level])
    if things is None:
        return None
    count = int(random.integers(0, (3, 4, 6)[level]))
    chosen = {int(n) for n in random.permutation(len(things))[:count]}
    other = [_changed(random, t) if k in chosen else t for k, t in enumerate(things)]
    question = "\nHow many shapes differ between the pictures, in colour or in shape? Answer with a number."
    told = [f"{things[k].name} and {other[k].name}" for k in sorted(chosen)]
    boxes = tuple(Region(1, other[k].box, other[k].name) for k in sorted(chosen))
    return Idea(
        (*_HEAD, Text(question)), str(count), (tuple(things), tuple(other)), lambda looks: _two(looks, things, other),
        boxes=boxes, reasoning=f"In one place after another: {'; '.join(told) or 'nothing'}.",
    )  # fmt: skip


def _missing(random: np.random.Generator, level: int) -> Idea | None:
    """All shapes are there again but one, at other places."""
    things = _things(random, _COUNTS[level])
    if things is None:
        return None
    kinds = [(shape, colour) for shape in SHAPES for colour in palette(random, 6)]
    unlike = (kinds[int(n)] for n in random.permutation(len(kinds)))
    things = [replace(thing, shape=s, colour=c) for thing, (s, c) in zip(things, unlike, strict=False)]
    n = int(random.integers(len(things)))
    rest = [thing for k, thing in enumerate(things) if k != n]
    if level:  # moved about
        found = places(random, [thing.radius for thing in rest], _SIZE, 1.2)
        if found is None:
            return None
        rest = [replace(thing, x=x, y=y) for thing, (x, y) in zip(rest, found, strict=True)]
    where = " Their places have changed." if level else ""
    question = (
        f"\nWhich shape of picture 1 is missing in picture 2?{where} Answer with colour and shape, like red circle."
    )
    facts = (tuple(things), tuple(rest))
    region = Region(0, things[n].box, things[n].name)
    return Idea(
        (*_HEAD, Text(question)), things[n].name, facts, lambda looks: _two(looks, things, rest), boxes=(region,)
    )  # fmt: skip
