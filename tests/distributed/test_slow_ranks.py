"""Real ranks: one that is slow in one segment is named, none is where all are alike; their log; norms by role."""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path

import pytest
import torch

from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.train.hooks import SaveHook, read_jsonl
from mmagent.train.loop import fit
from mmagent.train.ranks import RankLog
from mmagent.train.segments import OWN
from tests.engine_kit import Toy, ToyBatch, toy_run

PACE, LATE = 0.01, 0.06
"""Seconds that every rank sleeps in each forward and backward, and that one sleeps beside. Sleeping, ranks do not take
the processor from one another, so what two busy cores add to a step (tens of milliseconds at their worst) stays well
below what the slow rank does."""


class Dawdle(torch.autograd.Function):
    """Takes its time, in the backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


def train(world: World, folder: str, slow: tuple[int, str] | None, steps: int, parallel: str) -> list[str]:
    """Warnings of this rank; ``slow`` names a rank and the segment in which it is late."""
    toy = toy_run(Path(folder), world, parallel)
    own = slow[1] if slow is not None and slow[0] == world.rank else ""
    plain, draw = toy.objective.forward, type(toy.stream).__next__

    def forward(batch):
        time.sleep(PACE + LATE * (own == "forward"))
        output = plain(batch)
        sums = {name: Dawdle.apply(total, PACE * (name == "common")) for name, total in output.sums.items()}
        if own == "backward":
            sums["common"] = Dawdle.apply(sums["common"], LATE)
        return type(output)(sums, output.metrics)

    class Stream(type(toy.stream)):
        def __next__(self):
            time.sleep(2 * LATE * (own == "data"))
            return draw(self)

    toy.objective.forward, toy.stream.__class__ = forward, Stream
    told: list[str] = []
    logger = logging.getLogger("mmagent.train.ranks")
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    # half again as slow counts: toys on two shared cores differ by more than machines of their own would
    log = RankLog(toy.run, steps, interval=4, over=0.5, engine=toy.engine)
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=steps, hooks=[log, SaveHook(toy.run, 6)])
    logger.removeHandler(handler)
    return told


@pytest.mark.parametrize(
    ("ranks", "slow", "parallel"),
    [(3, (2, "forward"), "ddp"), (2, (0, "data"), "fsdp2")],
)
def test_a_slow_rank_is_named_with_its_segment(tmp_path, ranks, slow, parallel):
    told = run_ranks(train, ranks, str(tmp_path), slow, 16, parallel)
    assert told[1:] == [[]] * (ranks - 1)  # the main rank speaks for all
    *found, last = told[0]  # found again where other processes hid it for some steps
    assert found
    assert all(text.startswith("steps up to ") for text in found)
    assert last.startswith("at the end: ")
    for text in told[0]:
        assert f"rank {slow[0]} on " in text
        assert f"most of it in '{slow[1]}'" in text
    rows = read_jsonl(tmp_path / "ranks.jsonl")
    assert [step for row in rows for step in row["steps"]] == list(range(1, 17))
    for row in rows:
        assert len(row["seconds"]) == len(row["memory"]) == len(row["hosts"]) == len(row["probe"]) == ranks
        assert all(memory["rss"] > 1e7 for memory in row["memory"])
        sizes = row["memory"][0]
        assert set(sizes["parameters"]) == set(sizes["gradients"]) == {"experts", "trunk"}
    assert {entry["rank"] for entry in rows[-1]["slow"]} == {slow[0]}


def test_equal_ranks_are_not_named_and_wait_is_not_work(tmp_path):
    """And what one rank waits for another is not counted as its own work: beside a rank that is late in its last
    backward, where gradients are reduced, the other one's backward stays short."""
    assert run_ranks(train, 2, str(tmp_path / "equal"), None, 16, "ddp") == [[], []]
    run_ranks(train, 2, str(tmp_path / "late"), (1, "backward"), 10, "ddp")
    work, waits = [[], []], [[], []]
    for row in read_jsonl(tmp_path / "late" / "ranks.jsonl"):
        for rank in (0, 1):
            for step in row["seconds"][rank]:
                found = dict(zip(row["names"], step, strict=True))
                work[rank].append(sum(found.get(name, 0.0) for name in OWN))
                waits[rank].append(found["reduce"])
    typical = [statistics.median(some) for some in work]
    assert typical[1] - typical[0] > LATE  # twice a step, less what noise there may be
    assert statistics.median(waits[0]) > statistics.median(waits[1]) + LATE / 2  # in the second backward of the step


def test_a_resumed_run_has_every_step_once(tmp_path):
    run_ranks(train, 2, str(tmp_path), None, 5, "ddp")
    path = tmp_path / "ranks.jsonl"
    with path.open("a") as file:
        file.write('{"step": 7, "steps": [6, 7]}\n{"torn')
    run_ranks(train, 2, str(tmp_path), None, 9, "ddp")
    assert [step for row in read_jsonl(path) for step in row["steps"]] == list(range(1, 10))


def norms(world: World, parallel: str) -> dict[str, float]:
    torch.manual_seed(0)
    toy = Toy()
    engine = build_engine(toy, build_optimizer(toy, OptimConfig(lr=0.1)), EngineConfig(parallel, clip_norm=0.0), world)
    batch = ToyBatch(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))[world.rank :: world.size])
    with engine.micro_step(last=True):
        sums = engine.forward(batch).sums
        engine.backward(sums["common"] + sums["rare"])
    return {"all": engine.step(), **engine.role_norms}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_norms_by_role_are_those_of_whole_gradients(parallel):
    torch.manual_seed(0)
    toy = Toy()
    sums = toy(ToyBatch(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))).sums
    (sums["common"] + sums["rare"]).backward()
    squares: dict[str, float] = {}
    for name, role in toy.roles().items():
        gradient = toy.get_parameter(name).grad
        squares[role.role] = squares.get(role.role, 0.0) + gradient.square().sum().item()
    wanted = {"all": sum(squares.values()) ** 0.5, **{role: value**0.5 for role, value in squares.items()}}
    for found in run_ranks(norms, 2, parallel):
        assert found == pytest.approx(wanted, rel=1e-4)  # float32 sums of a hundred squares in another order
