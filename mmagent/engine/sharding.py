"""Between a full tensor and this rank's share of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local_part(value: Any) -> Any:
    """This rank's shard of a ``DTensor``; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def gather_like(value: Any, parameter: Tensor) -> Any:
    """``value`` as a full tensor on the host, sharded as ``parameter`` is (a collective if so); others as they are.

    Optimizer state may be a ``DTensor`` or the bare local shard of one.
    """
    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.ndim:
        value = DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu()


def shard_like(full: Any, parameter: Tensor) -> Any:
    """``full`` (the same on every rank) distributed as ``parameter`` is, without communication."""
    if not isinstance(full, Tensor) or not isinstance(parameter, DTensor) or not full.ndim:
        return full
    full = full.to(parameter.device)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
