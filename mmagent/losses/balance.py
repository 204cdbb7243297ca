"""How evenly a router spreads its tokens."""

from __future__ import annotations

from torch import Tensor


def max_violation(load_ME: Tensor) -> Tensor:
    """``(M,)``: maximum load over mean load, minus 1 (0 is perfect balance); 0 for a layer that saw no token."""
    return load_ME.amax(-1) / load_ME.mean(-1).clamp(min=1e-20) * (load_ME.sum(-1) > 0) - (load_ME.sum(-1) > 0).float()
