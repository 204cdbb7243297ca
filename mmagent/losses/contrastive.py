"""SigLIP's sigmoid loss between images and texts (arXiv 2303.15343), on one process or round a ring of ranks.

Its gradients are known in closed form, so they are computed together with the loss, over blocks of
rows: the matrix of all pairs never exists whole, and the backward pass neither computes nor communicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmagent import dist

BLOCK_VALUES = 1 << 24
"""Logits that exist at one time (64 MiB in float32, and as much again while they are summed up)."""


class PairGradients(NamedTuple):
    """The sigmoid loss of this rank's images, and the gradients of the loss of *all* ranks' images by what is here.

    ``losses (I,)`` over the texts of all ranks; ``found (I,)`` whether no text of any rank is nearer to an image than
    its own, up to rounding; gradients by ``images (I, E)``, ``texts (I, E)``, and this rank's share of those by
    ``log_scale ()`` and ``bias ()``: zeros where none were asked for.
    """

    losses: Tensor
    found: Tensor
    images: Tensor
    texts: Tensor
    log_scale: Tensor
    bias: Tensor

    @property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images, self.texts, self.log_scale, self.bias


class SigmoidLoss(NamedTuple):
    """``total ()`` with gradient; per image of this rank, detached, ``losses (I,)`` and ``found (I,)``: whether no text
    of any rank is nearer to it than its own."""

    total: Tensor
    losses: Tensor
    found: Tensor


class _Pairs:
    """This rank's images, and what meeting one block of texts after another adds up to."""

    def __init__(self, images: Tensor, log_scale: Tensor, bias: Tensor, learning: bool):
        dtype = torch.promote_types(images.dtype, torch.float32)
        self.images, self.learning = images.to(dtype), learning
        self.scale, self.bias = log_scale.to(dtype).exp().reshape(()), bias.to(dtype).reshape(())
        self.losses, self.own = self.images.new_zeros(len(images)), self.images.new_zeros(len(images))
        self.best = torch.full_like(self.losses, -torch.inf)
        self.gradient = torch.zeros_like(self.images)
        self.bias_gradient = torch.zeros((), dtype=torch.float64, device=images.device)

    def meet(self, texts: Tensor, matched: bool) -> Tensor:
        """The gradient by ``texts (J, E)``. With ``z`` 1 for matching pairs and -1 for others, a pair of logit ``x``
        costs ``softplus(-z x)``; the slope of that is ``sigmoid(x)``, less one where they match."""
        texts = texts.to(self.images.dtype)
        gradient = torch.zeros_like(texts)
        rows = max(BLOCK_VALUES // max(len(texts), 1), 1)
        for at in range(0, len(self.images) if len(texts) else 0, rows):
            part = slice(at, at + rows)
            scaled = self.images[part] * self.scale
            logits = scaled @ texts.T + self.bias
            self.losses[part] += F.softplus(logits).sum(dim=1)  # every pair as a negative, ...
            self.best[part] = torch.maximum(self.best[part], logits.amax(dim=1))
            if matched:
                self.own[part] = logits.diagonal(at)
                self.losses[part] -= self.own[part]  # softplus(-x) = softplus(x) - x
            if not self.learning:
                continue
            slope = logits.sigmoid_()
            if matched:
                slope.diagonal(at).sub_(1.0)
            self.gradient[part].addmm_(slope, texts)
            gradient.addmm_(slope.T, scaled)
            self.bias_gradient += slope.sum(dtype=torch.float64)
        return gradient

    def end(self, texts: Tensor) -> PairGradients:
        """With ``texts``, the gradient by this rank's texts."""
        slack = 1e-5 * self.scale + 1e-5  # equal texts may differ by rounding from block to block
        images = self.gradient * self.scale
        by_scale = (images.double() * self.images.double()).sum()  # the sum of slope * (logit - bias) over all pairs
        kind = self.images.dtype
        found = self.own + slack >= self.best
        return PairGradients(self.losses, found, images, texts, by_scale.to(kind), self.bias_gradient.to(kind))


@dataclass
class _Way:
    """Texts that travel one way round the ring, for ``reach`` hops, with the gradient that ranks have given them."""

    step: int  # -1: always to the left neighbour, 1: to the right one
    reach: int
    block: Tensor
    gradient: Tensor


@torch.no_grad()
def sigmoid_gradients(
    images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, learning: bool = True
) -> PairGradients:
    """The sigmoid loss of this rank's ``images (I, E)`` over the texts of *all* ranks, and its gradients.

    ``texts (I, E)`` match the images one to one, all of unit length; ``log_scale`` and ``bias`` hold one value each.
    Each rank keeps its images; its texts travel both ways round the ring, so that after ``size // 2`` hops every rank
    has met all texts, while holding two foreign blocks and the two that come next. The gradient of a block follows one
    hop behind, gathers what each rank adds, and at last goes home: so what moves, moves while pairs are computed.
    Received blocks are negatives only. Ranks may bring different numbers of pairs, even none, but every rank must call
    this equally often. Raises ``ValueError`` for unequal numbers of images and texts.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images cannot match {len(texts)} texts one to one")
    with torch.autocast(images.device.type, enabled=False):
        pairs = _Pairs(images, log_scale, bias, learning)
        texts = texts.to(pairs.images.dtype).contiguous()
        sizes = dist.gather_ints(len(texts), texts.device)
        world, rank = len(sizes), dist.rank()
        # on an even ring the opposite rank's block is met once, coming from the right
        ways = [_Way(-1, world // 2, texts, texts[:0]), _Way(1, (world - 1) // 2, texts, texts[:0])]
        own = texts[:0]
        for hop in range(world // 2 + 1):
            moves = _Moves(rank, world)
            coming = {}
            for way in ways:
                if hop < way.reach:
                    rows = sizes[(rank - way.step * (hop + 1)) % world]
                    coming[way.step] = moves.pass_on(way.block, way.step, rows)
            before = {
                way.step: moves.pass_on(way.gradient, way.step, len(way.block))
                for way in ways
                if learning and 2 <= hop <= way.reach
            }
            with dist.exchanging(moves.sends, moves.receives):
                if hop == 0:
                    own = pairs.meet(texts, matched=True)
                for way in ways:
                    if 0 < hop <= way.reach:
                        way.gradient = pairs.meet(way.block, matched=False)
            for way in ways:
                if way.step in before:
                    way.gradient += before[way.step]
                way.block = coming.get(way.step, way.block)
        if learning:
            moves = _Moves(rank, world)
            returned = [moves.pass_on(w.gradient, -w.step * w.reach, len(texts)) for w in ways if w.reach]
            dist.exchange(moves.sends, moves.receives)
            own = sum(returned, own)
    return pairs.end(own)


class _Moves:
    """What one exchange between ranks sends and receives. Blocks without rows stay where they are."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.sends: list[tuple[Tensor, int]] = []
        self.receives: list[tuple[Tensor, int]] = []

    def pass_on(self, block: Tensor, step: int, rows: int) -> Tensor:
        """Hand ``block`` to the rank ``step`` further on; the buffer for the ``rows`` that come from the other side."""
        buffer = block.new_empty(rows, *block.shape[1:])
        if len(block):
            self.sends.append((block, (self.rank + step) % self.world))
        if rows:
            self.receives.append((buffer, (self.rank - step) % self.world))
        return buffer


def sigmoid_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> SigmoidLoss:
    """The sum over this rank's images and the texts of *all* ranks: see :func:`sigmoid_gradients`.

    Summed over ranks, value and gradient equal those of one process with the whole batch.
    """
    tensors = (images, texts, log_scale, bias)
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    found = sigmoid_gradients(images, texts, log_scale, bias, learning)
    total = prescribed(found.losses.sum(), tensors, found.gradients) if learning else found.losses.sum()
    return SigmoidLoss(total, found.losses, found.found)


def prescribed(value: Tensor, tensors: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """``value ()`` with, as its gradient by each of ``tensors``, that of ``gradients`` (of as many values)."""
    return _Prescribed.apply(value, gradients, *tensors)


class _Prescribed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        pairs = zip(gradients, tensors, strict=True)
        ctx.save_for_backward(*(g.reshape(t.shape).to(t.dtype) if t.requires_grad else None for g, t in pairs))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else (by_value * g).to(g.dtype) for g in ctx.saved_tensors)
