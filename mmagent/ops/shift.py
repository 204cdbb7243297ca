"""The one place where labels are shifted to become targets."""

from __future__ import annotations

import torch
from torch import Tensor

from mmagent.types import IGNORE, Segments


def shift(labels: Tensor, depth: int, segments: Segments, fill: int = IGNORE) -> Tensor:
    """``out[t] = labels[t + depth]`` where both lie in one document, else ``fill``. ``labels (T, ...)``.

    ``labels[t]`` belongs to the token *at* ``t``. Depth 1 gives next-token targets, depth 2 and up those of
    the MTP heads; RL shifts its advantages and log-probs by 1 with ``fill=0``.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if segments.total != labels.shape[0]:
        raise ValueError(f"{labels.shape[0]} labels in segments of {segments.total}")
    out = torch.full_like(labels, fill)
    if depth < labels.shape[0]:
        ids = segments.ids()
        same = (ids[depth:] == ids[:-depth]).view(-1, *[1] * (labels.ndim - 1))
        out[:-depth] = torch.where(same, labels[depth:], out[:-depth])
    return out
