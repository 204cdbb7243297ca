"""Reads from storage that fail for a moment are tried again, a bounded number of times.

A network's file system loses its server, a cable, a handle, and has it again seconds later: a run of weeks on
thousands of machines must not end there. What will not mend itself (a missing file, a forbidden one, a full disk) is
an error at once.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

TRANSIENT = frozenset(
    (
        *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EPIPE, errno.ETIMEDOUT),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    )
)
"""Error numbers of reads that may succeed a moment later."""
WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try: with as many failures in a row the error is raised, a quarter of a minute after the
first. Every process waits alike: what would gain by spreading them, a server that comes back, has seconds to."""

_lock = threading.Lock()
_total = 0


def total() -> int:
    """Tries that failed so far, of this process: for a metric."""
    return _total


def retried(
    read: Callable[[], T],
    path: Path | str,
    waits: Sequence[float] = WAITS,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What ``read()`` returns, called again after errors in :data:`TRANSIENT`; it must open anew whatever it reads
    from, for a stale handle stays stale. Other errors, and the last of too many, are raised; the latter names ``path``
    and says how often it was tried."""
    for number, wait in enumerate((*waits, None), 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            _count()
            reason = os.strerror(error.errno or 0)
            if wait is None:
                told = f"{reason}, {number} times in {sum(waits):.0f} s; is the storage there?"
                raise OSError(error.errno, told, str(path)) from error
            logger.warning("%s: %s; try %d of %d in %g s", path, reason, number + 1, len(waits) + 1, wait)
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def _count() -> None:
    global _total
    with _lock:
        _total += 1
