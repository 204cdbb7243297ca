"""Tasks whose scenes are drawn from seeds: items, splits and levels, kept in one place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import Generic, Protocol, TypeVar

import numpy as np

from mmagent.tasks.base import score_of
from mmagent.trajectories import Item, Score, Trajectory
from mmagent.worlds.drawing import generator
from mmagent.worlds.examples import split_of
from mmagent.worlds.seeds import SPLITS, seed_for

STRIDE = 1_000_000
"""Items of one ``seed``; the next seed's begin behind them."""
REMEMBERED = 64
_TRIES = 500


class Scene(Protocol):
    """What an item is about. ``told()``: all that tells it from others, in a text that is the same in every process."""

    def told(self) -> str: ...


S = TypeVar("S", bound=Scene)


class SeededTask(Generic[S]):
    """Items of ``levels`` levels in turn, or of one ``level``. Who derives from it draws scenes and makes environments.

    A scene belongs to the split that its own content says, as questions of worlds do: small scenes come up under many
    seeds, and none of them both trains and judges.
    """

    name: str
    category: str
    levels: int

    def __init__(self, level: int | None = None):
        if level is not None and not 0 <= level < self.levels:
            raise ValueError(f"{self.name} has levels 0 to {self.levels - 1}, not {level}")
        self.level = level
        if level is not None:
            self.name = f"{self.name}/level-{level}"
        self._known: OrderedDict[int, S] = OrderedDict()

    def draw(self, random: np.random.Generator, level: int) -> S | None:
        """A scene of ``level``, None where what came of it is of no use."""
        raise NotImplementedError

    def items(self, split: str, seed: int) -> Iterator[Item]:
        """Endless. Splits never share a scene, whatever the seeds."""
        for n in count():
            index = seed * STRIDE + n
            yield Item(self.name, f"{split}-{index}", seed_for(split, index))

    def scene(self, item: Item) -> S:
        """What an item is about."""
        if item.seed not in self._known:
            self._known[item.seed] = self._drawn(item)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(item.seed)
        return self._known[item.seed]

    def _drawn(self, item: Item) -> S:
        index, residue = divmod(item.seed, len(SPLITS))
        split = SPLITS[residue]
        level = index % self.levels if self.level is None else self.level
        family = self.name.partition("/level-")[0]
        for attempt in range(_TRIES):
            scene = self.draw(generator(f"{family}/{level}/{attempt}", index, split), level)
            if scene is not None and split_of(f"{level} {scene.told()}") == split:
                return scene
        raise RuntimeError(f"{self.name}: {_TRIES} scenes of level {level}, none for split {split!r}")

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)
