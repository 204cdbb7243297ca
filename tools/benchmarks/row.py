"""One comparison, how it is timed, and how it is printed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    repeats: int = 5
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """``ours`` and ``peer`` in ``unit``; ``ratio`` above 1 means that ours is better, whichever way the unit points.

    ``spread``: half the interquartile range of the ratio over turns, relative to the ratio.
    """

    name: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str
    spread: float


def throughput(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    peer_name: str,
    work: float,
    unit: str,
    settings: Settings,
) -> Row:
    """``work`` units a call, both sides in turns; more per second is better."""
    for side in (ours, peer):
        side()  # the first call pays for caches and allocations
    times: list[tuple[float, float]] = []
    for turn in range(settings.repeats):
        pair = [0.0, 0.0]
        for side in (0, 1) if turn % 2 == 0 else (1, 0):  # neither side always runs on the other's warm cache
            pair[side] = seconds((ours, peer)[side])
        times.append((pair[0], pair[1]))
    fast, slow = (statistics.median(t[side] for t in times) for side in (0, 1))
    ratios = sorted(theirs / own for own, theirs in times)
    ratio = statistics.median(ratios)
    quarter = len(ratios) // 4
    spread = (ratios[-1 - quarter] - ratios[quarter]) / 2 / ratio
    return Row(name, work / fast, work / slow, peer_name, ratio, unit, spread)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call, the accelerator's work included."""
    import torch

    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def smaller_is_better(name: str, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    """A row of two counts (bytes, tokens wasted) that do not vary."""
    return Row(name, ours, peer, peer_name, peer / ours if ours else float("inf"), unit, 0.0)


def table(rows: Sequence[Row]) -> str:
    """Aligned columns for people."""
    head = ("what", "ours", "peer", "", "unit", "ratio", "spread")
    body = [
        (r.name, number(r.ours), number(r.peer), r.peer_name, r.unit, f"{r.ratio:.2f}x", f"±{100 * r.spread:.0f}%")
        for r in rows
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    right = {1, 2, 5, 6}

    def line(cells: Sequence[str]) -> str:
        parts = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(parts).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, body)])


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
