"""Tables: looking a cell up, adding a column up, and writing the whole down as Markdown or HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, Paint, grainy, grounds, text_width
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.passages import pick
from mmagent.worlds.table_text import (
    Cell,
    Rows,
    read_html,
    read_markdown,
    rows_of,
    table_score,
    to_html,
    to_markdown,
)  # fmt: skip
from mmagent.worlds.words import CITIES, FIRST_NAMES, NOUNS

_SHAPES = ((3, 3), (5, 4), (7, 4), (9, 5))
"""Rows below the header and columns, of every level."""
_NUMBERS = ("Price", "Stock", "Score", "Visits", "Weight", "Orders", "Points", "Hours")
_WORDS = {
    "Colour": tuple(name for name in COLOURS if name not in ("white", "black")),
    "City": tuple(city for city in CITIES if len(city) <= 7 and city.isascii()),
    "Team": ("North", "South", "East", "West"),
}
_KEYS = {"Name": FIRST_NAMES, "Item": tuple(noun for noun in NOUNS if len(noun) <= 7)}


@dataclass(frozen=True)
class Table:
    """``columns`` are headers, the first that of the ``keys``, which name the rows; ``numeric`` says which columns hold
    whole numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]

    @property
    def text(self) -> list[list[Cell]]:
        return rows_of([self.columns, *self.rows])


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("tables/lookup", "table-qa", len(_SHAPES), _lookup, grading.word),
        Seeded("tables/aggregate", "table-qa", len(_SHAPES), _aggregate, grading.number),
        Seeded("tables/markdown", "table-qa", len(_SHAPES), _markdown, _judge_markdown),
        Seeded("tables/html", "table-qa", len(_SHAPES), _html, _judge_html),
    )


def draw_data(random: np.random.Generator, level: int) -> Table:
    """A table of the level: its keys are all different, and at least two columns hold numbers."""
    rows, columns = _SHAPES[level]
    key = list(_KEYS)[int(random.integers(len(_KEYS)))]
    words = pick(random, list(_WORDS), 1 if columns > 3 else int(random.integers(0, 2)))
    numbers = pick(random, _NUMBERS, columns - 1 - len(words))
    others = pick(random, [*words, *numbers], columns - 1)
    keys = pick(random, [name for name in _KEYS[key] if name.isascii()], rows)
    cells: list[list[str]] = [keys]
    for name in others:
        if name in _WORDS:
            cells.append([_WORDS[name][int(n)] for n in random.integers(len(_WORDS[name]), size=rows)])
        else:
            most = (20, 100, 1000, 1000)[level]
            cells.append([str(int(n)) for n in random.integers(1, most, rows)])
    return Table((key, *others), tuple(zip(*cells, strict=True)), (False, *(name in numbers for name in others)))


def draw_rows(
    rows: Rows, numeric: Sequence[bool], random: np.random.Generator, headers: int = 1
) -> tuple[np.ndarray, ...]:
    """The picture of a table in one of many looks, as wide as its words need; ``headers`` rows stand out."""
    ground, ink = grounds(random)
    name = ("plain", "sans", "serif", "mono")[int(random.integers(4))]
    size = float(random.integers(12, 15))
    lines = ("grid", "rules", "none")[int(random.integers(3))]
    zebra, shaded = lines == "none" or random.random() < 0.4, random.random() < 0.6
    tall, pad, margin = size * float(random.uniform(1.5, 2.0)), size * 0.6, 8.0
    wide = _widths(rows, len(numeric), size, name, pad)
    lefts = margin + np.concatenate([[0.0], np.cumsum(wide)])
    height, width = round(2 * margin + tall * len(rows)), round(lefts[-1] + margin)
    canvas = Canvas(max(height, 84), max(width, 112), ground)
    for n, row in enumerate(rows):
        top, at = margin + n * tall, 0
        if (n < headers and shaded) or (zebra and n >= headers and n % 2):
            canvas.rectangle((lefts[0], top, lefts[-1], top + tall), _mixed(ground, ink, 0.16 if n < headers else 0.07))
        for cell in row:
            x1, x2 = lefts[at], lefts[at + cell.columns]
            wide_cell = cell.columns > 1
            x = (x1 + x2) / 2 if wide_cell else (x2 - pad if numeric[at] else x1 + pad)
            anchor = "mm" if wide_cell else ("rm" if numeric[at] else "lm")
            bold = n < headers and name == "sans"
            canvas.text(x, top + tall / 2, cell.text, size, ink, anchor, "bold" if bold else name)
            if lines == "grid" or n < headers - 1:  # how far a header reaches must be seen
                canvas.rectangle((x1, top, x2, top + tall), None, _mixed(ground, ink, 0.5))
            at += cell.columns
        if lines == "rules":
            canvas.line([(lefts[0], top + tall), (lefts[-1], top + tall)], 1.0, _mixed(ground, ink, 0.5))
        if n == headers - 1:
            canvas.line([(lefts[0], top + tall), (lefts[-1], top + tall)], 1.5, ink)
    return (grainy(canvas.pixels(), random),)


def _widths(rows: Rows, columns: int, size: float, name: str, pad: float) -> np.ndarray:
    """Pixels of every column: what its widest word needs, and a header over several its share."""
    wide = np.zeros(columns)
    face = "bold" if name == "sans" else name
    for row in rows:
        at = 0
        for cell in row:
            need = (text_width(cell.text, size, face) + 2 * pad) / cell.columns
            wide[at : at + cell.columns] = np.maximum(wide[at : at + cell.columns], need)
            at += cell.columns
    return wide


def _mixed(ground: Paint, ink: Paint, share: float) -> tuple[int, ...]:
    return tuple(round((1 - share) * g + share * i) for g, i in zip(ground, ink, strict=True))


def _painter(rows: Rows, numeric: Sequence[bool], headers: int = 1) -> Callable[[np.random.Generator], Sequence]:
    return lambda random: draw_rows(rows, numeric, random, headers)


def _asked(table: Table, question: str, answer: str, reasoning: str = "") -> Idea:
    return Idea(question, answer, table, _painter(table.text, table.numeric), reasoning=reasoning)


def _lookup(random: np.random.Generator, level: int) -> Idea | None:
    """Level 0 asks for a cell, 1 also back from a value to its row, 2 on for the greatest."""
    table = draw_data(random, level)
    column, row = int(random.integers(1, len(table.columns))), int(random.integers(len(table.rows)))
    key, value = table.rows[row][0], table.rows[row][column]
    kind = int(random.integers(min(level, 2) + 1))
    told = f"The row of {key} reads {', '.join(table.rows[row])}."
    if kind == 0:
        question = f"What does the table give as {table.columns[column]} of {key}?"
        return _asked(table, f"{question} Answer with the cell's text.", value, told)
    if kind == 1:
        if [cells[column] for cells in table.rows].count(value) > 1:
            return None
        question = f'Which {table.columns[0].lower()} has the {table.columns[column]} "{value}"?'
        return _asked(table, f"{question} Answer with its name.", key, told)
    if not table.numeric[column]:
        return None
    values = [int(cells[column]) for cells in table.rows]
    most = bool(random.integers(2))
    best = max(values) if most else min(values)
    if values.count(best) > 1:
        return None
    question = f"Which {table.columns[0].lower()} has the {'highest' if most else 'lowest'} {table.columns[column]}?"
    told = f"{table.columns[column]}: {', '.join(map(str, values))}. The {'highest' if most else 'lowest'} is {best}."
    return _asked(table, f"{question} Answer with its name.", table.rows[values.index(best)][0], told)


def _aggregate(random: np.random.Generator, level: int) -> Idea | None:
    table = draw_data(random, level)
    numeric = [n for n, is_number in enumerate(table.numeric) if is_number]
    column = numeric[int(random.integers(len(numeric)))]
    name, values = table.columns[column], [int(row[column]) for row in table.rows]
    listed = " + ".join(map(str, values))
    one, other = (int(n) for n in random.permutation(len(values))[:2])
    keys = (table.rows[one][0], table.rows[other][0])
    bound = int(np.median(values))
    above = [value for value in values if value > bound]
    gap = values[one] - values[other]
    asked = [
        (f"What is the sum of the column {name}?", str(sum(values)), f"{listed} = {sum(values)}."),
        (f"What is the greatest number in the column {name}?", str(max(values)), f"{name}: {values}."),
        (
            f"By how much is the {name} of {keys[0]} higher than that of {keys[1]}? It may be negative.",
            str(gap), f"{values[one]} - {values[other]} = {gap}.",
        ),
        (
            f"How many rows have a {name} above {bound}?", str(len(above)),
            f"Above {bound} are {', '.join(map(str, above)) or 'none'}: {len(above)}.",
        ),
    ]  # fmt: skip
    question, answer, reasoning = asked[int(random.integers(len(asked)))]
    return _asked(table, f"{question} Answer with a number.", answer, reasoning)


def _markdown(random: np.random.Generator, level: int) -> Idea | None:
    table = draw_data(random, level)
    return _asked(table, "Write this table in Markdown.", to_markdown(table.text))


def _html(random: np.random.Generator, level: int) -> Idea | None:
    """From level 2 on, a row above the headers groups columns."""
    table = draw_data(random, level)
    rows, headers = table.text, 1
    if level >= 2:
        spans = [1, 2, len(table.columns) - 3] if len(table.columns) > 3 else [1, len(table.columns) - 1]
        groups = pick(random, ("Spring", "Summer", "Autumn", "Winter", "Europe", "Asia", "Total"), len(spans))
        rows, headers = [[Cell(group, span) for group, span in zip(groups, spans, strict=True)], *rows], 2
    return Idea(
        "Write this table in HTML, with th, td and colspan and nothing else.", to_html(rows, headers), rows,
        _painter(rows, table.numeric, headers),
    )  # fmt: skip


def _judge_markdown(example: Example, answer: str) -> Score:
    truth = read_markdown(example.answer)
    assert truth is not None
    return table_score(truth, read_markdown(answer))


def _judge_html(example: Example, answer: str) -> Score:
    truth = read_html(example.answer)
    assert truth is not None
    return table_score(truth, read_html(answer))
