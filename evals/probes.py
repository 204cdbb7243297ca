"""What an encoder knows, read off its frozen features by methods too simple to add anything.

Semantics: k nearest neighbours and a linear classifier over an image's summary. Texture and place: a linear classifier
over single patches. After alignment: zero-shot classification and retrieval. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.geometry import GeometryConfig, patch_labels, patchify
from mmagent.protocols import VisionEncoder
from mmagent.types import PackedVision
from mmagent.worlds.images import draw_scene

PENALTIES = tuple(10.0**k for k in range(-4, 5))
"""Ridge penalties tried, as multiples of the mean eigenvalue of the features' covariance."""


@dataclass(frozen=True)
class LabelledImages:
    """``images`` of ``(height, width, 3)`` uint8; ``labels {question: (I,)}`` int64, an answer an image; ``maps
    {question: I of (height, width)}`` int64, an answer a pixel."""

    images: tuple[np.ndarray, ...]
    labels: Mapping[str, Tensor]
    maps: Mapping[str, tuple[np.ndarray, ...]]

    def __post_init__(self) -> None:
        for question, answers in {**self.labels, **self.maps}.items():
            if len(answers) != len(self.images):
                raise ValueError(f"{question}: {len(answers)} answers for {len(self.images)} images")


@dataclass(frozen=True)
class Features:
    """``pooled (I, W)``, ``means (I, W)`` of patches, ``tokens (P, W)`` of all images, their ``grids (I, 3)``; fp32."""

    pooled: Tensor
    means: Tensor
    tokens: Tensor
    grids: Tensor


@torch.no_grad()
def extract(
    encoder: nn.Module, images: Sequence[np.ndarray], geometry: GeometryConfig, patches_per_pack: int = 4096
) -> Features:
    """Frozen features of images, on the host, packed under a patch budget."""
    assert isinstance(encoder, VisionEncoder)
    device = next(encoder.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    with _evaluating(encoder):
        for pack in _packs(images, geometry, patches_per_pack):
            features = encoder(pack.to(device))
            tokens, pooled = features.tokens.float().cpu(), features.pooled.float().cpu()
            means = torch.stack([t.mean(dim=0) for t in tokens.split(pack.grids.prod(dim=1).tolist())])
            parts.append((pooled, means, tokens, pack.grids))
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _packs(images: Sequence[np.ndarray], geometry: GeometryConfig, budget: int) -> Iterator[PackedVision]:
    waiting = []
    for image in images:
        patched = patchify(image, geometry)
        if waiting and sum(w.patches.shape[0] for w in waiting) + patched.patches.shape[0] > budget:
            yield PackedVision.pack(waiting)
            waiting = []
        waiting.append(patched)
    if waiting:
        yield PackedVision.pack(waiting)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


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


@dataclass(frozen=True)
class ProbeSets:
    """What :func:`probe_encoder` asks about: ``digits`` written by hand (scikit-learn's), ``scenes`` of one plain
    shape, and ``places``: scenes of several shapes with maps. Pairs of a training and a test set, never trained on."""

    digits: tuple[LabelledImages, LabelledImages]
    scenes: tuple[LabelledImages, LabelledImages]
    places: tuple[LabelledImages, LabelledImages]


@lru_cache(maxsize=2)
def probe_sets(train: int = 600, test: int = 400, side: int = 112) -> ProbeSets:
    """Sets of ``train`` and ``test`` images of ``side`` pixels (digits are half as large)."""

    def scenes(first: int, count: int, level: int) -> LabelledImages:
        drawn = [draw_scene(seed, "test", (side, side), level) for seed in range(first, first + count)]
        labels = {q: torch.tensor([getattr(scene, q) for scene in drawn]) for q in ("shape", "colour")}
        maps = {q: tuple(getattr(scene, q) for scene in drawn) for q in ("shapes", "materials")}
        return LabelledImages(tuple(scene.image for scene in drawn), labels, maps)

    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))

    def written(chosen: np.ndarray) -> LabelledImages:
        grey = [np.kron(digits.images[n] * (255 / 16), np.ones((side // 16, side // 16))) for n in chosen]
        images = tuple(np.repeat(image.astype(np.uint8)[..., None], 3, axis=2) for image in grey)
        return LabelledImages(images, {"digit": torch.from_numpy(digits.target[chosen])}, {})

    return ProbeSets(
        (written(order[:train]), written(order[train : train + test])),
        (scenes(0, train, 0), scenes(train, test, 0)),
        (scenes(10**6, train, 2), scenes(10**6 + train, test, 2)),
    )


@dataclass(frozen=True)
class ProbeReport:
    """Accuracies in [0, 1] by ``"semantic/..."`` and ``"dense/..."``, and those of the same encoder untrained."""

    scores: Mapping[str, float]
    untrained: Mapping[str, float]

    def mean(self, group: str, untrained: bool = False) -> float:
        """Mean of one group of scores, "semantic" or "dense"."""
        scores = self.untrained if untrained else self.scores
        chosen = [value for name, value in scores.items() if name.startswith(f"{group}/")]
        return sum(chosen) / len(chosen)

    def overall(self, untrained: bool = False) -> float:
        """The mean of both groups, which weigh alike."""
        return (self.mean("semantic", untrained) + self.mean("dense", untrained)) / 2

    def table(self) -> str:
        """For people."""
        lines = [f"{'probe':<18} trained  untrained"]
        lines += [f"{name:<18} {value:7.3f}  {self.untrained[name]:9.3f}" for name, value in self.scores.items()]
        for name in ("semantic", "dense"):
            lines.append(f"{'mean ' + name:<18} {self.mean(name):7.3f}  {self.mean(name, untrained=True):9.3f}")
        return "\n".join([*lines, f"{'overall':<18} {self.overall():7.3f}  {self.overall(untrained=True):9.3f}"])


def probe_scores(encoder: nn.Module, geometry: GeometryConfig, sets: ProbeSets) -> dict[str, float]:
    """All accuracies of one encoder.

    Semantic: digits by nearest neighbours; the shape of a scene and its colour by a linear classifier on
    the summary beside the mean of patches. Dense: shape and material under every patch by a linear classifier.
    """
    geometry = replace(geometry, min_tokens=1)
    scores: dict[str, float] = {}
    train, test = (extract(encoder, part.images, geometry) for part in sets.digits)
    answers = [part.labels["digit"] for part in sets.digits]
    scores["semantic/digit"] = knn_accuracy(train.pooled, answers[0], test.pooled, answers[1])
    train, test = (extract(encoder, part.images, geometry) for part in sets.scenes)
    whole = [torch.cat([features.pooled, features.means], dim=1) for features in (train, test)]
    for question in sets.scenes[0].labels:
        answers = [part.labels[question] for part in sets.scenes]
        scores[f"semantic/{question}"] = linear_accuracy(whole[0], answers[0], whole[1], answers[1])
    both = [extract(encoder, part.images, geometry) for part in sets.places]
    for question in sets.places[0].maps:
        answers = [
            torch.cat(
                [
                    patch_labels(m, g, geometry.merge_size)
                    for m, g in zip(p.maps[question], f.grids.tolist(), strict=True)
                ]
            )
            for p, f in zip(sets.places, both, strict=True)
        ]
        scores[f"dense/{question}"] = linear_accuracy(both[0].tokens, answers[0], both[1].tokens, answers[1])
    return scores


def probe_encoder(
    encoder: nn.Module, geometry: GeometryConfig, untrained: nn.Module, sets: ProbeSets | None = None
) -> ProbeReport:
    """Probe ``encoder`` beside ``untrained``, the same architecture with the weights it started from."""
    sets = sets or probe_sets()
    return ProbeReport(probe_scores(encoder, geometry, sets), probe_scores(untrained, geometry, sets))


def retrieval(images: Tensor, texts: Tensor, k: int = 1) -> dict[str, float]:
    """Share of pairs ``(N, E)``, ``(N, E)`` of unit vectors whose partner is among the ``k`` nearest, both ways.

    Texts that occur twice count as found when any of their equals is.
    """
    similarity = images @ texts.T
    same_text = (texts @ texts.T) > 1 - 1e-5
    found_text = same_text.gather(1, similarity.topk(k, dim=1).indices).any(dim=1)
    found_image = same_text.gather(1, similarity.T.topk(k, dim=1).indices).any(dim=1)
    return {
        f"image_to_text@{k}": float(found_text.float().mean()),
        f"text_to_image@{k}": float(found_image.float().mean()),
    }


def zero_shot_accuracy(images: Tensor, labels: Tensor, classes: Tensor) -> float:
    """Share of ``images (I, E)`` nearest to the text of their class, ``classes (K, E)``, all of unit length."""
    return float(((images @ classes.T).argmax(dim=1) == labels).float().mean())
