"""RMS normalisation over the last dimension, in fp32 whatever the input.

``y = w * x / sqrt(mean(x**2) + eps)`` (arXiv 1910.07467). The composite in torch keeps several
intermediates and costs three times a layer norm on a CPU; the hand-written backward here keeps the input
and one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        width = x.shape[-1]
        unit = x.float() * scale
        grad = grad.float()
        product = grad * unit
        grad_weight = product.reshape(-1, width).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        along = torch.matmul(product, weight.float()).div_(width).unsqueeze(-1)
        grad_x = torch.addcmul(grad * weight, unit, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x (..., D)``, ``weight (D,)``; computed in fp32, returned in the dtype of ``x``."""
    with torch.autocast(x.device.type, enabled=False):
        return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula as it is written; what :func:`rms_norm` must equal."""
    x32 = x.float()
    return (weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps))).to(x.dtype)
