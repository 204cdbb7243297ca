"""Real processes killed with SIGKILL at random moments, resumed, and compared bitwise with an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmagent.engine import checkpoint
from mmagent.engine.checkpoint import CheckpointError
from mmagent.train.hooks import read_jsonl
from tests.distributed import kill_me
from tests.engine_kit import toy_run

ROOT = Path(__file__).parents[2]
STEPS = 40


def compare(whole: Path, parts: Path, ranks: int = 1) -> None:
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in read_jsonl(parts / "metrics.time.jsonl")] == list(range(1, STEPS + 1))
    left, right = (checkpoint.latest(folder / "checkpoints")[0] for folder in (whole, parts))
    assert left is not None
    assert right is not None
    assert left.name == right.name == f"step-{STEPS:08d}"
    files = {path.name for path in left.iterdir() if path.suffix in (".pt", ".safetensors")}
    assert files == {path.name for path in right.iterdir() if path.suffix in (".pt", ".safetensors")}
    assert {"shared.pt", *(f"rank-{rank:05d}.pt" for rank in range(ranks))} < files
    for file in sorted(files):  # weights are one file, or one of each rank that holds a part
        assert (left / file).read_bytes() == (right / file).read_bytes(), file


def test_killed_at_random_moments_and_resumed_bitwise(tmp_path):
    context = multiprocessing.get_context("forkserver")

    def start(folder: Path, *flags: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=kill_me.main, args=(str(folder), str(STEPS), "ddp", *flags))
        process.start()
        return process

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = start(whole)
    dice = random.Random()  # unseeded on purpose: the moment must not matter
    kills = 0
    for _ in range(4):
        begun = len(read_jsonl(parts / "metrics.jsonl"))
        process = start(parts, "--slow")
        while len(read_jsonl(parts / "metrics.jsonl")) in (0, begun) and process.is_alive():
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills, "the run finished before it could be killed once"
    last = start(parts)
    for process in (straight, last):
        process.join()
        assert process.exitcode == 0
    compare(whole, parts)


@pytest.mark.slow
@pytest.mark.timeout(600)  # three launches, of a minute and more each where others compute on the same cores
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_under_torchrun_killed_and_resumed_bitwise(tmp_path, parallel):
    def start(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*torchrun, "-m", "tests.distributed.kill_me", str(folder), str(STEPS), parallel, *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole).wait(timeout=200) == 0
    process = start(parts, "--slow")
    while len(read_jsonl(parts / "metrics.jsonl")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start(parts).wait(timeout=200) == 0
    compare(whole, parts, ranks=2)
    # weights and optimizer state are whole, so another number of ranks could read them; these streams cannot be split
    with pytest.raises(CheckpointError, match=r"written by 2 ranks and this run has 1: part 'stream' \(BadStream\)"):
        toy_run(parts).run.resume()
