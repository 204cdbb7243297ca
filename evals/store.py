"""A run on disk: what was pinned, and one JSON line an item.

``FOLDER/run.json`` holds the pins, written before the first item, and which items were asked for last where that is
fewer than lie there; ``FOLDER/items.jsonl`` grows by one flushed line an
item; ``FOLDER/items/KEY/`` holds the item's pictures, complete before its line is written. A process may be killed
at any moment: a torn last line is cut off on opening, and the item it stood for is run again.
"""

from __future__ import annotations

import copyreg
import dataclasses
import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmagent.files import write_text

POLICY = "policy."
"""Pins with this prefix say who is judged: they may differ between two runs that are compared, no others may."""


class PinsDiffer(ValueError):
    """Two runs were not made alike. ``names`` are the pins that differ."""

    def __init__(self, what: str, there: Mapping[str, str], here: Mapping[str, str], names: Iterable[str]):
        self.names = tuple(names)
        lines = [f"  {n}: {_shown(there, n)} against {_shown(here, n)}" for n in self.names]
        super().__init__("\n".join([f"{what}: not made alike", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


def _shown(pins: Mapping[str, str], name: str) -> str:
    return repr(pins[name]) if name in pins else "nothing"


class RunError(ValueError):
    """A run folder that cannot be used; the message names the file."""


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def check_comparable(a: Mapping[str, str], b: Mapping[str, str], allow: Iterable[str] = ()) -> None:
    """Raises :class:`PinsDiffer` unless everything but the policy (and what ``allow`` names) is pinned alike."""
    names = [n for n in differing(a, b) if not n.startswith(POLICY) and n not in set(allow)]
    if names:
        raise PinsDiffer("these runs cannot be compared (--allow PIN does, for each PIN that may differ)", a, b, names)


def check_allowed(allow: Iterable[str], runs: Iterable[tuple[Mapping[str, str], Mapping[str, str]]]) -> None:
    """Raises ``ValueError`` where ``allow`` names what is no pin of any of the pairs of runs: a misspelt name would
    allow nothing, or seem to."""
    runs = list(runs)
    known = {name for pair in runs for pins in pair for name in pins}
    differs = dict.fromkeys(name for a, b in runs for name in differing(a, b) if not name.startswith(POLICY))
    for name in allow:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]}?" if near else "."
            raise ValueError(
                f"--allow {name}: these runs have no such pin{hint} Those that differ: {', '.join(differs) or 'none'}. "
                f"All: {', '.join(sorted(known))}"
            )


@dataclass(frozen=True)
class StepRecord:
    """One turn: ``picture`` (relative path or None) and ``text`` shown, the model's ``action``, the ``note`` after it.

    ``points`` are the action's coordinates in thousandths of the picture; ``said`` is all that the model wrote,
    where that is more than the action.
    """

    picture: str | None
    text: str
    action: str
    note: str = ""
    points: tuple[tuple[float, float], ...] = ()
    said: str = ""


@dataclass(frozen=True)
class Row:
    """One judged item. ``value`` is None exactly when ``error`` says why nothing could be judged.

    ``key`` is ``TASK/ITEM`` or ``TASK/ITEM#SAMPLE``; ``pictures`` are further artefacts by name, relative paths;
    ``slices`` are groups that it belongs to, by what they are groups of.
    """

    key: str
    task: str
    item: str
    sample: int
    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    status: str = ""
    steps: tuple[StepRecord, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    boxes: tuple[tuple[float, ...], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    attempts: int = 1
    slices: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.value is None) != (self.error is not None):
            raise ValueError(f"{self.key}: value {self.value} with error {self.error!r}; exactly one is needed")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Row:
        body = json.loads(text)
        steps = tuple(
            StepRecord(**{**step, "points": tuple((x, y) for x, y in step["points"])}) for step in body["steps"]
        )
        return Row(**{**body, "steps": steps, "boxes": tuple(tuple(box) for box in body["boxes"])})


@dataclass(frozen=True)
class Run:
    """A run read back: its ``pins``, loose ``facts`` (when, where) and its rows in the order they finished.

    Rows are of the items that were asked for last; ``beside`` says how many more lie in the folder, from an earlier
    command with another limit.
    """

    folder: Path
    pins: Mapping[str, str]
    facts: Mapping[str, Any]
    rows: tuple[Row, ...]
    beside: int = 0

    @property
    def suite(self) -> str:
        return self.pins["suite.name"]

    @property
    def judged(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.error is None)

    @property
    def errors(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.error is not None)


def read_run(folder: Path) -> Run:
    """Read a run, finished or not. Raises :class:`RunError` naming the file that is missing or damaged."""
    folder = Path(folder)
    head = _read_head(folder)
    rows, _ = _read_rows(folder / "items.jsonl")
    asked = head.get("asked")
    keys = set(asked or ())
    wanted = rows if asked is None else [row for row in rows if row.key in keys]
    return Run(folder, head["pins"], head["facts"], tuple(wanted), len(rows) - len(wanted))


def find_runs(folder: Path) -> list[Path]:
    """``folder`` itself when it is a run, else the runs directly inside it, by name, or those of the one folder below
    it that holds some. Raises :class:`RunError` where there are none, or several such folders: it names these."""
    folder = Path(folder)
    if (folder / "run.json").is_file():
        return [folder]
    if found := sorted(path.parent for path in folder.glob("*/run.json")):
        return found
    below = sorted(path.parent for path in folder.rglob("run.json"))
    holding = sorted({run.parent for run in below})
    if not below:
        raise RunError(f"{folder}: neither a run (no run.json) nor a folder of runs")
    if len(holding) > 1:
        shown = ", ".join(map(str, holding[:5])) + (", ..." if len(holding) > 5 else "")
        raise RunError(f"{folder}: {len(holding)} folders below it hold runs; name one of them: {shown}")
    return below


class Store:
    """The one writer of a run folder; a second process that opens it is refused."""

    def __init__(self, folder: Path, pins: Mapping[str, str], facts: Mapping[str, Any]):
        """Start a run in ``folder`` or go on with it.

        Raises :class:`PinsDiffer` when the folder holds a run made otherwise, :class:`RunError` when it is damaged.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._syncing = threading.Lock()
        path = self.folder / "items.jsonl"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._claim()
            if (self.folder / "run.json").exists():
                head = _read_head(self.folder)
                if names := differing(head["pins"], pins):
                    advice = "give another folder with --out, or delete this one"
                    raise PinsDiffer(f"{self.folder}: cannot go on ({advice})", head["pins"], pins, names)
            elif path.stat().st_size:
                raise RunError(f"{path} holds results, but run.json is missing: what they were made with is unknown")
            else:
                head = {"pins": dict(pins), "facts": dict(facts)}
                self._write_head(head)
            rows, whole = _read_rows(path)
            os.ftruncate(self._fd, whole)
        except BaseException:
            os.close(self._fd)
            raise
        self.rows = {row.key: row for row in rows}
        self._head = head
        self._synced = len(self.rows)

    def ask(self, keys: Collection[str]) -> list[Row]:
        """The run is now that of the items ``keys``, and no other row that lies here is one of it; returns the rows of
        those that are judged already."""
        wanted = set(keys)
        asked = None if self.rows.keys() <= wanted else list(keys)
        if self._head.get("asked") != asked:
            self._head = {name: value for name, value in self._head.items() if name != "asked"}
            if asked is not None:
                self._head["asked"] = asked
            self._write_head(self._head)
        return [row for key, row in self.rows.items() if key in wanted]

    def _write_head(self, head: Mapping[str, Any]) -> None:
        write_text(self.folder / "run.json", json.dumps(head, indent=1))

    def _claim(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{self.folder}: another process is writing this run") from error

    def append(self, row: Row) -> None:
        """Write one line; from then on a killed process loses nothing. The row's pictures must lie there already."""
        if row.key in self.rows:
            raise RunError(f"{self.folder}: {row.key} is judged already")
        data = (row.to_json() + "\n").encode(errors="backslashreplace")  # a lone surrogate is a JSON escape then
        written = 0
        while written < len(data):
            written += os.write(self._fd, data[written:])
        self.rows[row.key] = row

    def sync(self) -> None:
        """Wait until all that was appended is on disk; from then on a machine that stops loses nothing either. Takes
        as long as the disk does and is called on another thread than the one that appends."""
        wanted = len(self.rows)
        with self._syncing:
            if self._fd < 0 or self._synced >= wanted:  # another call, or the end of the run, has waited for these
                return
            written = len(self.rows)
            os.fsync(self._fd)
            self._synced = written

    def forget_errors(self, keys: Container[str]) -> int:
        """Drop the rows of ``keys`` that could not be judged, so that they run again; returns how many."""
        kept = [row for row in self.rows.values() if row.error is None or row.key not in keys]
        dropped = len(self.rows) - len(kept)
        if dropped:
            path = self.folder / "items.jsonl"
            write_text(path, "".join(row.to_json() + "\n" for row in kept))
            fresh = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            fcntl.flock(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(self._fd)
            self._fd = fresh
            self.rows = {row.key: row for row in kept}
            self._synced = len(self.rows)
        return dropped

    def item_folder(self, key: str) -> Path:
        """A fresh, empty folder for the pictures of item ``key``; what a killed attempt left there is removed."""
        folder = self.folder / "items" / file_name(key)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def close(self) -> None:
        with self._syncing:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_name(key: str) -> str:
    """A safe folder name for any key: readable, short, and different for different keys."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", key).strip("-")[:60]
    return f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except ValueError as error:
        raise RunError(f"{path} does not parse: {error}") from error
    if not isinstance(head, dict) or not isinstance(head.get("pins"), dict) or "suite.name" not in head["pins"]:
        raise RunError(f"{path} names no suite in its pins")
    asked = head.get("asked")
    if asked is not None and not (isinstance(asked, list) and all(isinstance(key, str) for key in asked)):
        raise RunError(f"{path}: `asked` is no list of keys")
    return {"facts": {}, **head}


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """Rows of every whole line, and how many bytes those take: only the last line can be torn."""
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    rows: dict[str, Row] = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            row = Row.from_json(line.decode())
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
        if row.key in rows:
            raise RunError(f"{path}, line {number}: {row.key} stands there twice")
        rows[row.key] = row
    return list(rows.values()), whole
