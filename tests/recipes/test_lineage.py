"""A lineage of real processes: skipped when done, gone on with after a kill, refused twice, checked at hand-over."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from recipes.lineage import LineageError, Stage, run_lineage
from recipes.plan_command import run_or_exit
from recipes.processes import Busy, no_orphans, only_one
from recipes.quickstart_plan import plan

ROOT = Path(__file__).resolve().parents[2]


def _stage(folder: Path, name: str, code: str, wanted: str = "") -> Stage:
    """A stage that runs ``code`` as a module of its own."""
    module = f"stage_{name}"
    (folder / f"{module}.py").write_text(code)

    def check(output: Path) -> None:
        if not (output / (wanted or "out")).is_file():
            raise ValueError("nothing was left")

    return Stage(name, "a test", (module, str(folder / name)), folder / name, check, processes=0)


COUNTING = """
import pathlib, sys
out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
runs = out.parent / (out.name + ".runs"); runs.write_text((runs.read_text() if runs.exists() else "") + "x")
(out / "out").write_text("done")
"""


@pytest.fixture(autouse=True)
def importable(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")


def test_done_stages_are_skipped_and_a_changed_command_runs_what_follows_again(tmp_path):
    first, second = _stage(tmp_path, "a", COUNTING), _stage(tmp_path, "b", COUNTING)
    said: list[str] = []
    run_lineage([first, second], tmp_path / "root", said.append)
    seconds = run_lineage([first, second], tmp_path / "root", said.append)
    assert (tmp_path / "a.runs").read_text() == "x"
    assert (tmp_path / "b.runs").read_text() == "x"
    assert set(seconds) == {"a", "b"}
    assert "done before" in said[-1]
    changed = Stage("a", "a test", (*first.arguments, "more"), first.output, first.check, processes=0)
    run_lineage([changed, second], tmp_path / "root", said.append)
    assert (tmp_path / "b.runs").read_text() == "xx"


def test_a_changed_preset_runs_its_stage_again(tmp_path, monkeypatch):
    """The command stays the same, and so does what the code it names is called."""
    presets = ModuleType("stage_a")
    monkeypatch.setitem(sys.modules, "stage_a", presets)
    plain = _stage(tmp_path, "a", COUNTING)
    stage = replace(plain, arguments=(*plain.arguments, "--preset", "debug"))
    for lr, runs in ((0.1, "x"), (0.1, "x"), (0.2, "xx")):
        presets.debug = lambda lr=lr: {"lr": lr}
        run_lineage([stage], tmp_path / "root")
        assert (tmp_path / "a.runs").read_text() == runs


def test_the_quickstart_s_presets_are_found(tmp_path):
    stages = plan(tmp_path, "debug", 1, browser=True)
    named = [stage for stage in stages if "--preset" in stage.arguments]
    assert len(named) > 8
    assert all("Config(" in stage.preset() for stage in named)


def test_an_unusable_folder_and_a_failing_stage_are_named(tmp_path):
    with pytest.raises(LineageError, match=r"stage a left .* unusable"):
        run_lineage([_stage(tmp_path, "a", COUNTING, wanted="other")], tmp_path / "root")
    with pytest.raises(LineageError, match="stage b ended with exit code 3"):
        run_lineage([_stage(tmp_path, "b", "raise SystemExit(3)")], tmp_path / "root")


def test_a_command_says_what_went_wrong_and_exits(tmp_path, capsys, monkeypatch):
    failing, fine = _stage(tmp_path, "b", "raise SystemExit(3)"), _stage(tmp_path, "a", COUNTING)
    assert run_or_exit([fine], tmp_path / "root").keys() == {"a"}
    with pytest.raises(SystemExit, match="1"):
        run_or_exit([failing], tmp_path / "root")
    assert "error: stage b ended with exit code 3" in capsys.readouterr().err

    def interrupted(*args: object, **others: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.plan_command.run_lineage", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_or_exit([fine], tmp_path / "root")
    assert "the same command goes on" in capsys.readouterr().err


def test_a_damaged_output_runs_its_stage_again(tmp_path):
    stage = _stage(tmp_path, "a", COUNTING)
    run_lineage([stage], tmp_path / "root")
    (tmp_path / "a" / "out").unlink()
    run_lineage([stage], tmp_path / "root")
    assert (tmp_path / "a.runs").read_text() == "xx"


def test_a_second_lineage_on_the_same_folder_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    with only_one(tmp_path / "root"), pytest.raises(Busy, match="another run"):
        run_lineage([_stage(tmp_path, "a", COUNTING)], tmp_path / "root")


SLOW = """
import os, pathlib, sys, time
out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
seen = out / "pids"; seen.write_text((seen.read_text() if seen.exists() else "") + f"{os.getpid()}\\n")
if len(seen.read_text().split()) == 1: time.sleep(600)
(out / "out").write_text("done")
"""


def _driver(folder: Path) -> str:
    """A program that runs a lineage of one slow stage."""
    _stage(folder, "a", SLOW)
    return f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from recipes.lineage import Stage, run_lineage
out = Path({str(folder / "a")!r})
def check(folder):
    if not (folder / "out").is_file(): raise ValueError("nothing")
stage = Stage("a", "slow", ("stage_a", str(out)), out, check, processes=0)
print(run_lineage([stage], Path({str(folder / "root")!r})))
"""


def _worker_of(folder: Path) -> int:
    """The process of the slow stage, once it has begun."""
    pids = folder / "a" / "pids"
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "the stage did not start"
        time.sleep(0.05)
    return int(pids.read_text().split()[0])


def _is_gone(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_killed_lineage_leaves_no_worker_behind_once_started_again(tmp_path):
    driver = _driver(tmp_path)
    first = subprocess.Popen([sys.executable, "-c", driver])
    worker = _worker_of(tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert Path(f"/proc/{worker}").exists()
    subprocess.run([sys.executable, "-c", driver], check=True, timeout=120)
    assert _is_gone(worker)
    assert json.loads((tmp_path / "root" / "stages" / "a.json").read_text())["done"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_lineage_that_is_told_to_end_takes_its_workers_along(tmp_path, number):
    """They have a session of their own, so no terminal and no service manager would reach them."""
    usual = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # whatever started the tests ignores
    usual += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen([sys.executable, "-c", usual + _driver(tmp_path)], stderr=subprocess.PIPE, text=True)
    worker = _worker_of(tmp_path)
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in said
    assert _is_gone(worker)


def test_signals_are_left_as_they_were(tmp_path):
    numbers = (signal.SIGHUP, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}  # another test's, maybe
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with no_orphans(tmp_path):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
