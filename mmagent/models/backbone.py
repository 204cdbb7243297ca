"""What every foreign vision model becomes: a :class:`Backbone`, from pixels to a grid of features and a summary.

The adapters (:mod:`mmagent.models.transformers_backbones`, :mod:`mmagent.models.timm_backbones`) build one from a model
by running it once on a tiny image (:func:`probe`): a model is asked what it returns instead of known by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.geometry import patch_coordinates

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUMMARIES = ("own", "mean")
PICTURES = 2  # shown at once to a model that is measured: some take one image, or join several into one row


class GridFeatures(NamedTuple):
    """``tokens (B, rows * cols, W)`` in reading order and ``summary (B, S)`` of B images of one size; ``layers`` holds
    the outputs of the blocks that were asked for, shaped like ``tokens``."""

    tokens: Tensor
    summary: Tensor
    layers: Mapping[int, Tensor] = MappingProxyType({})


class Call(Protocol):
    """Runs a module on normalised ``pixels (B, 3, height, width)``; ``masked (B, rows * cols)`` hides patches.

    ``layers`` are indices from 0, given only where the backbone's ``depth`` says that there are such.
    """

    def __call__(
        self, module: Any, pixels: Tensor, masked: Tensor | None, layers: Sequence[int] = ()
    ) -> GridFeatures: ...


@dataclass(frozen=True)
class Backbone:
    """One vision module and how to use it.

    ``patch_size``: pixels on a side of one cell of its grid, of a hierarchical model the total reduction. ``mean`` and
    ``std`` of its pixels; ``fixed (rows, cols)`` where it accepts one grid only; ``depth``: how many inner layers of
    the same grid it can return. ``pool``: its summary is its ``own``, or the ``mean`` of its tokens.
    ``maskable``: it has a mask token for patches that are hidden.
    """

    module: nn.Module
    call: Call
    patch_size: int
    width: int
    summary_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed: tuple[int, int] | None = None
    depth: int = 0
    pool: str = "own"
    maskable: bool = False

    def __call__(self, pixels: Tensor, masked: Tensor | None = None, layers: Sequence[int] = ()) -> GridFeatures:
        """``pixels (B, 3, rows * patch_size, cols * patch_size)`` in [0, 1]; ``layers`` from 0 to ``depth - 1``,
        negative from the end.

        Raises ``ValueError`` for sides that are no multiples of ``patch_size``, a layer or a mask it does not have, or
        a module that returns another number of tokens than there are patches.
        """
        kind = type(self.module).__name__
        rows, cols = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        if (rows * self.patch_size, cols * self.patch_size) != tuple(pixels.shape[-2:]):
            raise ValueError(f"{kind}: {tuple(pixels.shape[-2:])} pixels are no multiples of {self.patch_size}")
        if masked is not None and not self.maskable:
            raise ValueError(f"{kind} has no mask token")
        wanted = self._layers(layers)
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        seen = ((pixels - mean) / std).to(next(self.module.parameters()).dtype)
        inner = tuple(sorted(set(wanted.values())))
        features = self.call(self.module, seen, masked, inner) if inner else self.call(self.module, seen, masked)
        if features.tokens.shape[1] != rows * cols:
            raise ValueError(f"{kind} returned {features.tokens.shape[1]} tokens for {rows * cols} patches")
        summary = features.tokens.mean(dim=1) if self.pool == "mean" else features.summary
        return GridFeatures(features.tokens, summary, {i: features.layers[at] for i, at in wanted.items()})

    def _layers(self, layers: Sequence[int]) -> dict[int, int]:
        """Index as asked to index from 0."""
        if layers and not self.depth:
            raise ValueError(f"{type(self.module).__name__} returns its last features only, no inner layers")
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise ValueError(f"layer {layer} of {type(self.module).__name__}, which has {self.depth}")
        return {layer: layer % self.depth for layer in layers}


class Seen(NamedTuple):
    """What a module made of a picture: ``features`` as it returned them, of ``rows * cols`` cells; ``fixed`` where it
    takes this grid only."""

    output: Any
    rows: int
    cols: int
    fixed: tuple[int, int] | None


def probe(
    module: nn.Module, look: Callable[[Tensor], Any], patch: int, native: tuple[int, int] | None, any_size: bool = True
) -> Seen:
    """Run ``look`` on pictures of 2 x 3 patches, and where the module refuses that, or may not see ``any_size``, on its
    ``native (height, width)``.

    Nothing is learnt, drawn at random or kept. Raises ``ValueError`` with the module's own words if it takes neither.
    """
    reasons = []
    small = (2 * patch, 3 * patch) if any_size else None
    for size in (small, native):
        if size is None:
            continue
        if size[0] % patch or size[1] % patch:
            reasons.append(f"{size[0]}x{size[1]} pixels are no multiple of {patch}")
            continue
        grid = (size[0] // patch, size[1] // patch)
        before = _settings(module)
        try:
            output = quietly(module, look, size)
            if size is small and _settings(module) != before:
                raise ValueError("it behaves otherwise from then on")
        except Exception as error:  # whatever a foreign model raises is why it cannot be used so
            said = str(error).splitlines() or [""]
            reasons.append(f"{size[0]}x{size[1]} pixels: {type(error).__name__}: {said[0]}")
            for part, values in zip(module.modules(), before, strict=True):
                vars(part).update(values)
            continue
        return Seen(output, *grid, None if size is small else grid)
    raise ValueError(f"{type(module).__name__} cannot be a backbone: {'; '.join(reasons) or 'it says no size'}")


def _settings(module: nn.Module) -> list[dict[str, Any]]:
    """Public numbers that every part of ``module`` holds beside its tensors: some models write there how large an image
    they have just seen, and treat the next one so."""
    return [
        {k: v for k, v in vars(part).items() if not k.startswith("_") and isinstance(v, int | float | tuple)}
        for part in module.modules()
    ]


def quietly(module: nn.Module, look: Callable[[Tensor], Any], size: tuple[int, int]) -> Any:
    """``look`` at grey pictures of ``size`` in evaluation mode, without a trace on module or generators."""
    parameter = next(module.parameters())
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            return look(torch.zeros(PICTURES, 3, *size, dtype=parameter.dtype, device=parameter.device))
    finally:
        for part in training:
            part.training = True


def native_size(value: Any) -> tuple[int, int] | None:
    """``(height, width)`` of one number or of two; None of anything else."""
    if isinstance(value, int) and value > 0:
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value):
        return value[0], value[1]
    return None


def square_patch(value: Any, kind: str) -> int:
    """The side of a patch, from one number or two equal ones. Raises ``ValueError`` for others."""
    size = native_size(value)
    if size is None or size[0] != size[1]:
        raise ValueError(f"{kind} cannot be a backbone: its patches {value!r} are not square")
    return size[0]


def as_tokens(features: Tensor, rows: int, cols: int, layout: str, prefix: int, kind: str) -> tuple[Tensor, Tensor]:
    """``(B, n, W)`` with ``prefix`` tokens in front, or a map in ``NCHW`` or ``NHWC``, to those in front and
    ``(B, rows * cols, W)`` in reading order. Raises ``ValueError`` naming both counts if it does not fit."""
    if layout == "NLC":
        if features.shape[1] != prefix + rows * cols:
            raise ValueError(
                f"{kind} returned {features.shape[1]} tokens, expected {prefix} class and register tokens + {rows} x "
                f"{cols} patches = {prefix + rows * cols}"
            )
        return features[:, :prefix], features[:, prefix:]
    found = tuple(features.shape[2:] if layout == "NCHW" else features.shape[1:3])
    if found != (rows, cols):
        raise ValueError(f"{kind} returned a map of {found} cells, expected {(rows, cols)}")
    tokens = features.flatten(2).transpose(1, 2) if layout == "NCHW" else features.flatten(1, 2)
    return tokens[:, :0], tokens


def layout_of(features: Any, rows: int, cols: int, declared: str | None, kind: str) -> str:
    """``NLC``, ``NCHW`` or ``NHWC``: as ``declared`` by the model, else by what fits the grid. Raises ``ValueError``
    for anything else, and where both fit."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4) or features.shape[0] != PICTURES:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{kind} cannot be a backbone: {PICTURES} images give {shape}, no grid of features each")
    if features.ndim == 3:
        return "NLC"
    if declared in ("NCHW", "NHWC"):
        return declared
    fits = [
        layout
        for layout, found in (("NCHW", features.shape[2:]), ("NHWC", features.shape[1:3]))
        if tuple(found) == (rows, cols)
    ]
    if len(fits) != 1:
        raise ValueError(
            f"{kind} cannot be a backbone: which of {tuple(features.shape)} are the {rows} x {cols} cells is unclear"
        )
    return fits[0]


def has_parameter(module: nn.Module, name: str) -> bool:
    """Whether a parameter of that name stands anywhere in ``module``."""
    return any(path.rpartition(".")[2] == name for path, _ in module.named_parameters())


# ---------------------------------------------------------------------------------------------- grids and planes


def resize_pixels(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased resize of one ``(3, h, w)`` image in [0, 1]."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    resized = F.interpolate(pixels.unsqueeze(0), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0.0, 1.0)


def resample(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, rows, cols, W)`` features to another grid: bilinear, antialiased where it gets coarser."""
    if tuple(plane.shape[1:3]) == tuple(size):
        return plane
    channels = plane.permute(0, 3, 1, 2)
    out = F.interpolate(channels, size, mode="bilinear", antialias=True, align_corners=False)
    return out.permute(0, 2, 3, 1)


def equal_grids(grids: Tensor) -> dict[tuple[int, int, int], list[int]]:
    """Which of ``grids (I, 3)`` are alike, so that they can run as one batch. Raises ``ValueError`` for clips."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, grid in enumerate(grids.tolist()):
        if grid[0] != 1:
            raise ValueError(f"image {i} is a clip of {grid[0]} frame groups, where still images are expected")
        groups.setdefault(tuple(grid), []).append(i)
    return groups


def equal_planes(grids: Tensor) -> dict[tuple[int, int], list[int]]:
    """Which images or clips of ``grids (I, 3)`` have frames of equal ``(rows, cols)``."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (_, rows, cols) in enumerate(grids.tolist()):
        groups.setdefault((rows, cols), []).append(i)
    return groups


def stream_order(rows: int, cols: int, merge_size: int, device: torch.device) -> Tensor:
    """``(rows * cols,)``: index in reading order of every patch of one frame of the merge-block-major stream."""
    coordinates = patch_coordinates((1, rows, cols), merge_size)
    return (coordinates[:, 0] * cols + coordinates[:, 1]).to(device)
