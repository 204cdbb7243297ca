"""Tasks without a browser: verifiable in microseconds, with pictures, failures and several steps where wanted."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from itertools import count

import numpy as np

from mmagent.trajectories import Completion, Item, Limits, Observation, Score, Trajectory
from mmagent.vocab import Vocab

LETTERS = "abcdefgh"


class EchoTask:
    """Say the letter that is asked for, ``steps`` times in a row. ``breaks`` names item numbers whose environment
    fails at reset (0) or at a step. ``takes_cut``: cut answers are answers."""

    category = "toy"

    def __init__(
        self,
        name: str = "echo",
        letters: str = LETTERS,
        steps: int = 1,
        breaks: dict[int, int] | None = None,
        takes_cut: bool = False,
    ):
        self.name, self.letters, self.steps, self.breaks = name, letters, steps, breaks or {}
        self.takes_cut = takes_cut
        self.opened = self.closed = 0

    def items(self, split: str, seed: int) -> Iterator[Item]:
        for n in count(0 if split == "train" else 1, 2):
            yield Item(self.name, f"{split}-{seed}-{n}", n, self.letters[(n // 2 + seed) % len(self.letters)])

    def environment(self, item: Item) -> EchoEnvironment:
        return EchoEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return Score(trajectory.reward)

    def gold(self, item: Item) -> Iterator[str]:
        yield from [str(item.payload)] * self.steps


class EchoEnvironment:
    def __init__(self, task: EchoTask, item: Item):
        self.task, self.item, self.taken = task, item, 0
        task.opened += 1

    def _look(self) -> Observation:
        if self.task.breaks.get(self.item.seed) == self.taken:
            raise RuntimeError("the environment broke")
        rng = np.random.default_rng((self.item.seed, self.taken))
        image = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        return Observation(str(self.item.payload), (image,), takes_cut=self.task.takes_cut)

    async def reset(self) -> Observation:
        return self._look()

    async def step(self, action: str) -> Observation:
        self.taken += 1
        if action != self.item.payload:
            return Observation("wrong", done=True, reward=0.0, parts={"wrong": 1.0})
        if self.taken == self.task.steps:
            return Observation("right", done=True, reward=1.0)
        return self._look()

    async def close(self) -> None:
        self.task.closed += 1


class ScriptedPolicy:
    """Says what ``script(text of the last user turn, turn number)`` returns, and stops with the user token."""

    version = 3

    def __init__(self, vocab: Vocab, script, stops: bool = True):
        self.vocab, self.script, self.stops = vocab, script, stops
        self.asked: list[int] = []

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        self.asked.append(limits.seed)
        text = self.vocab.decode(prompt.input_ids)
        ids = self.vocab.encode(self.script(text, text.count("<|assistant|>") - 1))
        if self.stops:
            ids = [*ids, self.vocab.id("<|user|>")]
        ids = ids[: limits.max_tokens]
        return Completion(tuple(ids), tuple(-0.5 for _ in ids), stopped=self.stops)


def last_request(text: str) -> str:
    """The words of the last user turn in a rendered conversation of :class:`EchoTask`."""
    turn = text.split("<|user|>")[-1].split("<|assistant|>")[0]
    return turn.replace("/nothink", "").split("<|end_of_image|>")[-1].strip()


class FourLetters(EchoTask):
    """As a recipe names it: no arguments."""

    def __init__(self) -> None:
        super().__init__(letters="abcd")


class Hopeless(EchoTask):
    """Asks for what nobody says."""

    def __init__(self) -> None:
        super().__init__(letters="~")


class Unplayable(FourLetters):
    """Its items can be drawn, not played."""

    def environment(self, item: Item) -> EchoEnvironment:
        raise AssertionError("a replay must not play")


class SlowLetters(FourLetters):
    """Two right answers an episode, each judged after a while, so that a collection can be caught in its middle. Every
    opening is a line in the file that ``PLAYED`` names."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 2

    def environment(self, item: Item) -> EchoEnvironment:
        with open(os.environ["PLAYED"], "a", encoding="utf-8") as file:
            file.write(f"{item.key}\n")
        return SlowEnvironment(self, item)


class SlowEnvironment(EchoEnvironment):
    async def step(self, action: str) -> Observation:
        await asyncio.sleep(random.SystemRandom().uniform(0.0, 0.3))  # who comes first must not matter
        return await super().step(action)
