"""Where a step's time goes: nesting, sums, marks from the backward, and what a device's clock says."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from mmagent.train import segments as module
from mmagent.train.loop import fit
from mmagent.train.segments import Segments
from mmagent.train.step import train_step
from tests.engine_kit import ALONE, toy_run


class Clock:
    """``time.monotonic`` that moves when told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def pass_by(self, seconds):
        self.now += seconds


def test_a_moment_counts_to_the_innermost_segment(monkeypatch):
    clock, segments = Clock(monkeypatch), Segments()
    with segments("outer"):
        clock.pass_by(1)
        with segments("inner"):
            clock.pass_by(2)
            assert segments.current == ("inner", 101.0)
            with segments("outer"):  # a name may be open twice
                clock.pass_by(4)
        assert segments.current == ("outer", 100.0)
        clock.pass_by(8)
    clock.pass_by(16)  # nobody's
    assert segments.current is None
    assert segments.take() == {"outer": 13.0, "inner": 2.0}
    assert segments.take() == {}


def test_what_is_open_when_taken_is_split_there(monkeypatch):
    clock, segments = Clock(monkeypatch), Segments()
    with segments("hooks"):
        clock.pass_by(3)
        assert segments.take() == {"hooks": 3.0}
        clock.pass_by(5)
    assert segments.take() == {"hooks": 5.0}


def test_an_error_closes_its_segments(monkeypatch):
    clock, segments = Clock(monkeypatch), Segments()

    def fail():
        with segments("outer"), segments("inner"):
            clock.pass_by(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert segments.current is None
    assert segments.take() == {"outer": 0.0, "inner": 1.0}


class Slow(torch.autograd.Function):
    """Takes its time in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.05)
        return gradient


def test_a_backward_ends_where_waiting_for_peers_begins():
    """As DDP waits: in a callback behind the graph, queued while it is gone through."""
    layer, segments = nn.Linear(2, 2), Segments()

    def wait(gradient):
        torch.autograd.Variable._execution_engine.queue_callback(lambda: time.sleep(0.1))

    layer.weight.register_hook(wait)
    loss = Slow.apply(layer(torch.ones(1, 2)).sum())
    with segments.backward(loss):
        loss.backward()
        assert segments.current[0] == "reduce"
    taken = segments.take()
    assert set(taken) == {"backward", "reduce"}
    assert 0.05 <= taken["backward"] < 0.1 <= taken["reduce"]
    with segments.backward(torch.ones(())):  # nothing to do without a graph
        pass


def test_a_step_names_all_its_time(tmp_path):
    toy, rows = toy_run(tmp_path), []

    class Watch:
        segment = "validation"

        def __call__(self, step, record):
            assert toy.run.segments.current[0] == "validation"
            assert toy.run.segments.step == step
            rows.append((record["time/step"], toy.run.segments.take()))

    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=3, hooks=[Watch()])
    within = {"data", "count", "forward", "backward", "reduce", "optimizer", "after"}
    shares = []
    for seconds, taken in rows:
        assert within <= set(taken) <= within | {"validation"}
        shares.append(sum(taken[name] for name in within) / seconds)
    # what no segment holds is a few lines of Python between them, in which another process may take the core
    assert max(shares) <= 1.0
    assert max(shares) > 0.6
    assert "saving" in toy.run.segments.take()


def test_a_step_needs_no_segments(tmp_path):
    toy = toy_run(tmp_path)
    assert train_step(toy.objective, toy.engine, next(toy.stream), ALONE).loss > 0


def test_marks_are_cheap():
    """Microseconds, while a step takes at least tens of milliseconds; the fastest of many, for cores are shared."""
    segments, best = Segments(), float("inf")
    for _ in range(50):
        started = time.perf_counter()
        for _ in range(100):
            with segments("forward"):
                pass
        best = min(best, (time.perf_counter() - started) / 100)
    assert best < 20e-6


class Event:
    """A CUDA event that is passed when the test says so."""

    made: list[Event] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made.append(self)

    def record(self):
        self.at, self.passed = len(Event.made), False

    def query(self):
        return self.passed

    def elapsed_time(self, later):
        return 1000.0 * (later.at - self.at)


def test_a_device_is_read_when_it_has_passed(monkeypatch):
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: pytest.fail("must not wait"))
    segments = Segments(torch.device("cuda"))
    with segments("forward"), segments("reduce"):
        pass
    assert not any(name.startswith("device/") for name in segments.take())
    for event in Event.made[:2]:
        event.passed = True
    taken = segments.take()
    assert taken == {"device/forward": 1.0}
    for event in Event.made:
        event.passed = True
    assert segments.take() == {"device/reduce": 1.0, "device/forward": 1.0}
    with segments("forward"):
        pass
    assert len(Event.made) == 4  # used again
