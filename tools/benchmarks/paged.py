"""Attention of decoded tokens over a paged cache, against the ways of others over the same keys and values.

S sequences of log-normal lengths (deviation 0.6 in the logarithm), each with one new token; four layers. Ours compares
whole blocks where they lie (`mmagent/generation/paged.py`). The peers, both with torch's fused attention and a mask:

- `padded`: a cache of one row a sequence, as long as the longest, as static caches have it. It
  pays nothing for finding its keys, and for padding instead;
- `gathered`: blocks as ours, brought together for every token, as paged caches do where no kernel reads block tables.

`shared`: all sequences begin with the same 256 tokens, whose blocks ours has and reads once. Results are compared
before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.generation.paged import PagedAttention, PagedKV
from tools.benchmarks.row import Row, Settings, throughputs

BLOCK, LAYERS, PREFIX = 32, 4, 256


class Problem(NamedTuple):
    """Sequences in blocks, and the new token's query, key and value of each."""

    kv: PagedKV
    tables: list[list[int]]
    lengths: np.ndarray
    q: Tensor
    k: Tensor
    v: Tensor


def rows(settings: Settings) -> Iterator[Row]:
    shapes = [(32, 400, 3, 3), (128, 300, 3, 3), (32, 400, 12, 2), (4, 4000, 3, 3), (32, 2000, 3, 3)]
    for dtype in (torch.float32, torch.bfloat16):
        for S, mean, H, G in shapes[:1] if settings.quick else shapes:
            for shared in (False, True) if (S, H) == (32, 3) and mean < 1000 else (False,):
                with torch.inference_mode():
                    yield from compared(problem(S, mean, H, G, dtype, shared), mean, shared, settings)


def problem(S: int, mean: int, H: int, G: int, dtype: torch.dtype, shared: bool) -> Problem:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(mean), 0.6, S).astype(int), 20, 3 * mean) + (PREFIX if shared else 0)
    common = list(range(PREFIX // BLOCK)) if shared else []
    tables, at = [], len(common)
    for length in lengths.tolist():
        own = -(-(length + 1) // BLOCK) - len(common)
        tables.append(common + list(range(at, at + own)))
        at += own
    generator = torch.Generator().manual_seed(0)
    kv = PagedKV(at, BLOCK, torch.device("cpu"))
    for layer in range(LAYERS):
        pair = [torch.randn(at, G, BLOCK, 64, generator=generator).to(dtype) for _ in range(2)]
        kv.layers[layer] = (pair[0], pair[1])
    q, k, v = (torch.randn(S, heads, 64, generator=generator).to(dtype) for heads in (H, G, G))
    return Problem(kv, tables, lengths, q, k, v)


def compared(of: Problem, mean: int, shared: bool, settings: Settings) -> Iterator[Row]:
    ours = by_blocks(of)
    peers = {"padded": padded(of), "gathered": gathered(of)}
    tolerance = 1e-4 if of.q.dtype == torch.float32 else 3e-2  # a bf16 has eight bits
    want = ours()
    for name, peer in peers.items():
        torch.testing.assert_close(
            peer().float(), want.float(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )
    S, H, _ = of.q.shape
    kind = "fp32" if of.q.dtype == torch.float32 else "bf16"
    name = f"{S} sequences of some {mean}{' shared' if shared else ''}, {H} heads on {of.k.shape[1]}, {kind}"
    yield from throughputs(name, ours, peers, S, "tokens/s", settings)


def by_blocks(of: Problem) -> Callable[[], Tensor]:
    def step() -> Tensor:
        attend = PagedAttention(of.kv, of.tables, of.lengths, np.ones(len(of.tables), dtype=int))
        return [attend(layer, of.q, of.k, of.v) for layer in range(LAYERS)][-1]

    return step


def padded(of: Problem) -> Callable[[], Tensor]:
    S, G = of.k.shape[:2]
    table, longest = _table(of), max(map(len, of.tables)) * BLOCK
    cache = [
        [x[table].transpose(1, 2).reshape(S, G, longest, 64).contiguous() for x in of.kv.layers[layer]]
        for layer in range(LAYERS)
    ]
    rows, at = torch.arange(S), torch.from_numpy(of.lengths)

    def step() -> Tensor:
        mask = (torch.arange(longest) <= at[:, None])[:, None, None]
        for keys, values in cache:
            keys[rows, :, at], values[rows, :, at] = of.k, of.v
            out = _fused(of.q, keys, values, mask)
        return out

    return step


def gathered(of: Problem) -> Callable[[], Tensor]:
    S, G = of.k.shape[:2]

    def step() -> Tensor:
        table, at = _table(of), torch.from_numpy(of.lengths)
        longest = table.shape[1] * BLOCK
        mask = (torch.arange(longest) <= at[:, None])[:, None, None]
        written = of.kv.places(table[torch.arange(S), at // BLOCK], at % BLOCK, G)
        for layer in range(LAYERS):
            of.kv.write(layer, written, of.k, of.v)
            keys, values = (x[table].transpose(1, 2).reshape(S, G, longest, 64) for x in of.kv.layers[layer])
            out = _fused(of.q, keys, values, mask)
        return out

    return step


def _fused(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Queries that share a key head are rows of one product, so no key is copied."""
    S, H, d = q.shape
    G = keys.shape[1]
    rows = q.view(S, G, H // G, d)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask.expand(S, 1, H // G, -1)).reshape(S, H, d)


def _table(of: Problem) -> Tensor:
    table = np.zeros((len(of.tables), max(map(len, of.tables))), dtype=np.int64)
    for row, blocks in enumerate(of.tables):
        table[row, : len(blocks)] = blocks
    return torch.from_numpy(table)
