"""What a world gives: questions with pictures and one exact answer, the same for training, rewards and evaluation.

A world is a pure function from ``(split, index, level)`` to an :class:`Example`, and the judge of replies to it. The
truth comes from the numbers that draw the picture, never from the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, runtime_checkable

import numpy as np

from mmagent.chat import Image, Part, Text, Video
from mmagent.prompts import turn
from mmagent.records import Region
from mmagent.replies import BOX_MARKS, final_answer
from mmagent.trajectories import Score
from mmagent.worlds.drawing import generator
from mmagent.worlds.seeds import SPLITS

LONGEST = 20_000
"""Characters of an answer that is looked at; a longer one is wrong."""
_TRIES = 2000


@dataclass(frozen=True, eq=False)
class Example:
    """One question. ``key`` is unique within its world; ``prompt`` is a user turn with a place for each of ``images``,
    ``(h, w, 3)`` uint8, a video having one a timestamp; ``answer`` scores 1. ``boxes`` and ``points`` are in pixels of
    the images, while coordinates in ``prompt`` and ``answer`` are in the frame of :mod:`mmagent.geometry`.

    ``reasoning`` is a worked solution, "" where there is none. For the judge: ``tolerance``, how far a number may be
    off, and ``state``, what it needs beside the answer.
    """

    key: str
    prompt: tuple[Part, ...]
    images: tuple[np.ndarray, ...]
    answer: str
    level: int
    boxes: tuple[Region, ...] = ()
    points: tuple[Region, ...] = ()
    reasoning: str = ""
    tolerance: float = 0.0
    state: object = None

    @property
    def question(self) -> str:
        """The words of the prompt."""
        return "\n".join(part.text for part in self.prompt if isinstance(part, Text))


@runtime_checkable
class World(Protocol):
    """A source of questions: ``name`` ("charts/value"), the ``category`` of the task it is, and ``levels`` of
    difficulty, 0 the easiest."""

    @property
    def name(self) -> str: ...

    @property
    def category(self) -> str: ...

    @property
    def levels(self) -> int: ...

    def example(self, split: str, index: int, level: int | None = None) -> Example:
        """Always the same for the same arguments, and never the same for two splits; levels go in turn where none is
        given."""
        ...

    def grade(self, example: Example, reply: str) -> Score:
        """How right a reply is: 1 for the answer, 0 for none. Whatever it says, it is judged in bounded time, nothing
        in it is executed, and nothing is raised."""
        ...


def split_of(told: str) -> str:
    """The split that something belongs to, by all that is told of it."""
    digest = hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") % len(SPLITS)]


@dataclass(frozen=True)
class Idea:
    """What an example will be, before anything is painted.

    ``question`` is text, behind one image for each that ``paint`` gives, or the parts of the turn. ``facts`` are
    whatever else tells it from other examples: all that the picture shows but its looks, in values whose ``repr`` is
    stable. ``paint`` draws the pictures, in looks that the answer does not depend on; None where there are none.
    ``images`` is how many it gives. The rest is :class:`Example`'s.
    """

    question: str | tuple[Part, ...]
    answer: str
    facts: object = None
    paint: Callable[[np.random.Generator], Sequence[np.ndarray]] | None = None
    images: int = 1
    boxes: tuple[Region, ...] = ()
    points: tuple[Region, ...] = ()
    reasoning: str = ""
    tolerance: float = 0.0
    state: object = None

    @property
    def prompt(self) -> tuple[Part, ...]:
        if isinstance(self.question, str):
            return turn(self.question, self.images if self.paint else 0)
        return self.question

    @property
    def split(self) -> str:
        """The split that it belongs to, by what it asks and shows: the same question about the same things is never
        trained on and tested with, whatever the seeds."""
        return split_of(repr((self.prompt, self.answer, self.facts)))


@dataclass(frozen=True)
class Seeded:
    """A :class:`World` of two functions. ``think(random, level)`` has an idea, or None where what came of it has more
    than one answer; ``judge(example, answer)`` judges a final answer of bounded length."""

    name: str
    category: str
    levels: int
    think: Callable[[np.random.Generator, int], Idea | None] = field(repr=False)
    judge: Callable[[Example, str], Score] = field(repr=False)

    def example(self, split: str, index: int, level: int | None = None) -> Example:
        """See :class:`World`. Raises ``ValueError`` for a split, an index or a level that there is none of."""
        if level is not None and not 0 <= level < self.levels:
            raise ValueError(f"{self.name} has levels 0 to {self.levels - 1}, not {level}")
        if index < 0:
            raise ValueError(f"index {index} is negative")
        level = index % self.levels if level is None else level
        for attempt in count():
            idea = self.think(generator(f"{self.name}/{level}/{attempt}", index, split), level)
            if idea is not None and idea.split == split:
                break
            if attempt == _TRIES:
                raise RuntimeError(f"{self.name}: {_TRIES} ideas of level {level}, none for split {split!r}")
        images = tuple(idea.paint(generator(f"{self.name}/{level}/looks", index, split))) if idea.paint else ()
        assert len(images) == _places(idea.prompt), f"{self.name}: {len(images)} images for {idea.prompt}"
        key = f"{split}-{level}-{index}"
        return Example(
            key, idea.prompt, images, idea.answer, level, idea.boxes, idea.points, idea.reasoning, idea.tolerance,
            idea.state,
        )  # fmt: skip

    def grade(self, example: Example, reply: str) -> Score:
        """See :class:`World`."""
        answer = answer_of(reply)
        return Score(0.0, {"malformed": 1.0}) if answer is None else self.judge(example, answer)


def answer_of(reply: str) -> str | None:
    """The final answer of a reply: what its box holds, or all of it without one. None where it is empty or longer than
    :data:`LONGEST`, and where there is more than one box: who gives two answers has given none."""
    answer = final_answer(reply)
    twice = any(reply.count(mark) > 1 for mark in BOX_MARKS)
    return answer if answer and not twice and len(answer) <= LONGEST else None


def _places(prompt: Sequence[Part]) -> int:
    return sum(len(part.timestamps) if isinstance(part, Video) else isinstance(part, Image) for part in prompt)
