"""Whoever starts the ranks, they are one world; and what would silently train alone is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmagent import dist

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "launch_me.py"
# on CPU builds of torch the command line of accelerate would stumble over torchvision's missing operators
ACCELERATE = (
    "from mmagent.ops.torchvision_shim import ensure_torchvision; ensure_torchvision(); "
    "from accelerate.commands.accelerate_cli import main; main()"
)
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def nobody_launched(monkeypatch):
    for name in list(os.environ):
        if name in WORLD or name.startswith(("ACCELERATE_", "OMPI_", "PMI_", "MPI_", "MV2_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is completed there goes with the test


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
)
def test_what_mpi_says_is_what_torchrun_would(names):
    os.environ.update(zip(names, ("5", "8", "1", "4"), strict=True))
    with pytest.raises(ValueError, match="MPI started 8 ranks, but MASTER_ADDR and MASTER_PORT are not set"):
        dist._understand_launcher()
    os.environ.update(MET)
    dist._understand_launcher()
    assert [os.environ[name] for name in WORLD[:4]] == ["5", "8", "1", "4"]


def test_accelerate_on_one_process_that_expected_more_is_refused():
    os.environ.update(MET, ACCELERATE_USE_CPU="True", ACCELERATE_MIXED_PRECISION="no")
    with pytest.raises(ValueError, match="it would train alone: use accelerate launch --multi_gpu"):
        dist._understand_launcher()
    del os.environ["MASTER_ADDR"]  # asked for one process, it sets no address: that is no mistake
    dist._understand_launcher()


@pytest.mark.parametrize(
    "name, value, instead",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "set engine.parallel=zero1"),
        ("ACCELERATE_USE_FSDP", "true", "set engine.parallel=fsdp2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "set engine.dtype"),
    ],
)
def test_what_accelerate_would_decide_is_ours(name, value, instead):
    os.environ.update(MET, RANK="0", WORLD_SIZE="2")
    os.environ[name] = value
    with pytest.raises(ValueError, match=instead):
        dist._understand_launcher()


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), **extra}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_accelerate_torchrun_and_mpi_start_the_same_run(tmp_path):
    """Three launchers, one log, to the last digit."""
    pytest.importorskip("accelerate")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    accelerate = [sys.executable, "-c", ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for name, command in (("torchrun", torchrun), ("accelerate", [*accelerate, "--main_process_port", "0"])):
        done = run([*command, str(SCRIPT), str(tmp_path / name)])
        assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        env = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        ranks.append(subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path / "mpi")], env=os.environ | env))
    assert [process.wait(240) for process in ranks] == [0, 0]
    logs = {name: (tmp_path / name / "log.jsonl").read_text() for name in ("torchrun", "accelerate", "mpi")}
    assert logs["torchrun"].count("\n") == 3
    assert logs["accelerate"] == logs["torchrun"] == logs["mpi"]


@pytest.mark.slow
def test_accelerate_on_cpu_says_that_it_would_train_alone(tmp_path):
    pytest.importorskip("accelerate")
    command = [sys.executable, "-c", ACCELERATE, "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    done = run([*command, str(SCRIPT), str(tmp_path)])
    assert done.returncode != 0
    assert "error: accelerate launch --cpu starts one process" in done.stderr
    assert not (tmp_path / "log.jsonl").exists()
