"""The evidence on merging: its runs differ in the schedule alone, and its table says what was judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmagent.config import resolve
from mmagent.engine.schedule import ScheduleConfig
from mmagent.files import write_text
from recipes import merging_report, pretrain
from recipes.ablate_merging import plan


def test_runs_of_a_seed_differ_in_the_schedule_and_in_what_is_kept():
    configs = {}
    for stage in plan(Path("out"), Path("quickstart"), 2, 40, 5, 0.5, 1):
        module, _, preset, *told = stage.arguments
        assert module == "recipes.pretrain"
        configs[stage.name] = resolve(getattr(pretrain, preset)(), told)
    assert set(configs) == {f"{kind}-{seed}" for kind in ("constant", "annealed") for seed in (0, 1)}
    for seed in (0, 1):
        alike = set()
        for kind in ("constant", "annealed"):
            config = configs[f"{kind}-{seed}"]
            assert sum(phase.steps for phase in config.phases) == 40
            assert config.seed == config.data.seed == seed
            phases = [replace(phase, schedule=ScheduleConfig()) for phase in config.phases]
            alike.add(str(replace(config, phases=phases, output="", save_every=1, keep=1)))
        assert len(alike) == 1
    constant, annealed = (configs[f"{kind}-0"].phases[1] for kind in ("constant", "annealed"))
    rates = [(constant.rate(10)(step), annealed.rate(10)(step)) for step in range(10, 40)]
    assert all(a == b for a, b in rates[:15])
    assert rates[-1][0] == 1.0
    assert rates[-1][1] == pytest.approx(0.01)
    assert configs["constant-0"].keep * configs["constant-0"].save_every == 40


def test_differences_are_taken_within_a_seed(tmp_path):
    for seed, off in enumerate((0.0, 1.0)):
        found = {
            "single": {"10": 3.0 + off, "20": 2.0 + off},
            "trace": {"20": 1.9 + off},
            "merged": {"sma 2": 1.75 + off},
            "end": {"annealed": 1.5 + off, "constant": 2.0 + off},
        }
        (tmp_path / f"constant-{seed}").mkdir()
        write_text(tmp_path / f"constant-{seed}" / "merging.json", json.dumps(found))
    table = merging_report.write(tmp_path, 2)
    (row,) = [line for line in table.splitlines() if "sma 2" in line]
    assert "-0.250 [-0.250, -0.250] | +0.250 [+0.250, +0.250]" in row
    assert (tmp_path / "merging.png").stat().st_size > 10_000
