"""Curriculum weights, the oversampling factor, and an item stream that resumes exactly."""

from __future__ import annotations

from collections import Counter
from itertools import count, cycle, islice

import pytest

from mmagent.agent.curriculum import Curriculum, CurriculumConfig, ItemStream
from mmagent.agent.difficulty import Grades
from mmagent.trajectories import Item


class Numbers:
    category = "toy"

    def __init__(self, name: str, limit: int | None = None):
        self.name, self.limit = name, limit

    def items(self, split: str, seed: int):
        for n in count():
            if self.limit is not None and n >= self.limit:
                return
            yield Item(self.name, f"{split}-{seed}-{n}", n)


def test_tasks_of_middling_difficulty_are_drawn_most():
    curriculum = Curriculum(["hard", "middle", "easy", "new"], CurriculumConfig(floor=0.1))
    assert set(curriculum.weights().values()) == {0.25}
    curriculum.update({"hard": 0.02, "middle": 0.5, "easy": 1.0}, degenerate_share=0.0)
    weights = curriculum.weights()
    assert weights["middle"] == weights["new"] > weights["hard"] == weights["easy"] > 0
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights["easy"] == pytest.approx(0.1 * weights["middle"])


def test_averages_and_oversampling_by_hand():
    curriculum = Curriculum(["a"], CurriculumConfig(decay=0.5, max_oversampling=3.0))
    curriculum.update({"a": 0.4}, degenerate_share=0.5)
    curriculum.update({"a": 0.8}, degenerate_share=0.5)
    assert curriculum.pass_rate["a"] == pytest.approx(0.6)
    assert curriculum.oversampling == pytest.approx(0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 2)
    assert curriculum.draws(8) == 14
    for _ in range(50):
        curriculum.update({}, degenerate_share=1.0)
    assert curriculum.draws(8) == 24


def test_all_solved_tasks_still_have_weights():
    curriculum = Curriculum(["a", "b"])
    curriculum.update({"a": 1.0, "b": 1.0}, degenerate_share=1.0)
    assert curriculum.weights() == {"a": 0.5, "b": 0.5}


def test_draws_follow_the_weights_and_do_not_repeat():
    stream = ItemStream([Numbers("a"), Numbers("b")], "train", seed=3)
    drawn = [pair for _ in range(5) for pair in stream.draw(8, {"a": 0.75, "b": 0.25})]
    assert Counter(task.name for task, _ in drawn) == {"a": 30, "b": 10}
    assert len({(item.task, item.key) for _, item in drawn}) == 40


def test_resume_is_exact():
    weights = {"a": 0.6, "b": 0.4}
    whole = ItemStream([Numbers("a"), Numbers("b")], "train", seed=0)
    expected = [whole.draw(5, weights) for _ in range(4)]
    first = ItemStream([Numbers("a"), Numbers("b")], "train", seed=0)
    for _ in range(2):
        first.draw(5, weights)
    second = ItemStream([Numbers("a"), Numbers("b")], "train", seed=0)
    second.load_state_dict(first.state_dict())
    keys = [[item.key for _, item in second.draw(5, weights)] for _ in range(2)]
    assert keys == [[item.key for _, item in draw] for draw in expected[2:]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no more than 2 items"):
        ItemStream([Numbers("a", limit=2)], "train", seed=0).draw(3, {"a": 1.0})
    with pytest.raises(ValueError, match="distinct"):
        ItemStream([Numbers("a"), Numbers("a")], "train", seed=0)
    with pytest.raises(ValueError, match="saved for tasks"):
        Curriculum(["a"]).load_state_dict(Curriculum(["b"]).state_dict())
    with pytest.raises(ValueError, match="unknown task"):
        Curriculum(["a"]).update({"b": 1.0}, 0.0)


def graded(folder, **counts) -> str:
    Grades({"a": counts}).save(folder / "grades.json")
    return str(folder / "grades.json")


def test_items_are_drawn_stage_by_stage_as_hard_as_they_were_found(tmp_path):
    """Of six graded items, those right in a half of their tries come first, the hard one from collection 5 on."""
    rates = {f"train-0-{n}": (right, 8) for n, right in enumerate((8, 4, 0, 1, 5, 8))}
    path = graded(tmp_path, **rates)
    config = CurriculumConfig(grades=path, bands={0: [0.25, 0.75], 5: [0.1, 0.2]})
    curriculum = Curriculum(["a", "b"], config)
    assert curriculum.pass_rate["a"] == pytest.approx((8 + 4 + 0 + 1 + 5 + 8) / 48)
    assert curriculum.pass_rate["b"] is None

    def drawn(collection: int, count: int) -> list[int]:
        stream = ItemStream([Numbers("a")], "train", 0)
        return [item.seed for _, item in stream.draw(count, {"a": 1.0}, curriculum.takes(collection))]

    assert sorted(drawn(4, 2)) == [1, 4]
    assert sorted(drawn(5, 1)) == [3]
    assert sorted(drawn(0, 4)) == [1, 4, 6, 7]  # behind the graded ones come such as nobody has tried
    assert Curriculum(["a"], CurriculumConfig(grades=path)).takes(0) is None


def test_items_that_come_round_without_one_in_the_band_are_told(tmp_path):
    """A task of the user's own, of a few items without end: it was asked for another for ever."""

    class Round(Numbers):
        def items(self, split, seed):
            return cycle(list(islice(super().items(split, seed), 3)))

    path = graded(tmp_path, **{f"train-0-{n}": (8, 8) for n in range(3)})
    takes = Curriculum(["a"], CurriculumConfig(grades=path, bands={0: [0.0, 0.5]})).takes(0)
    with pytest.raises(ValueError, match=r"a: none of its 3 train items is as hard as curriculum.bands ask"):
        ItemStream([Round("a")], "train", 0).draw(1, {"a": 1.0}, takes)


def test_a_stream_with_bands_resumes_where_it_was(tmp_path):
    path = graded(tmp_path, **{f"train-0-{n}": (n % 2, 1) for n in range(40)})
    takes = Curriculum(["a"], CurriculumConfig(grades=path, bands={0: [1.0, 1.0]})).takes(0)
    whole = ItemStream([Numbers("a")], "train", 0)
    first = whole.draw(3, {"a": 1.0}, takes)
    state = whole.state_dict()
    other = ItemStream([Numbers("a")], "train", 0)
    other.load_state_dict(state)
    later = [[item for _, item in stream.draw(5, {"a": 1.0}, takes)] for stream in (whole, other)]
    assert later[0] == later[1]
    assert [item.seed for _, item in first] == [1, 3, 5]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bands": {0: [0.2, 0.9]}}, "name a file of curriculum.grades"),
        ({"grades": "x", "bands": {0: [0.9, 0.2]}}, r"no \[least, most\]"),
        ({"grades": "x", "bands": {-1: [0.2, 0.9]}}, "-1"),
    ],
)
def test_what_no_stage_can_be_is_named(settings, told):
    with pytest.raises(ValueError, match=told):
        CurriculumConfig(**settings)
