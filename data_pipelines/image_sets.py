"""Images for training and evaluation from wherever they lie: one name opens any of them.

``FOLDER``                    image files: :mod:`data_pipelines.image_folder` says how classes and captions are given
``FOLDER``, ``{000..127}.tar``  webdataset shards: :mod:`data_pipelines.image_shards`
``datasets:ID[:SPLIT]``       a data set of the ``datasets`` library: :mod:`data_pipelines.hub_images`

A folder with ``train`` and ``test`` (or ``validation``, ``val``) in it has splits of its own, as have most data sets of
the hub. What has none is split by a hash of its samples' names (:func:`~data_pipelines.labelled.split_by_name`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from data_pipelines.hub_images import PREFIX, ColumnsConfig, HubImages, load_splits
from data_pipelines.image_folder import ImageFolder, class_names, image_files
from data_pipelines.image_shards import ImageShards, holds_shards
from data_pipelines.labelled import ImageSet, Renumbered, split_by_name

TRAIN, TEST = ("train", "training"), ("test", "validation", "valid", "val")
Parts = dict[str, Callable[[], ImageSet]]
SHARE = 0.2
"""Of the samples without a split of their own, how many are for the test."""


def open_images(
    source: str, split: str = "", *, columns: ColumnsConfig | None = None, share: float = SHARE, seed: int = 0
) -> ImageSet:
    """The images of ``source``.

    ``split`` "train" and "test" are the source's own, or what a hash of the samples' names makes of it (``share`` and
    ``seed`` decide) where it has none for the test; "" is its training split whole, or everything where it has no
    splits; any other name is that of a split. Raises ``ValueError`` in one line for what cannot be opened.
    """
    return _choose(source, _parts(source, columns or ColumnsConfig()), split, share, seed)


def _choose(source: str, parts: Parts, split: str, share: float = SHARE, seed: int = 0) -> ImageSet:
    if split and split not in ("train", "test"):
        if split not in parts:
            raise ValueError(f"{source}: no split {split!r}; there are {_named(parts)}")
        return parts[split]()
    train, test = (next((name for name in names if name in parts), None) for names in (TRAIN, TEST))
    if train is not None and test is not None:
        return parts[test if split == "test" else train]()
    base = train if train is not None else (next(iter(parts)) if len(parts) == 1 else None)
    if base is None:
        raise ValueError(f"{source}: none of its splits is one to train on; choose one of {_named(parts)}")
    images = parts[base]()
    return split_by_name(images, split == "test", share, seed) if split else images


def open_pair(
    source: str, test: str = "", *, columns: ColumnsConfig | None = None, share: float = SHARE, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """A training and a test set: the two splits of ``source``, which share no name of a sample, or ``source`` whole and
    another source for the test (its test split, if it has one, else all of it).

    Nothing is read: equal images under two names, or in two sources, may be in both until
    :func:`~data_pipelines.copies.without_copies` has compared them. Raises ``ValueError`` where both are one and the
    same set, or a class of the test is none of the training's.
    """
    parts = _parts(source, columns or ColumnsConfig())
    if not test:
        return _choose(source, parts, "train", share, seed), _choose(source, parts, "test", share, seed)
    train = _choose(source, parts, "")
    parts = _parts(test, columns or ColumnsConfig())
    own = next((name for name in TEST if name in parts), None)
    other = parts[own]() if own else _choose(test, parts, "")
    if other.fingerprint() == train.fingerprint():
        raise ValueError(f"{source} and {test} are the same images: a test must not ask for what was trained on")
    if "label" not in train.holds & other.holds or train.classes == other.classes:
        return train, other
    if not train.classes or not other.classes:
        raise ValueError(f"{source} and {test}: one names its classes and the other numbers them")
    if unknown := sorted(set(other.classes) - set(train.classes)):
        raise ValueError(f"{test}: class {unknown[0]!r} is none of the {len(train.classes)} of {source}")
    return train, Renumbered(other, train.classes)


def _parts(source: str, columns: ColumnsConfig) -> Parts:
    """What opens each of the splits of ``source``, once; a source without has one, of an empty name."""
    return {name: cache(opened) for name, opened in _openers(source, columns).items()}


def _openers(source: str, columns: ColumnsConfig) -> Parts:
    if source.startswith(PREFIX):
        tables = load_splits(source, columns.subset)
        return {name: _hub(source, name, rows, columns) for name, rows in tables.items()}
    path = Path(source)
    if not path.is_dir():
        if path.exists() or any(c in source for c in "*{?") or source.endswith(".tar"):
            return {"": lambda: ImageShards(source)}
        raise ValueError(f"{source}: no such folder, tar or glob; a data set of the hub is called {PREFIX}ID")
    if holds_shards(path):
        return {"": lambda: ImageShards(source)}
    splits = _split_folders(path)
    if any(holds_shards(folder) for folder in splits.values()):
        return {name: _shards(source, folder) for name, folder in splits.items()}
    if not splits:
        return {"": lambda: ImageFolder(path, source)}
    classes = sorted({name for folder in splits.values() for name in class_names(folder)})
    return {name: _folder(source, name, folder, tuple(classes)) for name, folder in splits.items()}


def _split_folders(path: Path) -> dict[str, Path]:
    """Sub-folders that are splits: where ``train`` is among them, and no other sub-folder holds images of its own (a
    class of things that run on rails may well be called train)."""
    below = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    splits = {p.name: p for p in below if p.name in (*TRAIN, *TEST)}
    if not any(name in splits for name in TRAIN):
        return {}
    maps = {f"{name}_{kind}" for name in splits for kind in ("mask", "depth")}
    others = [p for p in below if p.name not in splits and p.name not in maps]
    beside = any(p.is_file() for p in path.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if beside or any(next(image_files(folder), None) for folder in others):
        return {}
    return splits


def _hub(source: str, name: str, rows: object, columns: ColumnsConfig) -> Callable[[], ImageSet]:
    return lambda: HubImages(source, name, rows, columns)


def _shards(source: str, folder: Path) -> Callable[[], ImageSet]:
    def opened() -> ImageSet:
        above = folder.parent / "classes.txt"
        classes = tuple(above.read_text(encoding="utf-8").split("\n")) if above.is_file() else ()
        return ImageShards(str(folder), f"{source}/{folder.name}", tuple(c.strip() for c in classes if c.strip()))

    return opened


def _folder(source: str, name: str, folder: Path, classes: tuple[str, ...]) -> Callable[[], ImageSet]:
    return lambda: ImageFolder(folder, f"{source}/{name}", classes)


def _named(parts: Parts) -> str:
    return ", ".join(name for name in parts if name) or "none"
