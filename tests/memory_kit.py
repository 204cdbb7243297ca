"""How much memory tensors take on a CPU while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tools.benchmarks.memory import allocations, highest


class Memory(NamedTuple):
    """Bytes: the most that was held at one time on top of what was there before, and the largest single tensor."""

    peak: int
    largest: int


def memory(step: Callable[[], object]) -> Memory:
    """Of one call, from the allocator's own record; a call before it pays for caches."""
    step()
    changes = allocations(step)
    return Memory(highest(changes), max(changes, default=0))
