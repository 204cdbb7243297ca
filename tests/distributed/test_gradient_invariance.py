"""The gradient, and what optimizers make of it, does not depend on ranks, micro-batches or sharding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.train.step import StepResult, train_step
from mmagent.types import PackedBatch
from tests.model_kit import make_document, make_pack

ALONE = World(0, 1, 0, torch.device("cpu"))
DOCUMENTS = [[3, (1, 4, 4), 5], [9], [7, (1, 2, 6), 4, (1, 4, 2), 2], [2], [31], [5], [4], [(1, 4, 6), 12]]
IMAGES, TEXTS = (0, 2, 7), (1, 3, 4, 5, 6)


@dataclass(frozen=True)
class Case:
    """``split[rank][micro-batch]`` lists documents."""

    name: str
    split: tuple[tuple[tuple[int, ...], ...], ...]
    parallel: str = "ddp"
    dtype: str = "float32"
    optimizer: str = "sgd"
    freeze: tuple[tuple[str, ...], ...] = ((),)

    def packs(self, rank: int) -> list[PackedBatch]:
        return [make_pack([make_document(DOCUMENTS[n], n) for n in part]) for part in self.split[rank]]


def train(world: World, case: Case) -> tuple[dict[str, Tensor], list[StepResult]]:
    torch.manual_seed(0)
    objective = LanguageModeling(AgentModel(presets.debug()), LanguageModelingConfig())
    if case.optimizer == "sgd":  # without clipping, weights move by the gradient itself
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    else:
        optimizer = build_optimizer(objective.model, OptimConfig(lr=1e-3, newton_schulz_dtype="float32"))
    config = EngineConfig(case.parallel, case.dtype, clip_norm=0.0 if case.optimizer == "sgd" else 0.5)
    engine = build_engine(objective, optimizer, config, world)
    results = []
    for freeze in case.freeze:
        objective.model.freeze(freeze)
        results.append(train_step(objective, engine, case.packs(world.rank), world))
    return gather_weights(objective), results


def train_all(world: World, cases: Sequence[Case]) -> list[tuple[dict[str, Tensor], list[StepResult]]]:
    return [train(world, case) for case in cases]


def compare(got: dict[str, Tensor], wanted: dict[str, Tensor], atol: float, rtol: float = 1e-4) -> None:
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


EVERYTHING = (tuple(range(8)),)
MIXED = (((0, 1), (2, 3, 4)), ((5, 6), (7,)))
TEXT_RANK = ((IMAGES[:1], IMAGES[1:]), (TEXTS[:2], TEXTS[2:]))  # rank 1 never sees an image
ONE_EACH = ((IMAGES,), (TEXTS,))


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], list[StepResult]]:
    return train(ALONE, Case("whole", (EVERYTHING,)))


def test_accumulation_changes_nothing(reference):
    weights, (result,) = train(ALONE, Case("split", (((0, 1), (2, 3), (4,), (5, 6, 7)),)))
    compare(weights, reference[0], atol=2e-6)
    assert result.loss == pytest.approx(reference[1][0].loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(reference[1][0].grad_norm, rel=1e-4)
    assert result.counts == reference[1][0].counts
    assert result.volume == reference[1][0].volume


def test_ranks_and_sharding_change_nothing(reference):
    cases = [
        Case(f"{parallel}-{i}", split, parallel)
        for parallel, (i, split) in itertools.product(("ddp", "fsdp2"), enumerate((MIXED, TEXT_RANK, ONE_EACH)))
    ]
    for rank, outcomes in enumerate(run_ranks(train_all, 2, cases)):
        for (weights, (result,)), case in zip(outcomes, cases, strict=True):
            if rank == 0:
                compare(weights, reference[0], atol=2e-6)
            wanted = reference[1][0]
            assert result.loss == pytest.approx(wanted.loss, rel=1e-5), case.name
            assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4), case.name
            assert result.losses == pytest.approx(wanted.losses, rel=1e-5), case.name
            assert result.metrics == pytest.approx(wanted.metrics, rel=1e-5), case.name
            assert result.counts == wanted.counts
            assert result.volume == wanted.volume


def test_muon_clipping_freezing_and_router_bias_under_ddp_and_fsdp2():
    """Three steps, the encoder and the decoder frozen and unfrozen between them."""
    freeze = (("encoder", "decoder"), ("head",), ())
    cases = [Case(p, TEXT_RANK, p, optimizer="muon", freeze=freeze) for p in ("ddp", "fsdp2")]
    wanted, results = train(ALONE, Case("alone", (EVERYTHING,), optimizer="muon", freeze=freeze))
    outcomes = run_ranks(train_all, 2, cases)[0]
    for (weights, got), case in zip(outcomes, cases, strict=True):
        # orthogonalising magnifies rounding where singular values are tiny
        compare(weights, wanted, atol=2e-4, rtol=1e-3)
        biases = [name for name in weights if name.endswith("router.bias")]
        assert biases, "the router bias is part of a model's weights"
        assert [r.grad_norm for r in got] == pytest.approx([r.grad_norm for r in results], rel=1e-3), case.name


def test_frozen_parts_do_not_move_and_unfrozen_ones_do():
    torch.manual_seed(0)
    start = LanguageModeling(AgentModel(presets.debug()), LanguageModelingConfig()).state_dict()
    cases = [Case("ddp", MIXED, freeze=(("encoder",),)), Case("fsdp2", MIXED, "fsdp2", freeze=(("encoder",),))]
    for weights, _ in run_ranks(train_all, 2, cases)[0]:
        for name, tensor in weights.items():
            if name.startswith("model.encoder."):
                assert torch.equal(tensor, start[name]), name
        assert not torch.equal(weights["model.embedding.weight"], start["model.embedding.weight"])


def test_bfloat16_follows_float32(reference):
    cases = [Case(p, TEXT_RANK, p, dtype="bfloat16") for p in ("ddp", "fsdp2")]
    for _, (result,) in run_ranks(train_all, 2, cases)[0]:
        assert result.loss == pytest.approx(reference[1][0].loss, rel=0.02)
        assert result.grad_norm == pytest.approx(reference[1][0].grad_norm, rel=0.1)
