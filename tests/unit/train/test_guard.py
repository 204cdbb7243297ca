"""A run that meets NaN or a spike: against loops by hand that simply do not train on the batches left out; and killed
at every moment of a recovery."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmagent.dist import World, run_ranks
from mmagent.engine import checkpoint
from mmagent.train.hooks import JsonlLog, SaveHook, read_jsonl
from mmagent.train.incidents import Refused, read_incidents
from mmagent.train.loop import fit
from mmagent.train.run import Run
from mmagent.train.step import train_step
from mmagent.types import StepOutput
from tests.engine_kit import ALONE, HealthConfig, Toy, ToyRun, toy_run

STEPS, EVERY, BAD = 24, 4, 17
NAN, SPIKE = {BAD: math.nan}, {BAD: 30.0}
SKIP = HealthConfig("skip", "skip")


def train(
    folder: Path,
    health: HealthConfig,
    spoil: Mapping[int, float],
    die: Callable[[int], None] = lambda step: None,
    **how,
) -> ToyRun:
    """One life of the process, to its end or until ``die`` raises."""
    toy = toy_run(folder, health=health, spoil=spoil, keep=4, background=False, **how)  # no thread outlives a life
    hooks = [lambda step, record: die(step), JsonlLog(folder / "log.jsonl"), SaveHook(toy.run, EVERY)]
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=STEPS, hooks=hooks)
    return toy


def by_hand(
    folder: Path, left_out: Iterable[int], spoil: Mapping[int, float], world: World = ALONE, parallel: str = "ddp"
) -> dict[str, Tensor]:
    """The reference: every batch is drawn, those left out are not trained on."""
    toy = toy_run(folder, world, parallel, spoil=spoil)
    toy.objective.train()
    for step in range(STEPS):
        batches = next(toy.stream)
        if step not in left_out:
            train_step(toy.objective, toy.engine, batches, world)
    return checkpoint.gather_weights(toy.objective)


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("spoil, kind", [(NAN, "not_finite"), (SPIKE, "spike")])
def test_a_skipped_batch_leaves_no_trace(tmp_path, spoil, kind, caplog):
    toy = train(tmp_path / "run", SKIP, spoil)
    assert equal(toy.objective.state_dict(), by_hand(tmp_path / "hand", {BAD}, spoil))
    rows = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["health/left_out"] for row in rows] == [float(step == BAD) for step in range(STEPS)]
    assert [row[f"health/{kind}"] for row in rows] == [float(step == BAD) for step in range(STEPS)]
    assert [row["health/recoveries"] for row in rows] == [float(step >= BAD) for step in range(STEPS)]
    assert "loss" not in rows[BAD]
    assert rows[BAD]["data/position"] == 2 * (BAD + 1)
    (incident,) = read_incidents(tmp_path / "run" / "incidents.jsonl")
    assert (incident.step, incident.kind, incident.action) == (BAD, kind, "skip")
    worst = incident.findings[0]
    assert (worst.rank, worst.micro_batch) == (0, 1)
    assert worst.documents[0] == f"sample-0-{2 * BAD + 1}-0"
    assert f"step {BAD + 1}: the loss is" in caplog.text
    assert worst.documents[0] in caplog.text
    assert "left out: no weight moved" in caplog.text


def test_a_gradient_that_is_not_finite_is_discarded_and_names_all_samples(tmp_path):
    class Steep(Toy):
        """An infinite slope under a finite loss, where a batch holds a marked value."""

        def forward(self, batch):
            output, marked = super().forward(batch), batch.values.abs().max() > 1e3
            trap = (self.experts[0, 0, 0] * 0).sqrt() if marked else 0.0
            return StepOutput({**output.sums, "common": output.sums["common"] * (0 if marked else 1) + trap})

    toy = toy_run(tmp_path, health=HealthConfig("skip"), spoil={BAD: 1e6})
    toy.objective.__class__ = Steep
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=STEPS)
    incident = read_incidents(tmp_path / "incidents.jsonl")[-1]  # the loss was told of first
    assert "gradient norm is nan; first seen in experts" in incident.reason
    assert [f.micro_batch for f in incident.findings] == [0, 1]  # a gradient does not tell whose it is
    assert all(parameter.isfinite().all() for parameter in toy.objective.parameters())
    assert all(parameter.grad is None for parameter in toy.objective.parameters())


def test_a_warning_changes_nothing_but_what_is_told(tmp_path):
    toy = train(tmp_path / "run", HealthConfig(), SPIKE)
    assert equal(toy.objective.state_dict(), by_hand(tmp_path / "hand", set(), SPIKE))
    rows = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert rows[BAD]["health/spike"] == 1.0
    assert rows[BAD]["health/left_out"] == 0.0
    assert rows[BAD]["loss"] > 10 * rows[BAD - 1]["loss"]
    assert read_incidents(tmp_path / "run" / "incidents.jsonl")[0].action == "warn"


def test_going_back_for_one_batch_is_a_skip_that_costs_more(tmp_path):
    """Everything between checkpoint and batch is repeated to the bit, so nothing is left to tell the two apart."""
    one = train(tmp_path / "skip", SKIP, NAN)
    two = train(tmp_path / "back", replace(SKIP, on_not_finite="rollback", leave_out=1), NAN)
    assert equal(one.objective.state_dict(), two.objective.state_dict())
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("skip", "back")]
    assert logs[0] == logs[1]


def test_a_rollback_leaves_out_what_led_to_the_spike(tmp_path):
    back = HealthConfig("stop", "rollback", leave_out=200)
    toy = train(tmp_path / "far", back, SPIKE)
    (incident,) = read_incidents(tmp_path / "far" / "incidents.jsonl")
    assert (incident.to, incident.leaves_out) == (16, (16, BAD))  # all since the checkpoint
    assert equal(toy.objective.state_dict(), by_hand(tmp_path / "a", {16, 17}, SPIKE))
    at_a_checkpoint = {16: 30.0}
    toy = train(tmp_path / "older", replace(back, leave_out=3), at_a_checkpoint)
    (incident,) = read_incidents(tmp_path / "older" / "incidents.jsonl")
    assert (incident.to, incident.leaves_out) == (12, (14, 16))  # the checkpoint of step 16 would undo nothing
    assert equal(toy.objective.state_dict(), by_hand(tmp_path / "b", {14, 15, 16}, at_a_checkpoint))
    rows = read_jsonl(tmp_path / "older" / "log.jsonl")
    assert [row["step"] - 1 for row in rows if row["health/left_out"]] == [14, 15, 16]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def test_a_merge_goes_on_from_the_average_of_three_checkpoints(tmp_path):
    toy = train(tmp_path / "run", HealthConfig("merge", "merge"), NAN)
    (incident,) = read_incidents(tmp_path / "run" / "incidents.jsonl")
    assert (incident.to, incident.merged, incident.leaves_out) == (16, (8, 12, 16), (16, BAD))
    # by hand: the same run up to there, its checkpoints averaged in float64, and what follows
    hand = toy_run(tmp_path / "hand", spoil=NAN, keep=4)
    fit(hand.run, hand.objective, hand.engine, hand.stream, steps=16, hooks=[SaveHook(hand.run, EVERY)])
    files = [tmp_path / "hand" / "checkpoints" / f"step-{n:08d}" / "model.safetensors" for n in (8, 12, 16)]
    states = [checkpoint.read_weights(file) for file in files]
    with torch.no_grad():
        for name, tensor in hand.objective.state_dict().items():
            tensor.copy_(sum(state[name].double() for state in states) / 3)
    for step in range(16, STEPS):
        batches = next(hand.stream)
        if step not in (16, BAD):
            train_step(hand.objective, hand.engine, batches, ALONE)
    for name, tensor in hand.objective.state_dict().items():  # rounding of the mean, through eight steps of Muon
        torch.testing.assert_close(toy.objective.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


POLICIES = [
    HealthConfig("skip", "skip"),
    HealthConfig("rollback", "rollback", leave_out=3),
    HealthConfig("merge", "merge", leave_out=3),
]


@pytest.mark.parametrize(
    "health",
    [policy if policy.on_spike == "rollback" else pytest.param(policy, marks=pytest.mark.slow) for policy in POLICIES],
    ids=lambda health: health.on_spike,
)
@pytest.mark.parametrize(
    "spoil",
    [{14: math.nan, BAD: 30.0}, pytest.param({5: math.nan, 7: math.nan}, marks=pytest.mark.slow)],
    ids=["two", "early"],
)
def test_killed_at_any_moment_of_a_recovery_it_ends_bitwise_equal(tmp_path, monkeypatch, health, spoil):
    """Lives that end after every step; before and after the incident is noted; and when the checkpoint is loaded."""

    class Killed(BaseException):
        pass

    whole = train(tmp_path / "whole", health, spoil)
    calls = 0

    def at_call(n: int, method: Callable) -> Callable:
        def dying(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                raise Killed
            return method(*args, **kwargs)

        return dying

    def die_at(step: int) -> Callable[[int], None]:
        def die(now: int) -> None:
            if now == step:
                raise Killed

        return die

    load, fill = Run.load, Run._load_weights
    for n in (1, 2, 3) if health.on_spike != "skip" else ():
        for name, method in (("load", load), ("_load_weights", fill)):
            folder, calls = tmp_path / f"{name}-{n}", 0
            with monkeypatch.context() as patch:
                patch.setattr(Run, name, at_call(n, method))
                with pytest.raises(Killed) if n < 3 else _perhaps(Killed):
                    train(folder, health, spoil)
            compare(train(folder, health, spoil), whole, folder, tmp_path / "whole")
    folder = tmp_path / "every"
    for step in range(13, 20):
        with _perhaps(Killed):
            train(folder, health, spoil, die_at(step))
    compare(train(folder, health, spoil), whole, folder, tmp_path / "whole")


class _perhaps:
    def __init__(self, error: type[BaseException]):
        self.error = error

    def __enter__(self) -> None: ...

    def __exit__(self, kind, *_) -> bool:
        return kind is self.error


def compare(one: ToyRun, other: ToyRun, folder: Path, whole: Path) -> None:
    assert equal(one.objective.state_dict(), other.objective.state_dict())
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert (folder / "incidents.jsonl").read_bytes() == (whole / "incidents.jsonl").read_bytes()
    assert one.stream.position == other.stream.position
    assert one.run.guard.state_dict() == other.run.guard.state_dict()


def test_what_comes_back_stops_the_run_with_all_that_is_known(tmp_path):
    spoil = dict.fromkeys((9, 11, 13, 15), math.nan)
    for _ in range(2):  # started again it stops again: the bound is no matter of one life
        with pytest.raises(Refused, match="after 3 recoveries within 1000 steps") as stopped:
            train(tmp_path, SKIP, spoil)
        for told in ("step 10: skip, as the loss is not finite", "step 14: skip", "sample-0-31-0", "incidents.jsonl"):
            assert told in str(stopped.value)
        assert [i.action for i in read_incidents(tmp_path / "incidents.jsonl")] == ["skip"] * 3 + ["stop"]
    toy = train(tmp_path, replace(SKIP, within=3), spoil)
    assert equal(toy.objective.state_dict(), by_hand(tmp_path / "hand", set(spoil), spoil))


def test_a_stop_leaves_the_run_as_it_was_for_another_policy(tmp_path, caplog):
    with pytest.raises(
        Refused, match=r"(?s)rank 0, micro-batch 1: common is nan; samples: sample-0-35-0.*=skip leaves"
    ):
        train(tmp_path / "run", HealthConfig(), NAN)
    assert f"python tools/incidents.py {tmp_path / 'run'}" in caplog.text
    toy = train(tmp_path / "run", SKIP, NAN)
    assert equal(toy.objective.state_dict(), by_hand(tmp_path / "hand", {BAD}, NAN))
    assert [i.action for i in read_incidents(tmp_path / "run" / "incidents.jsonl")] == ["skip"]


def test_without_a_checkpoint_there_is_nowhere_to_go_back_to(tmp_path):
    with pytest.raises(Refused, match="no whole checkpoint at step 2 or before"):
        train(tmp_path, HealthConfig("rollback"), {2: math.nan})


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    def tear(step: int) -> None:
        if step == BAD:
            file = tmp_path / "checkpoints" / "step-00000016" / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1])

    train(tmp_path, HealthConfig("rollback", leave_out=1), NAN, tear)
    assert read_incidents(tmp_path / "incidents.jsonl")[0].to == 12


def test_a_recovery_whose_checkpoints_are_gone_is_told_and_not_repeated(tmp_path, caplog):
    class Killed(BaseException):
        pass

    def die(step: int) -> None:
        if step == BAD:  # the first step after going back
            raise Killed

    health = HealthConfig("merge", leave_out=1)

    def dying_load(run: Run, path: Path, merged=()):
        raise Killed

    load = Run.load
    Run.load = dying_load
    try:
        with pytest.raises(Killed):
            train(tmp_path, health, NAN)
    finally:
        Run.load = load
    file = tmp_path / "checkpoints" / "step-00000008" / "model.safetensors"
    file.unlink()
    train(tmp_path, health, NAN)
    assert f"the merge of step {BAD + 1} cannot be repeated" in caplog.text


def test_a_merge_needs_checkpoints_to_be_kept(tmp_path):
    with pytest.raises(ValueError, match="merge averages 3 checkpoints, but keep=2"):
        toy_run(tmp_path, health=HealthConfig("merge"), keep=2)


def test_plans_of_an_older_format_are_refused_and_not_read_one_step_off(tmp_path):
    """Rows once had no number of their format, and counted steps from 0."""
    toy = train(tmp_path, SKIP, NAN)
    path = tmp_path / "incidents.jsonl"
    (row,) = read_jsonl(path)
    older = {name: value for name, value in row.items() if name != "format"} | {"step": BAD, "leaves_out": [0, -1]}
    told = rf"incident 1 \(step {BAD}, skip\) has the format of before 2, and this version reads 2"
    path.write_text(json.dumps(older) + "\n")
    again = toy_run(tmp_path, health=SKIP, spoil=NAN, keep=4)
    with pytest.raises(ValueError, match=rf"incidents\.jsonl: {told}.*delete it"):
        again.run.resume()
    path.unlink()
    state = {**toy.run.guard.state_dict(), "plans": [older]}
    with pytest.raises(checkpoint.CheckpointError, match=f"the checkpoint's plans: {told}.*train anew"):
        again.run.guard.load_state_dict(state)
    path.write_text(json.dumps(older) + "\n")
    for folder in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(folder)
    anew = toy_run(tmp_path, health=SKIP, spoil=NAN, keep=4)
    assert anew.run.resume() == 0  # it will meet all again
    assert not path.read_text()


def ranks(world: World, folder: str, parallel: str, action: str, spoil: dict[int, float]) -> tuple:
    health = HealthConfig(action, action, leave_out=3)
    toy = toy_run(Path(folder), world, parallel, health=health, spoil=spoil, keep=4)
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=STEPS, hooks=[SaveHook(toy.run, EVERY)])
    left = [step for step in range(STEPS) if toy.run.guard.leaves_out(step, 0)]
    hand = by_hand(Path(folder) / "hand", left, spoil, world, parallel)
    mine = checkpoint.gather_weights(toy.objective)
    return left, equal(mine, hand), [json.dumps(i.to_json()) for i in toy.run.guard.incidents]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["skip", "rollback", "merge"])
def test_two_ranks_decide_alike(tmp_path, parallel, action):
    told = run_ranks(ranks, 2, str(tmp_path), parallel, action, {9: math.nan, BAD: 1e3})
    assert told[0][0] == told[1][0] == {"skip": [9, 17]}.get(action, [8, 9, 16, 17])
    assert told[0][1] == (action != "merge")
    assert told[0][2] == told[1][2]
    nan, spike = read_incidents(tmp_path / "incidents.jsonl")
    assert [f.rank for f in nan.findings] == [1, 1]  # of two terms
    assert spike.findings[0].rank == 1
    assert len(spike.findings) == 4  # all micro-batches, the worst first
