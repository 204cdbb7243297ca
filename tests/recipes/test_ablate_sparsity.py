"""The evidence on sparsity: its runs differ in the pattern alone, and its table says what was judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmagent.config import resolve
from mmagent.sparsity.stages import SparsityConfig
from recipes import distill_encoder, sft, sparsify, sparsity_report
from recipes.ablate_sparsity import PARTS, PATTERNS, plan
from recipes.sparsify import LEVELS

MODULES = {"recipes.sft": sft, "recipes.sparsify": sparsify, "recipes.distill_encoder": distill_encoder}


@pytest.mark.parametrize(("steps", "levels", "tokens"), [(140, LEVELS, 4096), (24, [0.25, 0.5, 0.75], 1024)])
def test_runs_of_a_seed_differ_in_sparsity_alone(steps, levels, tokens):
    configs = {}
    for stage in plan(Path("out"), Path("quickstart"), 2, steps, 1, levels, tokens):
        module, _, preset, *told = stage.arguments
        configs[stage.name] = resolve(getattr(MODULES[module], preset)(), told)
    assert len(configs) == 2 * len(PARTS) * len(PATTERNS)
    for part in PARTS:
        for seed in (0, 1):
            own = [configs[f"{part}-{pattern}-{seed}"] for pattern in PATTERNS]
            alike = []
            for config in own:
                plain = replace(config, sparsity=SparsityConfig(), output="")
                if part == "agent":  # what a phase is called, and its schedule's unused end
                    (phase,) = plain.phases
                    schedule = replace(phase.schedule, floor=0.0, decay=0.0)
                    plain = replace(plain, phases=[replace(phase, name="", schedule=schedule)])
                alike.append(str(plain))
            assert len(set(alike)) == 1
            assert [bool(config.sparsity.levels) for config in own] == [False, True, True, True, True]
            assert {config.sparsity.total for config in own[1:]} == {steps}
            assert all(config.sparsity.levels == levels for config in own[1:])
            assert part == "encoder" or own[0].data.tokens_per_step == tokens
            assert config.seed == config.data.seed == seed


def test_differences_are_taken_within_a_seed(tmp_path):
    """Two levels of two steps. The agent is judged on held-out data, the encoder by a mean of its last steps."""
    for seed, off in enumerate((0.0, 1.0)):
        for part, patterns in (("agent", ("dense", "block")), ("encoder", ("dense", "block"))):
            for pattern in patterns:
                more = 0.25 if pattern == "block" else 0.0
                rows = []
                for step in range(6):
                    left = 1.0 - 0.25 * (step // 2) if pattern == "block" else None
                    row = {"step": step + 1, "loss": 5.0 + off + more * (step // 2) + (-1) ** step}
                    row |= {} if left is None else {"sparsity/density": left}
                    if part == "agent" and step % 2:
                        row["validation/loss/lm"] = 2.0 + off + more * (step // 2)
                    rows.append(json.dumps(row))
                folder = tmp_path / f"{part}-{pattern}-{seed}"
                folder.mkdir()
                (folder / "log.jsonl").write_text("\n".join(rows) + "\n")
    table = sparsity_report.write(tmp_path, ("agent", "encoder"), ("dense", "block"), (0.25, 0.5), 2, 2)
    rows = [line for line in table.splitlines() if line.startswith("| block")]
    assert len(rows) == 4
    for row, asked, left, more in zip(
        rows, ("25 %", "50 %") * 2, ("75.0", "50.0") * 2, ("0.250", "0.500") * 2, strict=True
    ):
        assert f"| {asked} | {left} % |" in row
        assert f"+{more} [+{more}, +{more}]" in row
    assert "tile-2d" not in table
    assert (tmp_path / "sparsity.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="the log has 6 steps, 9 are wanted"):
        sparsity_report.read(tmp_path / "agent-dense-0", 2, 3)


def test_patterns_are_compared_seed_by_seed():
    """What all runs of a seed have in common, a hundred here, is in no interval."""
    runs = {
        pattern: [[(1.0, 100.0 * seed), (0.75, 100.0 * seed + loss)] for seed in (1, 2)]
        for pattern, loss in (("dense", 0.0), ("tile-2d", 0.25), ("block", 1.0), ("tile-element", 0.125))
    }
    table = sparsity_report._pairs("agent", runs, [0.25])
    assert "| agent | tile-2d - block | tile-element - tile-2d |" in table
    assert "| 25 % | -0.750 [-0.750, -0.750] | -0.125 [-0.125, -0.125] |" in table


def test_levels_are_those_of_the_recipe():
    assert LEVELS[0] == 0.25
    assert LEVELS[-1] == 0.75
