"""Presets count what was published. All but the small ones are built on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mmagent.models import presets
from mmagent.models.agent_model import AgentModel


def count(config) -> Counter:
    model = presets.on_meta(config)
    roles, counts = model.roles(), Counter()
    for name, parameter in model.named_parameters():
        counts[roles[name].role] += parameter.numel()
    return counts


def active(config) -> float:
    """Parameters that serve one token in decoder and MTP: all but the experts it was not sent to."""
    model = presets.on_meta(config)
    moe, total = config.decoder.moe, 0
    for name, parameter in (*model.decoder.named_parameters(), *model.mtp.named_parameters()):
        total += parameter.numel() * (moe.top_k / moe.experts if ".experts." in name else 1)
    return total


def test_glm45_is_355b_of_which_32b_are_active():
    """The report counts MTP layers, but neither the embedding nor the head."""
    config = presets.glm45()
    counts = count(config)
    assert round((counts["decoder"] + counts["mtp"]) / 1e9) == 355
    assert round(active(config) / 1e9) == 32
    assert counts["embedding"] == counts["head"] == 151_552 * 5120


def test_glm45_air_is_106b_of_which_12b_are_active():
    """106B is the decoder without its MTP layer; 12B active include the MTP layer."""
    config = presets.glm45_air()
    assert round(count(config)["decoder"] / 1e9) == 106
    assert round(active(config) / 1e9) == 12


def test_glm_ocr_is_0_9b():
    """0.9B: the encoder's blocks and the decoder with its MTP module, without embedding, head and merger."""
    counts = count(presets.glm_ocr())
    assert round((counts["encoder"] + counts["decoder"] + counts["mtp"]) / 1e9, 1) == 0.9


def test_small_is_about_1b():
    assert 0.9e9 < sum(count(presets.small()).values()) < 1.1e9


@pytest.mark.parametrize("preset", ["debug", "laptop", "small", "glm_ocr", "glm45_air", "glm45"])
def test_parameters_of_a_block_have_the_published_shapes(preset):
    config = getattr(presets, preset)()
    model = presets.on_meta(config)
    decoder = config.decoder
    assert len(model.decoder.blocks) == decoder.layers
    assert sum(block.moe is not None for block in model.decoder.blocks) == decoder.moe_layers
    qkv = model.decoder.blocks[0].attention.qkv.weight
    assert qkv.shape == ((decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim, decoder.width)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_seeds_decide_the_weights():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in AgentModel(presets.debug()).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
