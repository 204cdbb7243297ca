"""Phases put their own schedule at their own place."""

from __future__ import annotations

from mmagent.engine.schedule import ScheduleConfig
from mmagent.train.phases import Phase


def test_a_phase_runs_its_schedule_from_its_first_step():
    phase = Phase("adapter", 10, freeze=["encoder", "decoder"], lr=0.5, schedule=ScheduleConfig("wsd", 2, 0.0, 0.5))
    rate = phase.rate(start=100)
    assert [round(rate(step), 3) for step in (100, 101, 102, 104, 109)] == [0.167, 0.333, 0.5, 0.5, 0.0]
    assert phase.describe(100) == "phase adapter: steps 101 to 110, frozen: encoder, decoder"
    assert Phase().describe(0) == "phase all: steps 1 to 1000, nothing frozen"


def test_a_delayed_schedule_stands_still_and_then_begins():
    config = ScheduleConfig("wsd", warmup=2, delay=3, floor=0.0, decay=0.5)
    rates = [round(Phase("late", 10, schedule=config).rate(0)(step), 3) for step in range(10)]
    assert rates == [0.0, 0.0, 0.0, 0.333, 0.667, 1.0, 0.75, 0.5, 0.25, 0.0]
