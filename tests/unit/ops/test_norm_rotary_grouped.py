"""Norm, rotation and expert plumbing equal their references, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagent.ops.glu import swiglu, swiglu_reference
from mmagent.ops.grouped import (
    LEAST_ROWS,
    collect_from_experts,
    few,
    grouped_linear,
    grouped_linear_reference,
    plan_dispatch,
    scatter_to_experts,
    serve_few,
)
from mmagent.ops.heads import Heads, split_heads, split_heads_reference
from mmagent.ops.norm import rms_norm, rms_norm_reference
from mmagent.ops.rotary import Rotation, angles_1d, angles_2d, angles_3d, default_sections, rotate, rotate_reference
from mmagent.ops.rows import permute_rows


def equal_with_gradients(ours, theirs, inputs, atol=1e-5):
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)
    pairs = [torch.autograd.grad((x * direction).sum(), inputs, retain_graph=True) for x in (ours, theirs)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, atol=10 * atol, rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 16), (5, 3, 8), (1, 4)])
def test_rms_norm(shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).requires_grad_()
    weight = torch.randn(shape[-1]).requires_grad_()
    equal_with_gradients(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), (x, weight))


def test_rms_norm_of_zeros_is_zero_with_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    out = rms_norm(x, torch.ones(4), 1e-5)
    out.sum().backward()
    assert float(out.detach().abs().sum()) == 0
    assert x.grad.isfinite().all()


def test_rms_norm_keeps_the_dtype_and_works_in_fp32():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = rms_norm(x, torch.ones(64), 1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rms_norm_reference(x, torch.ones(64), 1e-5))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [5, 3000])  # one block of rows, and several
def test_split_heads_equals_one_operation_at_a_time(normed, rows):
    torch.manual_seed(0)
    heads = Heads(queries=4, keys=2, width=16)
    qkv = torch.randn(rows, 8 * 16, requires_grad=True)
    gains = tuple(torch.randn(16, requires_grad=True) for _ in range(2)) if normed else ()
    rotation = Rotation.from_angles(angles_1d(torch.arange(rows) % 50, 4, 100.0))
    ours = torch.cat(split_heads(qkv, heads, rotation, *gains), 1)
    theirs = torch.cat(split_heads_reference(qkv, heads, rotation, *gains), 1)
    # gradients of the gains are sums over 3000 rows, in another order
    equal_with_gradients(ours, theirs, (qkv, *gains), atol=1e-4 if rows > 5 else 1e-5)


@pytest.mark.parametrize("limit", [0.0, 1.5])
@pytest.mark.parametrize("shape", [(3000, 256), (2, 5, 8), (6,)])
def test_swiglu(limit, shape):
    torch.manual_seed(0)
    gate_up = (2 * torch.randn(shape)).requires_grad_()
    equal_with_gradients(swiglu(gate_up, limit), swiglu_reference(gate_up, limit), (gate_up,))


def test_fused_operations_take_and_return_bf16():
    torch.manual_seed(0)
    gate_up = torch.randn(40, 16).bfloat16().requires_grad_()
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up), atol=2e-2, rtol=2e-2)  # rounds at 2**-8
    heads, gain = Heads(2, 1, 4), torch.ones(4)
    rotation = Rotation.from_angles(angles_1d(torch.arange(40), 2, 100.0))
    pairs = [f(gate_up, heads, rotation, gain, gain) for f in (split_heads, split_heads_reference)]
    for ours, theirs in zip(*pairs, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    (pairs[0][0].float().sum() + swiglu(gate_up).float().sum()).backward()
    assert gate_up.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [2, 4])
def test_rotation_equals_complex_multiplication(interleaved, pairs):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, requires_grad=True)
    rotation = Rotation.from_angles(angles_1d(torch.arange(5), pairs, 100.0), interleaved)
    equal_with_gradients(rotate(x, rotation), rotate_reference(x, rotation), (x,))


def test_rotation_depends_on_differences_of_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(a: int, b: int) -> torch.Tensor:
        turn = [Rotation.from_angles(angles_1d(torch.tensor([n]), 4, 100.0)) for n in (a, b)]
        return (rotate(q, turn[0]) * rotate(k, turn[1])).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)  # fp32 angles of about 100


def test_three_equal_axes_are_one_axis_exactly():
    positions = torch.tensor([0, 1, 5, 900])
    sections = default_sections(8)
    assert sum(sections) == 8
    assert torch.equal(angles_3d(positions.expand(3, -1), 8, 1e4, sections), angles_1d(positions, 8, 1e4))


def test_a_trainer_turns_with_what_a_generator_made():
    """Tables of frequencies are made once; those of inference mode could not be used in a backward."""
    positions = torch.tensor([3, 4])
    with torch.inference_mode():
        angles_3d(positions.expand(3, -1), 6, 77.0, (2, 2, 2))
    base = torch.ones(3, 2, requires_grad=True)
    (angles_3d(positions.expand(3, -1) * base, 6, 77.0, (2, 2, 2)).sum()).backward()
    assert base.grad is not None


def test_sections_turn_with_their_own_axis():
    positions = torch.tensor([[3], [5], [7]])
    angles = angles_3d(positions, 4, 1.0, (1, 1, 2))  # base 1: every frequency is 1
    assert angles.tolist() == [[3.0, 5.0, 7.0, 7.0]]
    with pytest.raises(ValueError, match="sum to 3"):
        angles_3d(positions, 4, 1.0, (1, 1, 1))


def test_vision_angles_hold_rows_then_columns():
    angles = angles_2d(torch.tensor([[2, 9]]), head_dim=8, base=1.0)
    assert angles.tolist() == [[2.0, 2.0, 9.0, 9.0]]


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=2, max_size=6), seed=st.integers(0, 50))
def test_grouped_linear_equals_a_plain_loop(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 8, generator=generator, requires_grad=True)
    weight = torch.randn(len(counts), 12, 8, generator=generator, requires_grad=True)
    borders = [0, *torch.tensor(counts).cumsum(0).tolist()]
    plain = torch.cat([x[borders[e] : borders[e + 1]] @ weight[e].T for e in range(len(counts))])
    equal_with_gradients(grouped_linear(x, weight, torch.tensor(counts)), plain, (x, weight))


def test_many_experts_take_the_grouped_kernel():
    torch.manual_seed(0)
    counts = torch.tensor([0, 3, 1] * 16)
    x = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(48, 16, 8, requires_grad=True)
    equal_with_gradients(
        grouped_linear(x, weight, counts), grouped_linear_reference(x, weight, counts), (x, weight), atol=2e-5
    )


def test_an_expert_that_nobody_chose_spoils_nothing():
    """Its weights, or what it makes of tokens it never learnt to serve, need not be finite."""
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(5, 24), torch.randn(4, 32, 24) / 5, torch.randn(4, 24, 16) / 4
    chosen, gates = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]]), torch.rand(5, 2)
    with torch.no_grad():
        sound = serve_few(x, chosen, gates, gate_up, down)
        down[3] = float("inf")
        assert torch.equal(serve_few(x, chosen, gates, gate_up, down), sound)


@pytest.mark.parametrize("rows", [1, 7, LEAST_ROWS, 2 * LEAST_ROWS - 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_few_tokens_are_served_as_many_are(rows, autocast):
    """By every expert, and by those that were chosen: a sum in another order, and rounded twice less in bf16."""
    torch.manual_seed(rows)
    x, gate_up, down = torch.randn(rows, 24), torch.randn(5, 32, 24) / 5, torch.randn(5, 24, 16) / 4
    chosen, gates = torch.rand(rows, 5).topk(2, dim=1).indices, torch.rand(rows, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert few(x, gate_up)
        ours = serve_few(x, chosen, gates, gate_up, down)
        dispatch = plan_dispatch(chosen, 5)
        inner = grouped_linear(scatter_to_experts(x, dispatch, 2), gate_up, dispatch.counts)
        theirs = collect_from_experts(grouped_linear(swiglu(inner), down, dispatch.counts), gates, dispatch)
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = 2**-7 if autocast else 1e-6  # of rows about 1: one step of bf16
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    assert not few(x, gate_up), "gradients are on"
    with torch.no_grad():
        assert not few(x[:0], gate_up)
        assert not few(x.repeat(2 * LEAST_ROWS, 1), gate_up)


def test_more_than_a_few_rows_are_served_at_once_by_small_experts_alone():
    """Large ones would compute too much for those that nobody chose."""
    with torch.no_grad():
        x, large = torch.zeros(LEAST_ROWS - 1, 8), torch.empty(8, 1024, 256, device="meta")
        assert few(x, large)
        assert not few(x.repeat(2, 1)[:LEAST_ROWS], large)
        assert few(x.repeat(2, 1)[:LEAST_ROWS], large[:, :256])


def test_dispatch_and_collect_equal_indexing():
    torch.manual_seed(0)
    x = torch.randn(6, 4, requires_grad=True)
    gates = torch.rand(6, 2, requires_grad=True)
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [1, 2], [0, 2]])
    dispatch = plan_dispatch(chosen, 4)
    assert dispatch.counts.tolist() == [4, 3, 5, 0]
    experts = torch.repeat_interleave(torch.arange(4), dispatch.counts)
    scale = torch.tensor([1.0, -2.0, 3.0, 0.0])
    rows = scatter_to_experts(x, dispatch, 2) * scale[experts].unsqueeze(1)
    ours = collect_from_experts(rows, gates, dispatch)
    theirs = sum(x * scale[chosen[:, k]].unsqueeze(1) * gates[:, k : k + 1] for k in range(2))
    equal_with_gradients(ours, theirs, (x, gates))


def collected(width: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What became of bfloat16 rows, with the gradients of rows and gates, each beside the same in float64."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(600, 8, generator=generator).argsort(1)[:, :3].to(device)
    rows, direction = (torch.randn(n, width, generator=generator).to(device, torch.bfloat16) for n in (1800, 600))
    gates, dispatch = torch.rand(600, 3, generator=generator).to(device), plan_dispatch(chosen, 8)
    mine, theirs = (
        tuple(x.detach().to(wide or x.dtype).requires_grad_() for x in (rows, gates)) for wide in (None, torch.float64)
    )
    out = collect_from_experts(*mine, dispatch)
    wanted = (theirs[0][dispatch.inverse].unflatten(0, (600, 3)) * theirs[1].unsqueeze(2)).sum(1)
    found = (out, *torch.autograd.grad(out, mine, direction))
    return list(zip(found, (wanted, *torch.autograd.grad(wanted, theirs, direction.double())), strict=True))


@pytest.mark.parametrize("width", [8, 1024])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_rows_are_rounded_once_and_gates_never(width, device):
    (out, wanted), (grad_rows, wanted_rows), (grad_gates, wanted_gates) = collected(width, device)
    assert (out.dtype, grad_rows.dtype, grad_gates.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for found, exact in ((out, wanted), (grad_rows, wanted_rows)):
        # half a unit in the last of 8 bits; the sum before it may be off by a few float32 roundings of its terms
        torch.testing.assert_close(found.double(), exact.double(), rtol=2**-8 + 1e-6, atol=1e-6)
    error = (grad_gates - wanted_gates).norm() / wanted_gates.norm()
    assert error < 1e-6  # sums of up to 1024 float32 products; of bfloat16 ones it is 2e-3


@pytest.mark.gpu
def test_grouped_kernel_on_the_accelerator_equals_the_loop():
    torch.manual_seed(0)
    counts = torch.tensor([16, 0, 48, 64], device="cuda")
    x = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4, 32, 64, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(
        grouped_linear(x, weight, counts), grouped_linear_reference(x, weight, counts), atol=0.1, rtol=2e-2
    )  # bf16 sums of 64 terms of size 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 10, 6000])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_all_are_the_same_bits(dtype, rows, off):
    """One block of rows, and several."""
    torch.manual_seed(0)
    x, gain = torch.randn(rows, 192).to(dtype), torch.rand(64, requires_grad=True)
    rotation = Rotation.from_angles(torch.randn(rows, 8))
    chosen, gates = torch.randint(0, 4, (rows, 2)), torch.rand(rows, 2, requires_grad=True)
    weight = torch.randn(4, 8, 192).to(dtype).requires_grad_()

    def everything():
        dispatch = plan_dispatch(chosen, 4)
        sent = scatter_to_experts(x, dispatch, 2)
        served = grouped_linear(sent, weight, dispatch.counts)
        return (
            rms_norm(x, gain.repeat(3), 1e-5, torch.bfloat16),
            *split_heads(x, Heads(1, 1, 64), rotation, gain, gain),
            *split_heads(x, Heads(1, 1, 64), rotation),
            rotate(x.view(rows, 3, 64), rotation),
            swiglu(x),
            sent,
            served,
            collect_from_experts(served, gates, dispatch),
            permute_rows(x, dispatch.order[:rows] % rows, dispatch.inverse[:rows]),
        )

    learning = everything()
    assert learning[0].requires_grad
    with off():
        for ours, theirs in zip(everything(), learning, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0)
            assert not ours.requires_grad
            assert ours.stride() == theirs.stride()


def test_without_gradients_no_function_is_applied(monkeypatch):
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    with torch.no_grad():
        assert swiglu(torch.zeros(2, 4)).shape == (2, 2)
        assert rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-5).shape == (2, 4)
