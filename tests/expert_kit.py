"""Short trainings whose experts are shared by ranks, and what they must end with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from mmagent.dist import World
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.models.mtp import MTPConfig
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.protocols import Engine
from mmagent.train.step import StepResult, train_step
from mmagent.types import PackedBatch
from tests.engine_kit import ALONE
from tests.model_kit import make_document, make_pack

DOCUMENTS = [[3, (1, 4, 4), 5], [9], [7, (1, 2, 6), 4, (1, 4, 2), 2], [2], [31], [5], [4], [(1, 4, 6), 12]]

Split = tuple[tuple[tuple[int, ...], ...], ...]
"""``split[rank][micro-batch]`` lists documents."""
TWO: Split = (((0, 1), (2, 3, 4)), ((5, 6), (7,)))
TEXT_RANK: Split = (((0, 2, 7),), ((1, 3, 4, 5, 6),))  # rank 1 never sees an image
FOUR: Split = (((0,), (2,)), ((3,), (5,)), ((6,), (1,)), ((7,), (4,)))
FOUR_AT_ONCE: Split = (((0, 2),), ((3, 5),), ((6, 1),), ((7, 4),))
WHOLE: Split = ((tuple(range(8)),),)


@dataclass(frozen=True)
class Case:
    """A training of one step for each entry of ``freeze``; every rank pads its packs by another multiple of ``tail``.

    ``favour`` is added to the bias of the first rank's experts: with 9 they serve every token.
    """

    parallel: str = "ddp"
    experts: int = 2  # ranks that share them
    total: int = 4  # of them
    context: int = 1
    shard: int = 0  # ranks that share one copy of everything, under hsdp
    split: Split = TWO
    mtp: MTPConfig = field(default_factory=MTPConfig)
    optimizer: str = "sgd"
    dtype: str = "float32"
    recompute: tuple[str, ...] = ("decoder", "mtp")
    detach: bool = False
    allow_unused: bool = False
    freeze: tuple[tuple[str, ...], ...] = ((),)
    favour: float = 0.0
    all_chosen: bool = False  # every expert serves every token: nothing that rounding could choose otherwise
    tail: int = 3

    def packs(self, rank: int) -> list[PackedBatch]:
        documents = [[make_document(DOCUMENTS[n], n) for n in part] for part in self.split[rank]]
        return [make_pack(some, self.tail * (rank + 1)) for some in documents]


@dataclass
class Outcome:
    """After the last step: full ``weights``, optimizer ``state``, the ``load (M, E)`` of that step; all ``results``."""

    weights: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    load: Tensor
    results: list[StepResult]


def build_model(case: Case) -> AgentModel:
    torch.manual_seed(0)
    config = presets.debug()
    moe = replace(config.decoder.moe, experts=case.total)
    if case.all_chosen:
        moe = replace(moe, top_k=case.total)
    model = AgentModel(replace(config, mtp=case.mtp, decoder=replace(config.decoder, moe=moe)))
    model.set_recompute(case.recompute)
    for leaf in model.leaves():
        leaf.router.bias[: case.total // 2] += case.favour
    return model


def engine_of(case: Case, objective: nn.Module, model: AgentModel, world: World) -> Engine:
    if case.optimizer == "sgd":  # without clipping, weights move by the gradient itself
        optimizer, clip = torch.optim.SGD(objective.parameters(), lr=0.1), 0.0
    else:
        config = OptimConfig(lr=1e-3, newton_schulz_dtype="float32", role_lr={"mtp": 0.5})
        optimizer, clip = build_optimizer(model, config), 0.5
    config = EngineConfig("none", case.dtype, clip, case.allow_unused)
    if world.size > 1:
        shared = {"expert_parallel": case.experts, "context_parallel": case.context, "shard_ranks": case.shard}
        config = EngineConfig(case.parallel, case.dtype, clip, case.allow_unused, **shared)
    return build_engine(objective, optimizer, config, world)


def train(world: World, case: Case) -> Outcome:
    """All ranks together; ``case.split`` has as many entries as there are data ranks."""
    world = world.with_context(case.context)
    objective = LanguageModeling(build_model(case), LanguageModelingConfig(bias_rate=0.01, detach_mtp=case.detach))
    engine = engine_of(case, objective, objective.model, world)
    results = []
    for freeze in case.freeze:
        objective.model.freeze(freeze)
        scales = {"decoder": 0.7} if case.optimizer == "muon" else {}
        results.append(train_step(objective, engine, case.packs(world.data_rank), world, 0.9, scales))
    assert objective.router_load is not None
    return Outcome(gather_weights(objective), engine.state_dict()["optimizer"], objective.router_load, results)


def train_all(world: World, cases: Sequence[Case]) -> list[Outcome]:
    return [train(world, case) for case in cases]


def alone(case: Case) -> Outcome:
    """One rank, one pack, nothing padded or computed twice."""
    return train(ALONE, replace(case, context=1, split=WHOLE, recompute=(), tail=0))


def compare(got: Outcome, wanted: Outcome, atol: float, rtol: float = 1e-4) -> None:
    """``got`` is what rank 0 has, whose weights and state are whole."""
    for mine, theirs in ((got.weights, wanted.weights), (_flat(got.state), _flat(wanted.state))):
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(got.load, wanted.load)
    for one, other in zip(got.results, wanted.results, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=10 * rtol)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=10 * rtol)
        assert one.metrics == pytest.approx(other.metrics, rel=10 * rtol)
        assert one.counts == other.counts


def _flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, entries in state.items() for key, value in entries.items()}
