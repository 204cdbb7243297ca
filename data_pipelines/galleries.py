"""Endless sequences of captioned pictures: what the streams of stages 1 and 2 draw from.

A gallery is a pure function of a position, so it has no state: any rank computes any picture, and a stopped run
continues by going on counting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipelines.documents import Quarantine, QuarantineConfig
from data_pipelines.hub_images import ColumnsConfig
from data_pipelines.image_sets import open_images
from data_pipelines.image_shards import LOOKED_AT, ImageShards, plain_text
from data_pipelines.labelled import ImageSet, LabelledPicture, Subset, require
from data_pipelines.mixture import digest, permute
from data_pipelines.shards import ShardSet, TornTail
from mmagent.geometry import GeometryConfig, fit
from mmagent.records import Record, RecordError, decode_image, from_sample, image_size
from mmagent.worlds.charts import CHARTS, PARTS, draw_chart
from mmagent.worlds.digits import DIGITS, draw_digit
from mmagent.worlds.drawing import grown
from mmagent.worlds.icons import ICONS, draw_icon
from mmagent.worlds.images import LEVELS, MATERIALS, PHOTO_KINDS, SHAPES, Scene, crop_photo, draw_panel, draw_scene

_Drawn = tuple[np.ndarray, str, np.ndarray | None]  # image, caption, classes
_ICONS = 1 + len(SHAPES)  # where the classes of "things" go on
_DIGITS = _ICONS + len(ICONS)
_CHARTS = _DIGITS + len(DIGITS)
CLASSES = {
    "": 0,
    "materials": len(MATERIALS),
    "shapes": 1 + len(SHAPES),
    "surfaces": len(MATERIALS) + len(PARTS) - 1,
    "things": _CHARTS + len(CHARTS),
}
"""What :func:`built_in` can tell of every pixel, and how many classes that has."""

_PATTERN = 1000  # positions after which a mixture's order of galleries repeats
_ATTEMPTS = 100  # samples tried in place of one that cannot be used


@dataclass(frozen=True)
class Picture:
    """``image (height, width, 3)`` uint8 with the text that belongs to it; ``key`` names it in every error. ``classes
    (height, width)`` int64 says what every pixel is, where that is known; or ``things`` says of everything there its
    box ``(x1, y1, x2, y2)`` in pixels and its class, and all the rest is class 0."""

    image: np.ndarray
    caption: str
    key: str
    classes: np.ndarray | None = None
    things: tuple[tuple[tuple[float, ...], int], ...] | None = None


@dataclass(frozen=True)
class Losses:
    """How often a sample could not be used, and how many shards were cut short."""

    samples: int = 0
    torn_shards: int = 0

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.samples + other.samples, self.torn_shards + other.torn_shards)


class Gallery(Protocol):
    """``gallery(position)`` is the same picture whenever and wherever it is asked for; positions have no end."""

    def __call__(self, position: int) -> Picture: ...

    def fingerprint(self) -> str:
        """What an exact resume has to find again. A plain function need not offer it: see :func:`fingerprint_of`."""

    def losses(self) -> Losses:
        """What could not be used so far. A plain function need not offer it: it loses nothing."""


def fingerprint_of(gallery: Gallery) -> str:
    """A gallery's fingerprint; of a plain function its qualified name."""
    known = getattr(gallery, "fingerprint", None)
    return known() if known else getattr(gallery, "__qualname__", "")


def losses_of(gallery: Gallery) -> Losses:
    """A gallery's losses; of a plain function none."""
    known = getattr(gallery, "losses", None)
    return known() if known else Losses()


@dataclass(frozen=True)
class DrawnGallery:
    """Pictures that ``draw`` makes of a position. ``name`` tells this gallery, its settings included, from others."""

    name: str
    draw: Callable[[int], Picture]

    def __call__(self, position: int) -> Picture:
        return self.draw(position)

    def fingerprint(self) -> str:
        """Its name."""
        return self.name

    def losses(self) -> Losses:
        """None."""
        return Losses()


class MixedGallery:
    """Several galleries in exact proportion to their weights: in any 1000 consecutive positions each has its share, and
    each is gone through in its own order without gaps."""

    def __init__(self, galleries: Mapping[str, tuple[Gallery, float]]):
        """``{name: (gallery, weight)}``. Raises ``ValueError`` for weights that are not positive."""
        if not galleries or any(not weight > 0 for _, weight in galleries.values()):
            raise ValueError(f"galleries need positive weights, got { {n: w for n, (_, w) in galleries.items()} }")
        self._names = {name: weight for name, (_, weight) in galleries.items()}
        self._galleries = [gallery for gallery, _ in galleries.values()]
        weights = np.array([weight for _, weight in galleries.values()])
        taken = np.zeros(len(weights), dtype=np.int64)
        self._pattern: list[tuple[int, int]] = []  # (gallery, how many it had given before)
        for _ in range(_PATTERN):
            behind = int(((taken + 0.5) / weights).argmin())
            self._pattern.append((behind, int(taken[behind])))
            taken[behind] += 1
        self._taken = taken.tolist()

    def __call__(self, position: int) -> Picture:
        rounds, place = divmod(position, _PATTERN)
        gallery, before = self._pattern[place]
        return self._galleries[gallery](rounds * self._taken[gallery] + before)

    def fingerprint(self) -> str:
        """Names, weights and fingerprints of its galleries, in their order: ties of the mixture go by it."""
        told = zip(self._names.items(), self._galleries, strict=True)
        return "; ".join(f"{name} x {weight!r}: {fingerprint_of(gallery)}" for (name, weight), gallery in told)

    def losses(self) -> Losses:
        """Those of all its galleries."""
        return sum((losses_of(gallery) for gallery in self._galleries), Losses())


class ShardGallery:
    """Records with one or more images and a text in webdataset shards: the first image, captioned by all plain text, or
    with ``kinds`` by the labels of its boxes where it has some. ``kinds``: what labels begin with, class 1 and on.

    Every epoch has an order of its own. A record that cannot be used is counted and logged by ``quarantine``, and
    another one, the same on every rank, stands in for it.
    """

    def __init__(
        self,
        path: str,
        geometry: GeometryConfig,
        seed: int = 0,
        name: str = "pictures",
        quarantine: Quarantine | None = None,
        kinds: Sequence[str] = (),
        chosen: Subset | None = None,
    ):
        """``geometry`` refuses images of impossible shape before a stream meets them. ``chosen``: only these samples of
        the shards."""
        self.shards, self.geometry, self.chosen = ShardSet(path), geometry, chosen
        self.samples: _Samples = self.shards if chosen is None else chosen
        self.name, self.seed = name, seed
        self.quarantine = quarantine or Quarantine(QuarantineConfig())
        self.kinds = tuple(kinds)
        for torn in self.shards.torn:
            self.quarantine.torn(name, torn.shard, torn.offset, torn.problem)

    def __call__(self, position: int) -> Picture:
        """Raises :class:`~data_pipelines.documents.QuarantineError` when too many records are unusable."""

        def read(sample: int) -> Picture:
            number = sample if self.chosen is None else self.chosen.index(sample)
            return picture_of(from_sample(self.shards.read(number)), self.geometry, self.kinds)

        sample = _in_order(position, len(self.samples), self.seed, self.name)
        return _usable(sample, (self.seed, position), self.samples, read, self.quarantine, self.name)

    def losses(self) -> Losses:
        """Its own, should it share a quarantine with others of other names."""
        return Losses(self.quarantine.bad[self.name], len(self.shards.torn))

    def fingerprint(self) -> str:
        """The shards', with the seed of the order and the kinds."""
        samples = self.shards.fingerprint() if self.chosen is None else self.chosen.fingerprint()
        return f"{samples} in order {self.seed}, kinds {', '.join(self.kinds) or 'none'}"


def picture_of(record: Record, geometry: GeometryConfig, kinds: Sequence[str] = ()) -> Picture:
    """The first image of a record with its labelled boxes, if ``kinds`` are asked for and it has some, or all its plain
    text; labels also stand in for a text that is missing. A labelled box of a kind not among ``kinds`` counts as
    ground. Raises :class:`~mmagent.records.RecordError`."""
    if not record.images:
        raise RecordError(record.key, "images", "a picture needs an image")
    _check_shape(image_size(record.images[0], record.key, "images[0]"), geometry, record.key, "images[0]")
    image = decode_image(record.images[0].data, record.key, "images[0]")
    boxes = [region for region in record.boxes if region.image == 0 and region.label.strip()]
    labels = "; ".join(region.label for region in boxes)
    if kinds and boxes:
        number = {kind: n for n, kind in enumerate(kinds, 1)}
        classes = [number.get(region.label.split(' "')[0], 0) for region in boxes]
        things = tuple((region.coordinates, n) for region, n in zip(boxes, classes, strict=True) if n)
        return Picture(image, labels, record.key, things=things)
    return Picture(image, plain_text(record) or labels, record.key)


def _check_shape(size: tuple[int, int], geometry: GeometryConfig, key: str, field: str) -> None:
    try:
        fit(*size, geometry)
    except ValueError as error:
        raise RecordError(key, field, str(error)) from error


class _Samples(Protocol):
    """What a gallery takes samples from."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str: ...


def _in_order(position: int, size: int, seed: int, name: str) -> int:
    """Which of ``size`` samples stands at ``position``: every epoch has an order of its own."""
    epoch, place = divmod(position, size)
    return permute(place, size, digest(seed, name, epoch))


def _usable(
    sample: int,
    seeds: tuple[int, int],
    samples: _Samples,
    read: Callable[[int], Picture],
    quarantine: Quarantine,
    name: str,
) -> Picture:
    """Picture number ``sample``, or the first that can be used of a sequence that ``seeds`` alone decide."""
    for attempt in range(_ATTEMPTS):
        try:
            picture = read(sample)
        except RecordError as error:
            quarantine.add(name, samples.where(sample), error)
            sample = digest(*seeds, attempt) % len(samples)
        else:
            quarantine.good(name)
            return picture
    raise RecordError(name, "sample", f"{_ATTEMPTS} samples in a row cannot be used")


class ImageSetGallery:
    """Any :class:`~data_pipelines.labelled.ImageSet` as a gallery, in an order of its own every epoch. What cannot be
    used is counted, logged and replaced as :class:`ShardGallery` does it.

    Of several captions each position draws one; without any, the name of the image's class stands in. With ``kinds``,
    what the classes 1 and on of its maps are, pictures carry their maps; pixels of no class are -1.
    """

    def __init__(
        self,
        images: ImageSet,
        geometry: GeometryConfig,
        seed: int = 0,
        name: str = "pictures",
        quarantine: Quarantine | None = None,
        kinds: Sequence[str] = (),
        torn: Sequence[TornTail] = (),
    ):
        """``torn``: shards of the set that were cut short."""
        self.images, self.geometry, self.seed, self.name = images, geometry, seed, name
        self.quarantine = quarantine or Quarantine(QuarantineConfig())
        self.kinds, self.torn = tuple(kinds), tuple(torn)
        for tail in self.torn:
            self.quarantine.torn(name, tail.shard, tail.offset, tail.problem)

    def __call__(self, position: int) -> Picture:
        """Raises :class:`~data_pipelines.documents.QuarantineError` when too many samples are unusable."""
        sample = _in_order(position, len(self.images), self.seed, self.name)

        def read(chosen: int) -> Picture:
            return self._picture(self.images[chosen], position)

        return _usable(sample, (self.seed, position), self.images, read, self.quarantine, self.name)

    def _picture(self, found: LabelledPicture, position: int) -> Picture:
        _check_shape(found.size(), self.geometry, found.key, "image")
        classes = found.mask() if self.kinds else None
        if classes is not None and int(classes.max()) > len(self.kinds):
            raise RecordError(found.key, "mask", f"class {int(classes.max())}, but there are {len(self.kinds)} kinds")
        caption = ""
        if found.captions:
            caption = found.captions[digest(self.seed, "caption", position) % len(found.captions)]
        elif found.label is not None and found.label < len(self.images.classes):
            caption = self.images.classes[found.label].replace("_", " ")
        return Picture(found.image(), caption, found.key, classes)

    def losses(self) -> Losses:
        """Its own, should it share a quarantine with others of other names."""
        return Losses(self.quarantine.bad[self.name], len(self.torn))

    def fingerprint(self) -> str:
        """The set's, with the seed of the order and the kinds."""
        return f"{self.images.fingerprint()} in order {self.seed}, kinds {', '.join(self.kinds) or 'none'}"


def open_gallery(
    source: str,
    geometry: GeometryConfig,
    seed: int = 0,
    name: str = "pictures",
    quarantine: Quarantine | None = None,
    kinds: Sequence[str] = (),
    columns: ColumnsConfig | None = None,
    split: str = "",
    captions: bool = False,
    maps: bool = True,
) -> Gallery:
    """A gallery of whatever ``source`` names: a :class:`ShardGallery` for shards of the library's own records, which
    know boxes, else an :class:`ImageSetGallery` of the set's training split, or of everything where it has no splits
    (see :func:`~data_pipelines.image_sets.open_images`). ``split`` "train" leaves a test part out in any case, the one
    that an evaluation of the same source judges by. ``kinds`` are those of labelled boxes, and with ``maps`` of maps of
    classes too. Raises ``ValueError`` for what cannot be opened, and with ``captions`` for what has no texts: neither
    captions nor names of classes."""
    images = open_images(source, split, columns=columns)
    whole, chosen = (images.whole, images) if isinstance(images, Subset) else (images, None)
    records = isinstance(whole, ImageShards) and whole.records
    if captions and not (records and _labelled(whole.shards)) and not ("label" in images.holds and images.classes):
        require(images, "caption")
    if records:
        return ShardGallery(whole.shards.location, geometry, seed, name, quarantine, kinds, chosen)
    torn = whole.shards.torn if isinstance(whole, ImageShards) else ()
    return ImageSetGallery(images, geometry, seed, name, quarantine, kinds if maps else (), torn)


def _labelled(shards: ShardSet) -> bool:
    """Whether any of some records has labelled boxes, which stand in for a text."""
    for n in range(looked := min(len(shards), LOOKED_AT)):
        try:
            record = from_sample(shards.read(n * len(shards) // looked))
        except RecordError:
            continue  # whoever uses the record counts it
        if any(region.label.strip() for region in record.boxes):
            return True
    return False


def mixed(galleries: Mapping[str, Gallery], weights: Mapping[str, float]) -> Gallery:
    """Galleries by name under the weights of a config; weight 0 leaves one out. Raises ``ValueError`` for a name that
    is not there."""
    if unknown := sorted(set(weights) - set(galleries)):
        raise ValueError(f"mix names unknown galleries {unknown}; there are {', '.join(galleries)}")
    return MixedGallery({name: (galleries[name], weight) for name, weight in weights.items() if weight})


def built_in(
    mix: Mapping[str, float], side: int = 0, classes: str = "materials", others: Mapping[str, Gallery] | None = None
) -> Gallery:
    """Galleries that need no download, and ``others`` by name, under their weights: ``scenes``, or their levels apart
    (``scenes0`` is the plainest), ``panels``, ``charts``, ``icons``, ``digits`` and the kinds of photographs. All of
    them are of the train split.

    ``classes`` is one of :data:`CLASSES`. Of scenes alone ``materials`` or ``shapes``, or nothing ("");
    ``things``: shapes, then icons, digits, and marks by the kind of their chart, all else being 0; ``surfaces``:
    materials, then axes, text and marks of charts, whose ground counts as plain. A gallery that does not know them has
    none. ``side``: squares of so many pixels, which a stage that looks at squares need not resize; else sizes vary.
    Raises ``ValueError`` for other classes and unknown galleries."""
    if classes not in CLASSES:
        raise ValueError(f"classes {classes!r} are none of {', '.join(name for name in CLASSES if name)}")
    size = (side, side) if side else None
    settings = f"(side {side}, classes {classes or 'none'})"

    def gallery(name: str, draw: Callable[[int], _Drawn]) -> Gallery:
        def pick(position: int) -> Picture:
            image, caption, known = draw(position)
            return Picture(image, caption, f"{name}-{position}", known)

        return DrawnGallery(f"{name} {settings}", pick)

    def scenes(level: int | None) -> Gallery:
        def draw(position: int) -> _Drawn:
            scene = draw_scene(position, size=size, level=level)
            return scene.image, scene.caption, _scene_classes(scene, classes)

        return gallery("scene" if level is None else f"scene{level}", draw)

    def photos(kind: str) -> Gallery:
        def draw(position: int) -> _Drawn:
            crop = crop_photo(position, kind, size=size)
            return crop.image, crop.caption, None

        return gallery(kind, draw)

    def panels(position: int) -> _Drawn:
        panel = draw_panel(position, size=size)
        return panel.image, panel.caption, None

    def charts(position: int) -> _Drawn:
        chart, mark = draw_chart(position, size=size), PARTS.index("mark")
        if classes == "things":
            return chart.image, chart.caption, (_CHARTS + chart.kind) * (chart.regions() == mark)
        regions = chart.regions() if classes == "surfaces" else None
        known = None if regions is None else np.where(regions > 0, len(MATERIALS) - 1 + regions, 0)
        return chart.image, chart.caption, known

    def icons(position: int) -> _Drawn:
        icon = draw_icon(position, size=size)
        known = _covered(icon.inside, _ICONS + icon.icon) if classes == "things" else None
        return icon.image, icon.caption, known

    def digits(position: int) -> _Drawn:
        digit = draw_digit(position, size=size)
        return (
            digit.image,
            digit.caption,
            _covered(digit.inside, _DIGITS + digit.digit) if classes == "things" else None,
        )

    drawn = {"scenes": scenes(None), **{f"scenes{level}": scenes(level) for level in range(LEVELS)}}
    worlds = {"panels": panels, "charts": charts, "icons": icons, "digits": digits}
    drawn |= {name: gallery(name, draw) for name, draw in worlds.items()}
    return mixed({**drawn, **{kind: photos(kind) for kind in PHOTO_KINDS}, **(others or {})}, mix)


def _scene_classes(scene: Scene, classes: str) -> np.ndarray | None:
    if not classes:
        return None
    return scene.shapes if classes in ("shapes", "things") else scene.materials


def _covered(inside: np.ndarray, number: int) -> np.ndarray:
    """``number`` where something is, or is near: strokes are thinner than patches."""
    return grown(number * inside, 3)
