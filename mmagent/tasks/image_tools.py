"""Visual tool use: a picture too large to be read as it is shown, and tools that crop, enlarge and draw on it.

What is shown first is the whole, made small: what is written on the shapes cannot be read there. Tools answer with
pictures of later turns. Coordinates are thousandths of the whole picture, in every turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from mmagent.chat import JSON
from mmagent.geometry import FRAME, ImageView
from mmagent.tasks.tools import Result, ToolError, ToolTask, tool, whole_numbers, write_call
from mmagent.trajectories import Observation, Score
from mmagent.worlds.canvas import SHAPES, Canvas, draw_shape, palette
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.grading import plain
from mmagent.worlds.things import Thing, places

SIDE = 1008
"""Pixels of the whole picture, either way."""
SHOWN = 224
"""Pixels of what is shown, on the longer side."""
WRITING = 10.0
"""Pixels of the letters in the whole picture: two where all of it is shown, which nobody reads."""
RADIUS = 34
_VIEW = ImageView((SIDE, SIDE), (SIDE, SIDE))
NARROWEST = 20
"""Pixels of a part that is cropped, either way."""
_CORNERS = ("x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class Picture:
    """Shapes with one of ``codes`` each; a ``question``, its ``answer``, and the calls of an expert."""

    things: tuple[Thing, ...]
    codes: tuple[str, ...]
    question: str
    answer: str
    calls: tuple[str, ...]

    def told(self) -> str:
        return repr(self)

    @cached_property
    def pixels(self) -> np.ndarray:
        """``(SIDE, SIDE, 3)`` uint8, painted once for all that look at it."""
        canvas = Canvas(SIDE, SIDE, (250, 250, 246))
        for thing, code in zip(self.things, self.codes, strict=True):
            draw_shape(canvas, thing.shape, thing.x, thing.y, thing.radius, COLOURS[thing.colour], (34, 34, 40))
            canvas.rectangle((thing.x - 13, thing.y - 7, thing.x + 13, thing.y + 7), (255, 255, 255))
            canvas.text(thing.x, thing.y, code, WRITING, (20, 20, 24), "mm", "mono")
        return canvas.pixels()

    @cached_property
    def shown(self) -> np.ndarray:
        """The whole, made small."""
        return resized(self.pixels)


def resized(pixels: np.ndarray, longest: int = SHOWN) -> np.ndarray:
    """The picture with ``longest`` pixels on its longer side."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    size = (max(round(width * scale), 28), max(round(height * scale), 28))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


class ImageSession:
    """The picture, with what was drawn on it so far."""

    def __init__(self, picture: Picture):
        self.picture, self.pixels = picture, picture.pixels

    def call(self, name: str, arguments: Mapping[str, JSON]) -> Result:
        if name == "crop":
            return self._cropped(name, whole_numbers(name, arguments, _CORNERS, 0, FRAME - 1))
        if name == "zoom":
            x, y = whole_numbers(name, arguments, ("x", "y"), 0, FRAME - 1)
            (factor,) = whole_numbers(name, arguments, ("factor",), 2, 16)
            reach = FRAME // (2 * factor)
            x, y = (min(max(v, reach), FRAME - 1 - reach) for v in (x, y))
            return self._cropped(name, [x - reach, y - reach, x + reach, y + reach])
        if name == "draw_line":
            corners = whole_numbers(name, arguments, _CORNERS, 0, FRAME - 1)
            ends = [_VIEW.from_frame(*corners[:2]), _VIEW.from_frame(*corners[2:])]
            image = Image.fromarray(self.pixels)
            ImageDraw.Draw(image).line(ends, (230, 0, 160), 5)
            self.pixels = np.asarray(image)
            return Result("drawn; this is the whole picture", (resized(self.pixels),))
        raise ToolError(f"no tool {name!r}")

    def judge(self, answer: str) -> Score:
        right = plain(answer).casefold() == self.picture.answer.casefold()
        return Score(float(right), {"right": float(right)})

    def _cropped(self, name: str, corners: Sequence[int]) -> Result:
        (x1, y1), (x2, y2) = _VIEW.from_frame(*corners[:2]), _VIEW.from_frame(*corners[2:])
        left, top, right, bottom = (round(v) for v in (x1, y1, x2, y2))
        short, long = sorted((right - left, bottom - top))
        if short < NARROWEST or long > 20 * short:
            least = math.ceil(NARROWEST * FRAME / SIDE)
            raise ToolError(f"{name}: the box must be at least {least} wide and high, and no strip")
        told = f"from {corners[0]},{corners[1]} to {corners[2]},{corners[3]}"
        return Result(told, (resized(self.pixels[top:bottom, left:right]),))


class ImageToolTask(ToolTask[Picture]):
    """0: the code on a shape; 1: the sum of two numbers; 2: the code on the one shape that a line crosses."""

    name, category, levels = "image-tools", "visual-tool-use", 3
    tools = (
        tool("crop", "The part of the picture in a box, enlarged.", **dict.fromkeys(_CORNERS, "integer")),
        tool("zoom", "What is around a point, enlarged 2 to 16 times.", x="integer", y="integer", factor="integer"),
        tool("draw_line", "Draw a straight line on the picture.", **dict.fromkeys(_CORNERS, "integer")),
    )

    def draw(self, random: np.random.Generator, level: int) -> Picture | None:
        count = (8, 12, 14)[level]
        names = [(shape, colour) for shape in SHAPES for colour in palette(random, 6)]
        found = places(random, [RADIUS] * count, (SIDE, SIDE), apart=1.4)
        if found is None:
            return None
        chosen = [names[int(n)] for n in random.permutation(len(names))[:count]]
        things = tuple(Thing(s, c, x, y, RADIUS) for (s, c), (x, y) in zip(chosen, found, strict=True))
        if level == 1:
            codes = [str(int(n)) for n in random.integers(100, 999, size=count)]
        else:
            codes = ["".join(random.choice(list("ACDEFHJKLMNPRTUVWXY34679"), 3)) for _ in things]
        if len(set(codes)) < count:
            return None
        one, other = things[0], things[1]
        if level == 0:
            question, answer, calls = f"What is written on the {one.name}?", codes[0], (_zoom(one),)
        elif level == 1:
            question = f"What is the sum of the numbers on the {one.name} and the {other.name}?"
            answer, calls = str(int(codes[0]) + int(codes[1])), (_zoom(one), _zoom(other))
        else:
            crossed = self._crossed(things)
            if crossed is None:
                return None
            question = (
                f"A straight line from the middle of the {one.name} to the middle of the {other.name} crosses one "
            )
            question += "other shape. What is written on that?"
            ends = (*_VIEW.to_frame(one.x, one.y), *_VIEW.to_frame(other.x, other.y))
            line = write_call("draw_line", **dict(zip(_CORNERS, ends, strict=True)))
            answer, calls = codes[things.index(crossed)], (line, _zoom(crossed))
        return Picture(things, tuple(codes), question, answer, calls)

    def _crossed(self, things: Sequence[Thing]) -> Thing | None:
        """The only other thing near whose middle the line between the first two passes, where no third is in doubt."""
        one, other, *rest = things
        near = []
        for thing in rest:
            away = distance_to_line((thing.x, thing.y), (one.x, one.y), (other.x, other.y))
            if away <= 0.35 * RADIUS:
                near.append(thing)
            elif away <= 1.4 * RADIUS:
                return None
        return near[0] if len(near) == 1 else None

    def session(self, scene: Picture) -> ImageSession:
        return ImageSession(scene)

    def opening(self, scene: Picture) -> Observation:
        told = f"{scene.question} The picture is shown small; coordinates are thousandths of its width and height. "
        return Observation(f"{told}Answer with what is asked alone.", (scene.shown,))

    def solve(self, scene: Picture) -> Iterator[str]:
        yield from scene.calls
        yield scene.answer


def _zoom(thing: Thing) -> str:
    x, y = _VIEW.to_frame(thing.x, thing.y)
    return write_call("zoom", x=x, y=y, factor=10)


def distance_to_line(point: tuple[float, float], start: tuple[float, float], end: tuple[float, float]) -> float:
    """From a point to the nearest of the straight line between two others."""
    (px, py), (ax, ay), (bx, by) = point, start, end
    dx, dy = bx - ax, by - ay
    along = min(max(((px - ax) * dx + (py - ay) * dy) / (dx * dx + dy * dy), 0.0), 1.0)
    return math.hypot(px - ax - along * dx, py - ay - along * dy)
