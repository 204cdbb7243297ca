"""Browser work from code that has no event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
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
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _background_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    global _running
    with _lock:
        if _running is None or _running[0] != os.getpid():  # after a fork the parent's thread does not exist
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="mmagent-browser", daemon=True)
            thread.start()
            _running = (os.getpid(), loop, thread)
        return _running[1], _running[2]
