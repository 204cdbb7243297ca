"""Questions over a corpus of passages and pictures, in the layout of BEIR (Thakur et al. 2021) and MTEB.

A folder holds ``corpus.jsonl``, ``queries.jsonl`` and, where it is known what answers a question, ``qrels/test.tsv``
(with a head line: query, entry, score). A folder that holds what `datasets` saved as ``corpus``, ``queries`` and
``qrels``, and a set on the hub with these configurations (MTEB's image retrieval, ViDoRe), have the same as tables.

=========  ===============================================================================================
row        columns, the first of those that are there
=========  ===============================================================================================
an entry   ``_id``, ``id``, ``corpus-id`` or ``corpus_id``; ``title``; ``text`` or ``markdown`` (ViDoRe V3);
           ``image``: a path within the folder, or the picture itself
a query    ``_id``, ``id``, ``query-id`` or ``query_id``; ``text`` or ``query``; ``image``
a qrel     ``query-id`` or ``query_id``; ``corpus-id`` or ``corpus_id``; ``score``, relevant above 0
=========  ===============================================================================================

These layouts were made for retrieval and say little of answers. All that a query's ``answers``, ``answer``,
``raw_answers`` (ViDoRe V3), ``gt_answer`` and ``alternative_gt_answers`` (MMSearch) hold is accepted, each a text or a
list of texts, also below ``metadata``. A query without any is left out, and so is one that no qrel speaks of.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmagent.records import decode_image
from mmagent.tasks.index import Entry, terms
from mmagent.tasks.published import HUB, is_saved, rows_of

ENTRY_IDS, QUERY_IDS = ("_id", "id", "corpus-id", "corpus_id"), ("_id", "id", "query-id", "query_id")
TEXTS, ASKED = ("text", "markdown"), ("text", "query")
ANSWERS = ("answers", "answer", "raw_answers", "gt_answer", "alternative_gt_answers")
TABLES = {"corpus": ("corpus",), "queries": ("queries", "query"), "qrels": ("qrels", "default")}
"""Names that a table goes by; MTEB calls its qrels the default."""
Row = Mapping[str, Any]
Picture = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Question:
    """``answers`` are all that are right; ``relevant`` numbers of the entries that answer it, empty where nobody says.
    ``picture`` reads what is shown with it."""

    key: str
    text: str
    answers: tuple[str, ...]
    relevant: frozenset[int] = frozenset()
    picture: Picture | None = None
    slices: Mapping[str, str] = field(default_factory=dict)

    def told(self) -> str:
        return f"{self.key} {self.text}"


@dataclass(frozen=True)
class Corpus:
    """``entries``, and ``questions`` that they answer; ``left_out`` queries had no answer."""

    entries: tuple[Entry, ...]
    questions: tuple[Question, ...]
    left_out: int = 0

    def digest(self) -> str:
        """Of every word that is asked, searched and right; pictures are in it as being there or not."""
        found = hashlib.sha256()
        for entry in self.entries:
            found.update(json.dumps([entry.title, entry.text, entry.picture is not None]).encode())
        for q in self.questions:
            told = [q.key, q.text, list(q.answers), sorted(q.relevant), q.picture is not None]
            found.update(json.dumps(told).encode())
        return found.hexdigest()[:12]

    def describe(self) -> str:
        """What is judged, in a line."""
        left = f" ({self.left_out} without an answer left out)" if self.left_out else ""
        return f"{len(self.questions)} questions{left}, {len(self.entries)} entries, {self.digest()}"


def load_corpus(where: str | Path) -> Corpus:
    """The corpus and its questions in ``where``, a folder or ``datasets:ID``. Raises ``ValueError`` naming what is
    missing or wrong."""
    tables = _hub_tables(str(where)) if str(where).startswith(HUB) else _folder_tables(Path(where).expanduser())
    entries: list[Entry] = []
    numbers: dict[str, int] = {}
    for place, row, picture in tables["corpus"]:
        key = _key(row, ENTRY_IDS, place)
        if key in numbers:
            raise ValueError(f"{place}: entry {key!r} is there twice")
        numbers[key] = len(entries)
        entries.append(Entry(_text(row, ("title",), place), _text(row, TEXTS, place), picture))
    if not any(terms(f"{entry.title} {entry.text}") for entry in entries):
        raise ValueError(f"{where}: no entry of {len(entries)} has words, by which alone it could be found")
    relevant = _relevant(tables.get("qrels"), numbers)
    questions: list[Question] = []
    left_out, keys = 0, set()
    for place, row, picture in tables["queries"]:
        key = _key(row, QUERY_IDS, place)
        if key in keys:
            raise ValueError(f"{place}: query {key!r} is there twice")
        keys.add(key)
        if relevant is not None and key not in relevant:
            continue
        answers = _answers(row, place)
        if not answers:
            left_out += 1
            continue
        known = frozenset(relevant[key]) if relevant is not None else frozenset()
        text = _text(row, ASKED, place)
        if not text and picture is None:
            raise ValueError(f"{place}: query {key!r} asks nothing; columns: {', '.join(row)}")
        questions.append(Question(key, text, answers, known, picture, _slices(row, known, entries, picture)))
    if relevant is not None and (unknown := relevant.keys() - keys):
        raise ValueError(f"{where}: its qrels speak of query {min(unknown)!r}, which is not there")
    if not questions:
        why = f"none of {left_out} queries has one of {', '.join(ANSWERS)}" if left_out else "no query is judged"
        raise ValueError(f"{where}: {why}; for retrieval alone there are other harnesses")
    return Corpus(tuple(entries), tuple(questions), left_out)


def _slices(row: Row, relevant: frozenset[int], entries: Sequence[Entry], picture: Picture | None) -> dict[str, str]:
    found = {"asked": "about a picture" if picture is not None else "in words"}
    if relevant:
        found["evidence"] = "picture" if any(entries[n].picture is not None for n in relevant) else "passages"
    return found | ({"language": row["language"]} if isinstance(row.get("language"), str) else {})


def _relevant(rows: Iterator[tuple[str, Row, Picture | None]] | None, numbers: Mapping[str, int]):
    """``{query: numbers of its entries}``, None where there are no qrels."""
    if rows is None:
        return None
    found: dict[str, set[int]] = {}
    for place, row, _ in rows:
        query, entry = _key(row, QUERY_IDS[2:], place), _key(row, ENTRY_IDS[2:], place)
        try:
            score = float(row["score"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{place}: the score of a qrel is {row.get('score')!r}, no number") from None
        if entry not in numbers:
            raise ValueError(f"{place}: the corpus has no entry {entry!r}")
        if score > 0:
            found.setdefault(query, set()).add(numbers[entry])
    return found


def _key(row: Row, names: Sequence[str], place: str) -> str:
    for name in names:
        if row.get(name) not in (None, ""):
            return str(row[name])
    raise ValueError(f"{place}: none of the columns {', '.join(names)}, but {', '.join(row) or 'nothing'}")


def _text(row: Row, names: Sequence[str], place: str) -> str:
    for name in names:
        if (text := row.get(name)) is not None:
            if not isinstance(text, str):
                raise ValueError(f"{place}: {name} must be a text, not {text!r:.60}")
            return text.strip()
    return ""


def _answers(row: Row, place: str) -> tuple[str, ...]:
    more = row.get("metadata")
    found: dict[str, None] = {}
    for some in (row, more if isinstance(more, Mapping) else {}):
        for name in ANSWERS:
            value = some.get(name)
            texts = [value] if isinstance(value, str) else [] if value is None else value
            if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{place}: {name} must be a text or a list of texts, not {value!r:.60}")
            found |= {text.strip(): None for text in texts if text.strip()}
    return tuple(found)


# ---------------------------------------------------------------------------------------------- where rows come from


def _folder_tables(folder: Path) -> dict[str, Iterator[tuple[str, Row, Picture | None]]]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    saved = {table: next((folder / n for n in names if is_saved(folder / n)), None) for table, names in TABLES.items()}
    if saved["corpus"] is not None:
        if saved["queries"] is None:
            raise ValueError(f"{folder} holds a saved corpus and no saved queries")
        return {table: _saved_rows(rows_of(str(path)), str(path)) for table, path in saved.items() if path is not None}
    files = {table: _file(folder, table) for table in ("corpus", "queries")}
    found = {table: _lines(path, folder) for table, path in files.items()}
    qrels = sorted((folder / "qrels").glob("*.tsv"))
    chosen = next((path for path in qrels if path.stem == "test"), qrels[0] if len(qrels) == 1 else None)
    if chosen is None and qrels:
        raise ValueError(f"{folder / 'qrels'}: which is judged, {', '.join(p.name for p in qrels)}? name it test.tsv")
    return found | ({"qrels": _tsv(chosen)} if chosen is not None else {})


def _file(folder: Path, table: str) -> Path:
    for name in (f"{table}.jsonl", f"{table}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no {table}.jsonl, and no {table} that datasets saved")


def _lines(path: Path, folder: Path) -> Iterator[tuple[str, Row, Picture | None]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: an object is expected")
            image = row.get("image")
            if image is not None and not isinstance(image, str):
                raise ValueError(f"{place}: image must be a path within the folder, not {image!r:.60}")
            yield place, row, _file_reader(_within(folder, image, place)) if image else None


def _within(folder: Path, name: str, place: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{place}: image {name!r} is not within the folder")
    return path


def _file_reader(path: Path) -> Picture:
    def read() -> np.ndarray:
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        return decode_image(path.read_bytes(), str(path))

    return read


def _tsv(path: Path) -> Iterator[tuple[str, Row, None]]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 2):
            yield f"{path}, line {number}", row, None


def _hub_tables(where: str) -> dict[str, Iterator[tuple[str, Row, Picture | None]]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{where}: to load datasets wants pip install -e '.[datasets]'") from error
    try:
        there = datasets.get_dataset_config_names(where.removeprefix(HUB))
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{where}: no dataset within reach: {error}") from error
    chosen = {table: next((name for name in names if name in there), None) for table, names in TABLES.items()}
    if missing := [table for table in ("corpus", "queries") if chosen[table] is None]:
        raise ValueError(f"{where} has no configuration {' and no '.join(missing)}, but {', '.join(there)}")
    return {
        table: _saved_rows(rows_of(f"{where}@{name}"), f"{where}, {name}") for table, name in chosen.items() if name
    }


def _saved_rows(rows: Any, where: str) -> Iterator[tuple[str, Row, Picture | None]]:
    """Rows without their pictures, which are read when they are asked for."""
    drawn = "image" in rows.column_names and getattr(rows.features["image"], "decode", None) is not None
    has = _present(rows) if drawn else ()
    plain = rows.remove_columns("image") if "image" in rows.column_names else rows
    for number, row in enumerate(plain):
        yield f"{where}, row {number}", row, _row_reader(rows, number) if drawn and has[number] else None


def _present(rows: Any) -> list[bool]:
    """Which rows have a picture; none is read for that."""
    tables = rows.select_columns("image").with_format("arrow").iter(1000)
    return [there for table in tables for there in table["image"].is_valid().to_pylist()]


def _row_reader(rows: Any, number: int) -> Picture:
    return lambda: np.asarray(rows[number]["image"].convert("RGB"))
