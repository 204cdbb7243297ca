"""Classes that are only named: the nearest text says what an image shows."""

from __future__ import annotations

from torch import Tensor


def zero_shot_accuracy(images: Tensor, labels: Tensor, classes: Tensor) -> float:
    """Share of ``images (I, E)`` nearest to the text of their class, ``classes (K, E)``, all of unit length."""
    return float(((images @ classes.T).argmax(dim=1) == labels).float().mean())
