"""The area rl at its smallest size: rows by the names that are asked for."""

from __future__ import annotations

import pytest

from tools.benchmarks.rl import rows
from tools.benchmarks.row import Settings


@pytest.mark.slow
def test_stages_apart_against_in_step():
    found = {row.name: row for row in rows(Settings(repeats=1, quick=True, part="latency"))}
    assert next(iter(found)) == "asynchronous, latency"
    assert found["asynchronous, latency"].unit == "trajectories/s"
    assert found["asynchronous, latency"].ours > 0
    idle = found["trainer idle, latency"]
    assert 0 < idle.ours < 100
    assert idle.ours < idle.peer  # that much is sure on any machine: the others' trainer waits for every answer


def test_packs_hold_less_than_padding():
    tokens, patches = rows(Settings(repeats=1, quick=True, part="packs"))
    assert tokens.ratio > 1.5
    assert patches.ratio > 1.0
