"""Files and folders that are whole or not there: written beside their place, synced to disk, then renamed.

Who is killed half-way leaves ``.writing-NAME``, which the next writer replaces, or ``.removing-NAME``. One writer at a
time: two would share the name beside.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of ``path`` at the end of the block, and of nothing after an error."""
    beside = path.with_name(f".writing-{path.name}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def content_told(folder: Path, ours: Container[str] = ()) -> str:
    """What lies in a folder for a message, as in "a.txt and 3 more"; "" for nothing but hidden files and ``ours``."""
    names = sorted(name for path in folder.iterdir() if not (name := path.name).startswith(".") and name not in ours)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else ""


def require_own(folder: Path, what: str, needed: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raises ``ValueError`` where ``folder`` is there and no ``what``, which is all that its writer replaces: of the
    names ``needed`` one is missing, or something, hidden or not, is none of these and of ``others`` (patterns, all of
    them). An empty folder may be taken."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, own) for own in (*needed, *others))]
    missing = [own for own in needed if not any(fnmatch(name, own) for name in names)]
    if names and (foreign or missing):
        why = f"it holds {foreign[0]}" if foreign else f"{', '.join(missing)} missing"
        raise ValueError(f"{folder} is no {what}: it is not replaced ({why})")


def write_text(path: Path, text: str) -> None:
    """``text`` as UTF-8 in ``path``, or what stood there before."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of ``folder`` at the end of the block, and of nothing after an
    error. Missing parents are made."""
    beside = folder.with_name(f".writing-{folder.name}")
    _remove(beside)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.rglob("*"):
            sync(path)
        put_folder(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def put_folder(written: Path, folder: Path) -> None:
    """Rename ``written``, whose files are synced, to ``folder`` in the same parent, replacing an older one.

    There is an instant between two renames in which neither stands under its name, never one with half a folder.
    """
    sync(written)
    aside = _aside(folder)
    try:
        _set_aside(folder)
        os.replace(written, folder)
    except BaseException:  # an interrupt as well: whoever wrote the new folder removes that after an error
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        raise
    sync(folder.parent)
    _remove(aside)


def discard_folder(folder: Path) -> None:
    """Remove ``folder``, if it is there; renamed first, so that half of it is never seen under its name."""
    _remove(_set_aside(folder))


def _aside(folder: Path) -> Path:
    return folder.with_name(f".removing-{folder.name}")


def _set_aside(folder: Path) -> Path:
    """Where ``folder`` is now. Without one, what was set aside before is left: it may be the only one there is."""
    aside = _aside(folder)
    if folder.exists():
        _remove(aside)
        os.replace(folder, aside)
    return aside


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
