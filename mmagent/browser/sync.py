"""Browser work from code that has no event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_running: tuple[int, asyncio.AbstractEventLoop, threading.Thread] | None = None


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end on one event loop in a background thread of this process, and return its result.

    All calls share that loop, so a pool started by one call can be used by the next. May be called from
    any thread, and from inside another running loop (which it blocks), but not from the background loop itself.
    """
    loop, thread = _background_loop()
    if threading.current_thread() is thread:
        work.close()
        raise RuntimeError("run_sync: called from the background loop itself, which would wait for ever")
    works = _of_thread.get() or _Works()
    future = works.begin(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def in_thread(call: Callable[[], T]) -> T:
    """What ``call`` returns, made on another thread, so that it may block and use :func:`run_sync`.

    Where the caller is cancelled, the work that it waits for there is cancelled too and no more of it is begun: else a
    stopped program would wait until that thread has done it all.
    """
    works = _Works()
    token = _of_thread.set(works)  # the thread runs in a copy of this context
    try:
        return await asyncio.to_thread(call)
    except asyncio.CancelledError:
        works.stop()
        raise
    finally:
        _of_thread.reset(token)


class _Works:
    """What one thread waits for."""

    def __init__(self) -> None:
        self._lock, self._stopped = threading.Lock(), False
        self._running: set[Future[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> Future[T]:
        """Raises ``CancelledError`` of `concurrent.futures` where it was stopped."""
        with self._lock:
            if self._stopped:
                work.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(work, loop)
            self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        for future in list(self._running):
            future.cancel()


_of_thread: ContextVar[_Works | None] = ContextVar("_of_thread", default=None)


def _background_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    global _running
    with _lock:
        if _running is None or _running[0] != os.getpid():  # after a fork the parent's thread does not exist
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="mmagent-browser", daemon=True)
            thread.start()
            _running = (os.getpid(), loop, thread)
        return _running[1], _running[2]
