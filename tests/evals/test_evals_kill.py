"""A real evaluation process, killed with SIGKILL at random moments or stopped with Ctrl-C, ends as if nothing had
happened."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evals_kit import killable, lines

import evals
from evals.report.runs import write_report
from evals.store import Store, read_run

HERE = Path(__file__).parent


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(evals.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(HERE / "evals_kit.py"), str(folder)], env=environment, start_new_session=True
    )


def facts(folder: Path) -> list[dict]:
    """Every row but its time, in order of key."""
    rows = [{**json.loads(line), "seconds": 0} for line in lines(folder)]
    return sorted(rows, key=lambda row: row["key"])


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_minus_nine_then_resume_equals_uninterrupted(tmp_path: Path, kills: int):
    chance = random.Random(kills)
    folder, path = tmp_path / "killed", tmp_path / "killed" / "items.jsonl"
    for _ in range(kills):
        process = start(folder)
        before = path.stat().st_size if path.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and (not path.exists() or path.stat().st_size <= before):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = len(read_run(folder).rows)
    with open(path, "ab") as file:  # a kill within write(2) itself is too rare to wait for: tear a line by hand
        file.write(b'{"key":"bright/test-')
    assert killed_at > 0

    killable(folder, pause=0.0)
    killable(tmp_path / "whole", pause=0.0)
    assert facts(folder) == facts(tmp_path / "whole")
    assert len(lines(folder)) == 120
    pictures = [step["picture"] for row in facts(folder) for step in row["steps"]]
    for picture in pictures:
        assert (folder / picture).read_bytes() == (tmp_path / "whole" / picture).read_bytes()
    run = read_run(folder)
    with Store(folder, run.pins, {}):  # the lock died with its process
        pass
    write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize("baseline", ["random", pytest.param("gold", marks=pytest.mark.slow)])
def test_a_stop_is_quick_and_quiet_and_the_same_command_goes_on(tmp_path: Path, baseline: str):
    """With a browser that is busy for many episodes; the gold answers come from browsers of other threads, too."""
    environment = {**os.environ, "PYTHONPATH": str(Path(evals.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "evals", "miniwob", "--baseline", baseline, "--tasks", "click-button", "drag-box",
               "--limit", "10", "--quiet", "--out", str(tmp_path)]  # fmt: skip
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    process = subprocess.Popen(command, env=environment, preexec_fn=listening, **told)
    folder, path = tmp_path / "miniwob", tmp_path / "miniwob" / "items.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 1):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stopped = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    took = time.monotonic() - stopped
    assert process.returncode == 130
    assert said.strip() == "stopped; the same command goes on where it was"  # of broken pages not a word
    assert took < 8  # 2 to 3 s on a busy machine; 7 to 9 while the pages that closing broke were tried again
    before = lines(folder)
    assert len(read_run(folder).rows) == len(before) < 10

    done = subprocess.run(command, env=environment, timeout=300, **told)
    assert done.returncode == 0, done.stderr
    assert lines(folder)[: len(before)] == before
    assert len({row.key for row in read_run(folder).judged}) == 10
