"""MiniWoB++ as training data: questions about its screens, and the experts' episodes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.making import BuildError, draws, settings_of
from mmagent.actions import Finished, format_action
from mmagent.browser import Page
from mmagent.browser.perform import perform
from mmagent.chat import Image, Message, assistant, user
from mmagent.prompts import gui_follow_up, gui_prompt
from mmagent.records import EncodedImage, Record, Region, encode_image
from mmagent.worlds import miniwob
from mmagent.worlds.elements import Element
from mmagent.worlds.miniwob import VIEW, Screen
from mmagent.worlds.questions import WEIGHTS, Question, ask, labels
from mmagent.worlds.seeds import seed_for

MAX_STEPS = 32
"""Actions of one episode; one that takes more is left out."""
MIN_REWARD = 0.9
"""Of an episode worth learning from: a few tasks pay less than 1 for whole pixels beside an exact answer."""
_ATTEMPTS = 10  # seeds tried for one record


def conversation(questions: Sequence[Question]) -> tuple[Message, ...]:
    """One image, encoded once, with every question a turn: each answer is supervised."""
    turns: list[Message] = []
    for n, question in enumerate(questions):
        turns += [user(*([Image()] if n == 0 else []), question.question), assistant(question.answer)]
    return tuple(turns)


def regions(elements: Sequence[Element]) -> tuple[Region, ...]:
    """What stands on the one screen of a record, as its boxes."""
    return tuple(Region(0, box, label) for box, label in labels(elements))


class ScreenQuestions:
    """Questions about screens of ``tasks`` (seeds of ``split``), at the start of an episode or some right steps into
    it. ``weights`` choose their kinds."""

    name = "screens"
    screen = (miniwob.WIDTH, miniwob.HEIGHT)

    def __init__(
        self,
        tasks: Sequence[str],
        seed: int,
        questions: int = 8,
        weights: Mapping[str, float] = WEIGHTS,
        block: int = 20,
        split: str = "train",
    ):
        self.tasks, self.seed, self.questions, self.block = tuple(tasks), seed, questions, block
        self.weights, self.split = dict(weights), split
        self.settings: dict[str, Any] = settings_of(
            split, tasks=self.tasks, seed=seed, questions=questions, weights=self.weights, block=block
        )

    async def make(self, number: int, page: Page | None) -> Sequence[Record]:
        assert page is not None
        task, first = _place(self.tasks, number, self.block)
        return [await self._record(page, task, first + n) for n in range(self.block)]

    async def _record(self, page: Page, task: str, index: int) -> Record:
        random = draws(self.split, self.seed, self.name, task, index)
        for attempt in range(_ATTEMPTS):
            steps = random.choice((0, 0, 0, 1, 2)) if attempt == 0 else 0
            screen = await miniwob.start(page, task, _seed(self.split, index, attempt))
            for _ in range(steps):
                action = await miniwob.expert(task)(page)
                if isinstance(action, Finished):
                    break
                await perform(page, action, VIEW)
                if (await miniwob.state(page))[0]:
                    screen = await miniwob.start(page, task, _seed(self.split, index, attempt))
                    break
                screen = await miniwob.observe(page)
            asked = ask(VIEW.original, screen.elements, screen.lines, random, self.questions, self.weights)
            if asked:
                image = await asyncio.to_thread(encode_image, screen.image)
                talk, boxes = conversation(asked), regions(screen.elements)
                return Record(f"{task}-{index:06d}", self.name, talk, images=(image,), task=task, boxes=boxes)
        raise BuildError(f"{self.name}: nothing to ask about {task} from index {index}")


class ExpertEpisodes:
    """Whole episodes of ``tasks`` (seeds of ``split``) that the benchmark rewarded, one turn a step."""

    name = "episodes"
    screen = (miniwob.WIDTH, miniwob.HEIGHT)

    def __init__(self, tasks: Sequence[str], seed: int, block: int = 20, split: str = "train"):
        self.tasks, self.seed, self.block, self.split = tuple(tasks), seed, block, split
        self.settings: dict[str, Any] = settings_of(split, tasks=self.tasks, seed=seed, block=block)

    async def make(self, number: int, page: Page | None) -> Sequence[Record]:
        assert page is not None
        task, first = _place(self.tasks, number, self.block)
        return [await self._record(page, task, first + n) for n in range(self.block)]

    async def _record(self, page: Page, task: str, index: int) -> Record:
        for attempt in range(_ATTEMPTS):
            episode = await play(page, task, _seed(self.split, index, attempt))
            if episode is not None:
                turns, screens = episode
                images = tuple([await asyncio.to_thread(_encode, screen) for screen in screens])
                return Record(f"{task}-{index:06d}", self.name, turns, images=images, task=task)
        raise BuildError(f"{self.name}: the expert of {task} failed {_ATTEMPTS} times from index {index}")


async def play(page: Page, task: str, seed: int) -> tuple[tuple[Message, ...], list[Screen]] | None:
    """An expert's episode as turns with their screens; None when it was not rewarded, or too long."""
    act = miniwob.expert(task)
    screen = await miniwob.start(page, task, seed, elements=False)
    turns, screens = [user(*gui_prompt(screen.utterance))], [screen]
    for _ in range(MAX_STEPS):
        action = await act(page)
        if isinstance(action, Finished):
            return None
        turns.append(assistant(format_action(action)))
        await perform(page, action, VIEW)
        done, reward = await miniwob.state(page)
        if done:
            return (tuple(turns), screens) if reward >= MIN_REWARD else None
        screens.append(await miniwob.observe(page, elements=False))
        turns.append(user(*gui_follow_up()))
    return None


def _place(tasks: Sequence[str], number: int, block: int) -> tuple[str, int]:
    """Blocks go round the tasks, so that any number of samples holds all of them about equally."""
    rounds, task = divmod(number, len(tasks))
    return tasks[task], rounds * block


def _seed(split: str, index: int, attempt: int) -> int:
    return seed_for(split, index * _ATTEMPTS + attempt)


def _encode(screen: Screen) -> EncodedImage:
    return encode_image(screen.image)
