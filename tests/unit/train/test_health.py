"""Spikes are seen, slopes are not; garbage is collected on schedule."""

from __future__ import annotations

import gc

import pytest

from mmagent.train.health import CollectGarbage, HealthConfig, SpikeTest


def spikes(values: list[float], test: SpikeTest) -> list[int]:
    found = []
    for i, value in enumerate(values):
        if value > test.limit():
            found.append(i)
        test.recent.append(value)
    return found


def test_a_spike_stands_out_and_a_slope_does_not():
    values = [3.0 - 0.01 * i + 0.02 * (i % 3) for i in range(40)]
    assert spikes(values, SpikeTest(20, 10.0)) == []
    values[30] = 9.0
    assert spikes(values, SpikeTest(20, 10.0)) == [30]
    assert spikes([1.0, 100.0, 1.0, 50.0], SpikeTest(20, 10.0)) == []  # too few are known to say what is usual


def test_a_constant_loss_does_not_make_every_ripple_a_spike():
    assert spikes([1.0 + 1e-6 * (step % 2) for step in range(30)], SpikeTest(100, 10.0)) == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"on_not_finite": "warn"}, "health.on_not_finite 'warn' is none of stop, skip, rollback, merge"),
        ({"on_spike": "ignore"}, "health.on_spike 'ignore' is none of warn, stop, skip, rollback, merge"),
        ({"window": 5}, "health.window must be at least 10, got 5"),
        ({"leave_out": 0}, "health.leave_out must be positive, got 0"),
        ({"factor": -1.0}, "health.factor must be positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        HealthConfig(**wrong)


def test_garbage_is_collected_on_schedule_and_python_has_its_way_again_afterwards(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    hook = CollectGarbage(3, steps=7)
    assert gc.isenabled()  # what is set up may leave garbage
    for step in range(1, 8):
        hook(step, {})
        assert gc.isenabled() == (step == 7)
        assert (gc.get_freeze_count() > 0) == (step < 7)
    assert len(collected) == 3  # once to begin with
    with pytest.raises(ValueError, match="interval"):
        CollectGarbage(0)


def test_a_run_that_ends_early_leaves_the_collector_as_it_was():
    hook = CollectGarbage(3, steps=7)
    hook(1, {})
    assert not gc.isenabled()
    del hook
    assert gc.isenabled()
    gc.disable()
    try:  # who runs without a collector keeps it so
        hook = CollectGarbage(3, steps=1)
        hook(1, {})
        del hook
        assert not gc.isenabled()
    finally:
        gc.enable()
