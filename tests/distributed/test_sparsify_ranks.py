"""Scores and masks do not depend on how many ranks train, what they shard, and who has which experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmagent.dist import World, run_ranks
from mmagent.engine.checkpoint import gather_weights
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.sparsity.patterns import PatternConfig
from mmagent.sparsity.stages import SparsityConfig
from mmagent.train.run import Run
from mmagent.train.sparsify import Sparsifier
from mmagent.train.step import train_step
from tests.engine_kit import ALONE
from tests.expert_kit import TWO, WHOLE, Case, build_model, engine_of

STAGES = SparsityConfig([0.5], score=2, steps=2, pattern=PatternConfig(granularity=8))
CASES = [Case("ddp", experts=1), Case("fsdp2", experts=1), Case("ddp", experts=2), Case("fsdp2", experts=2)]
Seen = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def train(world: World, case: Case, folder: str, first: int, last: int) -> Seen:
    """Scores before the first pruning where it is passed, masks and weights after ``last``; saved under ``folder``."""
    model = build_model(case)
    objective = LanguageModeling(model, LanguageModelingConfig())
    engine = engine_of(case, objective, model, world)
    sparsifier = Sparsifier(model, engine.optimizer, STAGES)
    run = Run(folder, world, {"model": model, "engine": engine, "sparsity": sparsifier})
    assert run.resume() == first
    scores: dict[str, Tensor] = {}
    for step in range(first, last):
        train_step(objective, engine, case.packs(world.rank), world)
        if step + 1 == STAGES.score:
            scores = {name: tensor.clone() for name, tensor in sparsifier.state_dict()["scores"].items()}
        sparsifier(step + 1, {})
    run.finish(last)
    masks = {name: mask.clone() for name, mask in sparsifier.whole_masks().items()}
    return scores, masks, {name: tensor.clone() for name, tensor in gather_weights(model).items()}


def all_cases(world: World, folder: str) -> list[Seen]:
    return [train(world, replace(case, split=TWO), f"{folder}/{n}", 0, 3) for n, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(all_cases, 2, str(folder), timeout=300)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return train(ALONE, Case("ddp", experts=1, split=WHOLE), str(tmp_path_factory.mktemp("alone")), 0, 3)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_ranks_prune_what_one_prunes(number, ranks, alone):
    """Scores are squares of products, to four digits; a mask may differ where two units differ by less than that."""
    scores, masks, weights = ranks[1][number]
    assert set(scores) == set(alone[0])
    for name, score in alone[0].items():
        torch.testing.assert_close(scores[name], score, rtol=1e-2, atol=1e-4 * score.max().item(), msg=name)
    differ = sum(int((masks[name] != mask).sum()) for name, mask in alone[1].items())
    assert differ <= 0.002 * sum(mask.numel() for mask in masks.values())
    assert all((weights[name][mask == 0] == 0).all() for name, mask in masks.items())


def test_one_rank_goes_on_where_two_sharded_ones_stood(ranks):
    """Masks are written in shards and read by anyone."""
    folder, seen = ranks
    _, masks, weights = train(ALONE, Case("ddp", experts=1, split=WHOLE), str(folder / "3"), 3, 3)
    assert all(torch.equal(mask, seen[3][1][name]) for name, mask in masks.items())
    assert all(torch.equal(tensor, seen[3][2][name]) for name, tensor in weights.items())
