"""Learning-rate schedules: pure functions of the step, so that nothing has to be saved or restored."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("cosine", "constant", "wsd")


@dataclass
class ScheduleConfig:
    """``kind``: ``cosine`` falls from 1 to ``floor`` over the whole run; ``constant`` stays at 1; ``wsd`` stays at 1
    and falls linearly to ``floor`` over the last ``decay`` fraction (warm-up, stable, decay: arXiv 2404.06395).
    All rise linearly over ``warmup`` steps, after ``delay`` steps at 0, in which nothing of that role moves."""

    kind: str = "cosine"
    warmup: int = 0
    floor: float = 0.1
    decay: float = 0.2
    delay: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule.kind {self.kind!r} is none of {', '.join(KINDS)}")
        if min(self.delay, self.warmup) < 0 or not 0 <= self.floor <= 1 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"schedule: delay and warmup must not be negative, floor and decay must lie in [0, 1]; got {self}"
            )


def schedule(step: int, steps: int, config: ScheduleConfig) -> float:
    """The multiplier of a learning rate at ``step`` (0-based) of ``steps``; in (0, 1] but for delay and floor 0."""
    if step < config.delay:
        return 0.0
    start = config.delay + config.warmup
    if step < start:
        return (step - config.delay + 1) / (config.warmup + 1)
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        start = max(start, steps - round(config.decay * steps))
    progress = min(max((step - start) / max(steps - 1 - start, 1), 0.0), 1.0)
    fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1.0 - progress
    return config.floor + (1.0 - config.floor) * fall
