"""Masks from scores: tile-wise sparsity (arXiv 2008.13006) and the patterns it is compared with.

A matrix here is a weight ``(O, I)`` as ``nn.Linear`` has it, or ``(E, O, I)``, a matrix an expert. The paper writes
``x @ B`` with ``B (I, O)``: its *column* is one output, a row of ours; its *row* is one input. A tile is ``G`` outputs,
and a *segment* what one input gives to the outputs of one tile.

The score of a weight is the sum over a stage of ``(gradient * weight)^2``: what the loss would change by, to first
order, without that weight (the paper's Taylor score). A unit of a pattern (output, segment, block) has the L2 norm of
its weights' scores divided by how many they are, and units of *all* matrices are ranked together: a matrix that matters
less loses more. That is all of the irregularity that makes tile-wise pruning good; inside a tile everything is dense.

How many units go is counted in weights (``budget: elements``), so that 75 % means 75 % though an output of one matrix
has four times the weights of another's. The authors' code takes a percentile of the units (``budget: units``); the two
agree where all units have one size. Whichever it is, :func:`density` counts what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PATTERNS = ("tile-1d", "tile-2d", "tile-element", "element", "vector", "block", "2:4")
BUDGETS = ("elements", "units")
DROPPED, KEPT, SINGLE = 0, 1, 2
"""Values of a mask: a weight that is gone, one that its pattern keeps, and one restored alone (``tile-element``)."""


@dataclass
class PatternConfig:
    """``pattern``:

    - ``tile-1d``: segments of tiles of ``granularity`` consecutive outputs;
    - ``tile-2d``: outputs first, then segments of tiles of ``granularity`` *surviving* outputs;
    - ``tile-element`` (TEW): ``tile-2d`` with ``delta`` more gone, of which the best ``delta`` of all weights return;
    - ``element``: single weights; ``vector``: the best of each ``vector`` consecutive inputs of an output, as many in
      each; ``block``: squares of ``block`` by ``block``; ``2:4``: the better two of four inputs, always half.

    ``budget``: whether a share is one of weights (``elements``) or of ranked units (``units``, as the authors have it).
    """

    pattern: str = "tile-2d"
    granularity: int = 128
    delta: float = 0.02
    vector: int = 16
    block: int = 32
    budget: str = "elements"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern {self.pattern!r} is none of {', '.join(PATTERNS)}")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget {self.budget!r} is neither elements nor units")
        for name in ("granularity", "vector", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"delta {self.delta} must lie between 0 and 1: the share of weights that come back")


def make_masks(scores: Mapping[str, Tensor], sparsity: float, config: PatternConfig) -> dict[str, Tensor]:
    """A mask ``uint8`` for every score, ``(O, I)`` or ``(E, O, I)``: about ``sparsity`` of all weights are
    :data:`DROPPED`. A function of its arguments alone; of units with one score, the earlier goes first.

    Raises ``ValueError`` naming a score that is no matrix, negative or not finite, and what a pattern cannot do.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity {sparsity} must lie in [0, 1)")
    for name, score in scores.items():
        if score.ndim not in (2, 3):
            raise ValueError(f"{name}: a score of shape {tuple(score.shape)} is no matrix and no stack of matrices")
        if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
            raise ValueError(f"{name}: a score is negative or not finite")
    sheets = {
        name: _Sheets(name, score.detach().float().reshape(-1, *score.shape[-2:])) for name, score in scores.items()
    }
    kept = _kept(list(sheets.values()), sparsity, config)
    return {name: mask.view(scores[name].shape) for (name, mask) in zip(sheets, kept, strict=True)}


def restored(masks: Mapping[str, Tensor]) -> float:
    """The share of all weights that came back one by one."""
    return sum(int((mask == SINGLE).sum()) for mask in masks.values()) / max(sum(m.numel() for m in masks.values()), 1)


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of weights that are kept, counted."""
    total = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.count_nonzero()) for mask in masks.values()) / total if total else 1.0


def tiles_of(mask_OI: Tensor, granularity: int) -> list[tuple[Tensor, Tensor]]:
    """``(outputs, inputs)`` of every tile of one mask, ascending: ``granularity`` outputs of which something is kept,
    and the inputs that any of them reads. Weights that are :data:`SINGLE` belong to none."""
    structure = mask_OI == KEPT
    outputs = structure.any(1).nonzero().squeeze(1)
    return [(tile, structure[tile].any(0).nonzero().squeeze(1)) for tile in outputs.split(granularity) if len(tile)]


class _Sheets(NamedTuple):
    """The scores of one parameter, ``(E, O, I)``; one of two dimensions has one sheet."""

    name: str
    score: Tensor


class _Units(NamedTuple):
    """Units of one parameter: ``value`` their rank goes by and ``size`` in weights, of one shape."""

    value: Tensor
    size: Tensor


def _kept(sheets: Sequence[_Sheets], sparsity: float, config: PatternConfig) -> list[Tensor]:
    if config.pattern == "tile-1d":
        everything = [torch.ones_like(sheet.score[:, :, 0], dtype=torch.bool) for sheet in sheets]
        return _segments(sheets, everything, sparsity, config)
    if config.pattern == "tile-2d":
        return _tile_2d(sheets, sparsity, config)
    if config.pattern == "tile-element":
        return _tile_element(sheets, sparsity, config)
    if config.pattern == "vector":
        return [_best_of(sheet.score, config.vector, 1.0 - sparsity) for sheet in sheets]
    if config.pattern == "2:4":
        return _two_of_four(sheets, sparsity)
    if config.pattern == "block":
        return _blocks(sheets, sparsity, config)
    keep = _survivors([_Units(s.score, torch.ones_like(s.score)) for s in sheets], sparsity, config.budget)
    return [mask.to(torch.uint8) for mask in keep]


def _survivors(units: Sequence[_Units], share: float, budget: str) -> list[Tensor]:
    """True where a unit stays: the lowest go, over all of ``units``, until one more would be more than ``share``."""
    values = torch.cat([unit.value.flatten() for unit in units])
    sizes = torch.cat([unit.size.flatten() for unit in units]).double()
    if budget == "units":
        sizes = (sizes > 0).double()
    order = torch.argsort(values, stable=True)
    gone = order[sizes[order].cumsum(0) <= share * float(sizes.sum()) * (1 + 1e-12)]
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[gone] = False
    return [k.view(u.value.shape) for k, u in zip(keep.split([u.value.numel() for u in units]), units, strict=True)]


def _tile_2d(sheets: Sequence[_Sheets], sparsity: float, config: PatternConfig) -> list[Tensor]:
    """Both dimensions lose ``1 - sqrt(1 - s)``, so that ``1 - s`` is left. Outputs go first: which outputs share a tile
    depends on which are left, and a segment is ranked by those alone."""
    each = 1.0 - (1.0 - sparsity) ** 0.5
    outputs = [_Units(_mean_norm(s.score, 2), torch.full_like(s.score[:, :, 0], s.score.shape[2])) for s in sheets]
    return _segments(sheets, _survivors(outputs, each, config.budget), each, config)


def _mean_norm(score: Tensor, dim: int) -> Tensor:
    """In float64, as all norms here: the square of a score, which is one already, is easily below what float32 has."""
    return torch.linalg.vector_norm(score, dim=dim, dtype=torch.float64) / score.shape[dim]


def _segments(
    sheets: Sequence[_Sheets], outputs: Sequence[Tensor], share: float, config: PatternConfig
) -> list[Tensor]:
    """Masks of what stays when ``share`` of the weights of ``outputs (E, O)`` go, by segments."""
    width, units, homes = config.granularity, [], []
    for sheet, stay in zip(sheets, outputs, strict=True):
        number = stay.long().cumsum(1) - 1  # of an output among those that stay
        tiles = -(-sheet.score.shape[1] // width)
        home = torch.where(stay, number // width, tiles)  # those that do not stay share a tile that is dropped
        shape = (sheet.score.shape[0], tiles + 1, sheet.score.shape[2])
        squares = sheet.score.new_zeros(shape, dtype=torch.float64)
        squares.scatter_add_(1, home.unsqueeze(2).expand_as(sheet.score), sheet.score.double().square())
        count = torch.zeros(shape[:2]).scatter_add_(1, home, torch.ones(home.shape))[:, :tiles]
        norm = squares[:, :tiles].sqrt() / count.clamp(min=1).unsqueeze(2)
        units.append(_Units(norm, count.unsqueeze(2).expand_as(norm)))
        homes.append(home)
    masks = []
    for home, keep in zip(homes, _survivors(units, share, config.budget), strict=True):
        padded = F.pad(keep.to(torch.uint8), (0, 0, 0, 1))
        masks.append(padded.gather(1, home.unsqueeze(2).expand(-1, -1, keep.shape[2])))
    return masks


def _tile_element(sheets: Sequence[_Sheets], sparsity: float, config: PatternConfig) -> list[Tensor]:
    if sparsity + config.delta >= 1.0:
        raise ValueError(f"tile-element: sparsity {sparsity} and delta {config.delta} leave nothing to tiles")
    masks = _tile_2d(sheets, sparsity + config.delta, config)
    back = round(config.delta * sum(mask.numel() for mask in masks))
    values = torch.cat([
        torch.where(mask == DROPPED, sheet.score, -1.0).flatten() for mask, sheet in zip(masks, sheets, strict=True)
    ])  # fmt: skip
    best = torch.argsort(values, descending=True, stable=True)[:back]
    flat = torch.cat([mask.flatten() for mask in masks])
    flat[best[values[best] > 0]] = SINGLE  # what scored nothing, such as what is gone already, stays away
    return [f.view(mask.shape) for f, mask in zip(flat.split([m.numel() for m in masks]), masks, strict=True)]


def _best_of(score: Tensor, length: int, share: float) -> Tensor:
    """The best ``share`` of each ``length`` consecutive inputs; of a shorter rest its share, to the nearest."""
    mask = torch.zeros_like(score, dtype=torch.uint8)
    whole = score.shape[2] // length * length
    for start, stop, size in ((0, whole, length), (whole, score.shape[2], score.shape[2] - whole)):
        if stop > start:
            parts = score[:, :, start:stop].unflatten(2, (-1, size))
            best = torch.argsort(parts, dim=-1, descending=True, stable=True)[..., : round(share * size)]
            mask[:, :, start:stop] = torch.zeros_like(parts, dtype=torch.uint8).scatter_(3, best, KEPT).flatten(2)
    return mask


def _two_of_four(sheets: Sequence[_Sheets], sparsity: float) -> list[Tensor]:
    if sparsity not in (0.0, 0.5):
        raise ValueError(f"2:4 keeps two of four: its sparsity is 0.5 and cannot be {sparsity}")
    for name, score in sheets:
        if score.shape[2] % 4:
            raise ValueError(f"{name}: 2:4 wants inputs in fours, it has {score.shape[2]}")
    return [_best_of(sheet.score, 4, 1.0 - sparsity) for sheet in sheets]


def _blocks(sheets: Sequence[_Sheets], sparsity: float, config: PatternConfig) -> list[Tensor]:
    side, units = config.block, []
    for sheet in sheets:
        count = _by_blocks(torch.ones_like(sheet.score), side)  # of real weights: blocks at the edges have fewer
        norm = _by_blocks(sheet.score.double().square(), side).sqrt() / count
        units.append(_Units(norm, count))
    masks = []
    for sheet, keep in zip(sheets, _survivors(units, sparsity, config.budget), strict=True):
        spread = keep.repeat_interleave(side, 1).repeat_interleave(side, 2)
        masks.append(spread[:, : sheet.score.shape[1], : sheet.score.shape[2]].to(torch.uint8).contiguous())
    return masks


def _by_blocks(values_EOI: Tensor, side: int) -> Tensor:
    """Sums over squares of ``side`` by ``side``."""
    padded = F.pad(values_EOI, (0, -values_EOI.shape[2] % side, 0, -values_EOI.shape[1] % side))
    return padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).sum((2, 4))
