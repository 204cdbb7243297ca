"""Looking closer: a question about a picture that is shown too small to answer it, and a tool that enlarges parts.

Each turn is either ``crop(x1,y1,x2,y2)``, in thousandths of the whole picture, or the answer. The same worlds without
the tool, shown at full size, are :class:`mmagent.tasks.worlds.WorldTask`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from mmagent.geometry import FRAME, ImageView, resize
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


class CropTask:
    """``world``'s questions about one picture, of all levels in turn or of one ``level``, with the tool. Judged by the
    world; the part ``crops`` is the share of :data:`MAX_CROPS` that were taken."""

    def __init__(self, world: World, level: int | None = None):
        self.name = world.name + ("" if level is None else f"/level-{level}") + "/crop"
        self.plain = WorldTask(world, level)
        self.category = "visual-tool-use"

    def items(self, split: str, seed: int) -> Iterator[Item]:
        """Endless. Splits never share an example, whatever the seeds."""
        for item in self.plain.items(split, seed):
            yield Item(self.name, item.key, item.seed)

    def example(self, item: Item) -> Example:
        """What an item asks."""
        example = self.plain.example(item)
        if len(example.images) != 1:
            raise ValueError(f"{self.name}: {item.key} has {len(example.images)} pictures, one is needed")
        return example

    def environment(self, item: Item) -> CropEnvironment:
        return CropEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

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
    """One question. A crop that is none ends it, as does any other answer."""

    def __init__(self, task: CropTask, item: Item):
        self.task, self.item, self.crops = task, item, 0

    async def reset(self) -> Observation:
        example = self.task.example(self.item)
        told = (
            f"{example.question}\nThe picture is shown smaller than it is. To see a part of it enlarged, answer "
            f"crop(x1,y1,x2,y2) in thousandths of the whole picture, at most {MAX_CROPS} times; else give the answer."
        )
        return Observation(told, (shrunk(example.images[0]),))

    async def step(self, action: str) -> Observation:
        example = self.task.example(self.item)
        crop = _CROP.fullmatch(action)
        if crop is None and action.lstrip().startswith("crop("):
            return malformed(f"{action.strip()[:60]!r} is not of the form crop(x1,y1,x2,y2)")
        if crop is None:
            score = self.task.plain.world.grade(example, action)
            parts = {**score.parts, "crops": self.crops / MAX_CROPS}
            return Observation("judged", done=True, reward=score.value, parts=parts)
        self.crops += 1
        if self.crops > MAX_CROPS:
            return malformed(f"more than {MAX_CROPS} crops")
        try:
            part = cut(example.images[0], tuple(map(int, crop.groups())))
        except ValueError as error:
            return malformed(str(error))
        return Observation("", (shrunk(part),))

    async def close(self) -> None:
        """Nothing is held."""
