"""The published sets that are known, and how a row of each is read.

============  =====================================================================================================
``vstar``     V*Bench (Wu and Xie 2023), a clone of ``craigwu/vstar_bench``: ``test_questions.jsonl``, a line an item
              with ``image`` (a path), ``text`` (question, a line ``(A) ...`` an option, how to answer), ``label``,
              ``category``, ``question_id``; ``lmms-lab/vstar-bench`` has the same columns
``chartqa``   ChartQA (Masry et al. 2022): ``test/test_human.json`` and ``test/test_augmented.json``, lists of
              ``imgname``, ``query``, ``label``, beside ``test/png``; ``HuggingFaceM4/ChartQA`` (``query``, ``label``,
              ``human_or_machine``), ``lmms-lab/ChartQA`` (``question``, ``answer``, ``type``)
``ocrbench``  OCRBench (Liu et al. 2023): ``OCRBench/OCRBench.json``, a list of ``dataset_name``, ``type``,
              ``question``, ``answers``, ``image_path``, beside ``OCRBench_Images``; ``echo840/OCRBench`` (``dataset``,
              ``question_type``, ``question``, ``answer``)
``docvqa``    DocVQA (Mathew et al. 2020), its validation split, as the answers of test are not published:
              ``val/val_v1.0_withQT.json`` (or ``val_v1.0.json``), ``{"data": [...]}`` of ``questionId``, ``question``,
              ``image``, ``answers`` beside ``documents``; ``datasets:lmms-lab/DocVQA@DocVQA``
``textvqa``   TextVQA (Singh et al. 2019), its validation split: ``TextVQA_0.5.1_val.json``, ``{"data": [...]}`` of
              ``question_id``, ``question``, ``image_id``, ten ``answers``, beside ``train_images``;
              ``lmms-lab/textvqa``
============  =====================================================================================================

Every set may also be a folder with ``test.jsonl``: a line a row, the columns of the hub, paths of pictures.
"""

from __future__ import annotations

import re

from evals.judges import FORMULAS, spoken
from evals.question_sets import Files, Question, QuestionSet, Row

_OPTION = re.compile(r"^[ \t]*\(([A-Z])\)[ \t]*(\S[^\n]*)$", re.MULTILINE)
LETTER_DIRECTLY = "Answer with the option's letter from the given choices directly."
ONE_WORD = "Answer the question with a single word."
PHRASE = "Answer the question using a single word or phrase."
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


def _ocrbench(row: Row) -> Question:
    kind, source = row.text("question_type", "type"), row.text("dataset", "dataset_name")
    answers = row.texts("answer", "answers")
    picture = row.picture("image", "image_path")
    rule = FORMULAS if source == FORMULAS else ""
    key = f"{_slug(kind)}-{row.number}"
    return Question(key, row.text("question").strip(), answers, picture, {"type": kind}, kind=rule)


def _docvqa(row: Row) -> Question:
    answers = row.texts("answers")
    text, picture = f"{row.text('question')}\n{PHRASE}", row.picture("image")
    kinds = row.texts("question_types") if row.values.get("question_types") else ("other",)
    return Question(str(row.get("questionId")), text, answers, picture, {"type": " + ".join(sorted(kinds))})


def _textvqa(row: Row) -> Question:
    answers = row.texts("answers")
    if len(answers) != 10:
        raise row.wrong(f"answers of ten people are expected, not {len(answers)}")
    text = f"{row.text('question').capitalize()}\n{PHRASE}"
    said = [spoken(answer) for answer in answers]
    often = {answer: said.count(spoken(answer)) for answer in answers}
    answers = tuple(sorted(answers, key=lambda answer: -often[answer]))
    shown = row.picture("image", "image_id", suffix=".jpg")
    return Question(str(row.get("question_id")), text, answers, shown, {"agreed": str(often[answers[0]])})


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
OCRBENCH = QuestionSet(
    "ocrbench", _ocrbench,
    (
        (Files("OCRBench/OCRBench.json", pictures=("../OCRBench_Images", "OCRBench_Images")),),
        (Files("OCRBench.json", pictures=("OCRBench_Images",)),),
        _LINES,
    ),
    splits=("test",),
)  # fmt: skip
DOCVQA = QuestionSet(
    "docvqa", _docvqa,
    (*((Files(f"{at}{name}.json"),) for name in ("val_v1.0_withQT", "val_v1.0") for at in ("val/", "")), _LINES),
    splits=("validation",),
)  # fmt: skip
TEXTVQA = QuestionSet(
    "textvqa", _textvqa,
    ((Files("TextVQA_0.5.1_val.json", pictures=("train_images", "train_val_images/train_images")),), _LINES),
    splits=("validation",),
)  # fmt: skip
