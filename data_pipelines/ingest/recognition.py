"""In which style every file is read: that of most of its own first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from data_pipelines.ingest.inputs import ParquetTask
from data_pipelines.ingest.sources import Input, SourceError
from data_pipelines.ingest.styles import OPTIONAL, STYLES
from data_pipelines.ingest.work import Peek, Seen, look, unseen
from data_pipelines.workers import LimitsConfig, in_order

_TABLES = (".csv", ".tsv")
_SHOWN = 30  # columns
_TASKS, _ROWS = 3, 64  # of an input that are looked at, at most


@dataclass
class _Look:
    """What the first rows of an input showed."""

    votes: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    problem: str = ""

    def add(self, seen: Seen) -> None:
        self.rows += 1
        self.votes.update([seen.style] if seen.style else [])
        self.columns |= dict.fromkeys(seen.columns)
        self.problem = self.problem or seen.problem

    @property
    def style(self) -> str:
        return self.votes.most_common(1)[0][0] if self.votes else ""


def recognised(
    inputs: Sequence[Input],
    columns: dict[str, str],
    limits: LimitsConfig,
    wanted: bool,
    say: Callable[[str], None],
) -> list[str]:
    """The style of every input; "" for one whose columns are of none, if others are of some. Says what it found. Not
    ``wanted``, styles are not looked for, only whether there are the ``columns`` that are called by other names.

    PDFs are captioned pictures, and drawing their pages to find out would take time. Raises :class:`SourceError` where
    nothing is recognised, or a column that is named is in none of the first rows.
    """
    looks = [_Look() for _ in inputs]
    for peek, _, seen in in_order(look, unseen, _peeks(inputs, columns), limits):
        looks[peek.input].add(seen)
    _check_columns(looks, columns, say)
    if not wanted:
        return []
    styles = [_style(found, one, say) for found, one in zip(inputs, looks, strict=True)]
    unknown = [(found, one) for found, one, style in zip(inputs, looks, styles, strict=True) if not style]
    unknown.sort(key=lambda pair: not pair[1].rows)  # an empty file is the last to complain of
    if unknown and not any(one.style or found.kind == "pdf" for found, one in zip(inputs, looks, strict=True)):
        raise SourceError(_told_unknown(*unknown[0]))
    for found, one in unknown:
        if one.rows:
            say(f"{_told_unknown(found, one)}; its rows are refused")
    _say_styles(inputs, looks, say)
    return styles


def _check_columns(looks: Sequence[_Look], columns: dict[str, str], say: Callable[[str], None]) -> None:
    """Tell of columns that no row has, and refuse those without which there is no record."""
    seen = list(dict.fromkeys(name for one in looks for name in one.columns))
    rows = sum(one.rows for one in looks)
    for name, column in columns.items():
        if not seen or column in seen:
            continue
        shown = ", ".join(ascii(one)[1:-1] for one in seen[:_SHOWN]) + (", ..." if len(seen) > _SHOWN else "")
        first = f"the first {rows} rows have" if rows > 1 else "the first row has"
        told = f"--column {name}={column}: {first} no column {column!r}, but {shown}"
        if name not in OPTIONAL:
            raise SourceError(told)
        say(told)


def _style(found: Input, one: _Look, say: Callable[[str], None]) -> str:
    if found.kind == "pdf":
        return "captions"
    if one.style or one.columns or not one.problem:
        return one.style
    say(f"{found.place.name}: {_unread(one.rows)} can be read: {one.problem}")
    return "captions" if found.kind in ("images", "videos") else "messages"  # the report will say what


def _unread(rows: int) -> str:
    return f"none of the first {rows} rows" if rows > 1 else "not even the first row"


def _peeks(inputs: Sequence[Input], columns: dict[str, str]) -> Iterator[tuple[Peek, int]]:
    for number, found in enumerate(inputs):
        left = _ROWS
        for task in islice(found.tasks() if found.kind != "pdf" else (), _TASKS):
            rows = min(left, task.count if isinstance(task, ParquetTask) else task.rows or 0)
            if rows:
                yield Peek(number, task, rows, columns), 0
            left -= rows


def _told_unknown(found: Input, one: _Look) -> str:
    if any(mark in name for name in one.columns for mark in ";\t|") and found.place.path.lower().endswith(_TABLES):
        return (
            f"{found.place.name}: the header is read as {', '.join(map(repr, one.columns))}: other marks stand between "
            "its columns than commas (tabs in a .tsv); write it anew with those"
        )
    return (
        f"{found.place.name}: no style is recognised by the columns {', '.join(one.columns) or '(none)'}; choose "
        f"--style of {', '.join(STYLES)}, or call columns by their usual names with --column"
    )


def _rows(votes: int, rows: int) -> str:
    """Of the first rows, those that look alike."""
    if rows == 1:
        return "the only row looked at does"
    return f"{votes} of the first {rows} rows look"


def _say_styles(inputs: Sequence[Input], looks: Sequence[_Look], say: Callable[[str], None]) -> None:
    """A line a style."""
    of: dict[str, list[int]] = {}
    for n, one in enumerate(looks):
        if one.style:
            of.setdefault(one.style, []).append(n)
    for style, numbers in of.items():
        others = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        votes, rows = sum(looks[n].votes[style] for n in numbers), sum(looks[n].rows for n in numbers)
        first = inputs[numbers[0]].place.name
        say(f"{first}{others}: read as {style}, as {_rows(votes, rows)} (--style overrides)")
