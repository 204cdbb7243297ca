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
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.ops.attention import varlen_attention
from mmagent.types import Segments

FEW = 16
"""New tokens a sequence up to which blocks are compared where they lie."""
DENSE = 0.5
"""Blocks in use are read where they lie if they are at least this share of those between the first and the last."""
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

    def write(self, layer: int, blocks: Tensor, places: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Store T tokens of ``layer`` at ``places (T,)`` of ``blocks (T,)``."""
        keys, values = self._layer(layer, k_TGd)
        for stored, x in ((keys, k_TGd), (values, v_TGd)):
            if self.head_major:
                stored[blocks, :, places] = x.to(stored.dtype)
            else:
                stored[blocks, places] = x.to(stored.dtype)

    def _layer(self, layer: int, like_TGd: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            groups, dim = like_TGd.shape[1:]
            inner = (groups, self.block_tokens, dim) if self.head_major else (self.block_tokens, groups, dim)
            # zeros, not garbage: places nobody wrote still meet weights of zero, where 0 * NaN would count
            self.layers[layer] = (like_TGd.new_zeros(self.blocks, *inner), like_TGd.new_zeros(self.blocks, *inner))
        return self.layers[layer]

    def grow(self, blocks: int) -> None:
        for layer, pair in self.layers.items():
            more = [x.new_zeros(blocks - self.blocks, *x.shape[1:]) for x in pair]
            self.layers[layer] = (torch.cat([pair[0], more[0]]), torch.cat([pair[1], more[1]]))
        self.blocks = blocks

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What lies in blocks ``sources`` into blocks ``targets``."""
        if sources:
            at, to = (torch.tensor(numbers, device=self.device) for numbers in (sources, targets))
            for pair in self.layers.values():
                for x in pair:
                    x[to.to(x.device)] = x[at.to(x.device)]

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


class _Blocks(NamedTuple):
    """How the rows of a forward meet their blocks. ``entry (S, W)``: where a row's blocks stand among the results of
    all parts, one after the other; ``dead (S, W)`` is true behind a row's last block. ``tails``: entries of blocks with
    places that some query of their row must not see, and ``unseen (n, N, block_tokens)`` which those are."""

    parts: tuple[_Part, ...]
    entry: Tensor
    dead: Tensor
    tails: Tensor
    unseen: Tensor


class PagedAttention:
    """One forward over ``counts (S,)`` new tokens behind ``history (S,)`` stored ones, of S sequences whose blocks are
    ``tables``. ``apart``: every row is attended to by itself, over its own length alone, so that what a row gets
    depends on no other, to the last bit. ``first`` places of each sequence are not there (for MTP depths)."""

    def __init__(
        self,
        kv: PagedKV,
        tables: Sequence[Sequence[int]],
        history: np.ndarray,
        counts: np.ndarray,
        apart: bool = False,
        first: int = 0,
    ):
        assert len(tables) == len(history) == len(counts)
        assert counts.min() > 0
        self.kv, self.tables, self.history, self.counts = kv, tables, history, counts
        self.apart, self.first = apart, first
        size = kv.block_tokens
        total = int(counts.sum())
        starts = np.cumsum(counts) - counts
        self._rows = np.repeat(np.arange(len(counts)), counts)
        self._offsets = np.arange(total) - starts[self._rows]
        places = history[self._rows] + self._offsets
        width = -(-int((history + counts).max()) // size)
        table = np.zeros((len(tables), width), dtype=np.int64)
        for row, blocks in enumerate(tables):
            used = min(len(blocks), width)
            table[row, :used] = blocks[:used]
        self._table = table
        self._write_blocks = torch.from_numpy(table[self._rows, places // size]).to(kv.device)
        self._write_places = torch.from_numpy(places % size).to(kv.device)
        self._starts = starts
        self._prepared: _Blocks | None = None
        self._depths: dict[int, PagedAttention] = {}
        self._where: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def behind(self, first: int) -> PagedAttention:
        """The same forward for sequences of which the first places are not there."""
        if first not in self._depths:
            self._depths[first] = PagedAttention(self.kv, self.tables, self.history, self.counts, self.apart, first)
        return self._depths[first]

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        kv = self.kv
        with torch.autocast(q_THd.device.type, enabled=False):
            kv.write(layer, *self._written(k_TGd.device), k_TGd, v_TGd)
            if not self.history.any() and self.counts.min() > self.first and self.counts.max() > 1:
                return self._fresh(q_THd, k_TGd, v_TGd)
            q_THd = q_THd.to(kv.layers[layer][0].dtype)
            if kv.device.type == "cuda":
                return self._by_kernel(layer, q_THd)
            if self.apart or self.counts.max() > FEW:
                return self._by_rows(layer, q_THd)
            return self._by_blocks(layer, q_THd)

    def _written(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Blocks and places of the new tokens, on a layer's device."""
        if device not in self._where:
            self._where[device] = self._write_blocks.to(device), self._write_places.to(device)
        return self._where[device]

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
            out.append(_behind(q_THd[start : start + count], k, v, history - self.first))
        return torch.cat(out)

    # ------------------------------------------------------------ blocks where they lie

    def _by_blocks(self, layer: int, q_THd: Tensor) -> Tensor:
        if self._prepared is None:
            self._prepared = self._prepare()
        plan, (keys, values) = self._prepared, self.kv.layers[layer]
        S, N = len(self.counts), int(self.counts.max())
        T, H, d = q_THd.shape
        G, size = keys.shape[1], self.kv.block_tokens
        q = q_THd.view(T, G, H // G, d)
        whole = N == 1
        if whole:
            rows = q  # (S, G, R, d)
        else:
            padded = q.new_zeros(S, N, G, H // G, d)
            padded[self._rows_at, self._offsets_at] = q
            rows = padded.permute(0, 2, 1, 3, 4).reshape(S, G, N * (H // G), d)
        rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, 1))  # one that nobody is, for blocks nobody owns
        M = rows.shape[2]
        tops, sums, outs = [], [], []
        done = 0
        for blocks, owners in plan.parts:
            n, many = owners.shape
            asked = rows[owners]  # (n, m, G, M, d)
            asked = asked.squeeze(1) if many == 1 else asked.transpose(1, 2).reshape(n, G, many * M, d)
            k, v = keys[blocks], values[blocks]
            scores = torch.bmm(asked.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).float().mul_(d**-0.5)
            scores = scores.view(n, G, many, M, size)
            inside = (plan.tails >= done) & (plan.tails < done + n * many)
            if bool(inside.any()):
                at, own = plan.tails[inside] - done, plan.unseen[inside]
                hidden = own[:, None, :, None].expand(-1, G, N, H // G, size).reshape(-1, G, M, size)
                spot = (at // many, slice(None), at % many)
                scores[spot] = scores[spot].masked_fill(hidden, float("-inf"))
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top.clamp_min(-1e30)).exp_()
            sums.append(weights.sum(-1).transpose(1, 2).reshape(n * many, G, M))
            tops.append(top.squeeze(-1).transpose(1, 2).reshape(n * many, G, M))
            out = torch.bmm(weights.to(v.dtype).view(n * G, many * M, size), v.flatten(0, 1))
            outs.append(out.view(n, G, many, M, d).transpose(1, 2).reshape(n * many, G, M, d))
            done += n * many
        top, total, out = (x[0] if len(x) == 1 else torch.cat(x) for x in (tops, sums, outs))
        top_W = top[plan.entry].masked_fill(plan.dead[:, :, None, None], float("-inf"))  # (S, W, G, M)
        share = (top_W - top_W.amax(1, keepdim=True).clamp_min(-1e30)).exp_()
        total_S = (share * total[plan.entry]).sum(1).clamp_min(1e-30)  # no place is there: zeros, not 0 / 0
        share = share / total_S.unsqueeze(1)
        joined = torch.einsum("swgm,swgmd->sgmd", share, out[plan.entry].float()).to(values.dtype)
        if whole:
            return joined.reshape(T, H, d)
        joined = joined.view(S, G, N, H // G, d).permute(0, 2, 1, 3, 4)
        return joined[self._rows_at, self._offsets_at].reshape(T, H, d)

    @property
    def _rows_at(self) -> Tensor:
        return torch.from_numpy(self._rows)

    @property
    def _offsets_at(self) -> Tensor:
        return torch.from_numpy(self._offsets)

    def _prepare(self) -> _Blocks:
        size, S, N = self.kv.block_tokens, len(self.counts), int(self.counts.max())
        used = -(-(self.history + self.counts) // size)
        width = int(used.max())
        live = np.arange(width) < used[:, None]
        pair_row, pair_at = np.nonzero(live)
        pair_block = self._table[pair_row, pair_at]
        order = np.argsort(pair_block, kind="stable")
        blocks, first, many = np.unique(pair_block[order], return_index=True, return_counts=True)
        entry_of = np.empty(len(pair_block), dtype=np.int64)
        low, high = int(blocks[0]), int(blocks[-1]) + 1
        dense = len(blocks) >= DENSE * (high - low)
        owners = np.full(high - low if dense else len(blocks), S, dtype=np.int64)
        places = blocks - low if dense else np.arange(len(blocks))
        leaders = order[first]
        owners[places], entry_of[leaders] = pair_row[leaders], places
        parts = [_Part(slice(low, high) if dense else torch.from_numpy(blocks), torch.from_numpy(owners)[:, None])]
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
            parts.append(_Part(torch.from_numpy(blocks[chosen]), torch.from_numpy(shared)))
            done += shared.size
        entry = np.zeros((S, width), dtype=np.int64)
        entry[pair_row, pair_at] = entry_of
        tails, unseen = self._unseen(live, entry, N)
        return _Blocks(tuple(parts), torch.from_numpy(entry), torch.from_numpy(~live), tails, unseen)

    def _unseen(self, live: np.ndarray, entry: np.ndarray, queries: int) -> tuple[Tensor, Tensor]:
        """Entries of blocks in which some query of their row must not see some place, and those places."""
        size = self.kv.block_tokens
        begins = np.arange(live.shape[1]) * size
        cut = live & ((begins + size > self.history[:, None] + 1) | (begins < self.first))
        row, at = np.nonzero(cut)
        places = begins[at][:, None, None] + np.arange(size)
        last = (self.history[row][:, None] + np.arange(queries))[:, :, None]
        return torch.from_numpy(entry[row, at]), torch.from_numpy((places > last) | (places < self.first))

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
                q_THd.to(dtype), keys.to(dtype), values.to(dtype), cu_q, None, int(self.counts.max()), most,
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
        out = varlen_attn(q_THd.to(dtype), k, v, cu_q, cu_k, int(self.counts.max()), longest, **options)
        return out.to(values.dtype)


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


def _behind(q_nHd: Tensor, k_LGd: Tensor, v_LGd: Tensor, history: int) -> Tensor:
    """Attention of ``n`` tokens that stand at places ``history ...`` of a sequence of L: each sees itself and those
    before it. Where there are none (places that are not there), zeros."""
    n, H, d = q_nHd.shape
    L, G = k_LGd.shape[:2]
    skipped = max(-history, 0)  # queries at places that are not there themselves
    if skipped:
        nothing = q_nHd.new_zeros(min(skipped, n), H, d)
        return nothing if skipped >= n else torch.cat([nothing, _behind(q_nHd[skipped:], k_LGd, v_LGd, 0)])
    k, v = k_LGd.transpose(0, 1), v_LGd.transpose(0, 1)  # (G, L, d)
    out = []
    for at in range(0, n, TILE):
        part = q_nHd[at : at + TILE]
        m, end = part.shape[0], min(history + at + TILE, L)
        rows = part.view(m, G, H // G, d).permute(1, 0, 2, 3).reshape(G, m * (H // G), d)
        seen = torch.arange(end, device=k.device) <= history + at + torch.arange(m, device=k.device)[:, None]
        mask = None if m == 1 else seen.repeat_interleave(H // G, dim=0)
        got = F.scaled_dot_product_attention(rows[None], k[None, :, :end], v[None, :, :end], attn_mask=mask)[0]
        out.append(got.view(G, m, H // G, d).permute(1, 0, 2, 3).reshape(m, H, d))
    return torch.cat(out)
