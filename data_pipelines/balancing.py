"""The long tail: classes that are too rare are met more often, and captions that say the same as all others less.

Nothing is written twice. How often a sample is met in an epoch stands in ``repeats.npy`` beside its shards, which
:class:`~data_pipelines.mixture.Source` follows; shares of whole sources are weights of the mixture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipelines.mixture import REPEATS, digest
from data_pipelines.record_texts import answer_of
from mmagent.files import new_file, write_text
from mmagent.records import Record
from mmagent.signatures import words

_FIELDS: dict[str, Callable[[Record], str]] = {
    "source": lambda record: record.source,
    "task": lambda record: record.task,
    "answer": lambda record: record.answer,
}


@dataclass
class BalanceRules:
    """``by`` "source", "task" or "answer": classes with fewer samples than half the mean of all classes are repeated up
    to that, at most ``most_repeats`` times (Seed1.5-VL, arXiv 2505.07062, section 3.2: rare classes of its probe were
    learnt from 10 to 89 % so); "" repeats nothing. "set" does the same to whole sets, as weights of the mixture.

    ``caption_words`` above 0: a sample stays where one of the words said of its picture, which ``n`` samples say, is
    drawn with probability ``caption_words / n`` (MetaCLIP, arXiv 2309.16671, algorithm 1): rare words keep all their
    samples, and words that most captions share keep none of them.
    """

    by: str = ""
    most_repeats: int = 10
    caption_words: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("", "set", *_FIELDS):
            raise ValueError(f"by: {self.by!r} is none of set, {', '.join(_FIELDS)}")
        if not 1 <= self.most_repeats <= 255 or self.caption_words < 0:
            raise ValueError(f"most_repeats {self.most_repeats} must lie in 1..255, caption_words not be negative")


class Samples(Protocol):
    """What is balanced: the samples of several sets, in order."""

    starts: np.ndarray

    def __len__(self) -> int: ...

    def read(self, number: int) -> Record: ...


@dataclass(frozen=True)
class Balance:
    """``kept (N,)`` bool and ``repeats (N,)`` uint8; ``weights`` of the sets, None where they are as they come."""

    kept: np.ndarray
    repeats: np.ndarray
    weights: np.ndarray | None

    def save(self, folder: Path, repeats: np.ndarray) -> None:
        """``repeats`` of the samples of one set, where one of them is met more than once."""
        if len(repeats) and repeats.max() > 1:
            with new_file(folder / REPEATS) as beside, beside.open("wb") as file:
                np.save(file, repeats)

    def save_sources(self, folder: Path, names: Sequence[str]) -> None:
        """``FOLDER/sources.yaml``, an overlay for the recipes: ``data.sources.NAME.weight``."""
        if self.weights is None:
            return
        lines = [f"    {name}: {{weight: {weight:.6g}}}" for name, weight in zip(names, self.weights, strict=True)]
        write_text(folder / "sources.yaml", "data:\n  sources:\n" + "\n".join(lines) + "\n")


def balanced(samples: Samples, alive: np.ndarray, rules: BalanceRules) -> Balance:
    """Balance those that are ``alive (N,)``: a function of them and of the rules."""
    kept = np.array(alive)
    if rules.caption_words:
        kept = _by_words(samples, alive, rules)
    repeats = np.ones(len(alive), np.uint8)
    if rules.by == "set":
        inside = [int(kept[a:b].sum()) for a, b in zip(samples.starts, samples.starts[1:], strict=False)]
        return Balance(kept, repeats, np.array(inside) * factors(inside, rules.most_repeats))
    if rules.by:
        read, names, classes = _FIELDS[rules.by], {}, np.full(len(alive), -1, np.int32)
        for number, record in _records(samples, kept):
            classes[number] = names.setdefault(read(record), len(names))
        wanted = factors(np.bincount(classes[kept], minlength=len(names)).tolist(), rules.most_repeats)
        for number in np.flatnonzero(kept):
            whole, part = divmod(float(wanted[classes[number]]), 1.0)
            repeats[number] = int(whole) + (digest(rules.seed, "repeat", int(number)) < part * 2**64)
    return Balance(kept, repeats, None)


def factors(counts: Sequence[int], most: int) -> np.ndarray:
    """How often samples of classes with these counts are met: those below half the mean, as often as reaches it."""
    have = np.array(counts, float)
    filled = have[have > 0]
    half = filled.mean() / 2 if filled.size else 0.0
    return np.clip(half / np.maximum(have, 1.0), 1.0, most)


def _records(samples: Samples, chosen: np.ndarray) -> Iterator[tuple[int, Record]]:
    for number in np.flatnonzero(chosen):
        yield int(number), samples.read(int(number))


def _by_words(samples: Samples, alive: np.ndarray, rules: BalanceRules) -> np.ndarray:
    """Two readings: one counts the samples of each word, one draws. A sample that says nothing stays."""
    counts: Counter[str] = Counter()
    for _, record in _records(samples, alive):
        counts.update(set(words(answer_of(record))))
    kept = np.array(alive)
    for number, record in _records(samples, alive):
        said = sorted(set(words(answer_of(record))))
        draws = (digest(rules.seed, number, word) / 2**64 < rules.caption_words / counts[word] for word in said)
        kept[number] = not said or any(draws)
    return kept
