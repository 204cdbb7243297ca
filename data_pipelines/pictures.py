"""Drawn scenes, panels and photographs as training data: captions, and documents that alternate with text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from data_pipelines.making import draws, settings_of
from mmagent.chat import Image, Part, Text, assistant, user
from mmagent.prompts import turn
from mmagent.records import EncodedImage, Record, encode_image
from mmagent.worlds import images

CAPTION_REQUEST = "Describe the picture."


def picture(random: Random, split: str = "train") -> tuple[np.ndarray, str]:
    """A picture of ``split`` and its caption: mostly drawn, sometimes a photograph."""
    seed = random.getrandbits(62)
    (kind,) = random.choices(("scene", "panel", *images.PHOTO_KINDS), (4, 4, 1, 1))
    if kind == "scene":
        scene = images.draw_scene(seed, split)
        return scene.image, scene.caption
    drawn = images.draw_panel(seed, split) if kind == "panel" else images.crop_photo(seed, kind, split)
    return drawn.image, drawn.caption


def encoded_picture(random: Random, split: str = "train") -> tuple[EncodedImage, str]:
    """:func:`picture`, ready for a record."""
    pixels, caption = picture(random, split)
    return encode_image(pixels), caption


class Captions:
    """One picture and its description."""

    name = "captions"
    screen = None

    def __init__(self, seed: int, block: int = 20, split: str = "train"):
        self.seed, self.block, self.split = seed, block, split
        self.settings: dict[str, Any] = settings_of(split, seed=seed, block=block)

    async def make(self, number: int, page: object) -> Sequence[Record]:
        return await asyncio.to_thread(lambda: [self._record(number * self.block + n) for n in range(self.block)])

    def _record(self, index: int) -> Record:
        image, caption = encoded_picture(draws(self.split, self.seed, self.name, index), self.split)
        talk = (user(*turn(CAPTION_REQUEST, images=1)), assistant(caption))
        return Record(f"picture-{index:06d}", self.name, talk, images=(image,))


class Interleaved:
    """Two to four pictures between the words about them, and one reference back to an earlier picture."""

    name = "interleaved"
    screen = None

    def __init__(self, seed: int, block: int = 20, split: str = "train"):
        self.seed, self.block, self.split = seed, block, split
        self.settings: dict[str, Any] = settings_of(split, seed=seed, block=block)

    async def make(self, number: int, page: object) -> Sequence[Record]:
        return await asyncio.to_thread(lambda: [self._record(number * self.block + n) for n in range(self.block)])

    def _record(self, index: int) -> Record:
        random = draws(self.split, self.seed, self.name, index)
        shown = [encoded_picture(random, self.split) for _ in range(random.randint(2, 4))]
        parts: list[Part] = []
        for n, (_, caption) in enumerate(shown, start=1):
            parts += [Text(f"Picture {n}:\n"), Image(), Text(f"\nIt shows {caption}.\n\n")]
        asked = random.randrange(len(shown))
        if sum(caption == shown[asked][1] for _, caption in shown) == 1:
            parts.append(Text(f"Which picture shows {shown[asked][1]}? Picture {asked + 1}."))
        return Record(f"pictures-{index:06d}", self.name, parts=tuple(parts), images=tuple(image for image, _ in shown))
