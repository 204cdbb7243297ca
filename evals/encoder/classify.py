"""Classes read off features of images or patches: nearest neighbours and linear classifiers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = tuple(10.0**k for k in range(-4, 5))
"""Ridge penalties tried, as multiples of the mean eigenvalue of the features' covariance."""


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of ``test (J, W)`` whose ``k`` nearest of ``train (I, W)`` by cosine vote for the right class, each vote
    weighing ``exp(cosine / temperature)`` (the protocol of DINO, arXiv 2104.14294). Features are centred first."""
    centre = train.mean(dim=0)
    train, test = F.normalize(train - centre, dim=1), F.normalize(test - centre, dim=1)
    similarity, nearest = (test @ train.T).topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
    return float((votes.argmax(dim=1) == test_labels).float().mean())


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Share of ``test (J, W)`` that a linear classifier fitted on ``train (I, W)`` gets right.

    Ridge regression of every class against all others on standardised features; classes weigh alike, and so they do in
    the score, so that a common one (the background of a scene) does not decide. The penalty is the best of
    :data:`PENALTIES` on the last fifth of the training rows, which then join the fit.
    """
    mean, deviation = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    x, y = ((rows - mean).double() / deviation for rows in (train, test))
    kept = len(x) - len(x) // 5
    fit = _Ridge(x[:kept], train_labels[:kept])
    scores = [class_mean_accuracy(fit.predict(x[kept:], p), train_labels[kept:]) for p in PENALTIES]
    return class_mean_accuracy(_Ridge(x, train_labels).predict(y, PENALTIES[int(np.argmax(scores))]), test_labels)


class _Ridge:
    """Class-balanced least squares with an unpenalised intercept, for any penalty from one eigendecomposition."""

    def __init__(self, x: Tensor, labels: Tensor):
        counts = labels.bincount().double()
        weight = (1.0 / counts[labels])[:, None]
        weight = weight / weight.sum()
        targets = F.one_hot(labels).double()
        self.x_mean, self.y_mean = (weight * x).sum(dim=0), (weight * targets).sum(dim=0)
        centred = x - self.x_mean
        self.values, self.vectors = torch.linalg.eigh(centred.T @ (weight * centred))
        self.right = self.vectors.T @ (centred.T @ (weight * (targets - self.y_mean)))

    def predict(self, x: Tensor, penalty: float) -> Tensor:
        """``(N, W)`` to ``(N,)`` classes."""
        damped = self.values.clamp_min(0.0) + penalty * self.values.mean()
        return ((x - self.x_mean) @ (self.vectors @ (self.right / damped[:, None])) + self.y_mean).argmax(dim=1)


def class_mean_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy averaged over the classes that occur, so that the background does not decide."""
    classes = labels.unique()
    return float(torch.stack([(predicted[labels == c] == c).float().mean() for c in classes]).mean())
