"""The temperature that episodes are sampled at, raised when their reward no longer rises.

A policy that has converged tries the same again and again. GLM-4.5 (arXiv 2508.06471) takes a reward that has settled
for the sign, and samples hotter from then on, as far as that costs no more than a hundredth of the score; it asks the
latter on held-out items, at several temperatures. Here the episodes of the training itself are asked: where the reward
of the first window at a new temperature lies more than ``drop`` below the one that it had settled at, the temperature
goes back, and is not raised again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class HeatConfig:
    """The temperature rises by ``rise`` (0: never) up to ``most`` where the mean reward of ``window`` collections lies
    within ``flat`` of the window before; ``drop`` is the share of the reward that a rise may cost."""

    rise: float = 0.0
    most: float = 1.5
    window: int = 10
    flat: float = 0.01
    drop: float = 0.01

    def __post_init__(self) -> None:
        if self.rise < 0 or self.most <= 0 or self.window < 1 or self.flat < 0 or not 0 <= self.drop < 1:
            raise ValueError(f"heat: rise, flat and drop must not be negative, most positive, drop below 1: {self}")


class Heat:
    """The temperature ``now``; the same on every rank, because it is fed global means."""

    def __init__(self, start: float, config: HeatConfig):
        if config.rise and start > config.most:
            raise ValueError(f"heat.most {config.most} lies below the temperature {start} that episodes begin with")
        self.config, self.now = config, start
        self._rewards: list[float] = []  # at this temperature, the last two windows of them
        self._before: tuple[float, float] | None = None  # the temperature before a rise, and its reward
        self._done = False

    def update(self, reward: float) -> None:
        """Take in the mean reward of one collection."""
        config = self.config
        if not config.rise or self._done:
            return
        self._rewards.append(reward)
        window = self._rewards[-config.window :]
        mean = sum(window) / len(window)
        if self._before is not None and len(self._rewards) == config.window:
            temperature, settled = self._before
            self._before = None
            if mean < settled * (1 - config.drop):
                self.now, self._done, self._rewards = temperature, True, []
                return
        if len(self._rewards) < 2 * config.window:
            return
        earlier = self._rewards[: config.window]
        if abs(mean - sum(earlier) / config.window) > config.flat:
            del self._rewards[0]
        elif self.now + config.rise <= config.most + 1e-9:
            self._before, self._rewards = (self.now, mean), []
            self.now += config.rise
        else:
            self._done = True

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now, "rewards": list(self._rewards), "before": self._before, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.now, self._done = float(state["now"]), bool(state["done"])
        self._rewards = [float(x) for x in state["rewards"]]
        self._before = tuple(state["before"]) if state["before"] is not None else None
