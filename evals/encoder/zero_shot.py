"""Classes that are only named: the nearest text says what an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evals.encoder.classify import check
from evals.encoder.intervals import class_mean, share
from evals.statistics import Estimate

_CELLS = 1 << 24


@dataclass(frozen=True)
class ZeroShot:
    """``predicted (I,)`` classes; shares of images whose class is the nearest (``top1``) or among the five nearest
    (``top5``), and ``top1`` as the mean of the classes' shares, for sets whose classes are of unequal size."""

    predicted: Tensor
    top1: Estimate
    top5: Estimate
    class_mean: Estimate


def zero_shot(images: Tensor, labels: Tensor, classes: Tensor, names: Sequence[str] = ()) -> ZeroShot:
    """Classify ``images (I, E)`` by the nearest of ``classes (K, E)``, all of unit length (arXiv 2103.00020, 3.1).

    Of two classes equally near, the wrong one counts as nearer, so that towers which say the same of everything score
    0 and not by chance; classes of equal ``names`` are one.
    """
    check(images, labels, "zero-shot classification")
    if int(labels.max()) >= len(classes):
        raise ValueError(f"zero-shot classification: label {int(labels.max())} of {len(classes)} classes")
    if names and len(names) != len(classes):
        raise ValueError(f"zero-shot classification: {len(names)} names of {len(classes)} classes")
    group = torch.arange(len(classes))
    if names:
        first = {name: n for n, name in reversed(list(enumerate(names)))}
        group = torch.tensor([first[name] for name in names])
    ranks, predicted = [], []
    block = max(_CELLS // len(classes), 1)
    for rows, answers in zip(images.split(block), labels.split(block), strict=True):
        similarity = rows @ classes.T
        right = group[None] == group[answers][:, None]
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        nearer = (similarity >= best) & ~right
        ahead = torch.zeros(len(rows), len(classes), dtype=torch.int8)
        ahead.scatter_reduce_(1, group.expand(len(rows), -1), nearer.to(torch.int8), "amax")
        ranks.append(ahead.sum(dim=1))
        predicted.append(group[similarity.argmax(dim=1)])
    rank = torch.cat(ranks)
    return ZeroShot(torch.cat(predicted), share(rank < 1), share(rank < 5), class_mean(rank < 1, group[labels]))
