"""Small things in large pictures, seen whole, and seen small with a tool that enlarges what is asked for."""

from __future__ import annotations

import random
from collections.abc import Mapping

from evals.baselines import WORDS
from evals.suite import Play, Suite
from mmagent.tasks import open_tasks
from mmagent.tasks.looking import MAX_CROPS, CropTask
from mmagent.tasks.worlds import WorldTask
from mmagent.trajectories import Item
from mmagent.worlds import search

RULES = "Answer with the answer alone, without a sentence around it."
TOOL = (
    "Each of your answers is either crop(x1,y1,x2,y2), four integers from 0 to 999, thousandths of the whole picture's "
    "width and height, which shows you that part enlarged; or the answer to the question alone."
)


def small_search(per_task: int = 30, seed: int = 0) -> Suite:
    """``per_task`` questions of each world, levels (sizes of the picture) in turn."""
    return Suite(
        name="small_search",
        version=1,
        summary="Find a small thing in a picture of up to 1920 x 1440 pixels: its colour, its place, its sign.",
        prompt="the picture, then the question with the form of its answer",
        judge="the word, capitals aside",
        tasks=tuple(world.name for world in search.worlds()),
        open=open_tasks,
        per_task=per_task,
        play=Play(max_steps=1, max_tokens=256, rules=RULES, guess=guess),
        seed=seed,
        needs_browser=False,
        slices=_slices,
    )


def crop_search(per_task: int = 30, seed: int = 0) -> Suite:
    """The same questions about pictures shown with 448 pixels, with a tool to look closer."""
    return Suite(
        name="crop_search",
        version=1,
        summary="The same, of pictures that are shown too small: cut out and enlarge what must be seen, then answer.",
        prompt="the reduced picture, the question and the tool; after a crop the part that was asked for",
        judge="the word, capitals aside; crops that are none end the episode at 0",
        tasks=tuple(f"{world.name}/crop" for world in search.worlds()),
        open=open_tasks,
        per_task=per_task,
        play=Play(max_steps=MAX_CROPS + 1, max_tokens=256, rules=TOOL, guess=guess),
        seed=seed,
        needs_browser=False,
        slices=_slices,
    )


def guess(rng: random.Random) -> str:
    """A colour, a place, four letters or a word."""
    letters = "".join(rng.choice(search.LETTERS) for _ in range(4))
    return rng.choice(("red", "blue", "upper left", "lower right", letters, rng.choice(WORDS)))


def _slices(task: WorldTask | CropTask, item: Item) -> Mapping[str, str]:
    height, width = task.example(item).images[0].shape[:2]
    return {"picture": f"{width} x {height}"}
