"""The average of a run's newest checkpoints in the place of its weights, for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmagent.dist import World, run_ranks
from mmagent.engine import checkpoint
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.merging import MergeConfig
from mmagent.engine.pieces import CheckpointError
from mmagent.engine.sharding import gather_like
from mmagent.train.hooks import SaveHook
from mmagent.train.loop import fit
from mmagent.train.merged import JudgeMerged, merged_in_place
from tests.engine_kit import ALONE, toy_run


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(gather_like(t, t)).clone() for name, t in module.state_dict().items()}


def trained(world: World, folder: str, parallel: str) -> list[str]:
    """Train six steps; compare what is judged with the mean of what was saved. Returns what was judged, by step."""
    toy = toy_run(Path(folder), world, parallel, keep=3)
    saved: dict[int, dict[str, torch.Tensor]] = {}
    judged: list[str] = []

    def remember(step: int, record: dict[str, float]) -> None:
        saved[step] = whole(toy.objective)

    def judge(step: int, record: dict[str, float]) -> None:
        newest = [saved[n] for n in sorted(saved) if n < step][-2:]  # the checkpoint of this step comes after
        for name, tensor in whole(toy.objective).items():
            mean = sum(state[name].double() for state in newest) / 2
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-6)
        judged.append(str(step))

    hook = JudgeMerged(toy.run, "model", MergeConfig(count=2), judge)
    hooks = [remember, hook, SaveHook(toy.run, 1)]
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=6, hooks=hooks)
    before = whole(toy.objective)
    with merged_in_place(toy.run, "model", MergeConfig(count=3)) as steps:
        judged.append(str(steps))
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(toy.objective).items())
    with (
        pytest.raises(CheckpointError, match="holds 3 checkpoints, 4 are to be merged"),
        merged_in_place(toy.run, "model", MergeConfig(count=4)),
    ):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(toy.objective).items())
    return judged


def taken_up(world: World, folder: str, parallel: str) -> float:
    """The largest distance of a run that goes back to a merge of three checkpoints from their mean."""
    toy = toy_run(Path(folder), world, parallel, keep=3)
    saved = []

    def remember(step: int, record: dict[str, float]) -> None:
        saved.append({name: tensor.clone() for name, tensor in gather_weights(toy.objective).items()})

    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=3, hooks=[remember, SaveHook(toy.run, 1)])
    toy.run.load(checkpoint.folder_of(toy.run.checkpoints, 3), merged=(1, 2, 3))
    found = gather_weights(toy.objective)
    assert all((saved[0][name] - saved[2][name]).abs().max() > 1e-3 for name in found if name.startswith("stacked"))
    means = {name: sum(state[name].double() for state in saved) / 3 for name in found}
    return max([(found[name].double() - mean).abs().max().item() for name, mean in means.items()], default=0.0)


@pytest.mark.parametrize("parallel", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_merge_is_that_of_all_tensors_under_every_sharding(tmp_path, parallel):
    """Within the rounding of a sum of three in float32."""
    assert max(run_ranks(taken_up, 2, str(tmp_path), parallel)) < 1e-6


def test_merged_weights_are_judged_and_taken_away_again(tmp_path):
    assert trained(ALONE, str(tmp_path), "none") == ["3", "4", "5", "6", "(4, 5, 6)"]


def test_every_rank_has_its_shard_of_the_merge(tmp_path):
    expected = ["3", "4", "5", "6", "(4, 5, 6)"]
    assert run_ranks(trained, 2, str(tmp_path), "fsdp2") == [expected] * 2
