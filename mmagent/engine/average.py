"""A moving average of a module's weights, kept beside it while it trains: what is judged and handed on in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmagent import dist
from mmagent.engine.pieces import shard_of
from mmagent.engine.sharding import as_sharded, gather_like, local_part, whole_shape
from mmagent.ops.state import check_weights, shapes_of


@dataclass
class AverageConfig:
    """``decay`` 0 keeps no average. Of the n-th update the decay is ``min(decay, (1 + n) / (10 + n))``, so that a short
    run does not remember the weights it started from."""

    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"average.decay {self.decay} must lie in [0, 1)")


class WeightAverage:
    """``average = d * average + (1 - d) * weights`` in float32 after every step, over parameters; buffers (statistics
    of teachers, running means) are those of the last step. Under a sharding engine each rank averages its shard: make
    one after the engine.

    A part of a :class:`~mmagent.train.run.Run` (one state for all ranks, in full tensors, for any number of ranks) and
    one of its hooks.
    """

    shared_state = True

    def __init__(self, module: nn.Module, config: AverageConfig):
        self.module, self.config = module, config
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        if config.decay:
            self.average = {name: _own(tensor).float().clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Take in the weights of ``step``, unless its batch was left out: a hook."""
        if not self.config.decay or record.get("health/left_out"):
            return
        self.updates += 1
        decay = min(self.config.decay, (1 + self.updates) / (10 + self.updates))
        now = self._tensors()
        torch._foreach_lerp_(
            [local_part(mean) for mean in self.average.values()],
            [local_part(now[name]).float() for name in self.average],
            1.0 - decay,
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts the module has the averaged weights, if there is an average: to be judged or saved."""
        kept = {name: local_part(tensor).detach().clone() for name, tensor in self._tensors().items() if self.average}
        self._write({name: local_part(mean) for name, mean in self.average.items()})
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        tensors = self._tensors()
        for name, value in values.items():
            local_part(tensors[name]).copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The average in full float32 tensors on the host of rank 0 (``{}`` elsewhere), and the number of updates. A
        collective where it is sharded."""
        now = self._tensors()
        full = {name: gather_like(mean, now[name]) for name, mean in self.average.items()}
        return {"updates": self.updates, "average": full if dist.is_main() else {}}

    def sharded_state_dict(self) -> dict[str, Any]:
        """The same, as every rank holds it: nothing travels."""
        now = self._tensors()
        return {
            "updates": self.updates,
            "average": {name: as_sharded(mean, now[name]) for name, mean in self.average.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ``ValueError`` where it is another module's, or one of the two has no average."""
        given = state["average"]
        if bool(given) != bool(self.average):
            has, wants = ("an average", "none") if given else ("no average", "one")
            raise ValueError(
                f"the checkpoint has {has} of weights, this run wants {wants}: keep average.decay as it was"
            )
        now = self._tensors()
        wanted = {name: whole_shape(now[name]) for name in self.average}
        check_weights(wanted, shapes_of(given), f"the average of {type(self.module).__name__}")
        self.updates = int(state["updates"])
        for name, mean in self.average.items():
            local_part(mean).copy_(local_part(shard_of(given[name], now[name])))


def _own(tensor: Tensor) -> Tensor:
    """What this rank has of ``tensor``: a ``DTensor`` stays one, for it says how it is sharded."""
    return tensor.detach() if isinstance(tensor, DTensor) else local_part(tensor).detach()
