"""Phases of a training run: which roles are frozen for how long, under which schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmagent.engine.schedule import ScheduleConfig, schedule


@dataclass
class Phase:
    """``steps`` with the roles in ``freeze`` frozen and every learning rate times ``lr``, under its own schedule."""

    name: str = "all"
    steps: int = 1000
    freeze: list[str] = field(default_factory=list)
    lr: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def rate(self, start: int) -> Callable[[int], float]:
        """The learning-rate multiplier by global step, for a phase that begins at step ``start``."""
        return lambda step: self.lr * schedule(step - start, self.steps, self.schedule)

    def describe(self, start: int) -> str:
        """One line for people."""
        frozen = f"frozen: {', '.join(self.freeze)}" if self.freeze else "nothing frozen"
        return f"phase {self.name}: steps {start + 1} to {start + self.steps}, {frozen}"


def frozen_longest(phases: Sequence[Phase]) -> list[str]:
    """The roles that are frozen for most of the steps: what a step usually costs goes by them."""
    return max(phases, key=lambda phase: phase.steps, default=Phase()).freeze
