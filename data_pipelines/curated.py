"""The folder that a curation writes to: whether it is free, or was begun with the same sets and settings; clearing it.

``TO/.curation`` notes what a curation was begun with, and is written first: a folder that holds anything else and not
that is somebody's, and left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.balancing import REPEATS
from data_pipelines.cards import PAGE
from data_pipelines.making import PLAN, BuildError, write_whole
from mmagent.files import content_told

LOG, REPORT, WORK = "left_out.jsonl", "curation.json", ".curation"
JUDGED = ("judged.npz", "judged.json")
"""What ``recipes.curate`` signs before a curation begins."""
_SOURCES = "sources.yaml"
_SHOWN = 4  # differences
_LONGEST = 40  # characters of a value


def check_free(to: Path) -> None:
    """Raises :class:`BuildError` where ``to`` holds what no curation wrote."""
    if (to / WORK / PLAN).is_file() or not to.exists():
        return
    if there := content_told(to, JUDGED):
        raise BuildError(f"{to} holds what was not written by this command ({there}); choose an empty folder")


def claim_target(to: Path, plan: Mapping[str, Any], anew: bool) -> None:
    """Note what the folder is for, or see that it is for the same; ``anew`` clears it first. Raises
    :class:`BuildError` naming what differs, or where it holds what no curation wrote."""
    check_free(to)
    if anew:
        _clear(to)
    path, wanted = to / WORK / PLAN, json.loads(json.dumps(plan))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, wanted)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if told := [*_sets(found.pop("sets"), wanted.pop("sets")), *_settings(found, wanted)]:
        more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise BuildError(
            f"{to} was begun with other sets or settings: {', '.join(told[:_SHOWN])}{more}; anew=true deletes what a "
            "curation left there and begins anew, or choose another folder"
        )


def _sets(found: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            yield f"set {name} is {'new' if name not in found else 'gone' if name not in wanted else 'changed'}"


def _settings(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Every value that differs, by its dotted name."""
    if isinstance(found, dict | None) and isinstance(wanted, dict | None):
        found, wanted = found or {}, wanted or {}
        for key in sorted({*found, *wanted}):
            yield from _settings(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name} was {_short(found)}, now it is {_short(wanted)}"


def _short(value: Any) -> str:
    told = json.dumps(value, ensure_ascii=False)
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 3]}..."


def _clear(to: Path) -> None:
    """Delete what a curation wrote, the note that it did last: a kill in between leaves what can be cleared again, or
    gone on with."""
    for plan in sorted(to.glob(f"*/{PLAN}")):
        if "curated" in json.loads(plan.read_text(encoding="utf-8")):
            folder = plan.parent
            for pattern in ("shard-*.tar", "shard-*.idx"):
                for path in sorted(folder.glob(pattern), reverse=True):  # what is left is what was written first
                    path.unlink()
            for name in (REPEATS, PAGE, ".shard.lock", PLAN):
                (folder / name).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
    for name in (LOG, REPORT, _SOURCES):
        (to / name).unlink(missing_ok=True)
    work = to / WORK
    for path in sorted(work.glob("*"), key=lambda path: path.name == PLAN):
        path.unlink()
