"""Whoever writes a folder replaces one of its own kind, and nothing that is anybody else's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmagent.agent.store import save_trajectories
from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import save_agent
from mmagent.interop.encoder_folder import save_encoder
from mmagent.interop.glm_tower import Tower, new_merger, save_tower
from mmagent.interop.image_text import save_image_text
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.models.backbones import save_backbone, wrap
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.models.text_tower import TextTower, TextTowerConfig
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.vocab import Vocab
from tests.agent_kit import tiny_vocab
from tests.backbone_kit import timm_model, transformers_model

GEOMETRY = GeometryConfig()


def agent(folder: Path) -> None:
    vocab = tiny_vocab()
    save_agent(folder, AgentModel(presets.debug(vocab.size, vocab.image_id)), vocab, GEOMETRY, ChatConfig())


def pieces(folder: Path) -> None:
    vocab = tiny_vocab()
    model = AgentModel(presets.debug(vocab.size, vocab.image_id))
    save_agent(folder, model, vocab, GEOMETRY, ChatConfig(), shard_size=100_000)


def both_towers(folder: Path) -> None:
    vocab: Vocab = tiny_vocab()
    text = TextTowerConfig(vocab_size=vocab.size, width=32, depth=1, heads=2, ffn=64, max_length=8)
    alignment = Alignment(CogViT(cogvit_debug()), TextTower(text), AlignmentConfig(width=16))
    save_image_text(folder, alignment, GEOMETRY, vocab, max_text=8)


def tower(folder: Path) -> None:
    encoder = CogViT(cogvit_debug())
    save_tower(folder, Tower(encoder, new_merger(encoder, 64), GEOMETRY))


SAVERS: dict[str, Callable[[Path], object]] = {
    "agent": agent,
    "agent in pieces": pieces,
    "encoder": lambda folder: save_encoder(folder, CogViT(cogvit_debug()), GEOMETRY),
    "both towers": both_towers,
    "tower": tower,
    "backbone of timm": lambda folder: save_backbone(wrap(timm_model("resnet18.a1_in1k")), folder),
    "backbone of transformers": lambda folder: save_backbone(wrap(transformers_model("dinov2")), folder),
    "trajectories": lambda folder: save_trajectories(folder, []),
}


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", SAVERS)
def test_its_own_kind_is_replaced_and_nothing_else(tmp_path, kind):
    save = SAVERS[kind]
    (tmp_path / "new").mkdir()
    for _ in range(2):
        save(tmp_path / "new")
    (tmp_path / "new" / "notes.md").write_text("years")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / ".git").write_text("years")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("steps: 7")
    (tmp_path / "file").write_text("years")
    before = content(tmp_path)
    for name, said in (
        ("new", r"\(it holds notes\.md\)"), ("thesis", r"\(it holds \.git\)"), ("configs", "config.yaml|missing"),
        ("file", "a file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} is .*{said}"):
            save(tmp_path / name)
    assert content(tmp_path) == before


def test_an_agent_is_no_encoder_and_the_other_way_round(tmp_path):
    """Both are a config.yaml beside weights."""
    SAVERS["agent"](tmp_path / "agent")
    SAVERS["encoder"](tmp_path / "encoder")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"agent is no encoder folder: it is not replaced \(it holds tokenizer\.json"):
        SAVERS["encoder"](tmp_path / "agent")
    with pytest.raises(ValueError, match=r"encoder is no agent folder: .*\(tokenizer\.json missing\)"):
        SAVERS["agent"](tmp_path / "encoder")
    assert content(tmp_path) == before
