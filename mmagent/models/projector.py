"""From encoder width to decoder width, four patches to one visual token.

``merge_size**2`` consecutive patches -> Linear -> Linear -> LayerNorm -> GELU -> SwiGLU: the merger of the
GLM-V family (its strided convolution over a merge block is the first linear layer, since patches arrive
merge-block-major). ``merge="average"`` is that of Seed-ViT (arXiv 2505.07062): the mean of a merge block, then an MLP
of two layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.models.layers import Linear, Recomputed, SwiGLU


@dataclass
class ProjectorConfig:
    """``ffn``: inner width; the released models take about three times the decoder's. ``swiglu_limit`` is that of
    :class:`~mmagent.models.layers.SwiGLU`. ``merge``: ``linear`` (GLM-V) or ``average`` (Seed-ViT)."""

    ffn: int = 4608
    swiglu_limit: float = 0.0
    merge: str = "linear"

    def __post_init__(self) -> None:
        if self.merge not in ("linear", "average"):
            raise ValueError(f"projector: merge must be 'linear' or 'average', got {self.merge!r}")


class Projector(Recomputed):
    """Merges ``merge_size**2`` neighbouring patches into one visual token of the decoder's width."""

    def __init__(self, config: ProjectorConfig, encoder_width: int, merge_size: int, decoder_width: int):
        super().__init__()
        self.block = merge_size**2
        self.average = config.merge == "average"
        if self.average:
            self.norm = nn.LayerNorm(encoder_width)
            self.up = Linear(encoder_width, config.ffn, bias=True)
            self.down = Linear(config.ffn, decoder_width, bias=True)
        else:
            self.merge = Linear(self.block * encoder_width, decoder_width, bias=True)
            self.project = Linear(decoder_width, decoder_width)
            self.norm = nn.LayerNorm(decoder_width)
            self.ffn = SwiGLU(decoder_width, config.ffn, limit=config.swiglu_limit)

    def forward(self, tokens_PW: Tensor) -> Tensor:
        """``(P, W)`` to ``(V, D)``."""
        return self.recomputed(self._compute, tokens_PW)

    def _compute(self, tokens_PW: Tensor) -> Tensor:
        blocks = tokens_PW.unflatten(0, (-1, self.block))
        if self.average:
            return self.down(F.gelu(self.up(self.norm(blocks.mean(dim=1)))))
        return self.ffn(F.gelu(self.norm(self.project(self.merge(blocks.flatten(1))))))
