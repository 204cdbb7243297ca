"""The judges of published questions, on cases worked by hand from the published rules."""

from __future__ import annotations

import pytest

from evals import judges
from evals.question_sets import Question, Shown


def asked(*answers: str, options=None, kind: str = "") -> Question:
    return Question("k", "?", answers, lambda: Shown(()), {}, options or {}, kind)


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        ("14", "14", 1), ("14", "14.7", 1), ("14", "13.3", 1), ("14", "14.71", 0), ("14", "13.29", 0),
        ("14", "14%", 0),  # 0.14
        ("14%", "0.14", 1), ("14%", "14 %", 1), ("-3", "-3.1", 1), ("-3", "3", 0), ("0.5", "1/2", 0),
        ("0", "0", 1), ("0", "0.0", 0), ("0", "0.01", 0),  # 0 has no five per cent: the same text
        ("2010", "2010", 1), ("2010", "2100", 1), ("2010", "2111", 0),  # years, too
        ("Yes", "yes", 1), ("Yes", "Yes.", 0), ("Yes", "No", 0), ("dark blue", " Dark Blue\n", 1), ("1,000", "1000", 0),
        ("1000", "1e3", 1), ("14", "nan", 0), ("14", "inf", 0), ("14", "14 apples", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(truth, said, score):
    assert judges.relaxed(asked(truth), said) == score


def test_any_of_several_answers_is_right():
    assert judges.relaxed(asked("gray", "grey"), "Grey") == 1


@pytest.mark.parametrize("said", ["", "  ", "1" * (judges.LONGEST + 1)])
def test_nothing_and_far_too_much_cannot_be_read(said):
    with pytest.raises(ValueError, match=r"empty|at most 2000 are read"):
        judges.relaxed(asked("1"), said)


@pytest.mark.parametrize(
    ("truth", "said", "kind", "score"),
    [
        ("CENTRE", "centre", "", 1), ("centre", 'The word is "CENTRE".', "", 1), ("centre", "center", "", 0),
        ("12 May", "12\nmay 2019", "", 1), ("total", "ＴＯＴＡＬ", "", 1), ("a b", "ab", "", 0),
        ("x ^ { 2 }", "x^{2} = 4", judges.FORMULAS, 1), ("x ^ { 2 }", "X^{2}", judges.FORMULAS, 0),
        ("x ^ { 2 }", "x^{2}", "", 0),
        ("7", "1 2 3 4 5 6 7 8 9", "", 1),  # what the published rule lets through
        (" ", "anything", "", 0),
    ],
)  # fmt: skip
def test_an_answer_that_contains_the_right_one(truth, said, kind, score):
    assert judges.contained(asked("nothing like it", truth, kind=kind), said) == score


def test_a_page_is_not_searched():
    with pytest.raises(ValueError, match="at most 1000 are read"):
        judges.contained(asked("7"), "7" + "x" * 1000)


@pytest.mark.parametrize(
    ("truths", "said", "score"),
    [
        (("October 4",), "october  4", 1 - 0 / 10),  # runs of space cost nothing, and lengthen
        (("October 4",), "October 5", 1 - 1 / 9), (("University",), "universe", 1 - 3 / 10),
        (("1/8/93",), "1/9/93", 1 - 1 / 6), (("ab",), "ac", 0.5), (("abc",), "xyz", 0.0), (("abc",), "abxyz", 0.0),
        (("no", "yes"), "Yes", 1.0), (("7",), "seven", 0.0), (("a",), "a" * 1999, 0.0),
    ],
)  # fmt: skip
def test_anls(truths, said, score):
    assert judges.anls(asked(*truths), said) == pytest.approx(score)


@pytest.mark.parametrize(
    ("same", "score"),
    [(0, 0.0), (1, 0.3), (2, (2 / 3 * 8 + 1 / 3 * 2) / 10), (3, (7 + 3 * 2 / 3) / 10), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy(same, score):
    """Of the ten choices of nine, those without one who agrees have one less to agree."""
    truths = ["Nokia"] * same + [f"other{n}" for n in range(10 - same)]
    assert judges.consensus(asked(*truths), "the nokia.") == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The Two cats.", "2 cats"), ("dont", "don't"), ("Joe's", "joe 's"), ("1,200", "1200"), ("3.5", "3.5"),
        ("b-c", "b c"), ("b - c", "b c"), ("b -c-", "b c"), ("none", "0"),
        ("couldnt've", "couldn't've"), ("yes!", "yes"), ("", ""),
    ],
)  # fmt: skip
def test_answers_as_the_vqa_evaluation_compares_them(text, same):
    assert judges.spoken(text) == same
