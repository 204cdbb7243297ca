"""Where a step's time goes: named segments on this rank's clock, and on its device's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

OWN = ("data", "prepare", "forward", "backward")
"""Segments in which a rank that computes whole packs waits for no other: what it spends there is its own doing. Where
weights, experts or packs are shared between ranks, ``forward`` and ``backward`` wait for peers as well."""

DEVICE = "device/"
"""Begins the names of seconds that the device worked, beside those that the host was in a segment."""


class Segments:
    """Seconds by name: ``with segments("forward"): ...``.

    Each moment counts to the innermost open segment alone, so all seconds add up to the time spent in segments. Marks
    cost about a microsecond. On CUDA an event is recorded at every mark, too; it is read when the device has passed it,
    a step later, so that nothing waits. Marks are set by one thread; any other may read :attr:`current`.
    """

    def __init__(self, device: torch.device | None = None):
        self.current: tuple[str, float] | None = None
        """The innermost open segment and ``time.monotonic()`` at its start; None between segments."""
        self.step = 0
        """The step at hand, set by the loop: 0 before the first, and n once step n has begun."""
        self.annotate = False
        """Whether a profiler is watching: segments are then named in its trace."""
        self._open: list[tuple[str, float]] = []
        self._since = 0.0  # the last mark
        self._seconds: dict[str, float] = {}
        self._marks: dict[str, _Mark] = {}
        self._device = _DeviceClock() if device is not None and device.type == "cuda" else None

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """A block whose time counts to ``name``."""
        if name not in self._marks:
            self._marks[name] = _Mark(self, name)
        if self.annotate:
            return _annotated(self._marks[name], name)
        return self._marks[name]

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """``backward`` until all gradients of ``loss`` are there on this rank, and then, for the rest of the block,
        ``reduce``: how long it waits for its peers'. What engines reduce while they go on counts to ``backward``."""
        with self("backward"), ExitStack() as rest:

            def done() -> None:
                rest.enter_context(self("reduce"))

            # callbacks run in order, once the graph is through: this one before those in which engines wait
            queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
            hook = loss.register_hook(lambda gradient: queue(done)) if loss.requires_grad else None
            yield
            if hook is not None:
                hook.remove()

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call, those of segments that are open now included; on CUDA also ``device/``
        and the name, of the marks that the device has passed since."""
        now = time.monotonic()
        if self._open:
            self._count(now)
            self._since = now
        taken, self._seconds = self._seconds, {}
        if self._device is not None:
            taken |= {DEVICE + name: seconds for name, seconds in self._device.take().items()}
        return taken

    def _count(self, now: float) -> None:
        name = self._open[-1][0]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since

    def _enter(self, name: str) -> None:
        now = time.monotonic()
        if self._open:
            self._count(now)
        self._since = now
        self.current = (name, now)
        self._open.append(self.current)
        if self._device is not None:
            self._device.mark(name)

    def _leave(self) -> None:
        now = time.monotonic()
        self._count(now)
        self._since = now
        self._open.pop()
        self.current = self._open[-1] if self._open else None
        if self._device is not None:
            self._device.mark(self.current[0] if self.current else None)


class _Mark:
    """Holds nothing of its own, so that one serves every block of its name, nested ones too."""

    __slots__ = ("_name", "_segments")

    def __init__(self, segments: Segments, name: str):
        self._segments, self._name = segments, name

    def __enter__(self) -> None:
        self._segments._enter(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._segments._leave()


@contextmanager
def _annotated(mark: _Mark, name: str) -> Iterator[None]:
    with mark, torch.profiler.record_function(f"segment/{name}"):
        yield


class _DeviceClock:
    """An event at every mark; the time between two counts to the name at the first, once the device has passed both."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str | None, Any]] = deque()
        self._spare: list[Any] = []

    def mark(self, name: str | None) -> None:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._waiting.append((name, event))

    def take(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        while len(self._waiting) > 1 and self._waiting[1][1].query():
            name, event = self._waiting.popleft()
            if name is not None:
                seconds[name] = seconds.get(name, 0.0) + event.elapsed_time(self._waiting[0][1]) / 1e3
            self._spare.append(event)
        return seconds
