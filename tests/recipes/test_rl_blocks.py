"""The RL recipe with a model that says blocks: it is trained by what was rewarded, or says why it cannot be."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmagent.chat import ChatConfig
from mmagent.config import resolve
from mmagent.interop.agent_folder import load_agent, save_agent
from mmagent.train.hooks import read_jsonl
from mmagent.trajectories import Score
from recipes import rl
from tests.agent_kit import GEOMETRY, tiny_model, tiny_vocab

TOLD = ("collector.prompts=2", "optim.lr=0.003", "generator.steady=false")


async def evenness(task, item, trajectory) -> Score:
    """Of what was said: a verdict that untaught models get both ways."""
    said = (i for i, sampled in zip(trajectory.input_ids, trajectory.trainable, strict=True) if sampled)
    return Score(float(sum(said) % 2))


@pytest.fixture
def agent(tmp_path) -> Path:
    """As `recipes.diffusion` would leave one: it says four tokens at once."""
    model = tiny_model(extra_rows=0)
    model.config.denoises = 4
    save_agent(tmp_path / "agent", model, tiny_vocab(), GEOMETRY, ChatConfig())
    return tmp_path / "agent"


def run(agent: Path, output: Path, *told: str) -> list[dict]:
    base = replace(rl.debug(), init=str(agent), output=str(output), tasks=["tests.toy_tasks:FourLetters"], steps=2)
    asyncio.run(rl.train(resolve(base, [*TOLD, *told])))
    return read_jsonl(output / "log.jsonl")


def test_blocks_are_reinforced(agent, tmp_path):
    rows = run(agent, tmp_path / "run", f"points.reward={__name__}:evenness")
    assert all(row["grad_norm"] > 0 for row in rows)
    before, after = (load_file(folder / "model.safetensors") for folder in (agent, tmp_path / "run" / "agent"))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("decoder."))
    assert load_agent(tmp_path / "run" / "agent").model.config.denoises == 4


@pytest.mark.parametrize(
    ("told", "named"),
    [
        (["policy.loss=gspo"], "loss cannot be had"),
        (["updates=2"], "updates=2"),
        (["stream.on=true"], r"stream\.staleness=1"),
        (["collector.heat.rise=0.1"], r"collector\.heat"),
        (["generator.steady=true"], "steady"),
    ],
)
def test_what_blocks_cannot_do_is_said_before_anything_is_played(agent, tmp_path, told, named):
    with pytest.raises(ValueError, match=named):
        run(agent, tmp_path / "run", *told)
    assert not (tmp_path / "run" / "log.jsonl").exists()
