"""Our models as other harnesses ask them: one question, one answer, whoever plays behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.endpoint import EndpointAgent, EndpointConfig
from evals.suite import Agent, Play
from mmagent.browser.sync import run_sync
from mmagent.chat import Image, Text
from mmagent.trajectories import Item, Observation, Score, Status, Trajectory

AT_ONCE = 16
"""Questions that are asked at a time; a local generator decodes them together."""


@dataclass(frozen=True)
class Asked:
    """A question: ``rules`` (a system message, or empty), then ``pieces``, texts and ``(height, width, 3)`` uint8
    pictures. A checkpoint was trained on our format and is told no rules, as in `evals`."""

    pieces: tuple[str | np.ndarray, ...]
    rules: str = ""
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0


class Answerer:
    """Asks ``agent``, on one event loop in the background; may be called from any thread."""

    def __init__(self, agent: Agent):
        self.agent = agent

    @classmethod
    def of(cls, checkpoint: str = "", url: str = "", model: str = "", device: str = "") -> Answerer:
        """A folder that training wrote, or an endpoint's ``model``. Raises ``ValueError`` naming what is missing."""
        if bool(checkpoint) == bool(url):
            raise ValueError("who is asked? give checkpoint=DIR, or url=URL with model=NAME")
        if url:
            if not model:
                raise ValueError("url wants model=NAME, which the endpoint lists at /models")
            return cls(EndpointAgent(EndpointConfig(url, model)))
        from evals.local import LocalAgent  # torch models and the generator are not needed for an endpoint

        return cls(LocalAgent.load(Path(checkpoint), device=device or None))

    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """One text each, without what was thought before it; empty where a thought did not end within its tokens.

        Raises what the agent raises (:class:`ConnectionError` for an endpoint that is not there).
        """
        return run_sync(self._answers(asked))

    async def _answers(self, asked: Sequence[Asked]) -> list[str]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int, question: Asked) -> str:
            async with gate:
                task = _Once(question)
                play = Play(1, question.max_tokens, question.temperature, question.top_p, rules=question.rules)
                played = await self.agent.play(task, Item(task.name, str(number), number), play)
                if played.trajectory.status in (Status.FAILED, Status.ABORTED):
                    raise RuntimeError(f"question {number} was not answered: {played.trajectory.note}")
                return task.answer

        return await asyncio.gather(*(one(number, question) for number, question in enumerate(asked)))


class _Once:
    """A task that shows one question and keeps what is said."""

    name = category = "bridge"

    def __init__(self, asked: Asked):
        self.asked, self.answer = asked, ""

    def items(self, split: str, seed: int) -> Iterator[Item]:
        return iter(())

    def environment(self, item: Item) -> _Once:
        return self

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return Score(0.0)

    def gold(self, item: Item) -> Iterator[str]:
        return iter(())

    async def reset(self) -> Observation:
        texts = [piece for piece in self.asked.pieces if isinstance(piece, str)]
        images = tuple(piece for piece in self.asked.pieces if not isinstance(piece, str))
        layout = tuple(Text(piece) if isinstance(piece, str) else Image() for piece in self.asked.pieces)
        return Observation("\n".join(texts), images, takes_cut=True, layout=layout)

    async def step(self, action: str) -> Observation:
        self.answer = action
        return Observation("", done=True, reward=0.0)

    async def close(self) -> None:
        """Nothing is held."""
