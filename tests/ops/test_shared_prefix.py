"""Attention with shared prefixes equals attention over the documents written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagent.ops.attention import varlen_attention_reference
from mmagent.ops.shared_prefix import shared_prefix_attention
from mmagent.types import Segments


def written_out(x: torch.Tensor, segments: Segments, prefix_of: tuple[int, ...]) -> tuple[torch.Tensor, Segments]:
    """Every segment with its prefix before it."""
    parts = x.split(segments.lengths)
    whole = [torch.cat([parts[p], own]) if p >= 0 else own for own, p in zip(parts, prefix_of, strict=True)]
    return torch.cat(whole), Segments([w.shape[0] for w in whole])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 5), max_size=4)), min_size=1, max_size=4))
def test_it_equals_the_documents_written_out(groups):
    lengths, prefix_of = [], []
    for prefix, branches in groups:
        at = len(lengths)
        lengths += [prefix, *branches]
        prefix_of += [-1, *[at] * len(branches)]
    segments = Segments(lengths)
    torch.manual_seed(0)
    q, k, v = (torch.randn(segments.total, h, 8, requires_grad=True) for h in (4, 2, 2))
    out = shared_prefix_attention(q, k, v, segments, tuple(prefix_of))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    found = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None

    (long_q, long), (long_k, _), (long_v, _) = (written_out(x, segments, tuple(prefix_of)) for x in (q, k, v))
    whole = varlen_attention_reference(long_q, long_k, long_v, long, causal=True)
    own = [
        whole[end - n : end] for n, end in zip(segments.lengths, long.offsets()[1:], strict=True)
    ]  # the last n rows of every document are the segment itself
    expected = torch.cat(own)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    expected.backward(upstream)
    for x, gradient in zip((q, k, v), found, strict=True):
        torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-5)


def test_what_does_not_stand_together_is_refused():
    q, k = torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    with pytest.raises(ValueError, match="segment 2 shares the prefix 0"):
        shared_prefix_attention(q, k, k, Segments([2, 2, 2]), (-1, -1, 0))
    with pytest.raises(ValueError, match="2 prefixes, 3 segments"):
        shared_prefix_attention(q, k, k, Segments([2, 2, 2]), (-1, 0))
