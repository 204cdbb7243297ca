"""The tool that holds a killed run against an undisturbed one sees every kind of difference, and kills for real."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmagent.engine import checkpoint
from mmagent.train.hooks import JsonlLog, SaveHook
from mmagent.train.loop import fit
from tests.engine_kit import toy_run
from tools import resume_check

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """What a run of three steps left, with a folder that it hands on and a log of bad samples."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    toy = toy_run(folder)
    fit(
        toy.run, toy.objective, toy.engine, toy.stream, steps=3,
        hooks=[SaveHook(toy.run, 1), JsonlLog(folder / "log.jsonl")],
    )  # fmt: skip
    (folder / "agent").mkdir()
    save_file({"weight": torch.ones(2, 3)}, folder / "agent" / "model.safetensors")
    (folder / "agent" / "config.yaml").write_text("width: 3\n")
    bad = [json.dumps({"source": "text", "shard": f"{n}.tar", "reason": "image"}) + "\n" for n in range(2)]
    (folder / "quarantine-0.jsonl").write_text("".join(bad))
    (folder / "ranks.jsonl").write_text('{"step": 2, "steps": [1, 2], "seconds": 0.5}\n{"step": 3, "steps": [3]}\n')
    return folder


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def log_row_twice(run: Path) -> None:
    rows = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join([*rows[:2], *rows[1:]]))


def save_anew(run: Path, change: Callable) -> None:
    """The last checkpoint, whole, of a run that stands elsewhere."""
    toy = toy_run(run)
    toy.run.resume()
    with torch.no_grad():
        change(toy)
    shutil.rmtree(toy.run.checkpoints / "step-00000003")
    toy.run.saved_step = 2
    toy.run.finish(3)


def move_weight(toy) -> None:
    toy.objective.experts[1, 2, 0] += 1.0


def move_moment(toy) -> None:
    toy.engine.optimizer.state[toy.objective.experts]["momentum"][0] = -0.0


def move_generator(toy) -> None:
    random.random()


def move_stream(toy) -> None:
    toy.stream.position += 1


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda run: rewrite(run / "log.jsonl", '"seen": ', '"seen": 1'),
        r"log.jsonl: step 1: seen is 1\d+\.0, ",
    ),
    (log_row_twice, "log.jsonl: it has the steps 1-2, 2-3, undisturbed 1-3"),
    (
        lambda run: rewrite(run / "log.time.jsonl", '{"step": 2', '{"step": 9'),
        "log.time.jsonl: it has the steps 1, 9, ",
    ),
    (lambda run: rewrite(run / "ranks.jsonl", "[1, 2]", "[1]"), "ranks.jsonl: it has the steps 1, 3, "),
    (lambda run: rewrite(run / "quarantine-0.jsonl", "1.tar", "7.tar"), 'quarantine-0.jsonl: .*"1.tar".* is missing'),
    (
        lambda run: save_anew(run, move_weight),
        r"checkpoints: model: experts\[1, 2, 0\] is .* \(1 of 54 ",
    ),
    (
        lambda run: save_anew(run, move_moment),
        r"checkpoints: engine: optimizer/experts/momentum\[0, 0, 0\] is -0.0",
    ),
    (
        lambda run: save_anew(run, move_generator),
        r"checkpoints: rank-00000.random.python\[1\]\[\d+\] is ",
    ),
    (lambda run: save_anew(run, move_stream), "checkpoints: rank-00000.stream.position is 7, "),
    (
        lambda run: shutil.rmtree(run / "checkpoints" / "step-00000003"),
        "checkpoints: the newest is .*step-00000002, ",
    ),
    (lambda run: (run / "agent" / "model.safetensors").unlink(), "agent/model.safetensors: it is missing"),
    (
        lambda run: save_file({"weight": torch.tensor([[1.0, 1, 1], [1, 2, 1]])}, run / "agent" / "model.safetensors"),
        r"agent/model.safetensors: weight\[1, 1\] is 2.0, undisturbed 1.0 \(1 of 6 differ\)",
    ),
    (lambda run: rewrite(run / "agent" / "config.yaml", "3", "4"), "agent/config.yaml: its content differs"),
    (lambda run: (run / "new").write_text(""), "new: it is there in addition"),
]


def test_runs_that_left_the_same_are_equal_whatever_their_clocks_say(undisturbed, tmp_path):
    same = tmp_path / "parts"
    shutil.copytree(undisturbed, same)
    rewrite(same / "log.time.jsonl", '"time/step": ', '"time/step": 9')
    rewrite(same / "ranks.jsonl", "0.5", "0.7")
    bad = (same / "quarantine-0.jsonl").read_text().splitlines(keepends=True)
    (same / "quarantine-0.jsonl").write_text("".join(reversed(bad)))  # threads meet samples in any order
    seen = resume_check.compare(undisturbed, same)
    assert not seen.differences
    assert seen.tensors > 8
    assert seen.rows == 3 + 3 + 2 + 2  # of both parts of the log, of the times of ranks, and of bad samples


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=[str(n) for n in range(len(DAMAGES))])
def test_every_kind_of_difference_is_told(undisturbed, tmp_path, damage, told):
    other = tmp_path / "parts"
    shutil.copytree(undisturbed, other)
    damage(other)
    (difference,) = resume_check.compare(undisturbed, other).differences
    assert checkpoint.re.match(told, difference), difference


def test_all_processes_are_killed_also_those_of_sessions_of_their_own(tmp_path):
    """As those that torchrun starts."""
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.01)
    child = int((tmp_path / "child").read_text())
    resume_check._kill_all(process)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.returncode == -9


def test_what_cannot_be_checked_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        resume_check.main(["pretrain", "output=runs/x"])
    assert "output= is what --work is for" in capsys.readouterr().err
    for wrong in (["--kills", "0"], ["--ranks", "0"]):
        with pytest.raises(SystemExit):
            resume_check.main(["pretrain", *wrong])
    assert resume_check.main(["tests.nowhere", "--work", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "a run ended with status 1; its last words" in told
    assert "tests.nowhere" in told


def test_the_command_is_the_users_own():
    made = resume_check.command("sft", "debug", 2, ["steps=3"])
    assert made[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "recipes.sft", "--preset", "debug", "steps=3"),
    ]
    assert resume_check.command("mine.train", None, 1, [])[1:] == ["-m", "mine.train"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="processes are found in /proc")
def test_a_toy_recipe_is_killed_and_ends_as_if_it_was_not(tmp_path, capsys):
    """A real one, of the command: two kills, at moments that this run draws."""
    status = resume_check.main(["tests.tools.toy_recipe", "--kills", "2", "--work", str(tmp_path)])
    told = capsys.readouterr().out
    assert status == 0, told
    assert "kill -9" in told
    assert "equal: " in told
    weights = [load_file(path) for path in sorted(tmp_path.glob("*/checkpoints/step-00000020/model.safetensors"))]
    assert len(weights) == 2


@pytest.mark.slow
def test_a_recipe_that_forgets_its_stream_is_found_out(tmp_path, capsys):
    """Until a kill comes after a checkpoint: one whose stream starts anew cannot hide it."""
    for seed in range(3):
        arguments = ["tests.tools.toy_recipe", "forgets=true", "--kills", "2", "--seed", str(seed)]
        status = resume_check.main([*arguments, "--work", str(tmp_path)])
        if status == 1:
            break
    told = capsys.readouterr().out
    assert status == 1, told
    assert "different:\n  log.jsonl: step " in told
