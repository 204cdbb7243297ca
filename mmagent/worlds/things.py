"""Coloured shapes at places of their own: what is counted, compared, pointed at and moved about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.geometry import ImageView
from mmagent.records import Region
from mmagent.worlds.canvas import Canvas, draw_shape, grainy, plural, shape_box
from mmagent.worlds.drawing import COLOURS


@dataclass(frozen=True)
class Thing:
    """A shape of :data:`~mmagent.worlds.canvas.SHAPES` in a colour of :data:`COLOURS`, around ``(x, y)`` pixels."""

    shape: str
    colour: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        return shape_box(self.shape, self.x, self.y, self.radius)

    @property
    def region(self) -> Region:
        return Region(0, self.box, self.name)


def places(
    random: np.random.Generator, radii: Sequence[int], size: tuple[int, int], apart: float = 1.15
) -> list[tuple[int, int]] | None:
    """Centres for discs of these radii, within ``size (height, width)`` and ``apart`` times the sum of their radii from
    one another; None where they found no room."""
    height, width = size
    found: list[tuple[int, int]] = []
    for n, radius in enumerate(radii):
        if 2 * radius + 4 > min(size):
            return None
        for _ in range(60):
            x = int(random.integers(radius + 2, width - radius - 1))
            y = int(random.integers(radius + 2, height - radius - 1))
            near = zip(found, radii[:n], strict=True)
            if all(math.hypot(x - a, y - b) >= apart * (radius + other) for (a, b), other in near):
                found.append((x, y))
                break
        else:
            return None
    return found


def draw_things(
    things: Sequence[Thing], size: tuple[int, int], ground: Sequence[int], ink: Sequence[int], outlined: bool = True
) -> Canvas:
    """All of them, later ones over earlier ones; outlines tell neighbours of one colour apart."""
    canvas = Canvas(*size, ground)
    for thing in things:
        outline = ink if outlined else None
        draw_shape(canvas, thing.shape, thing.x, thing.y, thing.radius, COLOURS[thing.colour], outline)
    return canvas


def finished(canvas: Canvas, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The one picture of an example, with a little noise."""
    return (grainy(canvas.pixels(), random),)


def regions(things: Sequence[Thing]) -> tuple[Region, ...]:
    return tuple(thing.region for thing in things)


def frame_box(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in pixels, in the frame of coordinates."""
    return ImageView(size, size).box_to_frame(box)


def box_text(box: Sequence[int]) -> str:
    return ",".join(map(str, box))


def many(noun: str, count: int) -> str:
    """ "1 circle", "2 circles"."""
    return f"{count} {noun if count == 1 else plural(noun)}"
