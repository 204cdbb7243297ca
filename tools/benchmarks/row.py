"""One comparison, how it is timed, and how it is printed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mmagent.models.peaks import peak_of

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """``size``: "small" or "large" for areas that have both; by default large where there is an accelerator.
    ``peak``: operations a second that the device can do in bf16, where that is known. ``part``: what is measured of an
    area that has parts; empty for all. ``agent``: where there is a trained one, for areas that want one."""

    repeats: int = 5
    quick: bool = False
    size: str | None = None
    peak: float | None = None
    part: str = ""
    agent: Path | None = None


def device_peak() -> float | None:
    """What the accelerator of this machine can do at most, or None for an unknown one and for a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())


@dataclass(frozen=True)
class Row:
    """``ours`` and ``peer`` in ``unit``; ``ratio`` above 1 means that ours is better, whichever way the unit points.

    ``spread``: half the interquartile range of the ratio over turns, relative to the ratio. ``missing``: what a peer
    wants that is not here; its row has no figures, then, and they are NaN.
    """

    name: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str
    spread: float
    missing: str = ""


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
    (row,) = throughputs(name, ours, {peer_name: peer}, work, unit, settings)
    return row


def throughputs(
    name: str,
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    work: float,
    unit: str,
    settings: Settings,
) -> list[Row]:
    """One row a peer; all sides in turns, so that every peer meets the same runs of ours."""
    sides = [ours, *peers.values()]
    for side in sides:
        side()  # the first call pays for caches and allocations
    times: list[list[float]] = []
    for turn in range(settings.repeats):
        taken = [0.0] * len(sides)
        for side in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
            taken[side] = seconds(sides[side])  # no side always runs on the cache that another warmed
        times.append(taken)
    medians = [statistics.median(taken) for taken in zip(*times, strict=True)]
    rows = []
    for side, peer_name in enumerate(peers, start=1):
        ratios = sorted(taken[side] / taken[0] for taken in times)
        ratio = statistics.median(ratios)
        quarter = len(ratios) // 4
        spread = (ratios[-1 - quarter] - ratios[quarter]) / 2 / ratio
        rows.append(Row(name, work / medians[0], work / medians[side], peer_name, ratio, unit, spread))
    return rows


def turns(sides: Sequence[Callable[[], T]], settings: Settings) -> list[list[T]]:
    """What each side measures of itself, turn for turn, after one that pays for caches and allocations."""
    for side in sides:
        side()
    found: list[list[T]] = [[] for _ in sides]
    for turn in range(settings.repeats):
        for n in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
            found[n].append(sides[n]())
    return found


def durations(name: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, scale: float, unit: str) -> Row:
    """A row of seconds, one a turn of each side, shown ``scale`` times as large; less is better."""
    ratios = sorted(theirs / mine for mine, theirs in zip(ours, peer, strict=True))
    ratio, quarter = statistics.median(ratios), len(ratios) // 4
    spread = (ratios[-1 - quarter] - ratios[quarter]) / 2 / ratio
    return Row(name, scale * statistics.median(ours), scale * statistics.median(peer), peer_name, ratio, unit, spread)


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


def not_run(name: str, peer_name: str, unit: str, missing: str) -> Row:
    """The row of a peer that is not here."""
    return Row(name, math.nan, math.nan, peer_name, math.nan, unit, math.nan, missing)


def as_json(row: Row) -> dict[str, str | float | None]:
    """Its fields, None where there is no figure, for JSON has no NaN; ``missing`` where something is."""
    fields = {key: value for key, value in vars(row).items() if key != "missing" or value}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in fields.items()}


def told(row: Row) -> str:
    """A line for who waits."""
    if row.missing:
        return f"{row.peer_name} not run: {row.missing}"
    return f"{row.ratio:.2f}x +-{100 * row.spread:.0f} % of {row.peer_name}"


def table(rows: Sequence[Row]) -> str:
    """Aligned columns for people."""
    head = ("what", "ours", "peer", "", "unit", "ratio", "spread")
    body = [
        (r.name, "-", "-", f"{r.peer_name}: not run", r.unit, "-", "-")
        if r.missing
        else (r.name, number(r.ours), number(r.peer), r.peer_name, r.unit, f"{r.ratio:.2f}x", f"±{100 * r.spread:.0f}%")
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
