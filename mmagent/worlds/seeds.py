"""Which seeds train and which evaluate."""

from __future__ import annotations

SPLITS = ("train", "validation", "test")


def seed_for(split: str, index: int) -> int:
    """The ``index``-th seed of a split. Splits are residue classes, so no seed belongs to two of them."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index {index} is negative")
    return index * len(SPLITS) + SPLITS.index(split)
