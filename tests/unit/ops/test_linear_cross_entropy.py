"""The chunked head equals the plain one, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagent.ops.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    selected_logprobs,
    selected_logprobs_reference,
)
from mmagent.types import IGNORE


def problem(rows: int, ignored: int, seed: int = 0, vocabulary: int = 17, width: int = 8):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.randperm(rows, generator=generator)[:ignored]] = IGNORE
    return hidden, weight, targets


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), share=st.floats(0, 1), chunk=st.integers(1, 40), seed=st.integers(0, 99))
def test_equals_reference_for_any_chunk(rows, share, chunk, seed):
    hidden, weight, targets = problem(rows, int(share * rows), seed)
    ours = linear_cross_entropy(hidden, weight, targets, chunk)
    theirs = linear_cross_entropy_reference(hidden, weight, targets)
    torch.testing.assert_close(ours.total, theirs, atol=1e-4, rtol=1e-5)  # fp32 sums in another order
    gradients = [torch.autograd.grad(loss * 0.7, (hidden, weight)) for loss in (ours.total, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert int(ours.count) == int((targets != IGNORE).sum())
    torch.testing.assert_close(ours.losses.sum(), theirs, atol=1e-4, rtol=1e-5)
    wanted = torch.where(targets == IGNORE, IGNORE, (hidden @ weight.T).argmax(-1))
    assert torch.equal(ours.predictions, wanted)


def test_gradcheck_in_double_precision_of_logits():
    hidden, weight, targets = problem(5, 1)
    ours = linear_cross_entropy(hidden, weight, targets).total
    step = 1e-2
    slope = torch.autograd.grad(ours, weight)[0]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        high = linear_cross_entropy_reference(hidden.double(), (weight + step * direction).double(), targets)
        low = linear_cross_entropy_reference(hidden.double(), (weight - step * direction).double(), targets)
    numeric = (high - low) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), numeric.float(), atol=1e-2, rtol=1e-3)  # error O(step**2)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = problem(6, 2)
    linear_cross_entropy(hidden, weight.detach(), targets).total.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).total.requires_grad


def test_nothing_supervised_is_zero_with_zero_gradient():
    hidden, weight, targets = problem(4, 4)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.total.backward()
    assert float(loss.total) == 0
    assert float(hidden.grad.abs().sum()) == float(weight.grad.abs().sum()) == 0


def test_targets_outside_the_vocabulary_are_refused():
    hidden, weight, targets = problem(4, 0)
    with pytest.raises(ValueError, match="vocabulary of 17"):
        linear_cross_entropy(hidden, weight, targets + 17)


def test_bf16_autocast_stays_near_fp32():
    hidden, weight, targets = problem(64, 8, width=32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets).total
    ours.backward()
    theirs = linear_cross_entropy_reference(hidden, weight, targets)
    assert abs(float(ours - theirs)) < 2e-2 * float(theirs)  # logits carry 2**-8 relative error each
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_selected_logprobs_and_entropy_equal_reference(temperature):
    hidden, weight, targets = problem(23, 5)
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randn(23, generator=generator), torch.randn(23, generator=generator)
    results = []
    for function in (
        lambda: selected_logprobs(hidden, weight, targets, temperature, chunk=4),
        lambda: selected_logprobs_reference(hidden, weight, targets, temperature),
    ):
        logprobs, entropy = function()
        gradients = torch.autograd.grad((a * logprobs + b * entropy).sum(), (hidden, weight))
        results.append((logprobs, entropy, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_barred_ids_have_no_probability():
    hidden, weight, targets = problem(12, 0)
    targets = targets.clamp(min=2)
    logprobs, entropy = selected_logprobs(hidden, weight, targets, barred_ids=(0, 1))
    wanted, wanted_entropy = selected_logprobs_reference(hidden, weight[2:], targets - 2)
    torch.testing.assert_close(logprobs, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, wanted_entropy, atol=1e-5, rtol=1e-5)
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad.isfinite().all()
    assert float(weight.grad[:2].abs().sum()) == 0


def test_temperature_zero_is_refused():
    hidden, weight, targets = problem(3, 0)
    with pytest.raises(ValueError, match="temperature"):
        selected_logprobs(hidden, weight, targets, 0.0)
