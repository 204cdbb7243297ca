"""Which patches a student may not see: exactly the asked share of every image, in blocks or scattered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmagent.geometry import patch_coordinates

STYLES = ("block", "uniform")


@dataclass
class MaskConfig:
    """``ratio`` of an image's patches to hide, in rectangular blocks or uniformly scattered. ``unit`` is the side of
    what is hidden as a whole, in patches: 1, or the merge size to hide visual tokens."""

    ratio: float = 0.35
    style: str = "block"
    unit: int = 2

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"mask style {self.style!r} is none of {STYLES}")
        if not 0.0 <= self.ratio < 1.0 or self.unit < 1:
            raise ValueError(f"mask: ratio must lie in [0, 1) and unit be positive, got {self}")


def mask_patches(grid: Sequence[int], merge_size: int, config: MaskConfig, random: np.random.Generator) -> Tensor:
    """``(p,)`` bool in the stream's merge-block-major order; exactly ``round(ratio * p)`` are true.

    Whole units are hidden as long as they fit; what is left of the count is taken from one further unit, so that the
    share is exact whatever the grid. Frames of a clip share one mask.
    """
    frames, rows, cols = grid
    if rows % config.unit or cols % config.unit:
        raise ValueError(f"grid {rows}x{cols} is not a multiple of the mask unit {config.unit}")
    count = round(config.ratio * rows * cols)
    unit_rows, unit_cols = rows // config.unit, cols // config.unit
    order = _block_order if config.style == "block" else _uniform_order
    units = order(unit_rows, unit_cols, -(-count // config.unit**2), random)
    plane = np.zeros((rows, cols), dtype=bool)
    left = count
    for unit in units.tolist():
        top, side = unit // unit_cols * config.unit, unit % unit_cols * config.unit
        cells = np.arange(config.unit**2) if left >= config.unit**2 else random.permutation(config.unit**2)[:left]
        plane[top + cells // config.unit, side + cells % config.unit] = True
        left -= len(cells)
    coordinates = patch_coordinates((1, rows, cols), merge_size)
    return torch.from_numpy(plane)[coordinates[:, 0], coordinates[:, 1]].repeat(frames)


def _uniform_order(rows: int, cols: int, count: int, random: np.random.Generator) -> np.ndarray:
    return random.permutation(rows * cols)[:count]


def _block_order(rows: int, cols: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Rectangles of random place, area and aspect (0.3 to 3.3) until ``count`` cells are covered; the last rectangle is
    cut to fit, in reading order. The rectangles are those of BEiT (arXiv 2106.08254, algorithm 1)."""
    chosen = np.zeros(rows * cols, dtype=bool)
    order: list[int] = []
    smallest = min(max(rows * cols // 16, 1), count)
    while len(order) < count:
        area = int(random.integers(smallest, max(smallest, count - len(order)) + 1))
        aspect = float(np.exp(random.uniform(np.log(0.3), np.log(1 / 0.3))))
        height = min(max(round((area * aspect) ** 0.5), 1), rows)
        width = min(max(round((area / aspect) ** 0.5), 1), cols)
        top, side = int(random.integers(rows - height + 1)), int(random.integers(cols - width + 1))
        cells = ((top + np.arange(height))[:, None] * cols + side + np.arange(width)[None, :]).reshape(-1)
        fresh = cells[~chosen[cells]][: count - len(order)]
        chosen[fresh] = True
        order.extend(fresh.tolist())
    return np.asarray(order[:count], dtype=np.int64)
