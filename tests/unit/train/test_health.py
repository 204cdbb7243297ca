"""Spikes are seen, slopes are not; garbage is collected on schedule."""

from __future__ import annotations

import gc
import logging

import pytest

from mmagent.train.health import CollectGarbage, Spikes


def test_a_spike_is_told_once(caplog):
    hook, seen = Spikes(window=20, factor=10.0), []
    values = [3.0 - 0.01 * i + 0.02 * (i % 3) for i in range(40)]
    values[30] = 9.0
    with caplog.at_level(logging.WARNING):
        for step, value in enumerate(values, 1):
            record = {"loss": value}
            hook(step, record)
            seen.append(record["health/spike"])
    assert [i for i, spike in enumerate(seen) if spike] == [30]
    assert "step 31: loss is 9, the median of late is 2." in caplog.text


def test_a_constant_loss_does_not_make_every_ripple_a_spike():
    hook = Spikes()
    for step in range(30):
        hook(step, record := {"loss": 1.0 + 1e-6 * (step % 2)})
        assert not record["health/spike"]


def test_garbage_is_collected_on_schedule(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    try:
        hook = CollectGarbage(3)
        assert not gc.isenabled()
        for step in range(1, 8):
            hook(step, {})
    finally:
        gc.enable()
    assert len(collected) == 2
    with pytest.raises(ValueError, match="interval"):
        CollectGarbage(0)
