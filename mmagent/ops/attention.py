"""Attention over a packed stream: tokens see their own document and nothing else.

One signature. On accelerators one variable-length flash kernel reads ``cu_seqlens``; on CPUs there is no
such kernel, and documents of equal length are batched into one dense call each. Both equal
:func:`varlen_attention_reference`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.types import Segments


def varlen_attention(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, segments: Segments, causal: bool, scale: float | None = None
) -> Tensor:
    """Softmax attention within each segment: ``(T, H, d)`` queries, ``(T, G, d)`` keys and values.

    H is a multiple of G (grouped queries). ``scale`` defaults to ``d ** -0.5``. The result has the dtype of
    ``v``.
    """
    _check(q_THd, k_TGd, v_TGd, segments)
    if q_THd.device.type == "cuda":
        return _flash(q_THd, k_TGd, v_TGd, segments, causal, scale)
    return _by_length(q_THd, k_TGd, v_TGd, segments, causal, scale)


def varlen_attention_reference(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, segments: Segments, causal: bool, scale: float | None = None
) -> Tensor:
    """The formula over the whole stream under one dense ``(T, T)`` mask, in fp32."""
    _check(q_THd, k_TGd, v_TGd, segments)
    repeats = q_THd.shape[1] // k_TGd.shape[1]
    q, k, v = q_THd.float(), k_TGd.float().repeat_interleave(repeats, 1), v_TGd.float().repeat_interleave(repeats, 1)
    scores = torch.einsum("shd,thd->hst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    ids = segments.ids()
    seen = ids[:, None] == ids[None, :]
    if causal:
        seen = seen & torch.ones_like(seen).tril()
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.einsum("hst,thd->shd", weights, v).to(v_TGd.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    if q.shape[0] != segments.total or k.shape[0] != segments.total or k.shape != v.shape:
        raise ValueError(
            f"attention: queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)} "
            f"do not fit segments of {segments.total} tokens"
        )
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: {tuple(q.shape)} queries cannot share {tuple(k.shape)} keys")


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    dtype = v.dtype if v.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    cu, longest = segments.cu_seqlens, segments.longest
    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q.to(dtype), k.to(dtype), v.to(dtype), cu, cu, longest, longest,
        scale=scale, window_size=window, enable_gqa=grouped,
    )  # fmt: skip
    return out.to(v.dtype)


class _Plan(NamedTuple):
    """``runs``: (segments, length) of each dense call. ``order``: rows to gather so that equal lengths stand
    together, None where they already do; ``inverse`` puts them back."""

    runs: tuple[tuple[int, int], ...]
    order: Tensor | None
    inverse: Tensor | None


def _runs(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return tuple(runs)


@lru_cache(maxsize=64)
def _plan(lengths: tuple[int, ...]) -> _Plan:
    runs = _runs(lengths)
    if len(runs) <= 1.5 * len(set(lengths)):  # gathering costs a copy of q, k, v: only where it saves calls
        return _Plan(runs, None, None)
    borders = torch.tensor((0, *lengths)).cumsum(0)
    ranked = sorted(range(len(lengths)), key=lambda n: lengths[n])
    order = torch.cat([torch.arange(borders[n], borders[n + 1]) for n in ranked])
    return _Plan(_runs(tuple(sorted(lengths))), order, torch.argsort(order))


class _Permute(torch.autograd.Function):
    """Rows in another order. The backward is a gather, too: indexing by autograd would scatter with addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` for a permutation and its inverse, cheap in both directions."""
    return _Permute.apply(x, order, inverse)


def _by_length(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float | None) -> Tensor:
    """One dense call for every run of segments of equal length, in fp32: the bf16 kernel is slower on CPUs."""
    dtype = v.dtype
    plan = _plan(segments.lengths)
    with torch.autocast(q.device.type, enabled=False):
        streams = [q.float(), k.float(), v.float()]
        if plan.order is not None:
            order, inverse = plan.order.to(q.device), plan.inverse.to(q.device)
            streams = [permute_rows(x, order, inverse) for x in streams]
        sizes = [count * length for count, length in plan.runs]
        parts = []
        for (count, length), *run in zip(plan.runs, *(x.split(sizes) for x in streams), strict=True):
            query, key, value = (x.unflatten(0, (count, length)).transpose(1, 2) for x in run)
            part = F.scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
            parts.append(part.transpose(1, 2).flatten(0, 1))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        if plan.order is not None:
            out = permute_rows(out, inverse, order)
        return out.to(dtype)
