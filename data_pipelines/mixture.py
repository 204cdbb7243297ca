"""Which sample comes next: seeded shuffling by epoch and a weighted mixture, both without random state.

Everything is a function of a seed and of counters, so the state of a mixture is how much it has taken, and any
rank can compute any sample of any epoch.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards import ShardSet, find_shards

REPEATS = "repeats.npy"
"""Beside the shards of a set: how often each sample is met in an epoch, one uint8 a sample. Without it, once."""
_MASK = (1 << 64) - 1


@dataclass
class SourceConfig:
    """Shards at ``path`` (a folder, a glob or one tar; empty: the sub-folder of the source's name in the stream's
    folder) with a ``weight`` in the mixture; weight 0 leaves it out. ``schedule`` multiplies it by step of the stream,
    in straight lines from one to the next: ``{0: 1, 1000: 1, 1001: 3}`` is three times as much from step 1001 on. Steps
    stand in their order. What waits in the buffers was chosen before, so a change shows after as many documents."""

    path: str = ""
    weight: float = 1.0
    schedule: dict[int, float] = field(default_factory=dict)

    def at(self, step: int) -> float:
        """The weight in step ``step``, counted from 0."""
        if not self.schedule:
            return self.weight
        knots = sorted(self.schedule)
        after = bisect_right(knots, step)
        if after in (0, len(knots)):
            return self.weight * self.schedule[knots[max(after - 1, 0)]]
        left, right = knots[after - 1 : after + 1]
        share = (step - left) / (right - left)
        return self.weight * ((1 - share) * self.schedule[left] + share * self.schedule[right])

    @property
    def most(self) -> float:
        """The largest weight of all steps: what is judged by one mix, whatever the step, is judged by these."""
        return self.weight * max(self.schedule.values(), default=1.0)

    def check(self, name: str) -> None:
        """Raise ``ValueError`` for a weight or a step below 0, naming both, and for steps that are not in order."""
        for key, value in (("weight", self.weight), *((f"schedule.{n}", w) for n, w in self.schedule.items())):
            if not 0 <= value < math.inf:
                raise ValueError(f"sources.{name}.{key}: {value} is no weight: 0 or more, and finite")
        if self.schedule and min(self.schedule) < 0:
            raise ValueError(f"sources.{name}.schedule: step {min(self.schedule)} is negative")
        if (steps := list(self.schedule)) != sorted(steps):  # one of them is mistyped, or was meant to replace others
            told = ", ".join(f"{step}: {self.schedule[step]:g}" for step in sorted(steps))
            raise ValueError(
                f"sources.{name}.schedule: steps must rise, and these do not: {', '.join(map(str, steps))}; "
                f'if none is mistyped, write "sources.{name}.schedule={{{told}}}" in one place'
            )


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

    def __init__(self, name: str, shards: ShardSet, config: SourceConfig, seed: int, repeats: np.ndarray | None = None):
        """``repeats (N,)``: how often each sample is met in an epoch, None for once."""
        self.name, self.shards, self.config, self.seed = name, shards, config, seed
        self._key = (-1, 0)  # the epoch last asked for, and its key
        self._ends = None if repeats is None else np.cumsum(repeats, dtype=np.int64)  # where each one's turns end

    def __len__(self) -> int:
        """Samples of an epoch, the repeated ones as often as they are met."""
        return len(self.shards) if self._ends is None else int(self._ends[-1])

    def fingerprint(self) -> str:
        """What an exact resume has to find again: the shards, and how often each of their samples is met."""
        told = self.shards.fingerprint()
        return told if self._ends is None else f"{told}-{digest(self._ends.tobytes()):016x}"

    def sample(self, position: int) -> int:
        """The index in ``shards`` of the sample at ``position`` of the sequence."""
        epoch, place = divmod(position, len(self))
        if self._key[0] != epoch:
            self._key = (epoch, digest(self.seed, self.name, epoch))
        chosen = permute(place, len(self), self._key[1])
        return chosen if self._ends is None else int(np.searchsorted(self._ends, chosen, side="right"))


def read_repeats(shards: ShardSet) -> np.ndarray | None:
    """``(N,)``: what stands in :data:`REPEATS` beside the shards, whether they were named by their folder or by a glob
    that takes some of them, of one folder or of several; None where there is none. Raises ``ValueError`` where it
    counts other samples."""
    folders = {path.parent for path in shards.paths}
    stored = {path: repeats for folder in folders for path, repeats in _stored_repeats(folder, shards)}
    if not stored:
        return None
    each = zip(shards.paths, shards.counts, strict=True)
    return np.concatenate([stored.get(path, np.ones(count, np.uint8)) for path, count in each])


def _stored_repeats(folder: Path, shards: ShardSet) -> Iterator[tuple[Path, np.ndarray]]:
    """Every shard of a folder with what is stored of its samples."""
    path = folder / REPEATS
    if not path.is_file():
        return
    whole = shards if shards.paths == find_shards(str(folder)) else ShardSet(folder)
    repeats = np.load(path, allow_pickle=False)
    if repeats.shape != (len(whole),) or repeats.min() < 1:
        raise ValueError(f"{path} is about {len(repeats)} samples and the shards hold {len(whole)}: curate them anew")
    yield from zip(whole.paths, np.split(repeats, np.cumsum(whole.counts)[:-1]), strict=True)


class Mixture:
    """One logical stream's share of all sources, ``number`` of ``streams``.

    Whatever is taken (tokens or documents) is credited to all sources by their weights of that step, and charged to
    the one it came from; the next sample comes from the source whose credit is largest for its weight. So shares are
    met at once instead of in the long run, and a weight that changes counts from then on. The stream's own samples
    are every ``streams``-th of each source's sequence: together the streams use each sample once an epoch.
    """

    def __init__(self, sources: Sequence[Source], number: int, streams: int, seed: int, unit: float):
        """``unit``: the amount within which the streams' starts are staggered, so that they do not mix in step."""
        self.sources = {source.name: source for source in sources}
        self.number, self.streams = number, streams
        self.consumed = dict.fromkeys(self.sources, 0)
        self.at(0)
        total = sum(self._weights.values())
        self._credit = {
            name: -unit * weight / total * (digest(seed, "phase", number, name) / 2**64)
            for name, weight in self._weights.items()
        }

    def at(self, step: int) -> None:
        """What follows is taken in ``step``."""
        self._weights = {name: source.config.at(step) for name, source in self.sources.items()}

    def next(self) -> tuple[str, int]:
        """``(source, sample)``; the caller says by :meth:`take` how much it amounted to."""
        wanted = [(-self._credit[name] / weight, name) for name, weight in self._weights.items() if weight > 0]
        name = min(wanted)[1]
        position = self.number + self.streams * self.consumed[name]
        self.consumed[name] += 1
        return name, self.sources[name].sample(position)

    def take(self, name: str, amount: int) -> None:
        """Charge ``amount`` (tokens or documents) to the source."""
        each = amount / sum(self._weights.values())
        for other, weight in self._weights.items():
            self._credit[other] += each * weight
        self._credit[name] -= amount

    def epoch(self, name: str) -> float:
        """How often the source has been gone through."""
        return self.consumed[name] * self.streams / len(self.sources[name])

    def state_dict(self) -> dict[str, Any]:
        """Two numbers a source."""
        return {"credit": dict(self._credit), "consumed": dict(self.consumed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from those numbers."""
        self._credit = {name: float(state["credit"][name]) for name in self.sources}
        self.consumed = {name: int(state["consumed"][name]) for name in self.sources}


def instead(name: str, known: Collection[str]) -> str:
    """What to say of a source ``name`` that is not among those ``known``: the nearest, or which there are."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known)) or 'none'}"


def itself(folder: str) -> str:
    """What to say of a ``folder`` that should hold shard sets and is one; "" where it is none."""
    path = Path(folder)
    if not any(path.glob("*.tar")):
        return ""
    parent = path.resolve().parent if path.name in ("", "..") else path.parent
    return f"is a shard set itself; name the folder that it lies in, {parent}, whose sub-folders are the sources"


def open_sources(configs: Mapping[str, SourceConfig], seed: int, folder: str = "") -> list[Source]:
    """The sources with a weight at some step: those named, and every sub-folder of ``folder`` that holds shards.

    Raises ``ValueError`` for a negative weight, a name that ``folder`` does not hold or a path that nobody gave, and
    when no source is left, at all or at some step.
    """
    found = {path.parent.name: SourceConfig() for path in Path(folder).glob("*/*.tar")} if folder else {}
    named = {**found, **configs}
    for name, config in named.items():  # all of them before the first is read
        config.check(name)
        if not config.path and not folder:
            raise ValueError(f"sources.{name}.path: is empty, and the stream has no folder")
        if not config.path and name not in found and config.weight > 0:
            told = itself(folder) or f"holds no shards of that name; {instead(name, found)}"
            raise ValueError(f"sources.{name}: {folder} {told}")
    opened = {
        name: ShardSet(config.path or Path(folder) / name)
        for name, config in sorted(named.items())
        if config.weight > 0
    }
    sources = [Source(name, shards, named[name], seed, read_repeats(shards)) for name, shards in opened.items()]
    if not sources:
        if named:
            raise ValueError(
                f"sources: all have the weight 0 ({', '.join(sorted(named))}), so there is nothing to train on; "
                f"give one a weight above 0, such as sources.{min(named)}.weight=1"
            )
        if folder and (told := itself(folder)):
            raise ValueError(f"sources: {folder} {told}")
        there = f"{folder} holds no shards" if folder else "no folder is given, and no source"
        raise ValueError(f"sources: {there}; name a folder that data_pipelines.build or .ingest filled")
    for step in sorted({0, *(step for source in sources for step in source.config.schedule)}):  # lines between them
        if not any(source.config.at(step) for source in sources):
            raise ValueError(f"sources: by their schedules none has a weight above 0 at step {step}")
    return sources
