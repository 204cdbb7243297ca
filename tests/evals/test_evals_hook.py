"""Evaluation inside training: numbers arrive in the metrics, and training does not notice."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from evals_kit import RuleAgent, gold, guess_suite
from torch import nn

from evals.hook import EvaluationHook, smaller
from evals.store import read_run
from mmagent.dist import World, run_ranks


def test_every_so_often_numbers_arrive(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()

    def agent(step):
        assert not model.training
        torch.rand(3), np.random.rand(), random.random()
        return RuleAgent(gold if step >= 4 else lambda *_: "", pins={"policy.step": str(step)})

    hook = EvaluationHook(guess_suite(3), agent, model, tmp_path, every=2)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    history = {}
    for step in range(1, 6):
        history[step] = {"loss": 1.0}
        hook(step, history[step])
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == before
    assert [module.training for module in model] == [True, False]
    assert [step for step, metrics in history.items() if "eval/guess" in metrics] == [2, 4]
    assert (history[2]["eval/guess"], history[4]["eval/guess"]) == (0.0, 1.0)
    assert history[4]["eval/guess/errors"] == 0.0
    assert history[4]["eval/guess/low"] < 1.0 == history[4]["eval/guess/high"]
    assert read_run(tmp_path / "step-00000004" / "guess").pins["policy.step"] == "4"


def test_fewer_items_while_training(tmp_path):
    hook = EvaluationHook(smaller(guess_suite(9), 2), lambda _: RuleAgent(gold), nn.Linear(1, 1), tmp_path, every=1)
    hook(1, {})
    assert len(read_run(tmp_path / "step-00000001" / "guess").rows) == 4


def on_ranks(world: World, folder: str) -> tuple[str, float]:
    """What every rank hears where rank 0 has no agent to judge, and the score once it has one."""

    def agent(step: int) -> RuleAgent:
        if step == 1:
            raise ValueError("no such checkpoint")
        return RuleAgent(gold)

    hook = EvaluationHook(guess_suite(2), agent, nn.Linear(1, 1), Path(folder), every=1, world=world)
    try:
        hook(1, {})
        said = "nothing"
    except ValueError as error:
        said = str(error)
    metrics: dict[str, float] = {}
    hook(2, metrics)
    return said, metrics["eval/guess"]


def test_no_rank_waits_for_an_evaluation_that_failed(tmp_path):
    first, second = run_ranks(on_ranks, 2, str(tmp_path))
    assert first == ("no such checkpoint", 1.0)
    assert second == ("rank 0 could not evaluate: ValueError: no such checkpoint", 1.0)


def test_every_is_checked(tmp_path):
    with pytest.raises(ValueError, match="every"):
        EvaluationHook(guess_suite(), lambda _: RuleAgent(gold), nn.Linear(1, 1), tmp_path, every=0)
