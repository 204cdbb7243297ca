"""Early signs of trouble in a long run, as hooks."""

from __future__ import annotations

import gc
import logging
import statistics
from collections import deque

from mmagent import dist

logger = logging.getLogger(__name__)


class Spikes:
    """Warn, and set ``health/spike`` to 1, where ``name`` exceeds its running median by ``factor`` times its usual
    deviation from it (the median absolute deviation of the last ``window`` steps)."""

    def __init__(self, name: str = "loss", *, window: int = 100, factor: float = 10.0):
        self.name, self.factor = name, factor
        self._recent: deque[float] = deque(maxlen=window)

    def __call__(self, step: int, record: dict[str, float]) -> None:
        value, spike = record[self.name], False
        if len(self._recent) >= 10:
            median = statistics.median(self._recent)
            usual = statistics.median(abs(v - median) for v in self._recent)
            spike = value > median + self.factor * max(usual, 1e-3 * abs(median))
            if spike and dist.is_main():
                logger.warning("step %d: %s is %.4g, the median of late is %.4g", step, self.name, value, median)
        self._recent.append(value)
        record["health/spike"] = float(spike)


class CollectGarbage:
    """Run Python's collector every ``interval`` steps on all ranks at once, and not in between: a collection on one
    rank of many stalls them all (MegaScale, arXiv 2402.15627, section 6)."""

    def __init__(self, interval: int = 200):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        gc.disable()

    def __call__(self, step: int, record: dict[str, float]) -> None:
        if step % self.interval == 0:
            gc.collect()
