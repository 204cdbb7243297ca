"""Images with what is known of them: the one shape in which folders, shards and data sets of others come in.

An :class:`ImageSet` is read at random and decodes nothing before it is asked to; :mod:`data_pipelines.image_sets` opens
one from a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from data_pipelines.mixture import digest
from mmagent.records import EncodedImage, RecordError, decode_image, decode_map, image_size

Kind = Literal["label", "caption", "mask", "depth"]
KINDS: tuple[Kind, ...] = ("label", "caption", "mask", "depth")
IGNORE = -1
"""What a map of classes holds where it says nothing: pixels of value 255 (of 16 bits: 65535) on disk."""
_ASPECT = 0.02  # by how much the shape of a map may differ from its image's, for rounding


@dataclass(frozen=True)
class LabelledPicture:
    """One image, still encoded, with its class ``label`` and its ``captions``, as far as there are any. ``key`` names
    it in every error. ``mask_data`` and ``depth_data`` are encoded maps."""

    key: str
    data: bytes
    label: int | None = None
    captions: tuple[str, ...] = ()
    mask_data: bytes | None = None
    depth_data: bytes | None = None

    def size(self) -> tuple[int, int]:
        """``(height, width)``, from the header. Raises :class:`~mmagent.records.RecordError`."""
        return image_size(EncodedImage(self.data, ""), self.key)

    def image(self) -> np.ndarray:
        """``(height, width, 3)`` uint8. Raises :class:`~mmagent.records.RecordError` for what cannot be decoded or is
        too large to be."""
        return decode_image(self.data, self.key)

    def mask(self) -> np.ndarray | None:
        """``(height, width)`` int64 classes of pixels, :data:`IGNORE` where there is none; or None without a map.

        Raises :class:`~mmagent.records.RecordError`, also for a map of another shape than the image.
        """
        if self.mask_data is None:
            return None
        values = decode_map(self.mask_data, self.key, "mask")
        self._check_shape(values, "mask")
        return np.where(values == np.iinfo(values.dtype).max, IGNORE, values.astype(np.int64))

    def depth(self) -> np.ndarray | None:
        """``(height, width)`` float32 in the unit of the file, NaN where it is 0 (unknown); or None without a map.

        Raises :class:`~mmagent.records.RecordError` as :meth:`mask` does.
        """
        if self.depth_data is None:
            return None
        values = decode_map(self.depth_data, self.key, "depth").astype(np.float32)
        self._check_shape(values, "depth")
        return np.where(values == 0, np.float32(np.nan), values)

    def _check_shape(self, values: np.ndarray, field: str) -> None:
        height, width = self.size()
        rows, cols = values.shape
        if abs(rows * width - cols * height) > _ASPECT * rows * width:
            raise RecordError(self.key, field, f"a map of {cols}x{rows} pixels for an image of {width}x{height}")


class ImageSet(Protocol):
    """Random access to :class:`LabelledPicture`; safe from several threads.

    ``source`` is how its user calls it, ``classes`` are the names of the labels (none where only numbers are known),
    ``holds`` says which :data:`KINDS` of answers it has for some of its images at least.
    """

    source: str
    classes: tuple[str, ...]
    holds: frozenset[Kind]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> LabelledPicture:
        """Raises :class:`~mmagent.records.RecordError` for a sample that cannot be used."""
        ...

    def where(self, index: int) -> str:
        """A name of the sample that is its own and does not change, known without reading it."""
        ...

    def hint(self, kind: Kind) -> str:
        """What to do so that the set would have answers of this kind."""
        ...

    def fingerprint(self) -> str:
        """What an exact resume has to find again."""
        ...


def require(images: ImageSet, kind: Kind) -> None:
    """Raises ``ValueError`` naming the set and what to do where it has no answers of this ``kind``."""
    if kind not in images.holds:
        name = {"label": "labels", "caption": "captions", "mask": "maps of classes", "depth": "maps of distances"}[kind]
        raise ValueError(f"{images.source}: has no {name}; {images.hint(kind)}")


class Subset:
    """Some of the samples of another set, the ``whole``. ``name`` tells how they were chosen."""

    def __init__(self, images: ImageSet, indices: Sequence[int], name: str):
        self.whole, self._indices, self._name = images, np.asarray(indices, dtype=np.int64), name
        self.source, self.classes, self.holds = f"{images.source} ({name})", images.classes, images.holds

    def __len__(self) -> int:
        return len(self._indices)

    def index(self, index: int) -> int:
        """Which sample of the whole set its ``index``-th is."""
        return int(self._indices[index])

    def __getitem__(self, index: int) -> LabelledPicture:
        return self.whole[self.index(index)]

    def where(self, index: int) -> str:
        return self.whole.where(self.index(index))

    def hint(self, kind: Kind) -> str:
        return self.whole.hint(kind)

    def fingerprint(self) -> str:
        return f"{self.whole.fingerprint()} {self._name}"


def some_of(images: ImageSet, limit: int, seed: int) -> ImageSet:
    """At most ``limit`` samples, drawn by ``seed``, in their order; all of them with 0."""
    if not limit or limit >= len(images):
        return images
    chosen = np.sort(np.random.default_rng(seed).choice(len(images), limit, replace=False))
    return Subset(images, chosen, f"{limit} by seed {seed}")


class Renumbered:
    """Another set whose labels are numbers of ``classes``, which hold all of its own."""

    def __init__(self, images: ImageSet, classes: Sequence[str]):
        self._images, self.classes = images, tuple(classes)
        self._numbers = [self.classes.index(name) for name in images.classes]
        self.source, self.holds = images.source, images.holds

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> LabelledPicture:
        picture = self._images[index]
        return picture if picture.label is None else replace(picture, label=self._numbers[picture.label])

    def where(self, index: int) -> str:
        return self._images.where(index)

    def hint(self, kind: Kind) -> str:
        return self._images.hint(kind)

    def fingerprint(self) -> str:
        return self._images.fingerprint()


def split_by_name(images: ImageSet, test: bool, share: float, seed: int) -> Subset:
    """The test part of a set that has none, or all the rest: a sample belongs to the test where a hash of ``seed`` and
    of its name (:meth:`ImageSet.where`) falls below ``share``. So the parts share no sample, and adding samples moves
    none from one part to the other. Equal pictures under two names may part.

    Raises ``ValueError`` where a part would be empty.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"test share {share} must lie between 0 and 1")
    drawn = np.array([digest(seed, "split", images.where(n)) / 2**64 < share for n in range(len(images))])
    chosen = np.flatnonzero(drawn if test else ~drawn)
    name = f"{'test' if test else 'train'} by hash, share {share:g}, seed {seed}"
    if not len(chosen):
        raise ValueError(f"{images.source}: {len(images)} images leave nothing for the part '{name}'")
    return Subset(images, chosen, name)
