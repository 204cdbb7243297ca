"""Which tasks to draw next: reinforcement learning with curriculum sampling.

Every task's pass rate is followed as an exponential moving average. Tasks the policy solves half of the time
teach most (the variance of a Bernoulli reward, ``p (1 - p)``, is the signal a group carries), so they are drawn
most; a floor keeps every task alive. Groups in which all fail or all pass are dropped after the rollout; the
moving average of ``1 / (1 - their share)`` says how many more prompts to draw so that the batch is full
(GLM-4.1V-Thinking's RLCS). Which items of a task are drawn can be made to depend on how hard they were found to be
before (:mod:`mmagent.agent.difficulty`), in stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmagent.agent.difficulty import Grades, band_at
from mmagent.protocols import Task
from mmagent.trajectories import Item


@dataclass
class CurriculumConfig:
    """``decay`` of the moving averages; ``floor``: least weight of a task, relative to the greatest (1 draws all
    tasks alike); ``max_oversampling`` bounds how many times the batch may be drawn.

    ``grades``: a file of items' difficulty. A task that was never tried then counts as solved as often as its items
    were, and ``bands`` say which are drawn, from which collection on: ``{0: [0.2, 0.9], 300: [0.01, 0.3]}`` takes items
    that were right in a fifth to nine tenths of their tries, and from collection 300 on hard ones. Items without a
    grade, behind those that have one, are drawn as they come."""

    decay: float = 0.8
    floor: float = 0.2
    max_oversampling: float = 2.0
    grades: str = ""
    bands: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"curriculum decay must lie in [0, 1), got {self.decay}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"curriculum floor must lie in (0, 1], got {self.floor}")
        if self.max_oversampling < 1:
            raise ValueError(f"max_oversampling must be at least 1, got {self.max_oversampling}")
        if self.bands and not self.grades:
            raise ValueError("curriculum.bands say how hard items may be: name a file of curriculum.grades")
        for start, band in self.bands.items():
            if start < 0 or len(band) != 2 or not 0 <= band[0] <= band[1] <= 1:
                raise ValueError(f"curriculum.bands: {start}: {band} is no [least, most] within 0 and 1")


class Curriculum:
    """Weights over ``tasks`` and the oversampling factor; the same on every rank, because it is fed global means."""

    def __init__(self, tasks: Sequence[str], config: CurriculumConfig | None = None):
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"curriculum: task names must be distinct and at least one, got {list(tasks)}")
        self.config = config or CurriculumConfig()
        self.grades = Grades.load(self.config.grades) if self.config.grades else Grades({})
        self.pass_rate: dict[str, float | None] = {task: self.grades.task_rate(task) for task in tasks}
        self.oversampling = 1.0

    def takes(self, collection: int) -> Callable[[Item], bool] | None:
        """Which items are drawn for a collection; None for all."""
        band = band_at(self.config.bands, collection)
        if band is None:
            return None
        least, most = band

        def within(item: Item) -> bool:
            rate = self.grades.rate(item)
            return rate is None or least <= rate <= most

        return within

    def weights(self) -> dict[str, float]:
        """Probabilities of the tasks. One neither tried nor graded counts as solved half of the time."""
        signal = {name: 4 * p * (1 - p) if p is not None else 1.0 for name, p in self.pass_rate.items()}
        top = max(max(signal.values()), 1e-9)
        raised = {name: max(value / top, self.config.floor) for name, value in signal.items()}
        total = sum(raised.values())
        return {name: value / total for name, value in raised.items()}

    def draws(self, prompts: int) -> int:
        """How many prompts to draw so that about ``prompts`` groups survive."""
        return int(np.ceil(prompts * min(self.oversampling, self.config.max_oversampling) - 1e-9))

    def update(self, pass_rates: Mapping[str, float], degenerate_share: float) -> None:
        """Take in one step: the mean reward of each task that was tried, and the share of dropped groups."""
        decay = self.config.decay
        for name, value in pass_rates.items():
            if name not in self.pass_rate:
                raise ValueError(f"curriculum: unknown task {name!r}")
            before = self.pass_rate[name]
            self.pass_rate[name] = value if before is None else decay * before + (1 - decay) * value
        wanted = 1 / max(1 - degenerate_share, 1 / self.config.max_oversampling)
        self.oversampling = decay * self.oversampling + (1 - decay) * wanted

    def state_dict(self) -> dict[str, Any]:
        return {"pass_rate": dict(self.pass_rate), "oversampling": self.oversampling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state["pass_rate"]) != set(self.pass_rate):
            raise ValueError(f"curriculum: saved for tasks {sorted(state['pass_rate'])}, not {sorted(self.pass_rate)}")
        self.pass_rate = dict(state["pass_rate"])
        self.oversampling = float(state["oversampling"])


class ItemStream:
    """Items of a mixture of tasks, drawn by weights, exact to resume.

    The state is how many items each task has given. Which tasks a draw takes depends on ``(seed, draw number)``
    alone, by systematic sampling: a task of weight ``w`` gets ``floor`` or ``ceil`` of ``w n`` items. Items that are
    not to be taken count as given.
    """

    def __init__(self, tasks: Sequence[Task], split: str, seed: int):
        self.tasks = {task.name: task for task in tasks}
        if not tasks or len(self.tasks) != len(tasks):
            raise ValueError(f"tasks must have distinct names and be at least one, got {[t.name for t in tasks]}")
        self.split, self.seed = split, seed
        self.given = dict.fromkeys(self.tasks, 0)
        self.number = 0
        self._iterators: dict[str, Iterator[Item]] = {}

    def draw(
        self, count: int, weights: Mapping[str, float], takes: Callable[[Item], bool] | None = None
    ) -> list[tuple[Task, Item]]:
        """``count`` items that it ``takes``. Raises ``ValueError`` for a task without items left, and for one whose
        items come round without one that it takes."""
        names = list(self.tasks)
        share = np.array([weights[name] for name in names], dtype=np.float64)
        generator = np.random.default_rng((self.seed, self.number))
        points = (np.arange(count) + generator.random()) / max(count, 1) * share.sum()
        chosen = np.minimum(np.searchsorted(np.cumsum(share), points, side="right"), len(names) - 1)
        self.number += 1
        return [(self.tasks[names[n]], self._taken(names[n], takes)) for n in generator.permutation(chosen)]

    def _taken(self, name: str, takes: Callable[[Item], bool] | None) -> Item:
        item, passed = self._next(name), set()
        while takes is not None and not takes(item):
            if item.key in passed:  # they come round again
                told = f"none of its {len(passed)} {self.split} items is as hard as curriculum.bands ask"
                raise ValueError(f"{name}: {told}")
            passed.add(item.key)
            item = self._next(name)
        return item

    def _next(self, name: str) -> Item:
        if name not in self._iterators:
            self._iterators[name] = iter(self.tasks[name].items(self.split, self.seed))
            for _ in range(self.given[name]):
                next(self._iterators[name], None)
        item = next(self._iterators[name], None)
        if item is None:
            raise ValueError(f"task {name!r} has no more than {self.given[name]} items of split {self.split!r}")
        self.given[name] += 1
        return item

    def state_dict(self) -> dict[str, Any]:
        return {"given": dict(self.given), "number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state["given"]) != set(self.given):
            raise ValueError(f"items: saved for tasks {sorted(state['given'])}, not {sorted(self.given)}")
        self.given, self.number = dict(state["given"]), int(state["number"])
        self._iterators.clear()
