"""What only several ranks can show: errors that reach all of them, state that fits another number of them."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.train.hooks import JsonlLog, LeaveOnSignal, SaveHook, Validate, evaluate, read_jsonl
from mmagent.train.loop import fit
from mmagent.train.run import Run
from mmagent.train.step import train_step
from mmagent.types import ParamRole, StepOutput
from tests.engine_kit import ALONE, SplitStream, Toy, ToyBatch, toy_run


def message_of(error: type[Exception], call) -> str:
    try:
        call()
    except error as problem:
        return str(problem)
    return "nothing was raised"


def not_finite(world: World, parallel: str) -> str:
    torch.manual_seed(0)
    toy = Toy()
    engine = build_engine(toy, build_optimizer(toy, OptimConfig()), EngineConfig(parallel), world)
    values = torch.ones(2, 6) if world.rank == 0 else torch.full((2, 6), float("nan"))
    batches = [ToyBatch(torch.ones(1, 6), ("good",)), ToyBatch(values, ("one", "two"))]
    return message_of(FloatingPointError, lambda: train_step(toy, engine, batches, world))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_bad_sample_on_one_rank_is_named_on_all(parallel):
    for told in run_ranks(not_finite, 2, parallel):
        assert "rank 1, micro-batch 1: common is nan; samples: one, two" in told
        assert "rank 0" not in told


class _Picky(Toy):
    """Refuses what is not positive."""

    def counts(self, batch: ToyBatch) -> dict[str, torch.Tensor]:
        if (batch.values < 0).any():
            raise ValueError(f"{batch.keys[0]} is negative")
        return super().counts(batch)


def evaluated(world: World) -> list[str]:
    """What is said where rank 1 brings a batch that is refused, and where it brings one batch less."""
    torch.manual_seed(0)
    toy = _Picky()
    engine = build_engine(toy, build_optimizer(toy, OptimConfig()), EngineConfig("fsdp2"), world)
    good, bad = ToyBatch(torch.ones(2, 6), ("good",)), ToyBatch(-torch.ones(2, 6), ("bad",))
    told = [
        message_of(ValueError, lambda batches=batches: evaluate(toy, batches, world, engine))
        for batches in ([good, bad if world.rank else good], [good] * (2 - world.rank))
    ]
    return [*told, f"{evaluate(toy, [good], world, engine)['loss']:.3f}"]


def test_what_stops_the_evaluation_of_one_rank_stops_all():
    (refused, uneven, loss), others = run_ranks(evaluated, 2)
    assert [refused, uneven, loss] == others
    assert "rank 1, micro-batch 0: bad is negative" in refused
    assert "ranks bring different numbers of batches to evaluate" in uneven


def uneven(world: World) -> str:
    toy = toy_run(Path(f"rank{world.rank}"), ALONE).objective  # one folder a rank: each is the only writer of its own
    engine = build_engine(toy, build_optimizer(toy, OptimConfig()), EngineConfig("fsdp2"), world)
    batches = [ToyBatch(torch.ones(1, 6))] * (1 + world.rank)
    return message_of(ValueError, lambda: train_step(toy, engine, batches, world))


def test_ranks_must_bring_equally_many_micro_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for told in run_ranks(uneven, 2):
        assert told == "ranks bring [1, 2] micro-batches to one step: the numbers must be equal"


def continued(world: World, folder: str, parallel: str, steps: int) -> dict[str, torch.Tensor]:
    toy = toy_run(Path(folder), world, parallel, dropout=0.0)
    stream = SplitStream(world)
    run = Run(folder, world, {"model": toy.objective, "engine": toy.engine, "stream": stream})
    log = JsonlLog(Path(folder) / "m.jsonl")
    fit(run, toy.objective, toy.engine, stream, steps=steps, hooks=[log, SaveHook(run, 2)])
    moments = {f"{n}/{k}": v for n, s in toy.engine.state_dict()["optimizer"].items() for k, v in s.items()}
    return gather_weights(toy.objective) | moments


def test_a_run_goes_on_sharded_or_not_and_on_another_number_of_ranks(tmp_path):
    """Written by two FSDP2 ranks; read by two DDP ranks, one plain process and three FSDP2 ranks."""
    folder = str(tmp_path / "run")
    written = run_ranks(continued, 2, folder, "fsdp2", 3)[0]
    for ranks, parallel in ((2, "ddp"), (2, "fsdp2"), (3, "fsdp2")):
        read = run_ranks(continued, ranks, folder, parallel, 3)[0]
        assert set(read) == set(written)
        assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    alone = continued(ALONE, folder, "none", 3)
    assert all(torch.equal(alone[name], tensor) for name, tensor in written.items())
    run_ranks(continued, 2, folder, "ddp", 5)
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "m.jsonl")] == [1, 2, 3, 4, 5]


class Offset(Toy):
    """With a parameter of one number, of which only one rank of an FSDP2 world holds anything."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(1))

    def forward(self, batch: ToyBatch) -> StepOutput:
        return super().forward(ToyBatch(batch.values + self.offset))

    def roles(self) -> Mapping[str, ParamRole]:
        return {**super().roles(), "offset": ParamRole("trunk", False)}


def moments(world: World, parallel: str, given: str = "") -> dict[str, Any]:
    """The optimizer's state after two steps, which go on from the one in the file ``given``."""
    torch.manual_seed(0)
    toy = Offset()
    engine = build_engine(toy, build_optimizer(toy, OptimConfig()), EngineConfig(parallel), world)
    if given:
        engine.load_state_dict(torch.load(given, weights_only=True))
    batches = [ToyBatch(torch.randn(3, 6)) for _ in range(2)]
    for _ in range(2):
        train_step(toy, engine, batches[world.rank :: world.size], world)
    return engine.state_dict()


def test_what_only_one_rank_has_of_a_parameter_is_saved_and_taken_up(tmp_path):
    """The others must join in gathering its state, though theirs is empty."""
    given = ""
    for steps in (2, 4):
        state = run_ranks(moments, 2, "fsdp2", given)[0]
        one, two = moments(ALONE, "none", given)["optimizer"], state["optimizer"]
        assert {name: set(entries) for name, entries in one.items()} == {n: set(e) for n, e in two.items()}
        assert one["offset"]["step"] == two["offset"]["step"] == steps
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(one["offset"][key], two["offset"][key], rtol=1e-3)
        given = str(tmp_path / "state.pt")
        torch.save(state, given)


def validated(world: World, parallel: str) -> tuple[dict[str, float], list[dict[str, torch.Tensor]]]:
    """A step, a validation, and another step; the weights after each of the three."""
    torch.manual_seed(0)
    toy = Toy()
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    engine = build_engine(toy, optimizer, EngineConfig(parallel), world)
    batches = [ToyBatch(torch.randn(3, 6)) for _ in range(4)]
    mine = batches[world.rank :: world.size]
    record: dict[str, float] = {}
    train_step(toy, engine, mine, world)
    weights = [_copied(toy)]
    Validate(toy, lambda: mine, world, engine)(1, record)
    weights.append(_copied(toy))
    train_step(toy, engine, mine, world)
    del record["time/validation"]
    return record, [*weights, gather_weights(toy)]


def _copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gather_weights(module).items()}


def test_validation_is_the_same_on_any_number_of_ranks_and_disturbs_nothing():
    alone, (*_, weights) = validated(ALONE, "none")
    for parallel in ("ddp", "fsdp2"):
        for record, (before, after, found) in run_ranks(validated, 2, parallel):
            assert record == pytest.approx(alone, rel=1e-4)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert all(torch.allclose(found[name], weights[name], atol=1e-5) for name in found)


def left_whole(world: World, dtype: str) -> list[str]:
    """Parameters that are not sharded any more after a validation."""
    torch.manual_seed(0)
    toy = Toy()
    engine = build_engine(toy, build_optimizer(toy, OptimConfig()), EngineConfig("fsdp2", dtype), world)
    batch = ToyBatch(torch.randn(3, 6))
    train_step(toy, engine, [batch], world)
    Validate(toy, lambda: [batch], world, engine)(1, {})
    return [name for name, parameter in toy.named_parameters() if not isinstance(parameter, DTensor)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_validation_leaves_nothing_gathered(dtype):
    """What is frozen or saved next must be the shards, as after a backward."""
    assert run_ranks(left_whole, 2, dtype) == [[], []]


def told_to_leave(world: World, folder: str) -> tuple[int, int]:
    toy = toy_run(Path(folder), world)

    def terminate(step, record):
        if step == 2 and world.rank == 1:  # one rank only
            signal.raise_signal(signal.SIGTERM)

    try:
        fit(toy.run, toy.objective, toy.engine, toy.stream, steps=9, hooks=[terminate, LeaveOnSignal(toy.run)])
    except SystemExit as left:
        return left.code, toy.run.saved_step
    return 0, 0


def test_a_signal_to_one_rank_makes_all_save_and_leave(tmp_path):
    assert run_ranks(told_to_leave, 2, str(tmp_path)) == [(143, 2), (143, 2)]


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def roles(self):
        return {"temperature": ParamRole("head", False)}

    def blocks(self):
        return ()

    def leaves(self):
        return ()


def test_scalars_cannot_be_sharded_and_are_named():
    model = Scalar()
    with pytest.raises(ValueError, match=r"give these the shape \(1,\): temperature"):
        build_engine(model, build_optimizer(model, OptimConfig()), EngineConfig("fsdp2"), ALONE)


SHAPES = [(6, 4), (6, 4), (6, 4), (8, 6), (3, 4, 5), (5, 2, 2, 2), (4, 8), (7,)]
LAYOUTS = {"copies": (1, 4), "shards": (4, 1), "both": (2, 2)}
"""Of four ranks: over how many a copy is cut, and how many copies there are."""


def shared_work(world: World, layout: str = "") -> list[torch.Tensor]:
    """Whole weights after four steps, whose momenta a fresh optimizer takes up in between. One matrix is frozen in the
    first step; some have fewer rows than there are ranks."""
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in SHAPES]
    shards, copies = LAYOUTS.get(layout, (1, 1))
    mesh = world.mesh({"copies": copies, "shards": shards}) if copies > 1 else world.mesh()

    def part(tensor: torch.Tensor) -> torch.Tensor:
        if shards == 1:
            return tensor
        return distribute_tensor(tensor, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)], src_data_rank=None)

    model = nn.ParameterList(nn.Parameter(part(tensor)) for tensor in whole)
    roles = {
        str(n): ParamRole("all", matrix=len(s) > 1, splits=(4, 4) if s == (8, 6) else ()) for n, s in enumerate(SHAPES)
    }
    model.roles = lambda: roles
    state = None
    for step in range(4):
        if step % 2 == 0:
            optimizer = build_optimizer(model, OptimConfig(lr=0.1))
            optimizer.replicas = copies if shards == 1 else 1
            if state is not None:
                optimizer.load_state_dict(state)
        for n, shape in enumerate(SHAPES):
            gradient = torch.randn(shape)
            model[n].grad = part(gradient) if n or step else None
        optimizer.step()
        state = optimizer.state_dict()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model]


def in_every_layout(world: World) -> dict[str, list[torch.Tensor]]:
    return {layout: shared_work(world, layout) for layout in LAYOUTS}


def test_ranks_that_share_the_work_of_muon_end_with_the_same_bits():
    """Whole matrices are handed out, so nothing is summed in another order, however they lie."""
    alone = shared_work(ALONE)
    for rank in run_ranks(in_every_layout, 4):
        for layout, weights in rank.items():
            assert all(torch.equal(one, other) for one, other in zip(alone, weights, strict=True)), layout


def handed_out(world: World) -> list[int]:
    """Elements that this rank orthogonalises of eight matrices in one step, by layout."""
    model = nn.ParameterList(nn.Parameter(torch.randn(8, 8)) for _ in range(8))
    model.roles = lambda: {str(n): ParamRole("all", matrix=True) for n in range(8)}
    found = []
    for layout, (shards, copies) in LAYOUTS.items():
        mesh = world.mesh({"copies": copies, "shards": shards}) if copies > 1 else world.mesh()
        placed = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        here = model if layout == "copies" else nn.ParameterList(distribute_tensor(p, mesh, placed) for p in model)
        here.roles = model.roles
        optimizer = build_optimizer(here, OptimConfig())
        optimizer.replicas = copies if shards == 1 else 1
        work = optimizer._orthogonal
        seen: list[int] = []
        optimizer._orthogonal = lambda joined, group, seen=seen, work=work: (
            seen.append(joined.numel()) or work(joined, group)
        )
        for parameter in here:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found.append(sum(seen))
    return found


def test_no_matrix_is_orthogonalised_twice():
    """Each of four ranks has a quarter of them, however they lie."""
    assert run_ranks(handed_out, 4) == [[2 * 64] * len(LAYOUTS)] * 4
