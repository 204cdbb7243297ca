"""A checkpoint folder, and a live model, judged in process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evals_kit import guess_suite

import evals.__main__ as command
from evals.hook import EvaluationHook
from evals.local import LocalAgent
from evals.runner import Options, evaluate_now
from evals.store import read_run
from evals.suite import Play
from evals.suites import SUITES
from evals.summary import summarise
from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import Agent, save_agent
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.vocab import SPECIAL_TOKENS, Vocab

QUIET = Options(progress=False, concurrency=4)
PLAY = Play(2, 6, rules="never shown to our own model")


@pytest.fixture(scope="module")
def agent() -> Agent:
    vocab = Vocab.train(["How bright is test-1? 17"], 256 + len(SPECIAL_TOKENS) + 10)
    torch.manual_seed(0)
    model = AgentModel(presets.debug(vocab.size, vocab.image_id)).eval()
    return Agent(model, vocab, GeometryConfig(min_tokens=1), ChatConfig())


@pytest.fixture
def folder(agent: Agent, tmp_path: Path) -> Path:
    save_agent(tmp_path / "agent", **agent._asdict())
    return tmp_path / "agent"


def test_a_folder_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "guess", lambda: guess_suite(3, play=PLAY))
    argv = ["guess", "--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    assert command.main(argv) == 0
    run = read_run(tmp_path / "out" / "guess")
    assert [row.error for row in run.rows] == [None] * 6
    assert summarise(run.rows).score.mean < 0.2  # random weights
    assert run.pins["policy.checkpoint"].startswith("agent (")
    assert run.pins["image_geometry"].startswith("patch_size 14")
    row = run.rows[0]
    assert row.prompt_tokens > 10
    assert 0 < row.completion_tokens <= 12
    assert row.steps[0].picture


def test_greedy_decoding_repeats(agent, tmp_path):
    runs = [evaluate_now(guess_suite(3, play=PLAY), LocalAgent(agent, "x"), tmp_path / str(n), QUIET) for n in range(2)]
    words = [{row.key: [(s.action, s.said) for s in row.steps] for row in run.rows} for run in runs]
    assert words[0] == words[1]


def test_another_checkpoint_in_the_same_place_is_refused(agent, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "guess", lambda: guess_suite(2, play=PLAY))
    argv = ["guess", "--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--quiet", "--limit", "1"]
    assert command.main(argv) == 0
    with torch.no_grad():
        agent.model.embedding.weight[0, 0] += 1
    save_agent(folder, **agent._asdict())
    assert command.main(argv) == 2
    assert "policy.checkpoint: 'agent (" in capsys.readouterr().err


def test_a_live_model_inside_training(agent, tmp_path):
    agent.model.train()
    hook = EvaluationHook(
        guess_suite(1, play=PLAY), lambda step: LocalAgent(agent, f"step {step}"), agent.model, tmp_path, every=1,
        options=QUIET,
    )  # fmt: skip
    metrics: dict[str, float] = {}
    hook(3, metrics)
    assert 0.0 <= metrics["eval/guess"] <= 1.0
    assert metrics["eval/guess/errors"] == 0.0
    assert agent.model.training
    agent.model.eval()
