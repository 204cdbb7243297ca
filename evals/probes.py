"""The built-in questions to an encoder, beside an untrained one: nothing is downloaded.

Semantics: nearest neighbours and a linear classifier over an image's summary. Texture and place: a linear classifier
over single patches. The methods themselves, for any data, are in :mod:`evals.encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from evals.encoder.classify import knn_accuracy, linear_accuracy
from evals.encoder.features import LabelledImages, extract
from mmagent.geometry import GeometryConfig, patch_labels
from mmagent.worlds.images import draw_scene


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
