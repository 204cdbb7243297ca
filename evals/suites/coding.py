"""Multimodal coding: what a model writes is run, in a browser without network or in a cell, and what it draws compared.

Whatever it writes is bounded; what cannot be shown, run or compared within bounds scores 0, and only what breaks on our
side is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from evals.baselines import random_page
from evals.suite import Episode, Exhibit, Play, Suite
from mmagent.browser import BrowserPool
from mmagent.tasks.base import Screens
from mmagent.tasks.design2code import REQUEST, SIZE, Design2CodeTask, GeneratedDesigns, PublishedDesigns
from mmagent.tasks.page_blocks import Box
from mmagent.tasks.screenshot_to_html import MAX_CHARACTERS, extract_html
from mmagent.trajectories import Item

WINDOWS = 4
"""Pages open at a time: three pictures of a whole page are held for each."""
_MARKS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def design2code(data: str | Path | None = None, per_task: int = 100, seed: int = 0) -> Suite:
    """Design2Code on its own pages (``data``: :class:`~mmagent.tasks.design2code.PublishedDesigns`; all of them), or on
    ``per_task`` generated ones."""
    published = PublishedDesigns(data) if data is not None else None

    @contextlib.asynccontextmanager
    async def opened(names: Sequence[str]) -> AsyncIterator[list[Design2CodeTask]]:
        async with BrowserPool(pages_per_process=WINDOWS, recycle=500) as pool:
            screens = Screens(pool, *SIZE, WINDOWS, scripts=False)
            try:
                yield [Design2CodeTask(screens, published or GeneratedDesigns(screens), name) for name in names]
            finally:
                await screens.close()

    return Suite(
        name="design2code",
        version=1,
        summary="Write the HTML of a whole web page from its screenshot (Si et al. 2024).",
        prompt=f"the screenshot, then {REQUEST!r}",
        judge="mean of Design2Code's block match, text, position and colour, as published, and of a perceptual score "
        "(mmagent.tasks.visual at 320 pixels width) in place of CLIP's; whole pages in a window of 1280 x 720, no "
        "scripts, no network; answers cleaned as published, those beyond bounds 0",
        tasks=("design2code",),
        open=opened,
        per_task=len(published) if published is not None else per_task,
        play=Play(max_steps=1, max_tokens=4096, guess=random_page),
        seed=seed,
        exhibit=_design,
        data=f"{Path(data).name}, {len(published)} pages, {digest(published)}" if published and data else "generated",
    )


def digest(designs: PublishedDesigns) -> str:
    """Of all pages' texts, in order."""
    found = hashlib.sha256()
    for item in designs.items("", "test", 0):
        found.update(designs.design(item).html.encode("utf-8", "replace") + b"\0")
    return found.hexdigest()[:12]


async def _design(task: Design2CodeTask, item: Item, episode: Episode) -> Exhibit:
    """Both pages; the boxes that match have one colour on either."""
    target = (await task.reference(item)).image
    html = extract_html(episode.actions[0]) if episode.actions else None
    judged = await task.judge(item, html) if html is not None and len(html) <= MAX_CHARACTERS else None
    if judged is None or judged.seen is None:
        return Exhibit({"target": target})
    ours, theirs = ([pair[side] for pair in judged.blocks.pairs] for side in (0, 1))
    image = judged.seen.image
    marked = {"target-blocks": _marked(target, theirs), "rendering-blocks": _marked(image, ours)}
    return Exhibit({"target": target, "rendering": image, **marked})


def _marked(image: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    picture = Image.fromarray(image)
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    for number, (left, top, wide, high) in enumerate(boxes):
        corners = (left * width - 1, top * height - 1, (left + wide) * width, (top + high) * height)
        draw.rectangle(corners, outline=_MARKS[number % len(_MARKS)], width=2)
    return np.asarray(picture)
