"""Boxes on a tiled floor, seen in perspective: which is nearest, which is tallest, where they stand, how they project.

The frame of the floor: x to the right, y away from the viewer, z up, in metres, from the floor's near left corner; a
tile is one metre. The camera is a pinhole that looks at the middle of the floor from before it, without roll.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

import numpy as np
from PIL import Image, ImageDraw

from mmagent.records import Region
from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, grainy, grounds, palette
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.things import box_text, frame_box

HEIGHT, WIDTH = 280, 336
TILES = 6
_COUNTS = (2, 3, 4)
_SHADES = {"top": 1.0, "front": 0.8, "side": 0.62}


@dataclass(frozen=True)
class Box:
    """From ``(x, y)`` on the floor, ``w`` wide, ``d`` deep and ``h`` high, in metres."""

    colour: str
    x: float
    y: float
    w: float
    d: float
    h: float

    @property
    def corners(self) -> list[tuple[float, float, float]]:
        return list(product((self.x, self.x + self.w), (self.y, self.y + self.d), (0.0, self.h)))


@dataclass(frozen=True)
class Camera:
    """At ``(x, y, z)`` metres, looking at the middle of the floor; ``focal`` and the centre ``(u, v)`` in pixels."""

    x: float
    y: float
    z: float
    focal: float
    u: float
    v: float

    def __call__(self, point: Sequence[float]) -> tuple[float, float]:
        """A point of the floor's frame in pixels of the picture."""
        seen = (point[0] - self.x, point[1] - self.y, point[2] - self.z)
        right, up, ahead = (sum(a * b for a, b in zip(axis, seen, strict=True)) for axis in self.axes)
        assert ahead > 0.1, "behind the camera"
        return self.u + self.focal * right / ahead, self.v - self.focal * up / ahead

    @cached_property
    def axes(self) -> tuple[tuple[float, ...], ...]:
        """Unit vectors to the right, up and ahead of the camera."""
        ahead = np.array([TILES / 2 - self.x, TILES / 2 - self.y, -self.z])
        ahead /= np.linalg.norm(ahead)
        right = np.cross(ahead, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        return tuple(tuple(axis.tolist()) for axis in (right, np.cross(right, ahead), ahead))


@dataclass(frozen=True)
class View:
    """``boxes`` from the farthest to the nearest, as they are painted."""

    camera: Camera
    boxes: tuple[Box, ...]

    def frame(self, box: Box) -> tuple[float, float, float, float]:
        """The box around a projected box, in pixels."""
        xs, ys = zip(*(self.camera(corner) for corner in box.corners), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("boxes3d/order", "spatial-relation", 3, _order, grading.items),
        Seeded("boxes3d/size", "spatial-relation", 3, _size, grading.word),
        Seeded("boxes3d/tile", "spatial-relation", 3, _tile, grading.word),
        Seeded("boxes3d/box", "3d-grounding", 3, _box, grading.box),
        Seeded("boxes3d/cuboid", "3d-grounding", 3, _cuboid, _judge_cuboid),
    )


def draw_view(random: np.random.Generator, level: int, tiled: bool | None = None) -> View | None:
    """A floor with boxes that all show, or None where one hides most of another. Sizes are multiples of half a metre;
    from level 1 on places are, too, before that (or where they shall be ``tiled``) each box keeps to one tile."""
    boxes: list[Box] = []
    tiled = level == 0 if tiled is None else tiled
    for colour in palette(random, _COUNTS[level]):
        tries = (_one(random, tiled, colour) for _ in range(30))
        free = next((one for one in tries if not any(_meet(one, other) for other in boxes)), None)
        if free is None:
            return None
        boxes.append(free)
    x, y, z = float(random.uniform(0.5, TILES - 0.5)), -float(random.uniform(3, 7)), float(random.uniform(3.5, 7))
    camera = _aimed(round(x, 2), round(y, 2), round(z, 2))
    ordered = _back_to_front(boxes, camera)
    if ordered is None:
        return None
    view = View(camera, tuple(ordered))
    return view if min(_visible(view)) >= 0.6 else None


def _one(random: np.random.Generator, tiled: bool, colour: str) -> Box:
    w, d = (float(v) / 2 for v in random.integers(1, 3 if tiled else 5, 2))
    h = float(random.integers(1, 6)) / 2
    if tiled:  # in the middle of a tile
        x, y = (float(v) + (1 - side) / 2 for v, side in zip(random.integers(0, TILES, 2), (w, d), strict=True))
    else:
        x, y = (float(random.integers(0, 2 * (TILES - side) + 1)) / 2 for side in (w, d))
    return Box(colour, x, y, w, d, h)


def _meet(one: Box, other: Box, gap: float = 0.25) -> bool:
    apart = one.x + one.w + gap <= other.x or other.x + other.w + gap <= one.x
    return not (apart or one.y + one.d + gap <= other.y or other.y + other.d + gap <= one.y)


def _aimed(x: float, y: float, z: float) -> Camera:
    """A camera there whose picture the floor, and boxes up to two and a half metres on it, fill."""
    bare = Camera(x, y, z, 1.0, 0.0, 0.0)
    us, vs = zip(*(bare(p) for p in product((0.0, TILES), (0.0, TILES), (0.0, 2.5))), strict=True)
    focal = min((WIDTH - 36) / (max(us) - min(us)), (HEIGHT - 36) / (max(vs) - min(vs)))
    u, v = WIDTH / 2 - focal * (max(us) + min(us)) / 2, HEIGHT / 2 - focal * (max(vs) + min(vs)) / 2
    return Camera(x, y, z, round(focal, 3), round(u, 3), round(v, 3))


def _back_to_front(boxes: Sequence[Box], camera: Camera) -> list[Box] | None:
    """An order in which every box is painted before those that may hide it; None where there is none."""

    def nearer(one: Box, other: Box) -> bool:
        """Whether a plane between them has the camera on the side of ``one``: then ``other`` cannot hide it."""
        if one.y + one.d <= other.y:
            return True  # the camera stands before the floor
        if one.x + one.w <= other.x:
            return camera.x <= other.x
        return other.x + other.w <= one.x and camera.x >= other.x + other.w

    def hides(one: Box, other: Box) -> bool:
        return not nearer(other, one)

    left, out = list(boxes), []
    while left:
        free = [box for box in left if not any(hides(box, other) for other in left if other is not box)]
        if not free:
            return None
        out.append(free[0])
        left.remove(free[0])
    return out


def _faces(box: Box, camera: Camera) -> list[tuple[str, list[tuple[float, float]]]]:
    """The sides of a box that the camera sees, in pixels."""
    x1, x2, y1, y2, h = box.x, box.x + box.w, box.y, box.y + box.d, box.h
    faces = []
    if camera.z > h:
        faces.append(("top", [(x1, y1, h), (x2, y1, h), (x2, y2, h), (x1, y2, h)]))
    faces.append(("front", [(x1, y1, 0), (x2, y1, 0), (x2, y1, h), (x1, y1, h)]))
    if camera.x < x1:
        faces.append(("side", [(x1, y1, 0), (x1, y2, 0), (x1, y2, h), (x1, y1, h)]))
    if camera.x > x2:
        faces.append(("side", [(x2, y1, 0), (x2, y2, 0), (x2, y2, h), (x2, y1, h)]))
    return [(name, [camera(point) for point in points]) for name, points in faces]


def _visible(view: View) -> list[float]:
    """Of every box, the share of its silhouette that no other one covers."""
    numbers = Image.new("L", (WIDTH // 2, HEIGHT // 2))
    pen, alone = ImageDraw.Draw(numbers), []
    for n, box in enumerate(view.boxes, start=1):
        single = Image.new("L", numbers.size)
        for _, face in _faces(box, view.camera):
            half = [(x / 2, y / 2) for x, y in face]
            pen.polygon(half, n)
            ImageDraw.Draw(single).polygon(half, 1)
        alone.append(int(np.asarray(single).sum()))
    seen = np.bincount(np.asarray(numbers).ravel(), minlength=len(view.boxes) + 1)[1:]
    return [float(shown) / max(whole, 1) for shown, whole in zip(seen, alone, strict=True)]


def paint_view(view: View, random: np.random.Generator, lettered: bool = False) -> tuple[np.ndarray, ...]:
    """Its picture, ``(280, 336, 3)`` uint8; ``lettered``: letters at the floor's near edge, numbers at its left."""
    ground, ink = grounds(random, dark=0.15)
    canvas = Canvas(HEIGHT, WIDTH, ground)
    light, dark = ((226, 222, 212), (206, 200, 188)) if random.random() < 0.5 else ((214, 222, 228), (192, 202, 210))
    camera = view.camera
    for col, row in product(range(TILES), range(TILES)):
        corners = [(col, row, 0), (col + 1, row, 0), (col + 1, row + 1, 0), (col, row + 1, 0)]
        canvas.polygon([camera(c) for c in corners], light if (col + row) % 2 else dark)
    if lettered:
        for n in range(TILES):
            canvas.text(*camera((n + 0.5, -0.35, 0)), "ABCDEF"[n], 13, ink, "mm", "bold")
            canvas.text(*camera((-0.3, n + 0.5, 0)), str(n + 1), 13, ink, "mm", "bold")
    for box in view.boxes:
        for name, face in _faces(box, camera):
            paint = [round(v * _SHADES[name]) for v in COLOURS[box.colour]]
            canvas.polygon(face, paint, [round(v * 0.45) for v in COLOURS[box.colour]], 1.0)
    return (grainy(canvas.pixels(), random),)


def _asked(
    view: View, question: str, answer: str, lettered: bool = False, reasoning: str = "", state: object = None
) -> Idea:
    def paint(random: np.random.Generator) -> Sequence[np.ndarray]:
        return paint_view(view, random, lettered)

    regions = tuple(Region(0, view.frame(box), f"{box.colour} box") for box in view.boxes)
    return Idea(question, answer, view, paint, boxes=regions, reasoning=reasoning, state=state)


def _order(random: np.random.Generator, level: int) -> Idea | None:
    """By the distance of their nearest points from the camera's foot on the floor."""
    view = draw_view(random, level)
    if view is None:
        return None
    far = sorted((_distance(box, view.camera), box.colour) for box in view.boxes)
    if any(b[0] - a[0] < 0.4 for a, b in pairwise(far)):
        return None
    question = "Name the colours of the boxes from the nearest to you to the farthest, with commas between."
    return _asked(view, question, ", ".join(colour for _, colour in far))


def _distance(box: Box, camera: Camera) -> float:
    x = min(max(camera.x, box.x), box.x + box.w)
    return math.hypot(x - camera.x, box.y - camera.y)


def _size(random: np.random.Generator, level: int) -> Idea | None:
    """In metres, not in pixels: what is near looks larger than it is."""
    view = draw_view(random, level)
    if view is None:
        return None
    what, measure = _MEASURES[int(random.integers(len(_MEASURES)))]
    ranked = sorted(view.boxes, key=measure, reverse=True)
    if measure(ranked[0]) < 1.4 * measure(ranked[1]):
        return None
    question = f"The tiles are squares of one metre. Which box {what}? Answer with its colour."
    told = ", ".join(f"{box.colour} {measure(box):g}" for box in view.boxes)
    return _asked(view, question, ranked[0].colour, reasoning=f"In metres: {told}.")


_MEASURES: tuple[tuple[str, Callable[[Box], float]], ...] = (
    ("is the highest", lambda box: box.h),
    ("is the widest from left to right", lambda box: box.w),
    ("reaches deepest from front to back", lambda box: box.d),
    ("has the largest volume", lambda box: box.w * box.d * box.h),
)


def _tile(random: np.random.Generator, level: int) -> Idea | None:
    """Boxes of one tile each, two, three or four; the letters run along the near edge, the numbers away from it. Level
    0 names the box whose tile is asked for, 1 tells it by its height, 2 asks for the way from one to another."""
    view = draw_view(random, level, tiled=True)
    if view is None:
        return None
    if level == 2:
        box, other = (view.boxes[int(n)] for n in random.permutation(len(view.boxes))[:2])
        dx, dy = int(other.x) - int(box.x), int(other.y) - int(box.y)
        steps = abs(dx) + abs(dy)
        question = (
            f"How many steps from tile to tile, never across a corner, lead from the {box.colour} box's tile to the "
            f"{other.colour} box's? Answer with a number."
        )
        told = f"{_tile_name(box)} to {_tile_name(other)}: {abs(dx)} across and {abs(dy)} along: {steps}."
        return _asked(view, question, str(steps), lettered=True, reasoning=told)
    if level == 1:
        ranked = sorted(view.boxes, key=lambda box: box.h)
        highest = bool(random.integers(2))
        box, next_one = (ranked[-1], ranked[-2]) if highest else (ranked[0], ranked[1])
        if max(box.h, next_one.h) < 1.4 * min(box.h, next_one.h):
            return None
        words = "highest" if highest else "lowest"
    else:
        box = view.boxes[int(random.integers(len(view.boxes)))]
        words = box.colour
    question = f"On which tile does the {words} box stand? Answer with letter and number, like B3."
    return _asked(view, question, _tile_name(box), lettered=True)


def _tile_name(box: Box) -> str:
    return f"{'ABCDEF'[int(box.x)]}{int(box.y) + 1}"


def _box(random: np.random.Generator, level: int) -> Idea | None:
    found = _uncovered(random, level)
    if found is None:
        return None
    view, box = found
    truth = frame_box(view.frame(box), (HEIGHT, WIDTH))
    question = (
        f"Give the box around the {box.colour} box as x1,y1,x2,y2, in thousandths of the picture's width and height "
        "(0 to 999)."
    )
    return _asked(view, question, box_text(truth))


def _uncovered(random: np.random.Generator, level: int) -> tuple[View, Box] | None:
    """A view, and one of its boxes that hardly anything covers."""
    view = draw_view(random, level)
    if view is None:
        return None
    whole = [box for box, share in zip(view.boxes, _visible(view), strict=True) if share >= 0.9]
    return (view, whole[int(random.integers(len(whole)))]) if whole else None


def _cuboid(random: np.random.Generator, level: int) -> Idea | None:
    found = _uncovered(random, level)
    if found is None:
        return None
    view, box = found
    numbers = {"x": box.x, "y": box.y, "width": box.w, "depth": box.d, "height": box.h}
    answer = ", ".join(f"{value:g}" for value in numbers.values())
    question = (
        "The tiles are squares of one metre; x runs to the right and y away from you, from the near left corner of the "
        f"floor. Where does the {box.colour} box stand, and how large is it? Answer in metres: x of its left side, y "
        "of its front, width, depth, height, with commas between."
    )
    return _asked(view, question, answer, state=box)


def _judge_cuboid(example: Example, answer: str) -> Score:
    """Intersection over union of the two boxes in space, 0 below a half."""
    truth, said = example.state, grading.read_decimals(answer, 5)
    assert isinstance(truth, Box)
    if said is None or min(said[2:]) <= 0:
        return grading.wrong("malformed")
    other = Box("", *said)
    shared = (
        max(min(truth.x + truth.w, other.x + other.w) - max(truth.x, other.x), 0.0)
        * max(min(truth.y + truth.d, other.y + other.d) - max(truth.y, other.y), 0.0)
        * min(truth.h, other.h)
    )
    iou = shared / (truth.w * truth.d * truth.h + other.w * other.d * other.h - shared)
    iou = 1.0 if iou > 1 - 1e-9 else iou
    return Score(iou if iou >= 0.5 else 0.0, {"iou": iou, "right": float(iou >= 0.5)})
