"""Self-supervision for small dense teachers: describe the hidden part of an image from the part that is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.geometry import patch_coordinates
from mmagent.models.layers import Linear, collect_roles, encoder_roles, trainable_blocks
from mmagent.protocols import VisionEncoder
from mmagent.types import MaskedVision, ParamRole, Ratio, StepOutput

ORIENTATIONS = 9
RINGS = (1.0, 1.6, 2.4, 3.4, 4.6, 6.0, 8.0, 11.0)
"""Borders, in cycles per window, of the rings over which spatial frequencies are counted together."""
_WINDOW = 16  # pixels of a patch at which its frequencies are measured; a window spans twice that


@dataclass
class ReconstructionConfig:
    """``cells``: a patch is described in ``cells x cells`` parts. ``visible_weight``: the same loss on seen patches,
    where it asks for a description and not for a guess."""

    cells: int = 2
    visible_weight: float = 0.5


class MaskedReconstruction(nn.Module):
    """Predicts texture descriptors of patches. Implements :class:`mmagent.protocols.Objective` over
    :class:`~mmagent.types.MaskedVision`.

    The targets are those of MaskFeat (arXiv 2112.09133), histograms of oriented gradients, and beside them mean colours
    and how much each band of spatial frequencies holds, whichever way it is turned: what tells materials apart. The
    loss is the mean squared error over a patch's values. The encoder must accept ``masked=``.
    """

    def __init__(self, encoder: nn.Module, config: ReconstructionConfig):
        super().__init__()
        assert isinstance(encoder, VisionEncoder)
        self.encoder, self.config = encoder, config
        self.head = Linear(encoder.width, config.cells**2 * (ORIENTATIONS + 3) + len(RINGS) - 1, bias=True)

    @property
    def weights(self) -> Mapping[str, float]:
        return {"hidden": 1.0, "visible": self.config.visible_weight}

    def counts(self, batch: MaskedVision) -> dict[str, Tensor]:
        hidden = batch.masked.sum()
        return {"hidden": hidden, "visible": batch.masked.shape[0] - hidden}

    def forward(self, batch: MaskedVision) -> StepOutput:
        answers = self.head(self.encoder(batch.vision, masked=batch.masked).tokens).float()
        with torch.no_grad():
            targets = self.targets(batch)
        errors = (answers - targets).square().mean(dim=1)
        sums = {"hidden": errors[batch.masked].sum(), "visible": errors[~batch.masked].sum()}
        spread = (targets - targets.mean(dim=0)).square().mean(dim=1)[batch.masked].sum()
        return StepOutput(sums, {"unexplained": Ratio(sums["hidden"].detach(), spread)})

    def targets(self, batch: MaskedVision) -> Tensor:
        """``(P, values)`` descriptors in the stream's order, from the untouched pixels."""
        out = []
        for pixels, grid in zip(batch.pixels, batch.vision.grids.tolist(), strict=True):
            cells = describe_cells(pixels, grid[1], grid[2], self.config.cells)
            plane = torch.cat([cells, describe_frequencies(pixels, grid[1], grid[2])], dim=-1)
            at = patch_coordinates(grid, self.encoder.merge_size).to(plane.device)
            out.append(plane[at[:, 0], at[:, 1]])
        return torch.cat(out)

    def after_step(self) -> None:
        """Nothing moves outside the gradient."""

    def roles(self) -> Mapping[str, ParamRole]:
        return {**encoder_roles(self.encoder, "encoder."), **collect_roles(self.head, "head", "head.")}

    def blocks(self) -> Iterable[nn.Module]:
        return trainable_blocks(self.encoder)

    def leaves(self) -> Iterable[nn.Module]:
        return ()


def describe_cells(pixels: Tensor, rows: int, cols: int, cells: int) -> Tensor:
    """``(3, height, width)`` in [0, 1] to ``(rows, cols, cells**2 * (ORIENTATIONS + 3))``: of every cell the histogram
    of gradient orientations, weighted by strength and of unit length within its patch, and the mean colour, centred."""
    grey = pixels.mean(dim=0, keepdim=True)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    dy, dx = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1])[0], (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2])[0]
    strength = torch.hypot(dy, dx)
    turn = torch.remainder(torch.atan2(dy, dx), torch.pi) / torch.pi * ORIENTATIONS
    low = turn.floor().long() % ORIENTATIONS
    share = turn - turn.floor()
    planes = strength.new_zeros(ORIENTATIONS, *strength.shape)
    planes.scatter_add_(0, low[None], (strength * (1 - share))[None])
    planes.scatter_add_(0, (low[None] + 1) % ORIENTATIONS, (strength * share)[None])
    maps = F.adaptive_avg_pool2d(torch.cat([planes, pixels * 4 - 2]), (rows * cells, cols * cells))
    maps = maps.unflatten(2, (cols, cells)).unflatten(1, (rows, cells)).permute(1, 3, 2, 4, 0)
    gradients = maps[..., :ORIENTATIONS]
    norm = gradients.flatten(2).norm(dim=2)[:, :, None, None, None]
    gradients = gradients / (norm + 0.02) * (ORIENTATIONS * cells**2) ** 0.5
    return torch.cat([gradients, maps[..., ORIENTATIONS:]], dim=-1).flatten(2)


def describe_frequencies(pixels: Tensor, rows: int, cols: int) -> Tensor:
    """``(3, height, width)`` in [0, 1] to ``(rows, cols, len(RINGS) - 1)``: logarithms of the power of every ring of
    frequencies in a Hann window round each patch, twice its size; near zero mean and unit variance on photographs."""
    grey = pixels.mean(dim=0)[None, None]
    grey = F.interpolate(grey, (rows * _WINDOW, cols * _WINDOW), mode="bilinear", antialias=True, align_corners=False)
    margin = _WINDOW // 2
    windows = F.unfold(F.pad(grey, (margin,) * 4, mode="replicate"), 2 * _WINDOW, stride=_WINDOW)[0].T
    windows = windows.unflatten(1, (2 * _WINDOW, 2 * _WINDOW))
    hann = torch.hann_window(2 * _WINDOW, device=pixels.device)
    windows = (windows - windows.mean(dim=(1, 2), keepdim=True)) * hann[:, None] * hann
    power = torch.fft.rfft2(windows, norm="ortho").abs().square()
    ring = _rings(pixels.device)
    total = power.flatten(1) @ ring
    return ((total + 1e-4).log() * 0.5 + 2.5).view(rows, cols, -1)


def _rings(device: torch.device) -> Tensor:
    """``(frequencies, rings)``: which ring every frequency of a window's spectrum lies in, averaging over it."""
    size = 2 * _WINDOW
    y, x = torch.fft.fftfreq(size, 1 / size, device=device), torch.fft.rfftfreq(size, 1 / size, device=device)
    radius = torch.hypot(y[:, None], x[None, :]).flatten()
    borders = torch.tensor(RINGS, device=device)
    inside = (radius[:, None] >= borders[:-1]) & (radius[:, None] < borders[1:])
    return inside.float() / inside.sum(dim=0)
