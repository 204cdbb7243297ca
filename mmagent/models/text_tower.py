"""A small transformer over packed captions: what an encoder is aligned with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmagent.models.layers import Embedding, Linear, Recomputed, RMSNorm, SwiGLU, collect_roles
from mmagent.ops.attention import varlen_attention
from mmagent.ops.rotary import Rotation, angles_1d, rotate
from mmagent.types import ParamRole, Segments


@dataclass
class TextTowerConfig:
    """``causal=False`` lets every token see its whole caption. Captions are cut to ``max_length`` ids, end included."""

    vocab_size: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 2048
    max_length: int = 64
    causal: bool = False
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"text tower: width {self.width} over {self.heads} heads must give heads of even size")


class TextBlock(Recomputed):
    """Pre-norm attention within each caption and SwiGLU, each added to the residual stream."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        width = config.width
        self.heads, self.causal = config.heads, config.causal
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.qkv = Linear(width, 3 * width, splits=(width, width, width))
        self.q_norm = RMSNorm(width // config.heads, config.norm_eps)
        self.k_norm = RMSNorm(width // config.heads, config.norm_eps)
        self.out = Linear(width, width, depth=config.depth)
        self.ffn_norm = RMSNorm(width, config.norm_eps)
        self.ffn = SwiGLU(width, config.ffn, depth=config.depth)

    def forward(self, x_TD: Tensor, rotation: Rotation, segments: Segments) -> Tensor:
        return self.recomputed(self._compute, x_TD, rotation, segments)

    def _compute(self, x_TD: Tensor, rotation: Rotation, segments: Segments) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x_TD)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        x_TD = x_TD + self.out(varlen_attention(q, k, v, segments, causal=self.causal).flatten(1))
        return x_TD + self.ffn(self.ffn_norm(x_TD))


class TextTower(nn.Module):
    """Pre-norm blocks with rotary positions that start anew in every caption. A caption's summary is its last token,
    which the data makes an end token, so that an empty caption has one, too."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.config = config
        self.width = config.width
        self.embedding = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, text_ids: Tensor, segments: Segments) -> Tensor:
        """``text_ids (T,)`` of N captions to ``(N, width)``. Raises ``ValueError`` for a caption that is too long."""
        if segments.longest > self.config.max_length:
            raise ValueError(f"a caption of {segments.longest} ids exceeds max_length {self.config.max_length}")
        starts = segments.cu_seqlens[:-1].long()
        positions = torch.arange(segments.total, device=text_ids.device) - starts[segments.ids()]
        pairs = self.config.width // self.config.heads // 2
        rotation = Rotation.from_angles(angles_1d(positions, pairs, self.config.rope_base))
        x = self.embedding(text_ids)
        for layer in self.layers:
            x = layer(x, rotation, segments)
        return self.norm(x[segments.cu_seqlens[1:].long() - 1])

    def roles(self) -> Mapping[str, ParamRole]:
        return collect_roles(self, "text")

    def blocks(self) -> Iterable[nn.Module]:
        return self.layers

    def leaves(self) -> Iterable[nn.Module]:
        return ()


def text_laptop(vocab_size: int) -> TextTowerConfig:
    """Beside the laptop's encoder."""
    return TextTowerConfig(vocab_size=vocab_size, width=128, depth=3, heads=4, ffn=344)


def text_debug(vocab_size: int) -> TextTowerConfig:
    return TextTowerConfig(vocab_size=vocab_size, width=32, depth=1, heads=2, ffn=64)
