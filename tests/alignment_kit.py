"""Pairs, a small alignment over them, and its loss as the paper writes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.geometry import GeometryConfig, patchify
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.layers import initialise
from mmagent.models.text_tower import TextTower, text_debug
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.types import PackedVision, PairedBatch, Segments

WORDS = 50
CLASSES, PLACES = 3, 4


def plain_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """The formula of arXiv 2303.15343 over the whole matrix."""
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -F.logsigmoid(signs * (images @ texts.T * log_scale.exp() + bias)).sum()


def pairs(numbers: Sequence[int]) -> PairedBatch:
    """Image and caption of every number, a function of it; some have classes and places, some captions are empty."""
    images, texts, classes, places = [], [], [], []
    for number in numbers:
        random = np.random.default_rng([3, number])
        height, width = (28 * int(n) for n in random.integers(1, 4, 2))
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append(patchify(pixels, GeometryConfig(min_tokens=1)))
        texts.append(torch.from_numpy(random.integers(1, WORDS, int(random.integers(0, 7)))))
        texts[-1] = torch.cat([texts[-1], torch.zeros(1, dtype=torch.int64)])
        patches = len(images[-1].patches)
        classes.append(torch.from_numpy(random.integers(-1, CLASSES, patches)))
        where = torch.from_numpy(random.random((patches, 2), dtype=np.float32))
        places.append(where.masked_fill(classes[-1][:, None] < 0, float("nan")))
    if not images:
        vision = PackedVision(torch.zeros(0, GeometryConfig().patch_values), torch.zeros(0, 3, dtype=torch.int64))
        return PairedBatch(vision, torch.zeros(0, dtype=torch.int64), Segments([]), ())
    return PairedBatch(
        PackedVision.pack(images),
        torch.cat(texts),
        Segments([len(text) for text in texts]),
        tuple(f"pair {number}" for number in numbers),
        torch.cat(classes),
        torch.cat(places),
    )


def small_alignment(config: AlignmentConfig | None = None) -> Alignment:
    torch.manual_seed(0)
    built = Alignment(
        CogViT(CogViTConfig(width=32, depth=2, heads=2, ffn=64, pooling="attention")),
        TextTower(text_debug(WORDS)),
        config or AlignmentConfig(width=16),
    )
    initialise(built.encoder)
    if built.config.contrastive_weight:
        initialise(built.text_tower)
    return built
