"""Worlds of questions as training data: conversations, one example a record, and pictures beside the code of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from data_pipelines.making import settings_of
from mmagent.chat import Box, Image, Part, Text, Thinking, assistant, user
from mmagent.records import Record, encode_image
from mmagent.worlds.catalogue import choose_worlds
from mmagent.worlds.examples import Example, World

PAIRED = (
    "svg/code", "charts/code", "charts/table", "tables/markdown", "tables/html", "formulas/latex", "code/read",
    "documents/read",
)  # fmt: skip
"""Worlds whose answers are all that their one picture shows, as text."""
STRIDE = 1_000_000
"""Examples of a world that belong to one seed: its first half to pretraining, its second to fine-tuning."""


class WorldQuestions:
    """Examples of the worlds ``names`` (families, too; all where it is empty), the worlds and their levels in turn.

    ``reasoning`` puts the worked solution, where there is one, before the answer as a thought. Every world begins at
    the index ``first``.
    """

    screen = None

    def __init__(
        self,
        first: int = 0,
        names: Sequence[str] = (),
        name: str = "worlds",
        block: int = 20,
        split: str = "train",
        reasoning: bool = False,
    ):
        self.worlds = choose_worlds(names)
        self.name, self.first, self.block, self.split, self.reasoning = name, first, block, split, reasoning
        chosen = [world.name for world in self.worlds]
        self.settings: dict[str, Any] = settings_of(
            split, worlds=chosen, first=first, block=block, reasoning=reasoning
        )  # fmt: skip

    async def make(self, number: int, page: object) -> Sequence[Record]:
        return await asyncio.to_thread(lambda: [self._record(number * self.block + n) for n in range(self.block)])

    def _record(self, number: int) -> Record:
        index, which = divmod(number, len(self.worlds))
        world = self.worlds[which]
        return record_of(world, world.example(self.split, self.first + index), self.name, self.reasoning)


class CodePairs:
    """Documents of a picture and the text that says all of it, of the worlds :data:`PAIRED`: picture first, so that the
    text is read from it, and text first in turn."""

    name = "code-pairs"
    screen = None

    def __init__(self, first: int = 0, block: int = 20, split: str = "train"):
        self.worlds = choose_worlds(PAIRED)
        self.first, self.block, self.split = first, block, split
        self.settings: dict[str, Any] = settings_of(split, worlds=list(PAIRED), first=first, block=block)

    async def make(self, number: int, page: object) -> Sequence[Record]:
        return await asyncio.to_thread(lambda: [self._record(number * self.block + n) for n in range(self.block)])

    def _record(self, number: int) -> Record:
        index, which = divmod(number, len(self.worlds))
        world = self.worlds[which]
        example = world.example(self.split, self.first + index)
        shown: tuple[Part, ...] = (Image(), Text(f"\n{example.answer}"))
        if (index + which) % 2:
            shown = (Text(f"{example.answer}\n"), Image())
        images = tuple(encode_image(image) for image in example.images)
        key = f"{world.name}/{example.key}"
        return Record(key, self.name, parts=shown, images=images, boxes=example.boxes, points=example.points)


def record_of(world: World, example: Example, source: str, reasoning: bool = False) -> Record:
    """An example as a conversation: the prompt, then the answer in a box, behind its ``reasoning`` where wanted."""
    said: list[Part] = [Thinking(example.reasoning)] if reasoning and example.reasoning else []
    return Record(
        f"{world.name}/{example.key}",
        source,
        (user(*example.prompt), assistant(*said, Box(example.answer))),
        images=tuple(encode_image(image) for image in example.images),
        task=f"worlds/{world.name}",
        answer=example.answer,
        boxes=example.boxes,
        points=example.points,
    )
