"""Products with a tile-wise sparse matrix, of dense parts alone (arXiv 2008.13006): no sparse hardware is needed.

Tiles are gathered once: ``G`` outputs of which something is kept, and the weights of the inputs that they read. A
product gathers each tile's inputs, multiplies tiles of one size as one batch, and puts outputs in their places:

    x_TI -> (I, T) -> rows of every tile -> batches of (outputs, K) @ (K, T) -> rows in their places (O, T) -> (T, O)

Everything between the two transpositions moves whole rows of T numbers. Gathering *columns* of ``x`` does the same and
is what the paper's kernels do; on a CPU in bfloat16 it costs more than the products save (768 to 3,072 at 75 %, one
core: 5.9 ms to gather columns, 0.3 ms to transpose and gather rows, 3.3 ms to multiply).

The number of inputs of a tile is filled up to a multiple of ``step`` with weights of zero, on an input that the tile
reads anyway, so that many tiles have one size. What is restored alone (TEW) is a sparse matrix that is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 32
"""What inputs of a tile are filled up to a multiple of: bfloat16 products of a CPU take 32 at a time."""


class TileBatch(NamedTuple):
    """``B`` tiles of one size: ``weight (B, outputs, K)`` and ``inputs (B, K)`` int64."""

    weight: Tensor
    inputs: Tensor


class Singles(NamedTuple):
    """Weights beside the tiles, as CSR: ``starts (O + 1,)`` and ``columns (nnz,)`` int64, ``values (nnz,)``."""

    starts: Tensor
    columns: Tensor
    values: Tensor


class PackedMatrix(NamedTuple):
    """A sparse ``(O, I)``. ``places (O,)`` int64: the row of all tiles' outputs, batch after batch, that is this
    output; one past the last row for an output of which no tile keeps anything."""

    batches: tuple[TileBatch, ...]
    places: Tensor
    singles: Singles | None = None

    @property
    def multiplied(self) -> int:
        """Weights that a product reads, those that fill up included."""
        return sum(batch.weight.numel() for batch in self.batches) + (
            self.singles.values.numel() if self.singles else 0
        )


def pack(
    weight_OI: Tensor, tiles: Sequence[tuple[Tensor, Tensor]], singles_OI: Tensor, step: int = STEP
) -> PackedMatrix:
    """``weight`` by its ``tiles``, ``(outputs, inputs)`` each, and the weights where ``singles`` is true.

    An output may be in one tile only. Raises ``ValueError`` where weight is left that neither holds.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    covered = singles_OI.clone()
    groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for outputs, inputs in tiles:
        covered[outputs.unsqueeze(1), inputs] = True
        size = min(-(-len(inputs) // step) * step, max(weight_OI.shape[1], len(inputs)))
        groups.setdefault((len(outputs), size), []).append((outputs, inputs))
    if left := int((weight_OI.ne(0) & ~covered).sum()):
        raise ValueError(f"{left} weights that are not zero are in no tile: the mask is not that of this matrix")
    places = torch.full((weight_OI.shape[0],), sum(len(outputs) for outputs, _ in tiles), device=weight_OI.device)
    batches, row = [], 0
    for (width, size), members in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        weights, reads = [], []
        for outputs, inputs in members:
            places[outputs] = torch.arange(row, row + width, device=places.device)
            row += width
            fill = size - len(inputs)
            own = torch.where(singles_OI[outputs][:, inputs], 0, weight_OI[outputs][:, inputs])
            weights.append(F.pad(own, (0, fill)))
            reads.append(torch.cat([inputs, inputs[-1:].expand(fill)]))
        batches.append(TileBatch(torch.stack(weights), torch.stack(reads)))
    return PackedMatrix(tuple(batches), places, _singles(weight_OI, singles_OI))


def _singles(weight_OI: Tensor, singles_OI: Tensor) -> Singles | None:
    if not bool(singles_OI.any()):
        return None
    starts = F.pad(singles_OI.sum(1).cumsum(0), (1, 0))
    return Singles(starts, singles_OI.nonzero()[:, 1].contiguous(), weight_OI[singles_OI])


def unpack(packed: PackedMatrix, inputs: int) -> Tensor:
    """The dense ``(O, inputs)`` with zeros that ``packed`` was made from."""
    example = packed.batches[0].weight if packed.batches else packed.singles.values if packed.singles else None
    if example is None:
        raise ValueError("a matrix of which nothing is kept does not say what it is made of")
    rows = [
        example.new_zeros(weight.shape[0], weight.shape[1], inputs).scatter_add_(
            2, reads.unsqueeze(1).expand_as(weight), weight
        )
        for weight, reads in packed.batches
    ]
    stacked = torch.cat([*(r.flatten(0, 1) for r in rows), example.new_zeros(1, inputs)])
    dense = stacked.index_select(0, packed.places)
    if packed.singles is not None:
        counts = packed.singles.starts.diff()
        outputs = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        dense[outputs, packed.singles.columns] += packed.singles.values
    return dense


def packed_linear(x_TI: Tensor, packed: PackedMatrix, bias_O: Tensor | None = None) -> Tensor:
    """``(T, I) -> (T, O)``: what ``F.linear`` gives with the dense matrix, up to the order of sums. Under autocast it
    runs in the autocast dtype."""
    if torch.is_autocast_enabled(x_TI.device.type):
        x_TI = x_TI.to(torch.get_autocast_dtype(x_TI.device.type))
    x_IT = x_TI.T.contiguous()
    rows = _rows(x_IT, packed.batches)
    out_OT = rows.index_select(0, packed.places)
    if packed.singles is not None:
        out_OT = out_OT + _product(packed.singles, x_IT)
    out_TO = out_OT.T.contiguous()
    return out_TO if bias_O is None else out_TO + bias_O.to(out_TO.dtype)


def _rows(x_IT: Tensor, batches: Sequence[TileBatch]) -> Tensor:
    """Outputs of all tiles in their order, ``(rows + 1, T)``; the last is zero, for outputs that no tile keeps."""
    tokens, sizes = x_IT.shape[1], [weight.shape[0] * weight.shape[1] for weight, _ in batches]
    if torch.is_grad_enabled() and x_IT.requires_grad:  # what is written into a given place has no backward
        parts = [torch.bmm(w.to(x_IT.dtype), _gathered(x_IT, reads)).flatten(0, 1) for w, reads in batches]
        return torch.cat([*parts, x_IT.new_zeros(1, tokens)])
    rows = x_IT.new_empty(sum(sizes) + 1, tokens)
    rows[-1] = 0.0
    for (weight, reads), part in zip(batches, rows[:-1].split(sizes), strict=True):
        torch.bmm(weight.detach().to(x_IT.dtype), _gathered(x_IT, reads), out=part.view(*weight.shape[:2], tokens))
    return rows


def _gathered(x_IT: Tensor, reads_BK: Tensor) -> Tensor:
    return x_IT.index_select(0, reads_BK.flatten()).view(*reads_BK.shape, x_IT.shape[1])


def _product(singles: Singles, x_IT: Tensor) -> Tensor:
    """The sparse addend. A CPU has no sparse product of half precision: it is computed in float32 there."""
    wide = torch.float32 if x_IT.device.type == "cpu" and x_IT.itemsize < 4 else x_IT.dtype
    size = (singles.starts.shape[0] - 1, x_IT.shape[0])
    values = singles.values.to(wide)
    matrix = torch.sparse_csr_tensor(singles.starts, singles.columns, values, size, check_invariants=False)
    return torch.mm(matrix, x_IT.to(wide)).to(x_IT.dtype)
