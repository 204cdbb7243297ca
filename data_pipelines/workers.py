"""Processes that read what strangers wrote: each may hang, run out of memory or die, and takes one row with it.

Decoders are programs in C that meet files made to break them. They run here in processes of their own, limited in
processor time and memory by the kernel, and their answers come back in the order of the tasks. Whoever waits pays for
no more memory than a few answers of every process: one that is ahead of the others waits, too.

An answer is written as soon as it is there, into a pipe wide enough for many small ones, and whoever asks takes all
that have gathered at once: a batch costs one waking, and what a process had answered before it died is not lost.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import signal
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

_AHEAD = 1 << 26  # bytes of answers that are kept of a process while another one's are waited for
_PATIENCE = 10  # seconds of waiting for each second of processor time
_PIPE = 1 << 20  # bytes of answers that a process may write while nobody reads: the most that Linux grants everyone
_SIZE = struct.Struct("<Q")


@dataclass
class LimitsConfig:
    """What reading one row may take: ``seconds`` of processor time (and ten times as many of waiting) and ``megabytes``
    of memory on top of what the process needs itself. ``processes`` 0 reads in the process that asks, unlimited."""

    processes: int = 2
    seconds: float = 120.0
    megabytes: int = 4096

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise ValueError(f"processes {self.processes} must be 0 (none beside this one) or more")
        if not self.seconds > 0:
            raise ValueError(f"seconds {self.seconds:g} must be positive")
        if self.megabytes < 1:
            raise ValueError(f"megabytes {self.megabytes} must be positive")


class Task(Protocol):
    """Some rows of an input. ``rows``: how many, where that is known without reading them."""

    @property
    def rows(self) -> int | None: ...


T = TypeVar("T", bound=Task)
R = TypeVar("R")
Work = Callable[[T, int], Iterator[R]]
"""``work(task, start)`` gives one answer a row, beginning with row ``start``: what is lost with a process is read on
from the row after. It has to be a function of a module, or a ``partial`` of one."""
Lost = Callable[[T, int, str, bool], R]
"""``lost(task, row, problem, rest)``: the answer for a row whose process died, and for those after it if ``rest``."""


def in_order(
    work: Work[T, R], lost: Lost[T, R], tasks: Iterable[tuple[T, int]], limits: LimitsConfig
) -> Iterator[tuple[T, int, R]]:
    """``(task, row, answer)`` of all rows of all tasks, in order. ``tasks`` come with the row to begin with.

    What ``work`` raises is an error of the program and is raised here.
    """
    if limits.processes == 0:
        for task, start in tasks:
            for row, answer in enumerate(work(task, start), start):
                yield task, row, answer
        return
    crew = _Crew(work, lost, limits)
    try:
        yield from crew.run(iter(tasks))
    finally:
        crew.close()


@dataclass
class _Job(Generic[T, R]):
    """A task under way: answers that nobody has asked for yet, the next row, and the processes it has cost in a row."""

    task: T
    row: int
    answers: deque[tuple[int, R, int]] = field(default_factory=deque)  # row, answer, bytes
    waiting: int = 0
    deaths: int = 0
    ended: bool = False


@dataclass
class _Worker(Generic[T, R]):
    """A process, the pipe that it is asked by, the one that it answers by, and what of that is read but not whole."""

    process: BaseProcess
    asked: Connection
    answers: Connection
    job: _Job[T, R] | None = None
    unread: bytearray = field(default_factory=bytearray)

    def gathered(self) -> list[bytes]:
        """All whole messages that have come by now, after waiting for some bytes. Raises ``EOFError``."""
        data = os.read(self.answers.fileno(), _PIPE)
        if not data:
            raise EOFError
        self.unread += data
        found, at = [], 0
        while len(self.unread) >= at + _SIZE.size:
            end = at + _SIZE.size + _SIZE.unpack_from(self.unread, at)[0]
            if end > len(self.unread):
                break
            found.append(bytes(memoryview(self.unread)[at + _SIZE.size : end]))
            at = end
        del self.unread[:at]
        return found

    def close(self) -> None:
        self.asked.close()
        self.answers.close()


class _Crew(Generic[T, R]):
    def __init__(self, work: Work[T, R], lost: Lost[T, R], limits: LimitsConfig):
        self._work, self._lost, self._limits = work, lost, limits
        # A fork of a process with threads may hang, and a program has one fork server: that of ranks, with torch.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker[T, R]] = []

    def run(self, tasks: Iterator[tuple[T, int]]) -> Iterator[tuple[T, int, R]]:
        order: deque[_Job[T, R]] = deque()
        more = True
        while True:
            idle = [w for w in self._workers if w.job is None]
            while more and len(order) < 2 * self._limits.processes:
                if not idle and len(self._workers) < self._limits.processes:
                    idle.append(self._start())
                if not idle:
                    break
                started = list(islice(tasks, 1))
                more = bool(started)
                for task, row in started:
                    worker = idle.pop()
                    worker.job = _Job(task, row)
                    order.append(worker.job)
                    self._ask(worker)
            if not order:
                return
            head = order[0]
            while head.answers:
                row, answer, size = head.answers.popleft()
                head.waiting -= size
                yield head.task, row, answer
            if head.ended:
                order.popleft()
            else:
                self._listen(head)

    def _listen(self, head: _Job[T, R]) -> None:
        """Take answers of the one that is waited for, and of others that are not too far ahead."""
        open_ = {w.answers: w for w in self._workers if w.job and (w.job is head or w.job.waiting < _AHEAD)}
        for pipe in wait(list(open_)):
            worker = open_[pipe]  # type: ignore[index]
            try:
                messages = worker.gathered()
            except EOFError:
                self._bury(worker)
                continue
            for data in messages:
                self._take(worker, ForkingPickler.loads(data), len(data))

    def _take(self, worker: _Worker[T, R], message: tuple[R] | BaseException | None, size: int) -> None:
        job = worker.job
        assert job is not None
        if isinstance(message, BaseException):
            raise message
        if message is None:
            job.ended, worker.job = True, None
            return
        job.answers.append((job.row, message[0], size))
        job.waiting += size
        job.row += 1
        job.deaths = 0

    def _bury(self, worker: _Worker[T, R]) -> None:
        """Answer for the row that a process died of, and go on behind it with a new one."""
        worker.process.join()
        worker.close()
        self._workers.remove(worker)
        job = worker.job
        if job is None:
            return
        job.deaths += 1
        rest = job.deaths > 1 and job.task.rows is None  # whoever dies at once twice may not come to an end at all
        job.answers.append((job.row, self._lost(job.task, job.row, self._cause(worker.process), rest), 0))
        job.row += 1
        if rest or (job.task.rows is not None and job.row >= job.task.rows):
            job.ended = True
            return
        heir = self._start()
        heir.job = job
        self._ask(heir)

    def _ask(self, worker: _Worker[T, R]) -> None:
        assert worker.job is not None
        try:
            worker.asked.send((worker.job.task, worker.job.row))
        except (BrokenPipeError, ConnectionResetError):  # killed by somebody else while it had nothing to do
            worker.process.join()
            worker.close()
            self._workers.remove(worker)
            heir = self._start()
            heir.job = worker.job
            heir.asked.send((worker.job.task, worker.job.row))

    def _cause(self, process: BaseProcess) -> str:
        code = process.exitcode or 0
        if -code in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU):
            return f"takes more than {self._limits.seconds:g} s to read"
        if -code == signal.SIGKILL:
            return "the process that reads it was killed, for want of memory it seems"
        return f"the process that reads it dies ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"

    def _start(self) -> _Worker[T, R]:
        questions, asked = self._context.Pipe(duplex=False)
        answers, told = self._context.Pipe(duplex=False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # on Linux
            with suppress(PermissionError):  # this user has many wide pipes already: a narrow one will do
                fcntl.fcntl(told.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)
        process = self._context.Process(target=_serve, args=(questions, told, self._work, self._limits), daemon=True)
        with _no_script():
            process.start()
        questions.close()
        told.close()
        self._workers.append(_Worker(process, asked, answers))
        return self._workers[-1]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()


@contextmanager
def _no_script() -> Iterator[None]:
    """For the moment in which a process is started: it would run the script that asks once more, imports and all, to
    find there what is pickled, and all of that is in modules."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _serve(questions: Connection, told: Connection, work: Work[T, R], limits: LimitsConfig) -> None:
    """A process: answers row by row until nobody asks any more. The kernel ends it when a row takes too long, whatever
    it is doing, and whether or not anybody is there to notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks ends it
    guard = _Guard(limits)
    while True:
        try:
            task, start = questions.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answers = work(task, start)
            while True:
                with guard:
                    answer = next(answers, _END)
                _tell(told, None if answer is _END else (answer,))
                if answer is _END:
                    break
        except BrokenPipeError:
            return
        except Exception as error:
            _tell(told, error)


def _tell(pipe: Connection, message: Any) -> None:
    data = ForkingPickler.dumps(message)
    rest = memoryview(b"".join((_SIZE.pack(len(data)), data)))
    while rest:
        rest = rest[os.write(pipe.fileno(), rest) :]


_END = object()
_MEMORY = "/proc/self/statm"


class _Guard:
    """The limits of one row, set while it is read."""

    def __init__(self, limits: LimitsConfig):
        self._limits = limits
        self._memory = os.open(_MEMORY, os.O_RDONLY | os.O_CLOEXEC) if os.path.exists(_MEMORY) else None  # on Linux

    def __enter__(self) -> None:
        for timer, seconds in ((signal.ITIMER_PROF, 1), (signal.ITIMER_REAL, _PATIENCE)):
            signal.setitimer(timer, seconds * self._limits.seconds)
        if self._memory is not None:
            used = int(os.pread(self._memory, 200, 0).split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (used + (self._limits.megabytes << 20), resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
