"""Streams of the encoder's two stages: masked images for distillation, images with captions for alignment.

A step is a pure function of its number, so a stream's whole state is that number: a resumed run sees bit for bit what
an uninterrupted one does, on any number of ranks (the images of a step do not depend on it; ranks take them in turn).
Images are packed and never padded: one step draws one sequence length, the most patches an image may have, and a
micro-batch holds as many images as then surely fit its budget, so that all ranks have equally many micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from data_pipelines.galleries import Gallery, Picture, fingerprint_of, losses_of
from data_pipelines.masking import MaskConfig, mask_patches
from data_pipelines.mixture import digest
from mmagent import retries
from mmagent.dist import World
from mmagent.geometry import GeometryConfig, patch_labels, patchify, resize
from mmagent.types import MaskedVision, PackedVision, PairedBatch, PatchedImage, Segments
from mmagent.vocab import Vocab

Batch = TypeVar("Batch", MaskedVision, PairedBatch)


@dataclass
class VisionStreamConfig:
    """``images_per_step`` is global, ``patches_per_microbatch`` local. ``sequence_lengths``: the most patches an image
    may have; one is drawn for every step. ``prefetch`` prepares the next step in a thread."""

    images_per_step: int = 256
    patches_per_microbatch: int = 16384
    sequence_lengths: list[int] = field(default_factory=lambda: [256])
    seed: int = 0
    prefetch: bool = True

    def __post_init__(self) -> None:
        if self.images_per_step < 1 or not self.sequence_lengths or min(self.sequence_lengths) < 1:
            raise ValueError(f"images_per_step and sequence_lengths must be positive, got {self}")
        if self.patches_per_microbatch < max(self.sequence_lengths):
            raise ValueError(
                f"patches_per_microbatch {self.patches_per_microbatch} cannot hold one image of "
                f"{max(self.sequence_lengths)} patches"
            )

    def images_per_microbatch(self, length: int) -> int:
        return self.patches_per_microbatch // length


CROPS = ("square", "native")


@dataclass
class CropConfig:
    """What distillation looks at: a random place, an area of ``min_area`` to 1 of all there is. ``shape``: ``square``
    parts of the largest square that fits are brought to one size; ``native`` parts have the image's own aspect and are
    shrunk only where they have more patches than the step's sequence length."""

    min_area: float = 0.5
    shape: str = "square"

    def __post_init__(self) -> None:
        if self.shape not in CROPS:
            raise ValueError(f"crop.shape {self.shape!r} is none of {', '.join(CROPS)}")
        if not 0.0 < self.min_area <= 1.0:
            raise ValueError(f"crop.min_area {self.min_area} must lie in (0, 1]")


@dataclass(frozen=True)
class _Step(Generic[Batch]):
    """A prepared step, how often a sample could not be used for it, and more to log."""

    batches: list[Batch]
    quarantined: int
    metrics: Mapping[str, float]


class VisionStream(Iterator[list[Batch]], Generic[Batch]):
    """This rank's micro-batches, step after step, without end.

    ``build(pictures, positions, length)`` makes one micro-batch; it must be a pure function of them and ``settings``,
    which a run cannot change when it resumes, as little as the gallery.
    """

    shared_state = True  # positions count over all ranks, so a run may change their number

    def __init__(
        self,
        config: VisionStreamConfig,
        gallery: Gallery,
        build: Callable[[Sequence[Picture], Sequence[int], int], Batch],
        world: World | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """Raises ``ValueError`` when a rank would have no image for one of its micro-batches."""
        self.config, self.gallery, self._build = config, gallery, build
        self._settings = {name: str(value) for name, value in (settings or {}).items()}
        self.rank, self.ranks = (world.rank, world.size) if world else (0, 1)
        for length in config.sequence_lengths:
            if config.images_per_step < self.ranks * self._accumulation(length):
                raise ValueError(
                    f"images_per_step {config.images_per_step} leaves some of {self.ranks} ranks x "
                    f"{self._accumulation(length)} micro-batches empty"
                )
        self.steps = 0
        self.metrics: dict[str, float] = {}
        self._retries = retries.total()
        self._worker = ThreadPoolExecutor(1, "mmagent-vision") if config.prefetch else None
        self._ahead: tuple[int, Future[_Step[Batch]]] | None = None

    def describe(self) -> str:
        """One line for people: how a step is made up."""
        parts = [
            f"{length} patches at most: {self._accumulation(length)} micro-batches a rank"
            for length in self.config.sequence_lengths
        ]
        return f"step of {self.config.images_per_step} images on {self.ranks} ranks; {'; '.join(parts)}"

    def length(self, step: int) -> int:
        """The sequence length drawn for ``step``, the same on every rank."""
        lengths = self.config.sequence_lengths
        return lengths[digest(self.config.seed, "length", step) % len(lengths)]

    def _accumulation(self, length: int) -> int:
        most = -(-self.config.images_per_step // self.ranks)
        return -(-most // self.config.images_per_microbatch(length))

    def __next__(self) -> list[Batch]:
        started = time.perf_counter()
        step = self._prepare(self.steps) if self._worker is None else self._from_worker()
        batches = step.batches
        self.steps += 1
        patches = sum(batch.vision.patches.shape[0] for batch in batches)
        before, self._retries = self._retries, retries.total()
        self.metrics = {
            "time/data": time.perf_counter() - started,
            "data/retries": float(self._retries - before),
            "data/images": float(sum(len(batch.keys) for batch in batches)),
            "data/fill_patches": patches / (len(batches) * self.config.patches_per_microbatch),
            "data/quarantined": float(step.quarantined),
            "data/torn_shards": float(losses_of(self.gallery).torn_shards),
            **step.metrics,
        }
        return batches

    def _from_worker(self) -> _Step[Batch]:
        assert self._worker is not None
        step, ahead = self._ahead or (-1, None)
        if ahead is None or step != self.steps:
            ahead = self._worker.submit(self._prepare, self.steps)
        prepared = ahead.result()
        self._ahead = (self.steps + 1, self._worker.submit(self._prepare, self.steps + 1))
        return prepared

    def _prepare(self, step: int) -> _Step[Batch]:
        length = self.length(step)
        before = losses_of(self.gallery).samples
        first = step * self.config.images_per_step
        mine = range(first + self.rank, first + self.config.images_per_step, self.ranks)
        count = self._accumulation(length)
        batches = []
        for n in range(count):
            positions = mine[len(mine) * n // count : len(mine) * (n + 1) // count]
            batches.append(self._build([self.gallery(p) for p in positions], positions, length))
        lost = losses_of(self.gallery).samples - before  # a running sum would not survive a kill
        return _Step(batches, lost, _distinct_captions(batches))

    def state_dict(self) -> dict[str, Any]:
        """Steps delivered, and what must not change when they are continued."""
        return {"steps": self.steps, **self._pinned()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the run's stream is not the one of the checkpoint."""
        for name, value in self._pinned().items():
            if state.get(name) != value:
                raise ValueError(
                    f"{name}: the checkpoint has {state.get(name)}, this run {value}; data would not continue"
                )
        self.steps = int(state["steps"])

    def _pinned(self) -> dict[str, Any]:
        config = self.config
        return {
            "seed": config.seed,
            "images_per_step": config.images_per_step,
            "sequence_lengths": list(config.sequence_lengths),
            "gallery": fingerprint_of(self.gallery),
            **self._settings,
        }

    def close(self) -> None:
        """Stop the thread. Iterating afterwards is an error."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)


def _distinct_captions(batches: Sequence[MaskedVision | PairedBatch]) -> dict[str, float]:
    """``data/distinct_captions``: of this rank's texts of the step, as the text tower sees them, the share that a
    contrast could tell apart: 1 where no two are equal."""
    texts = [t for b in batches if isinstance(b, PairedBatch) for t in b.text_ids.split(b.segments.lengths)]
    return {"data/distinct_captions": len({tuple(text.tolist()) for text in texts}) / len(texts)} if texts else {}


def distillation_stream(
    config: VisionStreamConfig,
    gallery: Gallery,
    geometry: GeometryConfig,
    mask: MaskConfig,
    crop: CropConfig | None = None,
    world: World | None = None,
) -> VisionStream[MaskedVision]:
    """Crops, each of at most as many patches as the step's sequence length allows, with their masks: squares that all
    have as many as that, or with ``crop.shape`` native each image's own aspect. Teachers get the same crop, as it is.

    256 patches of 14 pixels are the 224 x 224 of the published recipe. Raises ``ValueError`` for a length in which
    no square of whole visual tokens fits, and for a mask's unit that does not divide such a token.
    """
    crop = crop or CropConfig()
    for length in config.sequence_lengths:
        _square_side(length, geometry)
    if crop.shape == "native" and geometry.merge_size % mask.unit:
        raise ValueError(f"mask.unit {mask.unit} must divide the merge size {geometry.merge_size} of native crops")

    def build(pictures: Sequence[Picture], positions: Sequence[int], length: int) -> MaskedVision:
        side = _square_side(length, geometry)
        exact = replace(geometry, min_tokens=1, max_tokens=max(geometry.max_tokens, length))
        within = geometry.within(length)
        images, pixels, masks, classes = [], [], [], []
        for picture, position in zip(pictures, positions, strict=True):
            random = np.random.default_rng([config.seed, position])
            window = crop_window(picture.image.shape[:2], crop, random)
            part = picture.image[window]
            square = crop.shape == "square"
            images.append(patchify(resize(part, side, side), exact) if square else patchify(part, within))
            pixels.append(torch.from_numpy(part.copy()).permute(2, 0, 1).float() / 255.0)
            masks.append(mask_patches(images[-1].grid, geometry.merge_size, mask, random))
            known = None if picture.classes is None else picture.classes[window]
            classes.append(_patch_classes(known, images[-1].grid, geometry.merge_size))
        keys = tuple(picture.key for picture in pictures)
        return MaskedVision(PackedVision.pack(images), torch.cat(masks), tuple(pixels), keys, torch.cat(classes))

    return VisionStream(config, gallery, build, world, {"geometry": geometry, "mask": mask, "crop": crop})


def pair_stream(
    config: VisionStreamConfig,
    gallery: Gallery,
    geometry: GeometryConfig,
    vocab: Vocab,
    max_text: int = 64,
    world: World | None = None,
    square: bool = False,
) -> VisionStream[PairedBatch]:
    """Images at their own aspect, shrunk to the step's sequence length where they exceed it, with their captions; or
    all brought to one ``square``, as models of one resolution see them."""

    def build(pictures: Sequence[Picture], positions: Sequence[int], length: int) -> PairedBatch:
        if square:
            side = _square_side(length, geometry)
            pictures = [_squared(picture, side) for picture in pictures]
        return pair_pictures(pictures, geometry.within(length), vocab, max_text)

    settings = {"geometry": geometry, "max_text": max_text, "square": square}
    return VisionStream(config, gallery, build, world, settings)


def pair_pictures(pictures: Sequence[Picture], geometry: GeometryConfig, vocab: Vocab, max_text: int) -> PairedBatch:
    """One micro-batch of pictures with their captions.

    Raises ``ValueError`` naming a picture whose shape no geometry accepts.
    """
    texts = [vocab.caption_ids(picture.caption, max_text) for picture in pictures]
    images = [_patchify(picture, geometry) for picture in pictures]
    truths = [_patch_truth(p, i.grid, geometry.merge_size) for p, i in zip(pictures, images, strict=True)]
    return PairedBatch(
        PackedVision.pack(images),
        torch.tensor([i for ids in texts for i in ids]),
        Segments([len(ids) for ids in texts]),
        tuple(picture.key for picture in pictures),
        torch.cat([classes for classes, _ in truths]),
        torch.cat([places for _, places in truths]),
    )


def _squared(picture: Picture, side: int) -> Picture:
    """The picture at ``side x side`` pixels, its boxes with it; a map of classes is read in shares of its own size."""
    (height, width), things = picture.image.shape[:2], picture.things
    if things is not None:
        scale = (side / width, side / height) * 2
        things = tuple((tuple(x * s for x, s in zip(box, scale, strict=True)), kind) for box, kind in things)
    return replace(picture, image=resize(picture.image, side, side), things=things)


def _patch_truth(picture: Picture, grid: Sequence[int], merge_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(p,)`` classes and ``(p, 2)`` places of a picture's patches: of the smallest thing that covers most of each."""
    nowhere = torch.full((math.prod(grid), 2), float("nan"))
    if picture.things is None:
        return _patch_classes(picture.classes, grid, merge_size), nowhere
    height, width = picture.image.shape[:2]
    owners = np.zeros((height, width), dtype=np.int64)
    things = sorted(picture.things, key=lambda thing: -(thing[0][2] - thing[0][0]) * (thing[0][3] - thing[0][1]))
    for n, ((x1, y1, x2, y2), _) in enumerate(things, 1):
        owners[round(y1) : round(y2), round(x1) : round(x2)] = n
    owner = patch_labels(owners, grid, merge_size)
    classes = torch.tensor([0, *(kind for _, kind in things)])
    middles = [((x1 + x2) / (2 * width), (y1 + y2) / (2 * height)) for (x1, y1, x2, y2), _ in things]
    return classes[owner], torch.tensor([(math.nan, math.nan), *middles])[owner]


def _patch_classes(known: np.ndarray | None, grid: Sequence[int], merge_size: int) -> torch.Tensor:
    if known is None:
        return torch.full((math.prod(grid),), -1)
    return patch_labels(known, grid, merge_size)


def crop_window(size: Sequence[int], config: CropConfig, random: np.random.Generator) -> tuple[slice, slice]:
    """A part of ``(height, width)`` of the configured shape at a random place: its rows and columns."""
    height, width = size
    share = math.sqrt(random.uniform(config.min_area, 1.0))
    if config.shape == "square":
        rows = cols = max(round(min(height, width) * share), 1)
    else:  # rounded towards the square, so that no part is longer in shape than an image may be
        long, short = max(math.floor(max(size) * share), 1), math.ceil(min(size) * share)
        rows, cols = (long, short) if height > width else (short, long)
    top, left = int(random.integers(height - rows + 1)), int(random.integers(width - cols + 1))
    return slice(top, top + rows), slice(left, left + cols)


def _square_side(length: int, geometry: GeometryConfig) -> int:
    tokens = math.isqrt(length) // geometry.merge_size
    if tokens < 1:
        raise ValueError(f"sequence length {length} holds no square of {geometry.merge_size} patches a side")
    return tokens * geometry.unit


def _patchify(picture: Picture, geometry: GeometryConfig) -> PatchedImage:
    try:
        return patchify(picture.image, geometry)
    except ValueError as error:
        raise ValueError(f"{picture.key}: {error}") from error
