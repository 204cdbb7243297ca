"""The processes of a lineage: one lineage a folder, and none of a killed one left at work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

MARK = "MMAGENT_LINEAGE"
"""Environment variable that every process of a lineage carries, so that orphans of a killed run are found."""


class Busy(RuntimeError):
    """Another process is at work in the folder."""


def orphans(root: Path) -> list[int]:
    """Processes that a killed lineage on this root left behind (Linux; elsewhere there is no /proc to read)."""
    mark = f"{MARK}={root.resolve()}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_orphans(root: Path) -> None:
    """End them, so that two do not write to one folder."""
    for process in orphans(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold ``root`` for this process alone. Raises :class:`Busy` where another has it."""
    with (root / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another run is at work in {root}; wait for it, or end it") from error
        yield


@contextlib.contextmanager
def no_orphans(root: Path) -> Iterator[None]:
    """End those of an earlier run, and on the way out, however it is taken, those of this one. SIGTERM and SIGHUP are
    a ``KeyboardInterrupt`` meanwhile, unless they are ignored (``nohup``) or another thread than the main one asks."""
    end_orphans(root)
    taken = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in taken}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second one must not stop the sweep
        end_orphans(root)
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(f"signal {signal.Signals(number).name}")
