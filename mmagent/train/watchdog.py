"""A run that hangs ends with a dump that names the rank and the segment the others wait for.

A collective waits for its last rank; all that a user sees is that nothing happens. Every rank's watchdog, a thread,
reports to the store that ranks meet by (no collective: those may be what hangs) in which step and segment its main
thread is. Where one has stood at one and the same instruction for too long, all ranks leave their stacks there; one of
them writes the dump, and all end with the status :data:`HUNG`, so that a launcher starts anew or fails.

A rank that works is not taken for one that hangs, however long a segment lasts: its main thread moves, from mark to
mark or from instruction to instruction, or computes, or another of its threads moves, such as the one in which a
generator decodes or a checkpoint is written. Those that wait for it in a collective do not move: no rank may work alone
for ``limit``. One that has lost its processor (SIGSTOP, a dead machine) reports nothing, and is named for its silence.
One that holds the interpreter's lock for ever cannot report either; its own stacks are then written by
:mod:`faulthandler`, which needs no lock, and end it.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as torch_dist

from mmagent.dist import World
from mmagent.train.segments import Segments

logger = logging.getLogger(__name__)

HUNG = 79
"""Exit status of a process whose run hung."""
STACKS = 8
"""Ranks beside the named ones whose stacks a dump shows."""
_GRACE = 60.0  # seconds beyond its limit that a watchdog is waited for which does not get to run
_OURS = tuple(f"{Path(__file__).resolve().parents[2] / name}{os.sep}" for name in ("mmagent", "data_pipelines"))
_numbers = count()  # of the watchdogs of this process: the same on all ranks


@dataclass(frozen=True)
class Report:
    """Where a rank is: ``seconds`` in its ``segment``, ``still`` of them at one instruction, ``at`` which its innermost
    frame is; ``waits`` when that lies in ``torch.distributed``; ``time`` by its clock."""

    rank: int
    step: int
    segment: str
    seconds: float
    still: float
    at: str
    waits: bool
    time: float

    def line(self, marked: bool, silent: float) -> str:
        """For people."""
        told = f"silent for {silent:.0f} s, last seen " if silent else ""
        mark = "  <-- the others wait for this one" if marked else ""
        where = f"in step {self.step}, segment {self.segment!r} for {self.seconds:.0f} s, at {self.at}"
        return f"rank {self.rank}: {told}{where}{mark}"


def suspects(reports: Sequence[Report | None], silent: Sequence[float]) -> list[int]:
    """Ranks that the others wait for: those that do not report; else those in an earlier step; else those that are in
    no collective while others are; else those in another segment than most. Empty where nothing sets one apart."""
    quiet = [rank for rank, report in enumerate(reports) if report is None or silent[rank]]
    if quiet:
        return quiet
    known = [report for report in reports if report is not None]
    ahead = max(report.step for report in known)
    tests: list[Callable[[Report], bool]] = [lambda r: r.step < ahead, lambda r: not r.waits]
    (usual, times), *_ = Counter(report.segment for report in known).most_common(1)
    if 2 * times > len(known):
        tests.append(lambda r: r.segment != usual)
    for test in tests:
        found = [report.rank for report in known if test(report)]
        if 0 < len(found) < len(known):
            return found
    return []


class Watchdog:
    """Watches ``segments`` while its block runs, on every rank of ``world`` that a launcher started. After ``limit``
    seconds without a move the dump goes to stderr and to ``folder/hang-<time>.txt``. ``limit`` 0, a lone process, or
    one without the launcher's store is not watched: there is nobody to wait for."""

    def __init__(self, world: World, segments: Segments, folder: Path, limit: float):
        self.world, self.segments, self.folder, self.limit = world, segments, folder, limit
        self.beat = min(5.0, limit / 10)
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._place: tuple[object, ...] = ()
        self._since, self._computed = time.monotonic(), 0.0
        self._thread: threading.Thread | None = None
        self._store: torch_dist.Store | None = None
        self._prefix = f"mmagent/hang/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_numbers)}"

    def __enter__(self) -> Watchdog:
        if not self.limit or self.world.size == 1 or "MASTER_PORT" not in os.environ:
            return self
        if self.limit >= self.world.timeout and self.world.is_main:
            logger.warning(
                "hang_after %.0f s: collectives fail after %.0f s by themselves, before a hang could be told",
                self.limit, self.world.timeout,
            )  # fmt: skip
        self._thread = threading.Thread(target=self._watch, name="mmagent-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.beat)
            faulthandler.cancel_dump_traceback_later()

    # ------------------------------------------------------------ watching

    def _watch(self) -> None:
        self._connect()
        while not self._ended.wait(self.beat):
            faulthandler.dump_traceback_later(self.limit + _GRACE, exit=True, file=sys.__stderr__)
            report = self._look()
            self._put(f"report/{self.world.rank}", json.dumps(asdict(report)))
            if report.still > self.limit or self._has("hang"):
                self._end(report)

    def _look(self) -> Report:
        current, step = self.segments.current, self.segments.step
        every = sys._current_frames()
        frame = every.get(self._main or 0)
        places = {n: _frames(f) for n, f in every.items() if n != threading.get_ident()}
        ours = [frames for n, frames in sorted(places.items()) if n == self._main or any(map(_is_ours, frames))]
        place = (current, step, *((id(f), f.f_lasti) for frames in ours for f in frames))
        at, waits = _innermost(frame)
        now, spent = time.monotonic(), self._spent()
        computes = not waits and spent - self._computed > 0.1 * self.beat
        if place != self._place or computes:
            self._place, self._since = place, now
        self._computed = spent
        name, begun = current or ("between segments", self._since)
        return Report(self.world.rank, step, name, now - begun, now - self._since, at, waits, time.time())

    def _spent(self) -> float:
        """Processor seconds of the main thread: a loop is always seen at the one place where it lets others run. Not
        beside an accelerator, which a thread waits for by spinning."""
        if self.world.device.type != "cpu" or self._main is None:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._main))

    # ------------------------------------------------------------ the end

    def _end(self, report: Report) -> None:
        """Leave the stacks, write the dump or wait for it, and exit."""
        self._put("hang", "1")
        stacks = _stacks()
        self._put(f"stacks/{self.world.rank}", stacks)
        trace = self._flight_recorder()
        deadline = time.monotonic() + 3 * self.beat + 2.0
        everyone = [f"stacks/{rank}" for rank in range(self.world.size)]
        while time.monotonic() < deadline and not self._has(*everyone):
            time.sleep(self.beat / 5)
        writes = self._store is None or self._first()
        if writes:
            self._tell(report, stacks, trace)
            self._put("told", "1")
        deadline = time.monotonic() + 10.0
        while not writes and time.monotonic() < deadline and not self._has("told"):
            time.sleep(self.beat / 5)
        os._exit(HUNG)

    def _tell(self, own: Report, stacks: str, trace: str) -> None:
        reports: list[Report | None] = [self._report(rank) for rank in range(self.world.size)]
        reports[own.rank] = own
        silent = [0.0 if r is None or self._has(f"stacks/{r.rank}") or r is own else own.time - r.time for r in reports]
        named = suspects(reports, silent) if self._store is not None else []
        lines = [f"The run hangs: rank {own.rank} has not moved for {own.still:.0f} s."]
        for rank, report in enumerate(reports):
            if report is None:
                lines.append(f"rank {rank}: never reported" + ("  <-- the others wait for this one" if named else ""))
            else:
                lines.append(report.line(rank in named, silent[rank]))
        if self._store is None:
            lines.append("The store that ranks meet by does not answer: this is what one rank knows of itself.")
        elif not named:
            lines.append("Nothing sets one rank apart: compare their stacks.")
        lines += [f"What NCCL was doing lies in {trace} (and beside it for the other ranks)."] if trace else []
        others = [rank for rank in range(self.world.size) if rank not in named][:STACKS]
        for rank in sorted({*named, *others}):
            text = stacks if rank == own.rank else self._get(f"stacks/{rank}")
            lines.append(f"\n---- stacks of rank {rank} ----\n{text or 'it left none'}")
        text = "\n".join(lines)
        suffix = "" if self._store is not None else f"-rank{own.rank}"
        path = self.folder / f"hang-{datetime.now():%Y%m%d-%H%M%S}{suffix}.txt"
        try:
            path.write_text(text + "\n", encoding="utf-8")
            text += f"\n(also in {path})"
        except OSError as error:  # of a full disk, or a mount that is what hangs
            text += f"\n(could not be written to {path}: {error})"
        print(f"\n{text}", file=sys.stderr, flush=True)

    def _flight_recorder(self) -> str:
        """NCCL's last collectives of this rank, in a file; see :func:`mmagent.dist.init`."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if self.world.device.type != "cuda" or dump is None:
            return ""
        path = self.folder / f"hang-nccl-rank{self.world.rank:05d}.json"
        path.write_bytes(dump(includeCollectives=True, onlyActive=False))
        return str(path)

    # ------------------------------------------------------------ the store

    def _connect(self) -> None:
        host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=max(2.0, 2 * self.beat))
        try:
            self._store = torch_dist.TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)
        except RuntimeError as error:
            self._lose(error)

    def _lose(self, error: RuntimeError) -> None:
        """A store that does not answer is asked no more."""
        logger.warning("the watchdog of rank %d sees itself alone: %s", self.world.rank, str(error).splitlines()[0])
        self._store = None

    def _put(self, key: str, value: str) -> None:
        if self._store is not None:
            try:
                self._store.set(f"{self._prefix}/{key}", value)
            except RuntimeError as error:
                self._lose(error)

    def _has(self, *keys: str) -> bool:
        if self._store is None:
            return False
        try:
            return self._store.check([f"{self._prefix}/{key}" for key in keys])
        except RuntimeError as error:
            self._lose(error)
            return False

    def _get(self, key: str) -> str:
        if self._store is None or not self._has(key):
            return ""
        try:
            return self._store.get(f"{self._prefix}/{key}").decode()
        except RuntimeError as error:
            self._lose(error)
            return ""

    def _first(self) -> bool:
        assert self._store is not None
        try:
            return self._store.add(f"{self._prefix}/writers", 1) == 1
        except RuntimeError as error:
            self._lose(error)
            return True

    def _report(self, rank: int) -> Report | None:
        text = self._get(f"report/{rank}")
        return Report(**json.loads(text)) if text else None


def _is_ours(frame: FrameType) -> bool:
    """Whether a thread in this frame works for the run: one of a library may wake up every second for its own sake."""
    return frame.f_code.co_filename.startswith(_OURS)


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _innermost(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost place outside of torch, and whether the innermost of all is in its collectives."""
    frames = _frames(frame)
    waits = bool(frames) and any("/torch/distributed/" in f.f_code.co_filename for f in frames[:3])
    own = next((f for f in frames if "/torch/" not in f.f_code.co_filename), None)
    if own is None:
        return "an unknown place", waits
    return f"{'/'.join(Path(own.f_code.co_filename).parts[-2:])}:{own.f_lineno} ({own.f_code.co_name})", waits


def _stacks(limit: int = 1 << 16) -> str:
    """Of all threads of this process but the one that asks, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    asks, main = threading.get_ident(), threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    texts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != asks
    ]
    return "\n".join(texts)[:limit]
