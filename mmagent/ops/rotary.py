"""Rotary position embedding: one angle table and one rotation for the encoder and the decoder.

A table is ``(T, R)`` angles for R pairs of channels, fp32. Builders differ in what fills it:

- :func:`angles_1d`: every pair turns with one position (arXiv 2104.09864);
- :func:`angles_2d`: the first half of the pairs turns with the row, the second with the column (vision);
- :func:`angles_3d`: consecutive sections of the pairs turn with time, row and column in turn (language
  model that sees; sections as in the GLM-4.5V family).

Pairs are channels ``(i, i + R)`` of a head, or ``(2i, 2i + 1)`` when ``interleaved``. Channels beyond
``2R`` of a head pass unturned (partial rotary).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmagent.ops.function import apply


@dataclass(frozen=True)
class Rotation:
    """``cos`` and ``sin``, both ``(T, 1, R)`` fp32, and how channels pair up.

    Not a tuple on purpose: mixed-precision wrappers cast every tensor they find in the arguments of a block,
    and angles in bf16 are wrong by whole radians far into a document.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @staticmethod
    def from_angles(angles_TR: Tensor, interleaved: bool = False) -> Rotation:
        return Rotation(angles_TR.cos().unsqueeze(1), angles_TR.sin().unsqueeze(1), interleaved)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Rotation:
        """On another device; never in another dtype."""
        moved = (x.to(device, non_blocking=non_blocking) for x in (self.cos, self.sin))
        return Rotation(*moved, interleaved=self.interleaved)


@cache
def inverse_frequencies(pairs: int, base: float, device: torch.device) -> Tensor:
    """``base ** (-i / pairs)`` for ``i`` in ``range(pairs)``, fp32; made once, so not to be written to."""
    with torch.inference_mode(False):  # a generator may be the first to ask, and a trainer the next
        return 1.0 / (base ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float32, device=device) / (2 * pairs)))


@cache
def _axes(sections: tuple[int, ...], device: torch.device) -> Tensor:
    """``(pairs,)``: the row of positions that each pair turns with; made once."""
    with torch.inference_mode(False):
        axes = torch.arange(len(sections), device=device) % 3
        return torch.repeat_interleave(axes, torch.tensor(sections, device=device), output_size=sum(sections))


def angles_1d(positions_T: Tensor, pairs: int, base: float) -> Tensor:
    return positions_T.float()[:, None] * inverse_frequencies(pairs, base, positions_T.device)


def angles_2d(coordinates_P2: Tensor, head_dim: int, base: float) -> Tensor:
    """``coordinates (P, 2)`` of rows and columns to ``(P, head_dim / 2)``; all channels of a head turn."""
    inverse = inverse_frequencies(head_dim // 4, base, coordinates_P2.device)
    return (coordinates_P2.float()[:, :, None] * inverse).flatten(1)


def angles_3d(positions_3T: Tensor, pairs: int, base: float, sections: Sequence[int]) -> Tensor:
    """``positions (3, T)``; section ``s`` of the pairs turns with ``positions[s % 3]``. Sections sum to ``pairs``."""
    if sum(sections) != pairs:
        raise ValueError(f"rotary sections {tuple(sections)} sum to {sum(sections)}, but {pairs} pairs turn")
    axes = _axes(tuple(sections), positions_3T.device)
    turning = positions_3T.float().T.index_select(1, axes)
    return turning * inverse_frequencies(pairs, base, positions_3T.device)


def default_sections(pairs: int) -> tuple[int, int, int]:
    """A quarter of the pairs for time, three eighths each for row and column, as in the GLM-4.5V family."""
    time = pairs // 4
    row = (pairs - time + 1) // 2
    return time, row, pairs - time - row


def turn(x_THd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation itself, without gradient: fp32 out. Opposite ``sin`` turns back."""
    pairs = cos.shape[-1]
    x = x_THd.float()
    out = torch.empty_like(x)
    if interleaved:
        a, b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        out_a, out_b = out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2]
    else:
        a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
        out_a, out_b = out[..., :pairs], out[..., pairs : 2 * pairs]
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    if 2 * pairs < x.shape[-1]:
        out[..., 2 * pairs :] = x[..., 2 * pairs :]
    return out


class _Rotate(torch.autograd.Function):
    """Keeps nothing of the input: the backward of a rotation is the opposite rotation."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.dtype = interleaved, x_THd.dtype
        return turn(x_THd, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin, ctx.interleaved).to(ctx.dtype), None, None, None


def rotate(x_THd: Tensor, rotation: Rotation) -> Tensor:
    """Turn ``(T, H, d)`` by ``rotation``; fp32 inside, returned in fp32 on a CPU (attention wants it so there),
    else in the dtype of ``x``."""
    turned = apply(_Rotate, x_THd, rotation.cos, rotation.sin, rotation.interleaved)
    return turned if turned.device.type == "cpu" else turned.to(x_THd.dtype)


def rotate_reference(x_THd: Tensor, rotation: Rotation) -> Tensor:
    """The same by complex multiplication, differentiated by autograd."""
    pairs = rotation.cos.shape[-1]
    x = x_THd.float()
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    shape = (*x.shape[:-1], pairs, 2) if rotation.interleaved else (*x.shape[:-1], 2, pairs)
    couples = turning.reshape(shape) if rotation.interleaved else turning.reshape(shape).transpose(-1, -2)
    turned = torch.view_as_complex(couples.contiguous()) * torch.complex(rotation.cos, rotation.sin)
    couples = torch.view_as_real(turned)
    flat = couples if rotation.interleaved else couples.transpose(-1, -2)
    return torch.cat([flat.reshape(*x.shape[:-1], 2 * pairs), rest], dim=-1)
