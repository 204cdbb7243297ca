"""Stop and resume, bitwise, in one process."""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mmagent.engine.checkpoint import CheckpointError
from mmagent.engine.schedule import ScheduleConfig, schedule
from mmagent.train.hooks import JsonlLog, SaveHook, read_jsonl
from mmagent.train.loop import fit
from mmagent.train.run import RandomState, Run
from tests.engine_kit import ALONE, Toy, ToyStream, toy_run


def train(folder: Path, steps: int, total: int = 12, interval: int = 3) -> Toy:
    toy = toy_run(folder)
    fit(
        toy.run,
        toy.objective,
        toy.engine,
        toy.stream,
        steps=steps,
        schedule=lambda step: schedule(step, total, ScheduleConfig(warmup=2)),
        hooks=[SaveHook(toy.run, interval), JsonlLog(folder / "metrics.jsonl")],
    )
    return toy.objective


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_stop_and_resume_equal_an_uninterrupted_run_bitwise(tmp_path):
    whole = train(tmp_path / "whole", 12)
    for steps in (4, 5, 9, 12, 12):
        torch.manual_seed(random.randrange(1000))  # whatever the process did before must not matter
        parts = train(tmp_path / "parts", steps)
    assert same(whole, parts)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    rows = read_jsonl(tmp_path / "parts" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"loss", "loss/common", "error", "seen", "grad_norm", "lr_scale", "data/position"} <= set(rows[0])
    assert not any(name.startswith("time/") for name in rows[0])
    timing = read_jsonl(tmp_path / "parts" / "metrics.time.jsonl")
    assert [row["step"] for row in timing] == list(range(1, 13))
    assert timing[0]["time/tokens_per_second"] > 0


def test_a_role_follows_a_schedule_of_its_own(tmp_path):
    """Experts begin two steps late and then move at the rate of the others; a role that is not there is named."""
    toy = toy_run(tmp_path / "run", dropout=0.0)
    start = {name: p.detach().clone() for name, p in toy.objective.named_parameters()}
    moved = []

    def watch(step, record):
        now = dict(toy.objective.named_parameters())
        moved.append({name: not torch.equal(now[name], before) for name, before in start.items()})

    late = {"experts": lambda step: 0.0 if step < 2 else 1.0}
    log = JsonlLog(tmp_path / "log.jsonl")
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=3, role_schedules=late, hooks=[watch, log])
    assert [row["experts"] for row in moved] == [False, False, True]
    assert all(row["stacked.weight"] for row in moved)
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [(row["lr_scale"], row["lr_scale/experts"]) for row in rows] == [(1.0, 0.0), (1.0, 0.0), (1.0, 1.0)]
    with pytest.raises(ValueError, match="roles that the optimizer does not have: text"):
        toy.engine.step(1.0, {"text": 0.5})


def test_steps_past_the_checkpoint_are_repeated_and_logged_once(tmp_path):
    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "torn", 7, interval=5)
    shutil.rmtree(tmp_path / "torn" / "checkpoints" / "step-00000007")  # as if killed before the last save
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')  # and in the middle of a line
    parts = train(tmp_path / "torn", 12, interval=5)
    assert same(whole, parts)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "torn")]
    assert logs[0] == logs[1]


def test_a_finished_run_returns_at_once(tmp_path):
    train(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    train(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


def test_phases_that_are_past_are_skipped(tmp_path):
    def phases(folder: Path, *ends: int) -> list[int]:
        toy, seen = toy_run(folder), []
        for end in ends:
            fit(
                toy.run,
                toy.objective,
                toy.engine,
                toy.stream,
                steps=end,
                last=ends[-1],
                hooks=[lambda step, record: seen.append(step)],
            )
        return seen

    assert phases(tmp_path, 2, 5) == [1, 2, 3, 4, 5]
    assert phases(tmp_path, 2, 5, 6) == [6]
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()
    with pytest.raises(ValueError, match="is at step 6, past the 3 steps asked for"):
        phases(tmp_path, 2, 3)


def test_a_checkpoint_past_the_end_is_refused(tmp_path):
    """Its weights are those of another schedule: to hand them on as the end of this one would be a lie."""
    train(tmp_path, 6)
    with pytest.raises(ValueError, match="is at step 6, past the 5 steps asked for: ask for at least 6, name another"):
        train(tmp_path, 5)


def test_a_torn_checkpoint_is_told_and_the_older_one_taken(tmp_path, caplog):
    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "run", 9)
    (tmp_path / "run" / "checkpoints" / "step-00000009" / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        parts = train(tmp_path / "run", 12)
    assert "model.safetensors is torn: 0 bytes" in caplog.text
    assert same(whole, parts)
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["refused-step-00000009", "step-00000009", "step-00000012"]


def test_parts_that_changed_are_named(tmp_path):
    train(tmp_path, 3)
    toy = toy_run(tmp_path)
    run = Run(tmp_path, ALONE, {"model": toy.objective, "engine": toy.engine})
    with pytest.raises(
        CheckpointError, match=r"holds the parts \[.*'stream'\], this run \['engine', 'health', 'model', 'random'\]"
    ):
        run.resume()
    with pytest.raises(ValueError, match="part 'stream': list has no state_dict"):
        Run(tmp_path, ALONE, {"stream": []})
    with pytest.raises(ValueError, match="random"):
        Run(tmp_path, ALONE, {"random": ToyStream(ALONE)})
    with pytest.raises(ValueError, match="keep"):
        Run(tmp_path, ALONE, {}, keep=0)


def test_a_model_of_another_shape_is_refused_by_name(tmp_path):
    train(tmp_path, 3)
    toy = toy_run(tmp_path)
    toy.objective.stacked = torch.nn.Linear(6, 12)
    with pytest.raises(CheckpointError, match=r"misshapen: stacked.weight \(9, 6\), expected \(12, 6\)"):
        toy.run.resume()


def test_optimizer_state_that_does_not_fit_is_named(tmp_path):
    toy = toy_run(tmp_path)
    with pytest.raises(ValueError, match="does not have: ghost"):
        toy.engine.load_state_dict({"optimizer": {"ghost": {}}})
    with pytest.raises(ValueError, match=r"momentum of experts is misshapen: \(2,\) for \(3, 6, 3\)"):
        toy.engine.load_state_dict({"optimizer": {"experts": {"momentum": torch.ones(2)}}})


def test_a_stream_that_ends_is_an_error(tmp_path):
    toy = toy_run(tmp_path)
    with pytest.raises(ValueError, match="ended after 0 of 2 steps"):
        fit(toy.run, toy.objective, toy.engine, iter([]), steps=2)


@dataclass
class Config:
    lr: float = 1.0
    steps: int = 5


def test_the_config_lies_beside_every_checkpoint_and_changes_are_told(tmp_path, caplog):
    part = ToyStream(ALONE)
    Run(tmp_path, ALONE, {"stream": part}, config=Config()).finish(1)
    text = "lr: 1.0\nsteps: 5\n"
    assert (tmp_path / "config.yaml").read_text() == text
    assert (tmp_path / "checkpoints" / "step-00000001" / "config.yaml").read_text() == text
    with caplog.at_level(logging.WARNING):
        assert Run(tmp_path, ALONE, {"stream": part}, config=Config()).resume() == 1
        assert not caplog.records
        Run(tmp_path, ALONE, {"stream": part}, config=Config(steps=9)).resume()
    assert "-steps: 5\n+steps: 9" in caplog.text


def test_random_state_round_trips_through_plain_values():
    state = RandomState()
    saved = state.state_dict()
    first = (random.random(), np.random.rand(), torch.rand(2))
    np.random.randn(3)
    state.load_state_dict(saved)
    again = (random.random(), np.random.rand(), torch.rand(2))
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])
    assert json.dumps(saved["python"])


class Noted:
    """A cache that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def drop(self, before: int) -> None:
        self.told.append(("drop", before))

    def drop_after(self, version: int) -> None:
        self.told.append(("drop_after", version))

    def make_room(self, tries: int) -> None:
        self.told.append(("make_room", tries))


def test_caches_hear_what_landed_what_failed_and_where_the_run_went_back_to(tmp_path, monkeypatch):
    run, cache = toy_run(tmp_path).run, Noted()
    run.caches.append(cache)
    run.save(2)
    run.settle()
    assert cache.told[-1] == ("drop", 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run._saver, "_write_own", full)
        run.save(4)
        assert not run.settle()
        assert cache.told[-2:] == [("drop", 2), ("make_room", 2)]
        run.save(4)  # settles once more, of which nothing follows
        assert not run.settle()
    assert [told for told in cache.told if told[0] == "make_room"] == [("make_room", 2), ("make_room", 1)]
    run.finish(4)
    assert cache.told[-1] == ("drop", 4)
    assert run.rollback(2) == 2
    assert cache.told[-1] == ("drop_after", 2)
