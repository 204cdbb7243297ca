"""Checkpoints of a run, or model folders, merged into a new model folder by the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import load_agent, save_agent
from mmagent.interop.encoder_folder import load_encoder, save_encoder
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.train.run import Run
from tests.conversion_kit import vocabulary
from tests.engine_kit import ALONE
from tools.merge import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three checkpoints, steps 10 to 30, and the agent it left."""
    folder, vocab = tmp_path_factory.mktemp("trained"), vocabulary()
    torch.manual_seed(0)
    model = AgentModel(replace(presets.debug(vocab_size=vocab.size), image_id=vocab.image_id))
    run = Run(folder, ALONE, {"model": model}, keep=3)
    for step in (10, 20, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("router.bias"):
                    buffer.add_(torch.randn_like(buffer))
        run.finish(step)
        save_agent(folder / f"at{step}", model, vocab, GeometryConfig(), ChatConfig())
    (folder / "at30").rename(folder / "agent")
    return folder


def test_a_run_s_newest_checkpoints_become_an_agent(trained, tmp_path, capsys):
    assert main([str(trained), "--into", str(tmp_path / "merged")]) == 0
    assert "sma of steps 20, 30" in capsys.readouterr().out
    older, newer, found = (
        load_agent(path).model.state_dict() for path in (trained / "at20", trained / "agent", tmp_path / "merged")
    )
    assert any(name.endswith("router.bias") for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (older[name] + newer[name]) / 2)
    assert main([str(trained), "--into", str(tmp_path / "early"), "--before", "30", "--kind", "wma"]) == 0
    assert "wma of steps 10, 20" in capsys.readouterr().out


def test_folders_are_merged_as_they_are_named(trained, tmp_path, capsys):
    folders = [str(trained / name) for name in ("at10", "at20", "agent")]
    assert main([*folders, "--into", str(tmp_path / "merged"), "--kind", "ema", "--alpha", "0.5"]) == 0
    states = [load_agent(folder).model.state_dict() for folder in folders]
    found = load_agent(tmp_path / "merged").model.state_dict()
    for name, tensor in found.items():
        expected = 0.25 * states[0][name] + 0.25 * states[1][name] + 0.5 * states[2][name]
        torch.testing.assert_close(tensor, expected)
    assert "ema of 3 folders" in capsys.readouterr().out


def test_encoders_are_found_below_their_prefix(tmp_path, capsys):
    """A stage of encoders keeps its whole objective: the encoder is a part of it."""
    torch.manual_seed(0)
    objective = torch.nn.ModuleDict({"student": CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64))})
    run = Run(tmp_path / "run", ALONE, {"objective": objective}, keep=2)
    states = []
    for step in (1, 2):
        torch.nn.init.normal_(objective["student"].blocks[0].attention.qkv.weight)
        states.append({name: tensor.clone() for name, tensor in objective["student"].state_dict().items()})
        run.finish(step)
    save_encoder(tmp_path / "run" / "encoder", objective["student"], GeometryConfig())
    assert main([str(tmp_path / "run"), "--module", "objective", "--into", str(tmp_path / "merged")]) == 0
    for name, tensor in load_encoder(tmp_path / "merged").model.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_what_cannot_be_merged_is_said_in_a_line(trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    into = ["--into", str(tmp_path / "new")]
    for argv, told in (
        ([str(trained), "--into", str(tmp_path / "full")], "is there already: name a new folder"),
        ([str(trained), *into, "--count", "4"], "holds 3 checkpoints, 4 are to be merged"),
        ([str(trained), *into, "--module", "policy"], "holds no module 'policy', but model"),
        ([str(trained), *into, "--kind", "ema", "--alpha", "0"], "merge.alpha 0.0 must lie in"),
        ([str(trained / "agent"), *into], "holds no checkpoints: name a run, or at least two model folders"),
        ([str(trained / "agent"), str(trained / "at10"), *into, "--before", "3"], "choose among a run"),
        ([str(trained), str(trained), *into], "name one run"),
    ):
        assert main(argv) == 1, argv
        said = capsys.readouterr().err
        assert said.startswith("error: "), said
        assert told in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()
