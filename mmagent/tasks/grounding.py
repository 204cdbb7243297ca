"""Grounding on rendered pages: one click on what a phrase describes."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from mmagent.actions import ActionError, Click, format_action, parse_action
from mmagent.geometry import ImageView
from mmagent.prompts import grounding_text
from mmagent.tasks.base import Screens, malformed, score_of
from mmagent.tasks.rendered import PageScenes, alone
from mmagent.trajectories import Item, Observation, Score, Trajectory
from mmagent.worlds.questions import Target, targets

NEXT_SCENE = 3 * 10**12
"""Added to a seed whose page names nothing: the same split, beyond every other item."""


class GroundingTask:
    """Pages of ``levels`` difficulty at the size of ``screens``; a click inside the element's box scores 1."""

    category = "gui-grounding"

    def __init__(self, screens: Screens, levels: tuple[int, int] = (1, 5), name: str = "grounding"):
        self.name, self.screens = name, screens
        self.scenes = PageScenes(screens, levels)

    @property
    def view(self) -> ImageView:
        size = (self.screens.height, self.screens.width)
        return ImageView(size, size)

    def items(self, split: str, seed: int) -> Iterator[Item]:
        return self.scenes.items(self.name, split, seed)

    def environment(self, item: Item) -> GroundingEnvironment:
        return GroundingEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        """The click, found in a browser of its own. Blocks; see :meth:`answer` inside a loop."""
        levels, name = self.scenes.levels, self.name

        async def ask(screens: Screens) -> str:
            return await GroundingTask(screens, levels, name).answer(item)

        yield alone(self.screens.width, self.screens.height, ask)

    async def demonstrate(self, item: Item) -> list[str]:
        """``gold``, in the task's own pages."""
        return [await self.answer(item)]

    async def answer(self, item: Item) -> str:
        """The click that scores 1."""
        target, _ = await self.target(item)
        return format_action(Click(*self.view.to_frame(*target.element.point)))

    async def target(self, item: Item) -> tuple[Target, Observation]:
        """What is to be found, and the first observation. Pages that name nothing are passed over."""
        seed = item.seed
        while not (named := targets((scene := await self.scenes.scene(seed)).elements)):
            seed += NEXT_SCENE
        target = Random(item.seed).choice(named)
        return target, Observation(grounding_text(target.phrase), (scene.image,))


class GroundingEnvironment:
    """One question, one click."""

    def __init__(self, task: GroundingTask, item: Item):
        self.task, self.item = task, item

    async def reset(self) -> Observation:
        _, seen = await self.task.target(self.item)
        return seen

    async def step(self, action: str) -> Observation:
        try:
            parsed = parse_action(action)
        except ActionError as error:
            return malformed(str(error))
        if type(parsed) is not Click:
            return malformed(f"{parsed.name} is no click")
        target, _ = await self.task.target(self.item)
        x, y = self.task.view.from_frame(parsed.x, parsed.y)
        x1, y1, x2, y2 = target.element.box
        hit = x1 <= x < x2 and y1 <= y < y2
        return Observation("hit" if hit else "miss", done=True, reward=float(hit))

    async def close(self) -> None:
        """Nothing is held."""
