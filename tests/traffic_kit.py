"""What travels between ranks, seen where torch hands it to the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Inside the block every collective of this rank is noted: ``calls {operation: number}``, and the bytes ``sent`` to
    *other* ranks, one entry an all-to-all exchange or a message. ``received {operation: bytes}`` from others, which is
    not what a network carries: a tree or a ring passes on what is not for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: list[int] = []
        self.received: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname.strip("_")] += 1
            self.received[func._opname.strip("_")] += _received(func._opname, args)
            if func._opname == "alltoall_base_":
                _, rows, group, _, sends = args[:5]
                assert isinstance(rows, Tensor)
                away = sum(n for rank, n in enumerate(sends) if rank != _group_rank(group))
                self.sent.append(away * rows[:1].numel() * rows.element_size() if away else 0)
            if func._opname == "send":
                self.sent += [tensor.numel() * tensor.element_size() for tensor in args[0]]
        return func(*args, **(kwargs or {}))


def _received(operation: str, args: tuple[Any, ...]) -> int:
    """Bytes from other ranks, where the operation is one that only moves tensors."""
    if operation == "broadcast_":
        tensors, group, root = args[:3]
        return sum(x.nbytes for x in tensors) if root != _group_rank(group) else 0
    if operation == "_allgather_base_":
        everyone, own = args[:2]
        return int(everyone.nbytes - own.nbytes)
    if operation == "alltoall_base_":
        out, _, group, receives = args[:4]
        away = sum(n for rank, n in enumerate(receives) if rank != _group_rank(group))
        return away * out[:1].nbytes if away else 0
    if operation == "recv_":
        return sum(x.nbytes for x in args[0])
    return 0


def _group_rank(group: Any) -> int:
    from torch.distributed import ProcessGroup

    return (group if isinstance(group, ProcessGroup) else ProcessGroup.unbox(group)).rank()
