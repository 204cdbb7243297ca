"""Webdataset shards of images as an :class:`~data_pipelines.labelled.ImageSet`: anybody's, and the library's own.

A sample has one image (``KEY.jpg``, ``KEY.png``, ``KEY.webp``), and may have ``KEY.cls`` (a class: its number, or its
name), ``KEY.txt`` (captions, one a line), ``KEY.json`` (with ``label`` or ``cls``, and ``text``, ``caption`` or
``captions``), ``KEY.mask.png`` and ``KEY.depth.png``. ``classes.txt`` beside the shards names the classes, one a line.
Members of all other kinds are passed over; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.image_folder import lines
from data_pipelines.labelled import Kind, LabelledPicture
from data_pipelines.shards import ShardSet
from mmagent.chat import Text
from mmagent.records import IMAGE_EXTENSIONS, Record, RecordError, from_sample

CLASSES = "classes.txt"
LOOKED_AT = 32  # samples that are asked what kinds of answers there are


class ImageShards:
    """All samples of a :class:`~data_pipelines.shards.ShardSet`."""

    def __init__(self, location: str, source: str = "", classes: Sequence[str] = ()):
        """Raises :class:`~data_pipelines.shards.ShardError`, a ``ValueError``, where there is no sample."""
        self.shards, self.source = ShardSet(location), source or location
        named = self.shards.paths[0].parent / CLASSES
        self.classes = tuple(classes) or (lines(named.read_text(encoding="utf-8")) if named.is_file() else ())
        self._numbers = {name: n for n, name in enumerate(self.classes)}
        self.holds = self._kinds()

    def _kinds(self) -> frozenset[Kind]:
        found: set[Kind] = set()
        looked = min(len(self), LOOKED_AT)
        bad: list[RecordError] = []
        for n in range(looked):
            try:
                picture = self[n * len(self) // looked]
            except RecordError as error:
                bad.append(error)  # whoever uses the sample counts it
                continue
            found |= {"label"} if picture.label is not None else set()
            found |= {"caption"} if picture.captions else set()
            found |= {"mask"} if picture.mask_data is not None else set()
            found |= {"depth"} if picture.depth_data is not None else set()
        if len(bad) == looked:
            raise ValueError(f"{self.source}: none of {looked} samples can be used; the first: {bad[0]}")
        return frozenset(found)

    @property
    def records(self) -> bool:
        """Whether these are the library's own records, which tell more than an image set has room for."""
        first = self.shards.read(0)
        return "json" in first and not any(name in IMAGE_EXTENSIONS for name in first)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> LabelledPicture:
        sample = self.shards.read(index)
        key = f"{self.where(index).partition('@')[0]}/{sample['__key__']}"
        plain = [name for name in sample if name in IMAGE_EXTENSIONS]
        if not plain and "json" in sample:
            return _from_record(from_sample(sample), key)
        if len(plain) != 1:
            there = ", ".join(name for name in sample if name != "__key__")
            raise RecordError(key, "image", f"{len(plain)} images where one is wanted; the sample has {there}")
        about = _about(sample, key)
        texts = [lines(_text(sample["txt"], key, "txt"))] if "txt" in sample else []
        for name in ("text", "caption", "captions"):
            said = about.get(name) or ()
            texts.append(tuple(t for t in ([said] if isinstance(said, str) else said) if isinstance(t, str)))
        label = _text(sample["cls"], key, "cls").strip() if "cls" in sample else about.get("label", about.get("cls"))
        return LabelledPicture(
            key,
            sample[plain[0]],
            None if label is None else self._label(label, key),
            next((found for found in texts if found), ()),
            sample.get("mask.png"),
            sample.get("depth.png"),
        )

    def _label(self, label: str | int, key: str) -> int:
        if str(label) in self._numbers:
            return self._numbers[str(label)]
        try:
            number = int(label) if type(label) in (str, int) else int(repr(label))
        except ValueError as error:
            known = f"none of the {len(self.classes)} of {CLASSES}" if self.classes else f"no number, without {CLASSES}"
            raise RecordError(key, "cls", f"class {label!r} is {known}") from error
        if number < 0 or (self.classes and number >= len(self.classes)):
            raise RecordError(key, "cls", f"class {number} of {len(self.classes)}")
        return number

    def where(self, index: int) -> str:
        return self.shards.where(index)

    def hint(self, kind: Kind) -> str:
        return {
            "label": "a sample's class is its KEY.cls, or label in its KEY.json",
            "caption": "a sample's captions are its KEY.txt, or caption in its KEY.json",
            "mask": "a sample's map of classes is its KEY.mask.png",
            "depth": "a sample's map of distances is its KEY.depth.png",
        }[kind]

    def fingerprint(self) -> str:
        return self.shards.fingerprint()


def _about(sample: Mapping[str, Any], key: str) -> dict[str, Any]:
    if "json" not in sample:
        return {}
    try:
        body = json.loads(sample["json"])
    except (ValueError, UnicodeDecodeError) as error:
        raise RecordError(key, "json", f"does not parse: {error}") from error
    return body if isinstance(body, dict) else {}


def _text(data: bytes, key: str, field: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RecordError(key, field, f"is no UTF-8: {error}") from error


def _from_record(record: Record, key: str) -> LabelledPicture:
    if not record.images:
        raise RecordError(key, "images", "a picture needs an image")
    caption = plain_text(record)
    return LabelledPicture(key, record.images[0].data, captions=(caption,) if caption else ())


def plain_text(record: Record) -> str:
    """All plain text of a record, in order."""
    parts = record.parts or tuple(part for message in record.messages for part in message.parts)
    return " ".join(part.text.strip() for part in parts if isinstance(part, Text)).strip()


def holds_shards(folder: Path) -> bool:
    """Whether there are tars in a folder itself."""
    return any(folder.glob("*.tar"))
