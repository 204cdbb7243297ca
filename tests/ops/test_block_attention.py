"""Attention by blocks against a softmax a row, written out."""

from __future__ import annotations

import pytest
import torch

from mmagent.ops.block_attention import block_attention, block_ids, block_masks
from mmagent.types import Segments


def test_responses_are_cut_from_their_first_token_and_others_stand_alone():
    response = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    assert block_ids(response, 2).tolist() == [0, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7]
    assert block_ids(response, 1).tolist() == list(range(11))
    assert block_ids(response, 9).tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 5]
    assert block_ids(response[:0], 4).tolist() == []
    with pytest.raises(ValueError, match="at least one token"):
        block_ids(response, 0)


def test_blocks_of_one_token_are_causal_attention():
    (mask,) = block_masks(Segments([6]), torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(mask, torch.ones(6, 6, dtype=torch.bool).tril())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_see_what_they_should_and_nothing_else(dtype):
    """Every entry of three segments asked by itself; gradients as well."""
    torch.manual_seed(0)
    segments = Segments([7, 1, 9])
    blocks = torch.tensor([0, 1, 1, 2, 1, 1, 2, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2])
    copies = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    q, k, v = (torch.randn(17, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    out = block_attention(q, k, v, block_masks(segments, blocks, copies))
    assert out.dtype == dtype
    wanted, owner = [], segments.ids().tolist()
    b, c = blocks.tolist(), copies.tolist()
    for i in range(17):
        seen = []
        for j in range(17):
            own = c[i] == c[j] and b[i] == b[j]
            past = c[j] == 0 and b[j] < b[i]
            seen.append(owner[i] == owner[j] and (own or past))
        rows = []
        for head in range(4):
            scores = (k[seen, head // 2].float() @ q[i, head].float()) / 8**0.5
            rows.append(scores.softmax(0) @ v[seen, head // 2].float())
        wanted.append(torch.stack(rows))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(out, torch.stack(wanted).to(dtype), **close)
    weight = torch.randn(17, 4, 8)
    got = torch.autograd.grad((out.float() * weight).sum(), (q, k, v), retain_graph=True)
    right = torch.autograd.grad((torch.stack(wanted) * weight).sum(), (q, k, v))
    for mine, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * close["rtol"], atol=10 * close["atol"])


def test_streams_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="segments of 3 tokens"):
        block_masks(Segments([3]), torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    masks = block_masks(Segments([3]), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="masks of 3 tokens for 4 queries"):
        block_attention(*(torch.zeros(4, 2, 8) for _ in range(3)), masks)
