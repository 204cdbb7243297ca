"""What a user can mend is told in one line when a recipe starts; what a programmer must, with its traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.recipe_kit import ENVIRONMENT

ONE_PRESET = ("grade_items", "task_traces", "judge_tasks")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FAIL = """
import os, sys, time
from mmagent import dist
from mmagent.train.launch import launch
from mmagent.train.step import train_step

def main():
    kind, rank = sys.argv[1], int(os.environ.get("RANK", 0))
    if kind == "unlucky rank" and rank == 0:
        dist.init()
        return dist.barrier()
    if kind == "each its own":
        dist.init()
        dist.barrier()
    if kind in ("unlucky rank", "each its own"):
        raise ValueError(f"no data for rank {rank}; bring some")
    if kind == "late death":
        dist.init()
        dist.barrier()
        if rank == 1:
            raise ValueError("shard 7")
        time.sleep(1.5)
        raise KeyError("x")
    if kind == "late main":
        time.sleep(0 if rank else 1.5)
        raise ValueError("no data")
    if kind == "accident":
        return int("many")
    if kind == "library":
        import json
        return json.loads("{")
    if kind == "file":
        return open("nowhere.txt")
    if kind == "rename":
        open("here", "w").close()
        os.replace("here", "nowhere/there")
    if kind == "later":
        try:
            train_step(None, None, [], None)
        except ValueError:
            raise ValueError("in a step")
    if kind == "server":
        raise ConnectionError("http://nobody: no answer")
    if kind == "kind":
        raise KeyError("x")
    print("fine")
    return 0

sys.exit(launch(main))
"""


def call(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120, check=False
    )


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error")]


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("pretrain", ["tokenizer=nope.json"], "no tokenizer at nope.json; data_pipelines.build makes a tokenizer.json"),
        ("pretrain", ["init=nope"], "nope is no agent folder: config.yaml, model.safetensors, tokenizer.json missing;"),
        ("rl", ["init=nope"], "nope is no agent folder:"),
        ("grade_items", ["rollouts=nope"], "rollouts=nope holds none: record them with collector.record=nope"),
        ("task_traces", [], "tasks: name at least one"),
        ("judge_tasks", [], "tasks: name at least one"),
        ("distill_encoder", [], "teachers: give at least one of siglip2, dinov3 a source"),
        ("distill_encoder", ["teachers.dinov3.source=./nope"], "no teacher './nope': it must be the folder of a model"),
    ],
)
def test_a_recipe_says_in_one_line_what_is_missing(tmp_path, recipe, arguments, message):
    preset = [] if recipe in ONE_PRESET else ["--preset", "debug"]
    done = call(["-m", f"recipes.{recipe}", *preset, *arguments], tmp_path)
    assert done.returncode == 1
    (line,) = errors(done.stderr)
    assert line.startswith(f"error: {message}")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ranks_that_fail_alike_say_it_once(tmp_path):
    """Before there is a process group and after it; the rest is the launcher's own block."""
    for arguments in (["recipes.align_encoder", "init="], ["recipes.pretrain", "tokenizer=nope.json"]):
        done = call([*TORCHRUN, "-m", *arguments[:1], "--preset", "debug", *arguments[1:]], tmp_path)
        assert done.returncode == 1
        assert len(errors(done.stderr)) == 1, done.stderr
        assert done.stderr.count("Traceback (most recent") == 1  # the launcher's


def test_the_error_of_another_rank_is_said(tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    done = call([*TORCHRUN, "fail.py", "unlucky rank"], tmp_path)
    assert done.returncode == 1
    assert [line.split(" (")[0] for line in errors(done.stderr)] == [
        "error on rank 1: no data for rank 1; bring some"
    ], done.stderr
    done = call([*TORCHRUN, "fail.py", "each its own"], tmp_path)
    said = sorted(line.split(":")[0] for line in errors(done.stderr))
    assert said == ["error", "error on rank 1"], done.stderr


@pytest.mark.slow
def test_an_error_is_said_though_rank_0_dies_while_another_waits_for_it(tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    done = call([*TORCHRUN, "fail.py", "late death"], tmp_path)
    assert [line.split(" (")[0] for line in errors(done.stderr)] == ["error on rank 1: shard 7"], done.stderr
    assert "KeyError: 'x'" in done.stderr


def test_a_rank_waits_for_a_slower_main_rank(tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    done = call([*TORCHRUN, "fail.py", "late main"], tmp_path)
    assert [line.split(" (")[0] for line in errors(done.stderr)] == ["error: no data"], done.stderr


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("accident", "ValueError: invalid literal for int"),
        ("library", "json.decoder.JSONDecodeError"),
        ("later", "ValueError: in a step"),
        ("kind", "KeyError: 'x'"),
        ("rename", "FileNotFoundError: [Errno 2] No such file or directory: 'here' -> 'nowhere/there'"),
    ],
)
def test_bugs_keep_their_traceback(tmp_path, kind, said):
    (tmp_path / "fail.py").write_text(FAIL)
    done = call(["fail.py", kind], tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert said in done.stderr
    assert not errors(done.stderr)


def test_a_missing_file_is_named_and_a_traceback_can_be_had(tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    done = call(["fail.py", "file"], tmp_path)
    assert done.stderr == "error: nowhere.txt: no such file or folder (MMAGENT_TRACEBACK=1 shows the traceback)\n"
    done = call(["fail.py", "file"], tmp_path, MMAGENT_TRACEBACK="1")
    assert "Traceback" in done.stderr
    assert not errors(done.stderr)
    done = call(["fail.py", "server"], tmp_path)
    assert done.stderr.startswith("error: http://nobody: no answer (")
    done = call(["fail.py", "nothing"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "fine\n")
