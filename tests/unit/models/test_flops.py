"""The operations that MFU counts: against counts by hand, and against what torch's counter sees a step do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmagent.losses.language import language_loss
from mmagent.models import decoder as decoder_module
from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.decoder import DecoderConfig
from mmagent.models.flops import (
    EncoderCost,
    cost_weights,
    forward_flops,
    head_flops,
    model_flops,
    text_flops,
    training_flops,
)
from mmagent.models.moe import MoEConfig
from mmagent.models.mtp import MTPConfig
from mmagent.models.presets import glm45_air, on_meta
from mmagent.models.projector import ProjectorConfig
from mmagent.models.text_tower import TextTower, TextTowerConfig
from mmagent.types import PackedVision, Segments, VisionFeatures
from tests.model_kit import IMAGE, make_document, make_pack

CONFIG = AgentModelConfig(
    vocab_size=200,
    image_id=IMAGE,
    vision=CogViTConfig(width=32, depth=2, heads=2, ffn=48),
    projector=ProjectorConfig(ffn=40),
    decoder=DecoderConfig(
        width=64, layers=3, dense_layers=1, heads=4, kv_heads=2, head_dim=16, ffn=96,
        moe=MoEConfig(experts=8, top_k=2, shared=1, ffn=32),
    ),
    mtp=MTPConfig(depths=2),
)  # fmt: skip


def batch(tail: int = 0):
    return make_pack([make_document([5, (1, 4, 6), 9], 1, 200), make_document([40], 2, 200)], tail=tail)


def test_counts_by_hand():
    """Two documents of 20 and 40 tokens, the first with an image of 24 patches (6 visual tokens)."""
    flops = forward_flops(CONFIG, batch())
    assert flops.encoder == 24 * 2 * (1176 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48))
    assert flops.encoder_attention == 2 * 4 * 32 * 24 * 24
    assert flops.projector == 6 * 2 * (4 * 32 * 64 + 64 * 64 + 3 * 64 * 40)
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64  # queries, keys and values, output
    sparse = attention + 3 * 3 * 64 * 32 + 8 * 64  # two experts of eight and the shared one, and the router
    assert flops.decoder == 60 * 2 * (attention + 3 * 64 * 96 + 2 * sparse)
    pairs = 20 * 21 // 2 + 40 * 41 // 2
    assert flops.decoder_attention == 3 * pairs * 4 * 16 * 4
    assert flops.mtp == 2 * 60 * 2 * (2 * 64 * 64 + sparse)
    assert flops.mtp_attention == 2 * pairs * 4 * 16 * 4
    # targets: of 20 tokens 6 are visual and the first has nothing before it; each depth loses one more at its end
    assert flops.head % (2 * 64 * 200) == 0
    assert flops.head // (2 * 64 * 200) == 13 + 39 + 12 + 38 + 11 + 37
    assert flops.forward == sum(flops)


def test_padding_and_the_number_of_idle_experts_count_for_nothing():
    assert forward_flops(CONFIG, batch(tail=13)) == forward_flops(CONFIG, batch())
    more = replace(CONFIG, decoder=replace(CONFIG.decoder, moe=replace(CONFIG.decoder.moe, experts=64)))
    router = 2 * 60 * 56 * 64
    assert forward_flops(more, batch()).decoder - forward_flops(CONFIG, batch()).decoder == 2 * router


def test_attention_grows_with_documents_not_with_the_pack():
    one = forward_flops(CONFIG, make_pack([make_document([60], 1, 200)]))
    many = forward_flops(CONFIG, make_pack([make_document([20], n, 200) for n in range(3)]))
    assert one.decoder == many.decoder
    assert one.decoder_attention / many.decoder_attention == (60 * 61) / (3 * 20 * 21)


def test_shared_prefixes_are_seen_by_their_continuations():
    pack = make_pack([make_document([20], 1, 200), make_document([8], 2, 200), make_document([8], 3, 200)])
    shared = replace(pack, prefix_of=(-1, 0, 0))
    per_pair = 3 * 4 * 4 * 16
    extra = forward_flops(CONFIG, shared).decoder_attention - forward_flops(CONFIG, pack).decoder_attention
    assert extra == 2 * 8 * 20 * per_pair


@pytest.mark.parametrize("frozen", [(), ("encoder", "projector"), ("decoder", "head")])
def test_what_torch_counts_of_a_step(monkeypatch, frozen):
    """All matrix products of forward and backward, to the last one. Attention is left out on both sides: torch counts
    it as a full square, or not at all, by the kernel. We do not count the weighted sum of the experts' results, which
    torch sees as a product in the forward and as none in the backward."""
    monkeypatch.setattr("mmagent.ops.grouped.LEAST_ROWS", 1)  # rows that only fill up a product are no useful work
    monkeypatch.setattr(decoder_module, "varlen_attention", lambda q, k, v, *_, **__: q * k.mean() + v.mean())
    monkeypatch.setattr("mmagent.models.cogvit.varlen_attention", lambda q, k, v, *_, **__: q + k + v)
    torch.manual_seed(0)
    model = AgentModel(CONFIG)
    model.freeze(frozen)
    pack = batch()
    with FlopCounterMode(display=False) as counter:
        output = model(pack)
        loss = language_loss(output, pack.labels, pack.segments, model.head_weight)
        total = loss.next_token.total + sum(depth.total for depth in loss.mtp)
        total.backward()
    flops = forward_flops(CONFIG, pack)
    attention = (flops.decoder_attention + flops.mtp_attention) * 3 + flops.encoder_attention * (
        1 if "encoder" in frozen else 3
    )
    assert counter.get_total_flops() == training_flops(CONFIG, pack, frozen) - attention


def test_six_operations_an_active_parameter():
    """Of GLM-4.5-Air: 12 billion active parameters of 106, by its report, attention aside."""
    config = replace(glm45_air(), mtp=MTPConfig(depths=0))
    pack = make_pack([make_document([1000], 1)])
    flops = forward_flops(config, pack)
    assert 11e9 < (flops.decoder + flops.head) / 2 / 1000 < 13e9
    assert sum(p.numel() for p in on_meta(config).decoder.parameters()) > 8 * flops.decoder / 2 / 1000
    assert 3 * 0.99 < training_flops(config, pack) / flops.forward <= 3


class _Foreign(nn.Module):
    """An encoder of the protocol that is no CogViT."""

    patch_size, merge_size, width = 14, 2, 24

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1176, 24)
        self.norm = nn.LayerNorm(24)

    def forward(self, vision, layers=()):
        return VisionFeatures(self.norm(self.inner(vision.patches)), {}, torch.zeros(0, 24))


def test_a_model_is_counted_as_it_is_frozen_and_with_the_encoder_that_it_has():
    model = AgentModel(CONFIG)
    assert model_flops(model, batch()) == training_flops(CONFIG, batch())
    model.freeze(["encoder", "decoder"])
    assert model_flops(model, batch()) == training_flops(CONFIG, batch(), ["encoder", "decoder"])
    short = replace(CONFIG, mtp=replace(CONFIG.mtp, depths=0))
    assert model_flops(model, batch(), mtp=False) == training_flops(short, batch(), ["encoder", "decoder"])
    foreign = AgentModel(CONFIG, _Foreign())
    flops = forward_flops(CONFIG, batch(), EncoderCost.of(foreign.encoder))
    assert (flops.encoder, flops.encoder_attention) == (24 * 2 * 1176 * 24, 0)
    assert flops.projector == 6 * 2 * (4 * 24 * 64 + 64 * 64 + 3 * 64 * 40)
    assert model_flops(foreign, batch()) == training_flops(CONFIG, batch(), (), EncoderCost.of(foreign.encoder))


def test_encoder_stages_count_what_torch_counts():
    """A student with one linear head over its patches, and a text tower: forward and backward as torch's counter sees
    them. Its attention runs per segment through scaled_dot_product_attention, whose backward recomputes the scores
    (2.5 times the forward where we count 2): compared apart, by what a second depth adds to matrix products alone."""
    vision = PackedVision(torch.randn(24, 1176), torch.tensor([[1, 4, 6]]))
    encoder, head = CogViT(CONFIG.vision), nn.Linear(32, 7)
    with FlopCounterMode(display=False) as counter:
        head(encoder(vision).tokens).sum().backward()
    attention = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" in str(k))
    ours = EncoderCost.of(encoder).training([24]) + head_flops(head, 24)
    ours -= 3 * EncoderCost.of(encoder).attention * 24 * 24
    # the head's gradient needs one product less than a layer in the middle, and torch multiplies by ones for biases
    assert counter.get_total_flops() - attention == pytest.approx(ours, rel=0.02)
    tower = TextTower(TextTowerConfig(vocab_size=50, width=32, depth=2, heads=2, ffn=48))
    ids, segments = torch.randint(50, (12,)), Segments([5, 7])
    with FlopCounterMode(display=False) as counter:
        tower(ids, segments).sum().backward()
    attention = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" in str(k))
    pairs = 3 * 2 * 4 * 32 * (25 + 49)
    assert counter.get_total_flops() - attention == pytest.approx(text_flops(tower.config, [5, 7]) - pairs, rel=0.02)


@pytest.mark.parametrize(
    "frozen", [(), ("encoder",), ("encoder", "projector"), ("decoder", "head"), ("encoder", "projector", "embedding")]
)
def test_cost_weights_say_what_training_flops_say(frozen):
    """But for visual tokens, which the head does not score, and the square of short documents, of which causal
    attention computes a little more than half: both are below a tenth of the whole here."""
    weights = cost_weights(CONFIG, frozen)
    for parts in ([600], [40, (1, 8, 8), 300], [(1, 16, 16), 40], [10, (1, 30, 40), 30]):
        pack = make_pack([make_document(parts, 3, 200)])
        targets = pack.num_tokens - pack.visual_slots.numel()
        unscored = (weights.tokens - cost_weights(replace(CONFIG, vocab_size=2), frozen).tokens) * (
            pack.num_tokens - targets
        )
        assert weights(pack.cost()) - unscored == pytest.approx(training_flops(CONFIG, pack, frozen), rel=0.03)


def test_what_is_computed_again_costs_a_forward_more():
    plain, again = cost_weights(CONFIG), cost_weights(CONFIG, recompute=("encoder", "decoder", "mtp"))
    assert again.patches_squared == plain.patches_squared * 4 / 3
    assert again.tokens_squared == plain.tokens_squared * 4 / 3
    assert plain.tokens < again.tokens < plain.tokens * 4 / 3  # the head is not
    frozen = {"frozen": ("encoder",), "recompute": ("encoder",)}
    assert cost_weights(CONFIG, **frozen) == cost_weights(CONFIG, ("encoder",)), "nothing is kept, nothing recomputed"
    assert cost_weights(CONFIG, ("encoder",)).patches < plain.patches / 2


def test_cost_weights_of_another_encoder():
    encoder = EncoderCost(weights=1000, first=0, attention=0, width=32, merge_size=2)
    weights = cost_weights(CONFIG, encoder=encoder)
    assert weights.patches_squared == 0
    assert weights.patches > 6000
