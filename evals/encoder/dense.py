"""What stands where, and how far away: linear probes over single patches, judged at the pixels of the map.

The protocol of DINOv2 (arXiv 2304.07193, 7.4): a linear layer on frozen patch features, its output upsampled
bilinearly to the map. Here the layer is fitted in closed form or by L-BFGS instead of by gradient steps, so that it has
no learning rate to tune: each patch counts with the commonest class, or the mean value, of the pixels under it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.encoder.classify import LinearProbe
from evals.encoder.intervals import of_sums
from evals.statistics import Estimate
from mmagent.geometry import patch_coordinates

IGNORE = -1
"""A pixel of a map of classes that belongs to none: it is neither fitted nor judged."""
_FAR = 1.25


def patch_means(values: np.ndarray, grid: Sequence[int], merge_size: int) -> Tensor:
    """Mean of the finite pixels of a ``(height, width)`` map under every patch of a still image, NaN where there are
    none, in the stream's order: ``(p,)`` fp32."""
    _, rows, cols = grid
    row = np.repeat(np.arange(rows), np.diff(np.linspace(0, values.shape[0], rows + 1).round().astype(int)))
    col = np.repeat(np.arange(cols), np.diff(np.linspace(0, values.shape[1], cols + 1).round().astype(int)))
    cell = ((row * cols)[:, None] + col).ravel()
    known = np.isfinite(values.ravel())
    sums = np.bincount(cell[known], values.ravel()[known].astype(np.float64), rows * cols)
    counts = np.bincount(cell[known], minlength=rows * cols)
    means = np.divide(sums, counts, out=np.full(rows * cols, np.nan), where=counts > 0).reshape(rows, cols)
    at = patch_coordinates(grid, merge_size)
    return torch.from_numpy(means.astype(np.float32))[at[:, 0], at[:, 1]]


def plane(values: Tensor, grid: Sequence[int], merge_size: int, size: Sequence[int]) -> Tensor:
    """``(p, K)`` values of the patches of a still image, in the stream's order, to ``(K, height, width)`` of ``size``,
    bilinear."""
    _, rows, cols = grid
    at = patch_coordinates(grid, merge_size)
    square = torch.empty(rows, cols, values.shape[1])
    square[at[:, 0], at[:, 1]] = values.float()
    return F.interpolate(square.permute(2, 0, 1)[None], tuple(size), mode="bilinear", align_corners=False)[0]


def predicted_classes(
    probe: LinearProbe, tokens: Tensor, grid: Sequence[int], merge_size: int, size: Sequence[int]
) -> np.ndarray:
    """``(height, width)`` int64: the class of every pixel, from upsampled logits."""
    return plane(probe(tokens), grid, merge_size, size).argmax(dim=0).numpy()


def predicted_values(
    probe: LinearProbe, tokens: Tensor, grid: Sequence[int], merge_size: int, size: Sequence[int]
) -> np.ndarray:
    """``(height, width)`` fp32: the value of every pixel."""
    return plane(probe(tokens), grid, merge_size, size)[0].numpy()


class SegmentationScore:
    """Sums over images, from which mIoU and accuracies follow. :data:`IGNORE` pixels do not count."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []  # (3, K of the image): pixels that are right, predicted, and there

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Two ``(height, width)`` maps of classes of one image."""
        if predicted.shape != truth.shape:
            raise ValueError(f"a prediction of {predicted.shape} for a map of {truth.shape}")
        known = truth != IGNORE
        predicted, truth = predicted[known], truth[known]
        classes = max(int(truth.max()), int(predicted.max())) + 1 if len(truth) else 0
        right = truth[predicted == truth]
        self._parts.append(np.stack([np.bincount(m, minlength=classes) for m in (right, predicted, truth)]))

    def scores(self) -> dict[str, Estimate]:
        """``miou``: intersection over union of a class, over all images (Everingham et al. 2010), averaged over the
        classes that occur in truth or prediction. ``class_accuracy``: share of a class's pixels that are right,
        averaged over the classes that occur in truth. ``pixel_accuracy``: share of all pixels. Images are drawn for the
        intervals."""
        parts = np.zeros((len(self._parts), 3, max((part.shape[1] for part in self._parts), default=0)))
        for n, part in enumerate(self._parts):
            parts[n, :, : part.shape[1]] = part
        return {
            "miou": of_sums(parts, lambda s: _class_mean(s[:, 0], s[:, 1] + s[:, 2] - s[:, 0])),
            "class_accuracy": of_sums(parts, lambda s: _class_mean(s[:, 0], s[:, 2])),
            "pixel_accuracy": of_sums(parts, lambda s: _ratio(s[:, 0].sum(axis=1), s[:, 2].sum(axis=1))),
        }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _class_mean(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    shares, there = _ratio(above, below), below > 0
    return _ratio(np.where(there, shares, 0.0).sum(axis=1), there.sum(axis=1).astype(np.float64))


class RegressionScore:
    """Sums over images, from which the errors of a map of values follow. Pixels that are not finite do not count."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Two ``(height, width)`` maps of one image."""
        if predicted.shape != truth.shape:
            raise ValueError(f"a prediction of {predicted.shape} for a map of {truth.shape}")
        known = np.isfinite(truth)
        y, z = truth[known].astype(np.float64), predicted[known].astype(np.float64)
        far = y > 0
        ratio = np.maximum(z[far], 1e-12) / y[far]
        near = (np.maximum(ratio, 1 / ratio) < _FAR).sum()
        self._parts.append(np.array([len(y), np.square(z - y).sum(), y.sum(), np.square(y).sum(), near, far.sum()]))

    def scores(self) -> dict[str, Estimate]:
        """Over all pixels of all images: ``rmse`` in the unit of the map, ``r2`` (1 is perfect, 0 is the mean of the
        truth), ``delta_1.25``: share of pixels of positive truth whose prediction is within a factor of 1.25 (Eigen et
        al., arXiv 1406.2283). Images are drawn for the intervals."""
        parts = np.stack(self._parts) if self._parts else np.zeros((0, 6))

        def r2(s: np.ndarray) -> np.ndarray:
            return 1.0 - _ratio(s[:, 1], s[:, 3] - _ratio(s[:, 2] ** 2, s[:, 0]))

        return {
            "rmse": of_sums(parts, lambda s: np.sqrt(_ratio(s[:, 1], s[:, 0]))),
            "r2": of_sums(parts, r2),
            "delta_1.25": of_sums(parts, lambda s: _ratio(s[:, 4], s[:, 5])),
        }


def sampled(count: int, most: int, seed: int) -> Tensor:
    """At most ``most`` of ``count`` rows, drawn by ``seed``, ascending: patches of one image are alike, and a probe
    needs few of each."""
    if count <= most:
        return torch.arange(count)
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(count, most, replace=False)))
