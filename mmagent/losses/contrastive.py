"""Losses between images and texts: SigLIP's sigmoid loss (arXiv 2303.15343), on one process or round a ring of ranks,
and the classification of a caption's words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent import dist
from mmagent.types import Segments


def sigmoid_pairs(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, *, matched: bool) -> Tensor:
    """Sum of ``-log sigmoid(z (exp(log_scale) <image, text> + bias))`` over all pairs, in float32.

    ``images (I, E)`` and ``texts (J, E)`` of unit length. ``z`` is 1 where image ``i`` meets text ``i`` and
    ``matched`` is true, else -1.
    """
    if matched and images.shape[0] != texts.shape[0]:
        raise ValueError(f"{images.shape[0]} images cannot match {texts.shape[0]} texts one to one")
    logits = images.float() @ texts.float().T * log_scale.float().exp() + bias.float()
    loss = F.softplus(logits).sum()  # every pair as a negative, ...
    return loss - logits.diagonal().sum() if matched else loss  # softplus(-x) = softplus(x) - x


def sigmoid_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """The sum over this rank's images and the texts of *all* ranks: ``(I, E), (I, E), (), () -> ()``.

    Each rank keeps its images; texts travel both ways round the ring, so that after ``size // 2`` exchanges every rank
    has met them all, and never holds more than two foreign blocks. Received blocks are negatives only. Gradients travel
    the same way back: summed over ranks, value and gradient equal those of one process with the whole batch. Ranks may
    bring different numbers of pairs, but every rank must call this equally often.
    """
    loss = sigmoid_pairs(images, texts, log_scale, bias, matched=True)
    sizes = dist.gather_ints(texts.shape[0], texts.device)
    world, rank = len(sizes), dist.rank()
    leftward = rightward = texts  # the blocks to hand to the left and to the right neighbour
    for hop in range(1, world // 2 + 1):
        from_right, from_left = (rank + hop) % world, (rank - hop) % world  # whose blocks arrive now
        if from_right == from_left:  # an even ring: the opposite rank's block is met once
            (leftward,) = _Ring.apply(((-1, sizes[from_right]),), leftward)
            loss = loss + sigmoid_pairs(images, leftward, log_scale, bias, matched=False)
        else:
            steps = ((-1, sizes[from_right]), (1, sizes[from_left]))
            leftward, rightward = _Ring.apply(steps, leftward, rightward)
            for block in (leftward, rightward):
                loss = loss + sigmoid_pairs(images, block, log_scale, bias, matched=False)
    return loss


def word_loss(logits: Tensor, text_ids: Tensor, segments: Segments) -> Tensor:
    """Sum over images of the cross-entropy between ``logits (I, V)`` and the caption's words: ``()``, in float32.

    The target of an image shares its mass evenly over the distinct ids of its caption, the closing end left out; an
    empty caption adds nothing (SuperClass, arXiv 2411.03313, without its weights by rarity).
    """
    inner = torch.ones_like(text_ids, dtype=torch.bool)
    inner[segments.cu_seqlens[1:].long() - 1] = False
    targets = logits.new_zeros(logits.shape, dtype=torch.float32)
    targets[segments.ids()[inner], text_ids[inner]] = 1.0
    targets = targets / targets.sum(dim=1, keepdim=True).clamp_min(1.0)
    return -(targets * logits.float().log_softmax(dim=1)).sum()


class _Ring(torch.autograd.Function):
    """Hands blocks to neighbours, and in the backward pass their gradients back to where they came from.

    ``steps`` holds ``(direction, rows that arrive)`` for every block: -1 sends to the left neighbour and receives from
    the right one. One node moves both directions, so all ranks communicate in one order in both passes.
    """

    @staticmethod
    def forward(ctx: Any, steps: tuple[tuple[int, int], ...], *blocks: Tensor) -> tuple[Tensor, ...]:
        ctx.back = tuple((-direction, block.shape[0]) for (direction, _), block in zip(steps, blocks, strict=True))
        return _shift(steps, blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, *_shift(ctx.back, gradients))


def _shift(steps: tuple[tuple[int, int], ...], blocks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rank, world = dist.rank(), dist.size()
    received = tuple(
        torch.empty(rows, *block.shape[1:], dtype=block.dtype, device=block.device)
        for (_, rows), block in zip(steps, blocks, strict=True)
    )
    sends = [(block, (rank + way) % world) for (way, _), block in zip(steps, blocks, strict=True)]
    dist.exchange(sends, [(buffer, (rank - way) % world) for (way, _), buffer in zip(steps, received, strict=True)])
    return received
