"""The suite of tasks with several turns: gold is right, nothing and guesses are not; names and categories choose."""

from __future__ import annotations

import sys

import pytest

from evals.baselines import BaselineAgent
from evals.runner import Options, evaluate_now
from evals.suite import choose_tasks
from evals.suites.tasks import MANY_TURNS, tasks
from evals.summary import summarise
from mmagent.tasks import all_tasks

QUIET = Options(progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="programs run in cells of Linux")
@pytest.mark.parametrize("kind, least, most", [("gold", 1.0, 1.0), ("null", 0.0, 0.0), ("random", 0.0, 0.1)])
def test_baselines_of_tasks(kind, least, most, tmp_path):
    run = evaluate_now(tasks(per_task=2), BaselineAgent(kind), tmp_path, QUIET)
    assert len(run.rows) == 2 * len(run.pins["suite.tasks"].split(", "))
    assert least <= summarise(run.rows).score.mean <= most


def test_tasks_go_by_name_or_by_category():
    assert tasks(["games", "functions"]).tasks == (*all_tasks()["games"], "functions")
    assert choose_tasks(tasks(), ["maze"]).tasks == ("games/maze",)
    assert set(tasks().tasks) == {task for category in MANY_TURNS for task in all_tasks()[category]}
    assert not tasks().needs_browser
    assert tasks(["gui-step"]).needs_browser
    with pytest.raises(ValueError, match="unknown task 'game'; did you mean 'games'"):
        tasks(["game"])
