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
