"""Ranks that trade images compute what ranks that keep them do: losses, metrics, router loads and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmagent.balance import CostWeights
from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.models.flops import cost_weights
from mmagent.models.vision_balance import VisionBalanceConfig, balance_vision
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.train.hooks import evaluate
from mmagent.train.step import StepResult, train_step
from mmagent.types import PackedBatch
from tests.model_kit import make_document, make_pack
from tests.traffic_kit import Traffic

ALONE = World(0, 1, 0, torch.device("cpu"))
PACKS = (
    ([[3, (1, 4, 4), 5], [7, (1, 6, 10), 4, (1, 4, 2), 2], [2, (1, 4, 4), 3, (2, 4, 6), 1]], 3),
    ([[6], [9]], 0),
    ([[4, (1, 8, 8), 3]], 1),
    ([[1, (1, 2, 2), 3], [8]], 0),
    ([[5], [3]], 2),
    ([[2, (1, 6, 6), 2], [1, (1, 4, 8), 2], [3, (1, 4, 4), 2]], 0),
    ([[12]], 0),
    ([[10], [2]], 1),
)
"""Documents and padding: rank 0 of two gets the packs with many images, rank 1 text and one small image; in the third
micro-batch it is the other way round, and the last has no image anywhere."""


@dataclass(frozen=True)
class Case:
    mode: str = "always"
    parallel: str = "ddp"
    freeze: tuple[str, ...] = ()
    recompute: bool = False
    experts: int = 1
    dtype: str = "float32"
    ranks: int = 8


@dataclass(frozen=True)
class Outcome:
    weights: dict[str, Tensor]
    result: StepResult
    load: Tensor
    exchanges: int


def packs() -> list[PackedBatch]:
    return [
        make_pack([make_document(parts, 10 * n + i) for i, parts in enumerate(documents)], tail)
        for n, (documents, tail) in enumerate(PACKS)
    ]


def build(world: World, case: Case) -> LanguageModeling:
    torch.manual_seed(0)
    model = AgentModel(presets.debug())
    model.freeze(case.freeze)
    if case.recompute:
        model.set_recompute(["encoder", "decoder", "mtp"])
    config = VisionBalanceConfig(case.mode, case.ranks)
    model.images = balance_vision(config, world, cost_weights(model.config, case.freeze), 2)
    return LanguageModeling(model, LanguageModelingConfig(balance_weight=0.5))


def train(world: World, case: Case) -> Outcome:
    """One step of plain gradient descent, which moves weights by the gradient itself."""
    objective = build(world, case)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    config = EngineConfig(case.parallel, case.dtype, clip_norm=0.0, expert_parallel=case.experts)
    engine = build_engine(objective, optimizer, config, world)
    with Traffic() as traffic:
        result = train_step(objective, engine, packs()[world.rank :: world.size], world)
    return Outcome(gather_weights(objective), result, objective.router_load, traffic.calls["alltoall_base"])


def train_all(world: World, cases: list[Case]) -> list[Outcome]:
    return [train(world, case) for case in cases]


def check(got: Outcome, wanted: Outcome, case: Case) -> None:
    """fp32: sums of a few hundred terms of size 1, in another order, differ by some 1e-6 of themselves."""
    assert set(got.weights) in (set(), set(wanted.weights))
    for name, tensor in got.weights.items():
        torch.testing.assert_close(
            tensor, wanted.weights[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{case}: {n}: {m}"
        )
    metrics = {name: value for name, value in got.result.metrics.items() if not name.startswith("balance/")}
    assert metrics == pytest.approx(wanted.result.metrics, rel=1e-5), case
    for field in ("loss", "losses"):
        assert getattr(got.result, field) == pytest.approx(getattr(wanted.result, field), rel=1e-5), (case, field)
    assert got.result.grad_norm == pytest.approx(wanted.result.grad_norm, rel=1e-4), case
    assert (got.result.counts, got.result.volume) == (wanted.result.counts, wanted.result.volume), case
    assert torch.equal(got.load, wanted.load), case


def test_two_ranks_trade_images():
    cases = [
        Case(),
        Case(parallel="fsdp2", recompute=True),
        Case(parallel="fsdp2", experts=2),
        Case(freeze=("encoder",), recompute=True),
        Case(parallel="fsdp2", freeze=("encoder", "projector")),
    ]
    half, unmoved = Case(dtype="bfloat16"), Case("off", dtype="bfloat16")
    alone = {freeze: train(ALONE, Case("off", freeze=freeze)) for freeze in {case.freeze for case in cases}}
    wanted = {case: alone[case.freeze] for case in cases}
    for *outcomes, in_half, as_it_was in run_ranks(train_all, 2, [*cases, half, unmoved]):
        for got, case in zip(outcomes, cases, strict=True):
            check(got, wanted[case], case)
            metrics = got.result.metrics
            assert 1 <= metrics["balance/vision"] < 1.3 < metrics["balance/vision_before"], case
            assert 0 < metrics["balance/moved"] < 1
        assert outcomes[0].exchanges > 0 == as_it_was.exchanges
        # products round at 2**-8; those of images are the same wherever they are computed
        assert in_half.result.losses == pytest.approx(as_it_was.result.losses, rel=2e-3)
        assert in_half.result.grad_norm == pytest.approx(as_it_was.result.grad_norm, rel=2e-2)


def test_four_ranks_trade_by_twos_and_all_together():
    cases = [Case(ranks=2), Case(ranks=3, parallel="fsdp2"), Case(ranks=4, experts=2), Case(ranks=1)]
    wanted = train(ALONE, Case("off"))
    for outcomes in run_ranks(train_all, 4, cases):
        for got, case in zip(outcomes, cases, strict=True):
            check(got, wanted, case)
        assert "balance/moved" not in outcomes[-1].result.metrics


def not_in_step(world: World) -> tuple[int, int, str, dict[str, float]]:
    """Collectives of a forward without gradient and of a step where nothing pays; an unprepared order; its metrics."""
    objective = build(world, Case())
    engine = build_engine(objective, torch.optim.SGD(objective.parameters(), lr=0.1), EngineConfig(), world)
    mine = packs()[world.rank :: world.size]
    with Traffic() as evaluating:
        evaluate(objective, mine, world, engine)
    model = objective.model
    model.images.config = VisionBalanceConfig("auto", operations_per_byte=1e9)
    with Traffic() as too_far:
        result = train_step(objective, engine, mine, world)
    model.images.config = VisionBalanceConfig("always")
    model.prepare(mine)
    problem = ""
    if world.rank == 0:
        try:
            model(mine[1])
        except ValueError as error:
            problem = str(error)
    return evaluating.calls["alltoall_base"], too_far.calls["alltoall_base"], problem, result.metrics


def test_images_stay_in_evaluation_and_where_it_does_not_pay():
    (evaluating, stayed, problem, metrics), (*others, _, _) = run_ranks(not_in_step, 2)
    assert evaluating == stayed == 0 == sum(others)
    assert metrics["balance/moved"] == 0
    assert metrics["balance/vision"] == metrics["balance/vision_before"] > 1.3
    assert "the step was prepared for" in problem


def test_what_cannot_trade_is_said_or_left():
    weights = CostWeights()
    wide = World(0, 4, 0, torch.device("cpu")).with_context(2)
    assert balance_vision(VisionBalanceConfig("always"), ALONE, weights, 2) is None
    assert balance_vision(VisionBalanceConfig("off"), World(0, 4, 0, torch.device("cpu")), weights, 2) is None
    assert balance_vision(VisionBalanceConfig(), wide, weights, 2) is None
    with pytest.raises(ValueError, match="mode always with context_parallel 2"):
        balance_vision(VisionBalanceConfig("always"), wide, weights, 2)
    with pytest.raises(ValueError, match="'sometimes' is none of off, auto, always"):
        VisionBalanceConfig("sometimes")
