"""What the drawn worlds have in common: splits, named colours, sizes, fonts, one source of chance for each picture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np
from PIL import Image, ImageFilter, ImageFont

P, R = ParamSpec("P"), TypeVar("R")
COLOURS = {
    "red": (214, 44, 44),
    "green": (44, 160, 64),
    "blue": (48, 84, 214),
    "yellow": (232, 206, 56),
    "purple": (142, 56, 176),
    "orange": (240, 138, 36),
    "white": (242, 242, 242),
    "black": (32, 32, 32),
}
SPLITS = {"train": 0, "test": 1, "validation": 2}
SIDES = (112, 225)  # least and, exclusive, most pixels on a side where no size is asked for
LARGEST = 512  # pixels on a side

_loading = threading.RLock()


def once(function: Callable[P, R]) -> Callable[P, R]:
    """Cached for good, and computed by one thread only: of eight that draw, all would load the same photographs."""
    cached = cache(function)

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _loading:
            return cached(*args, **kwargs)

    return locked


def generator(kind: str, seed: int, split: str) -> np.random.Generator:
    """The source of chance of one picture. Raises ``ValueError`` for a split that is none of :data:`SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {tuple(SPLITS)}")
    return np.random.default_rng([SPLITS[split], seed, *kind.encode()])


def random_size(random: np.random.Generator) -> tuple[int, int]:
    """``(height, width)`` within :data:`SIDES`."""
    height, width = random.integers(*SIDES, 2)
    return int(height), int(width)


def article(words: str) -> str:
    """The words behind "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def far_apart(one: str, two: str, least: float = 170.0) -> bool:
    """Whether two of :data:`COLOURS` can be told apart where one lies on the other (distance in RGB)."""
    difference = np.subtract(COLOURS[one], COLOURS[two], dtype=np.float64)
    return bool(np.linalg.norm(difference) >= least)


@once
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings, at ``size`` pixels."""
    return ImageFont.load_default(size)


def grown(numbers: np.ndarray, reach: int) -> np.ndarray:
    """``(h, w)`` int64 numbers below 256, each grown by ``reach`` pixels all round; the larger number wins. A patch
    counts as what most of it shows, and no thin line is most of any patch."""
    grey = Image.fromarray(numbers.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * reach + 1))
    return np.asarray(grey).astype(np.int64)
