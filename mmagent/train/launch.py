"""The way into a recipe: what its user can mend is told in one line, everything else with its traceback."""

from __future__ import annotations

import linecache
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from mmagent import dist
from mmagent.browser import BrowserMissing
from mmagent.train.step import begun

T = TypeVar("T")
launched: float | None = None
"""``time.time()`` when :func:`launch` was called in this process: imports were done."""
TRACEBACK = "MMAGENT_TRACEBACK"
"""Environment variable that asks for the traceback of every error."""
ASKED_FOR: dict[type[OSError], str] = {
    FileNotFoundError: "no such file or folder",
    NotADirectoryError: "a file stands where a folder is needed",
    IsADirectoryError: "a folder stands where a file is needed",
    PermissionError: "not allowed",
}
"""What a user may have asked for that the system cannot do, in words."""
OURS = ("__main__", "mmagent", "data_pipelines", "evals", "recipes")


def launch(main: Callable[[], T]) -> T:
    """Run ``main`` and return what it returns.

    An error of setting up that is meant for the user (a missing file, a ``raise ValueError`` of ours, or of a
    ``ConnectionError``, as for a server that is not there) ends the process with status 1 and ``error: ...`` on stderr.
    Where all ranks ran into it rank 0 alone says it, unless it comes to it later than the others wait
    (:func:`mmagent.dist.said_by_main`). Once its work has begun (:data:`mmagent.train.step.begun`), and for errors of
    libraries and of other kinds, the traceback is shown.
    """
    global launched
    launched = time.time()
    try:
        return main()
    except (ValueError, ConnectionError, *ASKED_FOR, BrowserMissing) as error:
        if begun.is_set() or os.environ.get(TRACEBACK) or not _is_for_users(error):
            raise
        named = isinstance(error, tuple(ASKED_FOR))
        text = f"{error.filename}: {ASKED_FOR[type(error)]}" if named else str(error)
        if not dist.said_by_main(text):
            rank = os.environ.get("RANK", "0")
            where = "error" if rank == "0" else f"error on rank {rank}"
            print(f"{where}: {text} ({TRACEBACK}=1 shows the traceback)", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            time.sleep(1.0)  # a launcher ends all ranks when the first has ended: let those with another error say it
        raise SystemExit(1) from error


def _is_for_users(error: Exception) -> bool:
    """A file or folder that has a name and cannot be had, or something that our code raised on purpose, no accident in
    it or a library."""
    if isinstance(error, tuple(ASKED_FOR)) and error.filename is not None:
        return error.filename2 is None  # of two, as a rename has, it does not say which is missing
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__"))
    statement = linecache.getline(frame.f_code.co_filename, line).lstrip()
    return module.split(".")[0] in OURS and statement.startswith("raise ")
