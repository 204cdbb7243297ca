"""Whether a folder holds the ingestion that is asked for, of input that is still what it was.

``ingest.json`` has the settings and the inputs with a stamp of each, of sizes and times of change; ``.named.jsonl`` has
the files that rows name, as they were when a row was read, or that they were missing. What only was missing and has
come is a reason to begin anew; what has changed is told, for beginning anew would lose what it had been.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.cards import PAGE as CARD
from data_pipelines.ingest.files import stamp_of
from data_pipelines.ingest.report import NAMED, PAGE, REFUSED, REPORT
from data_pipelines.ingest.sources import SourceError
from mmagent.files import content_told, write_text

PLAN = "ingest.json"
_ANEW = "; --anew deletes what {} holds and begins anew, or choose another folder"
_CLEARING = "clearing"  # stands in the plan while shards are deleted: a kill there must not leave half of them
_SHOWN = 3


def claim(folder: Path, plan: dict[str, Any], anew: bool, say: Callable[[str], None]) -> None:
    """Note what the folder is for, or see that it is for the same, of the same input; ``anew`` clears it first.

    Raises :class:`SourceError` where it is not, or holds what this command did not write.
    """
    path = folder / PLAN
    wanted = json.loads(json.dumps(plan))
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if there := content_told(folder):
            raise SourceError(f"{folder} holds what was not written by this command ({there}); choose an empty folder")
        write_text(path, json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    anew |= found.pop(_CLEARING, False)
    if not anew:
        _same_settings(folder, found, wanted)
        _same_inputs(folder, found["inputs"], wanted["inputs"])
        come, changed = _named(folder)
        if changed:
            raise SourceError(f"{folder} was made of other files: {_some(changed, 'changed')}{_ANEW.format(folder)}")
        if come:
            say(f"{folder}: made anew, for {_some(come, 'missing before and there now')}")
        anew = bool(come)
    if anew:
        _begin_anew(folder, wanted)


def _same_settings(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted({*found, *wanted} - {"inputs"}):
        if found.get(name) != wanted.get(name):
            was, now = (json.dumps(one.get(name))[:200] for one in (found, wanted))
            raise SourceError(f"{folder} was begun with {name} {was}, now it is {now}{_ANEW.format(folder)}")


def _same_inputs(folder: Path, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    before, now = ({(one["kind"], one["name"]): one for one in inputs} for inputs in (found, wanted))
    told = [
        *(_some([name for kind, name in now if (kind, name) not in before], "new"),),
        *(_some([name for kind, name in before if (kind, name) not in now], "gone"),),
        *(_some([key[1] for key in now if key in before and now[key] != before[key]], "changed"),),
    ]
    if any(told) or found != wanted:
        problem = ", ".join(filter(None, told)) or "another order"
        raise SourceError(f"{folder} was begun with other inputs: {problem}{_ANEW.format(folder)}")


def _some(names: list[str], what: str) -> str:
    """ "a, b, c and 4 more changed"; nothing for none."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(ascii(name)[1:-1] for name in names[:_SHOWN])}{more} {what}" if names else ""


def _named(folder: Path) -> tuple[list[str], list[str]]:
    """Files that rows name and that have come, or changed, since. One that is gone takes nothing away."""
    come: dict[str, None] = {}
    changed: dict[str, None] = {}
    for path, size, time in _lines(folder / NAMED):
        now = stamp_of(path)
        if now != (size, time) and now[0] >= 0:
            (come if size < 0 else changed)[path] = None
    return list(come), list(changed)


def _lines(path: Path) -> Iterator[tuple[str, int, int]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # a kill may have torn the last
                name, size, time = json.loads(line)
                yield name, size, time


def _begin_anew(folder: Path, wanted: dict[str, Any]) -> None:
    """Delete what an ingestion wrote, unless another one is at it."""
    with (folder / ".shard.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(f"{folder}: another process is writing there") from error
        write_text(folder / PLAN, json.dumps({**wanted, _CLEARING: True}, indent=1) + "\n")
        for name in (REPORT, PAGE, CARD, REFUSED, NAMED):
            (folder / name).unlink(missing_ok=True)
        for pattern in ("shard-*.tar", "shard-*.idx", ".progress-*.json"):
            for path in folder.glob(pattern):
                path.unlink()
        write_text(folder / PLAN, json.dumps(wanted, indent=1) + "\n")
