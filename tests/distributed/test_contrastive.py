"""The ring's sigmoid loss equals one process that holds the whole batch, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmagent import dist
from mmagent.losses import contrastive
from mmagent.losses.contrastive import sigmoid_loss
from tests.alignment_kit import plain_loss

SIZES = {
    1: [[5]],
    2: [[3, 4], [0, 3]],
    3: [[1, 4, 2], [2, 0, 3]],
    4: [[2, 1, 3, 2], [0, 0, 4, 1], [1, 5, 0, 2]],
    5: [[1, 2, 1, 3, 1]],
    6: [[1, 2, 0, 3, 1, 2]],
}
"""Pairs a rank, by the number of ranks; some ranks bring none."""


def features(total: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(total, 6, generator=generator, dtype=dtype) for _ in range(2)]
    return [*rows, torch.tensor(10.0, dtype=dtype).log(), torch.tensor(-10.0, dtype=dtype)]


def loss_and_gradients(loss, leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(F.normalize(leaves[0], dim=-1), F.normalize(leaves[1], dim=-1), *leaves[2:])
    value = value if isinstance(value, torch.Tensor) else value.total
    value.backward()
    return [value.item(), *(leaf.grad for leaf in leaves)]


def ring(world: dist.World, splits: list[list[int]]):
    found = []
    for sizes in splits:
        images, texts, *temperature = features(sum(sizes))
        leaves = [images.split(sizes)[world.rank], texts.split(sizes)[world.rank], *temperature]
        found.append(loss_and_gradients(sigmoid_loss, leaves))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6])
def test_ring_equals_one_process(world):
    """Up to the order of float32 sums: some ten terms each, of which the largest is near 10."""
    outcomes = dist.run_ranks(ring, world, SIZES[world])
    for n, sizes in enumerate(SIZES[world]):
        expected = loss_and_gradients(plain_loss, features(sum(sizes)))
        ranks = [outcome[n] for outcome in outcomes]
        assert sum(r[0] for r in ranks) == pytest.approx(expected[0], rel=1e-5)
        for field in (1, 2):  # each rank owns the gradient of its own rows
            torch.testing.assert_close(torch.cat([r[field] for r in ranks]), expected[field], rtol=1e-4, atol=1e-6)
        for field in (3, 4):  # shared parameters: the gradient is the sum over ranks
            torch.testing.assert_close(sum(r[field] for r in ranks), expected[field], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 20, 1 << 24])
def test_blocks_equal_the_whole_matrix(block, monkeypatch):
    """Blocks of single rows, of rows that do not divide the whole, and one block."""
    monkeypatch.setattr(contrastive, "BLOCK_VALUES", block)
    for got, wanted in zip(
        loss_and_gradients(sigmoid_loss, features(9)), loss_and_gradients(plain_loss, features(9)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_value(monkeypatch):
    """By finite differences in float64, over several blocks."""
    monkeypatch.setattr(contrastive, "BLOCK_VALUES", 10)
    leaves = [leaf.requires_grad_() for leaf in features(5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *given: sigmoid_loss(*given).total * 0.5, leaves)


def test_it_computes_in_float32_under_autocast_and_from_bfloat16():
    leaves = features(9)
    narrow = [leaves[0].bfloat16(), leaves[1].bfloat16(), *leaves[2:]]
    with torch.autocast("cpu", torch.bfloat16):
        got = sigmoid_loss(*(leaf.requires_grad_() for leaf in narrow))
    wanted = plain_loss(narrow[0].float(), narrow[1].float(), *leaves[2:])
    torch.testing.assert_close(got.total, wanted, rtol=1e-5, atol=0.0)
    got.total.backward()
    assert narrow[0].grad.dtype == torch.bfloat16


def test_nothing_is_kept_where_nothing_learns():
    with torch.no_grad():
        assert not sigmoid_loss(*(leaf.requires_grad_() for leaf in features(3))).total.requires_grad


def test_an_image_finds_its_text_and_equal_texts_are_its_own():
    images = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.2, 1.0], [1.0, 0.3]]), dim=-1)
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    scale, bias = torch.tensor(10.0).log(), torch.tensor(-10.0)
    assert sigmoid_loss(images, texts, scale, bias).found.tolist() == [True, True, True, False]


def test_unequal_pairs_cannot_match():
    with pytest.raises(ValueError, match="2 images cannot match 4 texts"):
        sigmoid_loss(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(()), torch.zeros(()))


def memory(world: dist.World, pairs: int) -> int:
    """The most values that tensors of one call's graph hold on to."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    images, texts, *temperature = features(pairs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sigmoid_loss(images.requires_grad_(), texts.requires_grad_(), *temperature)
    return kept


def test_the_graph_holds_gradients_of_own_rows_only():
    """Two of (I, E): neither the I x J logits nor what came round the ring."""
    assert dist.run_ranks(memory, 3, 50) == [2 * 50 * 6] * 3
