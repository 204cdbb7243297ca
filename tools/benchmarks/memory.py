"""The most memory that tensors hold at one time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch


def peak_memory(step: Callable[[], object]) -> float:
    """MiB that one call adds at its highest: of the accelerator's allocator where there is one, else the largest
    running sum of what tensors allocate and free, as the profiler sees it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return highest(allocations(step)) / 2**20


def allocations(step: Callable[[], object]) -> list[int]:
    """Bytes that tensors take (and, negative, give back) on a CPU during one call, in order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    return [change for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]


def highest(changes: list[int]) -> int:
    """The largest running sum."""
    return max(accumulate(changes, initial=0))
