"""SwiGLU: ``silu(gate) * up`` of the two halves of one stacked projection (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.ops.function import apply
from mmagent.ops.rows import fits_block, row_blocks


class _SwiGLU(torch.autograd.Function):
    """Keeps the projection alone and writes the gradients of both halves into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        if fits_block(gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            out = F.silu(gate).mul_(up)
        else:
            out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            for rows in row_blocks(out):
                gate, up = gate_up[rows].chunk(2, dim=-1)
                torch.mul(F.silu(gate), up, out=out[rows])
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        for rows in row_blocks(grad):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            grad_gate, grad_up = out[rows].chunk(2, dim=-1)
            torch.mul(grad[rows], F.silu(gate), out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad[rows] * up, gate, grad_input=grad_gate)
        return out


def swiglu(gate_up: Tensor, limit: float = 0.0) -> Tensor:
    """``(..., 2F)`` to ``(..., F)``. ``limit`` clamps the gate from above and the other half on both sides."""
    if limit:
        return swiglu_reference(gate_up, limit)
    out = apply(_SwiGLU, gate_up.reshape(-1, gate_up.shape[-1]))
    return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)  # not -1: there may be no rows


def swiglu_reference(gate_up: Tensor, limit: float = 0.0) -> Tensor:
    """Eager ``silu(gate) * up`` of stacked ``(..., 2F)``; ``limit`` clamps gate from above and up on both sides."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up
