"""How hard MiniWoB++ pages are. Items of a page differ little, so what is graded is the page, by its expert's effort.

A page's effort is the mean number of actions that its expert takes, and the mean number of elements that they go to,
over training seeds: ``python tools/grade_pages.py`` measures both and writes ``difficulty.txt``. Their sum orders the
pages: who acts more has more to get wrong, and who goes to more places has more to find. It does not see how hard the
one right place is to make out: a shape that is counted takes a click, as a button does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEVELS = 3
"""Of pages, 0 the easiest."""
BOUNDS = (4.0, 6.0)
"""Efforts at which level 1 and level 2 begin. Below 4 an episode is one action on one element, at times more; from 6 on
it is three actions or more on average."""
TABLE = Path(__file__).with_name("difficulty.txt")


@dataclass(frozen=True)
class Effort:
    """Of a page's expert, an episode on average: ``actions``, and distinct ``elements`` that they go to."""

    actions: float
    elements: float

    @property
    def total(self) -> float:
        return self.actions + self.elements

    @property
    def level(self) -> int:
        return sum(self.total >= bound for bound in BOUNDS)


def write_table(efforts: Mapping[str, Effort], seeds: int) -> str:
    """The text of ``difficulty.txt``, easy pages first."""
    rows = sorted(efforts.items(), key=lambda row: (row[1].total, row[0]))
    lines = [f"# page, actions, elements: means of {seeds} episodes; written by tools/grade_pages.py"]
    return "\n".join([*lines, *(f"{page} {e.actions:.2f} {e.elements:.2f}" for page, e in rows)]) + "\n"


def read_table(text: str) -> dict[str, Effort]:
    """What :func:`write_table` wrote."""
    rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return {page: Effort(float(actions), float(elements)) for page, actions, elements in rows}


@cache
def efforts() -> Mapping[str, Effort]:
    """Every page that has an expert, easy ones first."""
    return read_table(TABLE.read_text(encoding="utf-8"))


def pages_of(level: int) -> tuple[str, ...]:
    """The pages of a level, easy ones first; those without an expert have none. Raises ``ValueError`` for a level that
    there is none of."""
    if not 0 <= level < LEVELS:
        raise ValueError(f"MiniWoB++ pages have levels 0 to {LEVELS - 1}, not {level}")
    return tuple(page for page, effort in efforts().items() if effort.level == level)
