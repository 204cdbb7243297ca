"""Experts that two ranks share: losses, gradients, router and replay as if one rank had them all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from mmagent.dist import World, run_ranks
from mmagent.engine.checkpoint import gather_weights
from mmagent.models.mtp import MTPConfig
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.objectives.policy_gradient import PolicyGradient, PolicyGradientConfig
from mmagent.train.step import StepResult, train_step
from mmagent.trajectories import PolicyBatch
from tests.engine_kit import ALONE
from tests.expert_kit import TEXT_RANK, TWO, WHOLE, Case, Outcome, alone, build_model, compare, engine_of, train

SHARED, FUSED, MASKED = MTPConfig(2, True, "shared"), MTPConfig(2, False, "fused"), MTPConfig(2, True, "masked")
CASES = [
    Case("ddp", mtp=SHARED, favour=9.0),
    Case("ddp", mtp=FUSED),
    Case("ddp", mtp=MASKED, recompute=()),
    Case("fsdp2", mtp=SHARED, split=TEXT_RANK),
    Case("fsdp2", mtp=FUSED, favour=9.0),
    Case("ddp", mtp=FUSED, detach=True, split=TEXT_RANK, freeze=(("encoder",),)),
    Case("fsdp2", mtp=MASKED, freeze=(("encoder", "decoder"),)),
]
LOW = [Case(parallel, experts=ranks, dtype="bfloat16") for parallel in ("ddp", "fsdp2") for ranks in (1, 2)]
REPLAYS = [("ddp", 0.3), ("ddp", 0.0), ("fsdp2", 0.0)]


@dataclass
class Seen:
    """What one of the ranks saw."""

    trained: list[Outcome]
    low: list[StepResult]
    gathered: list[torch.dtype]
    replayed: list[tuple[StepResult, dict[str, Tensor]]]


def look(world: World) -> Seen:
    low = [train(world, case).results[0] for case in LOW]
    replays = [replay(world, *way) for way in REPLAYS]
    return Seen([train(world, case) for case in CASES], low, gathered(world), replays)


def gathered(world: World) -> list[torch.dtype]:
    """In what FSDP2 gives a bfloat16 forward the weights of a router, of experts, and of attention."""
    model = build_model(LOW[-1])
    engine = engine_of(LOW[-1], LanguageModeling(model, LanguageModelingConfig()), model, world)
    block, found = model.decoder.blocks[1], {}

    def note(owner: nn.Module, _: object) -> None:
        found[owner] = next(owner.parameters()).dtype

    for owner in (block.moe.router, block.moe.experts, block.attention.qkv):
        owner.register_forward_pre_hook(note)
    with torch.no_grad():
        engine.forward(LOW[-1].packs(world.rank)[0])
    return [found[owner] for owner in (block.moe.router, block.moe.experts, block.attention.qkv)]


def replay(world: World, parallel: str, mtp_weight: float) -> tuple[StepResult, dict[str, Tensor]]:
    """A step of policy gradients on recorded experts: with an MTP loss that stays its own, or MTP left unused."""
    split = TWO if world.size > 1 else WHOLE
    case = Case(parallel, split=split, mtp=MTPConfig(2), tail=2, allow_unused=not mtp_weight)
    model = build_model(case)
    policy = PolicyGradient(model, PolicyGradientConfig(reduction="token", mtp_weight=mtp_weight, replay_floor=0.0))
    engine = engine_of(case, policy, model, world)
    batches = []
    for stream in case.packs(world.rank):
        columns = []
        for n, ids in enumerate(stream.input_ids.split(stream.segments.lengths)):
            # the same for a document wherever it lies; padding and a document's first token recorded nothing
            drawn = torch.Generator().manual_seed(int(ids.sum()))
            experts = torch.rand(len(ids), 2, 4, generator=drawn).argsort(-1)[..., :2]
            experts[: len(ids) if n == len(stream.keys) else 1] = -1
            values = torch.randn(2, len(ids), generator=drawn)
            columns.append((values[0], values[1] - 5, experts))
        advantages, behavior, experts = (torch.cat(column) for column in zip(*columns, strict=True))
        batches.append(PolicyBatch(stream, advantages, behavior, routed_experts=experts))
    return train_step(policy, engine, batches, world), gather_weights(model)


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    return run_ranks(look, 2, timeout=300)


def test_gradients_are_those_of_one_rank(seen):
    """Weights after one step of plain gradient descent: packed, padded, recomputed, frozen, with every kind of MTP; a
    rank without images; and a router that sends every token to the first rank, so that the other serves none."""
    for got, case in zip(seen[0].trained, CASES, strict=True):
        compare(got, alone(case), atol=2e-6)
    for one, other in zip(*(rank.trained for rank in seen), strict=True):
        assert one.results == other.results
        assert torch.equal(one.load, other.load)


def test_low_precision_travels_as_it_is(seen):
    """A token's experts compute the same bits wherever they are. FSDP2 also rounds the embedding table, and with it
    the residual stream, so each engine is held against itself with all experts on every rank."""
    ddp, ddp_shared, fsdp2, fsdp2_shared = seen[0].low
    whole, exact = (alone(replace(LOW[0], dtype=dtype)).results[0] for dtype in ("bfloat16", "float32"))
    for got, wanted in ((ddp, whole), (ddp_shared, whole), (fsdp2_shared, fsdp2)):
        # float32 losses of equal tokens, added up in another order; the weights' gradients add up rounded products of
        # other halves of the tokens
        assert got.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=5e-5)
        assert abs(exact.loss / wanted.loss - 1) > 1e-6  # which would not pass for an engine that forgot its dtype
    assert seen[0].gathered == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_recorded_experts_are_replayed_where_they_live(seen):
    for (got, weights), (_, mtp_weight) in zip(seen[0].replayed, REPLAYS, strict=True):
        wanted, whole = replay(ALONE, "none", mtp_weight)
        assert got.losses == pytest.approx(wanted.losses, rel=1e-4)
        assert got.metrics == pytest.approx(wanted.metrics, rel=1e-3)
        assert 0 < got.metrics["router/replay_agreement"] < 1
        for name, tensor in whole.items():
            torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
