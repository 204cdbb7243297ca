"""Activations that wait in the host's memory from a forward until its backward.

What autograd saves is copied to pinned memory on a stream of its own while the device computes on; its place on the
device is free as soon as it is there. The backward asks for tensors in the reverse order, so while it computes with
one, those before it are on their way back already.

It pays where a copy is faster than a second computation. With ``recompute`` a block saves one tensor, its input, and
moving those takes about as long as the block does; moving all that a block saves without it takes many times longer
over PCIe.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

SMALLEST = 1 << 16
"""Bytes of a tensor below which moving it is not worth the calls."""
AHEAD = 2
"""Tensors on their way at one time: more would fill the device, fewer would let it wait."""


@contextmanager
def offloaded(module: nn.Module) -> Iterator[None]:
    """Within the block, which calls ``module``, what autograd saves goes to the host, but for weights and their copies
    in another precision. What lies in the host's memory stays where it is; a warning says so, once a process."""
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters() if p.ndim > 1}
    shelf = Shelf(shapes | {shape[::-1] for shape in shapes})
    try:
        with torch.autograd.graph.saved_tensors_hooks(shelf.put, shelf.take):
            yield
    finally:
        shelf.settle()


class Shelf:
    """The tensors of one forward. ``stay``: shapes of weights. A tensor of such a shape is a weight, or a copy of one
    in another precision, and stays on the device (an activation of that shape does, too: no harm)."""

    def __init__(self, stay: set[tuple[int, ...]]):
        self.stay = stay
        self._order: list[weakref.ref[_Kept]] = []  # autograd holds them, and lets go of each once it was used
        self._leaving: deque[tuple[_Kept, Tensor]] = deque()

    @torch.no_grad()
    def put(self, tensor: Tensor) -> Tensor | _Kept:
        """What autograd keeps in the place of ``tensor``."""
        if tensor.nbytes < SMALLEST or tuple(tensor.shape) in self.stay or not leaves(tensor):
            return tensor
        kept = _Kept(tensor, len(self._order))
        self._order.append(weakref.ref(kept))
        self._leaving.append((kept, tensor))
        self.settle(AHEAD)
        return kept

    def settle(self, unsettled: int = 0) -> None:
        """Give the device's memory back, but for the last ``unsettled``: what is computed from here on waits for the
        copies of the others."""
        while len(self._leaving) > unsettled:
            kept, _ = self._leaving.popleft()
            kept.wait()

    @torch.no_grad()
    def take(self, kept: Tensor | _Kept) -> Tensor:
        """The tensor on its device again; those that the backward will ask for next set out."""
        if isinstance(kept, Tensor):
            return kept
        for number in range(kept.number, max(kept.number - 1 - AHEAD, -1), -1):
            before = self._order[number]()
            if before is not None:
                before.send_back()
        return kept.arrive()


class _Kept:
    """One tensor in the host's memory, or on its way."""

    def __init__(self, tensor: Tensor, number: int):
        self.number, self.device = number, tensor.device
        self._streams = _streams(tensor.device)
        self._event: torch.Event | None = None
        self._back: Tensor | None = None
        pinned = self._streams is not None
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        self._copy(tensor, self._host, out=True)

    def send_back(self) -> None:
        """Begin the way back, unless it has begun."""
        if self._back is None:
            self._back = torch.empty_like(self._host, device=self.device)
            self._copy(self._host, self._back, out=False)

    def arrive(self) -> Tensor:
        """The tensor that was sent back, for what is computed from here on."""
        self.wait()
        back, self._back = self._back, None
        assert back is not None
        return back

    def wait(self) -> None:
        """What is computed from here on waits for the last copy."""
        if self._event is not None:
            torch.cuda.current_stream(self.device).wait_event(self._event)

    def _copy(self, source: Tensor, target: Tensor, out: bool) -> None:
        if self._streams is None:
            target.copy_(source)
            return
        stream = self._streams[0 if out else 1]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if not out and self._event is not None:
            stream.wait_event(self._event)  # it may still be leaving
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self._event = stream.record_event()

    def __del__(self) -> None:
        if self._back is not None:  # on its way to nobody: its memory may be given away only once it is there
            self.wait()


_SIDE_STREAMS: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """One stream to the host and one from it; None on devices that copy in order with what they compute."""
    if device.type != "cuda":
        return None
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = (torch.cuda.Stream(device), torch.cuda.Stream(device))
    return _SIDE_STREAMS[device]


def leaves(tensor: Tensor) -> bool:
    """Whether ``tensor`` lies in the memory of an accelerator."""
    if tensor.device.type == "cpu":
        _say_nothing_moves()
    return tensor.device.type not in ("cpu", "meta")


@cache
def _say_nothing_moves() -> None:
    warnings.warn("memory.offload: activations are in the host's memory already, so none is moved", stacklevel=2)
