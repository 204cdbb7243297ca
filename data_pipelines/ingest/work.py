"""What a process does with a task: rows to encoded samples, or to why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from data_pipelines.ingest.files import RefusedError, key_of, refused_file
from data_pipelines.ingest.inputs import RECORD, Bad, FilesTask, InputTask, ParquetTask, Raw, Row
from data_pipelines.ingest.styles import StyleConfig, read_row, recognise
from data_pipelines.plausible import check_said, picture_sizes
from data_pipelines.record_texts import texts_of
from data_pipelines.shards import EncodedSample, encode_sample
from mmagent.records import Record, RecordError

_TOLD = 12  # columns of a row that nothing is made of
_IDS = ("id", "_id", "uid", "uuid", "sample_id", "question_id")
_ID_CHARACTERS = 100  # of an id that a key keeps: keys are names of files


@dataclass(frozen=True)
class Job:
    """Task ``number`` of an ingestion, of input ``input``, read in a style; "" is none, and refuses every row."""

    number: int
    input: int
    task: InputTask
    style: StyleConfig

    @property
    def rows(self) -> int | None:
        return self.task.rows


@dataclass(frozen=True)
class Made:
    """A sample as it lies in a shard. ``talk``: a conversation, else a document; ``sizes (height, width)`` of its
    images, and the UTF-8 bytes of its ``text``."""

    sample: EncodedSample
    talk: bool
    sizes: tuple[tuple[int, int], ...]
    text: int


@dataclass(frozen=True)
class Refused:
    """Why a row gave no record, or no further one."""

    key: str
    where: str
    reason: str
    problem: str
    rows: int = 1  # that it stands for


@dataclass(frozen=True)
class Answer:
    """What became of one row; ``aside`` are columns that nothing was made of, ``named`` the files that it names, as
    :attr:`~data_pipelines.ingest.files.Root.named` has them."""

    outcomes: tuple[Made | Refused, ...]
    aside: tuple[str, ...] = ()
    named: tuple[tuple[str, int, int], ...] = ()

    @property
    def rows(self) -> int:
        """That it is about: more than one where those behind it are lost, too."""
        return max((one.rows for one in self.outcomes if isinstance(one, Refused)), default=1)


def convert(job: Job, start: int) -> Iterator[Answer]:
    """The answers for the rows of a job, from row ``start`` on."""
    for raw in rows_of(job.task, start):
        named: list[tuple[str, int, int]] = []
        if isinstance(raw, Row) and not isinstance(job.task, FilesTask):  # those are the input itself
            raw = replace(raw, root=replace(raw.root, named=named))
        answer = _answer(raw, job.style)
        yield replace(answer, named=tuple(named)) if named else answer


def rows_of(task: InputTask, start: int) -> Iterator[Raw]:
    """The rows of a task; where reading one fails for want of memory or of the file, it goes on with the next."""
    row = start
    reader = task.read(row)
    while True:
        try:
            raw = next(reader, None)
        except (MemoryError, OSError, RefusedError) as error:
            raw = Bad(*task.name(row), _as_refused(error))
            reader = task.read(row + 1) if task.rows is not None and row + 1 < task.rows else iter(())
        if raw is None:
            return
        yield raw
        row += 1


def _as_refused(error: Exception) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, RecordError):
        return RefusedError(error.field.partition("[")[0], error.problem)
    if isinstance(error, MemoryError):
        return RefusedError("memory", "reading it takes more than is allowed")
    if isinstance(error, OSError):
        return refused_file(error, os.path.basename(error.filename or "the file"))
    field, colon, problem = str(error).partition(": ")
    return (
        RefusedError("messages", str(error))
        if field.startswith("message ") or not colon
        else RefusedError(field, problem)
    )


def _answer(raw: Raw, style: StyleConfig) -> Answer:
    if isinstance(raw, Bad):
        return Answer((Refused(raw.key, raw.where, raw.error.reason, raw.error.problem, raw.rows),))
    raw, column = _named(raw, style)
    if not style.style:
        columns = ", ".join(name for name in list(raw.cells)[:_TOLD] if not name.startswith("\0"))
        return Answer((Refused(raw.key, raw.where, "style", f"none is recognised by the columns {columns}"),))
    try:
        read = read_row(raw, style)
        made = tuple(map(_made, read.records))
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        refused = _as_refused(error) if not isinstance(error, RecursionError) else RefusedError("json", "is too deep")
        return Answer((Refused(raw.key, raw.where, refused.reason, refused.problem),))
    return Answer(made, tuple(name for name in read.aside if name != column))


def _named(row: Row, style: StyleConfig) -> tuple[Row, str]:
    """A row whose key ends with the id that its owner gave it, and the column of that: ``data-jsonl/00000007-ID``. The
    number before it keeps keys apart, whatever the ids are."""
    if RECORD in row.cells:
        return row, ""
    for name in (style.columns.get("id", _IDS[0]), *_IDS[1:]):
        value = row.cells.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and (told := str(value).strip()):
            told = key_of(told[:_ID_CHARACTERS], extension=False).replace("/", "%2F").replace(".", "%2E")
            same = row.key.rpartition("/")[2] == told  # a tar's key, say
            return (row if same else replace(row, key=f"{row.key}-{told}")), name
    return row, ""


def _made(record: Record) -> Made:
    sample = encode_sample(record, headers=False)
    sizes = picture_sizes(record)
    check_said(record)
    return Made(sample, bool(record.messages), sizes, sum(len(text.encode()) for text in texts_of(record)))


def lost(job: Job, row: int, problem: str, rest: bool) -> Answer:
    """The answer for a row that its process did not survive."""
    key, where = job.task.name(row)
    told = f"{problem}; the rest of it is left out" if rest else problem
    left = job.task.count - row if rest and isinstance(job.task, ParquetTask) else 1
    return Answer((Refused(key, where, "reading", told, max(left, 1)),))


@dataclass(frozen=True)
class Seen:
    """The style that a row shows by its columns, or why it cannot be read."""

    style: str
    columns: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class Peek:
    """The first ``rows`` of a task of input ``input``, to find out in which style to read; ``columns`` are called by
    other names as :class:`~data_pipelines.ingest.styles.StyleConfig` has them."""

    input: int
    task: InputTask
    rows: int
    columns: dict[str, str]


def look(peek: Peek, start: int) -> Iterator[Seen]:
    """Like :func:`convert`, for the styles."""
    for raw in islice(rows_of(peek.task, start), peek.rows - start):
        if isinstance(raw, Row):
            columns = tuple(name for name in raw.cells if not name.startswith("\0"))
            try:
                yield Seen(recognise(raw, peek.columns), columns)
            except RefusedError as error:
                yield Seen("", columns, str(error))
        else:
            yield Seen("", (), str(raw.error))


def unseen(peek: Peek, row: int, problem: str, rest: bool) -> Seen:
    """The answer for a row that its process did not survive being looked at."""
    return Seen("", (), problem)
