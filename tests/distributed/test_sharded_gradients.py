"""Between the micro-batches of a step a rank of FSDP2 or HSDP holds its shard of the gradient, and nothing whole."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import nn

from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.train.step import train_step
from mmagent.types import ParamRole, StepOutput
from tests.engine_kit import ALONE, Toy, ToyBatch

WIDTH, DEPTH, SMALL = 128, 3, 1024
DTYPES = ("float32", "bfloat16")


class Wide(nn.Module):
    """Blocks whose weights are far larger than what they compute, and a table that belongs to no block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.weights = {"common": 1.0}

    def counts(self, batch: ToyBatch) -> dict[str, torch.Tensor]:
        return {"common": torch.tensor(len(batch.values))}

    def forward(self, batch: ToyBatch) -> StepOutput:
        x = batch.values @ self.table[:6]
        for layer in self.layers:
            x = layer(x).tanh()
        return StepOutput({"common": x.square().sum()}, {})

    def after_step(self) -> None: ...

    def roles(self) -> dict[str, ParamRole]:
        return {name: ParamRole("trunk", False) for name, _ in self.named_parameters()}

    def blocks(self):
        return iter(self.layers)

    def leaves(self):
        return iter(())


def held(limit: int) -> int:
    """Bytes of all tensors that have come since ``gc.freeze``.

    A finished collective lets go of its tensors in a thread of gloo's, some time after those who waited for it went
    on: what is above ``limit`` is looked at again for some seconds, and what is held for good stays above.
    """
    deadline = time.monotonic() + 10
    while True:
        gc.collect()
        tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        found = {s.data_ptr(): s.nbytes() for s in (getattr(t, "_local_tensor", t).untyped_storage() for t in tensors)}
        if sum(found.values()) < limit or time.monotonic() > deadline:
            return sum(found.values())
        del tensors
        time.sleep(0.01)


def between(world: World, parallel: str, dtype: str) -> tuple[int, list[int]]:
    """Bytes of this rank's part of the weights, and by micro-batch what it holds more than before the step."""
    torch.manual_seed(0)
    model = Wide()
    size = sum(p.nbytes for p in model.parameters())
    copies = 2 if parallel == "hsdp" else 1
    part = size * copies // world.size
    config = EngineConfig(parallel, dtype, shard_ranks=world.size // copies if copies > 1 else 0)
    engine = build_engine(model, build_optimizer(model, OptimConfig()), config, world)
    train_step(model, engine, [ToyBatch(torch.ones(2, 6))], world)  # what is made once is there
    gc.collect()
    gc.freeze()
    more = []
    for n in range(3):
        with engine.micro_step(last=n == 2):
            engine.backward(engine.forward(ToyBatch(torch.randn(2, 6))).sums["common"])
        more.append(held(part + SMALL))
    engine.step()
    left = held(SMALL)
    assert left < SMALL, f"{parallel} {dtype}: {left} bytes are held behind a step"
    gc.unfreeze()
    return part, more


class Sometimes(Toy):
    """Two vectors outside its blocks: ``spare`` is used by the batches whose keys say so, ``idle`` by none."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.full((6,), 0.5))
        self.idle = nn.Parameter(torch.ones(4))

    def forward(self, batch: ToyBatch) -> StepOutput:
        out = super().forward(batch)
        if "spare" not in batch.keys:
            return out
        return StepOutput({**out.sums, "common": out.sums["common"] + (batch.values * self.spare).square().sum()})

    def roles(self) -> dict[str, ParamRole]:
        return {**super().roles(), "spare": ParamRole("trunk", False), "idle": ParamRole("trunk", False)}


USED = (("spare",), (), (), ("spare",))
"""Which of four micro-batches use it: of two ranks each the one in which the other does not."""


def stepped(world: World, parallel: str, allow_unused: bool, idle: bool = False, times: int = 2) -> dict[str, Any]:
    """Weights and optimizer's state after some steps of four micro-batches in all; or what was said against them."""
    torch.manual_seed(0)
    toy = Sometimes()
    toy.idle.requires_grad_(idle)
    config = EngineConfig(parallel, allow_unused=allow_unused, shard_ranks=1 if parallel == "hsdp" else 0)
    engine = build_engine(toy, build_optimizer(toy, OptimConfig(newton_schulz_dtype="float32")), config, world)
    rows = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    batches = [ToyBatch(some, keys) for some, keys in zip(rows, USED, strict=True)]
    for _ in range(times):
        try:
            train_step(toy, engine, batches[2 * world.rank :][: 4 // world.size], world)
        except ValueError as problem:
            return {"said": str(problem)}
    state = engine.state_dict()["optimizer"]
    return gather_weights(toy) | {f"{name}/{key}": value for name, of in state.items() for key, value in of.items()}


def look(world: World) -> dict[str, Any]:
    """Everything in one world of four ranks."""
    return {f"{name} {dtype}": between(world, name, dtype) for name in ("fsdp2", "hsdp") for dtype in DTYPES}


def use(world: World) -> dict[str, Any]:
    return {
        f"{name} {kind}": stepped(world, name, *how)
        for name in ("fsdp2", "hsdp")
        for kind, how in {"sometimes": (False,), "never": (False, True), "allowed": (True, True)}.items()
    }


def test_no_whole_gradient_is_held_between_micro_batches():
    for rank in run_ranks(look, 4):
        for case, (part, more) in rank.items():
            assert max(more) - part < SMALL, (case, "beside the shard of the gradient there are a few counters")
            assert part - min(more) < SMALL, (case, "it is there from the first micro-batch on")


def test_a_parameter_may_be_used_by_one_rank_in_one_micro_batch_and_by_another_in_the_next():
    """Nothing else would tell FSDP2's ranks that they reduce unlike things."""
    mine, theirs = run_ranks(use, 2)
    for name in ("fsdp2", "hsdp"):
        for kind, idle in (("sometimes", False), ("allowed", True)):
            wanted = stepped(ALONE, "none", True, idle)
            got = mine[f"{name} {kind}"]
            assert got.keys() == wanted.keys(), "what nobody used has no state, and its weights do not decay"
            for key, value in wanted.items():  # sums of twelve rows in another order
                torch.testing.assert_close(got[key], value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
        for rank in (mine, theirs):
            assert "no gradient reached: idle. Freeze" in rank[f"{name} never"]["said"]
