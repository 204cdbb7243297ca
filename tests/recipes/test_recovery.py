"""A supervised recipe whose loss is NaN at one step, on two ranks that share everything: it skips, goes back, or goes
back with merged weights, and ends where it must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmagent.engine import checkpoint
from mmagent.train.hooks import read_jsonl
from mmagent.train.incidents import read_incidents
from tests.recipes.recipe_kit import ENVIRONMENT, make_data, run_here
from tests.recipes.spoilt_recipe import BAD
from tools import resume_check

pytestmark = pytest.mark.slow  # processes that start; tests/unit/train/test_guard.py has quick ones of a toy

STEPS = 8
ACTIONS = ("skip", "rollback", "merge")
RECIPE = "tests.recipes.spoilt_recipe"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lineage")
    make_data(folder / "data")
    run_here("pretrain", folder, folder / "pretrain", "encoder=")
    return folder


def told(root: Path, action: str, *overrides: str) -> list[str]:
    """Going back by two steps and leaving out what was offending alone, so that something is trained again."""
    policy = [f"health.on_not_finite={action}", "health.leave_out=1", "keep=4", "save_every=2"]
    data = [f"init={root}/pretrain/agent", f"data.folder={root}/data/pretrain", f"phases.0.steps={STEPS}"]
    return ["--preset", "debug", *data, *policy, "optim.lr=0.01", *overrides]


def train(root: Path, output: Path, action: str, *overrides: str, ranks: int = 2) -> list[dict[str, Any]]:
    """The rows of its log."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", RECIPE, *told(root, action, *overrides), f"output={output}"]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280)
    assert done.returncode == 0, done.stdout.decode()[-3000:]
    return read_jsonl(output / "log.jsonl")


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What one process learns, whose recoveries are held against loops by hand in tests/unit/train/test_guard.py."""
    folder = tmp_path_factory.mktemp("alone")
    return {action: train(root, folder / action, action, ranks=1) for action in ACTIONS}


def learnt(run: Path) -> dict[str, bytes]:
    """All that the newest checkpoint holds but its guard's plans, which say what was done; and what is handed on."""
    folder, _ = checkpoint.latest(run / "checkpoints")
    assert folder is not None
    kept = [file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name.startswith("rank-")]
    files = [*kept, *(file for file in (run / "agent").rglob("*") if file.is_file())]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.timeout(1500)  # three runs of two ranks and the fixtures: eight minutes were seen on busy processors
@pytest.mark.parametrize("parallel", ["fsdp2", "zero2", "zero3"])
def test_ranks_that_share_weights_recover_by_every_policy(root, alone, tmp_path, parallel):
    rows = {action: train(root, tmp_path / action, action, f"engine.parallel={parallel}") for action in ACTIONS}
    for action, seen in rows.items():
        assert [row["step"] for row in seen] == list(range(1, STEPS + 1))
        assert [row["health/left_out"] for row in seen] == [float(step == BAD) for step in range(STEPS)]
        for mine, its in zip(seen, alone[action], strict=True):
            assert mine.get("loss", 0.0) == pytest.approx(its.get("loss", 0.0), rel=2e-3), (action, mine["step"])
        (incident,) = read_incidents(tmp_path / action / "incidents.jsonl")
        assert (incident.step, incident.action, incident.kind) == (BAD, action, "not_finite")
        assert incident.findings[0].rank == 1
        assert incident.findings[0].documents
        if action != "skip":
            assert (incident.to, incident.leaves_out) == (4, (BAD, BAD))
    assert incident.merged == (2, 4)  # of the last, the merge
    # all between checkpoint and batch is repeated to the bit, so that nothing is left to tell the two apart
    assert rows["skip"] == rows["rollback"]
    assert learnt(tmp_path / "skip") == learnt(tmp_path / "rollback")
    # the mean is other weights, which the next step sees
    assert rows["merge"][:4] == rows["skip"][:4]
    assert abs(rows["merge"][4]["loss"] - rows["skip"][4]["loss"]) > 1e-2 * rows["skip"][4]["loss"]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("parallel", "action"), [("fsdp2", "merge"), ("zero2", "rollback"), ("zero3", "merge")])
def test_killed_before_during_and_after_a_recovery_it_ends_bitwise_equal(root, tmp_path, capsys, parallel, action):
    how = [RECIPE, *told(root, action, f"engine.parallel={parallel}"), "--ranks", "2", "--work", str(tmp_path)]
    status = resume_check.main(how)
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    rows = read_jsonl(tmp_path / "parts" / "incidents.jsonl")
    assert [row["action"] for row in rows] == [action], json.dumps(rows)
