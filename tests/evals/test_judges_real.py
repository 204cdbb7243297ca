"""Our judges beside those of the real lmms-eval, answer for answer. Left out without the environment of
``tools/harness_environment.sh``; only the functions that judge are taken from its files, as the rest of it wants much
that they do not need."""

from __future__ import annotations

import ast
import os
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from evals import judges
from evals.question_sets import Question, Shown
from mmagent.worlds.grading import edit_distance

ROOT = Path(__file__).parents[2]
WORDS = (
    "The", "cat's", "Total:", "$1,200.50", "isnt", "I", "don't", "12", "three", "AN", "e.g.", "Ｔｏｔａｌ", "１２",
    "A.B.", "(x)", "no-one", "7/8", "yes?", "Couldnt've", "it'd", "youve", "none", "ten", "straße", r"\frac{a}{b}",
    "x^{2}", "=", "4",
)  # fmt: skip
NUMBERS = (
    "0", "0.0", "14", "14.7", "13.3", "-3", "3%", "0.03", "12.5%", "Yes", "yes", "No", "yes.", "2010", "2000", "1e3",
    "1000", "1,000", "dark blue", "nan", "inf", "1_0", "5 %", "%", "100%%", "1.", "$5", "٣",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> Path:
    """The package lmms_eval within ``MMAGENT_HARNESSES``, or ``.harnesses`` of the project."""
    folder = Path(os.environ.get("MMAGENT_HARNESSES", ROOT / ".harnesses"))
    found = sorted(folder.glob("lib/python*/site-packages/lmms_eval"))
    if not found:
        pytest.skip(f"no lmms-eval in {folder}; `bash tools/harness_environment.sh {folder}` makes it")
    return found[0]


def taken(file: Path, *names: str, **given: object) -> Callable:
    """The last of the functions or classes ``names`` of a file, wherever they stand in it; they see each other and what
    is ``given``."""
    found = {
        node.name: node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
    }
    for node in found.values():
        node.decorator_list = []
    space = {"re": re, "statistics": statistics, **given}
    exec(compile(ast.Module([found[name] for name in names], []), str(file), "exec"), space)
    return space[names[-1]]


def asked(*answers: str, options=None, kind: str = "") -> Question:
    return Question("k", "?", answers, lambda: Shown(()), {}, options or {}, kind)


def texts(rng: random.Random) -> tuple[list[str], str]:
    """Right answers, and one that is like them, holds them or is none of them."""

    def one() -> str:
        return rng.choice([" ", "  ", "\n", " - ", "-", ""]).join(rng.choices(WORDS, k=rng.randrange(1, 5)))

    truths = [one() for _ in range(rng.randrange(1, 4))]
    near = list(rng.choice(truths))
    for _ in range(rng.randrange(4)):
        near[rng.randrange(len(near))] = rng.choice("abc .")
    said = rng.choice([one(), f"{one()} {rng.choice(truths)}", "".join(near), rng.choice(truths)]).strip()
    return truths, said or "y"


def test_relaxed_accuracy(theirs):
    rule = taken(theirs / "tasks/chartqa/utils.py", "relaxed_correctness")
    pairs = [(truth, said) for truth in NUMBERS for said in NUMBERS]
    rng = random.Random(0)
    for _ in range(1000):
        truth = str(round(rng.uniform(-50, 50), rng.randrange(3)))
        pairs.append((truth, str(round(float(truth) * rng.uniform(0.9, 1.1), rng.randrange(3)))))
    assert [p for p in pairs if judges.relaxed(asked(p[0]), p[1]) != float(rule(p[1], p[0]))] == []


@pytest.mark.parametrize("kind", ["", judges.FORMULAS])
def test_containment(theirs, kind):
    rule = taken(theirs / "tasks/ocrbench/utils.py", "_fold_fullwidth_ascii", "ocrbench_process_results")
    rng = random.Random(1)
    for truths, said in (texts(rng) for _ in range(1000)):
        row = {"answer": truths, "dataset": kind or "IIIT5K", "question_type": "x"}
        expected = rule(row, [said])["ocrbench_accuracy"]["score"]
        assert judges.contained(asked(*truths, kind=kind), said) == expected, (truths, said)


def test_anls(theirs):
    rule = taken(theirs / "api/metrics.py", "levenshtein_distance", "anls")
    rng = random.Random(2)
    for truths, said in (texts(rng) for _ in range(1000)):
        assert judges.anls(asked(*truths), said) == pytest.approx(rule(truths, [said])["anls"]), (truths, said)


def test_vqa_accuracy(theirs):
    words = taken(theirs / "tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")
    rule = taken(theirs / "tasks/textvqa/utils.py", "textvqa_process_results", EvalAIAnswerProcessor=words)
    rng = random.Random(3)
    for truths, said in (texts(rng) for _ in range(1000)):
        ten = rng.choices([*truths, "else"], k=10)
        expected = rule({"answers": list(ten), "question_id": 1}, [said])["exact_match"]
        assert judges.consensus(asked(*ten), said) == pytest.approx(expected), (ten, said)
        assert judges.spoken(said) == words()(said)
    for short in words.CONTRACTIONS:
        assert judges.spoken(short) == words()(short)


def test_mathvista_once_the_answer_is_found(theirs):
    """What their language model extracts is given to both as it is."""
    file = theirs / "tasks/mathvista/mathvista_evals.py"
    similar = taken(file, "get_most_similar", distance=edit_distance)
    normal = taken(file, "normalize_extracted_answer")

    class Evaluator:
        get_most_similar, normalize_extracted_answer = similar, normal

    equal = taken(file, "safe_equal", eval_logger=None)
    rng = random.Random(4)

    def same(question: Question, said: str, truth: str, choices: list[str], *kind: object) -> None:
        found = Evaluator().normalize_extracted_answer(said, choices, *kind)
        assert judges.mathvista(question, said) == float(equal(None, found, truth)), (truth, said)

    for _ in range(500):
        truth = str(rng.randrange(-30, 300))
        said = rng.choice([truth, f"{truth}.0", f"{truth}.9", str(rng.randrange(300))])
        same(asked(truth, kind="integer"), said, truth, [], "free_form", "integer", 0)
        places = rng.choice((1, 2))
        truth = str(round(rng.uniform(-5, 50), places))
        said = rng.choice([truth, str(float(truth) + 0.04), str(round(float(truth) + rng.uniform(-0.1, 0.1), 3))])
        same(asked(truth, kind=f"float {places}"), said, truth, [], "free_form", "float", places)
        choices = rng.choice([["Yes", "No"], ["12", "13", "14"], ["red circle", "blue square", "red square"]])
        options = dict(zip("ABC", choices, strict=False))
        right, letter = rng.choice(list(options)), rng.choice(list(options))
        said = rng.choice([letter, f"({letter})", f"({letter}) {options[letter]}", options[letter]])
        question = asked(right, options=options, kind="multi_choice")
        same(question, said, options[right], choices, "multi_choice", "text", 0)
