"""How alike two rendered pages look and read: figures in [0, 1] that need no downloaded model.

The perceptual score is the geometric mean of two: the cosine of histograms of oriented gradients (layout) and the
intersection of colour histograms over a grid of cells (palette and place). Either alone is fooled by a blank page or
by an unstyled one; structural similarity and mean error rank such pages wrongly.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmagent.worlds.elements import TextLine

CELLS = 4
"""Colour histograms are taken in a grid of so many cells a side."""
BINS = (6, 5, 5)
"""Histogram bins for lightness, green-red and blue-yellow."""
LEAST_RATIO = 0.5
"""Lines whose texts agree less than this do not match."""


class TextMatch(NamedTuple):
    """``block``: share of written characters that found their line; ``text``: how alike matched lines read;
    ``position``: how near they stand. All 0 when nothing matches, 1 when both pages have no text."""

    block: float
    text: float
    position: float


def visual_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Perceptual similarity of two ``(height, width, 3)`` uint8 pictures of equal width.

    The shorter is continued in white. 1 for equal pictures, near 0 for a blank page against a full one.
    """
    one, other = _same_height(one, other)
    if np.array_equal(one, other):
        return 1.0
    return float(np.sqrt(hog_cosine(one, other) * lab_intersection(one, other)))


def hog_cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of the pictures' histograms of oriented gradients; 0 when one of them has no edges."""
    from skimage.color import rgb2gray
    from skimage.feature import hog

    def features(image: np.ndarray) -> np.ndarray:
        return hog(rgb2gray(image), orientations=9, pixels_per_cell=(16, 16), cells_per_block=(1, 1), block_norm="L2")

    a, b = features(one), features(other)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0


def lab_intersection(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over cells of the intersection of their colour histograms in CIELAB."""
    from skimage.color import rgb2lab

    a, b = (_histograms(rgb2lab(image)) for image in (one, other))
    return float(np.minimum(a, b).sum(axis=1).mean())


def _histograms(lab: np.ndarray) -> np.ndarray:
    """``(CELLS**2, bins)``, each row adding up to 1."""
    ranges = ((0.0, 100.0), (-86.2, 98.3), (-107.9, 94.5))  # what sRGB reaches
    levels = [
        np.clip(((lab[..., n] - low) / (high - low) * bins).astype(int), 0, bins - 1)
        for n, ((low, high), bins) in enumerate(zip(ranges, BINS, strict=True))
    ]
    code = (levels[0] * BINS[1] + levels[1]) * BINS[2] + levels[2]
    rows = []
    for band in np.array_split(code, CELLS, axis=0):
        for cell in np.array_split(band, CELLS, axis=1):
            rows.append(np.bincount(cell.ravel(), minlength=int(np.prod(BINS))) / max(cell.size, 1))
    return np.stack(rows)


def _same_height(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"pictures of {one.shape[1]} and {other.shape[1]} pixels width cannot be compared")
    height = max(one.shape[0], other.shape[0])

    def continued(image: np.ndarray) -> np.ndarray:
        return np.pad(image, ((0, height - image.shape[0]), (0, 0), (0, 0)), constant_values=255)

    return continued(one), continued(other)


def text_match(reference: Sequence[TextLine], candidate: Sequence[TextLine], size: tuple[int, int]) -> TextMatch:
    """Match lines of text one to one, so that the sum of their similarity is greatest, and grade the matches.

    ``size (height, width)`` of the picture normalises positions.
    """
    if not reference and not candidate:
        return TextMatch(1.0, 1.0, 1.0)
    ratios = np.array([[_ratio(a.text, b.text) for b in candidate] for a in reference]).reshape(
        len(reference), len(candidate)
    )
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(-ratios), strict=True) if ratios[i, j] >= LEAST_RATIO]
    written = sum(len(line.text) for line in (*reference, *candidate))
    found = sum(len(reference[i].text) + len(candidate[j].text) for i, j in pairs)
    if not pairs:
        return TextMatch(0.0, 0.0, 0.0)
    near = [1.0 - _distance(reference[i], candidate[j], size) for i, j in pairs]
    return TextMatch(found / max(written, 1), float(np.mean([ratios[i, j] for i, j in pairs])), float(np.mean(near)))


def _ratio(one: str, other: str) -> float:
    return 1.0 if one == other else difflib.SequenceMatcher(None, one.lower(), other.lower(), autojunk=False).ratio()


def _distance(one: TextLine, other: TextLine, size: tuple[int, int]) -> float:
    """The larger of the horizontal and vertical distances of two lines' centres, as a share of the picture."""
    (ax, ay), (bx, by) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (one.box, other.box))
    return min(max(abs(ax - bx) / size[1], abs(ay - by) / size[0]), 1.0)
