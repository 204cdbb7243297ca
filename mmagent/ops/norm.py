"""RMS normalisation over the last dimension, in fp32 whatever the input.

``y = w * x / sqrt(mean(x**2) + eps)`` (arXiv 1910.07467). The composite in torch keeps several
intermediates and costs three times a layer norm on a CPU; the hand-written backward here keeps the input
and one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmagent.ops.function import apply
from mmagent.ops.rows import fits_block, row_blocks


def inverse_rms(x32: Tensor, eps: float) -> Tensor:
    """``(..., 1)`` fp32: one over the root mean square of the last dimension."""
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    return norm.square_().div_(x32.shape[-1]).add_(eps).rsqrt_()


def norm_backward(scaled32: Tensor, x32: Tensor, scale: Tensor, weight32: Tensor, out: Tensor) -> Tensor:
    """Writes the gradient to ``x`` of ``weight * x * scale`` into ``out`` and returns that to the weight.

    ``scaled32`` is the incoming gradient times ``scale``; it may be overwritten. Everything is said in terms of it, so
    that the unit vectors ``x * scale`` are never made: on a CPU a pass costs what it moves. ``weight32`` is the last
    dimension or more of ``x``.
    """
    product = scaled32 * x32
    along = torch.matmul(product, weight32) if weight32.ndim == 1 else (product * weight32).sum(-1)
    along = along.unsqueeze(-1).mul_(scale).mul_(scale).div_(x32.shape[-1])
    into = out if out.dtype == torch.float32 else scaled32
    torch.mul(scaled32, weight32, out=into).addcmul_(x32, along, value=-1)
    if into is not out:
        out.copy_(into)
    return product.sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight32 = weight.float()
        if fits_block(flat):
            x32 = flat.float()
            scale = inverse_rms(x32, eps)
            out = (x32 * scale).mul_(weight32).to(dtype)
        else:
            out = torch.empty(flat.shape, dtype=dtype, device=x.device)
            scale = torch.empty(flat.shape[0], 1, dtype=torch.float32, device=x.device)
            for rows in row_blocks(flat):
                x32 = flat[rows].float()
                scale[rows] = inverse_rms(x32, eps)
                out[rows] = (x32 * scale[rows]).mul_(weight32)
        ctx.save_for_backward(flat, scale, weight)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        flat, scale, weight = ctx.saved_tensors
        flat_grad, weight32 = grad.reshape(flat.shape), weight.float()
        out = torch.empty_like(flat)
        grad_weight = torch.zeros_like(weight32)
        for rows in row_blocks(flat):
            scaled = flat_grad[rows] * scale[rows]
            grad_weight += norm_backward(scaled, flat[rows].float(), scale[rows], weight32, out[rows])
        return out.view(grad.shape), grad_weight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """``x (..., D)``, ``weight (D,)``; computed in fp32, returned in ``dtype`` (default: that of ``x``)."""
    return apply(_RMSNorm, x, weight, eps, dtype or x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula as it is written; what :func:`rms_norm` must equal."""
    x32 = x.float()
    return (weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps))).to(x.dtype)
