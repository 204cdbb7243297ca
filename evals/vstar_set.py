"""V*Bench (Wu and Xie 2023) as it is published: a large picture, a question with options by letter, the right letter.

A folder (a clone of ``craigwu/vstar_bench``) holds ``test_questions.jsonl``, a line of JSON an item: ``image`` (a path
within the folder), ``text`` (the question, a line ``(A) ...`` for each option and how to answer), ``label`` (a letter),
``category`` and ``question_id``. Copies on the hub whose rows hold their pictures (``lmms-lab/vstar-bench``) have the
same columns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmagent.records import decode_image
from mmagent.tasks.published import HUB, is_saved, splits_of

FILE = "test_questions.jsonl"
LONGEST = 2000
"""Characters of an answer that are read."""
_OPTION = re.compile(r"^[ \t]*\(([A-Z])\)[ \t]*(\S[^\n]*)$", re.MULTILINE)
_LEAD = re.compile(r"(?:the )?(?:correct |best |right )?(?:answer|option)(?: is)?[ ]?:?[ ]?", re.IGNORECASE)
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])\)?)[.:]?(?:\s+(\S.*))?", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One item: ``text`` as it is asked, ``options`` by letter, ``label`` the right one."""

    key: str
    text: str
    options: Mapping[str, str]
    label: str
    category: str
    load: Callable[[], np.ndarray]

    def chosen(self, answer: str) -> str:
        """The letter that an answer names: a letter, alone or before the words of its option, or those words alone.
        Raises ``ValueError`` for anything else."""
        if len(answer) > LONGEST:
            raise ValueError(f"an answer of {len(answer)} characters, at most {LONGEST} are read")
        said = answer.strip().strip("*").strip()
        if lead := _LEAD.match(said):
            said = said[lead.end() :].strip("* ")
        by_words = {_plain(words): letter for letter, words in self.options.items()}
        if _plain(said) in by_words:
            return by_words[_plain(said)]
        found = _LETTER.fullmatch(said)
        letter = (found[1] or found[2]).upper() if found else ""
        if found is None or letter not in self.options or (found[3] and by_words.get(_plain(found[3])) != letter):
            raise ValueError(f"{answer[:60]!r} names none of the options {', '.join(self.options)}")
        return letter


def load_vstar(where: str | Path) -> list[Question]:
    """The questions in ``where``: a folder as published or as `datasets` saved it, or ``datasets:ID``. Raises
    ``ValueError`` naming what is missing or wrong."""
    text, path = str(where), Path(where).expanduser()
    if text.startswith(HUB) or is_saved(path):
        splits = splits_of(text if text.startswith(HUB) else str(path))
        questions = [question for split, rows in splits.items() for question in _of_rows(rows, split, text)]
    else:
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file} is missing: a folder of V*Bench holds it beside its pictures")
        questions = list(_of_file(file))
    if not questions:
        raise ValueError(f"{where} holds no questions")
    return questions


def digest(questions: Sequence[Question]) -> str:
    """Of all that is asked and of what is right."""
    told = [[q.key, q.text, q.label] for q in questions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _of_file(file: Path) -> Iterator[Question]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise ValueError(f"{place}: no object with the path of an image")
        yield _question(row, place, number, _file_reader(file.parent / row["image"]))


def _of_rows(rows: Any, split: str, where: str) -> Iterator[Question]:
    if "image" not in rows.column_names or getattr(rows.features["image"], "decode", None) is None:
        raise ValueError(f"{where}: its column 'image' holds no pictures; give the folder of a clone of the dataset")
    for number, row in enumerate(rows.remove_columns("image")):
        yield _question(row, f"{where}, {split} {number}", number, _row_reader(rows, number))


def _file_reader(path: Path) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        return decode_image(path.read_bytes(), str(path))

    return read


def _row_reader(rows: Any, number: int) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(rows[number]["image"].convert("RGB"))


def _question(row: Mapping[str, Any], place: str, number: int, load: Callable[[], np.ndarray]) -> Question:
    text, label = row.get("text"), row.get("label")
    if not isinstance(text, str) or not isinstance(label, str):
        raise ValueError(f"{place}: text and label must be texts, not {text!r:.60} and {label!r:.60}")
    options = dict(_OPTION.findall(text))
    if len(options) < 2 or label not in options:
        raise ValueError(f"{place}: {label!r:.60} is right, its options are {', '.join(options) or 'none'}")
    category = str(row.get("category") or "other")
    return Question(f"{category}-{row.get('question_id', number)}", text, options, label, category, load)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
