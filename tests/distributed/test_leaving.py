"""Real processes that are asked to leave wherever they are, and ranks that are killed under ``--max-restarts``."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmagent.engine import checkpoint
from mmagent.train.hooks import read_jsonl
from tests.distributed import leave_me

ROOT = Path(__file__).parents[2]
STEPS = 10


def compare(whole: Path, parts: Path) -> None:
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    left, right = (checkpoint.latest(folder / "checkpoints")[0] for folder in (whole, parts))
    assert left is not None
    assert right is not None
    assert left.name == right.name == f"step-{STEPS:08d}"
    one, other = (checkpoint.read_weights(path / "model.safetensors") for path in (left, right))
    assert all(torch.equal(one[name], other[name]) for name in one)


def start(folder: Path, where: str) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("forkserver").Process(
        target=leave_me.main, args=(str(folder), str(STEPS), where)
    )
    process.start()
    return process


def ask(folder: Path, process: multiprocessing.process.BaseProcess, signals: int) -> None:
    """Send it SIGTERM, ``signals`` times, once it is where it was to be."""
    while not (folder / "here").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    for _ in range(signals - 1):
        time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # the first one may have been enough by now
            os.kill(process.pid, signal.SIGTERM)


def test_asked_to_leave_wherever_it_is_it_saves_leaves_and_goes_on_bitwise(tmp_path):
    wheres = {"validation": 1, "data": 2, "saving": 3}
    whole = start(tmp_path / "whole", "nowhere")
    left = {where: start(tmp_path / where, where) for where in wheres}
    for where, signals in wheres.items():
        ask(tmp_path / where, left[where], signals)
    for where, process in left.items():
        process.join(timeout=60)
        assert process.exitcode == 128 + signal.SIGTERM, where
        rows = len(read_jsonl(tmp_path / where / "metrics.jsonl"))
        assert 0 < rows < STEPS
        newest, refused = checkpoint.latest(tmp_path / where / "checkpoints")
        assert newest is not None
        assert checkpoint.step_of(newest) == rows
        assert not refused
    resumed = {where: start(tmp_path / where, "nowhere") for where in wheres}
    for process in (whole, *resumed.values()):
        process.join(timeout=60)
        assert process.exitcode == 0
    for where in wheres:
        compare(tmp_path / "whole", tmp_path / where)


def test_one_that_cannot_come_to_an_end_leaves_all_the_same(tmp_path):
    command = [sys.executable, "-m", "tests.distributed.leave_me", str(tmp_path), str(STEPS), "stuck"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "here").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the step at hand does not end: left without saving" in told
    assert "leave_me.py" in told  # where it stands
    newest, _ = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert checkpoint.step_of(newest) == 3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_after_a_rank_killed_in_the_middle_of_a_step(tmp_path, rank):
    def run(folder: Path, where: str) -> subprocess.Popen[bytes]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*torchrun, "--max-restarts=2", "-m", "tests.distributed.leave_me", str(folder), str(STEPS), where]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)

    processes = [run(tmp_path / name, where) for name, where in (("whole", "nowhere"), ("parts", f"die-{rank}"))]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    compare(tmp_path / "whole", tmp_path / "parts")
