"""State dicts of other libraries and ours, mapped in both directions by one declared list of rules.

A rule pairs one tensor of ours with one or more of theirs and is exact: renaming, reshaping, stacking and
splitting move bits and compute nothing, so a round trip is bitwise. An :class:`Adapter` is strict both ways:
a tensor that no rule names, or that a rule misses, is an error that says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rule:
    """Ours has ``shape`` (None: that of theirs) and is theirs stacked along the rows.

    ``sizes``: rows of each part when there are several. ``permute``: axes of theirs in the order ours flattens
    them in, with ``their_shape`` to undo it (convolutions that became matrices).
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    permute: tuple[int, ...] = ()
    their_shape: tuple[int, ...] = ()

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.sizes:
            rows = tuple(t.shape[0] for t in tensors)
            if rows != self.sizes:
                raise ValueError(f"{', '.join(self.theirs)}: {rows} rows, expected {self.sizes}")
            return torch.cat(list(tensors))
        (tensor,) = tensors
        if not self.permute:
            return tensor
        if tuple(tensor.shape) != self.their_shape:
            raise ValueError(f"{self.theirs[0]}: shape {tuple(tensor.shape)}, expected {self.their_shape}")
        return tensor.permute(self.permute).reshape(tensor.shape[0], -1)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        if self.sizes:
            return [part.clone() for part in tensor.split(self.sizes)]  # safetensors wants no shared memory
        if not self.permute:
            return [tensor]
        axes = tuple(self.their_shape[axis] for axis in self.permute)
        back = tuple(self.permute.index(axis) for axis in range(len(axes)))
        return [tensor.view(axes).permute(back).contiguous()]


def rename(ours: str, theirs: str, names: Iterable[str] = ("weight",)) -> list[Rule]:
    """One rule for each of ``names`` under the two prefixes."""
    return [Rule(f"{ours}.{name}", (f"{theirs}.{name}",)) for name in names]


def stack(ours: str, theirs: Sequence[str], sizes: Sequence[int], names: Iterable[str] = ("weight",)) -> list[Rule]:
    """Several of theirs are the rows of one of ours."""
    return [Rule(f"{ours}.{name}", tuple(f"{part}.{name}" for part in theirs), tuple(sizes)) for name in names]


class Adapter:
    """Both directions of a list of rules. ``ignored``: names of theirs that hold nothing of their own."""

    def __init__(self, rules: Sequence[Rule], ignored: Iterable[str] = ()):
        self.rules = tuple(rules)
        self.ignored = frozenset(ignored)
        for side in ([rule.ours for rule in self.rules], [name for rule in self.rules for name in rule.theirs]):
            twice = {name for name in side if side.count(name) > 1} if len(set(side)) != len(side) else set()
            if twice:
                raise ValueError(f"two rules for {sorted(twice)}")

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = {name for rule in self.rules for name in rule.theirs}
        _compare(set(state) - self.ignored, wanted, "their state dict")
        return {rule.ours: rule.to_ours([state[name] for name in rule.theirs]) for rule in self.rules}

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From our state dict, which may hold more than the rules name (other parts of the model)."""
        _compare({rule.ours for rule in self.rules} & set(state), {rule.ours for rule in self.rules}, "our state dict")
        return {
            name: tensor
            for rule in self.rules
            for name, tensor in zip(rule.theirs, rule.to_theirs(state[rule.ours]), strict=True)
        }

    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Write their ``state`` into the part of ``module`` that the rules cover, in the module's dtypes.

        Raises ``ValueError`` naming what is missing, unknown or of another shape, before anything is written.
        """
        converted = self.to_ours(state)
        own = dict(module.state_dict(keep_vars=True))
        _compare(set(converted) & set(own), set(converted), type(module).__name__)
        for name, tensor in converted.items():
            if own[name].shape != tensor.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, the module has {tuple(own[name].shape)}")
        with torch.no_grad():
            for name, tensor in converted.items():
                own[name].copy_(tensor)


def _compare(have: set[str], want: set[str], place: str) -> None:
    missing, unknown = sorted(want - have), sorted(have - want)
    if missing or unknown:
        parts = [
            f"{len(m)} {word}: {', '.join(m[:4])}" for word, m in (("missing", missing), ("unknown", unknown)) if m
        ]
        raise ValueError(f"{place}: " + "; ".join(parts))
