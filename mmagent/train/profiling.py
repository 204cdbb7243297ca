"""Which operations a step spends its time in: torch's profiler for a few chosen steps, as a trace and a table."""

from __future__ import annotations

import bisect
import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from mmagent import dist
from mmagent.files import write_text
from mmagent.train.logs import Record
from mmagent.train.run import Run

_PREFIX = "segment/"


class OpTime(NamedTuple):
    """Seconds that all calls of ``op`` within ``segment`` took themselves, without what they call: on the host, and on
    the device."""

    segment: str
    op: str
    calls: int
    host: float
    device: float


class Profile:
    """Profile ``count`` steps from step ``start`` on, on the main rank. Outside them it costs nothing.

    ``<directory>/profile/steps-A-B.trace.json.gz`` opens in Perfetto or ``chrome://tracing``; ``.txt`` beside it is a
    table of the operations that took longest, by segment of the step; ``.json`` is the same for tools. The first step
    cannot be profiled, as hooks are called after steps; it would show the warming up. A run that is resumed amid the
    steps profiles those that are left.
    """

    segment = "profile"

    def __init__(self, run: Run, start: int, count: int = 1, top: int = 40):
        if start < 2 or count < 1:
            raise ValueError(f"watch.profile: start must be at least 2 and count at least 1, got {start} and {count}")
        self.run, self.start, self.end, self.top = run, start, start + count - 1, top
        self._profiler: profile | None = None
        self._first = start

    def __call__(self, step: int, record: Record) -> None:
        if not dist.is_main():
            return
        if self._profiler is not None and step >= self.end:
            self._finish(step)
        elif self._profiler is None and self.start - 1 <= step < self.end:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self.run.world.device.type == "cuda" else []
            self._profiler, self._first = profile(activities=activities), step + 1
            self.run.segments.annotate = True
            self._profiler.start()

    def _finish(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        self.run.segments.annotate = False
        profiler.stop()
        folder = self.run.directory / "profile"
        folder.mkdir(exist_ok=True)
        stem = f"steps-{self._first}-{step}"
        print(f"profile: writing {folder / stem}.* ...", file=sys.stderr, flush=True)
        trace = folder / f"{stem}.trace.json"
        profiler.export_chrome_trace(str(trace))
        with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb", compresslevel=4) as packed:
            shutil.copyfileobj(plain, packed)
        trace.unlink()
        steps, ops = step - self._first + 1, op_times(profiler.events())
        write_text(folder / f"{stem}.txt", op_table(ops, steps, self.top))
        rows = {"steps": steps, "first": self._first, "ops": [op._asdict() for op in ops]}
        write_text(folder / f"{stem}.json", json.dumps(rows))


def op_times(events: Sequence[Any]) -> list[OpTime]:
    """What a profiler saw, added up by segment and operation, longest first. An operation belongs to the innermost
    segment that was open when it began, on whichever thread it ran: backwards have threads of their own."""
    moments, names = _segments(events)
    sums: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.name.startswith(_PREFIX) or event.name.startswith("ProfilerStep") or _on_device(event):
            continue
        at = bisect.bisect_right(moments, event.time_range.start) - 1
        key = (names[at] if at >= 0 else "other", event.name)
        entry = sums.setdefault(key, [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += event.self_cpu_time_total * 1e-6
        entry[2] += event.self_device_time_total * 1e-6
    ops = [OpTime(*key, int(calls), host, device) for key, (calls, host, device) in sums.items()]
    return sorted(ops, key=lambda op: (-op.device, -op.host))


def _on_device(event: Any) -> bool:
    """Kernels themselves: their time is with the operation that launched them."""
    return event.device_type != torch.autograd.DeviceType.CPU


def _segments(events: Sequence[Any]) -> tuple[list[float], list[str]]:
    """Moments at which another segment became the innermost one, and its name from then on."""
    marks = []
    for event in events:
        if event.name.startswith(_PREFIX) and not _on_device(event):
            start, end = event.time_range.start, event.time_range.end
            marks += [(start, 1, -end, event.name.removeprefix(_PREFIX)), (end, 0, 0.0, "")]
    moments, names, opened = [], [], []
    for moment, opens, _, name in sorted(marks):  # ends before starts, outer starts before inner ones
        if opens:
            opened.append(name)
        else:
            opened.pop()
        moments.append(moment)
        names.append(opened[-1] if opened else "other")
    return moments, names


def op_table(ops: Sequence[OpTime], steps: int, top: int) -> str:
    """For people: a line a segment, then the ``top`` operations with self time a step, share of all, and calls."""
    on_device = any(op.device for op in ops)
    where = "device" if on_device else "host"
    cost = {op: op.device if on_device else op.host for op in ops}
    total = sum(cost.values()) or 1.0
    segments: dict[str, float] = {}
    for op, seconds in cost.items():
        segments[op.segment] = segments.get(op.segment, 0.0) + seconds
    lines = [f"self time on the {where}, a step of {steps}", "", f"{'segment':<14} {'ms':>10} {'share':>7}"]
    for name, seconds in sorted(segments.items(), key=lambda pair: -pair[1]):
        lines.append(f"{name:<14} {1e3 * seconds / steps:10.2f} {seconds / total:7.1%}")
    lines += ["", f"{'segment':<14} {'operation':<52} {'ms':>10} {'share':>7} {'calls':>9} {'ms a call':>10}"]
    for op in sorted(ops, key=lambda op: -cost[op])[:top]:
        name = op.op if len(op.op) <= 52 else op.op[:51] + "…"
        lines.append(
            f"{op.segment:<14} {name:<52} {1e3 * cost[op] / steps:10.2f} {cost[op] / total:7.1%} "
            f"{op.calls / steps:9.1f} {1e3 * cost[op] / op.calls:10.4f}"
        )
    return "\n".join(lines) + "\n"
