"""The key-value cache as tensors of blocks, and attention over it as the decoder's ``attend`` argument.

A sequence's tokens lie in the blocks of its table, ``block_tokens`` to a block, in order; which block is whose is
:mod:`mmagent.generation.blocks`'s business. :class:`PagedAttention` is one forward over new tokens of several
sequences: it stores their keys and values, and lets them see all that is stored of their own sequence before them. All
ways it goes are equal to one softmax over the whole sequence, by test:

- prompts that start from nothing need not look at what they store: they are a pack (:func:`varlen_attention`);
- a few tokens a sequence (decoding, checking drafts) are compared with whole blocks *where they lie*: every block is
  one small product with the queries of whoever owns it, and each sequence joins what its blocks say by their sums of
  exponentials (as in Flash-Decoding, Dao et al. 2023). Nothing is copied and nothing padded to the longest; a block
  that many own is read once for all of them;
- more tokens behind a history, which are few calls with much to do, gather their sequence;
- accelerators read the block table in their kernel, where it can.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import copy
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.ops.attention import varlen_attention
from mmagent.ops.precision import no_autocast
from mmagent.types import Segments

FEW = 16
"""New tokens a sequence up to which blocks are compared where they lie."""
DENSE = 0.5
"""Blocks in use are read where they lie if they are at least this share of those between the first and the last."""
MEETINGS = 4
"""Of so many of the last forwards it is kept which rows met which blocks: the decoder's, with drafts and without, and
those of the MTP head."""
_NOTHING, _ALL = np.float32("-inf"), np.float32(0)
TILE = 512
"""Queries that are compared with a gathered history at a time: what lies behind them is not even looked at."""


class PagedKV:
    """Keys and values of ``blocks`` blocks, a pair of tensors a layer, made when the layer first writes, where that
    computes: ``device``, or others of its kind.

    On CPUs ``(blocks, G, block_tokens, d)``: one product a block and head. Elsewhere ``(blocks, block_tokens, G, d)``,
    as kernels that read block tables want it.
    """

    def __init__(self, blocks: int, block_tokens: int, device: torch.device):
        self.blocks, self.block_tokens, self.device = blocks, block_tokens, device
        self.head_major = device.type == "cpu"
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.meetings: dict[tuple[bytes, ...], _Meeting] = {}

    def places(self, blocks: Tensor, places: Tensor, groups: int) -> Tensor:
        """``(T * G,)``: rows of ``d`` numbers for the heads of T tokens, at ``places (T,)`` of ``blocks (T,)``."""
        heads = torch.arange(groups, device=blocks.device)
        if self.head_major:
            return ((blocks[:, None] * groups + heads) * self.block_tokens + places[:, None]).flatten()
        return ((blocks * self.block_tokens + places)[:, None] * groups + heads).flatten()

    def write(self, layer: int, rows: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Store T tokens of ``layer`` in what :meth:`places` gave."""
        for stored, x in zip(self._layer(layer, k_TGd), (k_TGd, v_TGd), strict=True):
            stored.view(-1, stored.shape[-1]).index_copy_(0, rows, x.reshape(-1, x.shape[-1]).to(stored.dtype))

    def _layer(self, layer: int, like_TGd: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            groups, dim = like_TGd.shape[1:]
            inner = (groups, self.block_tokens, dim) if self.head_major else (self.block_tokens, groups, dim)
            # zeros, not garbage: places nobody wrote still meet weights of zero, where 0 * NaN would count
            self.layers[layer] = (like_TGd.new_zeros(self.blocks, *inner), like_TGd.new_zeros(self.blocks, *inner))
        return self.layers[layer]

    def grow(self, blocks: int) -> None:
        """Have ``blocks`` in all. Where memory ends on the way it may be asked again: some layers have them then."""
        for layer, pair in self.layers.items():
            if len(pair[0]) < blocks:
                more = [x.new_zeros(blocks - len(x), *x.shape[1:]) for x in pair]
                self.layers[layer] = (torch.cat([pair[0], more[0]]), torch.cat([pair[1], more[1]]))
        self.blocks = blocks

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What lies in blocks ``sources`` into blocks ``targets``."""
        if sources:
            at, to = (torch.tensor(numbers, device=self.device) for numbers in (sources, targets))
            for pair in self.layers.values():
                for x in pair:
                    x[to.to(x.device)] = x[at.to(x.device)]

    def move(self, layers: int, sources: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> None:
        """In the first ``layers``, what lies at ``sources`` to ``targets``, both ``(blocks (n,), places (n,))``."""
        where: dict[tuple[int, torch.device], list[Tensor]] = {}
        for layer in range(layers):
            for x in self.layers[layer]:
                here = groups, device = x.shape[1 if self.head_major else 2], x.device
                if here not in where:
                    where[here] = [self.places(*place, groups).to(device) for place in (sources, targets)]
                at, to = where[here]
                rows = x.view(-1, x.shape[-1])
                rows.index_copy_(0, to, rows.index_select(0, at))

    @torch.inference_mode()
    def wipe(self, blocks: Sequence[int]) -> None:
        """Zeros where a sequence left what is not finite: the next owner's weights of zero must meet none of it."""
        at = torch.tensor(blocks, device=self.device, dtype=torch.int64)
        for pair in self.layers.values():
            for x in pair:
                x[at.to(x.device)] = 0

    def gather(self, layer: int, blocks: Tensor, first: int, length: int) -> tuple[Tensor, Tensor]:
        """``(length - first, G, d)`` keys and values of a sequence that lies in ``blocks``, from place ``first`` on."""
        out = []
        for x in self.layers[layer]:
            rows = x[blocks.to(x.device)]
            rows = rows.transpose(1, 2) if self.head_major else rows
            out.append(rows.flatten(0, 1)[first:length])
        return out[0], out[1]

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self.layers.values() for x in pair)


class _Part(NamedTuple):
    """Blocks and the queries that are compared with them in one product: ``owners (n, m)`` are rows of queries for each
    of ``n`` blocks. ``blocks`` is a slice where they are read where they lie."""

    blocks: slice | Tensor
    owners: Tensor


class _Meeting(NamedTuple):
    """How S rows meet their blocks, W at most. The results of all parts are E entries, one after the other: ``rows
    (E,)`` whose each is, ``places (E, 1, block_tokens)`` of that row's sequence (where nobody owns it, those of some
    row). ``entries (S * W,)``: where the blocks of each row stand among them, None where they lie in order; ``dead (S,
    W, 1, 1)`` is true behind a row's last block, None where no row has fewer."""

    parts: tuple[_Part, ...]
    rows: np.ndarray
    places: np.ndarray
    entries: Tensor | None
    dead: Tensor | None


class PagedAttention:
    """One forward over ``counts (S,)`` new tokens behind ``history (S,)`` stored ones, of S sequences whose blocks are
    ``tables``. ``apart``: every row is attended to by itself, over its own length alone, so that what a row gets
    depends on no other, to the last bit. ``first`` places of each sequence are not there (for MTP depths). ``reach
    (T,)`` is the last place of its sequence that each new token sees beside itself, its own by default; a decoder of
    blocks lets the tokens of a block see each other, and tokens that stand in for one another must not."""

    def __init__(
        self,
        kv: PagedKV,
        tables: Sequence[Sequence[int]] | np.ndarray,
        history: np.ndarray,
        counts: np.ndarray,
        apart: bool = False,
        first: int = 0,
        reach: np.ndarray | None = None,
    ):
        assert len(tables) == len(history) == len(counts)
        assert counts.min() > 0
        self.kv, self.tables, self.history, self.counts = kv, tables, history, counts
        self.apart, self.first, self.reach = apart, first, reach
        size = kv.block_tokens
        self._most, ends = int(counts.max()), np.cumsum(counts)
        starts, total = ends - counts, int(ends[-1])
        self._rows = np.repeat(np.arange(len(counts)), counts)
        self._offsets = np.arange(total) - starts[self._rows]
        places = history[self._rows] + self._offsets
        self._used = -(-(history + counts) // size)
        self._table = _columns(tables, int(self._used.max()))
        # a pack of documents: nothing is stored of any sequence, and something is there of each
        self._all_new = reach is None and self._most > 1 and not history.any() and int(counts.min()) > first
        self._not_there = int(history.min()) < first
        self._write_blocks = torch.from_numpy(self._table[self._rows, places // size]).to(kv.device)
        self._write_places = torch.from_numpy(places % size).to(kv.device)
        self._starts = starts
        self._depths: dict[int, PagedAttention] = {}
        self._where: dict[tuple[torch.device, int], Tensor] = {}

    def behind(self, first: int) -> PagedAttention:
        """The same forward for sequences of which the first places are not there."""
        if first == self.first:
            return self
        if first not in self._depths:
            self._depths[first] = PagedAttention(
                self.kv, self.tables, self.history, self.counts, self.apart, first, self.reach
            )
        return self._depths[first]

    def of_last(self) -> PagedAttention:
        """What is stored looked at by the last new token of each sequence alone. It lies in the same blocks, so nothing
        of how rows meet those is found out again."""
        last, rows = copy(self), len(self.counts)
        last.history, last.counts = self.history + self.counts - 1, np.ones_like(self.counts)
        last.reach, last._most, last._all_new = None, 1, False
        last._starts = last._rows = np.arange(rows)
        last._offsets = np.zeros(rows, dtype=np.int64)
        last._not_there = int(last.history.min()) < last.first
        for of_all in ("_padded", "_biases"):
            last.__dict__.pop(of_all, None)
        return last

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        with no_autocast(q_THd.device.type):
            self.store(layer, k_TGd, v_TGd)
            return self._fresh(q_THd, k_TGd, v_TGd) if self._all_new else self.look(layer, q_THd)

    def store(self, layer: int, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """The new tokens' keys and values."""
        self.kv.write(layer, self._written(k_TGd), k_TGd, v_TGd)

    def look(self, layer: int, q_THd: Tensor) -> Tensor:
        """What the new tokens see of what is stored, their own among it."""
        kv = self.kv
        q_THd = q_THd.to(kv.layers[layer][0].dtype)
        if kv.device.type == "cuda" and self.reach is None:
            return self._by_kernel(layer, q_THd)
        if self.apart or self._most > FEW or kv.device.type == "cuda":
            return self._by_rows(layer, q_THd)
        return self._by_blocks(layer, q_THd)

    def _written(self, k_TGd: Tensor) -> Tensor:
        """Where the new tokens lie, on a layer's device."""
        device, groups = k_TGd.device, k_TGd.shape[1]
        if (device, groups) not in self._where:
            self._where[device, groups] = self.kv.places(self._write_blocks, self._write_places, groups).to(device)
        return self._where[device, groups]

    def _fresh(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """Nothing is stored of any sequence: the new tokens are a pack of documents."""
        segments = Segments((self.counts - self.first).tolist(), q_THd.device)
        if not self.first:
            return varlen_attention(q_THd, k_TGd, v_TGd, segments, causal=True)
        there = torch.from_numpy(self._offsets >= self.first).to(q_THd.device)
        out = varlen_attention(q_THd[there], k_TGd[there], v_TGd[there], segments, causal=True)
        return out.new_zeros(q_THd.shape).index_copy_(0, there.nonzero().squeeze(1), out)

    # ------------------------------------------------------------ a row at a time

    def _by_rows(self, layer: int, q_THd: Tensor) -> Tensor:
        out = []
        for row, (history, count) in enumerate(zip(self.history.tolist(), self.counts.tolist(), strict=True)):
            start = int(self._starts[row])
            blocks = torch.from_numpy(self._table[row, : -(-(history + count) // self.kv.block_tokens)])
            k, v = self.kv.gather(layer, blocks, self.first, history + count)
            reach = None if self.reach is None else self.reach[start : start + count] - self.first
            out.append(_behind(q_THd[start : start + count], k, v, history - self.first, reach))
        return torch.cat(out)

    # ------------------------------------------------------------ blocks where they lie

    def _by_blocks(self, layer: int, q_THd: Tensor) -> Tensor:
        plan, (keys, values) = self._meeting, self.kv.layers[layer]
        S, N = len(self.counts), self._most
        T, H, d = q_THd.shape
        G = keys.shape[1]
        rows = q_THd.view(T, G, H // G, d)  # (S, G, M, d), M queries that share a key head
        if N > 1 and T == S * N:  # as many for every row: there is nothing to pad
            rows = rows.view(S, N, G, H // G, d).transpose(1, 2).reshape(S, G, N * (H // G), d)
        elif N > 1:
            padded = rows.new_zeros(S * N, G, H // G, d).index_copy_(0, self._padded, rows)
            rows = padded.view(S, N, G, H // G, d).transpose(1, 2).reshape(S, G, N * (H // G), d)
        M = rows.shape[2]
        if plan.entries is not None:
            rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, 1))  # one that nobody is, for blocks nobody owns
        results = [self._meet(*meets, rows, keys, values, N) for meets in zip(plan.parts, self._biases, strict=True)]
        found = results[0] if len(results) == 1 else map(torch.cat, zip(*results, strict=True))
        top, total, out = (x if plan.entries is None else x.index_select(0, plan.entries) for x in found)
        top = top.view(S, -1, G, M)
        if plan.dead is not None:
            top.masked_fill_(plan.dead, float("-inf"))
        share = top.sub_(top.amax(1, keepdim=True)).exp_()
        share.div_(total.view_as(share).mul_(share).sum(1, keepdim=True))
        joined = out.view(*share.shape, d).mul_(share.unsqueeze(-1)).sum(1).to(values.dtype)
        if N > 1:
            joined = joined.view(S, G, N, H // G, d).transpose(1, 2).reshape(S * N, H, d)
            joined = joined if T == S * N else joined.index_select(0, self._padded)
        else:
            joined = joined.reshape(T, H, d)
        if self._not_there:  # a token at such a place sees none
            joined[torch.from_numpy(self.history[self._rows] + self._offsets < self.first)] = 0
        return joined

    def _meet(
        self, part: _Part, bias: Tensor, rows: Tensor, keys: Tensor, values: Tensor, queries: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What each of the part's blocks says to each of its owners, where ``bias`` is added to scores, as entries: the
        largest score ``(E, G, M)``, the sum of exponentials below it, and the values that these weigh ``(E, G, M, d)``,
        all in fp32."""
        n, many = part.owners.shape
        _, G, M, d = rows.shape
        size = self.kv.block_tokens
        asked = rows.index_select(0, part.owners.flatten())
        k, v = keys[part.blocks].flatten(0, 1), values[part.blocks].flatten(0, 1)
        if many > 1:
            asked = asked.view(n, many, G, M, d).transpose(1, 2)
        scores = torch.bmm(asked.reshape(n * G, many * M, d), k.transpose(1, 2)).float().mul_(d**-0.5)
        if many > 1:
            scores = scores.view(n, G, many, M, size).transpose(1, 2)
        scores = scores.reshape(n * many, G, M, size)
        scores.view(n * many, G, queries, M // queries, size).add_(bias)
        top = scores.amax(-1)
        weights = scores.sub_(top.clamp_min(-1e30).unsqueeze(-1)).exp_()  # a block may show nothing
        total = weights.sum(-1)
        if many > 1:
            weights = weights.view(n, many, G, M, size).transpose(1, 2)
        out = torch.bmm(weights.to(v.dtype).reshape(n * G, many * M, size), v).float()
        if many > 1:
            out = out.view(n, G, many, M, d).transpose(1, 2)
        return top, total, out.reshape(n * many, G, M, d)

    @cached_property
    def _padded(self) -> Tensor:
        """Where each token stands among as many for every row as the one with the most has."""
        return torch.from_numpy(self._rows * self._most + self._offsets)

    @cached_property
    def _meeting(self) -> _Meeting:
        """The same at every step until a row comes, goes or begins another block."""
        kept, what = self.kv.meetings, (self._used.tobytes(), self._table.tobytes())
        meeting = kept.pop(what, None) or self._arrange()
        while len(kept) >= MEETINGS:
            del kept[next(iter(kept))]
        kept[what] = meeting
        return meeting

    def _arrange(self) -> _Meeting:
        S, width = self._table.shape
        live = np.arange(width) < self._used[:, None]
        pair_row, pair_at = np.nonzero(live)
        pair_block = self._table[pair_row, pair_at]
        order = np.argsort(pair_block, kind="stable")
        blocks, first, many = np.unique(pair_block[order], return_index=True, return_counts=True)
        entry_of = np.empty(len(pair_block), dtype=np.int64)
        low, high = int(blocks[0]), int(blocks[-1]) + 1
        dense = len(blocks) >= DENSE * (high - low)
        owners = np.full((high - low if dense else len(blocks), 1), S, dtype=np.int64)
        places = blocks - low if dense else np.arange(len(blocks))
        leaders = order[first]
        owners[places, 0], entry_of[leaders] = pair_row[leaders], places
        met: list[tuple[slice | np.ndarray, np.ndarray]] = [(slice(low, high) if dense else blocks, owners)]
        done = len(owners)
        others = many - 1  # owners beside the one whose queries have met the block
        for least, most in _powers(int(others.max())):
            chosen = np.flatnonzero((others >= least) & (others <= most))
            if not chosen.size:
                continue
            wide = int(others[chosen].max())
            shared = np.full((len(chosen), wide), S, dtype=np.int64)
            slot = np.arange(wide) < others[chosen, None]
            pairs = order[(first[chosen, None] + 1 + np.arange(wide))[slot]]
            shared[slot] = pair_row[pairs]
            entry_of[pairs] = done + np.flatnonzero(slot.ravel())
            met.append((blocks[chosen], shared))
            done += shared.size
        entry = np.zeros((S, width), dtype=np.int64)
        entry[pair_row, pair_at] = entry_of
        entry = np.where(live, entry, entry[:, :1])  # times zero, it must be its own: another's may not be finite
        parts = (_Part(x if isinstance(x, slice) else torch.from_numpy(x), torch.from_numpy(y)) for x, y in met)
        in_order = done == entry.size and bool((entry.ravel() == np.arange(done)).all())
        entries = None if in_order else torch.from_numpy(entry.ravel())
        dead = None if live.all() else torch.from_numpy(~live)[:, :, None, None]
        rows, at = np.zeros((2, done), dtype=np.int64)
        rows[entry_of], at[entry_of] = pair_row, pair_at
        size = self.kv.block_tokens
        return _Meeting(tuple(parts), rows, at[:, None, None] * size + np.arange(size), entries, dead)

    @cached_property
    def _biases(self) -> list[Tensor]:
        """Of each part ``(n * m, 1, N, 1, block_tokens)``: minus infinity at places that a query of the row must not
        see, else 0."""
        parts, rows, places = self._meeting[:3]
        last = self._last(self._most)[rows][:, :, None]
        unseen = places > last
        if self.reach is not None:
            unseen &= places != (self.history[:, None] + np.arange(self._most))[rows][:, :, None]
        if self.first:
            unseen |= places < self.first
        whole = torch.from_numpy(np.where(unseen, _NOTHING, _ALL))[:, None, :, None]
        return [whole] if len(parts) == 1 else list(whole.split([part.owners.numel() for part in parts]))

    def _last(self, queries: int) -> np.ndarray:
        """``(S, queries)``: the last place that each new token of a row sees; rows with fewer are padded."""
        last = self.history[:, None] + np.arange(queries)
        if self.reach is not None:
            last[self._rows, self._offsets] = self.reach
        return last

    # ------------------------------------------------------------ accelerators

    def _by_kernel(self, layer: int, q_THd: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        kv, device = self.kv, q_THd.device
        keys, values = kv.layers[layer]
        dtype = keys.dtype if keys.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        cu_q = F.pad(torch.from_numpy(np.cumsum(self.counts)), (1, 0)).to(device, torch.int32)
        lengths = self.history + self.counts - self.first
        options = {"scale": q_THd.shape[-1] ** -0.5, "window_size": (-1, 0)}
        options["enable_gqa"] = q_THd.shape[1] != keys.shape[2]
        if _reads_tables() and not self.first:
            table = torch.from_numpy(self._table).to(device, torch.int32)
            seen = torch.from_numpy(lengths).to(device, torch.int32)
            most = table.shape[1] * kv.block_tokens
            out = varlen_attn(
                q_THd.to(dtype), keys.to(dtype), values.to(dtype), cu_q, None, self._most, most,
                seqused_k=seen, block_table=table, **options,
            )  # fmt: skip
            return out.to(values.dtype)
        rows = [torch.from_numpy(blocks).to(device) for blocks in self._table]
        both = [
            kv.gather(layer, blocks, self.first, int(length) + self.first)
            for blocks, length in zip(rows, lengths, strict=True)
        ]
        k, v = (torch.cat(side).to(dtype) for side in zip(*both, strict=True))
        cu_k = F.pad(torch.from_numpy(np.cumsum(lengths)), (1, 0)).to(device, torch.int32)
        longest = int(lengths.max())
        out = varlen_attn(q_THd.to(dtype), k, v, cu_q, cu_k, self._most, longest, **options)
        return out.to(values.dtype)


class OfLast:
    """``attend`` where all new tokens of a forward leave keys and values, and the last of each sequence alone asks what
    it sees (or, with ``asks=False``, none does)."""

    def __init__(self, attend: PagedAttention, asks: bool):
        self.attend, self.last = attend, attend.of_last() if asks else None

    def __call__(self, layer: int, q_SHd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        with no_autocast(q_SHd.device.type):
            self.attend.store(layer, k_TGd, v_TGd)
            return q_SHd if self.last is None else self.last.look(layer, q_SHd)


def _columns(tables: Sequence[Sequence[int]] | np.ndarray, width: int) -> np.ndarray:
    """``(S, width)``: the first blocks of each row."""
    if isinstance(tables, np.ndarray) and tables.shape[1] >= width:
        return tables[:, :width]
    table = np.zeros((len(tables), width), dtype=np.int64)
    for row, blocks in enumerate(tables):
        used = min(len(blocks), width)
        table[row, :used] = blocks[:used]
    return table


@cache
def _reads_tables() -> bool:
    """Whether this torch's kernel reads block tables (from 2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return "block_table" in inspect.signature(varlen_attn).parameters


def _powers(most: int) -> list[tuple[int, int]]:
    """1, 2..3, 4..7, ...: what is padded to the largest of its kind is less than doubled."""
    out, low = [], 1
    while low <= most:
        out.append((low, 2 * low - 1))
        low *= 2
    return out


def _behind(q_nHd: Tensor, k_LGd: Tensor, v_LGd: Tensor, history: int, reach_n: np.ndarray | None = None) -> Tensor:
    """Attention of ``n`` tokens that stand at places ``history ...`` of a sequence of L: each sees itself and those
    before it, or itself and all up to its ``reach``. Where there are none (places that are not there), zeros."""
    n, H, d = q_nHd.shape
    L, G = k_LGd.shape[:2]
    skipped = max(-history, 0)  # queries at places that are not there themselves
    if skipped:
        nothing = q_nHd.new_zeros(min(skipped, n), H, d)
        if skipped >= n:
            return nothing
        later = None if reach_n is None else reach_n[skipped:]
        return torch.cat([nothing, _behind(q_nHd[skipped:], k_LGd, v_LGd, 0, later)])
    reach = torch.from_numpy(np.arange(history, history + n) if reach_n is None else reach_n).to(q_nHd.device)
    k, v = k_LGd.transpose(0, 1), v_LGd.transpose(0, 1)  # (G, L, d)
    out = []
    for at in range(0, n, TILE):
        part = q_nHd[at : at + TILE]
        m = part.shape[0]
        own = torch.arange(history + at, history + at + m, device=k.device)
        end = min(history + at + TILE, L)
        if reach_n is not None:
            end = max(int(reach_n[at : at + TILE].max()) + 1, history + at + m)
        rows = part.view(m, G, H // G, d).permute(1, 0, 2, 3).reshape(G, m * (H // G), d)
        there = torch.arange(end, device=k.device)
        seen = (there <= reach[at : at + m, None]) | (there == own[:, None])
        mask = None if m == 1 and reach_n is None else seen.repeat_interleave(H // G, dim=0)
        got = F.scaled_dot_product_attention(rows[None], k[None, :, :end], v[None, :, :end], attn_mask=mask)[0]
        out.append(got.view(G, m, H // G, d).permute(1, 0, 2, 3).reshape(m, H, d))
    return torch.cat(out)
