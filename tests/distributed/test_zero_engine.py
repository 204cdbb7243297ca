"""DeepSpeed's ZeRO behind our engine: what it refuses, keeps, gives back, and carries over from and to others."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmagent.dist import World, run_ranks
from mmagent.engine import checkpoint
from mmagent.engine.average import AverageConfig, WeightAverage
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import ZERO, EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.pieces import shard_of
from mmagent.engine.zero_engine import _resting
from mmagent.generation.generator import Generator
from mmagent.protocols import Engine
from mmagent.train.hooks import Validate
from mmagent.train.run import Run
from mmagent.train.step import train_step
from mmagent.trajectories import Limits, Trajectory
from mmagent.types import StepOutput
from tests.agent_kit import tiny_model, tiny_vocab
from tests.engine_kit import ALONE, Toy, ToyBatch

STAGES = tuple(ZERO)
EXACT = OptimConfig(lr=0.02, newton_schulz_dtype="float32")


class Choosy(Toy):
    """Leaves a part out, or makes its gradient infinite, where the first key of a batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(1))

    def forward(self, batch: ToyBatch) -> StepOutput:
        out = super().forward(batch)
        if "unused" in batch.keys:
            return out
        extra = self.spare.sum() * (batch.values.sum() * 0.0)
        if "infinite" in batch.keys:
            extra = extra + (self.spare - 1.0).abs().sqrt().sum()  # 0, of infinite slope
        return StepOutput({**out.sums, "common": out.sums["common"] + extra}, out.metrics)

    def roles(self) -> Mapping[str, Any]:
        return {**super().roles(), "spare": super().roles()["stacked.bias"]}


def made(world: World, parallel: str, toy: Toy) -> Engine:
    return build_engine(toy, build_optimizer(toy, EXACT), EngineConfig(parallel, clip_norm=0.5), world)


def one_step(world: World, step: int) -> list[ToyBatch]:
    """Eight rows a step, the same whoever has them: two micro-batches a rank."""
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return [ToyBatch(part) for part in rows[world.rank :: world.size].chunk(2)]


def freeze(toy: Toy, step: int) -> None:
    """The experts rest in the second and third step, the bias in the third and fourth."""
    toy.experts.requires_grad_(step not in (1, 2))
    toy.stacked.bias.requires_grad_(step not in (2, 3))


@dataclass
class Trained:
    """Full weights, optimizer state and average on rank 0; norms of each step; elements that stay whole on a rank."""

    weights: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]
    norms: list[float]
    roles: dict[str, float]
    whole: list[str]
    validated: float


def trained(world: World, parallel: str, folder: str = "", steps: int = 5, start: str = "") -> Trained:
    """Some steps, saved in ``folder``; or none, from the checkpoint in ``start``."""
    torch.manual_seed(0 if world.is_main else 1)  # rank 0 decides
    toy = Toy()
    engine = made(world, parallel, toy)
    average = WeightAverage(toy, AverageConfig(0.9))
    parts = {"model": toy, "engine": engine, "average": average}
    if start:
        Run(f"{start}-{parallel}", world, parts).load(checkpoint.steps(Path(start) / "checkpoints")[0])
    norms, record = [], {}
    for step in range(steps):
        freeze(toy, step)
        norms.append(train_step(toy, engine, one_step(world, step), world, 0.9, {"experts": 0.5}).grad_norm)
        average(step, {})
    Validate(toy, lambda: one_step(world, 9), world, engine)(1, record)
    if folder:
        Run(folder, world, parts).finish(steps)
    whole = [name for name, p in toy.named_parameters() if p.numel()] if parallel == "zero3" else []
    state = engine.state_dict()["optimizer"]
    mean = average.state_dict()["average"]
    with average.in_place():
        placed = gather_weights(toy)
        assert all(torch.equal(placed[name], tensor) for name, tensor in mean.items())
    weights = {name: t.clone() for name, t in gather_weights(toy).items()}
    return Trained(weights, state, mean, norms, dict(engine.role_norms), whole, record["validation/loss"])


def faults(world: World, parallel: str) -> list[str]:
    """What is said of a parameter that is not used, and of a gradient that is not finite; then steps that are sound,
    and how many of them rank 0 counts for each of AdamW's parameters, be it another's in whole."""
    torch.manual_seed(0)
    toy, told = Choosy(), []
    engine = made(world, parallel, toy)
    before = {name: t.clone() for name, t in gather_weights(toy).items()}
    good, spare, infinite = (ToyBatch(torch.ones(2, 6), (key,)) for key in ("good", "unused", "infinite"))
    for batch, error in ((spare, ValueError), (infinite if world.rank else good, FloatingPointError)):
        with pytest.raises(error) as caught:
            train_step(toy, engine, [batch], world)
        told.append(str(caught.value))
    after = gather_weights(toy)
    moved = [name for name, t in before.items() if not torch.equal(after[name], t) and name != "seen"]
    engine.discard()
    for _ in range(3):
        train_step(toy, engine, [good], world)
    entries = engine.state_dict()["optimizer"].items()
    counted = ", ".join(f"{name} {int(entry['step'])}" for name, entry in sorted(entries) if "step" in entry)
    for parameter in toy.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError) as caught:
        train_step(toy, engine, [good], world)
    return [*told, str(caught.value), " ".join(moved), counted]


def refused(world: World) -> str:
    """A generator on weights that ranks share."""
    model = tiny_model()
    build_engine(model, build_optimizer(model, EXACT), EngineConfig("zero3"), world)
    prompt = Trajectory("prompt", "test")
    prompt.extend([5, 6], trainable=False)
    with pytest.raises(ValueError) as caught:
        Generator(model, tiny_vocab()).generate([(prompt, Limits(2))])
    return str(caught.value)


def unnoticed(world: World, parallel: str) -> list[str]:
    """Parameters that a step has changed without a generator's notice."""
    toy = Toy()
    engine = made(world, parallel, toy)
    before = [(p.detach().clone(), p._version) for p in toy.parameters()]
    train_step(toy, engine, one_step(world, 0), world)
    named = zip(toy.named_parameters(), before, strict=True)
    return [n for (n, p), (old, version) in named if p._version == version and not torch.equal(p, old)]


def look(world: World, folder: str) -> dict[str, Any]:
    """Everything at once, as loading DeepSpeed takes longer than all of it. Nothing warns of what torch will drop."""
    warnings.simplefilter("error", FutureWarning)
    seen: dict[str, Any] = {name: trained(world, name, f"{folder}/{name}") for name in (*STAGES, "ddp", "fsdp2")}
    seen |= {f"{parallel} unnoticed": unnoticed(world, parallel) for parallel in STAGES if parallel != "zero3"}
    return seen | {f"{parallel} faults": faults(world, parallel) for parallel in STAGES} | {"refused": refused(world)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    return run_ranks(look, 2, str(folder), timeout=280)


@pytest.fixture(scope="module")
def alone() -> Trained:
    return trained(ALONE, "none")


def same(got: Trained, wanted: Trained) -> None:
    """Sums of six rows in another order: 1e-7, which clipping, Muon's iteration and five steps carry on."""
    flat = [{f"{n}/{k}": v for n, s in t.state.items() for k, v in s.items()} for t in (got, wanted)]
    for mine, theirs in ((got.weights, wanted.weights), flat, (got.average, wanted.average)):
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert got.norms == pytest.approx(wanted.norms, rel=1e-4)
    assert got.roles == pytest.approx(wanted.roles, rel=1e-4)
    assert got.validated == pytest.approx(wanted.validated, rel=1e-4)


@pytest.mark.parametrize("parallel", STAGES)
def test_steps_with_muon_are_those_of_one_process_whatever_rests_for_a_while(seen, alone, parallel):
    """Splits, a batch of matrices, clipping, schedules by role, the average of weights; what rests is not forgotten."""
    same(seen[0][parallel], alone)


def test_nothing_stays_whole_after_a_step_nor_a_validation(seen):
    assert [rank["zero3"].whole for rank in seen] == [[], []]


@pytest.mark.parametrize("parallel", STAGES)
def test_what_would_spoil_a_step_is_named_before_a_weight_has_moved(seen, parallel):
    for rank in seen:
        unused, infinite, frozen, moved, _ = rank[f"{parallel} faults"]
        assert unused == "trainable, but no gradient reached: spare. Freeze what this stage does not use"
        assert "the gradient norm is inf; first seen in " in infinite or "the gradient norm is nan" in infinite
        assert frozen == f"{parallel}: every parameter is frozen, nothing would train"
        assert moved == ""
    assert any("spare" in rank[f"{parallel} faults"][1] for rank in seen)


@pytest.mark.parametrize("parallel", STAGES)
def test_steps_are_counted_where_a_rank_has_nothing_of_a_parameter(seen, parallel):
    """Checkpoints hold rank 0's count; it was 0 for what lay on other ranks alone, and the bias correction began anew
    where a run resumed or went back."""
    assert seen[0][f"{parallel} faults"][-1] == "spare 3, stacked.bias 3"


def test_a_generator_refuses_weights_that_ranks_share(seen):
    assert "is shared by ranks: generate from a whole copy of the model" in seen[0]["refused"]


@pytest.mark.parametrize("parallel", ["zero1", "zero2"])
def test_a_generator_of_the_trained_weights_notices_a_step(seen, parallel):
    """DeepSpeed writes behind autograd's back: keys and values of the old weights were found again."""
    assert [rank[f"{parallel} unnoticed"] for rank in seen] == [[], []]


def exchange(world: World, folder: str) -> dict[tuple[str, str], Trained]:
    pairs = [("zero3", reader) for reader in (*STAGES, "fsdp2")] + [("zero1", "zero3"), ("fsdp2", "zero3")]
    return {(w, r): trained(world, r, start=f"{folder}/{w}", steps=0) for w, r in pairs}


def test_checkpoints_know_nothing_of_engines(seen, folder):
    """What an engine saved, whole or in pieces, all others take up on two ranks or one, and give again, bit by bit."""
    read = run_ranks(exchange, 2, str(folder), timeout=280)[0]
    read |= {(writer, "none"): trained(ALONE, "none", start=str(folder / writer), steps=0) for writer in STAGES}
    for (writer, reader), got in read.items():
        source: Trained = seen[0][writer]
        for mine, theirs in ((got.weights, source.weights), (got.average, source.average)):
            assert set(mine) == set(theirs)
            assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items()), (writer, reader)
        assert set(got.state) == set(source.state)
        for name, entries in source.state.items():
            for key, value in entries.items():
                assert torch.equal(torch.as_tensor(got.state[name][key]), torch.as_tensor(value)), (
                    writer,
                    reader,
                    name,
                )


@pytest.mark.parametrize(
    "config, told",
    [
        ({"parallel": "zero4"}, "none of none, ddp, fsdp2, hsdp, zero1, zero2, zero3"),
        ({"parallel": "zero3", "expert_parallel": 2}, "use fsdp2 or hsdp"),
        ({"parallel": "zero1", "allow_unused": True}, "freeze what is not used"),
        ({"parallel": "fsdp2", "shard_ranks": 2}, "with 'fsdp2' leave it at 0"),
    ],
)
def test_what_cannot_go_together_is_refused_with_what_to_do(config, told):
    with pytest.raises(ValueError, match=told):
        EngineConfig(**config)


def test_state_of_what_rests_is_loaded_to_the_device_of_its_parameter():
    """A rollback may load what is frozen now: left on the host, the next thaw would gather it there."""
    resting = _resting((3, 4), torch.device("meta"))
    assert resting.device.type == "meta"
    assert shard_of(torch.zeros(3, 4), resting).device.type == "meta"


def test_copies_that_do_not_divide_the_world_are_refused():
    six = World(0, 6, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="6 ranks do not divide into copies of 4"):
        EngineConfig("hsdp", shard_ranks=4).copy_ranks(six)
    with pytest.raises(ValueError, match="does not divide the 3 ranks that share a copy"):
        EngineConfig("hsdp", shard_ranks=3, expert_parallel=2).copy_ranks(six)


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"engine.parallel=zero2 needs DeepSpeed: pip install 'mmagent\[deepspeed\]'"):
        made(ALONE, "zero2", Toy())
