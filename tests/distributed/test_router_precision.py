"""Routers where everything else is gathered in bfloat16: they choose as float32 weights do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmagent.dist import World, run_ranks
from mmagent.models.moe import Router
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.train.step import train_step
from tests.expert_kit import Case, build_model, engine_of

CASE = Case("fsdp2", dtype="bfloat16", total=16)


@dataclass
class Call:
    """One forward of a router: the dtype of its weight then, what came in, and whom it chose."""

    dtype: torch.dtype
    x_TD: Tensor
    chosen_TK: Tensor


def route(world: World) -> list[tuple[dict[str, list[Call]], Tensor]]:
    cases = [replace(CASE, experts=ranks, recompute=roles) for ranks in (1, 2) for roles in ((), ("decoder", "mtp"))]
    return [_step(world, case) for case in cases]


def _step(world: World, case: Case) -> tuple[dict[str, list[Call]], Tensor]:
    objective = LanguageModeling(build_model(case), LanguageModelingConfig(bias_rate=0.01))
    calls: dict[str, list[Call]] = {}

    def note(name: str) -> Any:
        def hook(router: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            called = Call(router.weight.dtype, args[0].detach().clone(), output[1].chosen.clone())
            calls.setdefault(name, []).append(called)

        return hook

    engine = engine_of(case, objective, objective.model, world)
    for name, module in objective.model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(note(name))
    train_step(objective, engine, case.packs(world.rank), world)
    assert objective.router_load is not None
    return calls, objective.router_load


def test_choices_are_those_of_float32_weights():
    """Of experts sharded or dealt out, computed once or twice; and their load is the same to the last token."""
    model = build_model(CASE)
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    outcomes = [outcome for rank in run_ranks(route, 2) for outcome in rank]
    for calls, load in outcomes:
        assert torch.equal(load, outcomes[0][1])
        assert set(calls) == set(routers)
    rounding = 0
    for name, call in ((name, call) for calls, _ in outcomes for name, some in calls.items() for call in some):
        assert call.dtype == torch.float32, name
        weight = routers[name].weight.detach()
        wanted, rounded = (_choose(w, call.x_TD, call.chosen_TK.shape[1]) for w in (weight, weight.bfloat16()))
        assert torch.equal(call.chosen_TK, wanted), name
        rounding += int((wanted != rounded).sum())
    assert rounding > 0  # weights in bfloat16 would have been noticed


def _choose(weight_ED: Tensor, x_TD: Tensor, experts: int) -> Tensor:
    """The bias is still zero in the first step."""
    return (x_TD.float() @ weight_ED.float().T).sigmoid().topk(experts, dim=-1).indices
