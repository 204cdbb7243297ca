"""Operations that choose their own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(kind: str) -> AbstractContextManager[None]:
    """``torch.autocast(kind, enabled=False)``, and nothing at all where none is on: a dozen times a step of decoding
    that would take as long as a layer's norms."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
