"""Picture to SVG: what is written is drawn by the browser, as an image, where it can neither run nor load anything.

``value`` is how much of what the picture differs from a plain sheet the drawing has
(:func:`mmagent.worlds.svg.likeness`): 1 for the same, 0 for a blank one. Beside it stand the structural similarity and
one less the mean squared error, which are high for a blank sheet, too.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np

from mmagent.browser import BrowserError
from mmagent.tasks.base import Screens, malformed, retried, score_of
from mmagent.tasks.published import HUB, is_saved, rows_of
from mmagent.tasks.remembered import Remembered
from mmagent.trajectories import Item, Observation, Score, Trajectory
from mmagent.worlds.drawing import generator
from mmagent.worlds.seeds import SPLITS, seed_for
from mmagent.worlds.svg import likeness
from mmagent.worlds.svg_questions import draw_lines, svg_of

SIDE = 224
"""Pixels on a side of the picture."""
LEVELS = 4
MAX_CHARACTERS = 100_000
STRIDE, REMEMBERED = 1_000_000, 64
REQUEST = "Write this picture as SVG, as exactly as you can. Answer with the SVG alone."
_OPENING = re.compile(r"<svg\b[^>]*", re.IGNORECASE)
_PAGE = """<!DOCTYPE html><body style="margin:0;background:#fff"><img style="width:{side}px;height:{side}px;
display:block;object-fit:contain" src="data:image/svg+xml;base64,{data}"></body>"""
_SHOWN = "document.images[0].decode().then(() => true, () => false)"


class Drawings(Protocol):
    """Where drawings come from."""

    def items(self, task: str, split: str, seed: int) -> Iterator[Item]: ...

    def svg(self, item: Item) -> str: ...


class GeneratedDrawings:
    """Drawings of :mod:`mmagent.worlds.svg_questions`: endless, of all levels in turn or of one ``level``; splits never
    share one."""

    def __init__(self, level: int | None = None):
        if level is not None and not 0 <= level < LEVELS:
            raise ValueError(f"drawings have levels 0 to {LEVELS - 1}, not {level}")
        self.level = level

    def items(self, task: str, split: str, seed: int) -> Iterator[Item]:
        for n in count():
            drawing = seed_for(split, seed * STRIDE + n)
            yield Item(task, f"{split}-{drawing}", drawing)

    def svg(self, item: Item) -> str:
        index, split = divmod(item.seed, len(SPLITS))
        level = index % LEVELS if self.level is None else self.level
        return svg_of(draw_lines(generator("svg-code", index, tuple(SPLITS)[split]), level))


class PublishedDrawings:
    """All ``*.svg`` of a folder, or the column ``Svg`` or ``svg`` of a dataset that was saved there or, as
    ``datasets:ID``, is on the hub, as those of SVG-Bench (``starvector/svg-emoji``) have it; test items only. Raises
    ``ValueError`` where there are none."""

    def __init__(self, source: str | Path):
        path = Path(source)
        if str(source).startswith(HUB) or is_saved(path):
            rows = rows_of(str(source))
            columns = [name for name in ("Svg", "svg") if name in rows.column_names]
            if not columns:
                raise ValueError(f"{source}: no column Svg or svg, but {', '.join(rows.column_names)}")
            self._texts = {str(n): text for n, text in enumerate(rows[columns[0]])}
        else:
            self._texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(path.glob("*.svg"))}
        if not self._texts:
            raise ValueError(f"{path}: no *.svg there, and no saved dataset")

    def __len__(self) -> int:
        return len(self._texts)

    def items(self, task: str, split: str, seed: int) -> Iterator[Item]:
        for number, name in enumerate(self._texts if split == "test" else ()):
            yield Item(task, name, number)

    def svg(self, item: Item) -> str:
        return self._texts[item.key]


def extract_svg(answer: str) -> str | None:
    """From the first ``<svg`` to the last ``</svg>``, with its namespace; None where there is none."""
    found, end = _OPENING.search(answer), answer.rfind("</svg>")
    if found is None or end < found.start():
        return None
    rest = answer[found.end() : end + len("</svg>")]
    opening = found.group()
    space = "" if "xmlns=" in opening else ' xmlns="http://www.w3.org/2000/svg"'
    return opening[:4] + space + opening[4:] + rest


class SvgCodeTask:
    """``drawings`` at :data:`SIDE` pixels in windows of ``screens``, which are at least as large."""

    category = "svg-drawing"

    def __init__(self, screens: Screens, drawings: GeneratedDrawings | PublishedDrawings, name: str = "svg-code"):
        if min(screens.width, screens.height) < SIDE:
            raise ValueError(f"svg-code wants windows of {SIDE} pixels, got {screens.width} x {screens.height}")
        self.name, self.screens, self.drawings = name, screens, drawings
        self._known = Remembered[str, np.ndarray](REMEMBERED)

    def items(self, split: str, seed: int) -> Iterator[Item]:
        return self.drawings.items(self.name, split, seed)

    def environment(self, item: Item) -> SvgCodeEnvironment:
        return SvgCodeEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        yield self.drawings.svg(item)

    async def reference(self, item: Item) -> np.ndarray:
        """``(SIDE, SIDE, 3)`` uint8. Raises ``ValueError`` for a drawing that the browser does not show."""
        return await self._known.get(item.key, lambda: self._reference(item))

    async def _reference(self, item: Item) -> np.ndarray:
        picture = await retried(lambda: self._draw(extract_svg(self.drawings.svg(item)) or ""))
        if picture is None:
            raise ValueError(f"{self.name}/{item.key} is no SVG that the browser shows")
        return picture

    async def draw(self, svg: str) -> np.ndarray | None:
        """What an answer shows, or None where it shows nothing: not well-formed, or too slow to draw."""
        try:
            return await retried(lambda: self._draw(svg))
        except BrowserError:
            return None

    async def _draw(self, svg: str) -> np.ndarray | None:
        data = base64.b64encode(svg.encode("utf-8", "replace")).decode()
        async with self.screens.borrow("drawings") as seat:
            await seat.page.set_content(_PAGE.format(side=SIDE, data=data))
            if not await seat.page.evaluate(_SHOWN, isolated=True):
                return None
            return (await seat.page.screenshot())[:SIDE, :SIDE]

    async def compare(self, item: Item, svg: str) -> Score:
        """Score a drawing."""
        reference, drawn = await self.reference(item), await self.draw(svg)
        if drawn is None:
            return Score(0.0, {"render_failure": 1.0})
        return await asyncio.to_thread(judge, reference, drawn)


def judge(reference: np.ndarray, drawn: np.ndarray) -> Score:
    """The value is ``likeness``; ``ssim`` and ``pixels`` (one less the mean squared error) stand beside it."""
    from skimage.color import rgb2gray
    from skimage.metrics import structural_similarity

    one, other = rgb2gray(reference), rgb2gray(drawn)
    ssim = float(structural_similarity(one, other, data_range=1.0))
    error = float(np.mean((reference / 255.0 - drawn / 255.0) ** 2))
    alike = likeness(reference, drawn)
    return Score(alike, {"likeness": alike, "ssim": max(ssim, 0.0), "pixels": 1.0 - error})


class SvgCodeEnvironment:
    """One picture, one answer."""

    def __init__(self, task: SvgCodeTask, item: Item):
        self.task, self.item = task, item

    async def reset(self) -> Observation:
        return Observation(REQUEST, (await self.task.reference(self.item),))

    async def step(self, action: str) -> Observation:
        if len(action) > MAX_CHARACTERS:
            return malformed(f"{len(action)} characters, at most {MAX_CHARACTERS} are drawn")
        svg = extract_svg(action)
        if svg is None:
            return malformed("the answer holds no SVG")
        score = await self.task.compare(self.item, svg)
        return Observation("drawn", done=True, reward=score.value, parts=score.parts)

    async def close(self) -> None:
        """Nothing is held."""
