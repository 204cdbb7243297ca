"""What a SOURCE is: a file, or a folder of them, by its names and first bytes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.hub_images import PREFIX, load_splits
from data_pipelines.image_folder import read_table, walk
from data_pipelines.ingest.files import MAX_FILE, RefusedError, Root, key_of, refused_file, stamp_of
from data_pipelines.ingest.inputs import (
    BadTask,
    CellsTask,
    FilesTask,
    InputTask,
    JsonTask,
    PagesTask,
    ParquetTask,
    Place,
    SamplesTask,
    TableTask,
    csv_rows,
    element_spans,
    in_batches,
    line_spans,
)
from data_pipelines.ingest.video import EXTENSIONS as VIDEO_EXTENSIONS
from data_pipelines.shards import ShardError, scan
from mmagent.records import IMAGE_EXTENSIONS

KINDS = {
    "tar": ("tar",),
    "parquet": ("parquet",),
    "rows": ("jsonl", "ndjson", "json", "csv", "tsv"),
    "images": IMAGE_EXTENSIONS,
    "videos": VIDEO_EXTENSIONS,
    "pdf": ("pdf",),
}
_KIND = {end: kind for kind, ends in KINDS.items() for end in ends}
_PACKED = ("gz", "zst", "bz2", "xz", "zip", "tgz")
_SAVED = ("dataset_dict.json", "state.json")
_OF_LIBRARIES = ("dataset_info.json", "dataset_infos.json", "config.json", "card.json", "plan.json", "report.json")
_TABLE_ROWS = 64
_SAID, _NAMED = 5, 20  # files of a kind that are left aside: named in a line, and in the report


class SourceError(ValueError):
    """A SOURCE that cannot be read at all; the message names it and what to do."""


@dataclass(frozen=True)
class Input:
    """One file, or the images or videos of one folder. ``size`` in bytes, as far as it is known; ``stamp`` changes
    with the size or the time of change of any file of it. ``refused``: what was found on the way that is no file."""

    kind: str
    place: Place
    size: int
    stamp: str = ""
    names: tuple[str, ...] = ()
    dpi: int = 144
    refused: tuple[BadTask, ...] = ()

    def tasks(self) -> Iterator[InputTask]:
        """In order, always the same. A file that cannot be opened is one refusal."""
        try:
            yield from self._tasks()
        except OSError as error:
            yield BadTask(self.place, refused_file(error, self.place.name))
        yield from self.refused

    def _tasks(self) -> Iterator[InputTask]:
        if self.kind in ("images", "videos"):
            return _files(self)
        if self.kind == "pdf":
            return iter([PagesTask(self.place, self.dpi, self.size)])
        find = {"tar": _samples, "parquet": _groups, "dataset": _splits, "rows": _rows}[self.kind]
        return find(self.place)


@dataclass(frozen=True)
class Aside:
    """Files of a folder that are not read, by ``counts`` of their kinds, with some ``names`` of each; ``chosen`` is the
    kind that the folder is read by, "" where it is by all it has."""

    folder: str
    chosen: str
    counts: dict[str, int]
    names: dict[str, tuple[str, ...]]

    def told(self) -> str:
        """For people."""
        kinds = []
        for kind, count in self.counts.items():
            seen = kind in ("images", "videos")
            some = ", ".join(ascii(name)[1:-1] for name in self.names[kind][:_SAID])
            more = ", ..." if count > _SAID else ""
            kinds.append(f"{count} {kind}" if seen else f"{count} {kind} files ({some}{more})")
        hint = (
            "; rows may name them, by paths relative to --images FOLDER"
            if self.chosen and {"images", "videos"} & {*self.counts}
            else ""
        )
        if self.chosen and {*KINDS} & {*self.counts} - {"images", "videos"}:
            hint += f"; a folder is read by its {self.chosen} files if it has any: ingest others by themselves"
        return f"{self.folder}: left aside: {', '.join(kinds)}{hint}"

    def kinds(self) -> list[dict[str, Any]]:
        """For the report."""
        return [
            {"folder": self.folder, "kind": kind, "count": count, "names": list(self.names[kind])}
            for kind, count in self.counts.items()
        ]


def find_inputs(
    source: str, prefix: str, images: str = "", outside: bool = False, dpi: int = 144
) -> tuple[list[Input], Aside | None]:
    """The inputs of a SOURCE, and what is left aside of it. Raises :class:`SourceError`."""
    path = Path(source)
    if source.startswith(PREFIX) or (path.is_dir() and any((path / name).is_file() for name in _SAVED)):
        spec = source if source.startswith(PREFIX) else PREFIX + source
        folder = images or (source if path.is_dir() else os.curdir)
        place = Place(spec, prefix + key_of(path.name, extension=False), source, Root(folder, folder, outside))
        try:
            size = sum(table.data.nbytes for table in load_splits(spec).values())
        except ValueError as error:
            raise SourceError(str(error)) from error
        stamp = _stamp(path, walk(path)) if path.is_dir() else ""
        return [Input("dataset", place, size, stamp)], None
    if path.is_file():
        kind = _KIND.get(_end(path.name))
        if kind is None:
            raise SourceError(f"{source}: {_unknown(path.name)}")
        return [_input(kind, path.parent, path.name, prefix, images, outside, dpi)], None
    if not path.is_dir():
        raise SourceError(f"{source}: no such file or folder; a data set of the hub is called {PREFIX}ID")
    return _folder(path, prefix, images, outside, dpi)


def _folder(path: Path, prefix: str, images: str, outside: bool, dpi: int) -> tuple[list[Input], Aside | None]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    files: dict[str, list[str]] = {kind: [] for kind in ("tar", "parquet", "rows", "pdf")}
    some: dict[str, list[str]] = {}
    no_files: dict[str, str] = {}
    seen = _digest()
    for name in walk(path, no_files):
        kind = _kind(path, name)
        counts[kind] += 1
        if counts[kind] <= _NAMED:
            some.setdefault(kind, []).append(name)
        if kind in files:
            files[kind].append(name)
        elif kind in ("images", "videos", "beside"):
            sizes[kind] += _add(seen, path, name)
    chosen = next((kind for kind in ("tar", "parquet", "rows") if counts[kind]), "")
    if chosen:
        inputs = [_input(chosen, path, name, prefix, images, outside, dpi) for name in files[chosen]]
    else:
        root = Root(str(path), str(path), outside)
        at = Place(str(path), prefix, str(path), root)
        inputs = [Input(kind, at, sizes[kind], seen.hexdigest()) for kind in ("images", "videos") if counts[kind]]
        inputs += [_input("pdf", path, name, prefix, images, outside, dpi) for name in files["pdf"]]
    if not inputs:
        others = f", and {len(no_files)} links, pipes or devices" if no_files else ""
        raise SourceError(f"{path}: nothing here that can be read; there are {_told(counts) or 'no files'}{others}")
    inputs[-1] = replace(inputs[-1], refused=tuple(_no_file(path, prefix, *item) for item in no_files.items()))
    used = {item.kind for item in inputs} | {"beside"}
    aside = {kind: count for kind, count in counts.items() if kind not in used}
    return inputs, Aside(str(path), chosen, aside, {kind: tuple(some[kind]) for kind in aside}) if aside else None


def _no_file(path: Path, prefix: str, name: str, what: str) -> BadTask:
    place = Place(str(path / name), prefix + key_of(name), ascii(name)[1:-1], Root(str(path), str(path)))
    return BadTask(place, RefusedError("path", f"is no file but {what}"))


def _told(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count} {kind if kind in ('images', 'videos') else f'{kind} files'}" for kind, count in counts.items()
    )


def _end(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _kind(folder: Path, name: str) -> str:
    """What a file of a folder is: one of :data:`KINDS`, ``beside`` for what belongs to an image, or its extension."""
    end = _end(name)
    if end in ("txt", "json"):
        stem = name.rpartition(".")[0]
        shown = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
        if any(os.path.lexists(folder / f"{stem}.{other}") for end in shown for other in (end, end.upper())):
            return "beside"
    if name.rpartition("/")[2] in _OF_LIBRARIES:
        return "json"
    return _KIND.get(end, end or "nameless")


def _unknown(name: str) -> str:
    if _end(name) in _PACKED:
        return "is compressed; unpack it first"
    return f"files of this kind cannot be read; those that can are {', '.join(sorted(_KIND))}"


def _input(kind: str, folder: Path, name: str, prefix: str, images: str, outside: bool, dpi: int) -> Input:
    """A file ``name`` below ``folder``, which is as far as its paths may lead."""
    path = folder / name
    own = str(path.parent if kind == "rows" else folder)
    root = Root(images or own, images or str(folder), outside)
    size = path.stat().st_size
    if kind in ("images", "videos"):
        stem = name.rpartition(".")[0]
        stamp = _stamp(folder, (name, f"{stem}.txt", f"{stem}.json"))
        return Input(kind, Place(str(path), prefix, name, root), size, stamp, (name,))
    return Input(kind, Place(str(path), prefix + key_of(name), name, root), size, _stamp(folder, (name,)), dpi=dpi)


def _stamp(folder: Path, names: Iterable[str]) -> str:
    """Of files below a folder: a digest of their names, sizes and times of change."""
    found = _digest()
    for name in names:
        _add(found, folder, name)
    return found.hexdigest()


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8)


def _add(found: hashlib.blake2b, folder: Path, name: str) -> int:
    """Take a file into a digest; how many bytes it has."""
    size, time = stamp_of(os.path.join(folder, name))
    found.update(repr((name, size, time)).encode("utf-8", "surrogateescape"))
    return max(size, 0)


# ------------------------------------------------------------------------------------------------ tasks of one input


def _files(found: Input) -> Iterator[InputTask]:
    folder = Path(found.place.root.folder)
    at = found.place.root.folder
    names = found.names or (name for name in walk(folder) if _KIND.get(_end(name)) == found.kind)
    column = "image" if found.kind == "images" else "video"
    for batch, size in in_batches((name, _size(os.path.join(at, name))) for name in names):
        yield FilesTask(found.place, tuple(batch), column, size)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # whoever reads it finds out


def _rows(place: Place) -> Iterator[InputTask]:
    path = Path(place.path)
    if path.suffix.lower() in (".csv", ".tsv"):
        first = 1
        for cells, size in in_batches(csv_rows(path)):
            yield CellsTask(place, first, tuple(cells), size)
            first += len(cells)
        return
    if path.suffix.lower() == ".json" and _first_byte(path) != b"[":
        yield from _table(place, path)
        return
    spans = element_spans(path) if path.suffix.lower() == ".json" else line_spans(path)
    for batch, _ in in_batches((span, span[1]) for span in spans):
        yield JsonTask(place, tuple(batch))


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _table(place: Place, path: Path) -> Iterator[InputTask]:
    """Captions of images as COCO has them, or by their names: a JSON object, which is read whole."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"a JSON object of {path.stat().st_size} bytes, the limit is {MAX_FILE}; a list has none")
        rows = [({"image": name, "texts": list(texts)}, 0) for name, texts, _ in read_table(path)]
    except (ValueError, RecursionError) as error:
        problem = str(error).removeprefix(f"{path}: ")
        yield BadTask(place, RefusedError("json", f"neither a list of rows nor captions of images: {problem}"))
        return
    for first in range(0, len(rows), _TABLE_ROWS):
        batch = tuple(cells for cells, _ in rows[first : first + _TABLE_ROWS])
        yield CellsTask(place, first + 1, batch, path.stat().st_size * len(batch) // len(rows))


def _samples(place: Place) -> Iterator[InputTask]:
    keys: list[str] = []
    try:
        index, torn = scan(Path(place.path), keys)
    except (ShardError, OSError) as error:
        yield BadTask(place, RefusedError("shard", str(error).removeprefix(f"{place.path}: ")))
        return
    seen: set[str] = set()
    spans = []
    for key, (offset, size, _) in zip(keys, index.entries.tolist(), strict=True):
        spans.append(((key, offset, size, key in seen), size))
        seen.add(key)
    for batch, _ in in_batches(spans):
        yield SamplesTask(place, tuple(span[:3] for span in batch), tuple(span[3] for span in batch))
    if torn is not None:
        yield BadTask(place, RefusedError("torn shard", f"cut short at byte {torn.offset}: {torn.problem}"))
    elif not spans:
        yield BadTask(place, RefusedError("shard", "there is no sample in it"))


def _groups(place: Place) -> Iterator[InputTask]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise SourceError(f"{place.path}: needs the library pyarrow: pip install 'mmagent[ingest]'") from error
    try:
        with parquet.ParquetFile(place.path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            counts = [(group.num_rows, group.total_byte_size) for group in groups]
    except (ArrowException, OSError, ValueError) as error:
        yield BadTask(place, RefusedError("parquet", f"cannot be opened: {str(error).splitlines()[0]}"))
        return
    first = 1
    total = sum(size for _, size in counts) or 1
    whole = Path(place.path).stat().st_size
    for group, (rows, size) in enumerate(counts):
        yield ParquetTask(place, group, first, rows, whole * size // total)
        first += rows


def _splits(place: Place) -> Iterator[InputTask]:
    tables: dict[str, Any] = load_splits(place.path)
    for split, table in tables.items():
        at = Place(
            place.path, f"{place.prefix}/{split}" if split else place.prefix, f"{place.name}:{split}", place.root
        )
        each = (table.data.nbytes or 0) // max(len(table), 1)
        for first in range(0, len(table), _TABLE_ROWS):
            rows = min(_TABLE_ROWS, len(table) - first)
            yield TableTask(at, split, first, rows, each * rows)
