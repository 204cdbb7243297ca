"""The three forms of a sparse model on disk: they hold the same numbers, and are read as any folder is."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mmagent.chat import ChatConfig
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import load_agent, save_agent
from mmagent.interop.conversion import convert
from mmagent.interop.encoder_folder import load_encoder, save_encoder
from mmagent.interop.packed_folder import MASKS, PACKING, load_masks, save_masks
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.models.packed import layout_of
from mmagent.serve.loading import load
from mmagent.sparsity.patterns import PatternConfig, make_masks
from mmagent.train.sparsify import prunable
from mmagent.trajectories import Limits
from mmagent.types import PackedVision
from tests.agent_kit import picture, prompt, tiny_model, tiny_vocab
from tests.conversion_kit import released
from tests.model_kit import image_patches
from tools import pack as tool

PATTERN = PatternConfig("tile-element", granularity=8, delta=0.05)


def prune(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = dict(model.named_parameters())
    masks = make_masks({name: own[name].detach().square() for name in prunable(model)}, 0.5, PATTERN)
    with torch.no_grad():
        for name, mask in masks.items():
            own[name] *= mask.bool()
    return masks


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """A run's folder with ``agent`` and masks, and ``packed`` and ``dense`` that the tool made."""
    folder = tmp_path_factory.mktemp("sparse")
    model = tiny_model()
    masks = prune(model)
    save_agent(folder / "agent", model, tiny_vocab(), GeometryConfig(), ChatConfig())
    save_masks(folder / MASKS, masks, PATTERN)
    assert tool.main([f"{folder}/agent", "--into", f"{folder}/packed", "--step", "4"]) == 0
    assert tool.main([f"{folder}/packed", "--into", f"{folder}/dense", "--dense"]) == 0
    return folder


def test_a_packed_agent_answers_as_the_dense_one(agents):
    """Tokens of greedy decoding, with a picture, and log-probabilities to rounding."""
    limits = Limits(max_tokens=6, temperature=0.0, stop_ids=())
    found = []
    for name in ("agent", "packed"):
        loaded = load_agent(agents / name)
        assert bool(layout_of(loaded.model)) == (name == "packed")
        asked = [(prompt("type the word"), limits), (prompt("click", (picture(0),)), limits)]
        found.append(Generator(loaded.model, loaded.vocab, GeneratorConfig()).generate(asked))
    for dense, packed in zip(*found, strict=True):
        assert dense.ids == packed.ids
        assert dense.logprobs == pytest.approx(packed.logprobs, abs=1e-4)


def test_the_way_back_is_bitwise(agents):
    before, after = load_agent(agents / "agent").model.state_dict(), load_agent(agents / "dense").model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not (agents / "dense" / PACKING).exists()


def test_a_packed_agent_is_smaller_and_is_saved_again(agents, tmp_path):
    loaded = load_agent(agents / "packed", dtype=torch.bfloat16)
    save_agent(tmp_path / "again", *loaded[:4])
    again = load_agent(tmp_path / "again", dtype=torch.bfloat16)
    assert layout_of(again.model) == layout_of(loaded.model)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])


def test_an_encoder_in_all_forms(tmp_path, capsys):
    torch.manual_seed(0)
    encoder = CogViT(cogvit_debug()).eval()
    masks = prune(encoder)
    save_encoder(tmp_path / "encoder", encoder, GeometryConfig())
    save_masks(tmp_path / MASKS, masks, PATTERN)
    assert tool.main([f"{tmp_path}/encoder", "--into", f"{tmp_path}/packed", "--step", "4"]) == 0
    assert "% are multiplied" in capsys.readouterr().out
    assert tool.main([f"{tmp_path}/packed", "--into", f"{tmp_path}/dense", "--dense"]) == 0
    vision = PackedVision(image_patches((1, 4, 4), 0), torch.tensor([[1, 4, 4]]))
    with torch.no_grad():
        wanted = encoder(vision).tokens
        torch.testing.assert_close(load_encoder(tmp_path / "packed").model(vision).tokens, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(load_encoder(tmp_path / "dense").model(vision).tokens, wanted)


def test_serving_reads_packed_folders_and_training_refuses_them(agents):
    agent, told = load(agents / "packed", device="cpu")
    assert layout_of(agent.model)
    assert told == ["packed: layers hold what pruning left of them"]
    with pytest.raises(ValueError, match="packed layers do not train"):
        agent.model.train()
    with pytest.raises(ValueError, match="is packed: make it dense first"):
        convert(agents / "packed", agents / "elsewhere", "hub")


def test_dense_with_zeros_is_loaded_by_a_stock_class(tmp_path):
    """A released GLM-4.5V of small numbers comes in, is pruned, goes out, and its own class reads it whole."""
    released(tmp_path / "theirs", "glm4v_moe", dtype=torch.float32)
    convert(tmp_path / "theirs", tmp_path / "ours", "native")
    agent = load_agent(tmp_path / "ours")
    masks = prune(agent.model)
    save_agent(tmp_path / "sparse", *agent[:4])
    convert(tmp_path / "sparse", tmp_path / "back", "glm4v_moe")
    from transformers import Glm4vMoeForConditionalGeneration

    stock, told = Glm4vMoeForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not told["missing_keys"]
    dropped = {  # MTP layers have no place in the stock class
        role: sum(int((masks[name] == 0).sum()) for name, own in prunable(agent.model).items() if own == role)
        for role in ("encoder", "decoder")
    }
    parts = {"encoder": stock.model.visual, "decoder": stock.model.language_model}
    for role, part in parts.items():
        zeros = sum(int((p == 0).sum()) for p in part.parameters() if p.ndim > 1)
        assert dropped[role] > 0
        assert zeros >= dropped[role], role


def test_masks_come_back_with_their_pattern(agents):
    masks, pattern = load_masks(agents / MASKS)
    assert pattern == PATTERN
    assert set(masks) == set(prunable(tiny_model()))


def test_what_does_not_fit_is_told(agents, tmp_path, capsys):
    with pytest.raises(ValueError, match="holds no masks"):
        load_masks(agents / "agent" / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read as masks"):
        load_masks(agents / "agent" / "config.yaml")
    with pytest.raises(ValueError, match="no masks there; a run that prunes leaves them in OUTPUT"):
        load_masks(tmp_path / "none")
    for arguments, message in (
        ([f"{agents}/packed", "--into", f"{tmp_path}/a"], "is packed already"),
        ([f"{agents}/agent", "--into", f"{tmp_path}/a", "--dense"], "is not packed"),
        ([f"{agents}/agent", "--into", f"{agents}/packed"], "name a new folder"),
        ([f"{tmp_path}/none", "--into", f"{tmp_path}/a"], f"{tmp_path}/none: no such folder"),
    ):
        assert tool.main(arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["[]", "{", '{"decoder": {"weight": [{"batches": [[1, 2]]}]}}'])
def test_a_spoilt_layout_is_refused(agents, tmp_path, spoil):
    shutil.copytree(agents / "packed", tmp_path / "spoilt")
    (tmp_path / "spoilt" / PACKING).write_text(spoil)
    with pytest.raises(ValueError, match="is no layout of packed layers"):
        load_agent(tmp_path / "spoilt")


def test_a_layout_of_another_model_is_refused(agents, tmp_path):
    shutil.copytree(agents / "packed", tmp_path / "other")
    layout = json.loads((tmp_path / "other" / PACKING).read_text())
    first = next(iter(layout))
    (tmp_path / "other" / PACKING).write_text(json.dumps({f"{first}.more": layout[first]}))
    with pytest.raises(ValueError, match="this model has no layer of that name"):
        load_agent(tmp_path / "other")
