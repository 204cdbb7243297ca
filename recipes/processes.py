"""The processes of a lineage: one lineage a folder, and none of a killed one left at work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
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
