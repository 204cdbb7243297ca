"""Self-supervision for small dense teachers: describe the hidden part of an image from the part that is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.geometry import CLIP_MEAN, CLIP_STD, GeometryConfig, from_patches, patch_coordinates
from mmagent.models.backbone import equal_grids
from mmagent.models.flops import EncoderCost, head_flops
from mmagent.models.layers import Linear, collect_roles, encoder_roles, trainable_blocks
from mmagent.protocols import VisionEncoder
from mmagent.types import MaskedVision, PackedVision, ParamRole, Ratio, StepOutput

ORIENTATIONS = 9
RINGS = (1.0, 1.6, 2.4, 3.4, 4.6, 6.0, 8.0, 11.0)
"""Borders, in cycles per window, of the rings over which spatial frequencies are counted together."""
_WINDOW = 16  # pixels of a patch at which its frequencies are measured; a window spans twice that


@dataclass
class ReconstructionConfig:
    """``cells``: a patch is described in ``cells x cells`` parts. ``visible_weight``: the same loss on seen patches,
    where it asks for a description and not for a guess. ``classes`` adds a classifier of that many classes over seen
    patches, where the batch says what they are; ``classes_weight`` weighs it."""

    cells: int = 2
    visible_weight: float = 0.5
    classes: int = 0
    classes_weight: float = 1.0


class MaskedReconstruction(nn.Module):
    """Predicts texture descriptors of patches. Implements :class:`mmagent.protocols.Objective` over
    :class:`~mmagent.types.MaskedVision`.

    The targets are those of MaskFeat (arXiv 2112.09133), histograms of oriented gradients, and beside them mean colours
    and how much each band of spatial frequencies holds, whichever way it is turned: what tells materials apart. The
    loss is the mean squared error over a patch's values. The encoder must accept ``masked=``. Beside them it may learn
    what patches are, from maps (``config.classes``): supervision, where a world knows the truth.
    """

    def __init__(self, encoder: nn.Module, config: ReconstructionConfig):
        super().__init__()
        assert isinstance(encoder, VisionEncoder)
        self.encoder, self.config = encoder, config
        self.head = Linear(encoder.width, descriptor_values(config.cells), bias=True)
        self.class_head = Linear(encoder.width, config.classes, bias=True) if config.classes else None

    @property
    def weights(self) -> Mapping[str, float]:
        classes = {"classes": self.config.classes_weight} if self.class_head is not None else {}
        return {"hidden": 1.0, "visible": self.config.visible_weight, **classes}

    def counts(self, batch: MaskedVision) -> dict[str, Tensor]:
        hidden = batch.masked.sum()
        counts = {"hidden": hidden, "visible": batch.masked.shape[0] - hidden}
        if self.class_head is not None:
            counts["classes"] = (self._classes(batch) >= 0).sum()
        return counts

    def _classes(self, batch: MaskedVision) -> Tensor:
        """``(P,)``: -1 where a patch is hidden or nothing is known of it."""
        known = torch.full_like(batch.masked, -1, dtype=torch.int64) if batch.classes is None else batch.classes
        return torch.where(batch.masked, -1, known)

    def flops(self, batch: MaskedVision) -> float:
        """Useful operations of a step over ``batch``; see :mod:`mmagent.models.flops`."""
        heads = head_flops(self.head, batch.num_patches)
        heads += head_flops(self.class_head, batch.num_patches) if self.class_head is not None else 0.0
        return EncoderCost.of(self.encoder).training(batch.vision.segments.lengths) + heads

    def forward(self, batch: MaskedVision) -> StepOutput:
        tokens = self.encoder(batch.vision, masked=batch.masked).tokens
        answers = self.head(tokens).float()
        targets = self.targets(batch)
        errors = (answers - targets).square().mean(dim=1)
        sums = {"hidden": errors[batch.masked].sum(), "visible": errors[~batch.masked].sum()}
        spread = targets.square().mean(dim=1)[batch.masked].sum()
        metrics = {"unexplained": Ratio(sums["hidden"].detach(), spread)}
        if self.class_head is not None:
            logits, classes = self.class_head(tokens).float(), self._classes(batch)
            sums["classes"] = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum")
            right = (logits.argmax(dim=1) == classes).sum()
            metrics["classes"] = Ratio(right, (classes >= 0).sum())
        return StepOutput(sums, metrics)

    def targets(self, batch: MaskedVision) -> Tensor:
        """``(P, values)`` descriptors in the stream's order, from the patches before any is hidden."""
        return describe_patches(batch.vision, self.encoder.patch_size, self.encoder.merge_size, self.config.cells)

    def after_step(self) -> None:
        """Nothing moves outside the gradient."""

    def roles(self) -> Mapping[str, ParamRole]:
        roles = {**encoder_roles(self.encoder, "encoder."), **collect_roles(self.head, "head", "head.")}
        return roles if self.class_head is None else roles | collect_roles(self.class_head, "head", "class_head.")

    def blocks(self) -> Iterable[nn.Module]:
        return trainable_blocks(self.encoder)

    def leaves(self) -> Iterable[nn.Module]:
        return ()


def descriptor_values(cells: int) -> int:
    """How many numbers describe one patch."""
    return cells**2 * (ORIENTATIONS + 3) + len(RINGS) - 1


@torch.no_grad()
def describe_patches(vision: PackedVision, patch_size: int, merge_size: int, cells: int) -> Tensor:
    """``(P, values)`` float32 descriptors of still images in the stream's order; images of equal grids as one batch."""
    geometry = GeometryConfig(patch_size=patch_size, merge_size=merge_size)
    std, mean = (torch.tensor(v, device=vision.patches.device).view(3, 1, 1) for v in (CLIP_STD, CLIP_MEAN))
    images = vision.patches.float().split(vision.grids.prod(dim=1).tolist())
    out: list[Tensor] = [torch.empty(0)] * len(images)
    for grid, members in equal_grids(vision.grids).items():
        rows, cols = grid[1:]
        pixels = torch.stack([from_patches(images[i], grid, geometry)[0] for i in members]) * std + mean
        if patch_size != _WINDOW:
            size = (rows * _WINDOW, cols * _WINDOW)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        planes = torch.cat([describe_cells(pixels, rows, cols, cells), describe_frequencies(pixels)], dim=-1)
        at = patch_coordinates(grid, merge_size).to(planes.device)
        for i, plane in zip(members, planes, strict=True):
            out[i] = plane[at[:, 0], at[:, 1]]
    return torch.cat(out)


def describe_cells(pixels: Tensor, rows: int, cols: int, cells: int) -> Tensor:
    """``(B, 3, height, width)`` in [0, 1] to ``(B, rows, cols, cells**2 * (ORIENTATIONS + 3))``: of every cell the
    histogram of gradient orientations, weighted by strength and of unit length within its patch, and the mean colour,
    centred."""
    padded = F.pad(pixels.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dy, dx = padded[:, 0, 2:, 1:-1] - padded[:, 0, :-2, 1:-1], padded[:, 0, 1:-1, 2:] - padded[:, 0, 1:-1, :-2]
    strength = torch.hypot(dy, dx)
    turn = torch.remainder(torch.atan2(dy, dx), torch.pi) / torch.pi * ORIENTATIONS
    low = turn.floor().long() % ORIENTATIONS
    share = turn - turn.floor()
    height, width = pixels.shape[2:]
    row = torch.arange(height, device=pixels.device) * (rows * cells) // height
    col = torch.arange(width, device=pixels.device) * (cols * cells) // width
    first = ((row[:, None] * (cols * cells) + col) * ORIENTATIONS).flatten()  # where the histogram of a pixel begins
    histograms = strength.new_zeros(len(pixels), rows * cols * cells**2 * ORIENTATIONS)
    for turned, part in ((low, 1 - share), ((low + 1) % ORIENTATIONS, share)):
        histograms.scatter_add_(1, first + turned.flatten(1), (strength * part).flatten(1))
    histograms *= rows * cols * cells**2 / (height * width)
    gradients = histograms.unflatten(1, (rows, cells, cols, cells, ORIENTATIONS)).transpose(2, 3)
    colours = F.adaptive_avg_pool2d(pixels, (rows * cells, cols * cells)) * 4 - 2
    colours = colours.unflatten(3, (cols, cells)).unflatten(2, (rows, cells)).permute(0, 2, 4, 3, 5, 1)
    norm = gradients.flatten(3).norm(dim=3)[:, :, :, None, None, None]
    gradients = gradients / (norm + 0.02) * (ORIENTATIONS * cells**2) ** 0.5
    return torch.cat([gradients, colours], dim=-1).flatten(3)


def describe_frequencies(pixels: Tensor) -> Tensor:
    """``(B, 3, 16 rows, 16 cols)`` in [0, 1] to ``(B, rows, cols, len(RINGS) - 1)``: logarithms of the power of every
    ring of frequencies in a Hann window round each patch, twice its size; near zero mean and unit variance on
    photographs."""
    grey = pixels.mean(dim=1, keepdim=True)
    margin = _WINDOW // 2
    windows = F.unfold(F.pad(grey, (margin,) * 4, mode="replicate"), 2 * _WINDOW, stride=_WINDOW).transpose(1, 2)
    windows = windows.unflatten(2, (2 * _WINDOW, 2 * _WINDOW))
    hann = torch.hann_window(2 * _WINDOW, device=pixels.device)
    windows = (windows - windows.mean(dim=(2, 3), keepdim=True)) * hann[:, None] * hann
    waves = torch.view_as_real(torch.fft.rfft2(windows, norm="ortho")).flatten(2)
    total = waves.square_() @ _rings(pixels.device).repeat_interleave(2, dim=0)
    return ((total + 1e-4).log() * 0.5 + 2.5).unflatten(1, (pixels.shape[2] // _WINDOW, -1))


def _rings(device: torch.device) -> Tensor:
    """``(frequencies, rings)``: which ring every frequency of a window's spectrum lies in, averaging over it."""
    size = 2 * _WINDOW
    y, x = torch.fft.fftfreq(size, 1 / size, device=device), torch.fft.rfftfreq(size, 1 / size, device=device)
    radius = torch.hypot(y[:, None], x[None, :]).flatten()
    borders = torch.tensor(RINGS, device=device)
    inside = (radius[:, None] >= borders[:-1]) & (radius[:, None] < borders[1:])
    return inside.float() / inside.sum(dim=0)
