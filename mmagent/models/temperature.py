"""The two learned numbers of SigLIP's sigmoid loss (arXiv 2303.15343)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """``log_scale (1,)`` and ``bias (1,)``: logits are ``exp(log_scale) * cosine + bias``. Of these shapes, as sharded
    engines have no place for scalars."""

    full_precision = True
    """Asks a sharding engine to leave its parameters in float32: a scale in bfloat16 moves by steps of a percent."""

    def __init__(self, scale: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = nn.Parameter(torch.tensor([bias]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both, with gradient; copies, for a sharding engine frees what it gathered."""
        return self.log_scale.clone(), self.bias.clone()
