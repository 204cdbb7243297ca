"""Ours against the stock transformers classes on random weights: forward, gradients, both directions.

Tolerances: fp32 on both sides, activations of size 1 through a few layers; products are summed in another
order (stacked matrices, batched segments), which costs some 1e-6 a layer, and gradients sum over all tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmagent.interop.glm import agent_adapter, from_transformers, into_transformers
from mmagent.interop.glm_vision import vision_adapter, vision_configs
from mmagent.models.cogvit import CogViT
from mmagent.models.projector import Projector
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import IGNORE, PackedBatch, PackedVision
from tests.model_kit import IMAGE, image_patches, make_document, make_pack

GRIDS = [(1, 4, 6), (1, 2, 2), (1, 6, 4)]
VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 48, "image_size": 56,
}  # fmt: skip
TEXT = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
SPARSE = {
    "moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "attention_bias": True,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _library():
    ensure_torchvision()
    import transformers

    transformers.logging.set_verbosity_error()


def randomise(model: nn.Module) -> nn.Module:
    """Away from zero biases and unit gains, which would hide a swapped name; a router bias, too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim < 2 and "norm" in name and "bias" not in name:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise * (0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5))
    return model.eval()


def tower(kind: str) -> nn.Module:
    from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionConfig, Glm4vMoeVisionModel
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextVisionConfig, Glm5NextVisionModel
    from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionConfig, GlmOcrVisionModel

    if kind == "glm5_next":
        config = Glm5NextVisionConfig(**VISION, projection_intermediate_size=80, swiglu_limit=0.5)
        return randomise(Glm5NextVisionModel._from_config(config))
    pair = {
        "glm_ocr": (GlmOcrVisionConfig, GlmOcrVisionModel),
        "glm4v_moe": (Glm4vMoeVisionConfig, Glm4vMoeVisionModel),
    }
    config, model = pair[kind]
    return randomise(model._from_config(config(**VISION)))


class Eye(nn.Module):
    def __init__(self, theirs):
        super().__init__()
        vision, projector = vision_configs(theirs)
        self.encoder = CogViT(vision)
        self.projector = Projector(projector, vision.width, vision.merge_size, theirs.out_hidden_size)
        self.adapter = vision_adapter(vision, projector, theirs.out_hidden_size)


@pytest.mark.parametrize("kind", ["glm_ocr", "glm5_next", "glm4v_moe"])
def test_vision_tower(kind):
    theirs = tower(kind)
    ours = Eye(theirs.config)
    ours.adapter.load(ours, theirs.state_dict())
    grids = GRIDS if kind == "glm4v_moe" else [*GRIDS, (2, 2, 4)]  # the tower of GLM-4.5V fails at clips
    vision = PackedVision(torch.cat([image_patches(g, i) for i, g in enumerate(grids)]), torch.tensor(grids))
    wanted = theirs(vision.patches, torch.tensor(grids)).pooler_output
    got = ours.projector(ours.encoder(vision).tokens)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * direction).sum().backward()
    (wanted * direction).sum().backward()
    theirs_as_ours = ours.adapter.to_ours({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs_as_ours[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    back = ours.adapter.to_theirs(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def language_model(kind: str) -> nn.Module:
    from transformers import (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        Glm4vMoeConfig,
        Glm4vMoeForConditionalGeneration,
        GlmOcrConfig,
        GlmOcrForConditionalGeneration,
    )

    if kind == "glm4_moe":
        config = Glm4MoeConfig(**TEXT, **SPARSE, rope_parameters=ROPE, use_qk_norm=True, n_group=4, topk_group=2)
        return randomise(Glm4MoeForCausalLM._from_config(config))
    if kind == "glm4v_moe":
        text = TEXT | SPARSE | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
        config = Glm4vMoeConfig(vision_config=VISION, text_config=text, image_token_id=IMAGE)
        return randomise(Glm4vMoeForConditionalGeneration._from_config(config))
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = GlmOcrConfig(vision_config=VISION, text_config=text, image_token_id=IMAGE)
    return randomise(GlmOcrForConditionalGeneration._from_config(config))


def their_logits(model: nn.Module, kind: str, document: dict) -> Tensor:
    inputs = {"input_ids": document["ids"][None], "use_cache": False}
    if kind != "glm4_moe" and document["grids"]:
        inputs |= {
            "pixel_values": torch.cat(document["patches"]),
            "image_grid_thw": torch.tensor(document["grids"]),
            "mm_token_type_ids": (document["ids"] == IMAGE).int()[None],
        }
    return model(**inputs).logits[0]


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")


def our_logits(model, batch: PackedBatch) -> Tensor:
    return model(batch).hidden @ model.head_weight.T


@pytest.mark.parametrize("kind", ["glm4_moe", "glm4v_moe", "glm_ocr"])
def test_language_model_packed_against_theirs_alone(kind):
    """Our one packed stream against their documents one by one: logits, loss gradients, and weights back."""
    theirs = language_model(kind)
    ours = from_transformers(theirs)
    images = [] if kind == "glm4_moe" else [(1, 4, 6)]
    documents = [
        make_document([5, *images, 9], 1),
        make_document([11], 2),
        make_document([2, *images, 3, *images, 4], 3),
    ]
    batch = make_pack(documents, tail=3, flat_positions=kind == "glm4_moe")
    got = our_logits(ours, batch)
    at, theirs_loss = 0, torch.tensor(0.0)
    for document in documents:
        wanted = their_logits(theirs, kind, document)
        length = len(document["ids"])
        torch.testing.assert_close(got[at : at + length], wanted, atol=5e-5, rtol=1e-4)
        theirs_loss, at = theirs_loss + summed_loss(wanted, document["labels"]), at + length
    ours_loss, at = torch.tensor(0.0), 0
    for document in documents:
        length = len(document["ids"])
        ours_loss, at = ours_loss + summed_loss(got[at : at + length], document["labels"]), at + length
    ours_loss.backward()
    theirs_loss.backward()
    theirs_state = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}
    theirs_state |= dict(theirs.named_buffers()) if kind != "glm_ocr" else {}
    theirs_state = {n: t for n, t in theirs_state.items() if n in theirs.state_dict()}
    wanted_grads = agent_adapter(ours.config, kind).to_ours(theirs_state)
    for name, parameter in ours.named_parameters():
        if name in wanted_grads:
            torch.testing.assert_close(
                parameter.grad, wanted_grads[name], atol=5e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ["glm4_moe", "glm4v_moe", "glm_ocr"])
def test_weights_go_back_bitwise(kind):
    theirs = language_model(kind)
    ours = from_transformers(theirs)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *(b for n, b in theirs.named_buffers() if n in state)):
            tensor.fill_(float("nan"))
    into_transformers(ours, theirs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
