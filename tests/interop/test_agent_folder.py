"""An agent's folder: round trip of weights, configuration and vocabulary; mismatches are named."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmagent.chat import ChatConfig, Generation
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import fingerprint, load_agent, new_agent, save_agent
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.vocab import SPECIAL_TOKENS, Vocab


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.train(["click(1, 2)"], 256 + len(SPECIAL_TOKENS))


def build(vocab: Vocab) -> AgentModel:
    torch.manual_seed(0)
    return AgentModel(presets.debug(vocab.size, vocab.image_id))


def geometry_of(model: AgentModel) -> GeometryConfig:
    vision = model.config.vision
    return GeometryConfig(
        patch_size=vision.patch_size, temporal_patch=vision.temporal_patch, merge_size=vision.merge_size, min_tokens=1
    )


def test_round_trip(tmp_path, vocab):
    model = build(vocab)
    geometry, chat = geometry_of(model), ChatConfig(Generation.GLM47, thinking=True)
    save_agent(tmp_path / "agent", model, vocab, geometry, chat)
    agent = load_agent(tmp_path / "agent")
    assert (agent.geometry, agent.chat, agent.model.config) == (geometry, chat, model.config)
    assert agent.vocab.encode("click(12, 345)") == vocab.encode("click(12, 345)")
    assert not agent.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, agent.model.state_dict()[name]), name


def test_replaces_an_older_folder_and_changes_the_fingerprint(tmp_path, vocab):
    model = build(vocab)
    folder = tmp_path / "agent"
    save_agent(folder, model, vocab, geometry_of(model), ChatConfig())
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    save_agent(folder, model, vocab, geometry_of(model), ChatConfig())
    assert fingerprint(folder) != before
    assert fingerprint(folder, whole_up_to=0) != before
    assert torch.equal(load_agent(folder).model.embedding.weight, model.embedding.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["agent"]


def test_disagreement_is_refused_before_writing(tmp_path, vocab):
    model = build(vocab)
    with pytest.raises(ValueError, match="image_id"):
        save_agent(
            tmp_path / "a",
            AgentModel(replace(model.config, image_id=3)),
            vocab,
            geometry_of(model),
            ChatConfig(),
        )
    with pytest.raises(ValueError, match="values a patch"):
        save_agent(tmp_path / "a", model, vocab, GeometryConfig(patch_size=64), ChatConfig())
    assert not list(tmp_path.iterdir())


def test_missing_pieces_are_named(tmp_path, vocab):
    model = build(vocab)
    save_agent(tmp_path / "agent", model, vocab, geometry_of(model), ChatConfig())
    (tmp_path / "agent" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json missing"):
        load_agent(tmp_path / "agent")
    with pytest.raises(ValueError, match="no agent folder"):
        fingerprint(tmp_path)


class NotCogViT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = CogViT(cogvit_debug())
        self.patch_size, self.merge_size, self.width = self.inner.patch_size, self.inner.merge_size, self.inner.width
        self.patch_values = cogvit_debug().patch_values

    def forward(self, vision, layers=()):
        return self.inner(vision, layers)


def test_custom_encoder_is_named_by_its_import_path(tmp_path, vocab, monkeypatch):
    model = AgentModel(presets.debug(vocab.size, vocab.image_id), NotCogViT())
    with pytest.raises(ValueError, match="import path of the factory of NotCogViT"):
        save_agent(tmp_path / "agent", model, vocab, geometry_of(model), ChatConfig())
    monkeypatch.setitem(sys.modules, "my_encoders", SimpleNamespace(NotCogViT=NotCogViT))
    save_agent(tmp_path / "agent", model, vocab, geometry_of(model), ChatConfig(), encoder="my_encoders:NotCogViT")
    agent = load_agent(tmp_path / "agent")
    again = agent.model
    assert agent.encoder == "my_encoders:NotCogViT"
    assert isinstance(again.encoder, NotCogViT)
    assert torch.equal(again.encoder.inner.state_dict()["embed.weight"], model.encoder.inner.embed.weight)


def test_a_new_agent_of_what_does_not_fit_is_refused(vocab):
    """Here, and not when a training has run to its end and is saved."""
    config = presets.debug(vocab.size, vocab.image_id)
    with pytest.raises(ValueError, match="values a patch"):
        new_agent(config, vocab, GeometryConfig(patch_size=64), ChatConfig())
    with pytest.raises(ValueError, match=f"the tokenizer has {vocab.size} ids, the model {vocab.image_id + 1}"):
        new_agent(replace(config, vocab_size=vocab.image_id + 1), vocab, GeometryConfig(), ChatConfig())
    for other in ({"patch_size": 7}, {"merge_size": 3}, {"temporal_patch": 1}):
        with pytest.raises(ValueError, match=r"NotCogViT: the encoder's (patch_size|merge_size|patch_values) is"):
            new_agent(config, vocab, GeometryConfig(**other), ChatConfig(), f"{__name__}:NotCogViT")
    agent = new_agent(config, vocab, GeometryConfig(), ChatConfig(), f"{__name__}:NotCogViT")
    assert type(agent.model.encoder).__name__ == "NotCogViT"
    assert agent.encoder == f"{__name__}:NotCogViT"
