"""Pruning as recipes do it: an agent by its own stage, an encoder by any of its stages; killed, packed, judged."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from mmagent.chat import ChatConfig
from mmagent.config import ConfigError
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import load_agent, new_agent, save_agent
from mmagent.interop.encoder_folder import load_encoder, save_encoder
from mmagent.interop.packed_folder import MASKS, load_masks
from mmagent.models import presets
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.sparsity.patterns import SINGLE, density
from mmagent.train.hooks import read_jsonl
from mmagent.train.sparsify import Sparsifier
from mmagent.vocab import Vocab
from recipes import align_encoder, sparsify
from tests.recipes.recipe_kit import ENVIRONMENT, make_data
from tools import pack as tool


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and an agent and an encoder that have learnt nothing."""
    root = tmp_path_factory.mktemp("sparse")
    make_data(root / "data")
    torch.manual_seed(0)
    vocab = Vocab.load(root / "data" / "tokenizer.json")
    agent = new_agent(presets.debug(vocab_size=1024), vocab, GeometryConfig(), ChatConfig())
    save_agent(root / "agent", *agent[:4])
    save_encoder(root / "encoder", CogViT(cogvit_debug()), GeometryConfig())
    return root


def run(module, *arguments: str) -> None:
    with mock.patch.object(sys, "argv", [module.__name__, "--preset", "debug", *arguments]):
        module.main()


def settings(root: Path, output: Path) -> list[str]:
    return [f"init={root}/agent", f"data.folder={root}/data/pretrain", "data.split_long=true", f"output={output}",
            "phases.0.freeze=[]"]  # fmt: skip


def prune(root: Path, output: Path, *more: str) -> None:
    run(sparsify, *settings(root, output), *more)


@pytest.fixture(scope="module")
def pruned(root: Path) -> Path:
    prune(root, root / "sparse")
    return root / "sparse"


def test_an_agent_is_pruned_in_stages(pruned):
    rows = read_jsonl(pruned / "log.jsonl")
    assert [row["sparsity/asked"] for row in rows] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    assert [row["sparsity/density"] for row in rows[:2]] == [1.0, 1.0]
    assert rows[-1]["sparsity/density"] == pytest.approx(0.5, abs=0.01)
    masks, pattern = load_masks(pruned / MASKS)
    assert density(masks) == rows[-1]["sparsity/density"]
    assert pattern.pattern == "tile-2d"
    weights = load_agent(pruned / "agent").model.state_dict()
    assert all((weights[name][mask == 0] == 0).all() for name, mask in masks.items())
    assert any(mask.ndim == 3 for mask in masks.values())  # experts among them


def test_what_it_leaves_can_be_packed(pruned, root, capsys):
    assert tool.main([f"{pruned}/agent", "--into", f"{root}/packed", "--step", "4"]) == 0
    assert "50.0" in capsys.readouterr().out
    load_agent(root / "packed")


def test_a_run_that_was_stopped_leaves_the_same(pruned, root, tmp_path):
    """Stopped after a step that no checkpoint has, between two levels, and started again."""

    class Stop(Exception):
        pass

    call = Sparsifier.__call__

    def stop(self, step, record):
        call(self, step, record)
        if step == 5:
            raise Stop

    with mock.patch.object(Sparsifier, "__call__", stop), pytest.raises(Stop):
        prune(root, tmp_path / "again")
    prune(root, tmp_path / "again")
    whole, again = (load_agent(at / "agent").model.state_dict() for at in (pruned, tmp_path / "again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_a_run_that_was_killed_leaves_the_same(pruned, root, tmp_path):
    """SIGKILL from outside, between the two levels and behind a checkpoint; the same command ends bitwise alike."""
    command = [sys.executable, "-m", "recipes.sparsify", "--preset", "debug", *settings(root, tmp_path / "run")]
    log = tmp_path / "run" / "log.jsonl"
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:  # what it says of its masks comes at once
        lines.append(line)
        if "tile-2d to 25 %" in line:
            break
    while process.poll() is None and len(read_jsonl(log)) < 3:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "".join(lines) + process.stderr.read()
    assert 3 <= len(read_jsonl(log)) < 6
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    whole, again = (load_agent(at / "agent").model.state_dict() for at in (pruned, tmp_path / "run"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    for name, mask in load_masks(pruned / MASKS).masks.items():
        assert torch.equal(load_masks(tmp_path / "run" / MASKS).masks[name], mask)


def test_what_is_printed_is_counted_and_no_label(root, tmp_path, capsys):
    """By units, 25 % of the ranked units are other than 25 % of the weights."""
    prune(root, tmp_path, "sparsity.levels=[0.25]", "sparsity.pattern.pattern=tile-element",
          "sparsity.pattern.budget=units", "sparsity.pattern.delta=0.05")  # fmt: skip
    masks, _ = load_masks(tmp_path / MASKS)
    left, total = 100 * density(masks), sum(mask.numel() for mask in masks.values())
    alone = 100 * sum(int((mask == SINGLE).sum()) for mask in masks.values()) / total
    said = capsys.readouterr().err
    assert abs(left - 75) > 0.05
    assert f"tile-element to 25 %: {left:.2f} % of {total:,} weights are left, {alone:.1f} % as single weights" in said


def test_an_encoder_is_pruned_by_its_own_stage(root, tmp_path):
    """The average of its weights, which is what is left, has the zeros as well."""
    run(
        align_encoder, f"init={root}/encoder", f"tokenizer={root}/data/tokenizer.json", f"output={tmp_path}",
        "steps=4", "average.decay=0.9", "sparsity.levels=[0.3,0.5]", "sparsity.score=2", "sparsity.steps=1",
        "sparsity.roles=[encoder]", "sparsity.pattern.granularity=8",
    )  # fmt: skip
    masks, _ = load_masks(tmp_path / MASKS)
    assert density(masks) == pytest.approx(0.5, abs=0.02)
    weights = load_encoder(tmp_path / "encoder").model.state_dict()
    assert all((weights[name][mask == 0] == 0).all() for name, mask in masks.items())
    assert any(weights[name][mask != 0].ne(0).any() for name, mask in masks.items())


def test_what_cannot_be_is_told_at_once(root, tmp_path):
    for more, message in (
        (["sparsity.levels=[]"], "at least one"),
        (["init="], "pruning starts from an agent"),
    ):
        with pytest.raises(ConfigError, match=message):
            prune(root, tmp_path, *more)
    with pytest.raises(ValueError, match="the run has 4"):
        run(align_encoder, f"init={root}/encoder", f"tokenizer={root}/data/tokenizer.json", f"output={tmp_path}",
            "steps=4", "sparsity.levels=[0.5]")  # fmt: skip
