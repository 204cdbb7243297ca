"""Several tasks as one: a level whose items are of many pages or kinds of errand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from mmagent.protocols import Demonstrates, Environment, Task
from mmagent.trajectories import Item, Score, Trajectory

Takes = Callable[[Task, Item], bool]
_OF = "@"
"""In the key of an item, before the name of the task that it is of."""


class MixedTask:
    """Items of ``tasks`` in turn, those that are not ``takes(task, item)`` passed over; all else is theirs. They must
    be of one category and have endless items, of which some are taken."""

    def __init__(self, name: str, tasks: Sequence[Task], takes: Takes | None = None):
        categories = {task.category for task in tasks}
        self.tasks = {task.name: task for task in tasks}
        if len(categories) != 1 or len(self.tasks) != len(tasks):
            told = [f"{task.name} ({task.category})" for task in tasks]
            raise ValueError(f"{name}: tasks must be of one category and have names of their own, got {told}")
        self.name, self.category, self._takes = name, categories.pop(), takes

    def items(self, split: str, seed: int) -> Iterator[Item]:
        """Endless. Splits never share a scene, for those of its tasks do not."""
        sources = [(task, iter(task.items(split, seed))) for task in self.tasks.values()]
        while True:
            for task, source in sources:
                yield self._own(task, next(item for item in source if self._takes is None or self._takes(task, item)))

    def _own(self, task: Task, item: Item) -> Item:
        return Item(self.name, f"{item.key}{_OF}{task.name}", item.seed, item.payload)

    def of(self, item: Item) -> tuple[Task, Item]:
        """The task that an item is of, and the item as that one knows it. Raises ``ValueError`` for a stranger."""
        key, _, name = item.key.rpartition(_OF)
        if name not in self.tasks:
            raise ValueError(f"{self.name} has no item {item.key!r}")
        return self.tasks[name], Item(name, key, item.seed, item.payload)

    def environment(self, item: Item) -> Environment:
        task, inner = self.of(item)
        return task.environment(inner)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        task, inner = self.of(item)
        return await task.score(inner, trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        """Of the item's own task. Blocks where that does; see :meth:`demonstrate` inside a loop."""
        task, inner = self.of(item)
        yield from task.gold(inner)

    async def demonstrate(self, item: Item) -> list[str]:
        """``gold``, in the pages that the item's own task has, where it has some."""
        task, inner = self.of(item)
        if isinstance(task, Demonstrates):
            return await task.demonstrate(inner)
        return await asyncio.to_thread(lambda: list(task.gold(inner)))
