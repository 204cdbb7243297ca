"""The whole lineage at debug size in real processes and a real browser, undisturbed and killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmagent.browser import find_chromium
from mmagent.train.hooks import read_jsonl
from recipes.processes import orphans
from recipes.quickstart_mix import TASKS
from recipes.quickstart_plan import plan
from tests.recipes.recipe_kit import ENVIRONMENT

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(3600)]
TRAINED = ("teachers/siglip2", "teachers/dinov3", "distill", "align", "pretrain", "sft", "rl")


def start(root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "recipes.quickstart", "--size", "debug", "--output", str(root)]
    with (root.parent / f"{root.name}.log").open("ab") as said:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quickstart") / "whole"
    assert start(root).wait(1800) == 0, (root.parent / "whole.log").read_text()[-3000:]
    return root


def test_it_leaves_what_it_promises(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    for stage in ("untrained", "sft", "rl"):
        assert 0.0 <= summary["miniwob"][stage] <= 1.0
        low, high = summary["miniwob"]["intervals"][stage]
        assert low <= summary["miniwob"][stage] <= high
    assert len(summary["miniwob"]["tasks"]) == len(TASKS) >= 8
    assert {"untrained", "siglip2", "dinov3", "both", "aligned"} <= set(summary["encoder"])
    figures = summary["pretrain"]
    assert {"loss/lm", "loss/mtp_1", "visual_share", "data/fill", "tokens_per_second"} <= set(figures)
    assert {"validation/loss/lm", "validation/loss/mtp_1"} <= set(figures)
    assert set(summary["seconds"]) == {stage.name for stage in plan(undisturbed, "debug", 1, browser=True)}
    page = (undisturbed / "report.html").read_text()
    assert page.count("<svg") >= 5
    assert "<img" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_second_call_does_nothing_again(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/log.jsonl")}
    started = time.monotonic()
    assert start(undisturbed).wait(300) == 0
    assert time.monotonic() - started < 120
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/log.jsonl")}


def test_killed_at_random_moments_it_ends_the_same(undisturbed, tmp_path):
    assert find_chromium()
    root, moments = tmp_path / "killed", random.Random(0)
    for _ in range(8):
        process = start(root)
        try:
            code = process.wait(moments.uniform(8, 40))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        else:
            assert code == 0, (tmp_path / "killed.log").read_text()[-3000:]
            break
    assert start(root).wait(1800) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert not orphans(root)
    for name in TRAINED:
        assert read_jsonl(root / name / "log.jsonl") == read_jsonl(undisturbed / name / "log.jsonl"), name
    for name in ("pretrain", "sft", "rl"):
        one, other = (load_file(base / name / "agent" / "model.safetensors") for base in (undisturbed, root))
        assert all(torch.equal(one[tensor], other[tensor]) for tensor in one), name
    scores = [json.loads((base / "summary.json").read_text())["miniwob"] for base in (undisturbed, root)]
    assert scores[0] == scores[1]
