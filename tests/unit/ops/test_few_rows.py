"""A few rows are multiplied from the other side, and nobody can tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmagent.ops import few_rows
from mmagent.ops.few_rows import SOME, batched_linear, linear


@pytest.mark.parametrize("rows", range(SOME + 2))
@pytest.mark.parametrize("high", [24, 320])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_product_of_torch(rows, high, biased):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 32), torch.randn(high, 32) / 6
    bias = torch.randn(high) if biased else None
    with torch.no_grad():
        ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    x.requires_grad_()
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", range(SOME + 2))
def test_so_is_each_of_several(rows):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 3, 32).transpose(0, 1), torch.randn(3, 24, 32) / 6
    with torch.no_grad():
        theirs = torch.bmm(x, weight.transpose(1, 2))
        torch.testing.assert_close(batched_linear(x, weight), theirs, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert batched_linear(x, weight).dtype == torch.bfloat16
    weight.requires_grad_()
    batched_linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(1).unsqueeze(1).expand_as(weight), rtol=1e-5, atol=1e-5)


def test_the_matrix_is_on_the_left_for_few_rows_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(few_rows, "NARROW", 8)
    monkeypatch.setattr(F, "linear", lambda x, *rest: asked.append(tuple(x.shape)) or torch.zeros(()))
    with torch.no_grad():
        for rows in (1, 2, 3, 4, 8, 9):
            for high, wide in ((16, 8), (32, 16), (128, 16)):
                linear(torch.zeros(rows, wide), torch.zeros(high, wide))
        linear(torch.zeros(1, 2, 8), torch.zeros(16, 8))
    assert asked == [(1, 8), (1, 16), (1, 16), (4, 16), (8, 16), (9, 8), (9, 16), (9, 16), (1, 2, 8)]
    linear(torch.zeros(2, 8), torch.zeros(16, 8))
    assert asked[-1] == (2, 8), "gradients are on"
