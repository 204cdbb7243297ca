"""Published sets of questions about pictures and videos: what they have in common, and how their rows are found.

A set is a folder as its authors publish it, one annotation file of it, a folder that `datasets` saved or a clone with
parquet files, or ``datasets:ID`` (``datasets:ID@CONFIG`` where the hub has several). A :class:`QuestionSet` says which
files hold the rows and how a row is read; `evals.published_sets` has those that are known.

Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mmagent.geometry import frames_within
from mmagent.records import decode_image
from mmagent.tasks.published import HUB, is_saved, parquet_splits, splits_of
from mmagent.videos import VideoError, read_frames, shrunk

FRAMES, FRAMES_TOKENS = 32, 6144
"""Of a video that are shown, and the visual tokens that all of them may have: with the question they fit into 8192."""


@dataclass(frozen=True)
class Shown:
    """What a question is about: ``images``, ``(height, width, 3)`` uint8 each; the frames of a video have ``times``, a
    second each."""

    images: tuple[np.ndarray, ...]
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Question:
    """One item: ``text`` as it is asked; ``answers`` as published, the first of which scores best (1, but where people
    were asked and disagree); ``options`` by letter, where it has some; ``kind``: what a judge must know beside.
    ``slices`` name the groups that its score is shown by."""

    key: str
    text: str
    answers: tuple[str, ...]
    load: Callable[[], Shown]
    slices: Mapping[str, str]
    options: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture that is decoded when it is called; ``encoded`` reads it as it is stored."""

    encoded: Callable[[], bytes]
    place: str

    def __call__(self) -> Shown:
        return Shown((decode_image(self.encoded(), self.place),))


@dataclass(frozen=True)
class Files:
    """Annotation files of a set: their ``pattern`` within its folder, ``values`` that all their rows have, and the
    folders in which paths of ``pictures`` begin, seen from the file; the first that holds a picture gives it."""

    pattern: str
    values: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class QuestionSet:
    """How set ``name`` is read. ``layouts`` are folders that its rows may lie in, the first that is there counts and
    must be whole; ``splits`` of a dataset are those of which the first that is there is judged, all without any."""

    name: str
    read: Callable[[Row], Question]
    layouts: tuple[tuple[Files, ...], ...]
    splits: tuple[str, ...] = ()


SAMPLED = 64
"""Pictures of a set, evenly chosen, whose bytes its digest holds: all of them may be gigabytes."""


class Row:
    """One row: its ``values`` by column, its ``place`` for messages, its ``number``, the encoded pictures that are in
    it (``cells``, read when called), the folders in which its paths of pictures begin (``bases``, none where paths lead
    nowhere), and the folder that it lies in, ``root``, where there is one. ``file``: the name of its file."""

    def __init__(
        self, values: Mapping[str, Any], place: str, number: int, *,
        cells: Mapping[str, Callable[[], bytes]] | None = None, bases: Sequence[Path] = (), root: Path | None = None,
        file: str = "",
    ):  # fmt: skip
        self.values, self.place, self.number, self.file = values, place, number, file
        self.cells, self.bases, self.root = cells or {}, bases, root

    def wrong(self, what: str) -> ValueError:
        """The error to raise: ``what`` is wrong, with the row's place before it."""
        return ValueError(f"{self.place}: {what}")

    def get(self, *columns: str) -> Any:
        """The value of the first of ``columns`` that is there. Raises ``ValueError`` where none is."""
        for name in columns:
            if self.values.get(name) is not None:
                return self.values[name]
        raise self.wrong(f"there is no {' or '.join(columns)}, but {', '.join(self.values) or 'nothing'}")

    def text(self, *columns: str) -> str:
        """A text that is not empty. Raises ``ValueError`` for anything else."""
        value = self.get(*columns)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{' or '.join(columns)} must be a text, not {value!r:.60}")
        return value

    def texts(self, *columns: str, least: int = 1, blank: bool = False) -> tuple[str, ...]:
        """A list of at least so many texts, one of them not ``blank``, which the others may be or are left out; a text
        alone is a list of one. Raises ``ValueError`` for anything else."""
        value = self.get(*columns)
        listed = (value,) if isinstance(value, str) else value
        whole = isinstance(listed, Sequence) and all(isinstance(one, str) for one in listed)
        kept = tuple(one for one in listed if blank or one.strip()) if whole else ()
        if len(kept) < least or not any(one.strip() for one in kept):
            raise self.wrong(f"{' or '.join(columns)} must be a list of texts, not {value!r:.60}")
        return kept

    def choices(self, column: str) -> dict[str, str]:
        """Options by letter; none where the column is empty. Raises ``ValueError`` for what is no list of texts."""
        value = self.values.get(column)
        if value is None or (isinstance(value, Sequence) and len(value) == 0):
            return {}
        return dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", self.texts(column, blank=True), strict=False))

    def word(self, column: str) -> str:
        """What a slice is called: the column's value, or "other"."""
        return str(self.values.get(column) or "other")

    def picture(self, *columns: str, suffix: str = "") -> Picture:
        """The picture of the first of ``columns`` that has one, itself or by its path; ``suffix`` goes behind a path
        without one, and what lies elsewhere under the same name is taken. Raises ``ValueError`` where none has."""
        for name in columns:
            cell, path = self.cells.get(name), self.values.get(name)
            if cell is not None:
                return Picture(cell, self.place)
            if self.bases and isinstance(path, str) and path:
                file = path if Path(path).suffix else path + suffix
                return Picture(functools.partial(_stored, self.bases, file), self.place)
        if any(isinstance(self.values.get(name), str) for name in columns):
            raise self.wrong(f"its column {columns[0]!r} holds no pictures; give the folder of a clone of the dataset")
        raise self.wrong(f"no object with the path of an image in {' or '.join(columns)}")

    def folder(self) -> Path:
        """``root``. Raises ``ValueError`` where there is none: videos are never in the rows themselves."""
        if self.root is None:
            raise self.wrong("the hub has its videos in archives; give the folder of a clone where they are unpacked")
        return self.root


def _stored(bases: Sequence[Path], file: str) -> bytes:
    return found_in(bases, file, Path(file).name).read_bytes()


def watch(file: Path, clip: tuple[float, float] | None = None) -> Shown:
    """:data:`FRAMES` of a video, evenly spaced from the first to the last (within the seconds of ``clip``), all of one
    that has fewer, in sizes with which they keep within :data:`FRAMES_TOKENS`. Raises ``ValueError`` naming the file
    where it is broken."""
    tokens = 0

    def choose(seconds: np.ndarray) -> list[int]:
        nonlocal tokens
        tokens, chosen = _spread(seconds, clip)
        return chosen

    try:
        frames = [(second, np.asarray(shrunk(image, tokens))) for second, image in read_frames(file, choose)]
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error
    return Shown(tuple(pixels for _, pixels in frames), tuple(second for second, _ in frames))


def leaf_through(folder: Path, rate: float, clip: tuple[float, float] | None = None) -> Shown:
    """The same of a video that is a folder of pictures, ``rate`` a second, in the order of their names."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".jpg", ".png"))
    if not files:
        raise ValueError(f"{folder} holds no frames")
    seconds = np.arange(len(files)) / rate
    try:
        tokens, chosen = _spread(seconds, clip)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    images = [PILImage.fromarray(decode_image(files[n].read_bytes(), str(files[n]))) for n in chosen]
    return Shown(tuple(np.asarray(shrunk(image, tokens)) for image in images), tuple(float(seconds[n]) for n in chosen))


def _spread(seconds: np.ndarray, clip: tuple[float, float] | None) -> tuple[int, list[int]]:
    """The visual tokens that a frame may have, and the frames that are shown of those at ``seconds``."""
    first, last = clip or (0.0, math.inf)
    there = np.flatnonzero((seconds >= first) & (seconds <= last))
    if there.size == 0:
        raise VideoError(f"no frame of its {seconds[-1]:g} seconds is between {first:g} and {last:g}")
    even = np.unique(np.linspace(0, there.size - 1, min(FRAMES, there.size)).round().astype(int))
    tokens, kept = frames_within(len(even), FRAMES_TOKENS)
    return tokens, [int(there[even[n]]) for n in kept]


def found_in(bases: Sequence[Path], *names: str) -> Path:
    """The first file of ``names`` in the folders ``bases``. Raises ``ValueError`` where there is none, and for a name
    that leads out of them."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{bases[0]}: the path {name!r} leads out of the set")
    paths = list(dict.fromkeys(base / name for base in bases for name in names))
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        more = f", and so is what else it may be called ({len(paths) - 1} paths)" if len(paths) > 1 else ""
        raise ValueError(f"{paths[0]} is missing{more}")
    return found


def load_questions(of: QuestionSet, where: str | Path) -> list[Question]:
    """All questions of a set in ``where`` (see the module). Raises ``ValueError`` naming set, row and what is missing
    or wrong."""
    text, path = str(where), Path(where).expanduser()
    if text.startswith(HUB):
        rows = _of_dataset(of, text, splits_of(text))
    elif not path.exists():
        raise ValueError(f"{of.name}: {path} is missing")
    elif path.is_file():
        layout = (files for files in (one for each in of.layouts for one in each) if path.match(files.pattern))
        rows = _of_file(path, next(layout, Files(path.name)))
    elif is_saved(path):
        rows = _of_dataset(of, str(path), splits_of(str(path)))
    else:
        rows = _of_folder(of, path)
    met: dict[str, int] = {}
    questions = []
    for row in rows:
        row.place = f"{of.name}, {row.place}"
        question = of.read(row)
        met[question.key] = met.get(question.key, 0) + 1
        again = met[question.key]  # ids that a set uses twice
        questions.append(question if again == 1 else replace(question, key=f"{question.key}~{again}"))
    if not questions:
        raise ValueError(f"{of.name}: {where} holds no questions")
    return questions


def digest(questions: Sequence[Question]) -> str:
    """Of all that is asked and of what is right, and of :data:`SAMPLED` pictures as they are stored (of videos only the
    names are told). Raises ``ValueError`` where one of those is missing."""
    told = [[q.key, q.text, *q.answers, *q.options.values(), *((q.kind,) if q.kind else ())] for q in questions]
    found = hashlib.sha256(json.dumps(told).encode())
    chosen = np.unique(np.linspace(0, len(questions) - 1, min(SAMPLED, len(questions))).round().astype(int))
    for picture in (questions[n].load for n in chosen):
        if isinstance(picture, Picture):
            try:
                found.update(hashlib.sha256(picture.encoded()).digest())
            except ValueError as error:
                raise ValueError(f"{picture.place}: {error}") from error
    return found.hexdigest()[:12]


def _of_folder(of: QuestionSet, folder: Path) -> Iterator[Row]:
    for layout in of.layouts:
        found = [(files, sorted(folder.glob(files.pattern))) for files in layout]
        if any(paths for _, paths in found):
            for files, paths in found:
                if not paths:
                    raise ValueError(f"{of.name}: {folder / files.pattern} is missing")
                for path in paths:
                    empty = True
                    for row in _of_file(path, files):
                        empty = False
                        yield row
                    if empty:
                        raise ValueError(f"{of.name}: {path} holds no questions")
            return
    found = parquet_splits(folder)
    if not found:
        wanted = " or ".join(" and ".join(files.pattern for files in layout) for layout in of.layouts)
        raise ValueError(f"{of.name}: {folder}: {wanted} is missing, and there is nothing that `datasets` saved")
    yield from _of_dataset(of, str(folder), found)


def _of_file(file: Path, files: Files) -> Iterator[Row]:
    for number, name, values in _objects(file):
        place = f"{file}, {name}"
        if not isinstance(values, dict):
            raise ValueError(f"{place}: no object with the path of an image, but {values!r:.60}")
        bases = [file.parent / base for base in files.pictures]
        yield Row({**files.values, **values}, place, number, bases=bases, root=file.parent, file=file.stem)


def _objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Rows of a file, their numbers and what they are called: lines of JSON (``.jsonl``), or a list, an object of rows
    by their name, or either of them as its "data"."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8: {error}") from error
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # texts may hold other signs that end lines
            if line.strip():
                yield number, f"line {number}", _parsed(line, f"{file}, line {number}")
        return
    body = _parsed(text, str(file))
    if isinstance(body, dict) and "data" in body:
        body = body["data"]
    if not isinstance(body, list | dict):
        raise ValueError(f"{file}: a list of rows is expected, or an object of them")
    named: Iterable[tuple[Any, Any]] = body.items() if isinstance(body, dict) else enumerate(body, 1)
    for number, (name, values) in enumerate(named, 1):
        yield number, f"row {name}", values


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: no JSON: {error}") from error


def _of_dataset(of: QuestionSet, where: str, found: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of what `datasets` gives, pictures apart, names of classes in place of their numbers."""
    if of.splits and tuple(found) != ("row",):
        judged = next((split for split in of.splits if split in found), None)
        if judged is None:
            wanted = f"{of.name} is judged on {' or '.join(of.splits)}"
            raise ValueError(f"{of.name}: {where} has the splits {', '.join(found)}; {wanted}")
        found = {judged: found[judged]}
    for split, rows in found.items():
        pictures = {name: one for name, one in rows.features.items() if getattr(one, "decode", None) is not None}
        encoded = {name: rows.select_columns([name]) for name in pictures}
        encoded = {name: one.cast_column(name, type(pictures[name])(decode=False)) for name, one in encoded.items()}
        classes = {name: one.names for name, one in rows.features.items() if hasattr(one, "names")}
        for number, values in enumerate(rows.remove_columns(list(pictures))):
            for name, names in classes.items():
                values[name] = None if values[name] is None else names[values[name]]
            place = f"{where}, {split} {number}"

            cells = {name: _cell(one, name, number, place) for name, one in encoded.items()}
            yield Row(values, place, number, cells=cells, root=None if where.startswith(HUB) else Path(where))


def _cell(rows: Any, column: str, number: int, place: str) -> Callable[[], bytes]:
    def read() -> bytes:
        cell = rows[number][column]
        if not cell or not (cell.get("bytes") or cell.get("path")):
            raise ValueError(f"{place}: its column {column!r} holds no picture")
        return cell["bytes"] or Path(cell["path"]).read_bytes()

    return read
