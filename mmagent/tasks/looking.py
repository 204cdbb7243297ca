"""Looking closer: a question about a picture that is shown too small to answer it, and a tool that enlarges parts.

Each turn is either ``crop(x1,y1,x2,y2)``, in thousandths of the whole picture, or the answer. The same worlds without
the tool, shown at full size, are :class:`mmagent.tasks.worlds.WorldTask`. Any other task with one picture, one question
and one answer becomes such a one by :class:`Cropped`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mmagent.geometry import FRAME, ImageView, resize
from mmagent.protocols import Environment, Task
from mmagent.tasks.base import malformed, score_of
from mmagent.tasks.worlds import WorldTask
from mmagent.trajectories import Item, Observation, Score, Trajectory
from mmagent.worlds.examples import Example, World

SHOWN = 448
"""Pixels of the longer side of everything that is shown."""
MAX_CROPS = 6
LEAST = 8
"""Pixels of a side that can still be cut out."""
MARGIN = 24
"""Pixels that the expert leaves around what it looks at."""
_CROP = re.compile(r"\s*crop\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)\s*")


class Cropped:
    """``plain``'s questions about one picture, which are answered at once, with the tool. Judged by ``plain``; the part
    ``crops`` is the share of :data:`MAX_CROPS` that were taken."""

    category = "visual-tool-use"

    def __init__(self, plain: Task, name: str = ""):
        self.name, self.plain = name or f"{plain.name}/crop", plain

    def items(self, split: str, seed: int) -> Iterator[Item]:
        """Those of ``plain``."""
        for item in self.plain.items(split, seed):
            yield replace(item, task=self.name)

    def asked(self, item: Item) -> Item:
        """The item as ``plain`` has it."""
        return replace(item, task=self.plain.name)

    def environment(self, item: Item) -> CropEnvironment:
        return CropEnvironment(self.plain.environment(self.asked(item)), item.key)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        """A look at the middle, since it is not known where to look, then what is right."""
        yield f"crop({FRAME // 4},{FRAME // 4},{3 * FRAME // 4},{3 * FRAME // 4})"
        yield from self.plain.gold(self.asked(item))


class CropTask(Cropped):
    """``world``'s questions about one picture, of all levels in turn or of one ``level``, with the tool."""

    plain: WorldTask

    def __init__(self, world: World, level: int | None = None):
        name = world.name + ("" if level is None else f"/level-{level}") + "/crop"
        super().__init__(WorldTask(world, level), name)

    def example(self, item: Item) -> Example:
        """What an item asks."""
        return self.plain.example(item)

    def gold(self, item: Item) -> Iterator[str]:
        """A look at everything that the question is about, then the answer."""
        example = self.example(item)
        height, width = example.images[0].shape[:2]
        view = ImageView((height, width), (height, width))
        for region in example.boxes:
            x1, y1, x2, y2 = region.coordinates
            x1, y1 = view.to_frame(max(x1 - MARGIN, 0), max(y1 - MARGIN, 0))
            x2, y2 = view.to_frame(min(x2 + MARGIN, width - 1), min(y2 + MARGIN, height - 1))
            yield f"crop({x1},{y1},{x2},{y2})"
        yield example.answer


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """A picture as it is shown: its longer side :data:`SHOWN` pixels, enlarged where it is less."""
    height, width = pixels.shape[:2]
    scale = SHOWN / max(height, width)
    return resize(np.ascontiguousarray(pixels), max(round(height * scale), 1), max(round(width * scale), 1))


def cut(pixels: np.ndarray, corners: tuple[int, int, int, int]) -> np.ndarray:
    """The part between two corners in thousandths, both cells included. Raises ``ValueError`` for what is none."""
    x1, y1, x2, y2 = corners
    if max(corners) >= FRAME:
        raise ValueError(f"crop: {max(corners)} is not in 0..{FRAME - 1}")
    height, width = pixels.shape[:2]
    left, right = x1 * width // FRAME, -(-(x2 + 1) * width // FRAME)
    top, bottom = y1 * height // FRAME, -(-(y2 + 1) * height // FRAME)
    if right - left < LEAST or bottom - top < LEAST:
        raise ValueError(f"crop: a part of {right - left}x{bottom - top} pixels is too small, or turned inside out")
    return pixels[top:bottom, left:right]


class CropEnvironment:
    """One question, which ``inner`` asks with one picture and judges. A crop that is none ends it, as does any other
    answer. ``key`` names the item in messages."""

    def __init__(self, inner: Environment, key: str):
        self.inner, self.key, self.crops = inner, key, 0
        self._picture: np.ndarray | None = None

    async def reset(self) -> Observation:
        asked = await self.inner.reset()
        if len(asked.images) != 1:
            raise ValueError(f"{self.key} has {len(asked.images)} pictures, one is needed")
        self._picture = np.asarray(asked.images[0])
        told = (
            f"{asked.text}\nThe picture is shown smaller than it is. To see a part of it enlarged, answer "
            f"crop(x1,y1,x2,y2) in thousandths of the whole picture, at most {MAX_CROPS} times; else give the answer."
        )
        return Observation(told, (shrunk(self._picture),))

    async def step(self, action: str) -> Observation:
        if self._picture is None:
            raise RuntimeError(f"{self.key}: step before reset")
        crop = _CROP.fullmatch(action)
        if crop is None and action.lstrip().startswith("crop("):
            return malformed(f"{action.strip()[:60]!r} is not of the form crop(x1,y1,x2,y2)")
        if crop is None:
            judged = await self.inner.step(action)
            return replace(judged, parts={**judged.parts, "crops": self.crops / MAX_CROPS})
        self.crops += 1
        if self.crops > MAX_CROPS:
            return malformed(f"more than {MAX_CROPS} crops")
        try:
            part = cut(self._picture, tuple(map(int, crop.groups())))
        except ValueError as error:
            return malformed(str(error))
        return Observation("", (shrunk(part),))

    async def close(self) -> None:
        self._picture = None
        await self.inner.close()
