"""What the bench of starting times: the recipe as a user starts it, part by part; steps told to hooks or not."""

from __future__ import annotations

import gc
import random
import sys
import types

import pytest

from mmagent.train import hooks as usual
from tools.benchmarks.recipe_run import BLOCK, WARM, Hooks
from tools.benchmarks.row import Settings
from tools.benchmarks.start import PARTS, _output, _paired, hook_rows, rows, start_rows


def test_programs_are_timed_in_turns():
    row = _paired("x", "import time; time.sleep(0.05)", "import time; time.sleep(0.2), 1", 1)
    assert row.ratio > 1
    assert row.ours >= 0.05
    assert row.peer >= 0.2
    with pytest.raises(RuntimeError, match="no such thing"):
        _output([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_parts_of_a_start_stand_beside_the_whole():
    start = dict.fromkeys(PARTS, 1.0) | {"launcher": 0.0, "after imports": 5.0, "whole": 8.0, "other": 2.0}
    first, *parts = start_rows("x", [start, start, start | {"after imports": 99.0}])
    assert (first.ours, first.peer, first.ratio) == (5.0, 10.0, 2.0)  # the median
    assert [row.name for row in parts] == [f"x: {part}" for part in (*PARTS[1:], "other")]  # no launcher: not told
    assert {row.peer for row in parts} == {8.0}


def test_what_hooks_cost_is_found_in_a_noisy_run():
    """Hooks of 4 % beside noise of 30 % that lasts for several blocks: the median of pairs tells it within 1 %."""
    rng, pairs, drift = random.Random(0), [], 1.0
    for _ in range(400):
        drift = min(max(drift * (1 + rng.gauss(0, 0.1)), 0.7), 1.3)
        base = [drift * (1 + rng.gauss(0, 0.03)) for _ in range(2)]
        pairs.append({"with": [1.04 * base[0], 1.04], "without": [base[1], 1.0]})
    wall, processor, own = hook_rows("x", {"pairs": pairs, "own": [(0.04, 0.96)] * 3 + [(0.0, 1.0)]})
    assert wall.ratio == pytest.approx(1 / 1.04, abs=0.01)
    assert 0.001 < wall.spread < 0.02
    assert processor.ratio == pytest.approx(1 / 1.04)
    assert processor.ours == pytest.approx(BLOCK / 1.04)
    assert own.ours == pytest.approx(3.0)  # the mean: what is dear but rare counts


def test_hooks_are_told_of_half_the_steps_and_every_kind_comes_first_at_times(monkeypatch):
    told: list[int] = []
    clock, run = Hooks(), types.SimpleNamespace(segments=None)
    monkeypatch.setattr(usual, "tell", lambda hooks, run, step, record: told.append(step))
    steps = WARM + 2 * BLOCK * 20 + 1  # one of a pair that is not whole
    for step in range(1, steps + 1):
        clock.tell([], run, step, {"time/step": 1.0})
    gc.enable()
    assert told[:WARM] == list(range(1, WARM + 1))
    blocks = [step for step in told[WARM:] if step < steps]
    assert len(blocks) == 20 * BLOCK
    firsts = {(step - WARM - 1) % (2 * BLOCK) for step in blocks}
    assert firsts == set(range(2 * BLOCK))
    found = clock.report()
    assert len(found["pairs"]) == 20
    assert all(seconds[0] > 0 for pair in found["pairs"] for seconds in pair.values())


@pytest.mark.slow
def test_the_recipe_starts_and_is_timed():
    found = {row.name: row for row in rows(Settings(1, quick=True))}
    cold, warm = (found[f"first step, {kind}, ranks: 1, after imports"] for kind in ("cold", "warm"))
    assert cold.ours > warm.ours > 0.3
    parts = [row for name, row in found.items() if name.startswith("first step, warm, ranks: 1: ")]
    assert sum(row.ours for row in parts) == pytest.approx(parts[0].peer, rel=0.01)
    assert 0 < found["debug steps with all hooks: their own time"].ours < 50
