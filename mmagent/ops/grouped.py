"""Mixture-of-experts plumbing: one gather in, grouped matrix products, one weighted sum out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.ops.few_rows import batched_linear, linear
from mmagent.ops.function import apply
from mmagent.ops.precision import no_autocast
from mmagent.ops.rows import permute_rows, row_blocks


class Dispatch(NamedTuple):
    """Where ``T * K`` (token, expert) pairs stand once sorted by expert.

    ``order (T*K,)``: the pair at every sorted place (pair ``p`` is token ``p // K``); ``inverse`` the place of
    every pair; ``counts (E,)`` int64 rows of every expert.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor


def plan_dispatch(chosen_TK: Tensor, experts: int) -> Dispatch:
    """Sort pairs by expert, stably, so that the result is deterministic."""
    flat = chosen_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return Dispatch(order, inverse, tally(flat, experts))


def plan_arrival(counts_RE: Tensor, rows: int) -> Dispatch:
    """Rows that came from R ranks, each rank's sorted by expert, and where they stand once all are.

    ``counts (R, E)`` int64: how many came from each rank for each of the E experts that live here; they sum to
    ``rows``, which the host has to know anyway. Rows of one expert keep the order of ranks.
    """
    sizes, by_expert = counts_RE.flatten(), counts_RE.T.flatten()
    lie = sizes.cumsum(0) - sizes
    go = (by_expert.cumsum(0) - by_expert).view(counts_RE.T.shape).T.flatten()
    places = torch.arange(rows, device=sizes.device)
    inverse = places + torch.repeat_interleave(go - lie, sizes, output_size=rows)
    order = torch.empty_like(inverse)
    order[inverse] = places
    return Dispatch(order, inverse, counts_RE.sum(0))


def tally(indices: Tensor, size: int) -> Tensor:
    """How often each of ``range(size)`` occurs, int64. ``bincount`` would make the host wait for an accelerator."""
    if indices.device.type == "cpu":
        return torch.bincount(indices, minlength=size)
    return torch.zeros(size, dtype=torch.int64, device=indices.device).scatter_add_(
        0, indices, torch.ones_like(indices)
    )


class _Scatter(torch.autograd.Function):
    """Copy each token once for each of its experts, sorted. Its transpose is a gather and a sum over K."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Tensor, inverse: Tensor, fan: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.fan = fan
        return x_TD.index_select(0, order // fan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.fan)).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """``out[t] = sum_k gates[t, k] * y[place of (t, k)]``, kept in sorted order for the backward.

    Gates, sums over k and the gates' gradients, sums over D, are float32 whatever the rows are: they are what a router
    learns from. A block of rows at a time keeps the wide copies in the cache.
    """

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gates_TK: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, gates_TK, order, inverse)
        out = y_ND.new_empty(gates_TK.shape[0], y_ND.shape[1])
        places_TK = inverse.view(gates_TK.shape)
        for rows in row_blocks(out):
            gates, places = gates_TK[rows], places_TK[rows]
            total = y_ND.index_select(0, places[:, 0]) * gates[:, :1]
            for k in range(1, gates.shape[1]):
                total.addcmul_(y_ND.index_select(0, places[:, k]), gates[:, k : k + 1])
            out[rows] = total
        return out

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_ND, gates_TK, order, inverse = ctx.saved_tensors
        tokens, gates_N = order // gates_TK.shape[1], gates_TK.reshape(-1).index_select(0, order)
        grad_y, grad_gates_N = torch.empty_like(y_ND), torch.empty_like(gates_N)
        for rows in row_blocks(grad_y):
            spread = grad_TD.index_select(0, tokens[rows]).to(gates_N.dtype)
            torch.mul(spread, gates_N[rows].unsqueeze(1), out=grad_y[rows])
            torch.sum(spread.mul_(y_ND[rows]), -1, out=grad_gates_N[rows])
        return grad_y, grad_gates_N.index_select(0, inverse).view_as(gates_TK), None, None


def scatter_to_experts(x_TD: Tensor, dispatch: Dispatch, fan: int) -> Tensor:
    """``(T, D)`` to ``(T*K, D)`` sorted by expert; ``fan`` is K."""
    return apply(_Scatter, x_TD, dispatch.order, dispatch.inverse, fan)


def sort_by_expert(x_ND: Tensor, arrival: Dispatch) -> Tensor:
    """Rows as they came, ``(N, D)``, sorted by expert."""
    return permute_rows(x_ND, arrival.order, arrival.inverse)


def unsort_by_expert(y_ND: Tensor, arrival: Dispatch) -> Tensor:
    """Rows sorted by expert, ``(N, D)``, as they came."""
    return permute_rows(y_ND, arrival.inverse, arrival.order)


def collect_from_experts(y_ND: Tensor, gates_TK: Tensor, dispatch: Dispatch) -> Tensor:
    """``(T*K, D)`` sorted by expert back to ``(T, D)``, weighted by ``gates (T, K)`` in float32 (or wider)."""
    return apply(_Collect, y_ND, gates_TK, dispatch.order, dispatch.inverse)


LEAST_ROWS = 16
"""A CPU deals rows to its threads by the 4, and multiplies 1 to 3 that are left over by other instructions, in another
order. With 4 rows a thread, and these at least, none was ever seen to be: fewer are filled up to a multiple, so that
what a token gets does not depend on how many others chose its expert (measured for 1 to 64 threads)."""


FEW_WEIGHTS = 1 << 21
"""Of gates and ups of all experts: 8 MiB in float32, which caches hold."""
FEW_WORK = 1 << 24
"""Such weights times rows, where rows are :data:`LEAST_ROWS` and more."""


class _LoopedLinear(torch.autograd.Function):
    """One product an expert, written in place: nothing is concatenated, forward or backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EOD: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EOD)
        ctx.counts = counts
        out = x_ND.new_empty(x_ND.shape[0], weight_EOD.shape[1])
        least = max(LEAST_ROWS, 4 * torch.get_num_threads()) if x_ND.device.type == "cpu" else 0
        for x, weight, y in zip(x_ND.split(counts), weight_EOD, out.split(counts), strict=True):
            if x.shape[0] < least and (missing := -x.shape[0] % LEAST_ROWS):
                y.copy_(torch.mm(F.pad(x, (0, 0, 0, missing)), weight.T)[: x.shape[0]])
            else:
                torch.mm(x, weight.T, out=y)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_EOD = ctx.saved_tensors
        grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EOD) if ctx.needs_input_grad[1] else None  # none of frozen experts
        grads = grad.split(ctx.counts)
        if grad_x is not None:
            for g, weight, out in zip(grads, weight_EOD, grad_x.split(ctx.counts), strict=True):
                torch.mm(g, weight, out=out)
        if grad_weight is not None:
            for g, x, out in zip(grads, x_ND.split(ctx.counts), grad_weight, strict=True):
                torch.mm(g.T, x, out=out)
        return grad_x, grad_weight, None


def grouped_linear(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert times their expert's matrix: ``(N, D) x (E, O, D) -> (N, O)``.

    ``counts (E,)`` int64 rows of every expert, summing to N; experts may be empty. Under autocast the
    product runs in the autocast dtype.
    """
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, weight_EOD = x_ND.to(dtype), weight_EOD.to(dtype)
    experts = weight_EOD.shape[0]
    if x_ND.shape[0] == 0:  # what an expert-parallel rank may get; no kernel has to cope with it
        return apply(_LoopedLinear, x_ND, weight_EOD, (0,) * experts)
    if (x_ND.device.type == "cpu" and experts <= 32) or not _fits_kernel(weight_EOD):
        return apply(_LoopedLinear, x_ND, weight_EOD, tuple(counts_E.tolist()))
    out = F.grouped_mm(x_ND, weight_EOD.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)  # the kernel's backward refuses the gradient of a sum, which is expanded
    return out


def _fits_kernel(weight_EOD: Tensor) -> bool:
    """Rows of all operands must be multiples of 16 bytes."""
    return all(size * weight_EOD.element_size() % 16 == 0 for size in weight_EOD.shape[1:])


def serve_few(x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """A few tokens through SwiGLU experts, ``gate_up (E, 2F, D)`` and ``down (E, D, F)``, summed by their gates:
    ``(T, D)``. Forward only.

    Every expert serves all tokens, and a gate of zero leaves out what was not chosen, finite or not. Sorted by expert
    they would be filled up to ``LEAST_ROWS`` for each, which is more work, and in three products an expert instead of
    two in all.
    """
    dtype = gate_up_EFD.dtype
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
    with no_autocast(x_TD.device.type):
        x, gate_up, down = x_TD.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
        inner_TEF = linear(x, gate_up.flatten(0, 1)).view(x.shape[0], gate_up.shape[0], -1)
        gate, up = inner_TEF.chunk(2, dim=-1)
        y_ETD = batched_linear(F.silu(gate).mul_(up).transpose(0, 1), down)
        gates_TE = gates_TK.new_zeros(gates_TK.shape[0], gate_up.shape[0]).scatter_(1, chosen_TK, gates_TK)
        gates_ET1 = gates_TE.T.unsqueeze(2)
        return (y_ETD * gates_ET1).masked_fill_(gates_ET1 == 0, 0).sum(0).to(dtype).contiguous()


def few(x_TD: Tensor, gate_up_EFD: Tensor) -> bool:
    """Whether :func:`serve_few` is to serve so many tokens. Experts that no cache holds cost what is read of them, and
    there it would read those that nobody chose (measured: 1.4 to 3.5 times as fast below the limit, .2 to .9 above).
    From ``LEAST_ROWS`` on only small experts gain, and from twice as many none (1.1 to 1.4 times as fast within)."""
    rows, weights = x_TD.shape[0], gate_up_EFD.numel()
    forward_only = not torch.is_grad_enabled() and x_TD.device.type == "cpu"
    small = weights <= FEW_WEIGHTS if rows < LEAST_ROWS else rows * weights <= FEW_WORK and rows < 2 * LEAST_ROWS
    return forward_only and rows > 0 and small


def grouped_linear_reference(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """The loop. ``unbind``, not indexing: each index into a 3-D parameter costs a full-size gradient."""
    rows = x_ND.split(counts_E.tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(rows, weight_EOD.unbind(0), strict=True)])
