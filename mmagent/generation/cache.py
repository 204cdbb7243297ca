"""A key-value cache as the decoder's ``attend`` argument.

One padded tensor a layer and side, ``(S, capacity, G, d)``: S sequences, of which the first ``lengths[s]`` places
are filled. Taking tokens back (a rejected draft) is setting lengths; what lies behind them is overwritten.

Three ways to fill it, one object each: :class:`PromptAttention` for prompts that start from nothing (packed,
variable length), :class:`ExtendAttention` for several new tokens behind a history, :class:`StepAttention` for one
token a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.ops.attention import varlen_attention
from mmagent.types import Segments

GRANULE = 32
"""Capacities are multiples of this, so that a cache grows rarely."""


def round_up(length: int) -> int:
    return -(-length // GRANULE) * GRANULE


class KVCache:
    """Keys and values of S sequences. ``lengths (S,)`` int64 lives on the device, ``longest`` on the host."""

    def __init__(self, lengths: Tensor, capacity: int):
        self.lengths = lengths
        self.capacity = capacity
        self.longest = int(lengths.max()) if lengths.numel() else 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    def write(self, layer: int, slots: Tensor, k_NGd: Tensor, v_NGd: Tensor) -> tuple[Tensor, Tensor]:
        """Store N tokens of ``layer`` at flat places ``row * capacity + position`` and return the layer's tensors."""
        if layer not in self.layers:
            shape = (self.rows, self.capacity, *k_NGd.shape[1:])
            # zeros, not garbage: masked places still meet the values' matrix product, where 0 * NaN would count
            self.layers[layer] = (k_NGd.new_zeros(shape), v_NGd.new_zeros(shape))
        keys, values = self.layers[layer]
        keys.view(-1, *k_NGd.shape[1:]).index_copy_(0, slots, k_NGd.to(keys.dtype))
        values.view(-1, *v_NGd.shape[1:]).index_copy_(0, slots, v_NGd.to(values.dtype))
        return keys, values

    def advance(self, counts: Tensor, longest: int) -> None:
        """Count ``counts (S,)`` (or one number for all) written tokens in; ``longest`` is the new maximum."""
        self.lengths = self.lengths + counts
        self.longest = longest

    def rollback(self, counts: Tensor) -> None:
        """Forget the last ``counts (S,)`` tokens of every sequence."""
        self.lengths = self.lengths - counts
        assert bool((self.lengths >= 0).all()), "rolled back behind the start"
        self.longest = int(self.lengths.max())

    def select(self, rows: Tensor, capacity: int | None = None) -> KVCache:
        """A new cache with the given rows (repeats allowed) and room for ``capacity`` tokens each."""
        chosen = KVCache(self.lengths[rows], capacity or self.capacity)
        filled = min(chosen.longest, chosen.capacity)
        for layer, pair in self.layers.items():
            chosen.layers[layer] = tuple(_resized(x[rows, :filled], chosen.capacity) for x in pair)  # type: ignore[assignment]
        return chosen

    @staticmethod
    def join(caches: Sequence[KVCache]) -> KVCache:
        """One cache of all rows, in order; capacities are raised to the largest."""
        if len(caches) == 1:
            return caches[0]
        joined = KVCache(torch.cat([cache.lengths for cache in caches]), max(cache.capacity for cache in caches))
        for layer in caches[0].layers:
            sides = zip(*(cache.layers[layer] for cache in caches), strict=True)
            joined.layers[layer] = tuple(  # type: ignore[assignment]
                torch.cat([_resized(x, joined.capacity) for x in side]) for side in sides
            )
        return joined


def _resized(x: Tensor, capacity: int) -> Tensor:
    """``(S, c, G, d)`` padded with zeros to ``(S, capacity, G, d)``."""
    if x.shape[1] == capacity:
        return x
    out = x.new_zeros(x.shape[0], capacity, *x.shape[2:])
    out[:, : x.shape[1]] = x
    return out


class PromptAttention:
    """Packed causal attention over fresh prompts (one segment a row of ``cache``), remembering keys and values."""

    def __init__(self, cache: KVCache, segments: Segments):
        assert len(segments) == cache.rows, "one segment a row"
        self.cache, self.segments = cache, segments
        starts = segments.cu_seqlens[:-1].long()
        rows = segments.ids()
        self.slots = rows * cache.capacity + torch.arange(segments.total, device=rows.device) - starts[rows]

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        self.cache.write(layer, self.slots, k_TGd, v_TGd)
        return varlen_attention(q_THd, k_TGd, v_TGd, self.segments, causal=True)


class ExtendAttention:
    """New tokens (one segment a row) that see their row's history and, causally, each other."""

    def __init__(self, cache: KVCache, segments: Segments):
        assert len(segments) == cache.rows, "one segment a row"
        device = cache.lengths.device
        self.cache = cache
        self.rows = segments.ids()
        self.offsets = torch.arange(segments.total, device=device) - segments.cu_seqlens[:-1].long()[self.rows]
        self.shape = (cache.rows, segments.longest)
        self.slots = self.rows * cache.capacity + cache.lengths[self.rows] + self.offsets
        self.counts = torch.tensor(segments.lengths, device=device)
        self.reach = int((cache.lengths + self.counts).max())
        assert self.reach <= cache.capacity, "the cache is too small for the new tokens"
        last = cache.lengths[:, None] + torch.arange(segments.longest, device=device)  # position of every query
        self.mask = torch.arange(self.reach, device=device) <= last[:, :, None]

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        keys, values = self.cache.write(layer, self.slots, k_TGd, v_TGd)
        q = q_THd.new_zeros(*self.shape, *q_THd.shape[1:])
        q[self.rows, self.offsets] = q_THd
        out = _attend(q, keys[:, : self.reach], values[:, : self.reach], self.mask)
        return out[self.rows, self.offsets]


class StepAttention:
    """One new token a row. ``apart``: rows are attended to one by one, each over its own length, for threads that share
    rows out give one row other bits than another: what a row gets then depends on no other."""

    def __init__(self, cache: KVCache, apart: bool = False):
        device = cache.lengths.device
        self.cache = cache
        self.slots = torch.arange(cache.rows, device=device) * cache.capacity + cache.lengths
        self.reach = round_up(cache.longest + 1)
        assert self.reach <= cache.capacity, "the cache is full"
        self.mask = torch.arange(self.reach, device=device) <= cache.lengths[:, None, None]
        self.parts = [(slice(None), self.reach)]  # rows attended to at a time, and how far
        if apart:
            self.parts = [(slice(n, n + 1), round_up(length + 1)) for n, length in enumerate(cache.lengths.tolist())]

    def __call__(self, layer: int, q_SHd: Tensor, k_SGd: Tensor, v_SGd: Tensor) -> Tensor:
        keys, values = self.cache.write(layer, self.slots, k_SGd, v_SGd)
        out = [
            _attend(q_SHd[rows].unsqueeze(1), keys[rows, :reach], values[rows, :reach], self.mask[rows, :, :reach])
            for rows, reach in self.parts
        ]
        return torch.cat(out).squeeze(1)


class LeadingRows:
    """``attend`` for the first ``count`` of the tokens; the others, which nobody reads, get zeros."""

    def __init__(self, attend: StepAttention, count: int):
        self.attend, self.count = attend, count

    def __call__(self, layer: int, q_SHd: Tensor, k_SGd: Tensor, v_SGd: Tensor) -> Tensor:
        out = self.attend(layer, q_SHd[: self.count], k_SGd[: self.count], v_SGd[: self.count])
        return F.pad(out, (0, 0, 0, 0, 0, q_SHd.shape[0] - self.count))


def _attend(q_SNHd: Tensor, k_SLGd: Tensor, v_SLGd: Tensor, mask_SNL: Tensor) -> Tensor:
    """``(S, N, H, d)`` queries over ``(S, L, G, d)`` keys; ``mask`` is true where a query sees a key.

    The queries that share a key head become rows of one product, so no key is read twice or copied.
    """
    S, N, H, d = q_SNHd.shape
    G = k_SLGd.shape[2]
    q = q_SNHd.to(k_SLGd.dtype).view(S, N, G, H // G, d).permute(0, 2, 1, 3, 4).reshape(S, G, N * (H // G), d)
    mask = mask_SNL.repeat_interleave(H // G, dim=1).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k_SLGd.transpose(1, 2), v_SLGd.transpose(1, 2), attn_mask=mask)
    return out.view(S, G, N, H // G, d).permute(0, 2, 1, 3, 4).reshape(S, N, H, d)
