"""Tiny captioned pictures for tests of the encoder's stages: a function of a position, without any world."""

from __future__ import annotations

import numpy as np

from data_pipelines.galleries import Picture

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (40, 40, 210), "yellow": (220, 200, 40)}
SHAPES = ("square", "disc")


def tiny_picture(position: int) -> Picture:
    """One shape on a plain or striped ground; sides of 40 to 120 pixels."""
    random = np.random.default_rng([7, position])
    height, width = (int(n) for n in random.integers(40, 121, 2))
    ground = np.full((height, width, 3), random.integers(90, 256), dtype=np.uint8)
    striped = bool(random.integers(2))
    if striped:
        ground[:, (np.arange(width) // 4) % 2 == 0] //= 2
    name = list(COLOURS)[int(random.integers(len(COLOURS)))]
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    radius = int(random.integers(10, 20))
    y, x = int(random.integers(radius, height - radius)), int(random.integers(radius, width - radius))
    dy, dx = np.abs(np.arange(height) - y)[:, None], np.abs(np.arange(width) - x)[None, :]
    inside = np.maximum(dy, dx) <= radius if shape == "square" else dy**2 + dx**2 <= radius**2
    ground[inside] = COLOURS[name]
    return Picture(ground, f"a {name} {shape} on a {'striped' if striped else 'plain'} ground", f"tiny/{position}")
