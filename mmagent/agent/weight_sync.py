"""The trainer's weights on their way to generators: whole, sharded or partitioned, a bucket at a time.

Where trainer and generator share a module there is nothing to send: set the policy's ``version``. A generator with a
copy of its own in the same process takes :func:`buckets_of`; one in another process takes what :func:`push` broadcasts;
one that is elsewhere reads a folder of :func:`~mmagent.generation.updates.write_version`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup

from mmagent import dist
from mmagent.generation.updates import BUCKET, Buckets, send
from mmagent.interop.live_model import live_tensors


def buckets_of(model: nn.Module, version: int, bucket_bytes: int = BUCKET, dtype: torch.dtype | None = None) -> Buckets:
    """A live model's parameters and persistent buffers. ``dtype``: that of floating-point parameters on their way, if
    not their own (buffers, as routers' biases, keep theirs); one that it cannot hold is a ``WeightsError``.

    Where the model is sharded (FSDP2, expert parallelism, ZeRO-3) every rank goes through all of it, gathering one
    tensor at a time.
    """
    parameters = {name for name, p in model.named_parameters() if p.is_floating_point()}
    tensors = live_tensors(model).values()
    cast = (t if dtype is None or t.name not in parameters else t.cast(dtype) for t in tensors)
    return Buckets(cast, version, bucket_bytes)


def push(
    model: nn.Module,
    version: int,
    group: ProcessGroup | None = None,
    *,
    device: torch.device | str = "cpu",
    bucket_bytes: int = BUCKET,
    dtype: torch.dtype | None = None,
) -> None:
    """Broadcast a live model to the generators' ranks of ``group``, which call
    :func:`~mmagent.generation.updates.receive` with rank 0 as the sender. All of the trainer's ranks call this; of
    these, rank 0 alone is in ``group``. ``device``: where the group's collectives want tensors."""
    buckets = buckets_of(model, version, bucket_bytes, dtype)
    if dist.is_main():
        send(buckets, group, device)
        return
    for _ in buckets:  # the gathers are collectives
        pass
