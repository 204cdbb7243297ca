"""V*Bench as it is published: what is read, which answers name an option, what is wrong and said so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from evals.__main__ import main
from evals.baselines import BaselineAgent
from evals.judges import LONGEST, chosen
from evals.published_sets import VSTAR
from evals.question_sets import load_questions
from evals.runner import Options, evaluate_now
from evals.store import read_run
from evals.suites import SUITES
from evals.suites.made_questions import make_vstar
from evals.summary import summarise

ROW = {  # as in craigwu/vstar_bench
    "image": "direct_attributes/sa_4690.jpg",
    "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
    "Answer with the option's letter from the given choices directly.",
    "category": "direct_attributes",
    "label": "A",
    "question_id": "0",
}
SIDES = {
    "image": "relative_position/sa_86159.jpg",
    "text": "Is the red car on the left or right side of the dog?\n(A) The car is on the right side of the dog.\n"
    "(B) The car is on the left side of the dog.\nAnswer with the option's letter from the given choices directly.",
    "category": "relative_position",
    "label": "B",
    "question_id": "115",
}
OPTIONS = Options(progress=False)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "vstar_bench"
    for row in (ROW, SIDES):
        picture = path / row["image"]
        picture.parent.mkdir(parents=True)
        Image.fromarray(np.full((150, 225, 3), 90, np.uint8)).save(picture)
    (path / "test_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, SIDES)))
    return path


def test_a_folder_as_published(folder, tmp_path):
    questions = load_questions(VSTAR, folder)
    assert [q.key for q in questions] == ["direct_attributes-0", "relative_position-115"]
    assert questions[0].options == {"A": "rubber", "B": "cotton", "C": "kevlar", "D": "leather"}
    assert questions[0].load().images[0].shape == (150, 225, 3)
    suite = SUITES["vstar"](folder)
    assert suite.data.startswith("2 questions, ")
    run = evaluate_now(suite, BaselineAgent("gold"), tmp_path / "gold", OPTIONS)
    assert summarise(run.rows).score.mean == 1.0
    assert {row.steps[0].text for row in run.rows} == {ROW["text"], SIDES["text"]}  # word for word
    assert set(summarise(run.rows).by_slice["category"]) == {"direct_attributes", "relative_position"}


def test_a_hub_copy_holds_its_pictures(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "image": str(folder / row["image"])} for row in (ROW, SIDES)]
    texts = datasets.Dataset.from_list(rows)
    texts.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    assert [(q.key, q.answers[0], q.load().images[0].shape) for q in load_questions(VSTAR, tmp_path / "saved")] == [
        ("direct_attributes-0", "A", (150, 225, 3)),
        ("relative_position-115", "B", (150, 225, 3)),
    ]
    texts.save_to_disk(tmp_path / "paths")
    with pytest.raises(ValueError, match="holds no pictures; give the folder of a clone"):
        load_questions(VSTAR, tmp_path / "paths")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"), (" (A)\n", "A"), ("a", "A"), ("A.", "A"), ("B)", "B"), ("(C) kevlar", "C"), ("D. Leather.", "D"),
        ("leather", "D"), ("The answer is (B).", "B"), ("Answer: C", "C"), ("**B**", "B"), ("Option B", "B"),
        ("the correct answer is rubber", "A"),
    ],
)  # fmt: skip
def test_answers_that_name_an_option(folder, answer, letter):
    assert chosen(load_questions(VSTAR, folder)[0].options, answer) == letter


@pytest.mark.parametrize(
    "answer",
    ["", "E", "(A) cotton", "A or B", "A glove of rubber", "It is made of rubber, I think", "AB", "A" * (LONGEST + 1)],
)
def test_answers_that_name_none(folder, tmp_path, answer):
    question = load_questions(VSTAR, folder)[0]
    with pytest.raises(ValueError, match=r"names none of the options A, B, C, D|at most 2000 are read"):
        chosen(question.options, answer)


def test_sentences_may_be_options(folder):
    question = load_questions(VSTAR, folder)[1]
    assert chosen(question.options, "The car is on the left side of the dog.") == "B"
    assert chosen(question.options, "(A) The car is on the right side of the dog") == "A"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"line 1: no JSON"),
        ("[]", "line 1: no object with the path of an image"),
        (json.dumps({**ROW, "label": "E"}), "line 1: 'E' is right, its options are A, B, C, D"),
        (json.dumps({**ROW, "text": "What?"}), "line 1: 'A' is right, its options are none"),
        (json.dumps({**ROW, "label": 0}), "text and label must be texts"),
        ("", "holds no questions"),
    ],
)
def test_what_is_wrong_is_named(folder, line, says):
    (folder / "test_questions.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=says):
        load_questions(VSTAR, folder)


def test_a_folder_without_questions_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"test_questions\.jsonl is missing"):
        load_questions(VSTAR, tmp_path)


def test_a_picture_that_is_missing_is_said_before_anybody_is_asked(folder, tmp_path):
    """One of those that are looked at beforehand; another is an error of its item, and no zero."""
    suite = SUITES["vstar"](folder)
    (folder / SIDES["image"]).unlink()
    run = evaluate_now(suite, BaselineAgent("gold"), tmp_path / "out", OPTIONS)
    assert len(run.judged) == 1
    (row,) = run.errors
    assert row.error.startswith(f"ValueError: {folder / SIDES['image']} is missing")
    with pytest.raises(ValueError, match="is missing"):
        SUITES["vstar"](folder)


def test_the_drawn_set_is_of_the_published_form_and_each_answer_is_there_once(tmp_path):
    make_vstar(tmp_path / "made")
    questions = load_questions(VSTAR, tmp_path / "made")
    assert [
        sum(q.slices["category"] == name for q in questions) for name in ("direct_attributes", "relative_position")
    ] == [9, 9]
    assert len({q.answers for q in questions}) > 2  # no letter is always right
    assert max(q.load().images[0].shape[1] for q in questions) == 1920


def test_the_command_takes_a_folder(folder, tmp_path):
    assert main(["vstar", "--data", str(folder), "--baseline", "null", "--quiet", "--out", str(tmp_path / "o")]) == 0
    run = read_run(tmp_path / "o" / "vstar")
    assert [(row.value, row.parts) for row in run.rows] == [(0.0, {"malformed": 1.0})] * 2
