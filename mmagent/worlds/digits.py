"""Seeded pictures of handwritten digits: the 1797 that scikit-learn installs, enlarged, in any colours, at any place.

No two splits show the same piece of handwriting: of a fixed shuffle of all 1797, the first 1000 are the test split's,
the next 100 the validation split's, and the last 697 the train split's. The test split is large because a probe takes
its own training and test pictures from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmagent.worlds.drawing import COLOURS, SPLITS, article, far_apart, generator, once, random_size

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_BORDERS = {"test": slice(0, 1000), "validation": slice(1000, 1100), "train": slice(1100, None)}


@dataclass(frozen=True)
class Digit:
    """``image (h, w, 3)`` uint8, its ``caption``, the ``digit`` 0 to 9, ``colour`` and ``ground`` as numbers in
    :data:`COLOURS`, and ``inside (h, w)`` bool: the pixels of the ink."""

    image: np.ndarray
    caption: str
    digit: int
    colour: int
    ground: int
    inside: np.ndarray


def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All of a split: ``(N, 8, 8)`` float64 ink in [0, 16] and ``(N,)`` int64 digits. Raises ``ValueError`` for a split
    that is none of train, test and validation."""
    if split not in _BORDERS:
        raise ValueError(f"split {split!r} is none of {tuple(SPLITS)}")
    images, digits, order = _written()
    chosen = order[_BORDERS[split]]
    return images[chosen], digits[chosen]


@once
def _written() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes a second, which only those who draw digits should wait

    bunch = load_digits()
    return bunch.images, bunch.target.astype(np.int64), np.random.default_rng(0).permutation(len(bunch.target))


def draw_digit(seed: int, split: str = "train", size: tuple[int, int] | None = None) -> Digit:
    """One digit of the split. ``size`` is ``(height, width)`` pixels."""
    random = generator("digit", seed, split)
    height, width = size or random_size(random)
    images, digits = handwriting(split)
    which, colours = int(random.integers(len(digits))), list(COLOURS)
    colour = int(random.integers(len(colours)))
    grounds = [n for n, other in enumerate(colours) if far_apart(other, colours[colour])]
    ground = grounds[int(random.integers(len(grounds)))]
    side = max(round(float(random.uniform(0.5, 0.95)) * min(height, width)), 1)
    top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
    ink = Image.fromarray((images[which] * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    share = np.zeros((height, width, 1), dtype=np.float32)
    share[top : top + side, left : left + side, 0] = np.asarray(ink, dtype=np.float32) / 255
    paint, paper = (np.asarray(COLOURS[colours[n]], dtype=np.float32) for n in (colour, ground))
    image = paper + share * (paint - paper)
    image += random.normal(0.0, float(random.uniform(0.5, 5.0)), (height, width, 1)).astype(np.float32)
    digit = int(digits[which])
    caption = f"the digit {DIGITS[digit]} written by hand in {colours[colour]} on {article(colours[ground])} ground"
    return Digit(np.clip(image, 0, 255).astype(np.uint8), caption, digit, colour, ground, share[..., 0] > 0.5)
