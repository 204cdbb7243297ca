"""Where things are: beside and before one another, in which order, in which box, and which way leads there."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from mmagent.geometry import ImageView
from mmagent.records import Region
from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import SHAPES, Canvas, draw_shape, grainy, grounds, palette
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.things import Thing, box_text, draw_things, finished, frame_box, places, regions

_SIZES = ((168, 168), (224, 224), (252, 308))
_COUNTS = (3, 5, 8)
_DISC, _STEP = 36, 40  # of the chains of discs: their radius, and the way from one to the next
_ARROW = 30  # pixels from tail to tip
_CLEAR = (40, 22, 10)  # degrees that an arrow of each level points past everything else
Cell = tuple[int, int]
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("spatial/relation", "spatial-relation", 3, _relation, grading.word),
        Seeded("spatial/order", "spatial-relation", 3, _order, grading.items),
        Seeded("spatial/depth", "spatial-relation", 3, _depth, grading.word),
        Seeded("spatial/box", "box-grounding", 3, _box, grading.box),
        Seeded("spatial/point", "pointing", 3, _point, grading.point),
        Seeded("spatial/path", "spatial-relation", 3, _path, judge_path),
        Seeded("spatial/direction", "spatial-relation", 3, _direction, grading.word),
    )


def scene(random: np.random.Generator, level: int, apart: float = 1.2) -> list[Thing] | None:
    """Things that no two are alike of, in colour and shape together."""
    count, size = _COUNTS[level], _SIZES[level]
    kinds = [(shape, colour) for shape in SHAPES for colour in palette(random, 5)]
    chosen = [kinds[int(n)] for n in random.permutation(len(kinds))[:count]]
    radii = [int(r) for r in random.integers(12, 20, count)]
    found = places(random, radii, size, apart)
    if found is None:
        return None
    return [Thing(s, c, x, y, r) for (s, c), (x, y), r in zip(chosen, found, radii, strict=True)]


def _painter(things: Sequence[Thing], size: tuple[int, int]) -> Callable[[np.random.Generator], Sequence[np.ndarray]]:
    def paint(random: np.random.Generator) -> Sequence[np.ndarray]:
        ground, ink = grounds(random, dark=0.0)
        return finished(draw_things(things, size, ground, ink), random)

    return paint


def _asked(things: Sequence[Thing], level: int, question: str, answer: str, reasoning: str = "") -> Idea:
    paint = _painter(things, _SIZES[level])
    return Idea(question, answer, tuple(things), paint, boxes=regions(things), reasoning=reasoning)


def _relation(random: np.random.Generator, level: int) -> Idea | None:
    """Whether something is beside another, what is, and what is nearest; where it is close, it is not asked."""
    things = scene(random, level)
    if things is None:
        return None
    one, other = (things[int(n)] for n in random.permutation(len(things))[:2])
    side, sign, along = [("left of", -1, 0), ("right of", 1, 0), ("above", -1, 1), ("below", 1, 1)][
        int(random.integers(4))
    ]
    gap = sign * ((one.x - other.x) if along == 0 else (one.y - other.y))
    if abs(gap) < 1.2 * (one.radius + other.radius) / 2:
        return None
    kind = int(random.integers(2 if level else 1))
    if kind == 0:
        question = f"Is the {one.name} {side} the {other.name}? Answer yes or no."
        return _asked(things, level, question, "yes" if gap > 0 else "no")
    ranked = sorted(things, key=lambda t: math.hypot(t.x - one.x, t.y - one.y))
    near, next_near = (math.hypot(t.x - one.x, t.y - one.y) for t in ranked[1:3])
    if next_near < 1.2 * near:
        return None
    question = f"Which shape is nearest to the {one.name}? Answer with its colour and shape, like red circle."
    return _asked(things, level, question, ranked[1].name)


def _order(random: np.random.Generator, level: int) -> Idea | None:
    things = scene(random, level)
    if things is None:
        return None
    things = things[: (3, 4, 6)[level]]
    across = bool(random.integers(2))
    ranked = sorted(things, key=lambda t: t.x if across else t.y)
    if any((b.x - a.x if across else b.y - a.y) < 9 for a, b in pairwise(ranked)):
        return None
    way = "left to right" if across else "top to bottom"
    question = f"Name the shapes from {way}, like red circle, blue star, with commas between."
    return _asked(things, level, question, ", ".join(t.name for t in ranked))


def _depth(random: np.random.Generator, level: int) -> Idea | None:
    """Discs or squares in a chain, each over or under the next: which of two lies on top and, from level 1 on, which is
    the lowest or the highest of all, where the overlaps tell: from there the chain goes only up, or only down. Level 0
    asks of two, 1 of three, 2 of five, and of all of them."""
    count = (2, 3, 5)[level]
    colours, size = palette(random, count), 224
    spots = _chain(random, count)
    low, high = np.min(spots, axis=0) - _DISC, np.max(spots, axis=0) + _DISC
    if (high - low).max() > size - 8:
        return None
    shift = (size - (high + low)) / 2
    near = [math.dist(a, b) for n, a in enumerate(spots) for b in spots[: max(n - 1, 0)]]
    if any(distance < 2.1 * _DISC for distance in near):  # only neighbours overlap
        return None
    shape = ("circle", "square")[int(random.integers(2))]
    things = [
        Thing(shape, colour, round(float(a + shift[0])), round(float(b + shift[1])), _DISC)
        for colour, (a, b) in zip(colours, spots, strict=True)
    ]
    if level == 2 or (level == 1 and random.random() < 0.5):
        way = ("lowest", "highest")[int(random.integers(2))]
        end = int(random.integers(count))
        order = _outwards(random, end, count)
        painted = [things[k] for k in (order if way == "lowest" else order[::-1])]
        answer = things[end].colour
        question = (
            f"Each {shape} lies over or under its neighbours. Which lies {way} in the pile? Answer with its colour."
        )
        reasoning = (
            f"From the {answer} one on, each next {shape} lies {'over' if way == 'lowest' else 'under'} the last."
        )
    else:
        painted = [things[int(n)] for n in random.permutation(count)]
        n = int(random.integers(count - 1))
        answer = max(things[n : n + 2], key=painted.index).colour
        pair = sorted((things[n].colour, things[n + 1].colour))
        question = f"Of the {pair[0]} and the {pair[1]} {shape}, which lies on top? Answer with its colour."
        reasoning = f"The outline of the {answer} {shape} is whole where the two meet."

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        ground, ink = grounds(looks, dark=0.0)
        return finished(draw_things(painted, (size, size), ground, ink), looks)

    return Idea(question, answer, tuple(painted), paint, reasoning=reasoning)


def _chain(random: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Places of a winding row in which each overlaps the next."""
    turn, x, y = float(random.uniform(0, 2 * math.pi)), 0.0, 0.0
    spots = [(x, y)]
    for _ in range(count - 1):
        turn += float(random.uniform(-0.9, 0.9))
        x, y = x + _STEP * math.cos(turn), y + _STEP * math.sin(turn)
        spots.append((x, y))
    return spots


def _outwards(random: np.random.Generator, first: int, count: int) -> list[int]:
    """All numbers below ``count``, from ``first`` on outwards to both sides."""
    left, right, order = list(range(first)), list(range(first + 1, count))[::-1], [first]
    while left or right:
        side = left if not right or (left and random.random() < 0.5) else right
        order.append(side.pop())
    return order


def _described(random: np.random.Generator, things: Sequence[Thing], level: int) -> tuple[str, Thing] | None:
    """Words that mean one thing and no other: its name, or its place among those of a colour or a shape."""
    thing = things[int(random.integers(len(things)))]
    if level == 0 or random.random() < 0.4:
        return f"the {thing.name}", thing
    shapes, colours = Counter(t.shape for t in things), Counter(t.colour for t in things)
    group = [t for t in things if t.colour == thing.colour]
    noun = f"{thing.colour} shape"
    if shapes[thing.shape] > 1:
        group, noun = [t for t in things if t.shape == thing.shape], thing.shape
    elif colours[thing.colour] == 1:
        return (f"the only {thing.shape}", thing) if shapes[thing.shape] == 1 else None
    side, key = [
        ("leftmost", lambda t: t.x), ("rightmost", lambda t: -t.x), ("topmost", lambda t: t.y),
        ("lowest", lambda t: -t.y),
    ][int(random.integers(4))]  # fmt: skip
    ranked = sorted(group, key=key)
    if key(ranked[1]) - key(ranked[0]) < 10:
        return None
    return f"the {side} {noun}", ranked[0]


def _box(random: np.random.Generator, level: int) -> Idea | None:
    things = scene(random, level)
    named = _described(random, things, level) if things else None
    if things is None or named is None:
        return None
    words, thing = named
    truth = frame_box(thing.box, _SIZES[level])
    question = f"Give the box of {words} as x1,y1,x2,y2, in thousandths of the picture's width and height (0 to 999)."
    return Idea(
        question, box_text(truth), tuple(things), _painter(things, _SIZES[level]), boxes=(thing.region,)
    )  # fmt: skip


def _point(random: np.random.Generator, level: int) -> Idea | None:
    things = scene(random, level)
    named = _described(random, things, level) if things else None
    if things is None or named is None:
        return None
    words, thing = named
    size = _SIZES[level]
    x, y = ImageView(size, size).to_frame(thing.x, thing.y)
    question = f"Point to {words}: answer x,y in thousandths of the picture's width and height (0 to 999)."
    return Idea(
        question, f"{x},{y}", tuple(things), _painter(things, size), boxes=(thing.region,),
        points=(Region(0, (thing.x, thing.y), thing.name),), state=frame_box(thing.box, size),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- ways


def carve(random: np.random.Generator, rows: int, cols: int, loops: int = 0) -> frozenset[tuple[Cell, Cell]]:
    """The doors of a maze in which every cell is reached, by a walk that turns back where it is stuck; ``loops`` doors
    more than one way needs."""
    doors: set[tuple[Cell, Cell]] = set()
    way, seen = [(0, 0)], {(0, 0)}
    while way:
        row, col = way[-1]
        around = [(row + a, col + b) for a, b in MOVES.values()]
        free = [c for c in around if 0 <= c[0] < rows and 0 <= c[1] < cols and c not in seen]
        if not free:
            way.pop()
            continue
        chosen = free[int(random.integers(len(free)))]
        doors.add((min(way[-1], chosen), max(way[-1], chosen)))
        seen.add(chosen)
        way.append(chosen)
    for _ in range(loops):
        row, col = int(random.integers(rows - 1)), int(random.integers(cols - 1))
        doors.add(((row, col), (row + 1, col) if random.random() < 0.5 else (row, col + 1)))
    return frozenset(doors)


def shortest(doors: frozenset[tuple[Cell, Cell]], start: Cell, goal: Cell) -> list[str]:
    """The moves of a shortest way."""
    came: dict[Cell, tuple[Cell, str]] = {}
    waiting = deque([start])
    while waiting:
        here = waiting.popleft()
        if here == goal:
            break
        for name, (a, b) in MOVES.items():
            there = (here[0] + a, here[1] + b)
            if (min(here, there), max(here, there)) in doors and there not in came and there != start:
                came[there] = (here, name)
                waiting.append(there)
    moves: list[str] = []
    while goal != start:
        goal, name = came[goal]
        moves.append(name)
    return moves[::-1]


def _path(random: np.random.Generator, level: int) -> Idea | None:
    side = (3, 5, 7)[level]
    doors = carve(random, side, side, loops=level)
    cells = [(int(r), int(c)) for r, c in random.integers(0, side, (2, 2))]
    start, goal = cells
    if start == goal:
        return None
    moves = shortest(doors, start, goal)
    if not side - 1 <= len(moves) <= 4 * side:
        return None

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        return (draw_maze(doors, side, start, goal, looks),)

    question = (
        "Find a way through the maze from the green circle to the red star. Answer with the moves (up, down, left, "
        "right), a cell each, with commas between."
    )
    facts = (tuple(sorted(doors)), start, goal)
    return Idea(question, ", ".join(moves), facts, paint, state=(doors, start, goal))


def draw_maze(
    doors: frozenset[tuple[Cell, Cell]], side: int, start: Cell, goal: Cell, random: np.random.Generator
) -> np.ndarray:
    """A square maze of ``side`` cells a side."""
    ground, ink = grounds(random)
    step, margin = max(168 // side, 32), 10
    pixels = side * step + 2 * margin
    canvas = Canvas(pixels, pixels, ground)
    for row in range(side + 1):
        for col in range(side + 1):
            x, y = margin + col * step, margin + row * step
            canvas.disc(x, y, 1.8, ink)  # so that cells can be counted where there are no walls
            if col < side and ((row - 1, col), (row, col)) not in doors:
                canvas.line([(x, y), (x + step, y)], 2.5, ink)
            if row < side and ((row, col - 1), (row, col)) not in doors:
                canvas.line([(x, y), (x, y + step)], 2.5, ink)
    for shape, colour, (row, col) in (("circle", "green", start), ("star", "red", goal)):
        x, y = margin + (col + 0.5) * step, margin + (row + 0.5) * step
        draw_shape(canvas, shape, x, y, step * 0.32, COLOURS[colour])
    return grainy(canvas.pixels(), random)


def judge_path(example: Example, answer: str) -> Score:
    """Any way that goes through doors only and ends at the goal; of more than four times the length, none."""
    state = example.state
    assert isinstance(state, tuple)
    doors, here, goal = state
    moves = [word.strip().casefold() for word in answer.strip("[]() \n.").split(",")]
    if len(moves) > 4 * len(example.answer.split(",")) + 8 or not all(move in MOVES for move in moves):
        return grading.wrong("malformed")
    for move in moves:
        there = (here[0] + MOVES[move][0], here[1] + MOVES[move][1])
        if (min(here, there), max(here, there)) not in doors:
            return Score(0.0, {"right": 0.0, "into_a_wall": 1.0})
        here = there
    return grading.right(here == goal)


def _direction(random: np.random.Generator, level: int) -> Idea | None:
    """An arrow, and what it points at; or where something lies as on a map, with north up. There are more things with
    every level, and what the arrow does not point at lies closer beside its way."""
    things = scene(random, level)
    if things is None:
        return None
    if random.random() < 0.5:
        return _pointed(random, things, level)
    one, other = (things[int(n)] for n in random.permutation(len(things))[:2])
    turn = math.degrees(math.atan2(one.y - other.y, other.x - one.x)) % 360
    nearest = round(turn / 45)
    if abs(turn - 45 * nearest) > 12 or math.hypot(other.x - one.x, other.y - one.y) < 50:
        return None
    names = ("east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east")
    question = (
        f"North is up. In which direction does the {other.name} lie from the {one.name}? Answer with one of "
        f"{', '.join(names)}."
    )
    return _asked(things, level, question, names[nearest % 8])


def _pointed(random: np.random.Generator, things: Sequence[Thing], level: int) -> Idea | None:
    """An arrow in a free place that points at the middle of one thing, and past all others."""
    height, width = _SIZES[level]
    target = things[int(random.integers(len(things)))]
    x, y = float(random.integers(10, width - 10)), float(random.integers(10, height - 10))
    far = math.hypot(target.x - x, target.y - y)
    if far < _ARROW + target.radius + 12:
        return None
    ahead = ((target.x - x) / far, (target.y - y) / far)
    tip = (x + _ARROW * ahead[0], y + _ARROW * ahead[1])
    middle = (x + _ARROW / 2 * ahead[0], y + _ARROW / 2 * ahead[1])
    for thing in things:
        if math.dist(middle, (thing.x, thing.y)) < _ARROW / 2 + thing.radius + 6:
            return None
        away = math.dist(tip, (thing.x, thing.y))
        beside = math.acos(max(-1.0, min(1.0, ((thing.x - tip[0]) * ahead[0] + (thing.y - tip[1]) * ahead[1]) / away)))
        if thing is not target and math.degrees(beside - math.asin(min(1.0, thing.radius / away))) < _CLEAR[level]:
            return None

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        ground, ink = grounds(looks, dark=0.0)
        canvas = draw_things(things, (height, width), ground, ink)
        draw_arrow(canvas, (x, y), tip, ink)
        return finished(canvas, looks)

    question = "Which shape does the arrow point at? Answer with its colour and shape, like red circle."
    return Idea(question, target.name, (*things, (x, y), tip), paint, boxes=regions(things))


def draw_arrow(canvas: Canvas, tail: tuple[float, float], tip: tuple[float, float], ink: Sequence[int]) -> None:
    """A shaft with a filled head."""
    length = math.dist(tail, tip)
    dx, dy = (tip[0] - tail[0]) / length, (tip[1] - tail[1]) / length
    neck = (tip[0] - 10 * dx, tip[1] - 10 * dy)
    canvas.line([tail, neck], 3, ink)
    canvas.polygon([tip, (neck[0] - 6 * dy, neck[1] + 6 * dx), (neck[0] + 6 * dy, neck[1] - 6 * dx)], ink)
