"""Rendered pages as training data: questions about what is on them, single clicks, and their source."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from data_pipelines.making import BuildError, draws, settings_of
from data_pipelines.screens import conversation, regions
from mmagent.browser import Page
from mmagent.chat import assistant, user
from mmagent.prompts import html_prompt
from mmagent.records import Record, encode_image
from mmagent.worlds.pages import LEVELS, PageSource, Scene, generate, render
from mmagent.worlds.pages.tiles import cut, tile_sheet
from mmagent.worlds.questions import WEIGHTS, ask
from mmagent.worlds.seeds import SPLITS, seed_for

_ATTEMPTS = 20  # pages tried for one record
_SHEET_BITS = 40  # of a sheet's seed; each split has its own range of them
SIDES = ((320, 240), (320, 240), (224, 168), (224, 224), (280, 196), (280, 280), (392, 252))
"""Screens in pixels, width first, 48 to 126 visual tokens of 28 pixels; the size that tasks use comes twice."""
SMALL = ((320, 240), (224, 168))


class PageQuestions:
    """Questions about pages of all templates and difficulties. ``weights`` choose the kinds; ``name`` the source."""

    screen = SIDES[0]

    def __init__(
        self,
        seed: int,
        name: str = "pages",
        questions: int = 8,
        weights: Mapping[str, float] = WEIGHTS,
        block: int = 20,
        split: str = "train",
    ):
        self.seed, self.name, self.questions, self.weights, self.block = seed, name, questions, dict(weights), block
        self.split = split
        self.settings: dict[str, Any] = settings_of(
            split, seed=seed, questions=questions, weights=self.weights, sides=SIDES, block=block
        )

    async def make(self, number: int, page: Page | None) -> Sequence[Record]:
        assert page is not None
        return [await self._record(page, number * self.block + n) for n in range(self.block)]

    async def _record(self, page: Page, index: int) -> Record:
        random = draws(self.split, self.seed, self.name, index)
        for _ in range(_ATTEMPTS):
            scene = await _show(page, _source(self.split, random, random.choice(SIDES), random.randint(1, LEVELS)))
            height, width = scene.image.shape[:2]
            asked = ask((height, width), scene.elements, scene.lines, random, self.questions, self.weights)
            if asked:
                image = await asyncio.to_thread(encode_image, scene.image)
                boxes = regions(scene.elements)
                return Record(f"page-{index:06d}", self.name, conversation(asked), images=(image,), boxes=boxes)
        raise BuildError(f"{self.name}: {_ATTEMPTS} pages without a question at index {index}")


class Tiles:
    """First lessons in pointing: small screens with one to four controls anywhere on them, cut from sheets."""

    name = "tiles"
    columns, rows, width, height = 4, 4, 160, 210
    screen = (columns * width, rows * height)
    block = columns * rows

    def __init__(self, seed: int, questions: int = 4, weights: Mapping[str, float] = WEIGHTS, split: str = "train"):
        self.seed, self.questions, self.weights, self.split = seed, questions, dict(weights), split
        self._first_sheet = SPLITS.index(split) << _SHEET_BITS
        tile = (self.width, self.height)
        self.settings: dict[str, Any] = settings_of(
            split, seed=seed, questions=questions, weights=self.weights, tile=tile, block=self.block
        )

    async def make(self, number: int, page: Page | None) -> Sequence[Record]:
        assert page is not None
        records: list[Record] = []
        random = draws(self.split, self.seed, self.name, number)
        for _ in range(_ATTEMPTS):
            sheet_seed = self._first_sheet + random.getrandbits(_SHEET_BITS)
            html = tile_sheet(sheet_seed, self.columns, self.rows, self.width, self.height)
            sheet = await render(page, html, *self.screen, trusted=True)
            for tile in cut(sheet, self.columns, self.rows):
                size = (self.height, self.width)
                asked = ask(size, tile.elements, tile.lines, random, self.questions, self.weights)
                if asked and len(records) < self.block:  # tiles with nothing to ask about are made up for
                    image = await asyncio.to_thread(encode_image, tile.image)
                    key = f"tile-{number * self.block + len(records):06d}"
                    boxes = regions(tile.elements)
                    records.append(Record(key, self.name, conversation(asked), images=(image,), boxes=boxes))
            if len(records) == self.block:
                return records
        raise BuildError(f"{self.name}: {_ATTEMPTS} sheets hold too few tiles to ask about")


class PageSources:
    """A small page of the two easiest kinds and the HTML it was rendered from, at most ``longest`` characters."""

    name = "html"
    screen = SMALL[0]

    def __init__(self, seed: int, longest: int = 1200, block: int = 20, split: str = "train"):
        self.seed, self.longest, self.block, self.split = seed, longest, block, split
        self.settings: dict[str, Any] = settings_of(split, seed=seed, longest=longest, sides=SMALL, block=block)

    async def make(self, number: int, page: Page | None) -> Sequence[Record]:
        assert page is not None
        return [await self._record(page, number * self.block + n) for n in range(self.block)]

    async def _record(self, page: Page, index: int) -> Record:
        random = draws(self.split, self.seed, self.name, index)
        for _ in range(_ATTEMPTS):
            source = _source(self.split, random, random.choice(SMALL), random.randint(1, 2))
            if len(source.html) > self.longest:
                continue
            scene = await _show(page, source)
            image = await asyncio.to_thread(encode_image, scene.image)
            talk = (user(*html_prompt()), assistant(source.html))
            return Record(f"html-{index:06d}", self.name, talk, images=(image,))
        raise BuildError(f"{self.name}: no page of at most {self.longest} characters at index {index}")


def _source(split: str, random: Random, side: tuple[int, int], difficulty: int) -> PageSource:
    return generate(seed_for(split, random.getrandbits(40)), *side, difficulty=difficulty)


async def _show(page: Page, source: PageSource) -> Scene:
    return await render(page, source.html, source.width, source.height, trusted=True)
