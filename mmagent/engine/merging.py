"""The average of several checkpoints of one trajectory, piece by piece in float32 (PMA, arXiv 2505.12082).

Checkpoints that lie V steps apart on a constant learning rate scatter around what an annealed run would reach; their
mean is near it, at the price of reading them. It is judged against the best single checkpoint, not against their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmagent.engine import checkpoint
from mmagent.ops.state import check_weights
from mmagent.ops.tensor_files import Stored, TensorFiles, WeightsError

KINDS = ("sma", "ema", "wma")


@dataclass
class MergeConfig:
    """``kind``: ``sma``, all checkpoints alike; ``ema``, the newest with ``alpha`` and what came before it with the
    rest; ``wma``, each in proportion to its place. ``count``: how many, the newest ones; 0 merges nothing."""

    kind: str = "sma"
    count: int = 0
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"merge.kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.count < 0 or self.count == 1:
            raise ValueError(f"merge.count must be 0 or at least 2, got {self.count}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"merge.alpha {self.alpha} must lie in (0, 1]")

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Of ``count`` checkpoints, the oldest first; they sum to 1 (arXiv 2505.12082, section 3)."""
        if count < 1:
            raise ValueError(f"there is nothing to merge: {count} checkpoints")
        if self.kind == "sma":
            return (1 / count,) * count
        if self.kind == "wma":
            return tuple(2 * n / (count * (count + 1)) for n in range(1, count + 1))
        return tuple((self.alpha if n else 1.0) * (1 - self.alpha) ** (count - 1 - n) for n in range(count))


def merge(sources: Sequence[Mapping[str, Stored]], coefficients: Sequence[float]) -> dict[str, Stored]:
    """The weighted sum of ``sources``, the oldest first, unread: reading a piece of it reads that piece of each.

    Sums are taken in float32 (float64 of tensors that are) and given in the dtype of the sources: parameters, and
    buffers that are floating point, such as the router's bias. Integers, which count something, are those of the last
    source. Raises :class:`WeightsError` naming tensors that not all sources have alike; reading raises it for a value
    that is not finite.
    """
    if len(sources) != len(coefficients) or not sources:
        raise ValueError(f"{len(sources)} checkpoints cannot be merged by {len(coefficients)} coefficients")
    last = sources[-1]
    for source in sources[:-1]:
        place = next((tensor.place for tensor in source.values()), "an empty checkpoint")
        shapes = {name: tensor.shape for name, tensor in source.items()}
        check_weights({name: tensor.shape for name, tensor in last.items()}, shapes, f"{place} does not fit the others")
        if other := [name for name in last if source[name].dtype != last[name].dtype]:
            told = f"{source[other[0]].dtype}, elsewhere {last[other[0]].dtype}"
            raise WeightsError(f"{place} does not fit the others: {other[0]} is {told}")
    return {name: _sum([source[name] for source in sources], coefficients) for name in last}


def _sum(parts: Sequence[Stored], coefficients: Sequence[float]) -> Stored:
    last = parts[-1]
    if not last.dtype.is_floating_point:
        return last

    def read(start: int, stop: int) -> Tensor:
        pieces = [part.read(start, stop) for part in parts]
        for part, piece in zip(parts, pieces, strict=True):
            part.require_finite(piece)
        return _mean(pieces, coefficients)

    return replace(last, place=f"the merge of {len(parts)} checkpoints", read=read)


def _mean(pieces: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """In the dtype of the last; what is equal in all of them stays so: what is frozen must not move by a rounding."""
    last = pieces[-1]
    total = torch.zeros(last.shape, dtype=torch.float64 if last.dtype == torch.float64 else torch.float32)
    equal = torch.ones(last.shape, dtype=torch.bool)
    for piece, coefficient in zip(pieces, coefficients, strict=True):
        total.add_(piece.to(total.dtype), alpha=coefficient)
        equal &= piece == last
    return torch.where(equal, last, total.to(last.dtype))


@contextmanager
def merged_folders(folders: Sequence[Path], config: MergeConfig) -> Iterator[dict[str, Stored]]:
    """:func:`merge` of folders (or files) of weights, the oldest first, open within the block."""
    with ExitStack() as stack:
        sources = [stack.enter_context(TensorFiles(folder)) for folder in folders]
        yield merge(sources, config.coefficients(len(sources)))


@contextmanager
def merged_checkpoints(root: Path, module: str, config: MergeConfig, before: int | None = None) -> Iterator[Merged]:
    """The newest ``config.count`` whole checkpoints under ``root``, of steps below ``before`` where that is given,
    merged; open within the block.

    Raises :class:`~mmagent.engine.checkpoint.CheckpointError` where there are not as many, or one is not whole: what
    was asked for is not silently made of fewer.
    """
    found = [path for path in checkpoint.steps(root) if before is None or checkpoint.step_of(path) < before]
    if len(found) < max(config.count, 2):
        limit = "" if before is None else f" before step {before}"
        raise checkpoint.CheckpointError(
            f"{root} holds {len(found)} checkpoints{limit}, {max(config.count, 2)} are to be merged: keep more "
            f"(keep={max(config.count, 2)}), or merge fewer"
        )
    steps = tuple(sorted(checkpoint.step_of(path) for path in found[: config.count]))
    with merged_steps(root, module, steps, config) as tensors:
        yield Merged(steps, tensors)


@contextmanager
def merged_steps(root: Path, module: str, steps: Sequence[int], config: MergeConfig) -> Iterator[dict[str, Stored]]:
    """The checkpoints of these ``steps`` under ``root``, ascending, merged; open within the block. Raises
    :class:`~mmagent.engine.checkpoint.CheckpointError` where one is not whole."""
    with ExitStack() as stack:
        folders = [checkpoint.folder_of(root, step) for step in steps]
        sources = [stack.enter_context(checkpoint.open_weights(folder, module)) for folder in folders]
        yield merge(sources, config.coefficients(len(sources)))


@dataclass(frozen=True)
class Merged:
    """``tensors`` by name, unread, and the ``steps`` that they are of, ascending."""

    steps: tuple[int, ...]
    tensors: dict[str, Stored]
