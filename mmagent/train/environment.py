"""Where and how a run was started, and how long its first step was in coming."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from pathlib import Path

import torch

from mmagent import dist
from mmagent.train import launch
from mmagent.train.logs import Record
from mmagent.train.run import Run


class EnvironmentLog:
    """One JSON object for every start of a run in ``<directory>/environment.jsonl``: the step it went on from, when, by
    which command, with how many ranks on which hosts and devices, and which versions of what decides numbers.

    The first record of a process gets ``time/first_step``, seconds since the process began, and
    ``time/first_step_after_imports``, since :func:`mmagent.train.launch.launch` was called."""

    def __init__(self, run: Run):
        self.run = run
        self._told = False

    def __call__(self, step: int, record: Record) -> None:
        if self._told:
            return
        self._told = True
        now = time.time()
        record["time/first_step"] = now - process_start()
        if launch.launched is not None:
            record["time/first_step_after_imports"] = now - launch.launched
        own = {"host": socket.gethostname(), "device": device_name(self.run.world.device)}
        everyone = self.run.world.gather_objects(own)
        if not dist.is_main():
            return
        row = {
            "step": step - 1,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "ranks": self.run.world.size,
            "context": self.run.world.context,
            "hosts": [rank["host"] for rank in everyone],
            "devices": [rank["device"] for rank in everyone],
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "platform": platform.platform(),
        }
        with (self.run.directory / "environment.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def device_name(device: torch.device) -> str:
    """What the maker calls it: ``NVIDIA H100 80GB HBM3``, or the processor's model."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "cpu"


def process_start() -> float:
    """When this process began, in seconds of ``time.time()``; where the system does not say, when this was loaded."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (stat.exists() and uptime.exists()):
        return _LOADED
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # since boot; see proc(5)
    return time.time() - float(uptime.read_text().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")


_LOADED = time.time()
