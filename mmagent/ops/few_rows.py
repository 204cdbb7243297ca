"""Matrix products of two or three rows, and of some more with narrow or tall matrices, as a CPU does them fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW, SOME = 3, 8
"""Rows up to which any matrix is the left side, and one of at most ``NARROW`` columns, or ``TALL`` times as high as
wide."""
NARROW, TALL = 512, 8


def linear(x: Tensor, weight_OD: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`. In float32 and where gradients are off a CPU takes ``weight @ x.T`` for a few
    rows: with the rows on the left the library packs the matrix anew at every call, which for two rows took twice the
    time of one, and three times for a head of 2,048 words; with the matrix on the left it is read once (measured on
    AVX-512 with one thread and two, matrices of 128 to 16,384 rows that no core's own cache held: five rows gain
    1.2 to 1.7 times up to 512 columns, and lose as much at 1,024)."""
    if x.ndim != 2 or not _few(x, weight_OD):
        return F.linear(x, weight_OD, bias)
    out = torch.mm(weight_OD, x.T).T.contiguous()
    return out if bias is None else out.add_(bias)


def batched_linear(x_ETD: Tensor, weight_EOD: Tensor) -> Tensor:
    """``(E, T, O)``: :func:`linear` of T rows for each of E matrices."""
    if not _few(x_ETD, weight_EOD):
        return torch.bmm(x_ETD, weight_EOD.transpose(1, 2))
    return torch.bmm(weight_EOD, x_ETD.transpose(1, 2)).transpose(1, 2)


def _few(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not x.dtype == weight.dtype == torch.float32:
        return False
    high, wide = weight.shape[-2:]
    most = SOME if wide <= NARROW or high >= TALL * wide else FEW
    return 1 < x.shape[-2] <= most
