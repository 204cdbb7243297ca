"""The ring's sigmoid loss equals one process that holds the whole batch, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmagent import dist
from mmagent.losses.contrastive import sigmoid_loss, sigmoid_pairs

SIZES = {1: [5], 2: [3, 4], 3: [1, 4, 2], 4: [2, 1, 3, 2], 5: [1, 2, 1, 3, 1]}


def features(total: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(total, 6, generator=generator), torch.randn(total, 6, generator=generator)


def loss_and_gradients(images, texts):
    leaves = [images.clone(), texts.clone(), torch.tensor(10.0).log(), torch.tensor(-10.0)]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = sigmoid_loss(F.normalize(leaves[0], dim=-1), F.normalize(leaves[1], dim=-1), leaves[2], leaves[3])
    loss.backward()
    return [loss.item(), *(leaf.grad.tolist() for leaf in leaves)]


def ring(world: dist.World, sizes: list[int]):
    images, texts = features(sum(sizes))
    return loss_and_gradients(images.split(sizes)[world.rank], texts.split(sizes)[world.rank])


def test_pairs_equal_the_plain_formula():
    images, texts = (F.normalize(x, dim=-1) for x in features(4))
    expected = 0.0
    for i in range(4):
        for j in range(4):
            logit = 10.0 * float(images[i] @ texts[j]) - 10.0
            expected -= float(F.logsigmoid(torch.tensor(logit if i == j else -logit)))
    scale, bias = torch.tensor(10.0).log(), torch.tensor(-10.0)
    assert sigmoid_pairs(images, texts, scale, bias, matched=True).item() == pytest.approx(expected, rel=1e-5)


def test_unequal_pairs_cannot_match():
    with pytest.raises(ValueError, match="cannot match"):
        sigmoid_pairs(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(()), torch.zeros(()), matched=True)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_ring_equals_one_process(world):
    sizes = SIZES[world]
    expected = loss_and_gradients(*features(sum(sizes)))
    ranks = dist.run_ranks(ring, world, sizes)
    assert sum(r[0] for r in ranks) == pytest.approx(expected[0], rel=1e-5)
    for field in (1, 2):  # each rank owns the gradient of its own rows
        together = torch.cat([torch.tensor(r[field]) for r in ranks])
        assert torch.allclose(together, torch.tensor(expected[field]), rtol=1e-4, atol=1e-6)
    for field in (3, 4):  # shared parameters: the gradient is the sum over ranks
        assert sum(r[field] for r in ranks) == pytest.approx(expected[field], rel=1e-4)
