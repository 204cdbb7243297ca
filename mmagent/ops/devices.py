"""Which device a command works on."""

from __future__ import annotations

import torch


def chosen_device(named: str | None = None) -> str:
    """What a user ``named``, else a GPU if there is one. Raises ``ValueError`` for one that cannot be used here."""
    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from error
    return device
