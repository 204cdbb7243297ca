"""A local index of passages and pictures, and the tools that search it and open what was found."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.chat import JSON, Tool
from mmagent.tasks.tools import Result, ToolError, tool, whole_numbers

HITS = 3
"""What a search brings."""
LONGEST_QUERY = 300
LONGEST_TEXT = 20_000
"""Characters of an entry that are shown when it is opened."""
UNTITLED = 100
"""Characters of an entry without a title that stand for one."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Entry:
    """A passage, or a picture with what is written below it. ``picture``: ``(height, width, 3)`` uint8, or what reads
    one when it is opened: those of a large corpus are not held."""

    title: str
    text: str
    picture: np.ndarray | Callable[[], np.ndarray] | None = None

    def told(self) -> str:
        """The title, or how the text begins."""
        return self.title or " ".join(self.text[: 2 * UNTITLED].split())[:UNTITLED].rstrip()

    def shown(self) -> tuple[np.ndarray, ...]:
        """The picture, where there is one."""
        if self.picture is None:
            return ()
        return (self.picture() if callable(self.picture) else self.picture,)


class Index:
    """Entries found by their words: BM25 (Robertson and Zaragoza 2009, k1 = 1.2, b = 0.75) over title and text.

    For every word it holds which entries have it, and how often: a search touches those alone.
    """

    def __init__(self, entries: Sequence[Entry]):
        self.entries = tuple(entries)
        self._holding: dict[str, tuple[array[int], array[int]]] = {}
        totals = np.zeros(len(self.entries), np.float64)
        for n, entry in enumerate(self.entries):
            words = Counter(terms(f"{entry.title} {entry.text}"))
            totals[n] = words.total()
            for word, often in words.items():
                numbers, counts = self._holding.setdefault(word, (array("i"), array("i")))
                numbers.append(n)
                counts.append(often)
        mean = float(totals.sum()) / max(len(self.entries), 1)
        self._lengths = 0.25 + 0.75 * totals / mean if mean else totals

    def search(self, query: str, count: int = HITS) -> list[int]:
        """Numbers of the best entries that share a word with ``query``, best first; of equals the earlier first."""
        scores = self.scores(query)
        found = np.flatnonzero(scores)
        if len(found) > count:  # all that are as good as the last one of those wanted, so that the earlier can be told
            least = np.partition(scores[found], -count)[-count]
            found = found[scores[found] >= least]
        return [int(n) for n in found[np.argsort(-scores[found], kind="stable")][:count]]

    def scores(self, query: str) -> np.ndarray:
        """``(entries,)`` float64: how well each fits, 0 where it shares no word."""
        scores = np.zeros(len(self.entries), np.float64)
        for word in sorted(
            set(terms(query[:LONGEST_QUERY]))
        ):  # one order: sums of floats are not the same in every one
            if word not in self._holding:
                continue
            numbers, counts = (np.frombuffer(some, np.intc) for some in self._holding[word])
            weight = math.log(1 + (len(self.entries) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            often = counts.astype(np.float64)
            scores[numbers] += weight * often * 2.2 / (often + 1.2 * self._lengths[numbers])
        return scores


def terms(text: str) -> list[str]:
    """The words of a text, capitals aside."""
    return [word.casefold() for word in _WORD.findall(text)]


def index_tools(hits: int = HITS) -> tuple[Tool, ...]:
    """Declarations of what :class:`IndexSession` does."""
    return (
        tool("search", f"The {hits} entries that fit the words of a query best.", query="string"),
        tool("open", "An entry, by the number that search gives it: its text and its picture.", number="integer"),
    )


class IndexSession:
    """Searching an index and opening its entries; ``opened`` are the numbers of those that were."""

    def __init__(self, index: Index, hits: int = HITS):
        self.index, self.hits = index, hits
        self.opened: set[int] = set()

    def call(self, name: str, arguments: Mapping[str, JSON]) -> Result:
        if name == "search":
            found = self.index.search(str(arguments["query"]), self.hits)
            return Result("\n".join(self._line(n) for n in found) or "nothing found")
        if name == "open":
            (number,) = whole_numbers(name, arguments, ["number"], 0, len(self.index.entries) - 1)
            entry = self.index.entries[number]
            pictures = entry.shown()
            self.opened.add(number)
            left = len(entry.text) - LONGEST_TEXT
            text = f"{entry.text[:LONGEST_TEXT]} ... {left} more characters" if left > 0 else entry.text
            return Result(f"{entry.title}: {text}" if entry.title else text, pictures)
        raise ToolError(f"no tool {name!r}")

    def _line(self, n: int) -> str:
        entry = self.index.entries[n]
        return f"{n}: {entry.told()} ({'passage' if entry.picture is None else 'picture'})"
