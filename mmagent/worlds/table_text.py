"""Tables as text: written and read as Markdown and HTML, and how alike two of them are.

A table is rows of :class:`Cell`. Likeness is the tree edit distance similarity of tables (TEDS, arXiv:1911.10683)
with rows matched to rows and cells to cells, in order: 1 - the least cost of making one table the other / the nodes of
the larger. A row or a cell too many or too few costs one; a cell with other text its edit distance over the longer
text, one where it spans differently.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import TypeVar

from mmagent.trajectories import Score
from mmagent.worlds.grading import plain, unfenced, wrong

T = TypeVar("T")
MOST_TAGS = 1200
_LONGEST = 80  # characters of a cell that are compared


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and how many columns it is wide."""

    text: str
    columns: int = 1


Rows = Sequence[Sequence[Cell]]


def rows_of(table: Sequence[Sequence[str]]) -> list[list[Cell]]:
    """Texts as cells of one column each."""
    return [[Cell(text) for text in row] for row in table]


def to_markdown(rows: Rows) -> str:
    """The first row as header."""
    lines = ["| " + " | ".join(cell.text.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def to_html(rows: Rows, headers: int = 1) -> str:
    """The first ``headers`` rows as header cells, a line a row."""

    def cell(one: Cell, tag: str) -> str:
        span = f' colspan="{one.columns}"' if one.columns > 1 else ""
        return f"<{tag}{span}>{html.escape(one.text, quote=False)}</{tag}>"

    lines = ["".join(cell(one, "th" if n < headers else "td") for one in row) for n, row in enumerate(rows)]
    return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"])


def read_markdown(text: str) -> list[list[Cell]] | None:
    """The rows of a Markdown table, its line of dashes left out; None where a line is no row."""
    rows = []
    for line in unfenced(text).strip().splitlines():
        line = line.strip()
        if not line:
            continue
        if "|" not in line:
            return None
        cells = line.replace("\\|", "\0").removeprefix("|").removesuffix("|").split("|")
        cells = [cell.replace("\0", "|").strip() for cell in cells]
        if not (len(rows) == 1 and all(cell.strip(":") and not cell.strip(":-") for cell in cells)):
            rows.append([Cell(plain(cell)) for cell in cells])
    return rows or None


class _Table(HTMLParser):
    """Collects rows and cells; whatever else there is, is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[Cell]] = []
        self._text: list[str] | None = None
        self._columns = 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self._close()
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self._close()
            said = dict(attrs).get("colspan") or "1"
            self._columns = int(said) if said.isascii() and said.isdigit() and len(said) < 4 else 1
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr", "table"):
            self._close()

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def _close(self) -> None:
        if self._text is not None:
            self.rows[-1].append(Cell(plain("".join(self._text)), self._columns))
            self._text = None


def read_html(text: str) -> list[list[Cell]] | None:
    """The rows of the tables in some HTML; None where there are none, or more tags than any table here has: the
    parser's time grows with their square where they are not closed."""
    if text.count("<") > MOST_TAGS:
        return None
    parser = _Table()
    parser.feed(unfenced(text))
    parser.close()
    return [row for row in parser.rows if row] or None


def table_score(truth: Rows, said: Rows | None) -> Score:
    """How alike two tables are. One of more than twice the rows or columns is not compared."""
    if said is None:
        return wrong("malformed")
    widest = max(map(len, truth))
    if len(said) > 2 * len(truth) + 2 or max(map(len, said)) > 2 * widest + 2:
        return wrong("too_large")
    known: dict[tuple[str, str], float] = {}

    def change(one: Cell, other: Cell) -> float:
        if one.columns != other.columns:
            return 1.0
        pair = (one.text[: _LONGEST + 1], other.text[: _LONGEST + 1])
        if pair not in known:
            known[pair] = _difference(*pair)
        return known[pair]

    def rows(one: Sequence[Cell], other: Sequence[Cell]) -> float:
        return alignment(one, other, lambda _: 1.0, change)

    cost = alignment(truth, said, lambda row: 1.0 + len(row), rows)
    nodes = max(1 + len(table) + sum(map(len, table)) for table in (truth, said))
    alike = max(1.0 - cost / nodes, 0.0)
    return Score(alike, {"teds": alike, "right": float(cost == 0)})


def alignment(
    one: Sequence[T], other: Sequence[T], drop: Callable[[T], float], change: Callable[[T, T], float]
) -> float:
    """The least cost of making one sequence the other by dropping, adding (at the same cost) and changing items."""
    above = [0.0]
    for item in other:
        above.append(above[-1] + drop(item))
    for left in one:
        row = [above[0] + drop(left)]
        for n, right in enumerate(other):
            row.append(min(above[n] + change(left, right), above[n + 1] + drop(left), row[n] + drop(right)))
        above = row
    return above[-1]


def _difference(one: str, other: str) -> float:
    """Edit distance over the longer length, in [0, 1]."""
    if one == other:
        return 0.0
    if max(len(one), len(other)) > _LONGEST:
        return 1.0
    row = list(range(len(other) + 1))
    for n, letter in enumerate(one, start=1):
        before, row[0] = row[0], n
        for m, against in enumerate(other, start=1):
            before, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, before + (letter != against))
    return row[-1] / max(len(one), len(other))
