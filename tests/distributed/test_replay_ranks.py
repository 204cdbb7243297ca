"""Recorded experts that do not fit on one rank: no rank waits, all say where, and no weight moves."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmagent.dist import World, run_ranks
from mmagent.models.agent_model import AgentModel
from mmagent.models.decoder import PackedAttention
from mmagent.objectives.policy_gradient import PolicyGradient, PolicyGradientConfig
from mmagent.train.step import train_step
from mmagent.trajectories import PolicyBatch
from mmagent.types import PackedBatch
from tests.expert_kit import Case, build_model, engine_of

CASE = Case("ddp", experts=1, recompute=(), tail=1, allow_unused=True)


def play(model: AgentModel, stream: PackedBatch) -> PolicyBatch:
    """Made-up rewards for a pack, and the experts that serve it."""
    with torch.no_grad():
        decoded = model.decoder(model.embed(stream), stream.positions, PackedAttention(stream.segments))
    routed = decoded.routed()
    routed[stream.num_tokens :] = -1
    values = torch.randn(2, len(stream.input_ids), generator=torch.Generator().manual_seed(0))
    return PolicyBatch(stream, values[0], values[1] - 5, routed_experts=routed)


def attempt(world: World) -> list[str]:
    model = build_model(CASE)
    policy = PolicyGradient(model, PolicyGradientConfig())
    engine = engine_of(CASE, policy, model, world)
    given = [play(model, stream) for stream in CASE.packs(world.rank)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = []
    for spoil in SPOILT:
        routed = given[0].routed_experts
        mine = replace(given[0], routed_experts=spoil(routed) if world.rank == 1 else routed)
        try:
            train_step(policy, engine, [given[1], mine], world)
        except ValueError as error:
            told.append(str(error))
        engine.optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    train_step(policy, engine, given, world)  # the ranks are still together, and what fits is taken
    return told


def one_layer_turned(routed: torch.Tensor) -> torch.Tensor:
    turned = routed.clone()
    turned[:, 1] = torch.where(routed[:, 1] < 0, -1, (routed[:, 1] + 2) % 4)
    return turned


def one_expert_twice(routed: torch.Tensor) -> torch.Tensor:
    return torch.where(routed < 0, -1, 0)


SPOILT = (one_layer_turned, one_expert_twice)


def test_all_ranks_refuse_the_step_alike():
    first, second = run_ranks(attempt, 2)
    assert first == second
    assert "rank 1, micro-batch 1 of ('document-0', 'document-1')...: replay: layer 2 agrees with" in first[0]
    assert first[1].startswith("rank 1, micro-batch 1: replay: at token 0, MoE layer 0, experts [0, 0] of 4 name one")
    assert len(first) == 2
    assert "rank 0" not in first[0] + first[1]
