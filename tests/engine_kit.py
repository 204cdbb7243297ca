"""A toy objective, its batches and its stream: milliseconds a step, and every mechanism an engine must handle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmagent import dist
from mmagent.dist import World
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.saving import SavingConfig
from mmagent.engine.torch_engine import TorchEngine
from mmagent.train.health import HealthConfig
from mmagent.train.run import Run
from mmagent.types import ParamRole, Ratio, StepOutput

ALONE = World(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class ToyBatch:
    """``values (n, 6)``; rows of negative sum count for the term "rare" only."""

    values: Tensor
    keys: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.values.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ToyBatch:
        return ToyBatch(self.values.to(device), self.keys)


class Toy(nn.Module):
    """A Muon matrix with splits, a batch of them, a vector, a buffer that moves after the step, and dropout."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.stacked = nn.Linear(6, 9)
        self.experts = nn.Parameter(torch.randn(3, 6, 3) * 0.3)
        self.register_buffer("seen", torch.zeros(2))
        self.dropout = nn.Dropout(dropout)
        self.weights: Mapping[str, float] = {"common": 1.0, "rare": 0.5}
        self._rows = torch.zeros(())

    def counts(self, batch: ToyBatch) -> dict[str, Tensor]:
        rare = (batch.values.sum(1) < 0).sum()
        return {"common": torch.tensor(len(batch.values)), "rare": rare}

    def forward(self, batch: ToyBatch) -> StepOutput:
        x = self.dropout(batch.values)
        y = torch.einsum("nek,edk->nd", self.stacked(x).unflatten(1, (3, 3)), self.experts)
        squares = (y - batch.values.roll(1, dims=1)).square().sum(1)
        rare = batch.values.sum(1) < 0
        if self.training:
            self._rows += len(batch.values)
        error = Ratio(squares.detach().sum(), torch.tensor(float(len(squares))))
        return StepOutput({"common": squares.sum(), "rare": (squares * rare).sum()}, {"error": error})

    def forget(self) -> None:
        self._rows = torch.zeros(())

    def after_step(self) -> dict[str, float]:
        self.seen[0] += dist.all_reduce(self._rows)
        self._rows = torch.zeros(())
        return {"seen": self.seen[0].item()}

    def roles(self) -> Mapping[str, ParamRole]:
        return {
            "stacked.weight": ParamRole("trunk", True, splits=(3, 3, 3)),
            "stacked.bias": ParamRole("trunk", False, decay=False),
            "experts": ParamRole("experts", True),
        }

    def blocks(self) -> Iterator[nn.Module]:
        yield self.stacked

    def leaves(self) -> Iterator[nn.Module]:
        return iter(())


class ToyStream:
    """Steps of ``accumulation`` batches whose content depends on the position and on torch's generator."""

    def __init__(self, world: World, accumulation: int = 2):
        self.world, self.accumulation, self.position = world, accumulation, 0
        self.metrics: dict[str, float] = {}

    def __next__(self) -> list[ToyBatch]:
        batches = []
        for _ in range(self.accumulation):
            generator = torch.Generator().manual_seed(1000 * self.world.rank + self.position)
            rows = int(torch.randint(1, 6, (), generator=generator))
            noise = 0.1 * torch.randn(rows, 6)  # from the global generator: resuming must restore it
            names = tuple(f"sample-{self.world.rank}-{self.position}-{i}" for i in range(rows))
            batches.append(ToyBatch(torch.randn(rows, 6, generator=generator) + noise, names))
            self.position += 1
        self.metrics = {"data/position": float(self.position)}
        return batches

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class SplitStream(ToyStream):
    """A stream that any number of ranks can take up: they all stand at one position."""

    def load_state_dicts(self, states):
        assert len({state["position"] for state in states}) == 1
        self.position = states[0]["position"]


@dataclass
class ToyRun:
    """Everything :func:`mmagent.train.loop.fit` wants."""

    run: Run
    objective: Toy
    engine: TorchEngine
    stream: ToyStream


class BadStream(ToyStream):
    """Spoils what rank 1 (of one rank: rank 0) reads in the given steps: values times ``spoil[step]``."""

    def __init__(self, world: World, spoil: Mapping[int, float], accumulation: int = 2):
        super().__init__(world, accumulation)
        self.spoil = spoil

    def __next__(self) -> list[ToyBatch]:
        step = self.position // self.accumulation
        *before, last = super().__next__()
        if step in self.spoil and self.world.rank == self.world.size - 1:
            last = ToyBatch(last.values * self.spoil[step], last.keys)
        return [*before, last]


def toy_run(
    folder: Path,
    world: World = ALONE,
    parallel: str = "ddp",
    dropout: float = 0.2,
    keep: int = 2,
    health: HealthConfig | None = None,
    spoil: Mapping[int, float] | None = None,
    background: bool = True,
) -> ToyRun:
    dist.seed_everything(0)
    objective = Toy(dropout)
    engine = build_engine(objective, build_optimizer(objective, OptimConfig(lr=0.02)), EngineConfig(parallel), world)
    dist.seed_everything(0, world.rank)
    stream = BadStream(world, spoil or {})
    parts = {"model": objective, "engine": engine, "stream": stream}
    run = Run(folder, world, parts, keep=keep, health=health, saving=SavingConfig(background=background))
    return ToyRun(run, objective, engine, stream)
