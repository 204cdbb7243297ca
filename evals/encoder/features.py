"""Frozen features of images, and images with the answers that probes ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmagent.geometry import GeometryConfig, patchify
from mmagent.protocols import VisionEncoder
from mmagent.types import PackedVision


@dataclass(frozen=True)
class LabelledImages:
    """``images`` of ``(height, width, 3)`` uint8; ``labels {question: (I,)}`` int64, an answer an image; ``maps
    {question: I of (height, width)}`` int64, an answer a pixel."""

    images: tuple[np.ndarray, ...]
    labels: Mapping[str, Tensor]
    maps: Mapping[str, tuple[np.ndarray, ...]]

    def __post_init__(self) -> None:
        for question, answers in {**self.labels, **self.maps}.items():
            if len(answers) != len(self.images):
                raise ValueError(f"{question}: {len(answers)} answers for {len(self.images)} images")


@dataclass(frozen=True)
class Features:
    """``pooled (I, W)``, ``means (I, W)`` of patches, ``tokens (P, W)`` of all images, their ``grids (I, 3)``; fp32."""

    pooled: Tensor
    means: Tensor
    tokens: Tensor
    grids: Tensor


@torch.no_grad()
def extract(
    encoder: nn.Module, images: Sequence[np.ndarray], geometry: GeometryConfig, patches_per_pack: int = 4096
) -> Features:
    """Frozen features of images, on the host, packed under a patch budget."""
    assert isinstance(encoder, VisionEncoder)
    device = next(encoder.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    with _evaluating(encoder):
        for pack in _packs(images, geometry, patches_per_pack):
            features = encoder(pack.to(device))
            tokens, pooled = features.tokens.float().cpu(), features.pooled.float().cpu()
            means = torch.stack([t.mean(dim=0) for t in tokens.split(pack.grids.prod(dim=1).tolist())])
            parts.append((pooled, means, tokens, pack.grids))
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _packs(images: Sequence[np.ndarray], geometry: GeometryConfig, budget: int) -> Iterator[PackedVision]:
    waiting = []
    for image in images:
        patched = patchify(image, geometry)
        if waiting and sum(w.patches.shape[0] for w in waiting) + patched.patches.shape[0] > budget:
            yield PackedVision.pack(waiting)
            waiting = []
        waiting.append(patched)
    if waiting:
        yield PackedVision.pack(waiting)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
