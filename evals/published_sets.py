"""The published sets that are known, and how a row of each is read.

============  =====================================================================================================
``vstar``     V*Bench (Wu and Xie 2023), a clone of ``craigwu/vstar_bench``: ``test_questions.jsonl``, a line an item
              with ``image`` (a path), ``text`` (question, a line ``(A) ...`` an option, how to answer), ``label``,
              ``category``, ``question_id``; ``lmms-lab/vstar-bench`` has the same columns
``chartqa``   ChartQA (Masry et al. 2022): ``test/test_human.json`` and ``test/test_augmented.json``, lists of
              ``imgname``, ``query``, ``label``, beside ``test/png``; ``HuggingFaceM4/ChartQA`` (``query``, ``label``,
              ``human_or_machine``), ``lmms-lab/ChartQA`` (``question``, ``answer``, ``type``)
============  =====================================================================================================

Every set may also be a folder with ``test.jsonl``: a line a row, the columns of the hub, paths of pictures.
"""

from __future__ import annotations

import re

from evals.question_sets import Files, Question, QuestionSet, Row

_OPTION = re.compile(r"^[ \t]*\(([A-Z])\)[ \t]*(\S[^\n]*)$", re.MULTILINE)
LETTER_DIRECTLY = "Answer with the option's letter from the given choices directly."
ONE_WORD = "Answer the question with a single word."
_LINES = (Files("test.jsonl"),)


def _vstar(row: Row) -> Question:
    text, label = row.values.get("text"), row.values.get("label")
    if not isinstance(text, str) or not isinstance(label, str):
        raise row.wrong(f"text and label must be texts, not {text!r:.60} and {label!r:.60}")
    options = dict(_OPTION.findall(text))
    if len(options) < 2 or label not in options:
        raise row.wrong(f"{label!r:.60} is right, its options are {', '.join(options) or 'none'}")
    category = row.word("category")
    key = f"{category}-{row.values.get('question_id', row.number)}"
    return Question(key, text, (label,), row.picture("image"), {"category": category}, options)


_PARTS = {"human": "human", "human_test": "human", "machine": "augmented", "augmented": "augmented",
          "augmented_test": "augmented"}  # fmt: skip


def _chartqa(row: Row) -> Question:
    kind = row.text("human_or_machine", "type")
    if kind not in _PARTS:
        raise row.wrong(f"who asks must be one of {', '.join(_PARTS)}, not {kind!r:.60}")
    text = f"{row.text('query', 'question')}\n{ONE_WORD}"
    answers = row.texts("label", "answer")
    picture = row.picture("image", "imgname")
    return Question(f"{_PARTS[kind]}-{row.number}", text, answers, picture, {"asked by": _PARTS[kind]})


VSTAR = QuestionSet("vstar", _vstar, ((Files("test_questions.jsonl"),),))
CHARTQA = QuestionSet(
    "chartqa", _chartqa,
    (
        (
            Files("test/test_human.json", {"type": "human"}, ("png",)),
            Files("test/test_augmented.json", {"type": "augmented"}, ("png",)),
        ),
        _LINES,
    ),
    splits=("test",),
)  # fmt: skip
