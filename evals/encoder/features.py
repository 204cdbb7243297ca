"""Frozen features of images, and images with the answers that probes ask for."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmagent.geometry import GeometryConfig, patchify
from mmagent.models.layers import evaluating
from mmagent.protocols import VisionEncoder
from mmagent.types import PackedVision, PatchedImage

Whole = Literal["pooled", "mean", "both"]
"""What stands for a whole image: its summary, the mean of its patches, or the two side by side."""
_QUIET = 2.0  # seconds without a word before progress is shown
Item, Made = TypeVar("Item"), TypeVar("Made")


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
    """``pooled (I, S)``, ``means (I, W)`` of patches, ``tokens (P, W)`` of all images, their ``grids (I, 3)``; fp32."""

    pooled: Tensor
    means: Tensor
    tokens: Tensor
    grids: Tensor

    def whole(self, kind: Whole) -> Tensor:
        """``(I, S)``, ``(I, W)`` or ``(I, S + W)``: what a classifier of whole images reads."""
        return {"pooled": lambda: self.pooled, "mean": lambda: self.means, "both": self._both}[kind]()

    def _both(self) -> Tensor:
        return torch.cat([self.pooled, self.means], dim=1)


@dataclass(frozen=True)
class ImageFeatures:
    """Of one image, on the host, fp32: ``pooled (S,)``, ``mean (W,)`` of its patches, ``tokens (p, W)`` in the order of
    the stream (none, where they were not asked for), its ``grid (frames, rows, cols)``."""

    name: str
    pooled: Tensor
    mean: Tensor
    tokens: Tensor
    grid: tuple[int, int, int]


def extract(
    encoder: nn.Module,
    images: Iterable[np.ndarray],
    geometry: GeometryConfig,
    patches_per_pack: int = 4096,
    *,
    names: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    tokens: bool = True,
    progress: str = "",
) -> Features:
    """Frozen features of images, on the host: :func:`stream_features` put together.

    ``tokens`` false keeps only what stands for whole images, for sets whose patches would not fit into memory.
    ``names`` are what errors call the images, "image 0" and so on without. Raises ``ValueError`` where there is no
    image.
    """
    named = ((names[n] if names else f"image {n}", image) for n, image in enumerate(images))
    total = len(images) if isinstance(images, Sequence) else None
    rows = list(
        stream_features(
            encoder, named, geometry, patches_per_pack, dtype=dtype, tokens=tokens, progress=progress, total=total
        )
    )
    if not rows:
        raise ValueError("features: there is no image to look at")
    return Features(
        torch.stack([row.pooled for row in rows]),
        torch.stack([row.mean for row in rows]),
        torch.cat([row.tokens for row in rows]),
        torch.tensor([row.grid for row in rows]),
    )


def stream_features(
    encoder: nn.Module,
    images: Iterable[tuple[str, np.ndarray]],
    geometry: GeometryConfig,
    patches_per_pack: int = 4096,
    *,
    dtype: torch.dtype = torch.float32,
    tokens: bool = True,
    progress: str = "",
    total: int | None = None,
) -> Iterator[ImageFeatures]:
    """Features of ``(name, image)`` pairs, image by image, in their order, never more in memory than one pack.

    The encoder runs where its parameters are, in evaluation mode and without gradients; ``dtype`` bfloat16 runs its
    matrix products in that precision. A pack holds at most ``patches_per_pack`` patches, or one larger image.
    ``progress`` names a bar with the time left on stderr, which appears after two seconds; ``total`` is how many
    images there will be, where that is known. Raises ``ValueError`` naming an image that cannot be cut into patches
    or whose features are not finite.
    """
    assert isinstance(encoder, VisionEncoder)
    if patches_per_pack < 1:
        raise ValueError(f"patches_per_pack {patches_per_pack} must be positive")
    with evaluating(encoder), bar(progress, total) as shown:
        for names, pack in _packs(images, geometry, patches_per_pack):
            for row in _look(encoder, names, pack, dtype, tokens):
                yield row
                shown.update()


@torch.no_grad()
def _look(
    encoder: nn.Module, names: Sequence[str], pack: PackedVision, dtype: torch.dtype, tokens: bool
) -> list[ImageFeatures]:
    parameter = next(encoder.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        features = encoder(pack.to(device))
    parts = features.tokens.float().split(pack.grids.prod(dim=1).tolist())
    pooled = features.pooled.float().cpu()
    means = torch.stack([part.mean(dim=0) for part in parts]).cpu()
    finite = pooled.isfinite().all(dim=1) & means.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(f"{names[int(finite.int().argmin())]}: the encoder's features are not finite")
    kept = [part.cpu() if tokens else part[:0].cpu() for part in parts]
    return [
        ImageFeatures(name, pooled[n], means[n], kept[n], tuple(pack.grids[n].tolist())) for n, name in enumerate(names)
    ]


def _packs(
    images: Iterable[tuple[str, np.ndarray]], geometry: GeometryConfig, budget: int
) -> Iterator[tuple[list[str], PackedVision]]:
    names: list[str] = []
    waiting: list[PatchedImage] = []
    size = 0
    for name, image in images:
        try:
            patched = patchify(image, geometry)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if waiting and size + patched.patches.shape[0] > budget:
            yield names, PackedVision.pack(waiting)
            names, waiting, size = [], [], 0
        names.append(name)
        waiting.append(patched)
        size += patched.patches.shape[0]
    if waiting:
        yield names, PackedVision.pack(waiting)


def bar(name: str, total: int | None, unit: str = "image", items: Iterable[Item] | None = None) -> tqdm:
    """A bar with the time left on stderr, around ``items`` if given; after two seconds, and none without a name."""
    return tqdm(
        items, total=total, desc=name, unit=unit, file=sys.stderr, disable=not name, delay=_QUIET, dynamic_ncols=True,
        leave=False,
    )  # fmt: skip


def ahead(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """``map(make, items)`` in order, by ``workers`` threads that are at most two items each ahead of the reader: images
    are decoded while the encoder is at work. An error of ``make`` is raised where its item would have come."""
    with ThreadPoolExecutor(workers, "mmagent-images") as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
