"""The built-in questions to an encoder, beside an untrained one: nothing is downloaded.

Semantics: nearest neighbours and a linear classifier over an image's summary. Texture and place: a linear classifier
over single patches. No picture is of the train split, so galleries never show one. The methods themselves, for any
data, are in :mod:`evals.encoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from evals.encoder.classify import knn_accuracy, linear_accuracy
from evals.encoder.features import Features, LabelledImages, extract
from mmagent.geometry import GeometryConfig, patch_labels
from mmagent.worlds.charts import draw_chart
from mmagent.worlds.digits import handwriting
from mmagent.worlds.icons import draw_icon
from mmagent.worlds.images import PHOTO_CAPTIONS, PHOTO_KINDS, crop_photo, draw_scene

Pair = tuple[LabelledImages, LabelledImages]


@dataclass(frozen=True)
class ProbeSets:
    """What :func:`probe_encoder` asks about, pairs of a training and a test set: ``digits`` written by hand
    (scikit-learn's), ``scenes`` of one plain shape, ``icons`` in the middle of a plain ground (of the harder ones small
    encoders know nothing), ``charts``, ``photographs`` (which of 16 a crop shows), and ``places``: scenes of several
    shapes with maps."""

    digits: Pair
    scenes: Pair
    icons: Pair
    charts: Pair
    photographs: Pair
    places: Pair


@lru_cache(maxsize=2)
def probe_sets(train: int = 600, test: int = 400, side: int = 112) -> ProbeSets:
    """Sets of ``train`` and ``test`` images of ``side`` pixels (digits are half as large, and at most 1000, shared in
    the same proportion). Everything is of the test split, but for the training crops of photographs: those are of the
    validation split, so that training and test crops share no pixel."""

    def both(draw: Callable[[int, int, bool], LabelledImages], first: int = 0) -> Pair:
        return draw(first, train, True), draw(first + train, test, False)

    def scenes(first: int, count: int, _: bool) -> LabelledImages:
        drawn = [draw_scene(seed, "test", (side, side), level=0) for seed in range(first, first + count)]
        labels = {q: torch.tensor([getattr(scene, q) for scene in drawn]) for q in ("shape", "colour")}
        return LabelledImages(tuple(scene.image for scene in drawn), labels, {})

    def places(first: int, count: int, _: bool) -> LabelledImages:
        drawn = [draw_scene(seed, "test", (side, side), level=2) for seed in range(first, first + count)]
        maps = {q: tuple(getattr(scene, q) for scene in drawn) for q in ("shapes", "materials")}
        return LabelledImages(tuple(scene.image for scene in drawn), {}, maps)

    def icons(first: int, count: int, _: bool) -> LabelledImages:
        drawn = [draw_icon(seed, "test", (side, side), level=0) for seed in range(first, first + count)]
        return LabelledImages(tuple(i.image for i in drawn), {"icon": torch.tensor([i.icon for i in drawn])}, {})

    def charts(first: int, count: int, _: bool) -> LabelledImages:
        drawn = [draw_chart(seed, "test", (side, side)) for seed in range(first, first + count)]
        labels, maps = {"chart": torch.tensor([c.kind for c in drawn])}, {"parts": tuple(c.regions() for c in drawn)}
        return LabelledImages(tuple(chart.image for chart in drawn), labels, maps)

    def photographs(first: int, count: int, fitted: bool) -> LabelledImages:
        split, kinds = "validation" if fitted else "test", PHOTO_KINDS
        crops = [crop_photo(n, kinds[n % len(kinds)], split, (side, side)) for n in range(first, first + count)]
        labels = {"photo": torch.tensor([PHOTO_CAPTIONS.index(crop.caption) for crop in crops])}
        return LabelledImages(tuple(crop.image for crop in crops), labels, {})

    return ProbeSets(
        _digits(train, test, side), both(scenes), both(icons), both(charts), both(photographs), both(places, 10**6)
    )


def _digits(train: int, test: int, side: int) -> Pair:
    written, known = handwriting("test")
    share = min(1.0, len(written) / (train + test))
    train, test = int(train * share), int(test * share)

    def half(chosen: slice) -> LabelledImages:
        grey = [np.kron(image * (255 / 16), np.ones((side // 16, side // 16))) for image in written[chosen]]
        images = tuple(np.repeat(image.astype(np.uint8)[..., None], 3, axis=2) for image in grey)
        return LabelledImages(images, {"digit": torch.from_numpy(known[chosen])}, {})

    return half(slice(0, train)), half(slice(train, train + test))


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

    Semantic: digits by nearest neighbours; shape and colour of a scene, icon, kind of chart and photograph by a linear
    classifier on the summary beside the mean of patches. Dense: shape and material of a scene and the part of a chart
    under every patch by a linear classifier. Until icons, charts and photographs came, the means of a
    :class:`ProbeReport` were over digit, shape, colour, shapes and materials alone: compare older figures score by
    score, not by their means.
    """
    geometry = replace(geometry, min_tokens=1)
    semantic: dict[str, float] = {}
    dense: dict[str, float] = {}
    train, test = (extract(encoder, part.images, geometry) for part in sets.digits)
    answers = [part.labels["digit"] for part in sets.digits]
    semantic["digit"] = knn_accuracy(train.pooled, answers[0], test.pooled, answers[1])
    for pair in (sets.scenes, sets.places, sets.icons, sets.charts, sets.photographs):
        both = [extract(encoder, part.images, geometry) for part in pair]
        whole = [features.whole("both") for features in both]
        for question in pair[0].labels:
            answers = [part.labels[question] for part in pair]
            semantic[question] = linear_accuracy(whole[0], answers[0], whole[1], answers[1])
        for question in pair[0].maps:
            answers = [
                _under_patches(part.maps[question], features, geometry)
                for part, features in zip(pair, both, strict=True)
            ]
            dense[question] = linear_accuracy(both[0].tokens, answers[0], both[1].tokens, answers[1])
    return {f"semantic/{name}": s for name, s in semantic.items()} | {f"dense/{name}": s for name, s in dense.items()}


def _under_patches(maps: Sequence[np.ndarray], features: Features, geometry: GeometryConfig) -> torch.Tensor:
    """``(P,)``: what most of every patch shows, in the order of its tokens."""
    known = zip(maps, features.grids.tolist(), strict=True)
    return torch.cat([patch_labels(truth, grid, geometry.merge_size) for truth, grid in known])


def probe_encoder(
    encoder: nn.Module, geometry: GeometryConfig, untrained: nn.Module, sets: ProbeSets | None = None
) -> ProbeReport:
    """Probe ``encoder`` beside ``untrained``, the same architecture with the weights it started from."""
    sets = sets or probe_sets()
    return ProbeReport(probe_scores(encoder, geometry, sets), probe_scores(untrained, geometry, sets))
