"""One question, one answer: any world of :mod:`mmagent.worlds.examples` as a task, judged by the world itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

from mmagent.tasks.base import score_of
from mmagent.trajectories import Item, Observation, Score, Trajectory
from mmagent.worlds.examples import Example, World
from mmagent.worlds.seeds import SPLITS, seed_for

STRIDE = 1_000_000
"""Items of one ``seed``; the next seed's begin behind them."""
REMEMBERED = 64


class WorldTask:
    """Examples of ``world``, of all its levels in turn or of one ``level``; ``name`` replaces its own. A
    rollout's group shares its pictures."""

    def __init__(self, world: World, level: int | None = None, name: str = ""):
        self.world, self.level, self.levels = world, level, world.levels
        self.name = name or f"worlds/{world.name}" + ("" if level is None else f"/level-{level}")
        self.category = world.category
        self._known: OrderedDict[int, Example] = OrderedDict()

    def items(self, split: str, seed: int) -> Iterator[Item]:
        """Endless. Splits never share an example, whatever the seeds."""
        for n in count():
            index = seed * STRIDE + n
            yield Item(self.name, f"{split}-{index}", seed_for(split, index))

    def example(self, item: Item) -> Example:
        """What an item asks."""
        if item.seed not in self._known:
            index, split = divmod(item.seed, len(SPLITS))
            self._known[item.seed] = self.world.example(SPLITS[split], index, self.level)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(item.seed)
        return self._known[item.seed]

    def environment(self, item: Item) -> WorldEnvironment:
        return WorldEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        yield self.example(item).answer


class WorldEnvironment:
    """One question, one answer."""

    def __init__(self, task: WorldTask, item: Item):
        self.task, self.item = task, item

    async def reset(self) -> Observation:
        example = self.task.example(self.item)
        return Observation(example.question, example.images, layout=example.prompt)

    async def step(self, action: str) -> Observation:
        score = self.task.world.grade(self.task.example(self.item), action)
        return Observation("judged", done=True, reward=score.value, parts=score.parts)

    async def close(self) -> None:
        """Nothing is held."""
