"""What every rank spends where, and which are slow: one small gather every few steps."""

from __future__ import annotations

import json
import logging
import math
import resource
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmagent import dist
from mmagent.protocols import Engine
from mmagent.train.logs import Record, drop_from
from mmagent.train.run import Run
from mmagent.train.segments import DEVICE, OWN

logger = logging.getLogger(__name__)

PROBE = "probe"
"""Beside the segments: the fastest of a few equal matrix products, the same on every rank. It shows a slow device or
host even where ranks share weights or packs, and so wait for each other inside every segment."""


NOISE = 4.0
"""Standard errors that a slow rank's work must stand out by."""


class SlowRank(NamedTuple):
    """``rank`` of ``host`` takes ``seconds`` a step for its own work, ``excess`` (a share) more than the median rank;
    ``segment`` has most of it. Where that is the probe, the seconds are the probe's."""

    rank: int
    host: str
    segment: str
    seconds: float
    excess: float

    def __str__(self) -> str:
        what = "a probe of its device" if self.segment == PROBE else f"its own work, most of it in {self.segment!r}"
        return (
            f"rank {self.rank} on {self.host} is slow: {self.seconds:.4g} s a step for {what}; "
            f"{self.excess:.0%} over the median rank"
        )


class SlowRanks:
    """Finds ranks that stay slow. To be asked window by window; all ranks asked alike find the same.

    A rank is judged by the seconds that it spends in segments in which it waits for nobody (:data:`OWN`). It is slow
    when in each of the last ``patience`` windows its median step, which a pause or two do not move, took ``over`` (a
    share) longer than the median rank's; of an even number of ranks the lower median, so that of two one can be slow.
    What it took longer over all these windows must also exceed :data:`NOISE` times its standard error, by how much
    steps vary: on shared processors, where they vary by 30 % (one sigma), about 40 % in three windows of ten.

    A :data:`PROBE` is a millisecond in a window, which anything disturbs. By it a rank is slow when it was in each of
    ``2 * patience`` windows, and at its best there slower than the median rank mostly was.
    """

    def __init__(self, over: float = 0.1, patience: int = 3):
        if over <= 0 or patience < 1:
            raise ValueError(f"over must be positive and patience at least 1, got {over} and {patience}")
        self.over, self.patience = over, patience
        self._windows: deque[list[dict[str, float]]] = deque(maxlen=patience)
        self._steps: deque[list[list[float]]] = deque(maxlen=patience)  # own work of every rank's steps
        self._probes: deque[list[float]] = deque(maxlen=2 * patience)
        self.excess = 0.0
        """Of the slowest rank's own work in the last window over the median one's, a share."""

    def __call__(
        self, steps: Sequence[Sequence[Mapping[str, float]]], probes: Sequence[float], hosts: Sequence[str]
    ) -> list[SlowRank]:
        """``steps[rank][step]``: seconds by segment of one window's steps; ``probes``: of every rank's probe at its
        end. Those that are slow now, slowest first."""
        if self._windows and len(self._windows[0]) != len(steps):
            for kept in (self._windows, self._steps, self._probes):
                kept.clear()  # other ranks than before
        ours = [[_own_seconds(row) for row in rows] for rows in steps]
        self._windows.append([_median_step(rows) for rows in ours])
        self._steps.append([[sum(row.values()) for row in rows] for rows in ours])
        self._probes.append(list(probes))
        excess = self._by_work()
        self.excess = max(_over_median([sum(row.values()) for row in self._windows[-1]]), default=0.0)
        slow = {rank: share for rank, share in enumerate(excess) if share > self.over}
        by_probe = {rank: share for rank, share in enumerate(self._by_probe()) if share > self.over}
        found = [self._describe(rank, hosts[rank], slow, by_probe) for rank in sorted(slow | by_probe)]
        return sorted(found, key=lambda rank: -rank.excess)

    def _by_work(self) -> list[float]:
        """Of every rank what its own work exceeds the median rank's by in the last window; 0 where that proves
        nothing."""
        shares = [_over_median([sum(row.values()) for row in window]) for window in self._windows]
        if len(shares) < self.patience:
            return [0.0] * len(shares[-1])
        pooled = [[seconds for window in self._steps for seconds in window[rank]] for rank in range(len(shares[-1]))]
        always = [min(column) > self.over for column in zip(*shares, strict=True)]
        proven = [both == (True, True) for both in zip(always, _stand_out(pooled), strict=True)]
        return [share if sure else 0.0 for share, sure in zip(shares[-1], proven, strict=True)]

    def _by_probe(self) -> list[float]:
        """Of every rank what its best probe exceeds the median rank's median one by; 0 where that proves nothing."""
        ranks = list(zip(*self._probes, strict=True))
        if len(self._probes) < 2 * self.patience:
            return [0.0] * len(ranks)
        usual = statistics.median_low([statistics.median(values) for values in ranks])
        always = [min(column) > self.over for column in zip(*map(_over_median, self._probes), strict=True)]
        best = [min(values) / usual - 1.0 if usual > 0 else 0.0 for values in ranks]
        proven = [both == (True, True) for both in zip(always, _stand_out(ranks), strict=True)]
        return [share if sure else 0.0 for share, sure in zip(best, proven, strict=True)]

    def _describe(self, rank: int, host: str, slow: Mapping[int, float], by_probe: Mapping[int, float]) -> SlowRank:
        if slow.get(rank, 0.0) < by_probe.get(rank, 0.0):
            return SlowRank(rank, host, PROBE, self._probes[-1][rank], by_probe[rank])
        window = self._windows[-1]
        more = {name: window[rank][name] - statistics.median_low(row[name] for row in window) for name in OWN}
        return SlowRank(rank, host, max(OWN, key=lambda name: more[name]), sum(window[rank].values()), slow[rank])


def _own_seconds(row: Mapping[str, float]) -> dict[str, float]:
    """A step's seconds of own work; the device's clock stands for the host's where there is one, but in ``data``, where
    the device has nothing to do."""
    own = {name: row.get(DEVICE + name, row.get(name, 0.0)) for name in OWN}
    return {**own, "data": row.get("data", 0.0)}


def _median_step(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The row whose sum is the median of all."""
    return sorted(rows, key=lambda row: sum(row.values()))[(len(rows) - 1) // 2]


def _over_median(seconds: Sequence[float]) -> list[float]:
    """What each exceeds the lower median by, as a share of it."""
    usual = statistics.median_low(seconds)
    return [value / usual - 1.0 if usual > 0 else 0.0 for value in seconds]


def _stand_out(ranks: Sequence[Sequence[float]]) -> list[bool]:
    """Of each rank's values, whether their median exceeds the median rank's by :data:`NOISE` standard errors."""
    medians = [statistics.median(values) for values in ranks]
    usual = medians.index(statistics.median_low(medians))
    errors = [_error_of_median(values) for values in ranks]
    return [m - medians[usual] > NOISE * math.hypot(e, errors[usual]) for m, e in zip(medians, errors, strict=True)]


def _error_of_median(values: Sequence[float]) -> float:
    """Standard error of the median of values that vary as a normal distribution does but for a few: their sigma is
    1.4826 median deviations, the median varies 1.2533 times as much as the mean."""
    middle = statistics.median(values)
    sigma = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * sigma / math.sqrt(len(values))


class RankLog:
    """One JSON object for every ``interval`` steps in ``<directory>/ranks.jsonl``: ``steps`` that it is about,
    ``names`` of segments, ``seconds[rank][step][name]``, and of every rank its host, its :data:`PROBE`, and memory in
    bytes: resident (``rss`` and its ``peak``), on its device (``device_peak``), and with ``engine`` what parameters,
    gradients and optimizer state hold by role.

    Slow ranks are named when they are found (``slow``, and a warning), and at the last of ``steps``. Into the record
    go ``time/segment/NAME`` of this rank, ``time/data_share`` (of the whole step, hooks included), and
    once a window ``time/slowest_rank`` (excess over the median) and ``memory/...``.

    A row's time runs from log to log: what later hooks do at a step, such as saving, counts to the next one. Before
    anything is saved the window is closed, so that resumed runs have every step once.
    """

    segment = "logging"

    def __init__(
        self,
        run: Run,
        steps: int,
        interval: int = 10,
        over: float = 0.1,
        engine: Engine | None = None,
    ):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.run, self.steps, self.interval, self.engine = run, steps, interval, engine
        self.path = run.directory / "ranks.jsonl"
        self.slow = SlowRanks(over)
        self.found: dict[int, SlowRank] = {}
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._memory: dict[str, Any] = {}
        self._probe = Probe(run.world.device)
        self._last = sys.maxsize
        run.before_save.append(self.close_window)

    def __call__(self, step: int, record: Record) -> None:
        seconds = self.run.segments.take()
        record |= {f"time/segment/{name}": value for name, value in seconds.items()}
        whole = sum(value for name, value in seconds.items() if not name.startswith(DEVICE))
        if whole:
            record["time/data_share"] = seconds.get("data", 0.0) / whole
        self._rows = [row for row in self._rows if row[0] < step]  # a run that goes back takes these steps again
        self._rows.append((step, seconds))
        if step % self.interval == 0 or step == self.steps:
            self.close_window(step)
            record["time/slowest_rank"] = self.slow.excess
            record |= {f"memory/{name}": float(size) for name, size in _flat(self._memory)}
        if step == self.steps and dist.is_main():
            for rank in self.found.values():
                logger.warning("at the end: %s", rank)

    def close_window(self, step: int) -> None:
        """Gather and write what has not been. A collective; every rank has the same steps in hand."""
        if not self._rows:
            return
        self._memory = memory(self.run.world.device, self.engine)
        names = sorted({name for _, row in self._rows for name in row})
        own = [[float(f"{row.get(name, 0.0):.4g}") for name in names] for _, row in self._rows]
        mine = {"host": socket.gethostname(), "names": names, "seconds": own, "probe": self._probe()}
        mine["memory"] = self._memory
        everyone = self.run.world.gather_objects(mine)
        steps = [number for number, _ in self._rows]
        self._rows = []
        table = [[dict(zip(rank["names"], row, strict=True)) for row in rank["seconds"]] for rank in everyone]
        slow = self.slow(table, [rank["probe"] for rank in everyone], [rank["host"] for rank in everyone])
        for rank in slow:
            if rank.rank not in self.found and dist.is_main():
                logger.warning("steps up to %d: %s", step, rank)
        self.found = {rank.rank: rank for rank in slow}
        if dist.is_main():
            self._write(steps, table, everyone, slow)

    def _write(
        self,
        steps: Sequence[int],
        table: Sequence[Sequence[Mapping[str, float]]],
        everyone: Sequence[Mapping[str, Any]],
        slow: Sequence[SlowRank],
    ) -> None:
        names = sorted({name for rank in everyone for name in rank["names"]})
        row = {
            "step": steps[-1],
            "steps": steps,
            "names": names,
            "hosts": [rank["host"] for rank in everyone],
            "seconds": [[[step.get(name, 0.0) for name in names] for step in rank] for rank in table],
            "probe": [float(f"{rank['probe']:.4g}") for rank in everyone],
            "memory": [rank["memory"] for rank in everyone],
            "slow": [rank._asdict() for rank in slow],
        }
        if steps[0] <= self._last:  # the first of this process, or after a recovery
            drop_from(self.path, steps[0])
        self._last = steps[-1]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def memory(device: torch.device, engine: Engine | None = None) -> dict[str, Any]:
    """Bytes of this process: resident now and at most, on its device at most, and by kind and role what ``engine``
    holds, where it can tell (``engine.memory()``)."""
    sizes: dict[str, Any] = {"rss": _resident(), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        sizes |= {"device": torch.cuda.memory_allocated(device), "device_peak": torch.cuda.max_memory_allocated(device)}
    tell = getattr(engine, "memory", None)
    return sizes | (tell() if tell is not None else {})


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():  # no Linux: the most that it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _flat(sizes: Mapping[str, Any]) -> list[tuple[str, int]]:
    """``{"rss": 1, "parameters": {"head": 2}}`` as names with slashes."""
    flat = []
    for name, value in sizes.items():
        flat += (
            [(f"{name}/{role}", size) for role, size in value.items()] if isinstance(value, dict) else [(name, value)]
        )
    return flat


class Probe:
    """Seconds of a fixed matrix product on ``device``, the fastest of three: about a millisecond each."""

    def __init__(self, device: torch.device):
        side, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
        generator = torch.Generator().manual_seed(0)  # not the run's
        self.matrix = torch.randn(side, side, generator=generator).to(device, dtype)

    def __call__(self) -> float:
        best = float("inf")
        for _ in range(3):
            self._wait()
            started = time.perf_counter()
            torch.mm(self.matrix, self.matrix)
            self._wait()
            best = min(best, time.perf_counter() - started)
        return best

    def _wait(self) -> None:
        if self.matrix.is_cuda:
            torch.cuda.synchronize(self.matrix.device)
