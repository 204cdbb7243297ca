"""Every suite proves itself in a real browser: gold answers score 1, empty and random ones about 0."""

from __future__ import annotations

import pytest
import torch

from evals.baselines import BASELINES, BaselineAgent
from evals.local import LocalAgent
from evals.runner import Options, evaluate_now
from evals.suite import Suite
from evals.suites import SUITES
from evals.suites.miniwob import miniwob
from evals.suites.pages import page_grounding, screenshot_to_html
from evals.suites.tasks import tasks
from evals.suites.worlds import worlds
from evals.summary import summarise
from mmagent.browser import find_chromium
from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import Agent
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.vocab import SPECIAL_TOKENS, Vocab
from tests.toy_tasks import ScriptedPolicy

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium; `apt-get install chromium-headless-shell`"),
]
SMALL = {
    "miniwob": lambda: miniwob(("click-test-2", "enter-text", "click-checkboxes", "drag-box"), per_task=2),
    "page_grounding": lambda: page_grounding((1, 5), per_task=5),
    "screenshot_to_html": lambda: screenshot_to_html((1, 2), per_task=3),
    "tasks": lambda: tasks(("functions", "search", "games/maze"), per_task=4),
    "worlds": lambda: worlds(("counting", "text"), per_task=5),
}
CEILING = {"miniwob": 0.3, "page_grounding": 0.3, "screenshot_to_html": 0.25, "tasks": 0.1, "worlds": 0.2}
"""What luck may reach on the few items of these tests."""


def judged(suite: Suite, kind: str, folder) -> float:
    run = evaluate_now(suite, BaselineAgent(kind), folder, Options(progress=False))
    assert [row.error for row in run.rows if row.error] == []
    assert ("browser" in run.pins) == suite.needs_browser
    for row in run.rows:
        if suite.name == "page_grounding":
            assert len(row.boxes) == 1
        if suite.name == "screenshot_to_html":
            assert row.pictures.keys() == ({"target"} if kind == "null" else {"target", "rendering"})
    return summarise(run.rows).score.mean


@pytest.mark.parametrize("name", SMALL)
def test_a_suite_proves_itself(name, tmp_path):
    score = {kind: judged(SMALL[name](), kind, tmp_path / kind) for kind in BASELINES}
    assert score["gold"] >= 0.99
    assert score["null"] <= 0.02
    assert score["random"] <= CEILING[name]


def test_a_page_that_is_cut_is_rendered_beside_its_target(tmp_path):
    vocab = Vocab.train(["<p>"], 256 + len(SPECIAL_TOKENS) + 2)
    torch.manual_seed(0)
    agent = LocalAgent(
        Agent(AgentModel(presets.debug(vocab.size, vocab.image_id)).eval(), vocab, GeometryConfig(), ChatConfig()), "x"
    )
    agent._policy = ScriptedPolicy(vocab, lambda *_: "<p>unfinished", stops=False)
    run = evaluate_now(screenshot_to_html((1,), per_task=1), agent, tmp_path, Options(progress=False))
    (row,) = run.rows
    assert (row.status, row.error, row.steps[0].action) == ("truncated", None, "<p>unfinished")
    assert row.pictures.keys() == {"target", "rendering"}
    assert row.parts.keys() == {"visual", "block", "text", "position"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_the_whole_suite_proves_itself(name, tmp_path):
    suite = SUITES[name]()
    run = evaluate_now(suite, BaselineAgent("gold"), tmp_path, Options(limit=max(2 * len(suite.tasks), 32)))
    assert [f"{row.key}: {row.error}" for row in run.errors] == []
    assert {task: e.mean for task, e in summarise(run.rows).by_task.items() if e.mean < 0.9} == {}


def test_every_suite_is_proven():
    assert SMALL.keys() == SUITES.keys()
