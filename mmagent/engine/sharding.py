"""Between a full tensor and this rank's share of it: a ``DTensor`` (FSDP2, experts), or a cut of its flat elements
(DeepSpeed's ZeRO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from mmagent import dist
from mmagent.ops.state import whole


@dataclass(frozen=True)
class Cut:
    """A tensor of ``shape`` lies flat over all ranks: rank r has its elements ``bounds[r]`` to ``bounds[r + 1]``."""

    shape: tuple[int, ...]
    bounds: tuple[int, ...]

    @classmethod
    def even(cls, shape: Sequence[int], ranks: int) -> Cut:
        """As ZeRO-3 deals out a parameter: equal pieces, the last ones shorter or empty."""
        numel = math.prod(shape)
        piece = -(-numel // ranks)
        return cls(tuple(shape), tuple(min(rank * piece, numel) for rank in range(ranks + 1)))

    @property
    def sizes(self) -> list[int]:
        """Elements of each rank."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]

    def gather(self, piece: Tensor) -> Tensor:
        """The full tensor from every rank's flat ``piece``. A collective."""
        return dist.gather_pieces(piece.view(-1), self.sizes).view(self.shape)

    def take(self, full: Tensor) -> Tensor:
        """This rank's piece, flat and without memory in common."""
        return full.reshape(-1)[self.bounds[dist.rank()] : self.bounds[dist.rank() + 1]].clone()


def tagged(piece: Tensor, cut: Cut) -> Tensor:
    """``piece``, which from now on says of what it is one, to :func:`cut_of`."""
    piece.cut = cut  # type: ignore[attr-defined]
    return piece


def cut_of(tensor: Any) -> Cut | None:
    """How ``tensor`` is cut: a slice that says so, or a parameter that ZeRO-3 has partitioned; None for all others."""
    if hasattr(tensor, "ds_tensor"):
        return Cut.even(tensor.ds_shape, dist.size())
    return getattr(tensor, "cut", None)


def is_part(tensor: Tensor) -> bool:
    """Whether ``tensor`` is this rank's part of a whole, so that gathering it is a collective."""
    return isinstance(tensor, DTensor) or cut_of(tensor) is not None


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the full tensor of which ``tensor`` is this rank's part."""
    cut = cut_of(tensor)
    return tuple(tensor.shape) if cut is None else cut.shape


def local_part(value: Any) -> Any:
    """This rank's part of a ``DTensor``, or of a parameter under ZeRO-3, to be read or written in place; anything else
    as it is."""
    if isinstance(value, DTensor):
        return value.to_local()
    if hasattr(value, "ds_tensor"):
        if value.ds_status.name == "AVAILABLE":
            value.partition()  # a gathered copy would not know of what is written to the part
        return value.ds_tensor.data[: Cut.even(value.ds_shape, dist.size()).sizes[dist.rank()]]
    return value


def gather_like(value: Any, parameter: Tensor) -> Any:
    """``value`` as a full tensor on the host, sharded as ``parameter`` is (a collective if so); others as they are.

    Optimizer state may be a ``DTensor`` or the bare local part of one, or of what is cut.
    """
    if not isinstance(value, Tensor):
        return value
    if (cut := cut_of(parameter)) is not None and value.ndim:
        return cut.gather(local_part(value).detach()).cpu()
    value = as_sharded(value, parameter)
    return (whole(value) if isinstance(value, DTensor) else value).detach().cpu()


def as_sharded(value: Any, parameter: Tensor) -> Any:
    """A bare local part of what is sharded as ``parameter`` is: a ``DTensor``, or saying how the whole is cut. Others
    as they are."""
    if isinstance(value, Tensor) and value.ndim and (cut := cut_of(parameter)) is not None:
        return tagged(value.detach(), cut)
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if not value.ndim:
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def shard_like(full: Any, parameter: Tensor) -> Any:
    """``full`` (the same on every rank) distributed as ``parameter`` is, without communication."""
    if isinstance(full, Tensor) and full.ndim and (cut := cut_of(parameter)) is not None:
        return cut.take(full).to(parameter.device)
    if not isinstance(full, Tensor) or not isinstance(parameter, DTensor) or not full.ndim:
        return full
    full = full.to(parameter.device)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def norms(
    gradients: Sequence[Tensor], groups: Sequence[int], count: int, pieces: bool = False
) -> tuple[Tensor, Tensor]:
    """``()`` and ``(count,)``: the Euclidean norm of all ``gradients`` together, and that of each of their ``groups``
    (numbers below ``count``), of whatever shards over whatever ranks; the same on every rank. A collective for each way
    of sharding. ``pieces``: plain tensors are what this rank has of gradients that are cut."""
    ways: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = {}
    for gradient, group in zip(gradients, groups, strict=True):
        way = (gradient.device_mesh, *map(_sum_of, gradient.placements)) if isinstance(gradient, DTensor) else ()
        ways.setdefault(way, []).append((local_part(gradient), group))
    totals, squares = [], []
    for way, alike in ways.items():
        each = torch.stack([norm.float() for norm in torch._foreach_norm([gradient for gradient, _ in alike])])
        by_group = each.new_zeros(count)
        by_group.index_add_(0, torch.tensor([group for _, group in alike], device=each.device), each.square())
        total = torch.linalg.vector_norm(each)
        if way:
            summed = whole(DTensor.from_local(torch.cat([total.square()[None], by_group]), way[0], way[1:]))
            total, by_group = summed[0].sqrt(), summed[1:]
        elif pieces:
            summed = dist.all_reduce(torch.cat([total.square()[None], by_group]))
            total, by_group = summed[0].sqrt(), summed[1:]
        totals.append(total)
        squares.append(by_group)
    if not totals:
        return torch.zeros(()), torch.zeros(count)
    total = totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))
    return total, torch.stack(squares).sum(0).sqrt()


def _sum_of(placement: Placement) -> Placement:
    """How a sum of what is placed so is placed."""
    return placement if isinstance(placement, Replicate) else Partial()
