"""Classes read off features of images or patches: nearest neighbours and linear classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.encoder.features import bar

PENALTIES = tuple(10.0**k for k in range(-4, 5))
"""Ridge penalties tried, as multiples of the mean eigenvalue of the features' covariance."""
L2 = tuple(10.0**k for k in range(1, -7, -1))
"""Penalties of the logistic regression tried: ``penalty / 2 * |W|^2`` beside the mean loss of a row."""
_CELLS = 1 << 24  # of a similarity or a table of logits that stands in memory at once
_TRAIN_ROWS = 1 << 16
_DOUBLE = 1 << 26  # values of features up to which they are fitted in double precision


def check(features: Tensor, labels: Tensor, what: str) -> None:
    """Raises ``ValueError`` for an empty set, labels that are missing (negative) or of another number, or features that
    are not finite, naming the first such row."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{what}: features must be rows, and at least one; got {tuple(features.shape)}")
    if labels.shape != (len(features),):
        raise ValueError(f"{what}: {tuple(labels.shape)} labels for {len(features)} rows")
    if not (finite := features.isfinite().all(dim=1)).all():
        raise ValueError(f"{what}: the features of row {int(finite.int().argmin())} are not finite")
    if not labels.dtype.is_floating_point and int(labels.min()) < 0:
        raise ValueError(f"{what}: row {int((labels < 0).int().argmax())} has no label")


def knn_predict(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    *,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """``{k: (J,)}``: the class that the ``k`` nearest of ``train (I, W)`` vote for, for each of ``test (J, W)``.

    Neighbours are nearest by cosine after the mean of ``train`` was taken off both, and each vote weighs ``exp(cosine
    / temperature)`` (the protocol of DINO, arXiv 2104.14294; there without centring). Works through blocks of both
    sets, so that no more than 16 million similarities stand in memory. A ``k`` above I asks everyone.
    """
    check(train, train_labels, "nearest neighbours")
    if not ks or min(ks) < 1 or not temperature > 0:
        raise ValueError(f"nearest neighbours: k {tuple(ks)} and temperature {temperature} must be positive")
    centre = train.mean(dim=0)
    most, classes = min(max(ks), len(train)), int(train_labels.max()) + 1
    block = max(_CELLS // min(len(train), _TRAIN_ROWS), 1)
    block = max(min(block, _CELLS // classes), 1)
    found: dict[int, list[Tensor]] = {k: [torch.empty(0, dtype=torch.int64)] for k in ks}
    for asked in test.split(block):
        asked = F.normalize((asked - centre).to(device), dim=1)
        near = asked[:, :0]
        labels = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for rows, answers in zip(train.split(_TRAIN_ROWS), train_labels.split(_TRAIN_ROWS), strict=True):
            similarity = asked @ F.normalize((rows - centre).to(device), dim=1).T
            values, nearest = similarity.topk(min(most, len(rows)), dim=1)
            near, order = torch.cat([near, values], dim=1).sort(dim=1, descending=True, stable=True)
            labels = torch.cat([labels, answers.to(device)[nearest]], dim=1).gather(1, order)
            near, labels = near[:, :most], labels[:, :most]
        for k in ks:
            votes = torch.zeros(len(asked), classes, dtype=near.dtype, device=device)
            votes.scatter_add_(1, labels[:, :k], (near[:, :k] / temperature).exp())
            found[k].append(votes.argmax(dim=1).cpu())
    return {k: torch.cat(parts) for k, parts in found.items()}


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of ``test (J, W)`` that :func:`knn_predict` gets right."""
    check(test, test_labels, "nearest neighbours")
    predicted = knn_predict(train, train_labels, test, (k,), temperature)[k]
    return float((predicted == test_labels).float().mean())


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Share of ``test (J, W)`` that a linear classifier fitted on ``train (I, W)`` gets right.

    Ridge regression of every class against all others on standardised features; classes weigh alike, and so they do in
    the score, so that a common one (the background of a scene) does not decide. The penalty is the best of
    :data:`PENALTIES` on the last fifth of the training rows, which then join the fit.
    """
    check(train, train_labels, "linear classifier")
    check(test, test_labels, "linear classifier")
    mean, deviation = _moments(train)
    x, y = ((rows - mean).double() / deviation for rows in (train, test))
    kept = len(x) - len(x) // 5
    penalty = PENALTIES[len(PENALTIES) // 2]
    if kept < len(x):
        fit = _Ridge(x[:kept], train_labels[:kept])
        scores = [class_mean_accuracy(fit.predict(x[kept:], p), train_labels[kept:]) for p in PENALTIES]
        penalty = PENALTIES[int(np.argmax(scores))]
    return class_mean_accuracy(_Ridge(x, train_labels).predict(y, penalty), test_labels)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every column; one row has no deviation and counts as it is."""
    deviation = rows.std(dim=0) if len(rows) > 1 else torch.ones(rows.shape[1], dtype=rows.dtype)
    return rows.mean(dim=0), deviation.clamp_min(1e-6)


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
        damped = self.values.clamp_min(0.0) + penalty * self.values.mean().clamp_min(1e-12)
        return ((x - self.x_mean) @ (self.vectors @ (self.right / damped[:, None])) + self.y_mean).argmax(dim=1)


def class_mean_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy averaged over the classes that occur, so that the background does not decide."""
    classes = labels.unique()
    return float(torch.stack([(predicted[labels == c] == c).float().mean() for c in classes]).mean())


@dataclass(frozen=True)
class LinearProbe:
    """``x @ weight + bias`` of raw features: ``weight (W, K)``, ``bias (K,)``, and the ``penalty`` that was chosen."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, W)`` to ``(N, K)`` fp32."""
        return x.float() @ self.weight + self.bias

    def predict(self, x: Tensor) -> Tensor:
        """``(N, W)`` to ``(N,)`` classes; no table of all logits is made."""
        parts = [self(rows).argmax(dim=1) for rows in x.split(max(_CELLS // len(self.bias), 1))]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def fit_logistic(
    train: Tensor,
    labels: Tensor,
    classes: int = 0,
    *,
    penalties: Sequence[float] = L2,
    held_out: float = 0.2,
    seed: int = 0,
    max_steps: int = 200,
    device: torch.device | str = "cpu",
    progress: str = "",
    groups: Tensor | None = None,
) -> LinearProbe:
    """Multinomial logistic regression of ``labels (I,)`` on ``train (I, W)``: the linear probe of CLIP (arXiv
    2103.00020, A.3) and of the DINO family.

    Features are standardised by the training set's mean and deviation. Full-batch L-BFGS minimises the mean
    cross-entropy plus ``penalty / 2 * |W|^2`` (the intercept is free). The penalty is the one of ``penalties`` that is
    most often right on the ``held_out`` share of every class (of equals, the one of the lower loss there), drawn by
    ``seed``; then all rows are fitted. Penalties are tried from the strongest on, each from the solution of the one
    before, until two in a row did worse than the best. A class with a single row stays in the fit; where no class has
    two, the middle penalty is taken. Rows of one image are alike: with ``groups (I,)``, whose image a row is, whole
    groups are held out (:func:`whole_groups`), so that no row is judged by its neighbours. ``classes`` is K, should the
    training set lack the last ones. ``progress`` names a bar of the penalties tried, on stderr, which appears after two
    seconds.
    """
    check(train, labels, "linear probe")
    classes = max(classes, int(labels.max()) + 1)
    mean, deviation = _moments(train)
    dtype = torch.float64 if train.numel() <= _DOUBLE else torch.float32
    x = ((train - mean) / deviation).to(device, dtype)
    y = labels.to(device)
    penalties = sorted(penalties, reverse=True)
    chosen, start = penalties[len(penalties) // 2], None
    if groups is None:
        fitted, held = stratified(labels, held_out, seed)
    else:
        fitted, held = whole_groups(groups, held_out, seed, labels)
    if len(penalties) > 1 and len(held):
        best = (-1.0, -float("inf"))
        warm, worse = None, 0
        for penalty in bar(progress, len(penalties), "penalty", penalties):
            warm = _minimise(x[fitted], y[fitted], classes, penalty, warm, max_steps)
            score = _judged(x[held], y[held], warm)
            worse = 0 if score[0] >= best[0] else worse + 1
            if score > best:
                best, chosen, start = score, penalty, warm
            if worse == 2:
                break
    solution = _minimise(x, y, classes, chosen, start, max_steps).cpu()
    weight = solution[:-1] / deviation[:, None].to(dtype)
    bias = solution[-1] - mean.to(dtype) @ weight
    return LinearProbe(weight.float(), bias.float(), chosen)


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows held out, ascending: about ``share`` of every class is held out, at least one row of a class
    that has two, and never the last."""
    random = np.random.default_rng(seed)
    order = torch.from_numpy(random.permutation(len(labels)))
    ranked = order[labels[order].argsort(stable=True)]
    _, counts = labels.unique(return_counts=True)
    held = []
    for rows in ranked.split(counts.tolist()):
        held.append(rows[: min(max(int(share * len(rows)), 1), len(rows) - 1)])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.cat(held)] = True
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


def whole_groups(groups: Tensor, share: float, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows held out, ascending, of which no two are of one group of ``groups (I,)``: about ``share`` of
    the groups is held out, at least one of two, drawn by ``seed``. A group that has the last rows of one of the classes
    ``labels (I,)`` stays in the fit. Nothing is held out where that leaves no group, or there is only one."""
    order = groups.argsort(stable=True)
    _, counts = groups.unique(return_counts=True)
    rows = order.split(counts.tolist())
    most = min(max(int(share * len(rows)), 1), len(rows) - 1)
    left = labels.bincount() if labels is not None else None
    out = torch.zeros(len(groups), dtype=torch.bool)
    held = 0
    for n in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if held >= most:
            break
        if labels is not None and left is not None:
            own, times = labels[rows[n]].unique(return_counts=True)
            if (left[own] == times).any():
                continue
            left[own] -= times
        out[rows[n]] = True
        held += 1
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


def _minimise(x: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None, max_steps: int) -> Tensor:
    """``(W + 1, K)``: weights, and the intercepts in the last row."""
    solution = torch.zeros(x.shape[1] + 1, classes, dtype=x.dtype, device=x.device) if start is None else start.clone()
    solution.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=max_steps, max_eval=2 * max_steps, history_size=10, tolerance_grad=1e-6,
        tolerance_change=1e-10, line_search_fn="strong_wolfe",
    )  # fmt: skip

    @torch.no_grad()
    def closure() -> Tensor:
        weight, bias = solution[:-1], solution[-1]
        gradient = torch.zeros_like(solution)
        loss = torch.zeros((), dtype=x.dtype, device=x.device)
        for rows, answers in _blocks(x, labels, classes):
            chances = torch.log_softmax(rows @ weight + bias, dim=1)
            loss -= chances.gather(1, answers[:, None]).sum() / len(x)
            error = chances.exp_()
            error[torch.arange(len(rows), device=x.device), answers] -= 1.0
            gradient[:-1] += rows.T @ error / len(x)
            gradient[-1] += error.sum(dim=0) / len(x)
        gradient[:-1] += penalty * weight
        solution.grad = gradient
        return loss + penalty / 2 * weight.square().sum()

    optimizer.step(closure)
    return solution.detach()


def _blocks(x: Tensor, labels: Tensor, classes: int) -> list[tuple[Tensor, Tensor]]:
    rows = max(_CELLS // classes, 1)
    return list(zip(x.split(rows), labels.split(rows), strict=True))


def _judged(x: Tensor, labels: Tensor, solution: Tensor) -> tuple[float, float]:
    """Share of rows that are right, and the mean of their log-likelihood."""
    right, likelihood = 0, 0.0
    for rows, answers in _blocks(x, labels, solution.shape[1]):
        logits = rows @ solution[:-1] + solution[-1]
        right += int((logits.argmax(dim=1) == answers).sum())
        likelihood -= float(F.cross_entropy(logits, answers, reduction="sum"))
    return right / len(x), likelihood / len(x)


def fit_ridge(
    train: Tensor, targets: Tensor, *, device: torch.device | str = "cpu", groups: Tensor | None = None
) -> LinearProbe:
    """Ridge regression of ``targets (N,)`` on ``train (N, W)``, standardised; the intercept is free.

    The penalty is the one of :data:`PENALTIES` with the least squared error on every fifth row, or with ``groups (N,)``
    on a fifth of the groups (:func:`whole_groups`), left out of a first fit; the middle one where there is no such row.
    """
    check(train, targets, "regression")
    if not targets.isfinite().all():
        raise ValueError(f"regression: the target of row {int(targets.isfinite().int().argmin())} is not finite")
    mean, deviation = _moments(train)
    x, y = ((train - mean) / deviation).to(device, torch.float64), targets.to(device, torch.float64)
    held = torch.arange(len(x)) % 5 == 4
    if groups is not None:
        held = torch.zeros(len(x), dtype=torch.bool).index_fill(0, whole_groups(groups, 0.2, 0)[1], True)
    held = held.to(x.device)
    chosen = PENALTIES[len(PENALTIES) // 2]
    if held.any():
        solutions = _ridge_path(x[~held], y[~held])
        errors = [float((x[held] @ w + b - y[held]).square().mean()) for w, b in solutions]
        chosen = PENALTIES[int(np.argmin(errors))]
    weight, bias = (value.cpu() for value in _ridge_path(x, y)[PENALTIES.index(chosen)])
    weight = weight / deviation.double()
    return LinearProbe(weight[:, None].float(), (bias - mean.double() @ weight)[None].float(), chosen)


def _ridge_path(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights and intercept for each of :data:`PENALTIES`."""
    x_mean, y_mean = x.mean(dim=0), y.mean()
    centred = x - x_mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    right = vectors.T @ (centred.T @ (y - y_mean)) / len(x)
    out = []
    for penalty in PENALTIES:
        damped = values.clamp_min(0.0) + penalty * values.mean().clamp_min(1e-12)
        weight = vectors @ (right / damped)
        out.append((weight, y_mean - x_mean @ weight))
    return out
