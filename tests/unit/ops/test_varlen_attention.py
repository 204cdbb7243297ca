"""Packed attention equals its dense reference, forward and backward, whatever the segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagent.ops.attention import _plan, varlen_attention, varlen_attention_reference
from mmagent.types import Segments


def inputs(total: int, heads: int, groups: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    generator = torch.Generator().manual_seed(total)
    shapes = ((total, heads, width), (total, groups, width), (total, groups, width))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def check(lengths, heads, groups, causal, scale=None, tolerance=2e-5):
    q, k, v = inputs(sum(lengths), heads, groups, 8)
    segments = Segments(lengths)
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (varlen_attention, varlen_attention_reference):
        out = function(q, k, v, segments, causal, scale)
        results.append((out, *torch.autograd.grad((out * direction).sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-4)  # fp32, sums of at most 40 terms


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    grouped=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    causal=st.booleans(),
)
def test_equals_reference(lengths, grouped, causal):
    check(lengths, *grouped, causal)


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 9, 3, 9, 3, 9], [1, 2, 3, 4, 5]])
def test_every_plan_equals_reference(lengths):
    check(lengths, 2, 2, causal=True, scale=0.3)


def test_alternating_lengths_are_gathered_into_one_call_a_length():
    plan = _plan((3, 9, 3, 9, 3, 9), 0.0)
    assert [(batch.count, batch.length) for batch in plan.batches] == [(3, 9), (3, 3)]
    assert _plan((3, 3, 9, 9), 0.0).inverse is None


def test_similar_lengths_share_a_call_within_the_padding_they_may_cost():
    plan = _plan((100, 95, 50, 98, 49, 100, 92), 0.1)
    assert [(batch.count, batch.length) for batch in plan.batches] == [(5, 100), (2, 50)]
    assert [len(batch.places) for batch in plan.batches] == [100 + 100 + 98 + 95 + 92, 50 + 49]


def test_a_neighbour_cannot_be_seen():
    q, k, v = inputs(10, 2, 2, 4)
    with torch.no_grad():
        before = varlen_attention(q, k, v, Segments([6, 4]), causal=False)
        v[6:], k[6:] = 100.0, -50.0
        after = varlen_attention(q, k, v, Segments([6, 4]), causal=False)
    assert torch.equal(before[:6], after[:6])


@pytest.mark.parametrize(
    "lengths", [[6] * 4, [9, 8, 9, 3, 4, 4, 9], [1, 2, 30, 31, 29, 3], [600], [5, 530, 9, 520, 530, 7]]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
def test_bf16_paths_stay_within_rounding(lengths, causal, groups):
    q, k, v = inputs(sum(lengths), 4, groups, 8, torch.bfloat16)
    segments, results = Segments(lengths), []
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    for function in (varlen_attention, varlen_attention_reference):
        out = function(q, k, v, segments, causal)
        assert out.dtype == torch.bfloat16
        results.append((out, *torch.autograd.grad((out.float() * direction).sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        # scores, weights and results are each rounded at 2**-8; logits of size 3 make that 3 * 2**-8 in a weight
        torch.testing.assert_close(ours, theirs, atol=4e-2, rtol=4e-2)


def test_padding_of_a_batch_carries_no_gradient():
    """Rows that only fill a batch repeat a real row; their gradient must not be added to it."""
    q, k, v = inputs(19, 2, 2, 8, torch.bfloat16)
    for causal in (True, False):
        grads = []
        for segments in (Segments([10, 9]), None):
            if segments is not None:
                out = varlen_attention(q, k, v, segments, causal)[10:]
            else:
                out = varlen_attention(q[10:], k[10:], v[10:], Segments([9]), causal)
            grads.append(torch.autograd.grad(out.float().sum(), (q, k, v)))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)


def test_shapes_that_disagree_are_refused_with_both_counts():
    q, k, v = inputs(9, 2, 1, 8)
    with pytest.raises(ValueError, match="segments of 8"):
        varlen_attention(q, k, v, Segments([4, 4]), causal=True)
    with pytest.raises(ValueError, match="cannot share"):
        varlen_attention(q[:, :1], torch.cat([k, k], 1), torch.cat([v, v], 1), Segments([9]), causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_flash_kernel_equals_reference(causal):
    lengths = [5, 64, 3, 17]
    q, k, v = inputs(sum(lengths), 4, 2, 64, torch.bfloat16, "cuda")
    segments = Segments(lengths, "cuda")
    out = varlen_attention(q, k, v, segments, causal)
    wanted = varlen_attention_reference(q, k, v, segments, causal)
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)  # the kernel accumulates weights in bf16
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
