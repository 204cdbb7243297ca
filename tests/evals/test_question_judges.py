"""The judges of published questions, on cases worked by hand from the published rules."""

from __future__ import annotations

import contextlib
import time

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


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("7", 1), ("seven", 1), ("Seven.", 1), ("There are 7 dogs.", 1), ("7 (seven)", 1), ("7.0", 1), ("**7**", 1),
        ("8", 0), ("7.5", 0), ("-7", 0), ("seventeen", 0), ("twenty-seven", 0), ("0", 0), ("77", 0), ("1,007", 0),
    ],
)  # fmt: skip
def test_counts(said, score):
    assert judges.count(asked("7"), said) == score


@pytest.mark.parametrize("said", ["", "many", "6 or 7", "1 2 3 4 5 6 7 8 9", "I don't know", "7" + " dogs" * 60])
def test_what_is_no_count(said):
    with pytest.raises(ValueError, match=r"empty|names (0|2|9) numbers|at most 200"):
        judges.count(asked("7"), said)


def test_number_words_go_to_ninety_nine():
    for truth, word in ((0, "zero"), (11, "eleven"), (20, "twenty"), (42, "forty-two"), (99, "ninety-nine")):
        assert judges.count(asked(str(truth)), f"I see {word}") == 1


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("5", ("5", False)), ("2 + 3\n= 5", ("= 5", False)), ("So the answer is: 5", ("5", True)),
        ("Answer: 4\nno, Answer: 5\nDone.", ("5", True)), (r"Hence \boxed{\frac{1}{2}}.", (r"\frac{1}{2}", True)),
        (r"\boxed{1} or \boxed{2}", ("2", True)), (r"the answer is 3, \boxed{4}", ("4", True)),
        (r"\boxed{1", (r"\boxed{1", False)), ("I will answer the question.\n5", ("5", False)),
    ],
)  # fmt: skip
def test_results_of_worked_answers(answer, result):
    assert judges.stated(answer) == result


FOUR = {"A": "30°", "B": "45", "C": "a kite", "D": "B"}


@pytest.mark.parametrize(
    ("truth", "kind", "said", "score"),
    [
        ("C", "multi_choice", "C", 1), ("C", "multi_choice", "(C) a kite", 1), ("C", "multi_choice", "A kite.", 1),
        ("C", "multi_choice", "It has two axes.\nAnswer: C", 1), ("C", "multi_choice", r"\boxed{\text{C}}", 1),
        ("C", "multi_choice", "so it must be (C), which is a kite", 1), ("C", "multi_choice", "A", 0),
        ("D", "multi_choice", "B", 1),  # words come before letters
        ("5", "integer", "5", 1), ("5", "integer", "The answer is 5 cm, as 2 + 3 = 5.", 1), ("5", "integer", "5.9", 1),
        ("5", "integer", "It is 2 + 3 = 5", 1), ("5", "integer", "Answer: 6, not 5", 0),
        ("1200", "integer", "1,200", 1),
        ("-5", "integer", "−5", 1), ("5", "integer", "$5$", 1), ("0", "integer", "1", 0),
        ("1.2", "float 1", "1.24", 1), ("1.2", "float 1", "1.26", 0), ("0.67", "float 2", "2/3", 1),
        ("0.60", "float 2", "0.6", 1), ("[1, 2]", "list", "so [3], then [1,2.0]", 1), ("[1, 2]", "list", "[2, 1]", 0),
    ],
)  # fmt: skip
def test_mathvista(truth, kind, said, score):
    options = FOUR if kind == "multi_choice" else {}
    assert judges.mathvista(asked(truth, options=options, kind=kind), said) == score


@pytest.mark.parametrize(
    ("truth", "kind", "said"),
    [
        ("C", "multi_choice", "a kit"),  # the published script takes the most similar option
        ("C", "multi_choice", "(A) 30° (B) 45 (C) a kite (D) B"), ("C", "multi_choice", "none of them"),
        ("5", "integer", "five"), ("5", "integer", "I don't know"), ("[1]", "list", "1"),
        ("5", "integer", "5" * 20_001),
    ],
)  # fmt: skip
def test_mathvista_cannot_read(truth, kind, said):
    options = FOUR if kind == "multi_choice" else {}
    with pytest.raises(ValueError, match=r"none of the options|no number|no list|at most"):
        judges.mathvista(asked(truth, options=options, kind=kind), said)


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        ("12", "12", 1), ("12", r"Thus \boxed{12}", 1), ("12", r"\boxed{x = 12}", 1), ("12", "The answer is 12.", 1),
        ("12", "12.004", 1), ("12", "12.02", 0), ("12", "The area is 12 cm", 1), ("12", "21", 0), ("12", "0", 0),
        (r"\frac{1}{3}", r"\boxed{\frac{1}{3}}", 1), (r"\frac{1}{3}", "1/3", 1), (r"\frac{1}{3}", "0.333", 1),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1), (r"6 \pi", "6π", 1), (r"6 \pi", "18.85", 1),
        ("60", r"$60^{\circ}$", 1),
        ("(3,4)", r"\boxed{(3, 4)}", 1), ("(3,4)", "(4,3)", 0), ("Tuesday", "Answer: tuesday", 1),
        ("Tuesday", "Monday", 0),
        (r"2\sqrt{3}", "√12 is 3.46", 1), (r"\frac{1}{3}", r"\dfrac{1}{3}", 1), (r"\frac{1}{3}", "1:3", 1),
    ],
)  # fmt: skip
def test_mathvision(truth, said, score):
    assert judges.mathvision(asked(truth), said) == score


def test_mathvision_with_options():
    question = asked("B", options={"A": "12", "B": r"\frac{1}{2}", "C": "C"})
    right = [judges.mathvision(question, said) for said in ("B", r"\boxed{B}", r"\boxed{\frac{1}{2}}", "so it is (B).")]
    assert right == [1.0] * 4
    assert judges.mathvision(question, "Answer: A") == 0
    with pytest.raises(ValueError, match="names none of the options"):
        judges.mathvision(question, "0")


CLIP = {"A": "Apples.", "B": "Candles.", "C": "Berries."}


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("C", 1), ("(C)", 1), ("C.", 1), ("C. Berries.", 1), ("berries", 1), ("The answer is (C).", 1),
        (r"\boxed{C}", 1),
        ("C\nbecause they come last", 1), ("They come last.\nC", 1), ("The best one is (C), as they come last", 1),
        ("B", 0), ("Berries come last.\nAnswer: B", 0),
    ],
)  # fmt: skip
def test_an_option_that_is_picked(said, score):
    assert judges.picked(asked("C", options=CLIP), said) == score


@pytest.mark.parametrize(
    "said",
    ["", "E", "A or C", "C. Apples.", "(A) Apples.\n(B) Candles.\n(C) Berries.", "A\nB\nC", "I think C is right", "0"],
)
def test_what_picks_no_option(said):
    with pytest.raises(ValueError, match=r"empty|names"):
        judges.picked(asked("C", options=CLIP), said)


HOSTILE = (
    "\\boxed{" * 2500, "answer is " * 1900, "[" * 19_000, "(" * 19_000, "\\text{" * 3000, "1," * 9000, "{" * 19_000,
    "\\frac{1}{" * 1500, "-" * 19_000, "9" * 19_000, "a-" * 9000, ". " * 9000, "\n" * 19_000, "'s" * 9000, "1/" * 900,
    "\\boxed{" + "(" * 190 + "}", "\\boxed{" + "9^" * 90 + "9}", "9" * 1999, "a b " * 490,
)  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "question"),
    [
        (judges.relaxed, asked("14")), (judges.contained, asked("q=2", kind=judges.FORMULAS)),
        (judges.anls, asked("the right words " * 20)), (judges.consensus, asked(*["a"] * 10)),
        (judges.count, asked("7")),
        (judges.mathvista, asked("5", kind="integer")), (judges.mathvista, asked("[1]", kind="list")),
        (judges.mathvista, asked("C", options=FOUR, kind="multi_choice")), (judges.mathvision, asked("2\\sqrt{3}")),
        (judges.picked, asked("C", options=CLIP)), (judges.choice, asked("C", options=CLIP)),
    ],
)  # fmt: skip
def test_hostile_answers_cost_little_and_raise_nothing_else(judge, question):
    started = time.process_time()
    for said in HOSTILE:
        with contextlib.suppress(ValueError):  # malformed
            assert judge(question, said) < 1
    assert time.process_time() - started < 2.0  # all of them; milliseconds each
