"""The sigmoid loss over large batches: how time and memory grow with the batch, against the formula written plainly.

`whole matrix`: the loss over all pairs at once, left to autograd. `one graph`: the same two towers over the whole step
as one batch, with that loss; ours takes micro-batches of 16 pairs, and the negatives of the whole step all the same.
`own micro-batch`: ours with the negatives of a micro-batch only, which spares the second forward. `all-gather`: two
ranks that gather all texts with gradient, and each holds its rows of the matrix. Both sides of a row compute the same
loss and gradient, but for `own micro-batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor

from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.losses.contrastive import sigmoid_loss
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.text_tower import TextTower, TextTowerConfig
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.train.step import train_step
from mmagent.types import PackedVision, PairedBatch, Ratio, Segments
from tools.benchmarks.memory import peak_memory
from tools.benchmarks.row import Row, Settings, smaller_is_better, throughput

WIDTH, WORDS, LENGTH, SIDE, MICRO = 512, 1024, 16, 8, 16


def whole_matrix(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
    """The formula of arXiv 2303.15343; image ``i`` matches text ``first + i``."""
    logits = images @ texts.T * log_scale.exp() + bias
    signs = -torch.ones_like(logits)
    signs.diagonal(first).fill_(1.0)
    return -F.logsigmoid(signs * logits).sum()


def embeddings(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [F.normalize(torch.randn(count, WIDTH, generator=generator), dim=-1) for _ in range(2)]
    return [x.requires_grad_() for x in (*rows, torch.tensor(10.0).log(), torch.tensor(-10.0))]


def differentiated(leaves: list[Tensor], loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward and backward, which returns the loss and its gradients."""

    def call() -> tuple[Tensor, ...]:
        value = loss(*leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return call


def compare(mine: Callable[[], tuple[Tensor, ...]], peer: Callable[[], tuple[Tensor, ...]]) -> None:
    """A comparison of speed is void unless both sides compute the same."""
    for got, wanted in zip(mine(), peer(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def loss_rows(settings: Settings) -> Iterator[Row]:
    for count in (64,) if settings.quick else (1024, 2048, 4096, 8192):
        leaves = embeddings(count)
        mine = differentiated(leaves, lambda *given: sigmoid_loss(*given).total)
        peer = differentiated(leaves, whole_matrix)
        compare(mine, peer)
        name = f"loss of {count} pairs"
        yield throughput(name, mine, peer, "whole matrix", count**2 / 1e6, "M pairs/s", settings)
        yield smaller_is_better(f"{name}: peak", peak_memory(mine), peak_memory(peer), "whole matrix", "MiB")


# ---------------------------------------------------------------------------------------------- whole steps


class OneGraph(Alignment):
    """The same towers; the loss over the whole matrix of one batch, left to autograd."""

    def _contrast(self, batch: PairedBatch, tensors: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Ratio]]:
        return whole_matrix(*tensors), {}


def batch_of(numbers: range) -> PairedBatch:
    generator = torch.Generator().manual_seed(numbers.start)
    grids = torch.tensor([[1, SIDE, SIDE]]).expand(len(numbers), 3).contiguous()
    patches = torch.randn(len(numbers) * SIDE * SIDE, CogViTConfig().patch_values, generator=generator)
    ids = torch.randint(WORDS, (len(numbers) * LENGTH,), generator=generator)
    return PairedBatch(PackedVision(patches, grids), ids, Segments([LENGTH] * len(numbers)), tuple(map(str, numbers)))


def joined(batches: list[PairedBatch]) -> PairedBatch:
    return PairedBatch(
        PackedVision(torch.cat([b.vision.patches for b in batches]), torch.cat([b.vision.grids for b in batches])),
        torch.cat([b.text_ids for b in batches]),
        Segments([n for b in batches for n in b.segments.lengths]),
        tuple(key for b in batches for key in b.keys),
    )


def stepper(kind: type[Alignment], negatives: str, batches: list[PairedBatch]) -> Callable[[], Any]:
    """A call of one training step, whose rate of 0 leaves the weights as they are; returns its result."""
    torch.manual_seed(0)
    encoder = CogViT(CogViTConfig(width=192, depth=4, heads=6, ffn=512))
    tower = TextTower(TextTowerConfig(vocab_size=WORDS, width=128, depth=3, heads=4, ffn=344))
    objective = kind(encoder, tower, AlignmentConfig(width=WIDTH, negatives=negatives))
    world = World(0, 1, 0, torch.device("cpu"))
    engine = build_engine(objective, torch.optim.SGD(objective.parameters(), lr=0.0), EngineConfig("none"), world)
    return lambda: train_step(objective, engine, batches, world)


def step_rows(settings: Settings) -> Iterator[Row]:
    for count in (32,) if settings.quick else (16, 64, 256, 512):
        batches = [batch_of(range(at, at + MICRO)) for at in range(0, count, MICRO)]
        mine = stepper(Alignment, "step", batches)
        one_graph = stepper(OneGraph, "step", [joined(batches)])
        few = stepper(Alignment, "microbatch", batches)
        got, wanted = mine(), one_graph()
        assert abs(got.loss / wanted.loss - 1) < 1e-4, (got.loss, wanted.loss)
        assert abs(got.grad_norm / wanted.grad_norm - 1) < 1e-3, (got.grad_norm, wanted.grad_norm)
        name = f"step of {count} pairs"
        own = peak_memory(mine)
        for peer, peer_name in ((one_graph, "one graph"), (few, "own micro-batch")):
            yield throughput(name, mine, peer, peer_name, count, "pairs/s", settings)
            yield smaller_is_better(f"{name}: peak", own, peak_memory(peer), peer_name, "MiB")


# ---------------------------------------------------------------------------------------------- ranks


def race(world: World, count: int, settings: Settings) -> list[Row]:
    """Both sides on one of several ranks, which run in step."""
    leaves = embeddings(count, world.rank)

    def gathered(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        return whole_matrix(images, _AllGather.apply(texts), log_scale, bias, world.rank * count)

    mine = differentiated(leaves, lambda *given: sigmoid_loss(*given).total)
    peer = differentiated(leaves, gathered)
    compare(mine, peer)
    name = f"{world.size} ranks, {count} pairs each"
    work = world.size * count**2 / 1e6
    return [
        throughput(name, mine, peer, "all-gather", work, "M pairs/s a rank", settings),
        smaller_is_better(f"{name}: peak", peak_memory(mine), peak_memory(peer), "all-gather", "MiB"),
    ]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, texts: Tensor) -> Tensor:
        everyone = [torch.empty_like(texts) for _ in range(torch_dist.get_world_size())]
        torch_dist.all_gather(everyone, texts.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch_dist.all_reduce(gradient)
        return gradient.chunk(torch_dist.get_world_size())[torch_dist.get_rank()]


def rows(settings: Settings) -> Iterator[Row]:
    yield from loss_rows(settings)
    yield from step_rows(settings)
    for count in (32,) if settings.quick else (512, 2048, 4096):
        yield from run_ranks(race, 2, count, settings, timeout=600.0)[0]
