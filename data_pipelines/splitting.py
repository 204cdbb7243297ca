"""Records that exceed a pack, in pieces that do not: on borders of turns, parts and paragraphs, never through an image.

A conversation is cut before a user's turn; every piece begins with what the system said, and knows nothing of the
turns before it. An interleaved document is cut between parts, and its text after a paragraph, a line or sentence, a
word: the largest border there is in the second half of what would fit. Only its last piece tells an end of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from mmagent.chat import Image, Message, Part, Text, Video
from mmagent.records import Record, Region

_WORD = re.compile(r"\S{1,64}\s{0,64}|\s{1,64}")  # at most: a word may be a megabyte
_BORDERS = (re.compile(r"\n\s*\n\s*$"), re.compile(r"(\n|[.!?]\s|[。！？])\s*$"), re.compile(r"\s$"))


@dataclass(frozen=True)
class _Unit:
    """What stays together: the messages of a turn, one part, or a word of one. ``images``: how many of the record's
    are its own; ``border``: of what kind the one after it is, 0 the largest."""

    content: tuple[Message, ...] | tuple[Part, ...]
    images: int
    border: int = 0


def split(record: Record, fits: Callable[[Record], bool]) -> list[Record]:
    """Pieces in order, each with its own images, boxes and points; keys are ``KEY#0``, ``KEY#1``, ... Together they
    hold every message and part once (the system's in all of them).

    A piece is at least one unit: the last word is the caller's, as one turn or one image may exceed a pack alone.
    """
    units = list(_turns(record) if record.messages else _parts(record))
    starts = [0]
    for unit in units:
        starts.append(starts[-1] + unit.images)

    def piece(first: int, end: int) -> Record:
        return _piece(record, units[first:end], starts[first], starts[end])

    pieces: list[Record] = []
    first = 0
    while first < len(units):
        end = _longest(first + 1, len(units), lambda end, first=first: fits(piece(first, end)))
        if end < len(units):
            half = range(end, max(first + (end - first) // 2, first + 1) - 1, -1)
            end = min(half, key=lambda n: units[n - 1].border)  # the last of the largest
        pieces.append(replace(piece(first, end), key=f"{record.key}#{len(pieces)}"))
        first = end
    return pieces


def _longest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, at least ``least``; asked of few numbers, none far above the answer."""
    low, reach = least, 1
    while low + reach <= most and fits(low + reach):
        low, reach = low + reach, 2 * reach
    high = min(low + reach, most + 1)  # does not fit, or is too many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _turns(record: Record) -> Iterator[_Unit]:
    turn: list[Message] = []
    for message in record.messages[_head(record) :]:
        if message.role == "user" and any(other.role != "user" for other in turn):
            yield _Unit(tuple(turn), _places([part for other in turn for part in other.parts]))
            turn = []
        turn.append(message)
    if turn:
        yield _Unit(tuple(turn), _places([part for other in turn for part in other.parts]))


def _head(record: Record) -> int:
    """How many messages stand before the first that is not the system's."""
    return next((n for n, message in enumerate(record.messages) if message.role != "system"), len(record.messages))


def _parts(record: Record) -> Iterator[_Unit]:
    for part in record.parts:
        if not isinstance(part, Text):
            yield _Unit((part,), _places((part,)))
            continue
        words = _WORD.findall(part.text)
        for n, word in enumerate(words, start=1):
            kinds = (kind for kind, border in enumerate(_BORDERS) if border.search(word))
            yield _Unit((Text(word),), 0, 0 if n == len(words) else next(kinds, len(_BORDERS)))


def _places(parts: Sequence[Part]) -> int:
    """Images that the parts show."""
    return sum(len(part.timestamps) if isinstance(part, Video) else isinstance(part, Image) for part in parts)


def _piece(record: Record, units: Sequence[_Unit], first: int, end: int) -> Record:
    """The units with their images, ``first`` to ``end``."""
    regions = {name: _moved(getattr(record, name), first, end) for name in ("boxes", "points")}
    images = record.images[first:end]
    if record.messages:
        content = (*record.messages[: _head(record)], *(message for unit in units for message in unit.content))
        return replace(record, messages=content, images=images, **regions)
    parts: list[Part] = []
    shown = (part for unit in units for part in unit.content)
    for written, group in groupby(shown, lambda part: isinstance(part, Text)):
        some = list(group)  # words are one text again
        parts += [Text("".join(part.text for part in some if isinstance(part, Text)))] if written else some
    return replace(record, parts=tuple(parts), images=images, **regions)


def _moved(regions: Sequence[Region], first: int, end: int) -> tuple[Region, ...]:
    return tuple(replace(region, image=region.image - first) for region in regions if first <= region.image < end)
