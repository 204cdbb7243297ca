"""From encoder width to decoder width, four patches to one visual token.

``merge_size**2`` consecutive patches -> Linear -> Linear -> LayerNorm -> GELU -> SwiGLU: the merger of the
GLM-V family (its strided convolution over a merge block is the first linear layer, since patches arrive
merge-block-major).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.models.layers import Linear, SwiGLU


@dataclass
class ProjectorConfig:
    ffn: int = 4608  # inner width of the SwiGLU; the released models take about three times the decoder's width
    swiglu_limit: float = 0.0


class Projector(nn.Module):
    """Merges ``merge_size**2`` neighbouring patches into one visual token of the decoder's width."""

    def __init__(self, config: ProjectorConfig, encoder_width: int, merge_size: int, decoder_width: int):
        super().__init__()
        self.block = merge_size**2
        self.merge = Linear(self.block * encoder_width, decoder_width, bias=True)
        self.project = Linear(decoder_width, decoder_width)
        self.norm = nn.LayerNorm(decoder_width)
        self.ffn = SwiGLU(decoder_width, config.ffn, limit=config.swiglu_limit)

    def forward(self, tokens_PW: Tensor) -> Tensor:
        """``(P, W)`` to ``(V, D)``."""
        merged = self.merge(tokens_PW.unflatten(0, (-1, self.block)).flatten(1))
        return self.ffn(F.gelu(self.norm(self.project(merged))))
