"""Is a training sample one of the things that a model is judged by? Signatures of those, in one file, and the search.

Evaluation items are signed by who knows them (``python -m evals fingerprint``), read by who cleans the data. A
signature holds hashes and a picture of 24 x 24 cells: enough to recognise an item, nothing to train on.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from mmagent.files import new_file
from mmagent.signatures import SIDE, THUMB, normalise, picture_bits, shingles, text_hash, thumbnail

WORDS = 8
"""Of a run that is looked for: questions are shorter than the documents that 13 was chosen for (arXiv 2005.14165,
appendix C, takes 8 to 13 by the length of the test's items)."""
FORM = 3
"""A line, a run of words or a picture that more items have is the form of a question, not its content."""
TELLING = 6
"""Runs of an item that are no form, from which on its text alone can convict."""
TELLING_BESIDE = 50
"""The same of an item with pictures, which is more than its text: a document that was read aloud, no question."""
COVERED = 0.8
"""Share of those runs that a sample must hold (arXiv 2307.09288, appendix A.6, draws the same line)."""
BITS, LOCAL = 24, 16
"""How far copies of a picture may lie apart: bits of :func:`~mmagent.signatures.picture_bits`, and grey levels in the
worst cell of :func:`~mmagent.signatures.thumbnail`. Pictures that were encoded as JPEG (quality 40 to 75) or WebP,
halved or enlarged stay within, but for one in ten of halved screens that were tiny already; different pages, scenes
and photographs differ by 21 levels and more (``python tools/benchmarks/quality.py pictures``)."""
PLAIN = 12
"""A picture with fewer bits set is plain: it may look like another by chance, and convicts with the text only."""


@dataclass(frozen=True)
class Signed:
    """What is recognised of one picture: ``bits`` and ``thumb`` of :mod:`mmagent.signatures`."""

    bits: np.ndarray
    thumb: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray) -> Self:
        """Of ``(h, w, 3)`` uint8."""
        return cls(picture_bits(pixels), thumbnail(pixels).ravel())

    @property
    def plain(self) -> bool:
        """Whether there is little to recognise."""
        return int(np.bitwise_count(self.bits).sum()) < PLAIN


def alike(
    bits: np.ndarray, thumbs: np.ndarray, one: Signed, most_bits: int = BITS, most_local: int = LOCAL
) -> np.ndarray:
    """``(P,)`` bool: which of ``bits (P, 4)`` and ``thumbs (P, cells)`` are copies of ``one``."""
    near = np.bitwise_count(bits ^ one.bits).sum(axis=1) <= most_bits
    at = np.flatnonzero(near)
    if at.size:
        worst = np.abs(thumbs[at].astype(np.int16) - one.thumb).max(axis=1)
        near[at] = worst <= most_local
    return near


@dataclass(frozen=True)
class Judged:
    """One thing that a model is judged by: its full ``name``, the ``text`` and the signed ``pictures`` it is shown."""

    name: str
    text: str
    pictures: tuple[Signed, ...] = ()


@dataclass(frozen=True)
class Match:
    """``item`` was found, ``by`` its "text", its "picture" or "both"."""

    item: str
    by: str


class Fingerprint:
    """Signatures of everything a model is judged by, to be looked through for each training sample."""

    def __init__(self, items: Iterable[Judged]):
        items = list(items)
        self.names = [item.name for item in items]
        lines = [[line for line in item.text.split("\n") if line.strip()] for item in items]
        met = Counter(text_hash(line) for own in lines for line in {normalise(line): line for line in own}.values())
        told = [[line for line in own if met[text_hash(line)] <= FORM] for own in lines]
        self._said = _Runs.of([_joined(shingles(line, WORDS) for line in own) for own in lines])
        self._telling = _Runs.of([shingles("\n".join(own), WORDS) for own in told]).without(FORM)
        pictures = [picture for item in items for picture in item.pictures]
        self._bits = np.array([p.bits for p in pictures], np.uint64).reshape(-1, SIDE * SIDE // 64)
        self._thumbs = np.array([p.thumb for p in pictures], np.uint8).reshape(-1, THUMB * THUMB)
        self._owners = np.repeat(np.arange(len(items)), [len(item.pictures) for item in items])

    def __len__(self) -> int:
        return len(self.names)

    @property
    def pictures(self) -> int:
        """How many pictures are known."""
        return len(self._owners)

    def find(self, texts: Sequence[str], pictures: Sequence[Signed]) -> Match | None:
        """The item that a sample with these turns and pictures gives away, None where there is none.

        An item's picture convicts, whatever is asked about it, unless it is plain or the picture of many items (the
        empty board of a game): then the item's words must be there too.
        Its text convicts alone where enough of its runs are no form (:data:`TELLING`) and :data:`COVERED` of them are
        in the sample; and, short as it may be, that of an item without pictures if a line or turn says just that.
        """
        pieces = dict.fromkeys(piece for text in texts for piece in (text, *text.split("\n")))
        found = _joined(shingles(piece, WORDS) for piece in pieces)
        said = self._said.covered(found, len(self))
        for number, weak in self._seen(pictures).items():
            if said[number] >= COVERED:
                return Match(self.names[number], "both")
            if not weak:
                return Match(self.names[number], "picture")
        told = self._telling.covered(found, len(self))
        counts = self._telling.counts(len(self))
        shown = np.zeros(len(self), bool)
        shown[self._owners] = True
        enough = counts >= np.where(shown, TELLING_BESIDE, TELLING)
        short = ~shown & (counts > 0) & (said == 1.0)  # a question that stands there in full
        convicted = (told >= COVERED) & (enough | short)
        at = np.flatnonzero(convicted)
        return Match(self.names[at[0]], "text") if at.size else None

    def _seen(self, pictures: Sequence[Signed]) -> dict[int, bool]:
        """Items whose picture is among ``pictures``, and whether that says little: it is plain, or that of many."""
        out: dict[int, bool] = {}
        met = np.zeros(self.pictures, bool)
        for one in pictures if self.pictures else ():
            near = alike(self._bits, self._thumbs, one)
            met |= near
            owners = np.unique(self._owners[near])
            weak = one.plain or len(owners) > FORM
            for owner in owners.tolist():
                out[owner] = out.get(owner, True) and weak
        # Of a video that frames say little of, most of them must be there: its empty beginning may be that of another.
        return {o: weak for o, weak in out.items() if not weak or met[self._owners == o].mean() >= COVERED}

    # ------------------------------------------------------------------------------------------ on disk

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        names = np.frombuffer(json.dumps(self.names).encode(), np.uint8)
        with new_file(path) as beside, beside.open("wb") as file:
            np.savez_compressed(
                file, words=np.array(WORDS), names=names, said=self._said.stored(), telling=self._telling.stored(),
                bits=self._bits, thumbs=self._thumbs, owners=self._owners,
            )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Raises ``ValueError`` for a file that is none, or was signed in another way."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                words = int(stored["words"])
                made = cls(())
                made.names = json.loads(stored["names"].tobytes())
                made._said, made._telling = (_Runs(*stored[name]) for name in ("said", "telling"))
                made._bits, made._thumbs, made._owners = stored["bits"], stored["thumbs"], stored["owners"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no fingerprint of evaluations: {error}") from error
        if words != WORDS:
            raise ValueError(f"{path} holds runs of {words} words, wanted {WORDS}: make it anew")
        return made

    @staticmethod
    def joined(prints: Sequence[Fingerprint]) -> Fingerprint:
        """All items of several."""
        whole = Fingerprint(())
        for one in prints:
            start = len(whole)
            whole.names += one.names
            whole._said = whole._said.plus(one._said, start)
            whole._telling = whole._telling.plus(one._telling, start)
            whole._bits = np.concatenate([whole._bits, one._bits])
            whole._thumbs = np.concatenate([whole._thumbs, one._thumbs])
            whole._owners = np.concatenate([whole._owners, one._owners + start])
        return whole


@dataclass(frozen=True)
class _Runs:
    """``runs (R,)`` uint64, ascending, and the ``items (R,)`` uint64 that they are of."""

    runs: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, each: Sequence[np.ndarray]) -> Self:
        items = np.repeat(np.arange(len(each), dtype=np.uint64), [len(one) for one in each])
        return cls._sorted(np.concatenate([np.empty(0, np.uint64), *each]), items)

    @classmethod
    def _sorted(cls, runs: np.ndarray, items: np.ndarray) -> Self:
        order = np.argsort(runs, kind="stable")
        return cls(runs[order], items[order])

    def without(self, most: int) -> Self:
        """Without the runs that more than ``most`` items have."""
        _, inverse, counts = np.unique(self.runs, return_inverse=True, return_counts=True)
        rare = counts[inverse] <= most
        return type(self)(self.runs[rare], self.items[rare])

    def plus(self, other: _Runs, start: int) -> Self:
        """With those of ``other``, whose items are numbered from ``start`` on."""
        items = np.concatenate([self.items, other.items + np.uint64(start)])
        return self._sorted(np.concatenate([self.runs, other.runs]), items)

    def stored(self) -> np.ndarray:
        return np.stack([self.runs, self.items])

    def counts(self, items: int) -> np.ndarray:
        """``(I,)``: runs of each item."""
        return np.bincount(self.items.astype(np.int64), minlength=items)

    def covered(self, found: np.ndarray, items: int) -> np.ndarray:
        """``(I,)``: the share of each item's runs that are among those ``found``, 0 where it has none."""
        first, last = np.searchsorted(self.runs, found, "left"), np.searchsorted(self.runs, found, "right")
        hit = first < last
        places = [self.items[a:b] for a, b in zip(first[hit], last[hit], strict=True)]
        hits = np.bincount(np.concatenate([np.empty(0, np.uint64), *places]).astype(np.int64), minlength=items)
        return hits / np.maximum(self.counts(items), 1)


def _joined(runs: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *runs]))
