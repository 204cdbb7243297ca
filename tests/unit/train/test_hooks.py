"""Showing, logging, validating, leaving."""

from __future__ import annotations

import io
import json
import os
import signal

import pytest
import torch

from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.train import logs
from mmagent.train.hooks import Every, JsonlLog, LeaveOnSignal, Progress, SaveHook, TensorBoardLog, Validate, read_jsonl
from mmagent.train.loop import fit
from tests.engine_kit import ALONE, Toy, ToyBatch, toy_run

RECORD = {"loss": 2.5, "time/step": 2.0, "time/data": 0.1, "time/tokens_per_second": 12345.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_redraws_one_line_on_a_terminal():
    out = Terminal()
    bar = Progress("pretrain", 4, out=out)
    for step in (1, 2, 3, 4):
        bar(step, RECORD)
    text = out.getvalue()
    assert text.count("\n") == 1
    assert text.count("\r") == 4
    assert "pretrain [=====               ] 1/4  loss 2.5  12.3k tok/s  2.00 s/step  warming up" in text
    assert text.rstrip().removesuffix("\x1b[K").endswith("done")


def test_progress_writes_plain_lines_elsewhere():
    out = io.StringIO()
    bar = Progress("sft", 100, interval=1e9, out=out)
    for step in range(1, 101):
        bar(step, RECORD)
    lines = out.getvalue().splitlines()
    assert [line.split()[-1] for line in lines] == ["up", "left", "done"]
    assert "\r" not in out.getvalue()


def test_the_time_left_is_told_by_steps_that_are_warm(monkeypatch):
    """A first step of 60 s, then 7 s each: a million steps take 81 days, not two years."""
    out, now = io.StringIO(), [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    bar = Progress("x", 10**6, out=out, interval=0.0)
    for step, seconds in ((1, 60.0), (2, 7.0), (3, 7.0)):
        now[0] += seconds
        bar(step, RECORD | {"time/step": seconds})
    first, _, third = out.getvalue().splitlines()
    assert first.endswith("60.00 s/step  warming up")
    assert third.endswith("7.00 s/step  1944:26:19 left")


def test_the_line_tells_tokens_and_seconds_of_the_same_steps(monkeypatch):
    """Steps of 1024 tokens in 0.2 s; validation and saving take another 0.3 s of every second one."""
    out, now = io.StringIO(), [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    bar = Progress("x", 101, out=out, interval=0.0)
    for step in range(1, 102):
        now[0] += 0.2 if step % 2 else 0.5
        bar(step, {"time/step": 0.2, "time/tokens_per_second": 1024 / 0.2})
    lines = out.getvalue().splitlines()
    assert "5.1k tok/s  0.20 s/step  warming up" in lines[0]
    assert "2.0k tok/s  0.50 s/step" in lines[1]
    assert "2.9k tok/s  0.35 s/step" in lines[-1]


def test_the_log_drops_what_a_resumed_run_will_write_again(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    log = JsonlLog(path)
    for step in (1, 2, 3):
        log(step, RECORD | {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["loss"] for row in read_jsonl(path)] == [1, 2, 3]  # readers survive a torn line
    log = JsonlLog(path)
    log(3, RECORD | {"loss": 30.0})
    log(4, RECORD | {"loss": 40.0})
    assert [(row["step"], row["loss"]) for row in read_jsonl(path)] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    timing = read_jsonl(tmp_path / "logs" / "metrics.time.jsonl")
    assert [row["step"] for row in timing] == [1, 2, 3, 4]
    assert set(timing[0]) == {"step", "time/step", "time/data", "time/tokens_per_second"}
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_tensorboard(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path)
    log(1, RECORD)
    log(2, RECORD | {"loss": 1.5})
    accumulator = reader.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    for writer, step, loss in ((log, 3, 9.0), (log, 2, 1.25), (log, 3, 1.0), (TensorBoardLog(tmp_path), 3, 0.5)):
        writer(step, RECORD | {"loss": loss})  # went back to step 2, then was killed and began again at 3
    accumulator = reader.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("loss")] == [(1, 2.5), (2, 1.25), (3, 0.5)]


def test_every_calls_at_intervals_and_at_the_end():
    called = []
    hook = Every(3, lambda step, record: called.append(step), steps=10)
    for step in range(1, 11):
        hook(step, {})
    assert called == [3, 6, 9, 10]
    with pytest.raises(ValueError, match="interval"):
        Every(0, hook)


def test_validation_changes_nothing_but_the_record():
    torch.manual_seed(0)
    toy = Toy(dropout=0.5)
    engine = build_engine(toy, build_optimizer(toy, OptimConfig()), EngineConfig("none"), ALONE)
    toy.train()
    batches = [ToyBatch(torch.randn(n, 6)) for n in (2, 3)]
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in toy.state_dict().items()}
    record = {"loss": 1.0}
    validate = Validate(toy, lambda: iter(batches), ALONE, engine, prefix="held_out/")
    validate(1, record)
    again: dict[str, float] = {}
    validate(2, again)
    assert {"held_out/loss", "held_out/loss/common", "held_out/error"} <= set(record)
    assert again["held_out/loss"] == record["held_out/loss"]  # no dropout
    assert record["time/held_out"] > 0
    assert record["loss"] == 1.0
    assert toy.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in toy.state_dict().items())
    assert all(p.grad is None for p in toy.parameters())
    assert toy.after_step() == {"seen": 0.0}
    with pytest.raises(ValueError, match="no batch"):
        Validate(toy, list, ALONE, engine)(1, {})


def test_hooks_that_save_run_last_and_see_what_others_added(tmp_path):
    toy, order = toy_run(tmp_path), []

    class Saves(SaveHook):
        def __call__(self, step, record):
            order.append(("save", record["extra"]))

    def extra(step, record):
        record["extra"] = 1.0
        order.append(("extra", step))

    hooks = [Every(1, Saves(toy.run, 1)), extra, JsonlLog(tmp_path / "m.jsonl")]
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=1, hooks=hooks)
    assert order == [("extra", 1), ("save", 1.0)]
    assert json.loads((tmp_path / "m.jsonl").read_text())["extra"] == 1.0
    with pytest.raises(ValueError, match="interval"):
        SaveHook(toy.run, 0)


def test_sigterm_saves_and_leaves_and_the_run_goes_on(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        toy = toy_run(tmp_path)

        def terminate(step, record):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit) as left:
            fit(
                toy.run,
                toy.objective,
                toy.engine,
                toy.stream,
                steps=10,
                hooks=[LeaveOnSignal(toy.run), terminate],
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
    assert "saved step 3" in capsys.readouterr().err
    assert toy_run(tmp_path).run.resume() == 3


def test_who_leaves_before_the_first_step_says_so(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            LeaveOnSignal(toy_run(tmp_path).run).leave(0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "no step was done" in (said := capsys.readouterr().err)
    assert "saved" not in said
