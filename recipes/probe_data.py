"""What encoders are asked about: images of the user with their answers, or the built-in questions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from data_pipelines.copies import without_copies
from data_pipelines.hub_images import ColumnsConfig
from data_pipelines.image_sets import open_pair
from data_pipelines.labelled import ImageSet, Kind, require, some_of
from evals.encoder.battery import Example, Examples, Probe
from evals.encoder.features import LabelledImages, ahead
from evals.probes import Pair, probe_sets
from mmagent.geometry import GeometryConfig, fit, resize
from mmagent.records import RecordError

WORKERS = min(os.cpu_count() or 1, 8)
NEEDS: dict[Probe, Kind] = {"knn": "label", "linear": "label", "zero-shot": "label", "retrieval": "caption"}
MAPS: tuple[Kind, ...] = ("mask", "depth")
FITTED: set[Probe] = {"knn", "linear", "dense"}


@dataclass
class Unusable:
    """Samples of a set that could not be used: ``{where it lies: what is wrong}``."""

    source: str
    total: int
    problems: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        first = next(iter(self.problems.values()), "")
        return f"{self.source}: {len(self.problems)} of {self.total} images cannot be used; the first: {first}"


@dataclass(frozen=True)
class Question:
    """Images to fit and to judge by, the ``probes`` that they have answers for, and what was left out so far: what
    cannot be used, and how many ``copies`` of test images were among those to fit."""

    name: str
    train: Examples
    test: Examples
    probes: tuple[Probe, ...]
    unusable: tuple[Unusable, ...] = ()
    copies: int = 0


@dataclass(frozen=True)
class DataOptions:
    """``columns`` of a data set; ``limit`` draws at most so many images of a set by ``seed`` (0: all), which splits as
    well; ``square`` brings images to so many pixels a side, 0 keeps their shape."""

    columns: ColumnsConfig
    limit: int = 0
    square: int = 0
    seed: int = 0


def users_question(source: str, test: str, wanted: Sequence[Probe], options: DataOptions) -> Question:
    """The user's images. ``wanted`` probes, or all that there are answers for without any. Raises ``ValueError`` in one
    line for what cannot be opened, or has no answers for a probe that is wanted."""
    pair = open_pair(source, test, columns=options.columns, seed=options.seed)
    for probe in wanted:
        for part in pair[1:] if probe in ("zero-shot", "retrieval") else pair:
            if probe == "dense" and not part.holds & set(MAPS):
                raise ValueError(f"{part.source}: has no maps; {part.hint('mask')}; {part.hint('depth')}")
            if probe != "dense":
                require(part, NEEDS[probe])
        if probe == "zero-shot" and not pair[1].classes:
            raise ValueError(f"{pair[1].source}: numbers its classes, and zero-shot classification needs their names")
    probes = tuple(wanted) or _answered(*pair)
    if not probes:
        raise ValueError(f"{source}: has neither labels nor captions nor maps; {pair[0].hint('label')}")
    train, test = (some_of(part, options.limit, options.seed) for part in pair)
    train, copies = without_copies(train, test, progress=True) if FITTED & set(probes) else (train, 0)
    fit, judge = (_examples(part, options, "dense" in probes) for part in (train, test))
    return Question(source, fit[0], judge[0], probes, (fit[1], judge[1]), copies)


def _answered(train: ImageSet, test: ImageSet) -> tuple[Probe, ...]:
    both = train.holds & test.holds
    there: list[tuple[Probe, bool]] = [
        ("knn", "label" in both),
        ("linear", "label" in both),
        ("dense", bool(both & set(MAPS))),
        ("zero-shot", "label" in test.holds and bool(test.classes)),
        ("retrieval", "caption" in test.holds),
    ]
    return tuple(probe for probe, known in there if known)


def _examples(images: ImageSet, options: DataOptions, maps: bool) -> tuple[Examples, Unusable]:
    """Decoded by several threads; what cannot be used is counted and left out."""
    unusable = Unusable(images.source, len(images))

    def make(index: int) -> Example | RecordError:
        try:
            found = images[index]
            mask, depth = (found.mask(), found.depth()) if maps else (None, None)
            image = found.image()
            fit(*image.shape[:2], GeometryConfig())  # a shape that no encoder is shown
        except (RecordError, ValueError) as error:
            return error if isinstance(error, RecordError) else RecordError(found.key, "image", str(error))
        image = _shaped(image, options.square)
        return Example(found.key, image, found.label, found.captions, mask, depth)

    def read() -> Iterator[Example]:
        for index, made in enumerate(ahead(make, range(len(images)), WORKERS)):
            if isinstance(made, RecordError):
                unusable.problems[images.where(index)] = str(made)
            else:
                yield made

    return Examples(images.source, read, len(images), images.classes), unusable


def built_in_questions(images: int, wanted: Sequence[Probe], square: int = 0) -> list[Question]:
    """Questions about whole images, then about pixels, from ``images`` to fit and two thirds as many to judge. Raises
    ``ValueError`` where none has answers for the ``wanted`` probes."""
    if wanted and not {"knn", "linear", "dense"} & set(wanted):
        raise ValueError(f"the built-in questions have no answers for {', '.join(wanted)}: give --data")
    sets = probe_sets(images, max(images * 2 // 3, 1))
    pairs: list[Pair] = [getattr(sets, one.name) for one in fields(sets)]
    known: list[tuple[str, Pair, tuple[Probe, ...]]] = [(q, p, ("knn", "linear")) for p in pairs for q in p[0].labels]
    known += [(question, pair, ("dense",)) for pair in pairs for question in pair[0].maps]
    out = []
    for name, pair, probes in known:
        asked = tuple(probe for probe in probes if not wanted or probe in wanted)
        train, test = (_drawn(part, name, which, square) for part, which in zip(pair, ("train", "test"), strict=True))
        out += [Question(name, train, test, asked)] if asked else []
    return out


def _drawn(part: LabelledImages, question: str, which: str, square: int) -> Examples:
    def read() -> Iterator[Example]:
        labels, maps = part.labels.get(question), part.maps.get(question)
        for n, image in enumerate(part.images):
            label, mask = (None if known is None else known[n] for known in (labels, maps))
            yield Example(f"{question} {n}", _shaped(image, square), None if label is None else int(label), mask=mask)

    return Examples(f"{question} ({which})", read, len(part.images))


def _shaped(image: np.ndarray, square: int) -> np.ndarray:
    return resize(image, square, square) if square else image
