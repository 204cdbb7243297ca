"""Where rows come from: files of every kind cut into tasks that a process can read by itself.

A row is a mapping of columns, whatever file it came from; :mod:`data_pipelines.ingest.styles` reads it. Finding the
tasks reads no more of a file than says where its rows begin, and keeps nothing of it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipelines.image_folder import delimiter_of, lines
from data_pipelines.ingest.files import MAX_FILE, RefusedError, Root, key_of
from data_pipelines.ingest.pdf import MAX_PAGES, PdfPage, read_pages
from data_pipelines.ingest.video import EXTENSIONS as VIDEO_EXTENSIONS
from data_pipelines.shards import MAX_SAMPLE, parse_sample
from mmagent.records import IMAGE_EXTENSIONS, RecordError
from mmagent.retries import TRANSIENT

ROWS = 32  # at most in one task, so that processes share the work and little is lost with one
BYTES = 1 << 20  # and not much more than these, where rows can be counted in bytes
_MAX_CELL = 1 << 25  # characters of a cell of CSV, which is parsed before a process with limits sees it
RECORD = "\0record"
"""The column of a row that holds a sample of the library's own."""
_DIGITS = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Row:
    """``cells`` by column. ``where`` tells people where it is, ``root`` is what its paths are relative to."""

    key: str
    where: str
    cells: Mapping[str, Any]
    root: Root


@dataclass(frozen=True)
class Bad:
    """A row that could not even be read."""

    key: str
    where: str
    error: RefusedError
    rows: int = 1  # that are lost with it


Raw = Row | Bad


@dataclass(frozen=True)
class Place:
    """What a task is of: a file, the ``prefix`` of its rows' keys, its ``name`` for people, the root of its paths."""

    path: str
    prefix: str
    name: str
    root: Root

    def key(self, number: int) -> str:
        return f"{self.prefix}/{number:08d}"


def parse_json(data: bytes | str) -> Any:
    """Raises :class:`RefusedError` for what is no JSON, or nested too deep to be read."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise RefusedError("json", f"is no UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise RefusedError("json", "lists and objects stand too deep in one another") from error
    except json.JSONDecodeError as error:
        raise RefusedError("json", f"does not parse: {error.msg} at character {error.pos + 1} of it") from error
    except ValueError as error:
        raise RefusedError("json", f"does not parse: {error}") from error


def _object(data: bytes) -> dict[str, Any]:
    body = parse_json(data)
    if not isinstance(body, dict):
        raise RefusedError("json", f"a row must be an object, got {type(body).__name__}")
    return body


@dataclass(frozen=True)
class JsonTask:
    """Objects of a JSON or JSON lines file: ``spans`` are (first byte, bytes, number of the line or object)."""

    place: Place
    spans: tuple[tuple[int, int, int], ...]

    @property
    def rows(self) -> int:
        return len(self.spans)

    @property
    def size(self) -> int:
        return sum(size for _, size, _ in self.spans)

    def name(self, row: int) -> tuple[str, str]:
        offset, _, number = self.spans[row]
        if self.place.path.lower().endswith(".json"):  # a list, whose rows are no lines
            return self.place.key(number), f"{self.place.name} row {number}, from byte {offset}"
        return self.place.key(number), f"{self.place.name}:{number}"

    def read(self, start: int) -> Iterator[Raw]:
        with open(self.place.path, "rb") as file:
            for row in range(start, len(self.spans)):
                offset, size, _ = self.spans[row]
                key, where = self.name(row)
                try:
                    if size > MAX_FILE:
                        raise RefusedError("json", f"a row of {size} bytes, the limit is {MAX_FILE}")
                    file.seek(offset)
                    yield Row(key, where, _object(file.read(size)), self.place.root)
                except RefusedError as error:
                    yield Bad(key, where, error)


@dataclass(frozen=True)
class CellsTask:
    """Rows that were read already: of a CSV file, or of a table beside images."""

    place: Place
    first: int
    cells: tuple[Mapping[str, Any], ...]
    size: int

    @property
    def rows(self) -> int:
        return len(self.cells)

    def name(self, row: int) -> tuple[str, str]:
        return self.place.key(self.first + row), f"{self.place.name} row {self.first + row}"

    def read(self, start: int) -> Iterator[Raw]:
        for row in range(start, len(self.cells)):
            key, where = self.name(row)
            problem = self.cells[row].get("\0problem")
            if problem:
                yield Bad(key, where, RefusedError("csv", str(problem)))
            else:
                yield Row(key, where, self.cells[row], self.place.root)


@dataclass(frozen=True)
class FilesTask:
    """Images or videos below a folder, each with what lies beside it: ``NAME.txt`` with captions, ``NAME.json``."""

    place: Place
    names: tuple[str, ...]
    column: str
    size: int

    @property
    def rows(self) -> int:
        return len(self.names)

    def name(self, row: int) -> tuple[str, str]:
        return self.place.prefix + key_of(self.names[row]), ascii(self.names[row])[1:-1]

    def read(self, start: int) -> Iterator[Raw]:
        for row in range(start, len(self.names)):
            key, where = self.name(row)
            try:
                yield Row(key, where, {self.column: self.names[row], **self._beside(self.names[row])}, self.place.root)
            except RefusedError as error:
                yield Bad(key, where, error)

    def _beside(self, name: str) -> dict[str, Any]:
        stem = name.rpartition(".")[0]
        found: dict[str, Any] = {}
        if os.path.lexists(os.path.join(self.place.root.folder, f"{stem}.json")):
            found = _object(self.place.root.read(f"{stem}.json"))
            if "image" in found and self.column == "image":  # another name of the same file, as a rule from elsewhere
                found.pop("image")
        if os.path.lexists(os.path.join(self.place.root.folder, f"{stem}.txt")):
            try:
                found["texts"] = lines(self.place.root.read(f"{stem}.txt").decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise RefusedError("text", f"the file beside it is no UTF-8 (byte {error.start})") from error
        return found


@dataclass(frozen=True)
class SamplesTask:
    """Samples of a webdataset tar: ``spans`` are (key, first byte, bytes); an empty key stands for one met before."""

    place: Place
    spans: tuple[tuple[str, int, int], ...]
    again: tuple[bool, ...]

    @property
    def rows(self) -> int:
        return len(self.spans)

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.spans)

    def name(self, row: int) -> tuple[str, str]:
        key, offset, _ = self.spans[row]
        return f"{self.place.prefix}/{key}", f"{self.place.name}@{offset}"

    def read(self, start: int) -> Iterator[Raw]:
        with open(self.place.path, "rb") as file:
            for row in range(start, len(self.spans)):
                key, where = self.name(row)
                try:
                    yield Row(key, where, self._cells(file, row), self.place.root)
                except RefusedError as error:
                    yield Bad(key, where, error)
                except RecordError as error:
                    yield Bad(key, where, RefusedError(error.field, error.problem))

    def _cells(self, file: io.BufferedReader, row: int) -> dict[str, Any]:
        _, offset, size = self.spans[row]
        if self.again[row]:
            raise RefusedError("key", "another sample of the shard has the same")
        if size > MAX_SAMPLE:
            raise RefusedError("sample", f"{size} bytes exceed the limit of {MAX_SAMPLE}")
        file.seek(offset)
        sample = parse_sample(file.read(size), self.place.name)
        body = _object(sample["json"]) if "json" in sample else {}
        numbered = {name: data for name, data in sample.items() if _is_numbered(name)}
        if "source" in body and ("parts" in body or "messages" in body):
            return {RECORD: sample}
        if numbered:
            body["images"] = [numbered[name] for name in sorted(numbered, key=lambda name: int(name.partition(".")[0]))]
        for name, data in sample.items():
            if name in IMAGE_EXTENSIONS:
                if "\0image" in body:
                    raise RefusedError("images", "two images of different kinds in one sample")
                body["\0image"] = data
            elif name in VIDEO_EXTENSIONS:
                if "\0video" in body:
                    raise RefusedError("video", "two videos of different kinds in one sample")
                body["\0video"] = data
            elif name not in ("__key__", "json", *numbered):
                body[name] = data
        for name in ("image", "video"):
            if f"\0{name}" in body:  # the file itself, whatever its name is said to be
                body[name] = body.pop(f"\0{name}")
        if isinstance(body.get("txt"), bytes):
            try:
                text = body.pop("txt").decode("utf-8-sig")
                body |= {"texts": lines(text)} if {"image", "images", "video"} & body.keys() else {"text": text}
            except UnicodeDecodeError as error:
                raise RefusedError("text", f"txt is no UTF-8 (byte {error.start})") from error
        return body


def _is_numbered(name: str) -> bool:
    number, _, extension = name.partition(".")
    return bool(_DIGITS.fullmatch(number)) and extension in IMAGE_EXTENSIONS


@dataclass(frozen=True)
class ParquetTask:
    """A row group of a parquet file, of ``count`` rows. None of them can be reached but through those before it: when
    one cannot be read, the rest is lost."""

    place: Place
    group: int
    first: int
    count: int
    size: int
    rows: None = None

    def name(self, row: int) -> tuple[str, str]:
        return self.place.key(self.first + row), f"{self.place.name}:{self.first + row}"

    def read(self, start: int) -> Iterator[Raw]:
        import pyarrow
        from pyarrow import parquet

        row = 0
        if start >= self.count:
            return
        try:
            with parquet.ParquetFile(self.place.path, buffer_size=1 << 20) as file:
                for batch in file.iter_batches(batch_size=16, row_groups=[self.group], use_threads=False):
                    for n in range(batch.num_rows):
                        if row >= start:
                            cells = {name: batch.column(i)[n].as_py() for i, name in enumerate(batch.schema.names)}
                            yield Row(*self.name(row), _cells(cells), self.place.root)
                        row += 1
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in TRANSIENT:
                raise  # the storage, and not this file
            row = max(row, start)
            left = max(self.count - row, 1)
            problem = f"row group {self.group} cannot be read: {_first_line(error)}; {left} rows are lost"
            yield Bad(*self.name(row), RefusedError("parquet", problem), left)


@dataclass(frozen=True)
class TableTask:
    """Rows of a data set of the ``datasets`` library, as it keeps them: nothing is decoded."""

    place: Place
    split: str
    first: int
    rows: int
    size: int

    def name(self, row: int) -> tuple[str, str]:
        return self.place.key(self.first + row), f"{self.place.name}:{self.first + row}"

    def read(self, start: int) -> Iterator[Raw]:
        table = _split(self.place.path, self.split)
        for row in range(start, self.rows):
            try:
                cells = table[self.first + row : self.first + row + 1].to_pylist()[0]
            except (OSError, ValueError, IndexError) as error:
                yield Bad(*self.name(row), RefusedError("dataset", _first_line(error)))
            else:
                yield Row(*self.name(row), _cells(cells), self.place.root)


@cache
def _split(source: str, split: str) -> Any:
    from data_pipelines.hub_images import load_splits

    return load_splits(source)[split].with_format("arrow")


@dataclass(frozen=True)
class BadTask:
    """What a whole file, or the rest of one, is refused for."""

    place: Place
    error: RefusedError
    rows: int = 1
    size: int = 0

    def name(self, row: int) -> tuple[str, str]:
        return self.place.prefix, self.place.name

    def read(self, start: int) -> Iterator[Raw]:
        if start == 0:  # else an earlier run told of it
            yield Bad(*self.name(start), self.error)


@dataclass(frozen=True)
class PagesTask:
    """The pages of a PDF; how many, nobody says before it was opened."""

    place: Place
    dpi: int
    size: int
    rows: None = None

    def name(self, row: int) -> tuple[str, str]:
        return f"{self.place.prefix}/page-{row + 1:05d}", f"{self.place.name} page {row + 1}"

    def read(self, start: int) -> Iterator[Raw]:
        row = start
        known = start in (1, MAX_PAGES + 1)  # an earlier run may have told why there is nothing, or nothing further
        try:
            for page in read_pages(self.place.root.read(self.place.name), start, self.dpi):
                if known and row == start and isinstance(page, RefusedError) and page.reason == "pdf":
                    return
                key, where = self.name(row)
                if isinstance(page, PdfPage):
                    cells = {"image": page.image, "text": page.text, "boxes": page.lines}
                    yield Row(key, where, cells, self.place.root)
                else:
                    yield Bad(key, where, page)
                row += 1
        except RefusedError as error:
            if not known:
                yield Bad(*self.name(row), error)


InputTask = JsonTask | CellsTask | FilesTask | SamplesTask | ParquetTask | TableTask | PagesTask | BadTask


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table, with all columns of the table."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A row of a table without what is empty: of all objects in a column every one has the fields of any."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def in_batches(rows: Iterable[tuple[Any, int]]) -> Iterator[tuple[list[Any], int]]:
    """Rows with their sizes, and together as many as make a task."""
    batch: list[Any] = []
    total = 0
    for row, size in rows:
        if batch and (len(batch) >= ROWS or total + size > BYTES):
            yield batch, total
            batch, total = [], 0
        batch.append(row)
        total += size
    if batch:
        yield batch, total


def line_spans(path: Path) -> Iterator[tuple[int, int, int]]:
    """(first byte, bytes, number) of every line that is not blank; a line of any length costs no memory."""
    offset = begin = 0
    number = 1
    blank = True
    with path.open("rb") as file:
        while block := file.read(BYTES):
            at = 0
            while (end := block.find(b"\n", at)) >= 0:
                if not (blank and not block[at:end].strip()):
                    yield begin, offset + end - begin, number
                at, begin, number, blank = end + 1, offset + end + 1, number + 1, True
            blank = blank and not block[at:].strip()
            offset += len(block)
    if not blank:
        yield begin, offset - begin, number


_OUTSIDE, _INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')


def element_spans(path: Path) -> Iterator[tuple[int, int, int]]:
    """(first byte, bytes, number) of every element of the JSON list in a file, found by its brackets and quotes alone.

    What is broken is a span, too, up to the next comma between elements, or to the end: whoever parses it finds out.
    """
    offset = depth = 0
    begin, number = -1, 1
    in_string, skip = False, 0
    with path.open("rb") as file:
        while block := file.read(BYTES):
            at, skip = skip, 0
            while match := (_INSIDE if in_string else _OUTSIDE).search(block, at):
                at = match.end()
                mark = match[0]
                if mark == b"\\":
                    at += 1  # whatever is escaped
                elif mark == b'"':
                    in_string = not in_string
                elif mark in b"[{":
                    depth += 1
                    begin = offset + at if depth == 1 else begin
                elif depth == 1:  # a comma between elements, or the end of the list
                    size = offset + at - 1 - begin
                    if number > 1 or mark == b"," or size > BYTES or os.pread(file.fileno(), size, begin).strip():
                        yield begin, size, number
                    begin, number = offset + at, number + 1
                    if mark != b",":
                        return
                elif mark in b"]}":
                    depth -= 1
            skip = max(at - len(block), 0)
            offset += len(block)
    if begin >= 0:
        yield begin, offset - begin, number


def csv_rows(path: Path) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Rows of a CSV or TSV file with a header, and about how many bytes each has. Invalid UTF-8 and what the parser
    refuses come as a row with a problem: a quote that is not closed swallows lines, which are told."""
    csv.field_size_limit(_MAX_CELL)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        parts = _bounded(file)
        try:
            header = next(parts, "")
            delimiter = "\t" if path.suffix.lower() == ".tsv" else delimiter_of(header)
            reader = csv.DictReader(chain([header], parts), delimiter=delimiter, strict=True)
            names = Counter(reader.fieldnames or ())
        except csv.Error as error:
            yield {"\0problem": f"the header does not parse, so no row is read: {error}"}, 0
            return
        twice = [name for name, count in names.items() if count > 1]
        while True:
            line = reader.reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                last = reader.reader.line_num
                yield {"\0problem": f"does not parse: {error}{f', lines {line} to {last}' if last > line else ''}"}, 0
                continue
            if row is None:
                return
            size = sum(len(text) for text in row.values() if isinstance(text, str))
            if twice:
                yield {"\0problem": f"the header names the column {ascii(twice[0])[1:-1]!r} more than once"}, size
            elif None in row or None in row.values():
                yield {"\0problem": f"{'more' if None in row else 'fewer'} cells than the header has"}, size
            elif not all(_is_text(text) for text in row.values()):
                yield {"\0problem": "is no UTF-8"}, size
            else:
                yield {name: text or None for name, text in row.items()}, size


def _bounded(file: Iterable[str]) -> Iterator[str]:
    readline = file.readline  # type: ignore[attr-defined]
    while line := readline(_MAX_CELL):
        yield line


def _is_text(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
