"""Samples that say the same: found by what they look like, in time that grows with their number.

Texts are compared by MinHash, pictures by what differs in the worst of their cells. Candidates come from locality
sensitive hashing: samples that agree in one of several bands of their signature. On disk a sample takes
:data:`SAMPLE` ``.itemsize`` bytes and 8 a band, a picture :data:`PICTURE` ``.itemsize``; in memory, whatever their
size, 40 bytes a sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from pathlib import Path

import numpy as np

from mmagent.contamination import BITS, LOCAL, Signed, alike
from mmagent.signatures import SIDE, THUMB, minhash, parted, runs, text_hash

_PERMUTATIONS = 126
_FOUND = 0.99  # of the pairs that overlap just enough, those that agree in a band at least
_BITS = SIDE * SIDE
_NARROWEST = 6  # bits of a band: in fewer, too many pictures agree by chance
_GROUP = 256  # more samples that agree in a band are parted by their other bands, or their pairs would be too many
_CHUNK = 1 << 16
_DASHES = re.compile("[‐-―−]")
_TOKEN = re.compile(
    r"[^\W_]+"  # a word or a number
    r"|-+"  # a dash, however long it is set
    r"|([+*/%=<>&|^~@$\\(){}\[\]£¥¬±×÷₠-⃀←-⋿])(?:\1{3,})?"  # a ruled line is one, too
    r"|(?<=[0-9a-z_)\]])[.,:;](?=[0-9a-z_])"  # a.b and f(x,y), not the end of a clause
    r"|!(?=[a-z_(=])"
)

SAMPLE = np.dtype(
    [
        ("reason", "u1"),
        ("key", "<u8"),
        ("text", "<u8"),
        ("unscored", "u1"),
        ("pictures", "<u4"),
        ("first", "<u8"),
        ("minhash", "<u4", (_PERMUTATIONS,)),
    ]
)
"""Of one sample: why it is left out, whether it lacks a score that was asked for, hashes of its key and text, its
pictures' place, and its text's signature."""
PICTURE = np.dtype([("bits", "<u8", (SIDE * SIDE // 64,)), ("thumb", "u1", (THUMB * THUMB,))])
"""Of one picture."""


@dataclass
class DuplicateRules:
    """``remove`` says whether copies are left out, all but the first of them.

    Texts without pictures are copies where their runs of ``shingle`` :func:`tokens` overlap by ``least_overlap``
    (Jaccard).
    Samples with pictures are copies where all pictures are, within ``most_bits`` and ``most_local``
    (:data:`mmagent.contamination.BITS`), and their texts are equal but for case and space: the same screen with another
    question is another sample, and so are two pages that differ in a word. ``pictures_alone`` lets pictures decide
    whatever the texts, for captions of the same picture. Bands get narrower, and more, as ``most_bits`` grows
    (:func:`band_bits`), and what no band would find is refused.
    """

    remove: bool = True
    shingle: int = 5
    least_overlap: float = 0.8
    most_bits: int = BITS
    most_local: int = LOCAL
    pictures_alone: bool = False

    def __post_init__(self) -> None:
        if self.shingle < 1 or not 0 < self.least_overlap <= 1:
            raise ValueError(f"shingle {self.shingle} must be positive, least_overlap {self.least_overlap} in (0, 1]")
        if self.most_bits < 0 or self.most_local < 0:
            raise ValueError(f"most_bits {self.most_bits} and most_local {self.most_local} must not be negative")
        band_bits(self.most_bits)


def tokens(text: str) -> list[str]:
    """Words and numbers in order, as :func:`mmagent.signatures.words` finds them, and what makes code another between
    them: operators, brackets, and marks within a name or number (``a.b``, ``1:2``, ``!x``).

    Marks that part clauses, and quotes, do not count: they are what copies of prose differ in. Of 96 package
    descriptions all overlap by 1.0 with themselves without commas or with other quotes, and by 0.92 (the median)
    without the stars and hashes of Markdown; of 73 functions with other operators, by words 1.0, by tokens 0.60.
    """
    found = _TOKEN.finditer(_DASHES.sub("-", parted(text)))
    return [match[1] or ("-" if match[0][0] == "-" else match[0]) for match in found]


def sign_text(row: np.ndarray, text: str, rules: DuplicateRules) -> None:
    """Fill in what a row of :data:`SAMPLE` says of its text."""
    row["text"] = text_hash(text)
    row["minhash"] = minhash(runs(tokens(text), text, rules.shingle), _PERMUTATIONS)


def text_rows(least_overlap: float) -> int:
    """Places of a text's signature in a band: the most with which a pair of that overlap agrees in one of the bands
    with :data:`_FOUND`, and not above 6. Two texts that overlap by 0.8 do with ``1 - (1 - 0.8**6)**21 = 0.998``."""
    rows = (n for n in range(6, 1, -1) if 1 - (1 - least_overlap**n) ** (_PERMUTATIONS // n) >= _FOUND)
    return next(rows, 1)


@cache
def band_bits(most_bits: int) -> int:
    """Bits of a picture in a band: the most, up to 16, with which two pictures that differ in ``most_bits`` of 256,
    wherever they are, agree in one of the bands with :data:`_FOUND`. Of 24 bits that differ, 16 bands of 16 are spared
    once at least with 0.991; of 48, with 0.43, and 32 bands of 8 with 0.9999. Raises ``ValueError`` where no band
    would do."""
    for width in range(16, _NARROWEST - 1, -1):
        bands = _BITS // width
        spared = (  # by inclusion and exclusion over the bands that none of them falls in
            (-1) ** (n + 1) * comb(bands, n) * comb(_BITS - n * width, most_bits) for n in range(1, bands + 1)
        )
        if sum(spared) >= _FOUND * comb(_BITS, most_bits) > 0:
            return width
    raise ValueError(f"most_bits {most_bits}: pictures that differ in so many of {_BITS} bits share no part to find by")


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated Jaccard overlap of signatures ``(..., permutations)``."""
    return (a == b).mean(axis=-1)


class CopySearch:
    """Finds copies among ``samples`` (:data:`SAMPLE`) and their ``pictures`` (:data:`PICTURE`), both maps of files.

    ``split`` counts the samples that were compared within finer groups only, as too many agreed in a band.
    """

    def __init__(self, samples: np.ndarray, pictures: np.ndarray, rules: DuplicateRules, folder: Path):
        """``folder`` takes the bands, 8 bytes a sample each."""
        self.samples, self.pictures, self.rules, self.folder = samples, pictures, rules, folder
        self.split = 0
        self._rows = text_rows(rules.least_overlap)
        self._text_bands = _PERMUTATIONS // self._rows
        self._width = band_bits(rules.most_bits)
        self._picture_bands = _BITS // self._width

    def run(self, alive: np.ndarray, report: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """``(N,)`` int64: of every sample that is ``alive`` the one it copies, -1 for those that copy none. A copy of a
        copy counts as one of the first."""
        copy_of = np.full(len(self.samples), -1, np.int64)
        shows = np.asarray(self.samples["pictures"]) > 0
        kinds = (
            (np.flatnonzero(alive & ~shows), self._text_bands, self._text_keys, self._same_text),
            (np.flatnonzero(alive & shows), self._picture_bands, self._picture_keys, self._same_pictures),
        )
        total, done = self._text_bands + self._picture_bands, 0
        for members, bands, keys_of, same in kinds:
            keys = self._keys(members, bands, keys_of)
            for band in range(bands):
                self._band(members, keys, band, same, copy_of)
                done += 1
                report(done, total)
        return _resolved(copy_of)

    def _keys(self, members: np.ndarray, bands: int, keys_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """``(bands, M)`` uint64 on disk, so that a band is read in one go."""
        path = self.folder / "bands.npy"
        keys = np.lib.format.open_memmap(path, "w+", np.uint64, (bands, len(members)))
        for first in range(0, len(members), _CHUNK):
            keys[:, first : first + _CHUNK] = keys_of(members[first : first + _CHUNK]).T
        return keys

    def _text_keys(self, rows: np.ndarray) -> np.ndarray:
        told = self.samples[rows]["minhash"][:, : self._text_bands * self._rows]
        signs = told.astype(np.uint64).reshape(len(rows), self._text_bands, self._rows)
        keys = np.zeros((len(rows), self._text_bands), np.uint64)
        for place in range(self._rows):
            keys = (keys ^ signs[..., place]) * np.uint64(0x100000001B3) + np.uint64(place)
        return keys

    def _picture_keys(self, rows: np.ndarray) -> np.ndarray:
        """Every band takes bits from all over the picture: one of a single row would be empty in most pages."""
        chosen = self.samples[rows]
        packed = np.ascontiguousarray(self.pictures[chosen["first"]]["bits"]).view(np.uint8)
        bits = np.unpackbits(packed.reshape(len(rows), -1), axis=1, bitorder="little")
        used = bits[:, : self._width * self._picture_bands].reshape(len(rows), self._width, self._picture_bands)
        strided = np.zeros((len(rows), self._picture_bands, 16), np.uint8)
        strided[..., : self._width] = used.swapaxes(1, 2)
        bands = np.packbits(strided, axis=2, bitorder="little").reshape(len(rows), -1).view("<u2").astype(np.uint64)
        told = np.zeros(len(rows), np.uint64) if self.rules.pictures_alone else chosen["text"]
        return bands + (told ^ chosen["pictures"].astype(np.uint64))[:, None] * np.uint64(0x9E3779B97F4A7C15)

    def _band(
        self,
        members: np.ndarray,
        keys: np.ndarray,
        band: int,
        same: Callable[[int, np.ndarray], np.ndarray],
        copy_of: np.ndarray,
    ) -> None:
        places = np.flatnonzero(copy_of[members] < 0)
        for group in _groups(keys[band][places]):
            self._group(members, places[group], keys, band, 0, same, copy_of)

    def _group(
        self,
        members: np.ndarray,
        places: np.ndarray,
        keys: np.ndarray,
        band: int,
        depth: int,
        same: Callable[[int, np.ndarray], np.ndarray],
        copy_of: np.ndarray,
    ) -> None:
        """Compare each with the first, then those that are left with the first of them, and so on."""
        if len(places) > _GROUP and depth < len(keys) - 1:
            self.split += len(places) if depth == 0 else 0
            further = keys[(band + depth + 1) % len(keys)][places]
            for group in _groups(further):
                self._group(members, places[group], keys, band, depth + 1, same, copy_of)
            return
        rows = members[places]
        while len(rows) > 1:
            copies = same(int(rows[0]), rows[1:])
            copy_of[rows[1:][copies]] = rows[0]
            rows = rows[1:][~copies]

    def _same_text(self, one: int, others: np.ndarray) -> np.ndarray:
        return overlap(self.samples[others]["minhash"], self.samples[one]["minhash"]) >= self.rules.least_overlap

    def _same_pictures(self, one: int, others: np.ndarray) -> np.ndarray:
        mine, theirs = self.samples[one], self.samples[others]
        same = theirs["pictures"] == mine["pictures"]
        if not self.rules.pictures_alone:
            same &= theirs["text"] == mine["text"]
        for n in range(int(mine["pictures"])):
            at = np.flatnonzero(same)
            if not at.size:
                break
            picture = self.pictures[int(mine["first"]) + n]
            found = self.pictures[theirs["first"][at] + np.uint64(n)]
            signed = Signed(picture["bits"], picture["thumb"])
            same[at] = alike(found["bits"], found["thumb"], signed, self.rules.most_bits, self.rules.most_local)
        return same


def _groups(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of equal keys, ascending, where there are at least two."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    starts = np.concatenate([[0], ends])
    sizes = np.diff(np.concatenate([starts, [len(order)]]))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        yield order[start : start + size]


def _resolved(copy_of: np.ndarray) -> np.ndarray:
    """Every chain of copies followed to its first."""
    while True:
        at = np.flatnonzero(copy_of >= 0)
        further = copy_of[copy_of[at]]
        if not (further >= 0).any():
            return copy_of
        copy_of[at[further >= 0]] = further[further >= 0]


def exact_overlap(a: str, b: str, shingle: int = 5) -> float:
    """Jaccard overlap of two texts by all their runs of tokens: what :func:`overlap` estimates."""
    first, second = (set(runs(tokens(text), text, shingle).tolist()) for text in (a, b))
    return len(first & second) / len(first | second) if first | second else 1.0


def signed_rows(pictures: Sequence[Signed]) -> np.ndarray:
    """Rows of :data:`PICTURE`."""
    rows = np.zeros(len(pictures), PICTURE)
    for row, picture in zip(rows, pictures, strict=True):
        row["bits"], row["thumb"] = picture.bits, picture.thumb
    return rows
