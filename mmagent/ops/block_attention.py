"""Attention by blocks of a document: what discrete diffusion needs beside causal attention.

A document's tokens stand in *blocks*, numbered in order; tokens of one block see each other and all blocks before. A
response is cut into blocks of some size, and every other token (prompt, picture, tool's answer) is a block by itself:
so a prompt is read exactly as an autoregressive decoder reads it.

Training sees a noised response and its clean past in one pass (BD3-LM, arXiv 2503.09573): behind the clean document
stand *copies* of its response. A token of a copy sees its own block of that copy, and the clean blocks before it; clean
tokens see clean tokens alone. Copies never see each other, so each gets what it would get alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.types import Segments


def block_ids(response_L: Tensor, block: int) -> Tensor:
    """``(L,)`` int64, from 0 and never falling: the block of each token of one document.

    ``response_L`` bool: tokens of responses. Every run of them is cut into pieces of ``block`` tokens, from its first
    on; every other token is a block by itself. Raises ``ValueError`` for a block of less than one token.
    """
    if block < 1:
        raise ValueError(f"a block has at least one token, got {block}")
    at = torch.arange(response_L.shape[0], device=response_L.device)
    before = F.pad(response_L, (1, 0))[:-1]
    run = torch.where(response_L & ~before, at, 0).cummax(0).values if at.numel() else at
    begins = ~response_L | ((at - run) % block == 0)
    return begins.cumsum(0) - 1


def seen_blocks(blocks_L: Tensor, copies_L: Tensor) -> Tensor:
    """``(L, L)`` bool: whether the token of a row sees that of a column. ``copies_L`` is 0 for clean tokens."""
    clean = copies_L == 0
    before = blocks_L[None, :] < (blocks_L + clean.long())[:, None]
    own = (copies_L[:, None] == copies_L[None, :]) & (blocks_L[:, None] == blocks_L[None, :])
    return torch.where(clean[None, :], before, own)


def block_masks(segments: Segments, blocks_T: Tensor, copies_T: Tensor) -> tuple[Tensor, ...]:
    """:func:`seen_blocks` of every segment. Raises ``ValueError`` where the three are not of one stream."""
    if blocks_T.shape != (segments.total,) or copies_T.shape != (segments.total,):
        raise ValueError(
            f"{tuple(blocks_T.shape)} blocks and {tuple(copies_T.shape)} copies for segments of {segments.total} tokens"
        )
    parts = zip(blocks_T.split(segments.lengths), copies_T.split(segments.lengths), strict=True)
    return tuple(seen_blocks(blocks, copies) for blocks, copies in parts)


def block_attention(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, masks: tuple[Tensor, ...], scale: float | None = None
) -> Tensor:
    """Softmax attention within each segment under its mask of :func:`block_masks`; in fp32 on CPUs.

    ``(T, H, d)`` queries, ``(T, G, d)`` keys and values; the result has the dtype of ``v``. Raises ``ValueError`` where
    the masks are of another stream.
    """
    lengths = [mask.shape[0] for mask in masks]
    if sum(lengths) != q_THd.shape[0]:
        raise ValueError(f"masks of {sum(lengths)} tokens for {q_THd.shape[0]} queries")
    dtype = torch.float32 if q_THd.device.type == "cpu" else v_TGd.dtype
    parts = []
    with torch.autocast(q_THd.device.type, enabled=False):
        streams = (x.to(dtype).transpose(0, 1).split(lengths, dim=1) for x in (q_THd, k_TGd, v_TGd))
        for mask, query, key, value in zip(masks, *streams, strict=True):
            grouped = query.shape[0] != key.shape[0]
            run = (x.unsqueeze(0) for x in (query, key, value))
            out = F.scaled_dot_product_attention(*run, attn_mask=mask, scale=scale, enable_gqa=grouped)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts).to(v_TGd.dtype)
