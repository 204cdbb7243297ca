"""Which sample comes next: seeded shuffling by epoch and a weighted mixture, both without random state.

Everything is a function of a seed and of counters, so the state of a mixture is how much it has taken, and any
rank can compute any sample of any epoch.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.shards import ShardSet

_MASK = (1 << 64) - 1


@dataclass
class SourceConfig:
    """Shards at ``path`` (a folder, a glob or one tar; empty: the sub-folder of the source's name in the stream's
    folder) with a ``weight`` in the mixture; weight 0 leaves it out."""

    path: str = ""
    weight: float = 1.0


def digest(*parts: object) -> int:
    """64 bits that are a function of ``parts`` alone, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: int, size: int, key: int) -> int:
    """Place ``index`` in a pseudo-random permutation of ``range(size)``, in constant memory.

    A balanced Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). Needs no table, so an epoch of any size costs nothing to start.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_ in range(4):
            left, right = right, left ^ (_mix(right + (round_ << half) + key) & low)
        index = left << half | right
        if index < size:
            return index


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: every input bit changes every output bit."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


class Source:
    """An endless sequence of one source's samples: epoch after epoch, each in an order of its own."""

    def __init__(self, name: str, shards: ShardSet, weight: float, seed: int):
        self.name, self.shards, self.weight, self.seed = name, shards, weight, seed
        self._key = (-1, 0)  # the epoch last asked for, and its key

    def sample(self, position: int) -> int:
        """The index in ``shards`` of the sample at ``position`` of the sequence."""
        epoch, place = divmod(position, len(self.shards))
        if self._key[0] != epoch:
            self._key = (epoch, digest(self.seed, self.name, epoch))
        return permute(place, len(self.shards), self._key[1])


class Mixture:
    """One logical stream's share of all sources, ``number`` of ``streams``.

    The next sample comes from the source that lags most behind its weight in what was taken so far (tokens or
    documents), so shares are met exactly and at once instead of in the long run. The stream's own samples are
    every ``streams``-th of each source's sequence: together the streams use each sample once an epoch.
    """

    def __init__(self, sources: Sequence[Source], number: int, streams: int, seed: int, unit: float):
        """``unit``: the amount within which the streams' starts are staggered, so that they do not mix in step."""
        self.sources = {source.name: source for source in sources}
        self.number, self.streams = number, streams
        self.taken = dict.fromkeys(self.sources, 0)
        self.consumed = dict.fromkeys(self.sources, 0)
        total = sum(source.weight for source in sources)
        self._start = {
            source.name: unit * source.weight / total * (digest(seed, "phase", number, source.name) / 2**64)
            for source in sources
        }

    def next(self) -> tuple[str, int]:
        """``(source, sample)``; the caller says by :meth:`take` how much it amounted to."""
        name = min(self.sources, key=lambda n: ((self.taken[n] + self._start[n]) / self.sources[n].weight, n))
        position = self.number + self.streams * self.consumed[name]
        self.consumed[name] += 1
        return name, self.sources[name].sample(position)

    def take(self, name: str, amount: int) -> None:
        """Count ``amount`` (tokens or documents) against the source's share."""
        self.taken[name] += amount

    def epoch(self, name: str) -> float:
        """How often the source has been gone through."""
        return self.consumed[name] * self.streams / len(self.sources[name].shards)

    def state_dict(self) -> dict[str, Any]:
        """Two counts a source."""
        return {"taken": dict(self.taken), "consumed": dict(self.consumed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from those counts."""
        self.taken = {name: int(state["taken"][name]) for name in self.sources}
        self.consumed = {name: int(state["consumed"][name]) for name in self.sources}


def instead(name: str, known: Collection[str]) -> str:
    """What to say of a source ``name`` that is not among those ``known``: the nearest, or which there are."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known)) or 'none'}"


def open_sources(configs: Mapping[str, SourceConfig], seed: int, folder: str = "") -> list[Source]:
    """The sources with a weight: those named, and every sub-folder of ``folder`` that holds shards.

    Raises ``ValueError`` for a negative weight, a name that ``folder`` does not hold or a path that nobody gave, and
    when no source is left.
    """
    found = {path.parent.name: SourceConfig() for path in Path(folder).glob("*/*.tar")} if folder else {}
    named = {**found, **configs}
    for name, config in named.items():  # all of them before the first is read
        if not config.weight >= 0:
            raise ValueError(f"sources.{name}.weight: {config.weight} is negative")
        if not config.path and not folder:
            raise ValueError(f"sources.{name}.path: is empty, and the stream has no folder")
        if not config.path and name not in found and config.weight > 0:
            raise ValueError(f"sources.{name}: {folder} holds no shards of that name; {instead(name, found)}")
    sources = [
        Source(name, ShardSet(config.path or Path(folder) / name), config.weight, seed)
        for name, config in sorted(named.items())
        if config.weight > 0
    ]
    if not sources:
        there = f", and {folder} holds no shards" if folder else ""
        raise ValueError(f"sources: none has a weight above 0{there}; name a folder that data_pipelines.build filled")
    return sources
