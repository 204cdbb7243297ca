"""State dicts of other libraries and ours, mapped in both directions by one declared list of rules.

A rule pairs one tensor of ours with one or more of theirs and is exact: renaming, reshaping, stacking and
splitting move bits and compute nothing, so a round trip is bitwise. An :class:`Adapter` is strict both ways:
a tensor that no rule names, or that a rule misses, is an error that says which.

A rule works on tensors, and on :class:`~mmagent.ops.tensor_files.Stored` ones, of which it reads what is asked for: a
stack of a thousand of theirs is never in memory as a whole.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from mmagent.ops.tensor_files import Stored, WeightsError


@dataclass(frozen=True)
class Rule:
    """Ours has ``shape`` (None: that of theirs) and is theirs stacked along the rows.

    ``sizes``: rows of each part when there are several, and ``matrices`` of them make one of ours when ours has a
    dimension more (experts). ``permute``: axes of theirs in the order ours flattens them in, with ``their_shape`` to
    undo it (convolutions that became matrices).
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    permute: tuple[int, ...] = ()
    their_shape: tuple[int, ...] = ()
    matrices: int = 0

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.sizes:
            rows = tuple(t.shape[0] for t in tensors)
            if rows != self.sizes:
                raise ValueError(f"{', '.join(self.theirs)}: {rows} rows, expected {self.sizes}")
            joined = torch.cat(list(tensors))
            return joined.view(len(self.sizes) // self.matrices, -1, *joined.shape[1:]) if self.matrices else joined
        (tensor,) = tensors
        if not self.permute:
            return tensor
        if tuple(tensor.shape) != self.their_shape:
            raise ValueError(f"{self.theirs[0]}: shape {tuple(tensor.shape)}, expected {self.their_shape}")
        return tensor.permute(self.permute).reshape(tensor.shape[0], -1)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        if self.sizes:
            rows = tensor.flatten(0, 1) if self.matrices else tensor
            return [part.clone() for part in rows.split(self.sizes)]  # safetensors wants no shared memory
        if not self.permute:
            return [tensor]
        axes = tuple(self.their_shape[axis] for axis in self.permute)
        back = tuple(self.permute.index(axis) for axis in range(len(axes)))
        return [tensor.view(axes).permute(back).contiguous()]

    def their_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of theirs where ours has ``shape``."""
        if self.sizes:
            return [(rows, *shape[2 if self.matrices else 1 :]) for rows in self.sizes]
        return [self.their_shape or shape]

    def stored_ours(self, parts: Sequence[Stored], shape: tuple[int, ...]) -> Stored:
        """Ours, of ``shape``, read from theirs, whose shapes were compared."""
        if len({part.dtype for part in parts}) > 1:
            told = ", ".join(f"{part.name} {part.dtype}" for part in parts[:4])
            raise WeightsError(f"{self.ours} would mix dtypes: {told}")
        first = parts[0]
        if self.permute:
            return replace(
                first, name=self.ours, shape=shape, read=lambda a, b: self.to_ours([first.whole()]).view(-1)[a:b]
            )
        if len(parts) == 1:
            return replace(first, name=self.ours, shape=shape)
        ends = list(accumulate(part.numel for part in parts))

        def read(start: int, stop: int) -> Tensor:
            pieces, at = [], start
            for n in range(bisect_right(ends, start), len(parts)):
                if at >= stop:
                    break
                begin = ends[n] - parts[n].numel
                pieces.append(parts[n].read(at - begin, min(stop, ends[n]) - begin))
                parts[n].require_finite(pieces[-1])  # it can be named here, and nowhere later
                at = ends[n]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return Stored(self.ours, shape, first.dtype, first.place, read)

    def stored_theirs(self, ours: Stored) -> list[Stored]:
        """Theirs, in order, read from ours."""
        if self.permute:
            (name,), shape = self.theirs, self.their_shape
            return [replace(ours, name=name, shape=shape, read=lambda a, b: self._turned(ours)[a:b])]
        shapes = self.their_shapes(ours.shape)
        starts = [0, *accumulate(math.prod(shape) for shape in shapes)]
        if starts[-1] != ours.numel:
            raise WeightsError(
                f"{ours.name} in {ours.place} has shape {ours.shape}, which does not split into {shapes}"
            )

        def part(name: str, shape: tuple[int, ...], begin: int) -> Stored:
            return replace(ours, name=name, shape=shape, read=lambda a, b: ours.read(begin + a, begin + b))

        return [part(*entry) for entry in zip(self.theirs, shapes, starts, strict=False)]

    def _turned(self, ours: Stored) -> Tensor:
        (tensor,) = self.to_theirs(ours.whole())
        return tensor.view(-1)


def rename(ours: str, theirs: str, names: Iterable[str] = ("weight",)) -> list[Rule]:
    """One rule for each of ``names`` under the two prefixes."""
    return [Rule(f"{ours}.{name}", (f"{theirs}.{name}",)) for name in names]


def stack(ours: str, theirs: Sequence[str], sizes: Sequence[int], names: Iterable[str] = ("weight",)) -> list[Rule]:
    """Several of theirs are the rows of one of ours."""
    return [Rule(f"{ours}.{name}", tuple(f"{part}.{name}" for part in theirs), tuple(sizes)) for name in names]


class Adapter:
    """Both directions of a list of rules. ``copies``: names of theirs that may be there and then repeat another one
    of theirs, bit for bit."""

    def __init__(self, rules: Sequence[Rule], copies: Mapping[str, str] | None = None):
        self.rules = tuple(rules)
        self.copies = dict(copies or {})
        for side in ([rule.ours for rule in self.rules], [name for rule in self.rules for name in rule.theirs]):
            twice = {name for name in side if side.count(name) > 1} if len(set(side)) != len(side) else set()
            if twice:
                raise ValueError(f"two rules for {sorted(twice)}")

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = {name for rule in self.rules for name in rule.theirs}
        _compare(set(state) - set(self.copies), wanted, "their state dict")
        for copy, name in self.copies.items():
            if copy in state and not torch.equal(state[copy], state[name]):
                raise ValueError(f"{copy} should repeat {name}, but differs from it")
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
