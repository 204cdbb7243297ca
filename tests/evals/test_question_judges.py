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
        ("12 May", "12\nmay 2019", "", 1), ("total", "ＴＯＴＡＬ", "", 0),  # as in its authors' script
         ("a b", "ab", "", 0),
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
        ("D", "multi_choice", "B", 0), ("B", "multi_choice", "B", 1),  # a letter comes before words
        ("5", "integer", "5", 1), ("5", "integer", "The answer is 5 cm, as 2 + 3 = 5.", 1), ("5", "integer", "5.9", 1),
        ("5", "integer", "It is 2 + 3 = 5", 1), ("5", "integer", "Answer: 6", 0),
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
        ("5", "integer", "five"), ("5", "integer", "I don't know"), ("5", "integer", "Answer: 6, not 5"),
        ("[1]", "list", "1"),
        ("5", "integer", "5" * 20_001),
    ],
)  # fmt: skip
def test_mathvista_cannot_read(truth, kind, said):
    options = FOUR if kind == "multi_choice" else {}
    with pytest.raises(ValueError, match=r"none of the options|no number|no list|are no numbers|part of|at most"):
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
        (r"2\sqrt{3}", "√12 is 3.46", 1), (r"\frac{1}{3}", r"\dfrac{1}{3}", 1),
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


def verdict(judge, question, said):
    """What a judge says; None for an answer that cannot be read."""
    try:
        return judge(question, said)
    except ValueError:
        return None


FORMULAS = {"A": r"$\frac{1}{2}$", "B": "$2$", "C": r"\text{none}", "D": r"$3\,\mathrm{cm}$", "E": "$12$"}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        (r"\boxed{2}", "B"), (r"\boxed{$2$}", "B"), (r"\boxed{\frac{1}{2}}", "A"), (r"\boxed{\text{None}}", "C"),
        (r"\boxed{E. 12}", "E"), (r"\boxed{E)\ 12}", "E"), (r"\boxed{E. $12$}", "E"), (r"\boxed{(E)12}", "E"),
        (r"\boxed{E:\ 12}", "E"), (r"\boxed{A. $\dfrac{1}{2}$}", "A"), (r"\boxed{A) 0.5}", "A"), (r"\boxed{2.0}", "B"),
        (r"\boxed{\frac12}", "A"), (r"\boxed{\frac{24}{2}}", "E"), (r"\boxed{3 cm}", "D"),
        (r"\boxed{3 \text{ cm}}", "D"),
        (r"\boxed{\textbf{B}}", "B"), (r"\boxed{\mathsf{B}}", "B"), (r"\boxed{\mathbf{B}}", "B"),
        (r"\boxed{\rm B}", "B"),
        (r"\boxed{{\rm B}}", "B"), (r"\boxed{\textit{B}}", "B"), (r"\boxed{\boldsymbol{B}}", "B"),
        (r"\boxed{\mathit{B}}", "B"), (r"\boxed{\textbf{(B)}}", "B"), (r"\boxed{\textbf{\text{B}}}", "B"),
        (r"\boxed{\mathbf{(B)}\ 2}", "B"), (r"\boxed{\textbf{(B) } 2}", "B"), ("**Answer:** B", "B"), ("**B**", "B"),
        ("The answer is (B) $2$.", "B"),
        (r"\boxed{E. 2}", None), (r"\boxed{7}", None), (r"\boxed{2 or 12}", None), (r"\boxed{F}", None),
        (r"\boxed{3 \text{ kg}}", None), (r"\boxed{12\sqrt{3}}", None),
    ],
)  # fmt: skip
def test_options_may_be_formulas(said, letter):
    for truth in FORMULAS:
        expected = None if letter is None else float(truth == letter)
        question = asked(truth, options=FORMULAS, kind="multi_choice")
        assert verdict(judges.mathvision, question, said) == expected
        assert verdict(judges.mathvista, question, said) == expected


def test_options_are_named_by_a_value_that_no_other_has():
    question = asked("B", options={"A": "1.5", "B": "2.0", "C": "4"})
    assert verdict(judges.mathvision, question, r"\boxed{2}") == 1
    assert verdict(judges.mathvision, question, r"\boxed{\sqrt{16}}") == 0
    lengths = asked("A", options={"A": "2 cm", "B": "2 m", "C": "2.00 m"})
    assert [verdict(judges.mathvision, lengths, rf"\boxed{{{said}}}") for said in ("2", "2 cm", "2.0 m", "2 km")] == [
        None, 1, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said", "letter"),
    [
        ({"A": "C", "B": "A", "C": "B"}, "A", "A"), ({"A": "C", "B": "A", "C": "B"}, "(A)", "A"),
        ({"A": "C", "B": "A", "C": "B"}, "a.", "A"), ({"A": "C", "B": "A", "C": "B"}, "A. C", "A"),
        ({"A": "C", "B": "A", "C": "B"}, "A) B", None), ({"A": "x", "B": "E"}, "E", "B"),
        ({"A": "Gg", "B": "gg"}, "gg", "B"), ({"A": "Gg", "B": "gg"}, "Gg", "A"), ({"A": "Gg", "B": "gg"}, "GG", None),
        ({"A": "Gg", "B": "gg"}, "B. gg", "B"), ({"A": "$5", "B": "5"}, "5", "B"), ({"A": "$5", "B": "5"}, "$5", "A"),
        ({"A": "", "B": "x"}, ".", None), ({"A": "a kite", "B": "b"}, "A kite", "A"),
    ],
)  # fmt: skip
def test_letters_come_before_words(options, said, letter):
    if letter is None:
        with pytest.raises(ValueError, match="names none of the options"):
            judges.chosen(options, said)
    else:
        assert judges.chosen(options, said) == letter


@pytest.mark.parametrize(
    ("said", "score"), [("A", 1), ("B", 1), ("5", 1), ("B. 5", 1), ("C", 0), ("7", 0), ("D. 5", None)]
)
def test_options_of_the_same_words_are_one(said, score):
    options = {"A": "5", "B": "5", "C": "7", "D": "8"}
    for truth in "AB":
        question = asked(truth, options=options, kind="multi_choice")
        for judge in (judges.choice, judges.picked, judges.mathvista, judges.mathvision):
            assert verdict(judge, question, said) == score
    assert judges.picked(asked("A", options=options), "B\nbecause it is\n5") == 1  # which name the same


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        ("12", r"\boxed{12\sqrt{3}\text{ cm}}", 0), (r"12\sqrt{3}", r"\boxed{12\sqrt{3}\text{ cm}}", 1),
        ("5", r"\boxed{5\sqrt[3]{2}}", None), (r"5\sqrt[3]{2}", r"\boxed{5 \sqrt[3]{2}}", 1),
        ("5", r"\boxed{5x}", None), ("5", r"\boxed{5 or 7}", None), ("5", r"\boxed{5, 6, 7}", None),
        ("5", r"\boxed{5ab}", None), ("5", r"\boxed{5 million}", None), ("5", r"\boxed{5 and a half}", None),
        (r"2\pi", r"\boxed{2\pi \text{ cm}}", 1), ("2", r"\boxed{2\pi \text{ cm}}", 0),
        ("5", r"\boxed{5 less than 9}", None),
        ("5", r"\boxed{5 less than six}", None), ("5", r"\boxed{5 \pm 2}", None), ("5", r"\boxed{x > 5}", None),
        ("5", r"\boxed{5i}", None), ("5", r"\boxed{5!}", None), ("2", r"\boxed{2 dozen}", None),
        ("5", r"\boxed{x=5, y=7}", None), ("7", r"\boxed{x=5, y=7}", None), ("7", r"\boxed{5 = 7}", 1),
        ("12", r"\boxed{\frac12}", 0), ("0.5", r"\boxed{\frac12}", 1), ("0.5", r"\boxed{\frac1{2}}", 1),
        ("0.5", r"\boxed{\frac{1}2}", 1), (r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt3}2}", 1),
        ("10", r"\boxed{10^{2}\text{ units}}", 0), ("100", r"\boxed{10^{2}\text{ units}}", 1),
        ("2", r"Answer: 2\sqrt{3}", 0), ("10", "Answer: 10^3", 0), ("1000", "Answer: 10^3", 1),
        ("5", "The answer is not 5 but 6", None), ("6", "The answer is not 5 but 6", None),
        ("5", r"\boxed{5 \text{ cm}^2}", 1), ("5", r"\boxed{5\,\text{apples}}", 1), ("5", r"\boxed{5cm}", 1),
        ("5", r"\boxed{5 km/h}", 1), ("5", r"\boxed{5\%}", 1), ("5", r"\boxed{\$5}", 1), ("5", r"\boxed{-5}", 0),
        ("5", r"\boxed{5^\circ}", 1), ("5", r"\boxed{5^{\circ}\text{C}}", 1),
        ("5", r"\boxed{5 \text{ square units}}", 1),
        ("40\\%", r"\boxed{40}", 1), ("40\\%", r"\boxed{40\%}", 1), ("40\\%", r"\boxed{40 cm}", 0),
        ("5", "The answer is 5. The rest follows.", 1), ("5", "The answer is 5, as 2 + 3 = 5.", 1),
        ("5", "Answer: about 5", 1), ("3.46", r"\boxed{2\sqrt{3} \approx 3.46}", 1), ("6", r"\boxed{2*3}", 1),
        ("23", r"\boxed{2*3}", 0), ("8", r"\boxed{2**3}", 1), ("23", r"\boxed{2**3}", 0),
        ("2.5", r"\boxed{2\frac{1}{2}}", 1), (r"2\frac{1}{2}", r"\boxed{2.5}", 1), (r"2\frac12", r"\boxed{\frac52}", 1),
        ("-2.5", r"\boxed{-2\frac{1}{2}}", 1), ("2.5", "2 1/2", 1), ("1", r"\boxed{2\frac{1}{2}}", 0),
        ("3", r"\boxed{2\frac{3}{2}}", 1),  # no proper fraction: a product
        ("28800", r"\boxed{28{,}800}", 1), ("28800", r"\boxed{28\,800}", 1), ("1,000", "1000", 1), ("1000", "1,000", 1),
        ("1,000", "1", 0), ("23", r"\boxed{2,3}", None),
    ],
)  # fmt: skip
def test_what_is_stated_is_a_value_as_a_whole(truth, said, score):
    assert verdict(judges.mathvision, asked(truth), said) == score


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        ("C", r"\boxed{(C)}", 1), ("C", "The answer is (C).", 1), ("C", "C", 1), ("C", r"\boxed{\textbf{(C)}}", 1),
        ("C", r"\boxed{D}", 0), ("E", r"\boxed{2.72}", 0), ("E", r"\boxed{E}", 1), ("E", r"\boxed{e}", 1),
        ("2.72", r"\boxed{e}", None), ("Tuesday", "The answer is Tuesday. It rains.", 1),
        ("Tuesday", "It is Tuesday.", 1),
        ("15:15", r"\boxed{15:15}", 1), ("15:15", r"\boxed{1}", 0), ("12:30", r"\boxed{6:15}", 0),
        ("1:2", "1 : 2", 1), ("1:2", r"\boxed{1\colon 2}", 1), ("1:2", r"\boxed{2:4}", 0),
        ("0.5", r"\boxed{1:2}", None),
        ("2", "1:2", None), ("2", "so 1 : 2", None), ("5", "so 5²", None),
        ("(1,2)", r"\boxed{(1.0, 2)}", 1), ("(1,2)", r"\boxed{\left(1, \frac{4}{2}\right)}", 1),
        ("(1,2)", r"\boxed{[1,2]}", 0), ("(1,2)", r"\boxed{(2,1)}", 0), ("(1,2)", r"\boxed{(1,2,3)}", 0),
        ("(1,2)", r"\boxed{12}", 0), ("(1,2)", r"\boxed{(x,y) = (1,2)}", 1), ("[0,2)", r"\boxed{[0, 2.0)}", 1),
        ("[0,2)", r"\boxed{[0, 2]}", 0), (r"\{1,2\}", r"\boxed{\{1, 2.0\}}", 1), ("3,5", r"\boxed{3, 5.0}", 1),
        ("3,5", r"\boxed{5, 3}", 0), ("(1,2),(3,4)", r"\boxed{(1,2), (3.0,4)}", 1), ("x=1,y=2", r"\boxed{y=1,x=2}", 0),
        ("x=1,y=2", r"\boxed{x=1, y=2}", 1), ("((1,2),3)", r"\boxed{((1,2.0),3)}", 1),
    ],
)  # fmt: skip
def test_texts_ratios_and_tuples(truth, said, score):
    assert verdict(judges.mathvision, asked(truth), said) == score


@pytest.mark.parametrize(
    ("truth", "kind", "said", "score"),
    [
        ("1", "integer", r"\boxed{\frac{1}{2}}", 0), ("2", "integer", r"Answer: 2\sqrt{3}", 0),
        ("3", "integer", r"Answer: 2\sqrt{3}", 1), ("10", "integer", "Answer: 10^3", 0),
        ("5", "integer", "The answer is not 5 but 6", None), ("1.5", "float 1", r"\boxed{1.5 \times 10^{1}}", 0),
        ("15.0", "float 1", r"\boxed{1.5 \times 10^{1}}", 1), ("230", "integer", r"\boxed{2.3 \times 100}", 1),
        ("5", "integer", r"\boxed{\sqrt{-25}}", None), ("5", "integer", r"\boxed{$5.00}", 1),
        ("100", "integer", "x" * 5000 + " so 100", 1), ("100", "integer", "100 " + "x" * 5000, None),
        ("2000", "integer", "It spans 1990-2000", 1), ("-2000", "integer", "It spans 1990-2000", 0),
        ("-5", "integer", "It falls to -5 in the end", 1), ("5", "integer", "there are 4, 5", 1),
        ("3", "integer", r"So we get $2\sqrt{3}$ here", None), ("3", "integer", "that makes 10^3 of them", None),
        ("2", "integer", "in all 12 cm2", 0), ("12", "integer", "in all 12 cm", 1), ("5", "integer", "we get 5x", None),
        ("1200", "integer", "in all 1,200 people", 1), ("200", "integer", "in all 1,200 people", 0),
        ("3", "integer", "they see 1,2,3 of them", 1), ("0.5", "float 1", "half, so 1/2 of them", 1),
        ("9", "integer", "9" * 30, None), ("5", "integer", "in 5 of 10 years there were\n5 of them", 1),
        ("[100, 200]", "list", "[100,200]", 1), ("[100, 200]", "list", r"\boxed{[100, 200.0]}", 1),
        ("[100200]", "list", "[100,200]", 0), ("[100, 200]", "list", "[100, 200, 300]", 0),
        ("[-1, 2]", "list", "[−1, 2]", 1), ("[1, 2]", "list", "[1-1, 2]", 0), ("[1, 2]", "list", "[one, 2]", None),
        ("[1, 2]", "list", "x" * 5000 + "[1, 2]", 1),
    ],
)  # fmt: skip
def test_numbers_of_mathvista(truth, kind, said, score):
    assert verdict(judges.mathvista, asked(truth, kind=kind), said) == score


@pytest.mark.parametrize(
    ("truth", "said", "score"),
    [
        ("21", "twenty one", 1), ("21", "There are twenty-one.", 1), ("20", "twenty one", 0), ("23", "2,3", None),
        ("2", "2,3", None), ("2300", "2,300", 1), ("1", "1,0074", None), ("5", "there are 5 of them, one is red", None),
        ("7", "5-7", None), ("-7", "it is -7", 1),
    ],
)  # fmt: skip
def test_counts_that_may_be_read_two_ways(truth, said, score):
    assert verdict(judges.count, asked(truth), said) == score


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
    "\\boxed{" + "(," * 99 + "}", "\\boxed{" + "\\frac" * 33 + "}", "=" * 1900, "$" * 1900, "**" * 950,
    "\\boxed{" + "5 cm " * 39 + "}", "1 " * 999, "\\text{\\bf " * 180, "~" * 1999, "1:" * 999, "Answer: " + "5 m/" * 70,
    "\\boxed{" + "(" * 190 + "}", "\\boxed{" + "9^" * 90 + "9}", "9" * 1999, "a b " * 490,
)  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "question"),
    [
        (judges.relaxed, asked("14")), (judges.contained, asked("q=2", kind=judges.FORMULAS)),
        (judges.anls, asked("the right words " * 20)), (judges.consensus, asked(*["b"] * 10)),
        (judges.count, asked("7")),
        (judges.mathvista, asked("5", kind="integer")), (judges.mathvista, asked("[1]", kind="list")),
        (judges.mathvista, asked("C", options=FOUR, kind="multi_choice")), (judges.mathvision, asked("2\\sqrt{3}")),
        (judges.mathvision, asked("(1,2)")), (judges.mathvision, asked("Tuesday")),
        (judges.mathvision, asked("E", options=FORMULAS)), (judges.picked, asked("C", options=CLIP)),
        (judges.choice, asked("C", options=CLIP)),
    ],
)  # fmt: skip
def test_hostile_answers_cost_little_and_raise_nothing_else(judge, question):
    started = time.process_time()
    for said in HOSTILE:
        with contextlib.suppress(ValueError):  # malformed
            assert judge(question, said) < 1
    assert time.process_time() - started < 2.0  # all of them; milliseconds each


@pytest.mark.parametrize(
    "unit", ["\\text{", "9", "$", "(A) ", "[1,", "5 cm ", "=1", "\\frac", "**", "answer: ", "\n5", "1,"]
)
@pytest.mark.parametrize("length", [2_000, 20_000, 100_000])
def test_long_answers_take_milliseconds(unit, length):
    said = (unit * (length // len(unit) + 1))[:length]
    for judge, question in (
        (judges.mathvista, asked("5", kind="integer")), (judges.mathvista, asked("[1]", kind="list")),
        (judges.mathvision, asked("2\\sqrt{3}")), (judges.mathvision, asked("E", options=FORMULAS)),
        (judges.picked, asked("C", options=CLIP)), (judges.choice, asked("C", options=CLIP)),
        (judges.count, asked("7")),
    ):  # fmt: skip
        started = time.process_time()
        verdict(judge, question, said)
        assert time.process_time() - started < 0.05
