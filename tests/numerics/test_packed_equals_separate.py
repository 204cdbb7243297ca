"""Packing changes nothing: hidden states, losses, MTP, router statistics and every gradient.

Tolerances: fp32; both sides sum the same few hundred terms in another order, so values of size 1 differ by
at most some 1e-5, and gradients (sums over all tokens) by ten times that.
"""

from __future__ import annotations

import pytest
import torch

from mmagent.losses.language import language_loss
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.types import PackedBatch
from tests.model_kit import gradients, make_document, make_pack

DOCUMENTS = [
    [3, (1, 4, 6), 9],
    [12],
    [2, (1, 2, 2), 5, (1, 4, 4), 6],
    [1, (2, 4, 2), 4],  # a clip of two frames
    [7],
]


def build(mode: str = "shared", tied: bool = True) -> AgentModel:
    torch.manual_seed(0)
    config = presets.debug()
    config.mtp.mode, config.mtp.tied = mode, tied
    return AgentModel(config)


def total(model: AgentModel, batch: PackedBatch) -> torch.Tensor:
    """Everything that can carry gradient, weighted so that no term hides behind another."""
    output = model(batch)
    loss = language_loss(output, batch.labels, batch.segments, model.head_weight)
    return loss.next_token.total + sum((k + 2) * depth.total for k, depth in enumerate(loss.mtp)) + 3 * output.balance


@pytest.mark.parametrize("mode", ["shared", "fused", "masked"])
@pytest.mark.parametrize("tail", [0, 6])
def test_losses_and_gradients(mode, tail):
    model = build(mode, tied=mode != "masked")
    documents = [make_document(parts, seed) for seed, parts in enumerate(DOCUMENTS)]
    packed = total(model, make_pack(documents, tail))
    packed.backward()
    wanted = gradients(model)
    model.zero_grad()
    separate = [total(model, make_pack([document])) for document in documents]
    torch.testing.assert_close(packed, torch.stack(separate).sum(), rtol=1e-5, atol=1e-4)
    for loss in separate:
        loss.backward()
    assert wanted.keys() == gradients(model).keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(wanted[name], gradient, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_hidden_states_and_router_statistics():
    model = build()
    documents = [make_document(parts, seed) for seed, parts in enumerate(DOCUMENTS)]
    packed = model(make_pack(documents, tail=3))
    load = torch.zeros_like(packed.router_load)
    balance = torch.zeros(())
    at = 0
    for document in documents:
        alone = model(make_pack([document]))
        length = len(document["ids"])
        torch.testing.assert_close(packed.hidden[at : at + length], alone.hidden, rtol=1e-4, atol=2e-5)
        for depth, (ours, theirs) in enumerate(zip(packed.mtp_hidden, alone.mtp_hidden, strict=True), start=1):
            known = max(length - depth, 0)  # beyond it the shifted token lies outside the document
            torch.testing.assert_close(ours[at : at + known], theirs[:known], rtol=1e-4, atol=2e-5)
        load, balance, at = load + alone.router_load, balance + alone.balance, at + length
    assert torch.equal(packed.router_load, load)
    torch.testing.assert_close(packed.balance, balance, rtol=1e-5, atol=1e-5)


def test_order_of_documents_does_not_matter():
    model = build()
    documents = [make_document(parts, seed) for seed, parts in enumerate(DOCUMENTS)]
    with torch.no_grad():
        one, other = total(model, make_pack(documents)), total(model, make_pack(documents[::-1]))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_flat_positions_pack_as_well():
    model = build()
    documents = [make_document([9], 1), make_document([5], 2)]
    flat, three = make_pack(documents, flat_positions=True), make_pack(documents)
    with torch.no_grad():
        torch.testing.assert_close(model(flat).hidden, model(three).hidden)
        torch.testing.assert_close(model(flat).mtp_hidden[1], model(three).mtp_hidden[1])


def test_images_of_a_pack_do_not_see_each_other():
    model = build()
    first, second = make_document([2, (1, 4, 4), 3], 1), make_document([2, (1, 4, 4), 3], 2)
    with torch.no_grad():
        before = model(make_pack([first, second])).hidden[: len(first["ids"])]
        second["patches"] = [p * 50 for p in second["patches"]]
        after = model(make_pack([first, second])).hidden[: len(first["ids"])]
    assert torch.equal(before, after)


def test_under_bf16_autocast_packing_stays_within_rounding():
    model = build()
    documents = [make_document(parts, seed) for seed, parts in enumerate(DOCUMENTS)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = total(model, make_pack(documents))
        separate = torch.stack([total(model, make_pack([d])) for d in documents]).sum()
    torch.testing.assert_close(packed, separate, rtol=1e-3, atol=0)  # each product rounds at 2**-8; sums average it
