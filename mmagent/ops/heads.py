"""From one stacked projection to rotated heads: the step between a qkv matrix and attention, in one pass.

Splits ``(T, (H + 2G) d)`` into queries, keys and values, normalises queries and keys per head (optional) and
turns them, in fp32, writing each result once. The backward fills one gradient of the stacked projection
in place of a dozen slices, concatenations and temporaries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmagent.ops.function import apply
from mmagent.ops.norm import inverse_rms, norm_backward, rms_norm_reference
from mmagent.ops.rotary import Rotation, rotate_reference, turn
from mmagent.ops.rows import fits_block, row_blocks


class Heads(NamedTuple):
    """``queries`` H and ``keys`` G (as many values) heads of ``width`` d; ``eps`` of their norms."""

    queries: int
    keys: int
    width: int
    eps: float = 1e-5


def _norm_weights(q_weight: Tensor, k_weight: Tensor, heads: Heads) -> Tensor:
    """``(H + G, d)`` fp32: the gain of every head."""
    return torch.cat([q_weight.float().expand(heads.queries, -1), k_weight.float().expand(heads.keys, -1)])


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: Heads, rotation: Rotation, q_weight: Tensor | None, k_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        stacked = qkv.view(qkv.shape[0], heads.queries + 2 * heads.keys, heads.width)
        turning = heads.queries + heads.keys
        normed = q_weight is not None and k_weight is not None
        gains = _norm_weights(q_weight, k_weight, heads) if normed else None
        if fits_block(stacked):
            scale = qkv.new_empty(0, turning, 1, dtype=torch.float32)
            x = stacked[:, :turning].float()
            if gains is not None:
                scale = inverse_rms(x, heads.eps)
                x = (x * scale).mul_(gains)
            x = turn(x, rotation.cos, rotation.sin, rotation.interleaved).to(qkv.dtype)
            q, k = (part.contiguous() for part in x.split((heads.queries, heads.keys), dim=1))
        else:
            q, k = (stacked.new_empty(qkv.shape[0], n, heads.width) for n in (heads.queries, heads.keys))
            scale = torch.empty(qkv.shape[0] if normed else 0, turning, 1, dtype=torch.float32, device=qkv.device)
            for rows in row_blocks(stacked):
                x = stacked[rows, :turning].float()
                if gains is not None:
                    scale[rows] = inverse_rms(x, heads.eps)
                    x = (x * scale[rows]).mul_(gains)
                x = turn(x, rotation.cos[rows], rotation.sin[rows], rotation.interleaved)
                q[rows], k[rows] = x[:, : heads.queries], x[:, heads.queries :]
        ctx.save_for_backward(qkv if normed else None, scale, rotation.cos, rotation.sin, q_weight, k_weight)
        ctx.heads, ctx.interleaved = heads, rotation.interleaved
        return q, k, stacked[:, turning:]

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scale, cos, sin, q_weight, k_weight = ctx.saved_tensors
        heads: Heads = ctx.heads
        turning = heads.queries + heads.keys
        out = grad_v.new_empty(grad_v.shape[0], turning + heads.keys, heads.width)
        gains = None if qkv is None else _norm_weights(q_weight, k_weight, heads)
        grad_gains = None if gains is None else torch.zeros_like(gains)
        for rows in row_blocks(out):
            grad = torch.cat([grad_q[rows], grad_k[rows]], dim=1).float()
            grad = turn(grad, cos[rows], -sin[rows], ctx.interleaved)
            if qkv is not None and gains is not None and grad_gains is not None:
                x = qkv[rows].view(-1, turning + heads.keys, heads.width)[:, :turning].float()
                grad_gains += norm_backward(grad.mul_(scale[rows]), x, scale[rows], gains, out[rows, :turning])
            else:
                out[rows, :turning] = grad
            out[rows, turning:] = grad_v[rows]
        grad_q_weight = grad_k_weight = None
        if grad_gains is not None:
            grad_q_weight = grad_gains[: heads.queries].sum(0).to(q_weight.dtype)
            grad_k_weight = grad_gains[heads.queries :].sum(0).to(k_weight.dtype)
        return out.flatten(1), None, None, grad_q_weight, grad_k_weight


def split_heads(
    qkv: Tensor, heads: Heads, rotation: Rotation, q_weight: Tensor | None = None, k_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(T, (H + 2G) d)`` to ``q (T, H, d)``, ``k (T, G, d)``, ``v (T, G, d)``, normalised with gains ``(d,)`` where
    given, then turned. fp32 inside, the dtype of ``qkv`` outside; ``v`` is a view of ``qkv``."""
    return apply(_SplitHeads, qkv.contiguous(), heads, rotation, q_weight, k_weight)


def split_heads_reference(
    qkv: Tensor, heads: Heads, rotation: Rotation, q_weight: Tensor | None = None, k_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, one operation at a time."""
    q, k, v = qkv.unflatten(-1, (-1, heads.width)).split((heads.queries, heads.keys, heads.keys), dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm_reference(q, q_weight, heads.eps), rms_norm_reference(k, k_weight, heads.eps)
    return rotate_reference(q, rotation).to(q.dtype), rotate_reference(k, rotation).to(k.dtype), v
