"""Exported folders: bitwise there and back, by transformers' own classes, and what is refused."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from dataclasses import replace
from importlib.metadata import metadata, version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file, save_file

from mmagent.chat import ChatConfig, Generation
from mmagent.interop.agent_folder import Agent, load_agent, save_agent
from mmagent.interop.conversion import check, convert, export_model, load_into
from mmagent.interop.hub.plain import from_plain, to_plain
from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.vocab import Vocab
from tests.agent_kit import GEOMETRY, picture, prompt, tiny_model, tiny_vocab
from tests.interop.hub_kit import batch_of, our_tokens, tiny_agent
from tests.interop.test_hub_model import VARIANTS

CHAT = ChatConfig(Generation.GLM47, thinking=True, preserve_thinking=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "agent"
    export_model(folder, tiny_agent(CHAT), "hub")
    return folder


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def auto_model(folder: Path, **options):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)


def test_there_and_back_is_bitwise(tmp_path, folder):
    """Multi-token prediction, router bias and experts included; model, geometry, chat and vocabulary as they were."""
    agent = tiny_agent(CHAT)
    convert(folder, tmp_path / "back", "native")
    back = load_agent(tmp_path / "back")
    assert equal(agent.model.state_dict(), back.model.state_dict())
    assert (back.model.config, back.geometry, back.chat) == (agent.model.config, GEOMETRY, CHAT)
    assert back.vocab.definition == agent.vocab.definition
    save_agent(tmp_path / "ours", agent.model, agent.vocab, agent.geometry, agent.chat)
    convert(tmp_path / "ours", tmp_path / "from folder", "hub")
    for file in folder.iterdir():
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "from folder" / file.name).read_bytes(), file.name


def test_the_card_says_how_to_load_it(tmp_path, folder, monkeypatch, capsys):
    """Its own lines, run as they stand."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    Picture.fromarray(np.zeros((84, 84, 3), np.uint8)).save(tmp_path / "screenshot.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=4"), "card", "exec"), {"FOLDER": str(folder)})
    assert capsys.readouterr().out


def test_the_card_names_what_the_code_needs(folder):
    """Every package that it imports, and no other but the one that transformers reads pictures with."""
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.partition(".")[0] for name in named} - set(sys.stdlib_module_names)
    card = (folder / "README.md").read_text()
    (needs,) = re.findall(r"It needs (.*) and pillow \(for pictures\), and was written for\ntransformers (\S+):", card)
    assert needs[0].split(", ") == ["torch", "transformers", "tokenizers", "numpy"]
    assert imported == set(needs[0].split(", "))
    assert needs[1] == version("transformers")
    assert "serving" in metadata("transformers").get_all("Provides-Extra")


def test_large_weights_go_into_numbered_files(tmp_path):
    agent = tiny_agent()
    export_model(tmp_path / "hub", agent, "hub", shard_size=200_000)
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "hub").glob("*.safetensors"))
    assert set(index["weight_map"]) == set(agent.model.state_dict())
    assert equal(agent.model.state_dict(), auto_model(tmp_path / "hub").state_dict())
    convert(tmp_path / "hub", tmp_path / "back", "native")
    assert equal(agent.model.state_dict(), load_agent(tmp_path / "back").model.state_dict())


def test_save_pretrained_makes_a_folder_of_the_same_kind(tmp_path, folder):
    """What a user of transformers trained or merely loaded comes home."""
    from transformers import AutoProcessor

    model = auto_model(folder)
    with torch.no_grad():
        model.decoder.norm.weight += 1.0
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    again = auto_model(tmp_path / "saved")
    assert check(tmp_path / "saved") == []
    assert equal(model.state_dict(), again.state_dict())
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    convert(tmp_path / "saved", tmp_path / "back", "native")
    back = load_agent(tmp_path / "back")
    assert equal(model.state_dict(), back.model.state_dict())
    assert (back.geometry, back.chat) == (GEOMETRY, CHAT)
    one = prompt("home", (picture(1),))
    theirs = again.generate(**batch_of([one], tiny_vocab().pad_id), max_new_tokens=8)[0, len(one) :].tolist()
    assert theirs == our_tokens(back, [one], 8)[0]


def test_bfloat16_keeps_the_router_bias_exact(folder):
    agent = tiny_agent()
    state = auto_model(folder, dtype=torch.bfloat16).state_dict()
    for name, tensor in agent.model.state_dict().items():
        if name.endswith("router.bias"):
            assert torch.equal(state[name], tensor), name
        else:
            assert torch.equal(state[name], tensor.to(torch.bfloat16)), name


def test_tensors_that_do_not_fit_are_named(tmp_path, folder):
    """transformers would start a missing one at random, and say so in a warning."""
    export_model(tmp_path / "hub", tiny_agent(), "hub")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    gone = weights.pop("decoder.blocks.1.moe.experts.down")
    save_file(weights | {"decoder.stray": torch.zeros(2)}, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    named = r"decoder\.blocks\.1\.moe\.experts\.down.*decoder\.stray"
    with pytest.raises(ValueError, match=named):
        auto_model(tmp_path / "hub")
    with pytest.raises(ValueError, match=named):
        convert(tmp_path / "hub", tmp_path / "back", "native")
    lenient = auto_model(tmp_path / "hub", strict=False)
    assert lenient.decoder.blocks[1].moe.experts.down.isfinite().all()
    misshapen = weights | {"decoder.blocks.1.moe.experts.down": gone[:, :-1].contiguous()}
    save_file(misshapen, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"size|shape|mismatch"):
        auto_model(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"decoder\.blocks\.1\.moe\.experts\.down"):
        convert(tmp_path / "hub", tmp_path / "back", "native")


class NotCogViT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = CogViT(cogvit_debug())
        self.patch_size, self.merge_size, self.width = 14, 2, self.inner.width
        self.patch_values = cogvit_debug().patch_values


def test_an_encoder_of_the_users_own_stays_at_home(tmp_path):
    agent = tiny_agent()
    foreign = AgentModel(agent.model.config, NotCogViT())
    with pytest.raises(ValueError, match=r"hub has no place for the encoder my\.module:Encoder, whose code"):
        export_model(tmp_path / "hub", Agent(foreign, agent.vocab, GEOMETRY, ChatConfig(), "my.module:Encoder"), "hub")
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_is_not_ours_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "hub")
    told = json.loads((folder / "config.json").read_text())
    for change, problem in (
        ({"agent": told["agent"] | {"window": 4}}, r"config\.json: agent has no window"),
        ({"agent": told["agent"] | {"image_id": 1}}, r"the model's image_id is 1"),
        ({"model_type": "mmagent", "agent": told["agent"]}, r"config\.json lacks geometry, chat"),
    ):
        changed = change if "model_type" in change else told | change
        (tmp_path / "hub" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=problem):
            check(tmp_path / "hub")


def test_a_vocabulary_that_would_be_numbered_anew_is_refused(tmp_path):
    """tokenizers gives control tokens the ids behind all others, whatever the file says."""
    definition = json.loads(tiny_vocab().definition)
    last = max(token["id"] for token in definition["added_tokens"])
    definition["model"]["vocab"]["zzz"] = last + 1
    vocab = Vocab(json.dumps(definition))
    model = AgentModel(replace(tiny_agent().model.config, vocab_size=vocab.size))
    with pytest.raises(ValueError, match=r"is \d+ in the vocabulary, but tokenizers reads it as \d+"):
        export_model(tmp_path / "hub", Agent(model, vocab, GEOMETRY, ChatConfig()), "hub")
    assert not list(tmp_path.iterdir())


def test_weights_can_be_cast_and_read_into_a_live_model(tmp_path, folder):
    convert(folder, tmp_path / "half", "hub", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    state, halves = tiny_agent().model.state_dict(), load_file(tmp_path / "half" / "model.safetensors")
    for name, tensor in state.items():
        assert torch.equal(halves[name], tensor if name.endswith("router.bias") else tensor.to(torch.bfloat16)), name
    assert auto_model(tmp_path / "half").dtype == torch.bfloat16
    live = tiny_model(seed=5)
    load_into(live, folder)
    assert equal(live.state_dict(), state)
    assert check(folder) == []


def test_configurations_survive_json():
    for config in VARIANTS.values():
        assert from_plain(AgentModelConfig, json.loads(json.dumps(to_plain(config)))) == config
    assert from_plain(ChatConfig, json.loads(json.dumps(to_plain(CHAT)))) == CHAT
    assert from_plain(AgentModelConfig, {"vocab_size": 7, "image_id": 3}) == replace(
        AgentModelConfig(), vocab_size=7, image_id=3
    )
