"""Real processes under torchrun that nap, stop, spin or fail on one rank: what the dump names, and that all end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmagent.dist import World
from mmagent.packing import Size, select
from mmagent.train.segments import Segments
from mmagent.train.watchdog import HUNG, Report, Watchdog, suspects
from tests.distributed.hang_me import HANG_AFTER

ROOT = Path(__file__).parents[2]
BOUND = 60.0  # seconds for a dump: starting on two busy cores takes most of it


def start(folder: Path, what: str, rank: int, *flags: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    command = [*torchrun, "-m", "tests.distributed.hang_me", str(folder), what, str(rank)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    how = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **how)


def dump(folder: Path, process: subprocess.Popen[str]) -> str:
    """The dump, once it is there; the processes are ended then."""
    deadline = time.monotonic() + BOUND
    try:
        while time.monotonic() < deadline:
            for path in folder.glob("hang-*.txt"):
                if (text := path.read_text()).count("---- stacks") == 2:
                    return text
            time.sleep(0.1)
        raise AssertionError(f"no dump within {BOUND} s: {list(folder.iterdir())}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        for entry in Path("/proc").glob(
            "[0-9]*"
        ):  # ranks are no part of that group, and a stopped one hears no SIGTERM
            with contextlib.suppress(OSError):
                if str(folder).encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_a_rank_that_naps_is_named_with_its_segment_and_all_end(tmp_path):
    process = start(tmp_path, "nap", 1)
    _, told = process.communicate(timeout=BOUND)
    assert process.returncode != 0
    assert f"exitcode  : {HUNG}" in told
    (path,) = tmp_path.glob("hang-*.txt")
    text = path.read_text()
    assert text.strip() in told
    rank0, rank1 = text.splitlines()[1:3]
    assert "rank 0: in step 5, segment 'count' for" in rank0
    assert "<--" not in rank0
    assert "rank 1: in step 4, segment 'trouble' for" in rank1
    assert "hang_me.py" in rank1
    assert "<-- the others wait for this one" in rank1
    assert "time.sleep(1000)" in text.partition("---- stacks of rank 1")[2]
    assert "all_reduce" in text.partition("---- stacks of rank 1")[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_report_is_named_for_its_silence(tmp_path, rank):
    text = dump(tmp_path, start(tmp_path, "stop", rank))
    line = text.splitlines()[1 + rank]
    assert f"rank {rank}: silent for" in line
    assert "in step 4, segment 'trouble'" in line
    assert "<-- the others wait" in line
    assert "<--" not in text.splitlines()[2 - rank]


@pytest.mark.slow
def test_a_rank_that_spins_is_named_although_it_moves(tmp_path):
    text = dump(tmp_path, start(tmp_path, "spin", 1))
    assert "rank 1: in step 4, segment 'trouble'" in text.splitlines()[2]
    assert "<-- the others wait" in text.splitlines()[2]


@pytest.mark.slow
def test_work_that_moves_is_no_hang(tmp_path):
    process = start(tmp_path, "work", 1)
    _, told = process.communicate(timeout=BOUND)
    assert process.returncode == 0, told
    assert not list(tmp_path.glob("hang-*"))


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_long_before_a_collective_would(tmp_path):
    started = time.monotonic()
    process = start(tmp_path, "raise", 0)
    _, told = process.communicate(timeout=BOUND)
    assert process.returncode != 0
    assert "one rank alone has an error" in told
    assert time.monotonic() - started < BOUND
    assert not list(tmp_path.glob("hang-*"))  # torchrun ended the other before it hung


REPORT = Report(0, 7, "reduce", 9.0, 9.0, "dist.py:1 (all_reduce)", True, 100.0)


@pytest.mark.parametrize(
    "changes, silent, named",
    [
        ([{}, {}, {}], {2: 30.0}, [2]),
        ([{}, None, {}], {}, [1]),
        ([{}, {"step": 6}, {}], {}, [1]),
        ([{}, {"waits": False, "segment": "data"}, {}], {}, [1]),
        ([{"waits": False}, {"waits": False, "segment": "backward"}, {"waits": False}], {}, [1]),
        ([{}, {}, {}], {}, []),
        ([{"step": 6}, {"step": 6}, {}], {2: 20.0}, [2]),  # who is silent counts before who is behind
    ],
)
def test_who_is_waited_for(changes, silent, named):
    reports = [None if c is None else replace(REPORT, rank=rank, **c) for rank, c in enumerate(changes)]
    assert suspects(reports, [silent.get(rank, 0.0) for rank in range(3)]) == named


def test_who_has_nobody_to_wait_for_is_not_watched(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    alone, two = (World(0, size, 0, torch.device("cpu")) for size in (1, 2))
    monkeypatch.delenv("MASTER_PORT")
    for world, limit in ((alone, HANG_AFTER), (two, 0.0), (two, HANG_AFTER)):
        with Watchdog(world, Segments(), tmp_path, limit) as watchdog:
            assert watchdog._thread is None


def test_without_the_store_a_rank_tells_what_it_knows_of_itself(tmp_path, capfd, caplog):
    """In a process of its own, as it ends."""
    script = (
        "import os, time, torch; from pathlib import Path; from mmagent.dist import World;"
        "from mmagent.train.segments import Segments; from mmagent.train.watchdog import Watchdog;"
        "segments = Segments(); world = World(1, 2, 1, torch.device('cpu'));"
        f"segments('alone').__enter__(); Watchdog(world, segments, Path({str(tmp_path)!r}), 0.5).__enter__();"
        "time.sleep(60)"
    )
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert done.returncode == HUNG
    assert "rank 1: in step 0, segment 'alone'" in done.stderr
    assert "The store that ranks meet by does not answer" in done.stderr
    (path,) = tmp_path.glob("hang-*-rank1.txt")
    assert "time.sleep" in path.read_text() or "<string>" in path.read_text()


def test_a_thread_of_ours_that_works_is_a_move(tmp_path):
    """As a generator's, while the main thread waits for it: seen from a third thread, as the watchdog is."""
    watchdog, ends = Watchdog(World(0, 2, 0, torch.device("cpu")), Segments(), tmp_path, 5.0), threading.Event()

    def work() -> None:
        while not ends.is_set():
            select([Size(n % 7 + 1, n % 3) for n in range(60)], Size(40, 20))

    def longest(seconds: float) -> float:
        found, until = 0.0, time.monotonic() + seconds
        while time.monotonic() < until:
            found = max(found, watchdog._look().still)
            time.sleep(0.05)
        return found

    with ThreadPoolExecutor(1) as looks:
        worker = threading.Thread(target=work)
        worker.start()
        moving = looks.submit(longest, 1.5).result()
        ends.set()
        worker.join()
        resting = looks.submit(longest, 1.5).result()
    assert moving < 0.75
    assert resting > 1.0
