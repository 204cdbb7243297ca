"""Keys and values of long contexts, divided by layer over the ranks that share a sequence (LayerSplit).

Every token attends to all before it, so under context parallelism each rank needs, layer by layer, the keys and values
of the whole history, and usually keeps all of them. Here it keeps those of its own layers. While layer l is computed,
the owner of layer l + 1 already broadcasts what it has, so that the transfer hides behind the computation. (LayerSplit
is of Z.ai's report on serving GLM-5, "Scaling Pain", April 2026, https://z.ai/blog/scaling-pain; SGLang has it as pull
request 29421, with a communicator of its own for what goes ahead, as here.)

Let ``row`` be the bytes of one token's keys and values in one layer, ``2 G d`` values: 4,096 for GLM-4.5-Air in bf16.
R ranks, L layers, a history of h tokens, a chunk of c.

**Prefill.** A rank computes queries, keys and values of its slice of the chunk, then attends from its slice.

- *The history* is broadcast by its owner, one layer ahead: every other rank receives ``h row``. Over a prompt of N
  tokens that is about ``N^2 / 2c`` rows a layer, so chunks should be large.
- *The new keys and values* are gathered by all from all: every rank receives ``(R - 1) / R c row``, and so the owner
  has what it keeps. Were they sent to the owner and broadcast from there, the owner would receive as much and everyone
  else ``c row``: ``(R + 1) / R`` times the bytes in all, in two steps that nothing hides instead of one.

**Decoding** moves no keys or values. Layers are owned in contiguous runs, so a rank has all that its layers need: it
computes whole blocks for the new tokens and hands their hidden states (D values each) to the owner of the next run; the
last one samples, and tells all the ids. Of GLM-4.5-Air on 8 ranks, bf16, all ranks together receive for a token:

- 57 KB by hidden states: ``(R - 1) D`` values, in R - 1 messages one after the other;
- 7.9 MB if owners broadcast what attention gives, ``L (R - 1) H d`` values in L broadcasts, all else computed R times;
- 158 GB if histories of 120K tokens went to everyone: ``L (R - 1) h row``.

Contiguous runs cost prefill nothing against dealing layers out in turn: it is one broadcast a layer either way, by one
owner at a time. What they do cost: while one rank decodes, the others wait (tokens of several sequences go together).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmagent.generation.peers import Peers
from mmagent.models.context import slices
from mmagent.models.decoder import DecoderConfig

TAIL = 64
"""Tokens of a block that decoding fills."""
TILE_VALUES = 1 << 24
"""Weights of attention that exist at a time where no kernel avoids them."""


def owners(layers: int, ranks: int) -> tuple[int, ...]:
    """The rank that keeps each layer: contiguous runs, as even as can be. With fewer layers than ranks some have none;
    the last rank always has the last layer."""
    return tuple(rank for rank, own in enumerate(slices(layers, ranks)) for _ in range(own.start, own.stop))


class Chunk(NamedTuple):
    """Tokens ``start`` to ``end`` of a sequence, which are computed at one time. Each rank has ``share`` of them, the
    first ranks the first; what is missing is missing at the last."""

    sequence: int
    start: int
    end: int

    def share(self, ranks: int) -> int:
        return -(-(self.end - self.start) // ranks)

    def rows(self, rank: int, ranks: int) -> slice:
        """Those that ``rank`` computes, counted from the start of the sequence. Maybe none."""
        first = self.start + rank * self.share(ranks)
        return slice(min(first, self.end), min(first + self.share(ranks), self.end))

    def last(self, ranks: int) -> int:
        """The rank that computes the last token."""
        return (self.end - self.start - 1) // self.share(ranks)


def plan_chunks(lengths: Sequence[int], size: int) -> list[Chunk]:
    """Sequences of these lengths, one after the other, ``size`` tokens at a time."""
    return [
        Chunk(sequence, start, min(start + size, length))
        for sequence, length in enumerate(lengths)
        for start in range(0, length, size)
    ]


class KVStore:
    """Keys and values of some ``layers``, by sequence, in blocks of tokens ``(n, 2, G, d)``: growing copies nothing."""

    def __init__(self, layers: Collection[int]):
        self.layers = frozenset(layers)
        self._blocks: dict[tuple[int, int], list[Tensor]] = {}
        self._filled: dict[tuple[int, int], int] = {}  # tokens in the last block

    def append(self, layer: int, sequence: int, block_N2Gd: Tensor) -> None:
        """Take a block as it is: nobody may write to it any more."""
        assert layer in self.layers, f"layer {layer} is kept elsewhere"
        key = layer, sequence
        assert self._filled.get(key, 0) == self._last(key), "what was decoded is not followed by blocks"
        self._blocks.setdefault(key, []).append(block_N2Gd)
        self._filled[key] = block_N2Gd.shape[0]

    def push(self, layer: int, sequence: int, token_2Gd: Tensor) -> None:
        """One more token."""
        key = layer, sequence
        if self._filled.get(key, 0) == self._last(key):
            assert layer in self.layers, f"layer {layer} is kept elsewhere"
            self._blocks.setdefault(key, []).append(token_2Gd.new_empty(TAIL, *token_2Gd.shape))
            self._filled[key] = 0
        self._blocks[key][-1][self._filled[key]] = token_2Gd
        self._filled[key] += 1

    def blocks(self, layer: int, sequence: int) -> list[Tensor]:
        """All there is, in order."""
        key = layer, sequence
        return [*self._blocks[key][:-1], self._blocks[key][-1][: self._filled[key]]]

    def copy_into(self, layer: int, sequence: int, rows_N2Gd: Tensor) -> None:
        """Fill ``rows``, which must be as many as there are."""
        torch.cat(self.blocks(layer, sequence), out=rows_N2Gd)

    def drop(self, sequence: int) -> None:
        for key in [key for key in self._blocks if key[1] == sequence]:
            del self._blocks[key], self._filled[key]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for blocks in self._blocks.values() for block in blocks)

    def _last(self, key: tuple[int, int]) -> int:
        return self._blocks[key][-1].shape[0] if key in self._blocks else 0


@dataclass
class _Buffer:
    """Room for one layer's keys and values of one sequence: ``holds`` names chunk and layer, if any, and ``arrived``
    waits for its history."""

    rows_N2Gd: Tensor
    holds: tuple[int, int] | None = None
    arrived: Callable[[], None] | None = None


class LayerSplit:
    """What the ranks of ``peers`` keep of a list of sequences. All of them build it and call the same things in the
    same order. ``dtype``: of keys and values; what attention gives has it, too."""

    def __init__(self, config: DecoderConfig, peers: Peers, dtype: torch.dtype, device: torch.device):
        self.config, self.peers = config, peers
        self.owners = owners(config.layers, peers.ranks)
        self.own = tuple(layer for layer, owner in enumerate(self.owners) if owner == peers.rank)
        self.store = KVStore(self.own)
        self._like = torch.empty(0, 2, config.kv_heads, config.head_dim, dtype=dtype, device=device)
        self._plan: Sequence[Chunk] = ()
        self._buffers: tuple[_Buffer, ...] = ()

    # ------------------------------------------------------------ prefill

    def begin(self, plan: Sequence[Chunk]) -> None:
        """Make room for chunks that will be computed in this order. Two buffers of the longest sequence are all that a
        rank ever has of layers that it does not own."""
        assert not self._buffers, "a prefill is under way"
        self._plan = plan
        room = max((chunk.start + chunk.share(self.peers.ranks) * self.peers.ranks for chunk in plan), default=0)
        self._buffers = tuple(_Buffer(self._like.new_empty(room, *self._like.shape[1:])) for _ in range(2))
        if plan:
            self._fetch(0, 0)

    def end(self) -> None:
        """All chunks have been computed: give the buffers up."""
        assert all(buffer.holds is None for buffer in self._buffers), "a chunk was left out"
        self._plan, self._buffers = (), ()

    def prefill(self, number: int) -> PrefillAttention:
        """``attend`` for this rank's rows of chunk ``number`` of the plan."""
        return PrefillAttention(self, number)

    @property
    def foreign(self) -> int:
        """Layers of which keys and values are here, or on their way here, though others own them."""
        held = [buffer.holds[1] for buffer in self._buffers if buffer.holds is not None]
        return sum(self.owners[layer] != self.peers.rank for layer in held)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on this rank."""
        return self.store.nbytes + sum(buffer.rows_N2Gd.nbytes for buffer in self._buffers)

    def attend_chunk(self, number: int, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """See :class:`PrefillAttention`."""
        chunk, peers, buffer = self._plan[number], self.peers, self._buffer(number, layer)
        assert buffer.holds == (number, layer), "chunks and layers have an order"
        assert buffer.arrived is not None
        share, own = chunk.share(peers.ranks), chunk.rows(peers.rank, peers.ranks)
        new = self._like.new_zeros(share, *self._like.shape[1:])  # what a short slice lacks is sent as zeros
        new[: own.stop - own.start, 0] = k_TGd
        new[: own.stop - own.start, 1] = v_TGd
        peers.gather_into(buffer.rows_N2Gd[chunk.start : chunk.start + share * peers.ranks], new)
        if self.owners[layer] == peers.rank:
            self.store.append(layer, chunk.sequence, buffer.rows_N2Gd[chunk.start : chunk.end].clone())
        following = (number, layer + 1) if layer + 1 < self.config.layers else (number + 1, 0)
        if following[0] < len(self._plan):
            self._fetch(*following)  # it travels while this layer is computed
        buffer.arrived()
        seen = buffer.rows_N2Gd[: own.stop]
        out = attend_last(q_THd.to(seen.dtype), seen[:, 0], seen[:, 1])
        buffer.holds = buffer.arrived = None
        return out

    def _buffer(self, number: int, layer: int) -> _Buffer:
        return self._buffers[(number * self.config.layers + layer) % 2]

    def _fetch(self, number: int, layer: int) -> None:
        """Begin to bring the history of a chunk in ``layer`` here."""
        chunk, buffer, owner = self._plan[number], self._buffer(number, layer), self.owners[layer]
        assert buffer.holds is None, "a buffer is filled before it is done with"
        buffer.holds, buffer.arrived = (number, layer), lambda: None
        assert self.foreign <= 2
        if not chunk.start:
            return
        history = buffer.rows_N2Gd[: chunk.start]
        if owner == self.peers.rank:
            self.store.copy_into(layer, chunk.sequence, history)
        buffer.arrived = self.peers.broadcast_ahead(history, owner)

    # ------------------------------------------------------------ decoding

    def decode(self, sequences: Sequence[int]) -> DecodeAttention:
        """``attend`` for one new token of each of ``sequences``, in the layers that this rank owns."""
        return DecodeAttention(self.store, tuple(sequences), self._like.dtype)


@dataclass(frozen=True)
class PrefillAttention:
    """Causal attention of this rank's rows of a chunk over all of the sequence before them. A collective in every
    layer: ranks without rows call it, too."""

    split: LayerSplit
    number: int

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        return self.split.attend_chunk(self.number, layer, q_THd, k_TGd, v_TGd)


@dataclass(frozen=True)
class DecodeAttention:
    """One new token a sequence, over what lies here: no collective, and for own layers alone."""

    store: KVStore
    sequences: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self, layer: int, q_SHd: Tensor, k_SGd: Tensor, v_SGd: Tensor) -> Tensor:
        new = torch.stack([k_SGd, v_SGd], dim=1).to(self.dtype)
        out = []
        for row, sequence in enumerate(self.sequences):
            self.store.push(layer, sequence, new[row])
            out.append(attend_blocks(q_SHd[row].to(self.dtype), self.store.blocks(layer, sequence)))
        return torch.stack(out)


def attend_last(q_NHd: Tensor, k_MGd: Tensor, v_MGd: Tensor) -> Tensor:
    """Softmax attention of the last N of M tokens over themselves and what is before them: ``(N, H, d)``."""
    (N, H, d), (M, G, _) = q_NHd.shape, k_MGd.shape
    assert N <= M, f"{N} tokens ask, of {M}"
    if not N:
        return torch.empty_like(q_NHd)
    with torch.autocast(q_NHd.device.type, enabled=False):
        if q_NHd.device.type == "cuda" and q_NHd.dtype in (torch.bfloat16, torch.float16):
            return _flash(q_NHd, k_MGd, v_MGd)
        shared = H // G
        queries = (q_NHd * d**-0.5).view(N, G, shared, d).transpose(0, 1).reshape(G, N * shared, d)
        keys, values, out = k_MGd.permute(1, 2, 0), v_MGd.transpose(0, 1), torch.empty_like(queries)
        tile = max(TILE_VALUES // (H * M), 8)
        for start in range(0, N, tile):
            end = min(start + tile, N)
            rows, seen = slice(start * shared, end * shared), M - N + end
            scores = torch.matmul(queries[:, rows], keys[:, :, :seen]).float()
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=scores.device).triu_(1)
            scores[:, :, seen - (end - start) :].masked_fill_(later.repeat_interleave(shared, 0), float("-inf"))
            out[:, rows] = torch.matmul(torch.softmax(scores, -1).to(values.dtype), values[:, :seen])
        return out.view(G, N, shared, d).transpose(0, 1).reshape(N, H, d)


def _flash(q_NHd: Tensor, k_MGd: Tensor, v_MGd: Tensor) -> Tensor:
    """The kernel lets the last query see the last key where there are fewer queries than keys."""
    from torch.nn.attention.varlen import varlen_attn

    borders = [torch.tensor([0, x.shape[0]], dtype=torch.int32, device=q_NHd.device) for x in (q_NHd, k_MGd)]
    grouped = q_NHd.shape[1] != k_MGd.shape[1]
    return varlen_attn(
        q_NHd, k_MGd, v_MGd, *borders, q_NHd.shape[0], k_MGd.shape[0], window_size=(-1, 0), enable_gqa=grouped
    )


def attend_blocks(q_Hd: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Softmax attention of one token over ``blocks (n, 2, G, d)`` of keys and values, not joined: ``(H, d)``."""
    H, d = q_Hd.shape
    G = blocks[0].shape[2]
    with torch.autocast(q_Hd.device.type, enabled=False):
        queries = (q_Hd * d**-0.5).view(G, H // G, d)
        scores = torch.cat([torch.matmul(queries, block[:, 0].permute(1, 2, 0)) for block in blocks], dim=-1)
        weights = torch.softmax(scores.float(), -1).to(q_Hd.dtype).split([len(block) for block in blocks], dim=-1)
        out = sum(torch.matmul(w, block[:, 1].transpose(0, 1)) for w, block in zip(weights, blocks, strict=True))
        assert isinstance(out, Tensor)
        return out.reshape(H, d)
