"""How far the score of a probe can be trusted: intervals over images, which are what a test set is a sample of."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evals.statistics import EMPTY, Estimate, wilson

RESAMPLES = 1000
_CELLS = 1 << 24


def share(correct: Tensor, confidence: float = 0.95) -> Estimate:
    """The share of true values among ``correct (N,)`` with Wilson's interval."""
    count = len(correct)
    if not count:
        return EMPTY
    right = int(correct.sum())
    return Estimate(right / count, *wilson(right, count, confidence), count)


def class_mean(correct: Tensor, labels: Tensor, confidence: float = 0.95) -> Estimate:
    """The mean over classes of their shares: each class weighs alike, however often it occurs. Both ``(N,)``.

    The interval puts Wilson's of the classes together by their distances from the shares (Zou and Donner, "Construction
    of confidence limits about effect measures", 2008): a bootstrap within classes would claim certainty where each of
    them is all right or all wrong.
    """
    parts = [share(correct[labels == one], confidence) for one in labels.unique()]
    if not parts:
        return EMPTY
    mean = sum(part.mean for part in parts) / len(parts)
    below, above = (
        math.sqrt(sum(distance**2 for distance in distances)) / len(parts)
        for distances in ([p.mean - p.low for p in parts], [p.high - p.mean for p in parts])
    )
    return Estimate(mean, max(mean - below, 0.0), min(mean + above, 1.0), len(labels))


def of_sums(
    parts: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A figure that is a function of sums over images, with a percentile bootstrap that draws whole images.

    Patches, pixels and captions of one image are not independent, so that to draw them singly would claim too much.
    ``parts (I, ...)`` holds each image's share of the sums; ``statistic`` turns sums ``(R, ...)`` into ``(R,)``.
    Resamples where it is not a number (a class that was not drawn) do not count.
    """
    count = len(parts)
    if not count:
        return EMPTY
    parts = np.asarray(parts, dtype=np.float64)
    flat = parts.reshape(count, -1)
    value = float(statistic(parts.sum(axis=0, keepdims=True))[0])
    random = np.random.default_rng(seed)
    drawn = []
    step = max(_CELLS // count, 1)
    for start in range(0, resamples, step):
        times = random.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        drawn.append(statistic((times.astype(np.float64) @ flat).reshape(len(times), *parts.shape[1:])))
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if not len(values) or not np.isfinite(value):
        return Estimate(value, value, value, count)
    low, high = np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Estimate(value, float(low), float(high), count)


def share_by_image(correct: Tensor, image: Tensor) -> Estimate:
    """The share of true values among ``correct (N,)``, answers that belong to ``image (N,)``: captions of one image
    are drawn together."""
    _, place = image.unique(return_inverse=True)
    groups = int(place.max()) + 1 if len(place) else 0
    parts = torch.zeros(groups, 2, dtype=torch.double)
    parts.index_add_(0, place, torch.stack([correct.double(), torch.ones_like(correct, dtype=torch.double)], dim=1))
    if groups and int(correct.sum()) in (0, len(correct)):  # every resample would be the same and claim certainty
        mean = float(correct.double().mean())
        return Estimate(mean, *wilson(mean * groups, groups), groups)
    return of_sums(parts.numpy(), lambda sums: sums[:, 0] / sums[:, 1])
