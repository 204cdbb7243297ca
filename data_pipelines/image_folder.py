"""A folder of image files as an :class:`~data_pipelines.labelled.ImageSet`.

``CLASS/any/where/image.jpg``   two sub-folders or more and no image beside them: the sub-folders are the classes
``image.txt``                   captions of ``image.jpg`` beside it, one a line
``captions.json`` ...           captions of all images: see :func:`read_table`
``image.mask.png``              classes of its pixels: values of a grey image or of a palette, the highest for "none"
``image.depth.png``             distances of its pixels, 16 bits, 0 for "unknown"

Maps may lie in ``FOLDER_mask/`` and ``FOLDER_depth/`` instead, under the path of their image with ``.png``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.labelled import Kind, LabelledPicture
from mmagent.records import IMAGE_EXTENSIONS, RecordError
from mmagent.retries import TRANSIENT, retried

TABLES = tuple(f"{name}{end}" for name in ("captions", "metadata") for end in (".json", ".jsonl", ".csv"))
MAPS = ("mask", "depth")
_QUOTED = re.compile(r'"[^"]*"?')
_HEADER = 1 << 16  # characters of a CSV file in which its header is looked for
_FILE, _TEXT = ("file_name", "image", "file"), ("text", "caption", "texts", "captions")


class ImageFolder:
    """All images below a folder, in the order of their paths. Names that begin with a dot do not count."""

    def __init__(self, root: Path, source: str = "", classes: Sequence[str] = ()):
        """``classes`` are those of all parts of a source of which this is one. Raises ``ValueError`` naming what cannot
        be used: no image there, a table that does not parse or speaks of other images."""
        self.root, self.source = root, source or str(root)
        there = list(walk(root))
        self._files = [name for name in there if _is_image(name)]
        if not self._files:
            raise ValueError(f"{self.source}: no image ({', '.join(IMAGE_EXTENSIONS)}) below {root}")
        self._beside = {name for name in there if not _is_image(name)}
        folders = {kind: root.with_name(f"{root.name}_{kind}") for kind in MAPS}
        self._apart = {kind: set(walk(folder)) if folder.is_dir() else set() for kind, folder in folders.items()}
        self._table = _table_of(root, set(self._files))
        labelled = any(row.label is not None for row in self._table.values())
        self.classes = tuple(classes) or _class_names(root, self._files, self._table)
        self._numbers = {name: n for n, name in enumerate(self.classes)}
        self._by_folder = not labelled and bool(self.classes)
        self.holds = self._kinds(labelled or self._by_folder)

    def _kinds(self, labelled: bool) -> frozenset[Kind]:
        found: set[Kind] = {"label"} if labelled else set()
        if any(row.captions for row in self._table.values()) or any(
            _stem(n) + ".txt" in self._beside for n in self._files
        ):
            found.add("caption")
        return frozenset(found | {kind for kind in MAPS if any(self._map(name, kind) for name in self._files)})

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> LabelledPicture:
        name = self._files[index]
        row = self._table.get(name, _Row())
        mask, depth = (self._map(name, kind) for kind in MAPS)
        return LabelledPicture(
            name,
            _read(self.root / name, name),
            self._label(name, row),
            row.captions or self._captions(name),
            _read(mask, name) if mask else None,
            _read(depth, name) if depth else None,
        )

    def _label(self, name: str, row: _Row) -> int | None:
        if self._by_folder:
            return self._numbers.get(name.partition("/")[0])
        return self._numbers[row.label] if isinstance(row.label, str) else row.label

    def _captions(self, name: str) -> tuple[str, ...]:
        text = _stem(name) + ".txt"
        if text not in self._beside:
            return ()
        try:
            return lines(_read(self.root / text, name).decode())
        except UnicodeDecodeError as error:
            raise RecordError(name, "caption", f"{text} is no UTF-8: {error}") from error

    def _map(self, name: str, kind: str) -> Path | None:
        beside, apart = f"{_stem(name)}.{kind}.png", f"{_stem(name)}.png"
        if beside in self._beside:
            return self.root / beside
        return self.root.with_name(f"{self.root.name}_{kind}") / apart if apart in self._apart[kind] else None

    def where(self, index: int) -> str:
        return self._files[index]

    def hint(self, kind: Kind) -> str:
        return {
            "label": "put the images of every class into a sub-folder of its name",
            "caption": "put captions of IMAGE.jpg into IMAGE.txt beside it, or of all into metadata.jsonl",
            "mask": "put the map of IMAGE.jpg into IMAGE.mask.png beside it",
            "depth": "put the map of IMAGE.jpg into IMAGE.depth.png beside it",
        }[kind]

    def fingerprint(self) -> str:
        """A digest of the paths and sizes of all images."""
        known = hashlib.blake2b(digest_size=8)
        for name in self._files:
            known.update(f"{name}:{(self.root / name).stat().st_size}\n".encode("utf-8", "surrogateescape"))
        return known.hexdigest()


def lines(text: str) -> tuple[str, ...]:
    """Captions as they lie in a text file: one a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def delimiter_of(header: str) -> str:
    """What stands between the columns of a CSV file by its first line: a comma, or what spreadsheets write instead (a
    semicolon, a tab, a bar) where there is none outside of quotes."""
    plain = _QUOTED.sub("", header)
    return "," if "," in plain else max(",;\t|", key=plain.count)


def image_files(root: Path) -> Iterator[str]:
    """Paths of images below ``root``, relative to it, in order; links are followed, though never in a circle."""
    return (name for name in walk(root) if _is_image(name))


def walk(root: Path, no_files: dict[str, str] | None = None) -> Iterator[str]:
    """Paths of all files below ``root``, relative to it, in order; names that begin with a dot do not count. Links are
    followed, though never in a circle. ``no_files`` is given what else there is, and what of each: a pipe, a link to
    nothing."""

    def below(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        status = folder.stat()
        me = (status.st_dev, status.st_ino)
        if me in above:
            return
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            what = _what(entry)
            if what == "folder":
                yield from below(folder / entry.name, f"{prefix}{entry.name}/", above | {me})
            elif what == "file":
                yield prefix + entry.name
            elif no_files is not None:
                no_files[prefix + entry.name] = what

    return below(root, "", frozenset())


def _what(entry: os.DirEntry[str]) -> str:
    """ "file", "folder", or in words what it is instead, after all links are followed."""
    try:
        if entry.is_file():  # known without asking, where it is no link
            return "file"
        if entry.is_dir():
            return "folder"
        mode = stat.S_IFMT(entry.stat().st_mode)
    except OSError as error:
        return f"a link that cannot be followed: {error.strerror}"
    return {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(mode, "a device")


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_image(name: str) -> bool:
    stem, _, extension = name.lower().rpartition(".")
    return extension in IMAGE_EXTENSIONS and not stem.endswith(tuple(f".{kind}" for kind in MAPS))


def class_names(root: Path) -> tuple[str, ...]:
    """The classes that a folder itself knows of: names of labels in its table, else its sub-folders."""
    files = list(image_files(root))
    return _class_names(root, files, _table_of(root, set(files)))


def _class_names(root: Path, files: Sequence[str], table: Mapping[str, _Row]) -> tuple[str, ...]:
    labels = {row.label for row in table.values() if row.label is not None}
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"{root}: labels must be all names or all numbers")
    if labels:
        return tuple(sorted(label for label in labels if isinstance(label, str)))
    if any("/" not in name for name in files):
        return ()
    folders = sorted({name.partition("/")[0] for name in files})
    return tuple(folders) if len(folders) > 1 else ()


@dataclass(frozen=True)
class _Row:
    """What a table says of an image."""

    captions: tuple[str, ...] = ()
    label: str | int | None = None


def _table_of(root: Path, files: set[str]) -> dict[str, _Row]:
    found = [root / name for name in TABLES if (root / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{root}: {found[0].name} and {found[1].name} both speak of the images; keep one")
    if not found:
        return {}
    table: dict[str, _Row] = {}
    for name, captions, label in read_table(found[0]):
        before = table.get(name, _Row())
        table[name] = _Row(before.captions + captions, label if label is not None else before.label)
    if table and not files & table.keys():
        raise ValueError(f"{found[0]}: speaks of images that are not there, such as {next(iter(table))!r}")
    return table


def read_table(path: Path) -> Iterator[tuple[str, tuple[str, ...], str | int | None]]:
    """``(image, captions, label)`` of every row of a table beside images.

    A row holds ``file_name`` (or ``image``, ``file``), ``text`` or ``caption`` (or a list of them: ``texts``,
    ``captions``) and ``label``, a name or a number. JSON lines and CSV have a row a line; JSON is a list of rows,
    ``{image: caption or captions}``, or ``images`` with ``annotations`` as COCO has them. Raises ``ValueError`` naming
    file and row.
    """
    try:
        rows = _rows(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: does not parse: {error}") from error
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not (file := next((row[k] for k in _FILE if row.get(k)), None)):
            raise ValueError(f"{path}: row {n} names no image in {', '.join(_FILE)}")
        said = [row[k] for k in _TEXT if row.get(k) is not None]
        texts = [text for one in said for text in (one if isinstance(one, list) else [one])]
        label = row.get("label")
        if label == "":
            label = None
        if not all(isinstance(text, str) for text in texts) or not (label is None or type(label) in (str, int)):
            raise ValueError(f"{path}: row {n}: captions must be text, and a label a name or a number")
        if isinstance(label, int) and label < 0:
            raise ValueError(f"{path}: row {n}: label {label} is negative")
        yield PurePosixPath(str(file)).as_posix(), tuple(text.strip() for text in texts if text.strip()), label


def _rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter_of(text[:_HEADER].partition("\n")[0])))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    body = json.loads(text)
    if not isinstance(body, dict):
        return list(body)
    if isinstance(body.get("images"), list) and isinstance(body.get("annotations"), list):
        try:
            files: Mapping[Any, str] = {image["id"]: image["file_name"] for image in body["images"]}
            return [{"file_name": files[a["image_id"]], "text": a["caption"]} for a in body["annotations"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"images and annotations lack {error}") from error
    return [{"file_name": name, "captions": [t] if isinstance(t, str) else t} for name, t in body.items()]


def _read(path: Path, key: str) -> bytes:
    try:
        return retried(path.read_bytes, path)
    except OSError as error:
        if error.errno in TRANSIENT:
            raise  # it is the storage, and not this image, that is bad
        raise RecordError(key, "file", f"cannot be read: {error}") from error
