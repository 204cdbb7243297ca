"""All probes of one encoder on one set of images, read twice: once to fit, once to judge.

Images are never all in memory, nor are their patches: of the training images a sample of patches is kept, and a map is
judged as soon as its image was looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.encoder.classify import LinearProbe, fit_logistic, fit_ridge, knn_predict
from evals.encoder.dense import (
    RegressionScore,
    SegmentationScore,
    patch_means,
    predicted_classes,
    predicted_values,
    sampled,
)
from evals.encoder.features import Features, ImageFeatures, Whole, stream_features
from evals.encoder.intervals import class_mean, share
from evals.encoder.retrieval import retrieval
from evals.encoder.zero_shot import zero_shot
from evals.statistics import Estimate
from mmagent.geometry import GeometryConfig, patch_labels, resize

Probe = Literal["knn", "linear", "dense", "zero-shot", "retrieval"]
PROBES: tuple[Probe, ...] = ("knn", "linear", "dense", "zero-shot", "retrieval")
_THUMB = 180  # pixels on the longer side of a picture that is kept to be shown
_TEXTS = 256  # texts, or images, that two towers embed at once


@dataclass(frozen=True)
class Example:
    """One image ``(height, width, 3)`` uint8 with what is known of it: its class, captions, ``mask (h, w)`` int64 of
    classes (-1: none) and ``depth (h, w)`` of values (NaN: unknown), in the same frame at any resolution."""

    key: str
    image: np.ndarray
    label: int | None = None
    captions: tuple[str, ...] = ()
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None


@dataclass(frozen=True)
class Examples:
    """A set that can be read again and again, always in one order. ``name`` is how errors and progress call it,
    ``total`` about how many there are, ``classes`` are names of the labels where they have some."""

    name: str
    read: Callable[[], Iterable[Example]]
    total: int
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probing:
    """What is asked and how. ``whole``: what the linear probe reads; neighbours are sought by the summary, as is usual.
    ``patches_per_image`` at most, and ``patches`` in all (or one an image, where that is more), are kept of training
    images for dense probes. ``pictures``: test images kept to show."""

    probes: tuple[Probe, ...] = PROBES
    ks: tuple[int, ...] = (20,)
    temperature: float = 0.07
    whole: Whole = "both"
    patches_per_pack: int = 8192
    patches_per_image: int = 64
    patches: int = 200_000
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    pictures: int = 12
    progress: bool = True


@dataclass
class Shown:
    """A test image, small, with the truth and what probes say: ``predicted {probe: class}``, maps as they come."""

    key: str
    image: np.ndarray
    label: int | None
    mask: np.ndarray | None
    depth: np.ndarray | None
    predicted: dict[str, int] = field(default_factory=dict)
    predicted_mask: np.ndarray | None = None
    predicted_depth: np.ndarray | None = None


@dataclass
class Measured:
    """``scores`` by name, ``facts`` about how they came about, and some images by key."""

    scores: dict[str, Estimate] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    shown: dict[str, Shown] = field(default_factory=dict)

    def with_(self, other: Measured) -> Measured:
        """Both, of the same test images."""
        shown = {**other.shown, **self.shown}
        for key, one in other.shown.items():
            shown[key].predicted |= one.predicted
        return Measured(self.scores | other.scores, self.facts | other.facts, shown)


class ImageText(Protocol):
    """Two towers that put images and texts into one space."""

    def embed_images(self, images: Sequence[np.ndarray]) -> Tensor: ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...


@dataclass
class _Seen:
    """What one reading of a set leaves: ``features`` without patches, ``labels (I,)`` (-1: none), and keys."""

    features: Features
    labels: Tensor
    keys: list[str]


def measure(encoder: nn.Module, geometry: GeometryConfig, train: Examples, test: Examples, how: Probing) -> Measured:
    """Neighbours, linear and dense probes of ``encoder``, as far as ``how.probes`` asks for them.

    Dense probes follow the maps: of classes ``segmentation``, of values ``depth``. Raises ``ValueError`` naming the
    set where it has no usable image, or no answer that a probe needs.
    """
    out = Measured()
    if not {"knn", "linear", "dense"} & set(how.probes):
        return out
    patches = _Patches(geometry.merge_size, how, train.total)
    fit = _read(encoder, geometry, train, how, patches.keep if "dense" in how.probes else None)
    judge = _Judge(geometry.merge_size, *(patches.fit(train.name) if "dense" in how.probes else (None, None)))

    def each(n: int, example: Example, features: ImageFeatures) -> None:
        shown = _shown(example) if _is_shown(n, test.total, how.pictures) else None
        judge(example, features, shown)
        if shown is not None:
            out.shown[shown.key] = shown

    seen = _read(encoder, geometry, test, how, each)
    if {"knn", "linear"} & set(how.probes):
        _classify(fit, seen, train, test, how, out)
    if "dense" in how.probes:
        out.scores |= judge.scores(test.name)
        out.facts |= judge.facts()
    return out


def _read(
    encoder: nn.Module,
    geometry: GeometryConfig,
    examples: Examples,
    how: Probing,
    each: Callable[[int, Example, ImageFeatures], None] | None,
) -> _Seen:
    waiting: deque[Example] = deque()

    def images() -> Iterator[tuple[str, np.ndarray]]:
        for example in examples.read():
            waiting.append(example)
            yield example.key, example.image

    rows: list[ImageFeatures] = []
    labels, keys = [], []
    looked = stream_features(
        encoder, images(), geometry, how.patches_per_pack, dtype=how.dtype, tokens="dense" in how.probes,
        progress=examples.name if how.progress else "", total=examples.total,
    )  # fmt: skip
    for n, row in enumerate(looked):
        example = waiting.popleft()
        if each is not None:
            each(n, example, row)
        rows.append(ImageFeatures(row.name, row.pooled, row.mean, row.tokens[:0].clone(), row.grid))
        labels.append(-1 if example.label is None else example.label)
        keys.append(example.key)
    if not rows:
        raise ValueError(f"{examples.name}: there is no image that can be used")
    features = Features(
        torch.stack([row.pooled for row in rows]),
        torch.stack([row.mean for row in rows]),
        rows[0].tokens,
        torch.tensor([row.grid for row in rows]),
    )
    return _Seen(features, torch.tensor(labels), keys)


def _classify(fit: _Seen, seen: _Seen, train: Examples, test: Examples, how: Probing, out: Measured) -> None:
    known, asked = fit.labels >= 0, seen.labels >= 0
    for name, there in ((train.name, known), (test.name, asked)):
        if not there.any():
            raise ValueError(f"{name}: no image has a label, which nearest neighbours and linear probes need")
    answers, truth = fit.labels[known], seen.labels[asked]
    classes = max(len(train.classes), int(fit.labels.max()) + 1, int(seen.labels.max()) + 1)
    commonest = float((truth == answers.bincount().argmax()).double().mean())
    out.facts["images"] = f"{len(answers)} to fit, {len(truth)} to judge"
    out.facts["classes"] = f"{len(answers.unique())}; the commonest is right {commonest:.1%} of the time"
    predicted: dict[str, Tensor] = {}
    if "knn" in how.probes:
        rows, asked_rows = fit.features.pooled[known], seen.features.pooled
        votes = knn_predict(rows, answers, asked_rows, how.ks, how.temperature, device=how.device)
        predicted |= {f"knn@{k}": vote for k, vote in votes.items()}
    if "linear" in how.probes:
        told = f"{train.name}: linear probe" if how.progress else ""
        rows = fit.features.whole(how.whole)[known]
        probe = fit_logistic(rows, answers, classes, device=how.device, progress=told)
        out.facts["linear"] = f"penalty {probe.penalty:g}, chosen on a fifth of the training images"
        predicted["linear"] = probe.predict(seen.features.whole(how.whole))
    for name, vote in predicted.items():
        right = vote[asked] == truth
        out.scores[name] = share(right)
        if name == "linear" and len({int(n) for n in truth.bincount() if n}) > 1:
            out.scores["linear/class mean"] = class_mean(right, truth)
        for key, one in zip(seen.keys, vote.tolist(), strict=True):
            if key in out.shown:
                out.shown[key].predicted[name] = one


class _Patches:
    """A sample of the training images' patches with what lies under them, and of which image they are."""

    def __init__(self, merge_size: int, how: Probing, images: int):
        self.merge_size, self.how = merge_size, how
        self.most = min(how.patches_per_image, max(how.patches // max(images, 1), 1))
        self.classes: list[tuple[Tensor, Tensor, Tensor]] = []
        self.values: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(self, n: int, example: Example, features: ImageFeatures) -> None:
        if example.mask is not None:
            self._add(self.classes, n, features, patch_labels(example.mask, features.grid, self.merge_size))
        if example.depth is not None:
            self._add(self.values, n, features, patch_means(example.depth, features.grid, self.merge_size))

    def _add(self, into: list[tuple[Tensor, Tensor, Tensor]], n: int, features: ImageFeatures, truth: Tensor) -> None:
        known = (truth.isfinite() if truth.is_floating_point() else truth >= 0).nonzero()[:, 0]
        chosen = known[sampled(len(known), self.most, n)]
        into.append((features.tokens[chosen], truth[chosen], torch.full_like(chosen, n)))

    def fit(self, name: str) -> tuple[LinearProbe | None, LinearProbe | None]:
        """Of classes and of values, as far as there are any."""
        found = []
        for kept in (self.classes, self.values):
            there = any(len(truth) for _, truth, _ in kept)
            found.append([torch.cat(column) for column in zip(*kept, strict=True)] if there else None)
        classes, values = found
        if classes is None and values is None:
            raise ValueError(f"{name}: no image has a map of classes or of distances, which dense probes need")
        told, device = f"{name}: segmentation" if self.how.progress else "", self.how.device
        return (
            None if classes is None else fit_logistic(*classes[:2], groups=classes[2], device=device, progress=told),
            None if values is None else fit_ridge(*values[:2], groups=values[2], device=device),
        )


class _Judge:
    """Maps of test images, each judged as it comes."""

    def __init__(self, merge_size: int, classes: LinearProbe | None, values: LinearProbe | None):
        self.merge_size, self.classes, self.values = merge_size, classes, values
        self.segmentation, self.regression = SegmentationScore(), RegressionScore()

    def __call__(self, example: Example, features: ImageFeatures, shown: Shown | None) -> None:
        if self.classes is not None and example.mask is not None:
            shape = example.mask.shape
            mask = predicted_classes(self.classes, features.tokens, features.grid, self.merge_size, shape)
            self.segmentation.add(mask, example.mask)
            if shown is not None:
                shown.predicted_mask = _small(mask)
        if self.values is not None and example.depth is not None:
            shape = example.depth.shape
            depth = predicted_values(self.values, features.tokens, features.grid, self.merge_size, shape)
            self.regression.add(depth, example.depth)
            if shown is not None:
                shown.predicted_depth = _small(depth)

    def scores(self, name: str) -> dict[str, Estimate]:
        out: dict[str, Estimate] = {}
        for kind, probe, score in (
            ("segmentation", self.classes, self.segmentation),
            ("depth", self.values, self.regression),
        ):
            found = score.scores() if probe is not None else {}
            if found and not any(value.n for value in found.values()):
                raise ValueError(f"{name}: no image has a map to judge {kind} by")
            out |= {f"{kind}/{what}": value for what, value in found.items()}
        return out

    def facts(self) -> dict[str, str]:
        probes = {"segmentation": self.classes, "depth": self.values}
        chosen = "chosen on a fifth of the training images"
        return {name: f"penalty {probe.penalty:g}, {chosen}" for name, probe in probes.items() if probe is not None}


def measure_towers(model: ImageText, test: Examples, classes: Tensor | None, how: Probing) -> Measured:
    """Zero-shot classification by ``classes (K, E)``, the embedded names of ``test.classes``, and retrieval, as far as
    ``how.probes`` asks for them. Raises ``ValueError`` naming the set where it has no answer that a probe needs."""
    out = Measured()
    embedded: list[Tensor] = []
    labels: list[int] = []
    keys: list[str] = []
    captions: list[str] = []
    owners: list[int] = []
    batch: list[Example] = []

    def look() -> None:
        found = F.normalize(model.embed_images([example.image for example in batch]).float().cpu(), dim=1)
        embedded.append(found)
        if not (finite := found.isfinite().all(dim=1)).all():
            raise ValueError(f"{batch[int(finite.int().argmin())].key}: its embedding is not finite")
        batch.clear()

    for n, example in enumerate(test.read()):
        batch.append(example)
        labels.append(-1 if example.label is None else example.label)
        keys.append(example.key)
        captions += example.captions
        owners += [n] * len(example.captions)
        if _is_shown(n, test.total, how.pictures):
            out.shown[example.key] = _shown(example)
        if len(batch) == _TEXTS:
            look()
    if batch:
        look()
    if not embedded:
        raise ValueError(f"{test.name}: there is no image that can be used")
    images, truth = torch.cat(embedded), torch.tensor(labels)
    if "zero-shot" in how.probes:
        known = truth >= 0
        if classes is None or not known.any():
            raise ValueError(f"{test.name}: zero-shot classification needs labels and the names of their classes")
        found = zero_shot(images[known], truth[known], F.normalize(classes.float().cpu(), dim=1), test.classes)
        out.scores |= {"zero-shot/top-1": found.top1, "zero-shot/top-5": found.top5}
        out.scores["zero-shot/class mean"] = found.class_mean
        for n, one in zip(known.nonzero()[:, 0].tolist(), found.predicted.tolist(), strict=True):
            if keys[n] in out.shown:
                out.shown[keys[n]].predicted["zero-shot"] = one
    if "retrieval" in how.probes:
        if not captions:
            raise ValueError(f"{test.name}: no image has a caption, which retrieval needs")
        texts = [model.embed_texts(captions[n : n + _TEXTS]) for n in range(0, len(captions), _TEXTS)]
        told = torch.tensor(sorted(set(owners)))  # images without a caption are nobody's answer
        place = torch.full((len(images),), -1).index_put((told,), torch.arange(len(told)))
        found_texts = F.normalize(torch.cat(texts).float().cpu(), dim=1)
        scores = retrieval(images[told], found_texts, place[torch.tensor(owners)], captions)
        out.scores |= {f"retrieval/{name}": value for name, value in scores.items()}
        out.facts["retrieval"] = f"{len(told)} images, {len(captions)} captions, {len(set(captions))} of them different"
    return out


def _is_shown(n: int, total: int, pictures: int) -> bool:
    """Whether test image ``n`` is one of those kept: they are spread over the set."""
    step = max(total // max(pictures, 1), 1)
    return bool(pictures) and n % step == 0 and n // step < pictures


def _shown(example: Example) -> Shown:
    height, width = example.image.shape[:2]
    scale = min(_THUMB / max(height, width), 1.0)
    image = resize(example.image, max(round(height * scale), 1), max(round(width * scale), 1))
    maps = (None if values is None else _small(values) for values in (example.mask, example.depth))
    return Shown(example.key, image, example.label, *maps)


def _small(values: np.ndarray) -> np.ndarray:
    """Every so manieth pixel: classes have no mean."""
    step = max(-(-max(values.shape) // _THUMB), 1)
    return np.ascontiguousarray(values[::step, ::step])
