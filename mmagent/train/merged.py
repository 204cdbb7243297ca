"""The average of a run's newest checkpoints, judged and handed on while the run goes on with its own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmagent.engine import checkpoint
from mmagent.engine.merging import MergeConfig, merged_checkpoints
from mmagent.engine.sharding import local_part
from mmagent.interop.live_model import load_stored
from mmagent.train.run import Run


@contextmanager
def merged_in_place(run: Run, name: str, config: MergeConfig) -> Iterator[tuple[int, ...]]:
    """While it lasts the part ``name`` of ``run``, a module, has the average of its newest ``config.count``
    checkpoints; yields the steps that they are of. A collective: each rank reads what it holds.

    Raises :class:`~mmagent.engine.checkpoint.CheckpointError` where there are not as many whole ones.
    """
    module = run.parts[name]
    assert isinstance(module, nn.Module), f"part {name!r} is no module"
    run.settle()
    kept = {key: local_part(tensor).detach().clone() for key, tensor in _tensors(module).items()}
    try:
        with merged_checkpoints(run.checkpoints, name, config) as merged:
            load_stored(module, merged.tensors, f"the merge of {run.checkpoints} does not fit")
            steps = merged.steps
        yield steps
    finally:
        with torch.no_grad():
            for key, tensor in _tensors(module).items():
                local_part(tensor).copy_(kept[key])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)


class JudgeMerged:
    """A hook: calls ``judge`` (a :class:`~mmagent.train.hooks.Validate` of a prefix of its own) with the merged weights
    in place, once the run has as many checkpoints as ``config`` merges; before that the record stays as it is."""

    segment = "validation"

    def __init__(self, run: Run, name: str, config: MergeConfig, judge: Callable[[int, dict[str, float]], None]):
        self.run, self.name, self.config, self.judge = run, name, config, judge

    def __call__(self, step: int, record: dict[str, float]) -> None:
        self.run.settle()
        there = len(checkpoint.steps(self.run.checkpoints)) >= self.config.count
        if self.run.world.sum({"there": there}, layout="merged")["there"] == self.run.world.size:
            with merged_in_place(self.run, self.name, self.config):
                self.judge(step, record)
