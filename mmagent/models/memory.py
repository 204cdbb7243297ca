"""What a training step keeps for its backward, and where: recomputation, offloading, and the encoder in chunks.

Activations of a vision encoder grow with the number of images, and a pack of many images may need more memory for them
than for all of the decoder. Three remedies, none of which changes results:

- *recompute*: a block keeps its input alone and is computed again in the backward
  (:class:`~mmagent.models.layers.Recomputed`); what is kept still grows with the images, but slower;
- *offload*: what is kept waits in the host's memory (:mod:`mmagent.models.offload`);
- *chunks* (:func:`embed_images`): images pass encoder and projector a few at a time, and the backward computes them
  again in the same chunks. At any time the activations of one chunk exist, however many images there are; beside them
  the visual embeddings, which the decoder needs anyway. A chunk is cut from the pack, not inside the encoder, so any
  :class:`~mmagent.protocols.VisionEncoder` can be cut so.

A frozen encoder runs without autograd, so nothing of it is kept in the first place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmagent.models.offload import offloaded
from mmagent.protocols import VisionEncoder
from mmagent.types import PackedVision

RECOMPUTABLE, OFFLOADABLE = ("encoder", "projector", "decoder", "mtp"), ("encoder", "projector")


@dataclass
class MemoryConfig:
    """``recompute``: roles (encoder, projector, decoder, mtp) whose blocks are computed again in the backward.
    ``offload``: roles (encoder, projector) of which whatever is kept for the backward waits in the host's memory.
    ``chunk_patches``: images pass encoder and projector so many patches at a time (whole images: one that is larger
    passes alone), and a pack with more is computed again in the backward, chunk by chunk, or, where ``offload`` names
    the encoder, brought back chunk by chunk; 0 for all images at once."""

    recompute: list[str] = field(default_factory=list)
    offload: list[str] = field(default_factory=list)
    chunk_patches: int = 0

    def __post_init__(self) -> None:
        for name, roles, known in (
            ("recompute", self.recompute, RECOMPUTABLE),
            ("offload", self.offload, OFFLOADABLE),
        ):
            if unknown := sorted(set(roles) - set(known)):
                raise ValueError(f"memory.{name}: {', '.join(unknown)} cannot be named there, but {', '.join(known)}")
        if self.chunk_patches < 0:
            raise ValueError(f"memory.chunk_patches must not be negative, got {self.chunk_patches}")


def cut(vision: PackedVision, budget: int) -> tuple[PackedVision, ...]:
    """``vision`` in chunks of neighbouring whole images with at most ``budget`` patches each, or of one image that has
    more; 0 for no limit. Views of the same patches."""
    if not budget or vision.patches.shape[0] <= budget:
        return (vision,)
    sizes = vision.grids.prod(1).tolist()
    starts, held = [0], 0
    for image, size in enumerate(sizes):
        if held and held + size > budget:
            starts.append(image)
            held = 0
        held += size
    counts = [stop - start for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]
    patches = [sum(sizes[start : start + count]) for start, count in zip(starts, counts, strict=True)]
    parts = zip(vision.patches.split(patches), vision.grids.split(counts), strict=True)
    return tuple(PackedVision(*part) for part in parts)


def embed_images(encoder: VisionEncoder, projector: nn.Module, vision: PackedVision, memory: MemoryConfig) -> Tensor:
    """``(V, D)`` merged visual embeddings, in the order of the images, computed as ``memory`` says.

    Encoder and projector must be functions of their inputs, weights and torch's random numbers, for recomputation calls
    them a second time with the same: no counters and no running statistics. A hook on a weight's gradient is refused
    where there are several chunks, as it would run once a chunk. So is DeepSpeed's ZeRO-3 with chunks: it gathers
    weights at every call of the encoder, and a rank with more chunks than its peers would wait for ever.
    """
    assert isinstance(encoder, nn.Module)
    if memory.chunk_patches and any(hasattr(p, "ds_tensor") for p in encoder.parameters()):
        raise ValueError(
            "memory.chunk_patches: ZeRO-3 gathers weights for every call of the encoder, and ranks have unequal "
            "numbers of chunks; use zero1, zero2, ddp, fsdp2 or hsdp, or leave it at 0 and recompute the encoder"
        )
    chunks = cut(vision, memory.chunk_patches)
    read = _Part(encoder, partial(_tokens, encoder), "encoder" in memory.offload)
    project = _Part(projector, projector, "projector" in memory.offload)
    if torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters()):
        return _in_chunks((read, project), chunks)
    with torch.no_grad():
        tokens = [encoder(chunk).tokens for chunk in chunks]
    return _in_chunks((project,), tokens)


def _tokens(encoder: VisionEncoder, images: PackedVision) -> Tensor:
    features = encoder(images)
    if features.pooled.requires_grad and getattr(encoder, "pool", True) is not None:
        # A pooling head of earlier stages must not be left without gradient. CogViT says where it has none.
        return features.tokens + 0.0 * features.pooled.sum().to(features.tokens.dtype)
    return features.tokens


class _Part(NamedTuple):
    """``function`` calls ``module``; ``away``: what it keeps for the backward goes to the host."""

    module: nn.Module
    function: Callable[[Any], Tensor]
    away: bool

    def __call__(self, given: Any, keeps: bool) -> Tensor:
        with offloaded(self.module) if keeps and self.away else nullcontext():
            return self.function(given)


def _through(parts: Sequence[_Part], given: Any, keeps: bool = True) -> Tensor:
    """``keeps``: the graph waits for a backward that comes later."""
    for part in parts:
        given = part(given, keeps)
    return given


def _in_chunks(parts: Sequence[_Part], pieces: Sequence[Any]) -> Tensor:
    """Every piece through all ``parts``, one after the other, and what comes out along dimension 0."""
    if len(pieces) == 1:
        return _through(parts, pieces[0])
    weights = [p for part in parts for p in part.module.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not weights:
        return torch.cat([_through(parts, piece) for piece in pieces])
    if any(p._backward_hooks for p in weights):
        raise ValueError("memory.chunk_patches: a weight has a hook on its gradient, which would run once a chunk")
    return _Chunks.apply(parts, pieces, *weights)


class _Chunks(torch.autograd.Function):
    """One node of the graph for all chunks. Weights are its inputs, so each gets one gradient, summed over chunks in
    at least float32: wrappers that reduce gradients between ranks see one use of each weight, however many chunks a
    rank has."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[_Part], pieces: Sequence[Any], *weights: Tensor) -> Tensor:
        ctx.parts, ctx.pieces, ctx.seen, ctx.kept = parts, [], [], []
        ctx.save_for_backward(*weights)
        outputs = []
        for piece in pieces:
            if parts[0].away:
                with torch.enable_grad():
                    output = _through(parts, piece)
                ctx.kept.append(output)
                outputs.append(output.detach())
            else:
                ctx.pieces.append(piece)
                ctx.seen.append(_Surroundings(weights[0].device))
                outputs.append(_through(parts, piece))
        ctx.sizes = [output.shape[0] for output in outputs]
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, now = ctx.saved_tensors, {id(p) for part in ctx.parts for p in part.module.parameters()}
        if any(id(p) not in now for p in weights):
            raise RuntimeError(
                "the encoder's weights are other tensors than in the forward: something gathers them for each call of "
                "the encoder. Set memory.chunk_patches before an engine shards the model, or leave it at 0"
            )
        sums: list[Tensor | None] = [None] * len(weights)
        for n, part in enumerate(gradient.split(ctx.sizes)):
            if ctx.pieces:
                with ctx.seen[n].again(), torch.enable_grad():
                    output = _through(ctx.parts, ctx.pieces[n], keeps=False)
            else:
                output, ctx.kept[n] = ctx.kept[n], None
                if output is None:
                    raise RuntimeError("a second backward through chunks whose activations were kept for one")
            _add(sums, torch.autograd.grad(output, weights, part, allow_unused=True))
        return (None, None, *(s if s is None else s.to(p.dtype) for s, p in zip(sums, weights, strict=True)))


def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for n, gradient in enumerate(gradients):
        if gradient is None:
            continue
        total = sums[n]
        if total is None:  # a copy, for autograd may give the same memory to several
            sums[n] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        else:
            total.add_(gradient)


class _Surroundings:
    """What a function sees beside its arguments: the random numbers to come, and autocast."""

    def __init__(self, device: torch.device):
        self.kind = device.type
        self.autocast = (torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind))
        self.devices = [device] if device.type == "cuda" else []
        self.host, self.accelerator = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """They are so while the block runs; afterwards random numbers go on as if it had not been."""
        enabled, dtype = self.autocast
        with torch.random.fork_rng(self.devices), torch.autocast(self.kind, dtype, enabled):
            torch.set_rng_state(self.host)
            for device, state in zip(self.devices, self.accelerator, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
