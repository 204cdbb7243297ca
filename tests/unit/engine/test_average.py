"""A moving average of weights: its formula, its exact resume, and that shards average like the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmagent.dist import World, run_ranks
from mmagent.engine.average import AverageConfig, WeightAverage
from mmagent.engine.checkpoint import gather_weights
from mmagent.train.loop import fit
from mmagent.train.run import Run
from tests.engine_kit import ALONE, SplitStream, toy_run


def trained(world: World, folder: str, parallel: str, steps: int) -> dict[str, torch.Tensor]:
    """The average after ``steps``, going on from whatever ``folder`` holds."""
    toy = toy_run(Path(folder), world, parallel, dropout=0.0)
    average = WeightAverage(toy.objective, AverageConfig(0.9))
    stream = SplitStream(world)
    run = Run(folder, world, {"model": toy.objective, "engine": toy.engine, "stream": stream, "average": average})
    fit(run, toy.objective, toy.engine, stream, steps=steps, hooks=[average])
    before = gather_weights(toy.objective)
    with average.in_place():
        seen = gather_weights(toy.objective)
        seen = {name: tensor.clone() for name, tensor in seen.items()}
    after = gather_weights(toy.objective)
    assert all(torch.equal(before[name], after[name]) for name in before), "the weights come back"
    return seen


def test_the_average_is_that_of_the_formula():
    """``d = min(decay, (1 + n) / (10 + n))``: 2/11, 3/12, then what was asked for."""
    linear = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(linear, AverageConfig(0.24))
    start = value = linear.weight.item()
    for n, weight in enumerate((1.0, -2.0, 5.0)):
        with torch.no_grad():
            linear.weight.fill_(weight)
        average(n + 1, {})
        decay = (2 / 11, 0.24, 0.24)[n]
        value = decay * value + (1 - decay) * weight
    assert start != value
    with average.in_place():
        assert linear.weight.item() == pytest.approx(value, rel=1e-6)
    assert linear.weight.item() == 5.0


def test_an_average_goes_on_bitwise(tmp_path):
    whole = trained(ALONE, str(tmp_path / "whole"), "none", 5)
    trained(ALONE, str(tmp_path / "parts"), "none", 2)
    parts = trained(ALONE, str(tmp_path / "parts"), "none", 5)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_shards_average_like_the_whole(tmp_path):
    """FSDP2 and DDP reduce gradients in the same order on two ranks, and AdamW and Muon are elementwise or gathered."""
    ddp = run_ranks(trained, 2, str(tmp_path / "ddp"), "ddp", 3)[0]
    sharded = run_ranks(trained, 2, str(tmp_path / "fsdp2"), "fsdp2", 3)[0]
    for name, tensor in ddp.items():
        torch.testing.assert_close(sharded[name], tensor, atol=1e-5, rtol=1e-4)
    alone = trained(ALONE, str(tmp_path / "fsdp2"), "none", 3)  # written by two ranks, read by one
    assert all(torch.equal(alone[name], tensor) for name, tensor in sharded.items())


def test_buffers_are_those_of_the_last_step():
    """Statistics that are not known yet are NaN, and an average would never forget that."""
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(float("nan"))
    average = WeightAverage(norm, AverageConfig(0.5))
    norm.running_mean.fill_(3.0)
    average(1, {})
    with average.in_place():
        assert norm.running_mean.tolist() == [3.0, 3.0]
    assert set(average.state_dict()["average"]) == {"weight", "bias"}


def test_without_decay_nothing_is_kept_and_a_change_of_mind_is_refused():
    linear = torch.nn.Linear(2, 2)
    off = WeightAverage(linear, AverageConfig())
    off(1, {})
    assert off.state_dict() == {"updates": 0, "average": {}}
    with off.in_place():
        pass
    on = WeightAverage(linear, AverageConfig(0.9))
    with pytest.raises(ValueError, match="the checkpoint has no average of weights, this run wants one"):
        on.load_state_dict(off.state_dict())
    with pytest.raises(ValueError, match="must lie in"):
        AverageConfig(1.0)


def test_a_batch_that_was_left_out_is_not_averaged(tmp_path):
    average = WeightAverage(torch.nn.Linear(2, 2), AverageConfig(decay=0.9))
    average(1, {"health/left_out": 0.0})
    average(2, {"health/left_out": 1.0})
    assert average.updates == 1
