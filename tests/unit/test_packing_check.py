"""The check of packing finds what leaks between documents, and passes our own model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mmagent.chat import Image, assistant, render, user
from mmagent.geometry import GeometryConfig, patchify, visual_tokens
from mmagent.models.agent_model import AgentModel
from mmagent.models.presets import debug
from mmagent.packing_check import check_packing
from mmagent.types import Document, ModelOutput, PackedBatch, Segments
from mmagent.vocab import Vocab

VOCAB = Vocab.train(["click where"], 300)


def documents(config) -> list[Document]:
    geometry = GeometryConfig(patch_size=config.vision.patch_size, min_tokens=1, max_tokens=24)
    found = []
    for n, (height, width) in enumerate([(30, 40), (60, 28), (0, 0), (28, 28)]):
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), dtype=np.uint8)
        images = (patchify(pixels, geometry),) if height else ()
        counts = [visual_tokens(image.grid, 2) for image in images]
        parts = (Image(), "where?") if images else ("where?",)
        rendered = render([user(*parts), assistant(f"click {n}")], VOCAB, counts)
        found.append(Document(torch.tensor(rendered.ids), torch.tensor(rendered.trainable), images, f"doc-{n}", "s"))
    return found


@pytest.fixture(scope="module")
def model() -> AgentModel:
    torch.manual_seed(0)
    return AgentModel(debug(VOCAB.size, VOCAB.image_id)).eval()


def check(model, **options):
    return check_packing(model, documents(debug()), image_id=VOCAB.image_id, merge_size=2, **options)


def test_our_model_passes(model):
    report = check(model)
    assert report.ok, str(report)
    names = [d.output for d in report.differences]
    assert names == ["hidden", "mtp_hidden[0]", "mtp_hidden[1]", "router_load", "gradients"]
    assert str(report).count("ok  ") == 5


class Leaky(nn.Module):
    """Our model with one fact about the pack spoiled."""

    def __init__(self, model: AgentModel, what: str):
        super().__init__()
        self.model, self.what = model, what

    def forward(self, batch: PackedBatch) -> ModelOutput:
        match self.what:
            case "attention":
                batch = replace(batch, segments=Segments([batch.segments.total]))
            case "positions" if len(batch.keys) > 1:  # the common mistake: one-dimensional as soon as packed
                batch = replace(batch, positions=torch.arange(batch.segments.total).repeat(3, 1))
            case "images" if batch.vision is not None:
                batch = replace(batch, visual_index=torch.arange(batch.visual_slots.numel()).flip(0))
        return self.model(batch)


@pytest.mark.parametrize("what", ["attention", "positions", "images"])
def test_a_leak_is_found_and_named(model, what):
    report = check(Leaky(model, what))
    assert not report.ok
    worst = max(report.differences[:2], key=lambda d: d.relative)
    assert worst.relative > 1e-3
    assert worst.key.startswith("doc-")
    assert "DIFF" in str(report)


def test_any_callable_can_be_checked_without_gradients(model):
    report = check(lambda batch: model(batch))
    assert "gradients" not in [d.output for d in report.differences]
    with pytest.raises(ValueError, match="at least 2 documents"):
        check_packing(model, documents(debug())[:1], image_id=VOCAB.image_id, merge_size=2)
