"""Offline difficulty: counts of recorded episodes, pass@k by hand, and files that hold something else."""

from __future__ import annotations

from itertools import combinations

import pytest

from mmagent.agent.difficulty import Grades, band_at, pass_at
from mmagent.trajectories import Item, Status, Trajectory


def ended(item: str, reward: float, status: Status = Status.FINISHED) -> Trajectory:
    row = Trajectory(f"maze/{item}#0", "maze", f"maze/{item}")
    row.reward, row.status = reward, status
    return row


def test_rates_are_of_tries_that_were_judged():
    rows = [ended("one", 1.0), ended("one", 0.4), ended("one", 0.0, Status.FAILED), ended("two", 0.5, Status.TRUNCATED)]
    grades = Grades.of(rows)
    assert grades.counts == {"maze": {"one": (1, 2), "two": (1, 1)}}
    assert grades.rate(Item("maze", "one", 0)) == 0.5
    assert grades.rate(Item("maze", "three", 0)) is None
    assert grades.rate(Item("other", "one", 0)) is None
    assert grades.task_rate("maze") == 0.75
    assert grades.task_rate("other") is None


def test_pass_at_k_is_the_chance_that_one_of_k_drawn_tries_is_right():
    tries = [True] * 2 + [False] * 4
    drawn = list(combinations(tries, 3))
    assert pass_at(2, 6, 3) == pytest.approx(sum(map(any, drawn)) / len(drawn))
    assert (pass_at(0, 8, 8), pass_at(1, 8, 8)) == (0.0, 1.0)
    grades = Grades({"a": {"x": (2, 6), "y": (0, 6), "z": (1, 2)}})
    assert grades.pass_at("a", 3) == pytest.approx(pass_at(2, 6, 3) / 2)  # z was tried too seldom
    assert grades.pass_at("a", 7) is None
    with pytest.raises(ValueError, match="pass@4 of 1 right among 3"):
        pass_at(1, 3, 4)


def test_the_last_stage_that_has_begun_holds():
    bands = {10: [0.1, 0.2], 0: [0.3, 0.9]}
    assert [band_at(bands, n) for n in (0, 9, 10, 99)] == [(0.3, 0.9), (0.3, 0.9), (0.1, 0.2), (0.1, 0.2)]
    assert band_at({5: [0.1, 0.2]}, 4) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2, "counts": {}}', '{"format": 1, "counts": {"a": {"x": [2, 1]}}}']
)
def test_a_file_of_something_else_is_named(tmp_path, text):
    path = tmp_path / "grades.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"grades\.json"):
        Grades.load(path)
    with pytest.raises(ValueError, match="missing: grade items with"):
        Grades.load(tmp_path / "none.json")


def test_a_file_gives_back_what_was_saved(tmp_path):
    grades = Grades.of([ended("one", 1.0), ended("one", 0.0)])
    grades.save(tmp_path / "grades.json")
    assert Grades.load(tmp_path / "grades.json") == grades
