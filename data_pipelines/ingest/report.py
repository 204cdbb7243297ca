"""What an ingestion counted: the table for people, ``report.json``, a page, and every refusal in ``refused.jsonl``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_pipelines.costs import Costs, cost_lines, costs_of, text_tokens
from data_pipelines.ingest.work import Answer, Made, Refused
from mmagent.files import write_text
from mmagent.html import pieces

REPORT, PAGE, REFUSED = "report.json", "report.html", "refused.jsonl"
NAMED = ".named.jsonl"
"""``[path, bytes, time of change in ns]`` of every file that a row named, -1 bytes where there was none."""
_EXAMPLES = 3
_KINDS = 100  # of refusals that are told apart
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|(?<![\w.-])\d(?:[\d.,x@]*[\dx@])?|(?<= )/\S+|\*")
_LONGEST = 400  # characters of a kind: whole paths, as a rule


@dataclass
class Kind:
    """Refusals that differ in names and numbers only."""

    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Tally:
    """Counts so far, and what the records would cost. ``log_bytes`` and ``named_bytes``: how long ``refused.jsonl``
    and :data:`NAMED` are with them, to which a resumed run cuts them."""

    rows: int = 0
    records: int = 0
    conversations: int = 0
    images: int = 0
    bytes: int = 0
    refused: int = 0
    log_bytes: int = 0
    named_bytes: int = 0
    kinds: dict[str, Kind] = field(default_factory=dict)
    aside: dict[str, int] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)

    @property
    def share(self) -> float:
        """Refused, of all that was read."""
        return self.refused / max(self.records + self.refused, 1)

    def made(self, made: Made) -> None:
        self.records += 1
        self.conversations += made.talk
        self.images += len(made.sizes)
        self.bytes += len(made.sample.data)
        self.costs.add(made.sample.key, made.sizes, text_tokens(made.text, len(made.sizes)))

    def refuse(self, refused: Refused) -> None:
        self.refused += refused.rows
        kind = self._kind(f"{refused.reason}: {refused.problem}")
        kind.count += refused.rows
        if len(kind.examples) < _EXAMPLES:
            told = {"key": refused.key, "where": refused.where, "problem": refused.problem}
            kind.examples.append({name: _short(text) for name, text in told.items()})

    def _kind(self, told: str) -> Kind:
        """The one that differs from ``told`` in names and numbers only; its name keeps those that all of it share."""
        name = next((name for name in self.kinds if _shape(name) == _shape(told)), "")
        if not name:
            name = "others" if len(self.kinds) >= _KINDS else told if len(told) <= _LONGEST else _shape(told)
        elif (shared := _shared(name, told)) != name:
            self.kinds = {shared if one == name else one: kind for one, kind in self.kinds.items()}
            name = shared
        return self.kinds.setdefault(name, Kind())

    def row(self, answer: Answer) -> None:
        """Count a row whose outcomes are all counted."""
        self.rows += answer.rows
        for name in answer.aside:
            if name in self.aside or len(self.aside) < _KINDS:
                self.aside[name] = self.aside.get(name, 0) + 1

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(state: Mapping[str, Any]) -> Tally:
        """From :meth:`state`, or a whole report."""
        state = {one.name: state[one.name] for one in fields(Tally) if one.name in state}
        kinds = {name: Kind(**kind) for name, kind in state["kinds"].items()}
        return Tally(**{**state, "kinds": kinds, "costs": costs_of(state.get("costs", {}))})


@lru_cache(maxsize=4 * _KINDS)
def _shape(told: str) -> str:
    """A problem without its names and numbers."""
    return _VARYING.sub("*", told)[:_LONGEST]


def _shared(name: str, told: str) -> str:
    """``name`` with ``*`` for whatever differs in ``told``, a text of the same shape."""
    old, new = _VARYING.findall(name), _VARYING.findall(told)
    if len(old) != len(new):  # the end of one is cut off
        return _shape(name)
    words = iter(zip(old, new, strict=True))

    def starred(match: re.Match[str]) -> str:
        was, now = next(words)
        return was if was == now else "*"

    return _VARYING.sub(starred, name)


class Lines:
    """A file of JSON lines, cut to the ``length`` that it had when a shard was finished, and appended to."""

    def __init__(self, path: Path, length: int):
        self._file = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(length)
        self._file.seek(length)

    def append(self, line: Mapping[str, Any] | Sequence[Any]) -> int:
        """Write one, and say how long the file is now."""
        self._file.write(json.dumps(line).encode() + b"\n")
        return self._file.tell()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Log(Lines):
    """``refused.jsonl``: a line for every refusal, in the order of the input, as
    :func:`~data_pipelines.documents.read_quarantine` reads them."""

    def __init__(self, path: Path, source: str, length: int):
        super().__init__(path, length)
        self._source = source

    def write(self, refused: Refused) -> int:
        """Append, and say how long the log is now."""
        line = {"source": self._source, "shard": refused.where, "key": refused.key, "reason": refused.reason}
        return self.append({**line, "problem": refused.problem[:2000]})


def _short(text: str) -> str:
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:197]}..."


def counted(count: int, what: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def table(report: Mapping[str, Any], folder: str) -> str:
    """What stands in ``report.json``, as lines for a terminal."""
    tally = Tally.of(report)
    documents = tally.records - tally.conversations
    lines = [
        *(f"  {_short(item['name'])}: {item['kind']}, {_read_as(item)}" for item in report["inputs"]),
        f"{counted(tally.rows, 'row')} read: {counted(tally.records, 'record')} written to {folder} "
        f"({counted(tally.conversations, 'conversation')}, {counted(documents, 'document')}, "
        f"{counted(tally.images, 'image')}, {tally.bytes / 1e6:.1f} MB), "
        f"{tally.refused} refused ({tally.share:.2%})",
    ]
    if tally.aside:
        lines.append("columns that no record holds: " + ", ".join(f"{n} ({c})" for n, c in _most(tally.aside)[:12]))
    lines += cost_lines(tally.costs, dpi=report.get("dpi", 0))
    lines += kind_lines(tally)
    if tally.refused:
        lines.append(f"all refusals are in {folder}/{REFUSED}")
    return "\n".join(lines)


def _read_as(item: Mapping[str, Any]) -> str:
    return f"read as {item['style']}" if item["style"] else "of no style that is recognised"


def kind_lines(tally: Tally) -> list[str]:
    """Every kind of refusal with its count and an example, the commonest first."""
    lines = []
    for name, kind in sorted(tally.kinds.items(), key=lambda item: -item[1].count):
        lines.append(f"{kind.count:>9}  {_short(name)}")
        lines += [f"{'':>11}{_place(e)}: {e['problem']}" for e in kind.examples[:1]]
    return lines


def _place(example: Mapping[str, str]) -> str:
    """Key and place of an example; what is about a whole file may have no key."""
    key, where = _short(example["key"]), _short(example["where"])
    return f"{key} ({where})" if key.strip() else where


def write_report(folder: Path, body: Mapping[str, Any], tally: Tally) -> None:
    """``report.html`` and then ``report.json``, which says that the ingestion is finished."""
    write_text(folder / PAGE, _page(body, tally))
    write_text(folder / REPORT, json.dumps({**body, **tally.state()}, indent=1) + "\n")


def _page(body: Mapping[str, Any], tally: Tally) -> str:
    counts = {name: getattr(tally, name) for name in ("rows", "records", "conversations", "images", "refused")}
    figures = {name: f"{count:,}" for name, count in counts.items()}
    figures |= {"bytes": f"{tally.bytes:,}", "share refused": f"{tally.share:.2%}"}
    inputs = [{**item, "name": _short(item["name"]), "size": f"{item['size']:,}"} for item in body["inputs"]]
    columns = [pieces.Column(key, title) for key, title in (("name", "input"), ("kind", "kind"), ("size", "bytes"))]
    costs = (line.strip() for line in cost_lines(tally.costs, dpi=body.get("dpi", 0)))
    sections = [
        pieces.Section("At a glance", pieces.tiles(figures)),
        pieces.Section("Tokens", pieces.join(map(pieces.paragraph, costs))),
        pieces.Section("Inputs", pieces.table(inputs, [*columns, pieces.Column("style", "style")])),
    ]
    if body["left_aside"]:
        sections.append(pieces.Section("Left aside", _left_aside(body["left_aside"])))
    if tally.kinds:
        kinds = sorted(tally.kinds.items(), key=lambda item: -item[1].count)
        refused = [{"why": _short(name), "rows": kind.count, "examples": _examples(kind)} for name, kind in kinds]
        sections.append(pieces.Section("Refused", pieces.table(refused), f"All of them are in {REFUSED}."))
    if tally.aside:
        aside = [{"column": _short(name), "rows": count} for name, count in _most(tally.aside)]
        sections.append(pieces.Section("Columns that no record holds", pieces.table(aside)))
    return pieces.page(f"Ingestion: {body['source']}", sections)


def _left_aside(kinds: Sequence[Mapping[str, Any]]) -> Markup:
    """A table a folder, whose name stands above the names within it."""
    columns = [pieces.Column(*column) for column in (("kind", "kind"), ("count", "files"), ("names", "some of them"))]
    tables = []
    for folder in dict.fromkeys(one["folder"] for one in kinds):
        rows = [
            {**one, "kind": _names([one["kind"]]), "names": _names(one["names"])}
            for one in kinds
            if one["folder"] == folder
        ]
        tables.append(pieces.table(rows, columns, caption=_short(folder)))
    return pieces.join(tables)


def _names(names: Sequence[str]) -> Markup:
    """Names that break only where they are longer than a line."""
    return pieces.join([Markup('<span class="name">{}</span>').format(_short(name)) for name in names], ", ")


def _examples(kind: Kind) -> Markup:
    told = (Markup("<li>{}</li>").format(f"{_place(e)}: {e['problem']}") for e in kind.examples)
    return Markup('<ul class="examples">{}</ul>').format(pieces.join(told))
