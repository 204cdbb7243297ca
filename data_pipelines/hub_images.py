"""A data set of the ``datasets`` library, from the hub or a folder, as :class:`~data_pipelines.labelled.ImageSet`.

Columns are found by their types: the one column of images, the one of ``ClassLabel``, the one of text. Where there are
several, or none is right, :class:`ColumnsConfig` names them. Images are decoded by the library's own guarded reader.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_pipelines.labelled import Kind, LabelledPicture
from mmagent.config import first_line
from mmagent.records import RecordError

PREFIX = "datasets:"
BUILDERS = ("imagefolder", "parquet", "arrow")
_SOURCE = re.compile(r"(?P<id>.*?)(?::(?P<split>[A-Za-z_][\w.]*(?:\[[^\]]*\])?))?")
_CAPTIONS = ("caption", "captions", "text", "texts")
_SAMPLED = 64  # rows whose content tells one data set from another
NONE = "none"


@dataclass
class ColumnsConfig:
    """Columns of a data set: empty ones are found by their types, "none" leaves one out. Maps are never guessed.
    ``subset`` is the configuration of a data set that has several."""

    image: str = ""
    label: str = ""
    caption: str = ""
    mask: str = ""
    depth: str = ""
    subset: str = ""


def load_splits(source: str, subset: str = "") -> dict[str, Any]:
    """The splits by name of ``datasets:ID``, or of ``datasets:ID:SPLIT`` the one.

    ID is a data set of the hub, a folder that ``save_to_disk`` wrote, any other folder that ``load_dataset`` reads, or
    ``imagefolder:FOLDER``, ``parquet:FOLDER``, ``arrow:FOLDER``. Raises ``ValueError`` with the first line of what the
    library says where that is not to be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: needs the datasets library: pip install 'mmagent[datasets]'") from error
    builder, _, rest = source.removeprefix(PREFIX).partition(":")
    builder, rest = (builder, rest) if builder in BUILDERS else ("", source.removeprefix(PREFIX))
    match = _SOURCE.fullmatch(rest)
    name, split = (match["id"], match["split"]) if match else (rest, None)
    if not name:
        raise ValueError(f"{source}: names no data set; datasets:ID or datasets:ID:SPLIT")
    if builder and not Path(name).is_dir():
        raise ValueError(f"{source}: no folder {name}")
    try:
        if not builder and any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            if split and not isinstance(loaded, dict):
                raise ValueError(f"{name} was saved as one split, without a name")
            loaded = loaded[split] if split else loaded
        elif builder:
            loaded = datasets.load_dataset(builder, data_dir=name, split=split)
        else:
            loaded = datasets.load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source}: cannot be loaded: {first_line(error)}") from error
    if isinstance(loaded, dict):
        return dict(loaded)
    return {split or "": loaded}


class HubImages:
    """The rows of one split; ``split`` is its name."""

    def __init__(self, source: str, split: str, rows: Any, columns: ColumnsConfig):
        """``rows`` is a ``datasets.Dataset``. Raises ``ValueError`` naming the columns there are where those wanted are
        missing, of a wrong type, or not the only ones of their kind."""
        import datasets

        self.source, self.split, self._columns = source, split, columns
        self._types = dict(rows.features)
        for choice in fields(ColumnsConfig):
            chosen = getattr(columns, choice.name)
            if choice.name != "subset" and chosen and chosen != NONE and chosen not in self._types:
                raise ValueError(
                    f"{source}: no column {chosen!r} for {choice.name}; there are {', '.join(self._types)}"
                )
        images = [name for name, kind in self._types.items() if isinstance(kind, datasets.Image)]
        self._maps = {kind: self._map(kind, images) for kind in ("mask", "depth")}
        self._image = columns.image or self._only("image", [n for n in images if n not in self._maps.values()])
        if self._image not in images:
            raise ValueError(f"{source}: column {self._image!r} holds no images; {_listed(images)} do")
        named = [name for name, kind in self._types.items() if isinstance(kind, datasets.ClassLabel)]
        self._label = "" if columns.label == NONE else columns.label or (self._only("label", named) if named else "")
        self._texts = [name for name, kind in self._types.items() if _is_text(kind) and name != self._label]
        self._caption = self._captions()
        for name in [self._image, *filter(None, self._maps.values())]:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        self._rows = rows
        self.classes, self._numbers = self._classes()
        held = {"label": self._label, "caption": self._caption, **self._maps}
        self.holds: frozenset[Kind] = frozenset(kind for kind, column in held.items() if column)

    def _map(self, kind: str, images: list[str]) -> str:
        chosen = getattr(self._columns, kind)
        if chosen in ("", NONE):
            return ""
        if chosen not in images:
            raise ValueError(f"{self.source}: column {chosen!r} for {kind} holds no images; {_listed(images)} do")
        return chosen

    def _only(self, kind: str, found: list[str]) -> str:
        if len(found) == 1:
            return found[0]
        there = (
            f"{_listed(found)} could be the {kind}" if found else f"no column for {kind} among {', '.join(self._types)}"
        )
        raise ValueError(f"{self.source}: {there}; choose with {kind}=COLUMN" + (" or none" if kind == "label" else ""))

    def _captions(self) -> str:
        chosen = self._columns.caption
        if chosen == NONE:
            return ""
        if chosen:
            if chosen not in self._texts:
                raise ValueError(f"{self.source}: column {chosen!r} holds no text; {_listed(self._texts)} do")
            return chosen
        usual = [name for name in self._texts if name in _CAPTIONS]
        found = self._texts if len(self._texts) == 1 else usual
        return found[0] if len(found) == 1 else ""

    def _classes(self) -> tuple[tuple[str, ...], dict[Any, int]]:
        """Names, and the number of every value of the label's column where that is not itself a number."""
        if not self._label:
            return (), {}
        kind = self._types[self._label]
        if hasattr(kind, "names"):
            return tuple(kind.names), {}
        if getattr(kind, "dtype", "") in ("string", "large_string"):
            names = sorted(name for name in set(self._rows[self._label][:]) if name is not None)
            return tuple(names), {name: n for n, name in enumerate(names)}
        if "int" in str(getattr(kind, "dtype", "")):
            return (), {}
        raise ValueError(f"{self.source}: column {self._label!r} for label holds {kind}, no class")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> LabelledPicture:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.source}: row {index} of {len(self)}")
        key, row = self.where(index), self._rows[index]
        label = row[self._label] if self._label else None
        said = row[self._caption] if self._caption else None
        captions = [said] if isinstance(said, str) else said or ()
        data = _bytes(row[self._image], key, self._image)
        if data is None:
            raise RecordError(key, self._image, "is empty")
        number = None if label is None else self._numbers.get(label, label)
        return LabelledPicture(
            key,
            data,
            None if number is None or number < 0 else int(number),  # -1 stands for "not known" in test sets of the hub
            tuple(text.strip() for text in captions if text and text.strip()),
            *(_bytes(row[column], key, column) if column else None for column in self._maps.values()),
        )

    def where(self, index: int) -> str:
        return f"{self.split or 'row'}/{index}"

    def hint(self, kind: Kind) -> str:
        there = ", ".join(self._types)
        if kind == "caption" and len(self._texts) > 1:
            return f"{_listed(self._texts)} hold text: choose with caption=COLUMN"
        return f"its columns are {there}: choose with {kind}=COLUMN"

    def fingerprint(self) -> str:
        """A digest of the columns' types, the number of rows, and the content of some of them: the library's own
        fingerprint changes with the time stamps of files."""
        known = hashlib.blake2b(digest_size=8)
        known.update(f"{self.split} {len(self)} {sorted((n, str(t)) for n, t in self._types.items())}".encode())
        for n in range(min(len(self), _SAMPLED)):
            try:
                picture = self[n * len(self) // min(len(self), _SAMPLED)]
            except RecordError as error:
                known.update(str(error).encode())
            else:
                known.update(repr((hashlib.blake2b(picture.data).digest(), picture.label, picture.captions)).encode())
        return known.hexdigest()


def _is_text(kind: Any) -> bool:
    """A column of text, or of lists of texts."""
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)
    return getattr(inner, "dtype", "") in ("string", "large_string")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _bytes(value: Any, key: str, column: str) -> bytes | None:
    """Of an image as it is kept: inside the table, or as a file of its own on this machine."""
    if value is None:
        return None
    if value.get("bytes"):
        return value["bytes"]
    if not value.get("path"):
        return None
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise RecordError(key, column, f"cannot be read: {error}") from error
