"""What makes a text or a picture recognisable after it was copied, changed a little, encoded anew or scaled.

Training data is compared with itself (near-duplicates) and with what a model is judged by (decontamination); both
sides must be signed alike, so this stands on the lowest floor. Everything here is a pure function, equal on every
machine and in every run.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import cache, lru_cache

import numpy as np
from PIL import Image as PILImage

SIDE = 16
"""Cells a side of :func:`picture_bits`."""
THUMB = 24
"""Cells a side of :func:`thumbnail`."""
_DEAD = 3  # grey levels: flat ground, where an encoder's noise would toss every bit, gives zeros
_WORD = re.compile(r"[^\W_]+")
_IDEOGRAPHS = re.compile(r"([぀-ヿ㐀-䶿一-鿿豈-﫿가-힯])")  # no spaces part their words
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROWS = 1 << 14  # shingles that are permuted at a time: 16 MiB


def normalise(text: str) -> str:
    """Text without what a copy may change in passing: case, width and ligatures (NFKC), and the amount of space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words and numbers of :func:`normalise` in order, without punctuation; ideographs and kana are one each."""
    return _WORD.findall(parted(text))


def parted(text: str) -> str:
    """:func:`normalise` with space around ideographs and kana."""
    return _IDEOGRAPHS.sub(r" \1 ", normalise(text))


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def text_hash(text: str) -> int:
    """64 bits of :func:`normalise`: equal for texts that differ in case and space only."""
    return _word_hash.__wrapped__(normalise(text))


def shingles(text: str, n: int) -> np.ndarray:
    """``(S,)`` uint64, ascending: one hash for each different run of ``n`` :func:`words`. A text of fewer words has one
    of all of them, one without any word one of its characters; an empty one has none."""
    return runs(words(text), text, n)


def runs(found: list[str], text: str, n: int) -> np.ndarray:
    """:func:`shingles` of a ``text`` in which other things than words are ``found``."""
    if not found:
        return np.array([text_hash(text)] if normalise(text) else [], np.uint64)
    hashes = np.array([_word_hash(word) for word in found], np.uint64)
    n = min(n, len(hashes))
    signs = np.zeros(len(hashes) - n + 1, np.uint64)
    for place in range(n):  # a polynomial in an odd number, mixed, so that the order of words counts
        signs = _mix(signs * _GOLDEN + hashes[place : len(hashes) - n + 1 + place])
    return np.unique(signs)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = _mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * _GOLDEN)
    return numbers[:count, None] | np.uint64(1), numbers[count:, None]


def minhash(signs: np.ndarray, permutations: int = 128) -> np.ndarray:
    """``(permutations,)`` uint32 of :func:`shingles`: two of them agree in as large a share of their places as the sets
    overlap (Jaccard), give or take ``sqrt(J (1 - J) / permutations)``. (Broder 1997; permutations by multiply-shift.)
    Of no shingles, all ones."""
    least = np.full(permutations, np.iinfo(np.uint32).max, np.uint32)
    factor, offset = _permutations(permutations)
    for first in range(0, len(signs), _ROWS):
        mixed = (signs[None, first : first + _ROWS] * factor + offset) >> np.uint64(32)
        least = np.minimum(least, mixed.min(axis=1).astype(np.uint32))
    return least


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """``(THUMB, THUMB)`` uint8: mean grey of each cell of an ``(h, w, 3)`` uint8 picture."""
    return _cells(pixels, THUMB, THUMB).round().astype(np.uint8)


def picture_bits(pixels: np.ndarray) -> np.ndarray:
    """``(SIDE * SIDE / 64,)`` uint64: where an ``(h, w, 3)`` uint8 picture gets lighter from one cell to the next on
    its right, by more than an encoder's noise."""
    grey = _cells(pixels, SIDE + 1, SIDE)
    bits = grey[:, 1:] - grey[:, :-1] > _DEAD
    return np.packbits(bits, bitorder="little").view("<u8")


def _cells(pixels: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """``(rows, columns)`` float32: mean luma of each cell; pixels on a border count for both sides by their parts, so
    that scaling moves nothing."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"picture must be (height, width, 3) uint8, got {pixels.shape} {pixels.dtype}")
    grey = np.asarray(PILImage.fromarray(pixels).convert("L"), np.float32)
    return _shares(rows, grey.shape[0]) @ grey @ _shares(columns, grey.shape[1]).T


@lru_cache(maxsize=256)
def _shares(cells: int, size: int) -> np.ndarray:
    """``(cells, size)``: how much of each cell a pixel is."""
    edges = np.linspace(0, size, cells + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * (cells / size)).astype(np.float32)
