"""One step of the optimizer, its matrices shared out over the ranks that hold them, and every rank doing all of them.

The laptop's model under FSDP2 and HSDP over gloo, its weights for gradients. `each does all` gathers every matrix on
every rank; both sides step the same parameters of the same processes in turns. The wall is that of the slowest rank;
`processor` adds up what all ranks' processors worked, which on a machine with fewer cores than ranks says more of what
a step costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmagent import dist
from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import MuonAdamW, OptimConfig, build_optimizer
from mmagent.engine.sharding import local_part, shard_like
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from tools.benchmarks.row import Row, Settings

CASES = {
    "fsdp2, 2 ranks": (2, "fsdp2", 0),
    "fsdp2, 4 ranks": (4, "fsdp2", 0),
    "hsdp, 2 copies on 4 ranks": (4, "hsdp", 2),
}


class EachAll(MuonAdamW):
    """Every rank gathers and orthogonalises every matrix."""

    def _share(self, units: Sequence[Any], ranks: Any) -> None:
        dtype = getattr(torch, self.config.newton_schulz_dtype)
        for parameters, group in units:
            joined = torch.stack([self._whole(p, dtype) for p in parameters])
            for p, update in zip(parameters, self._orthogonal(joined, group), strict=True):
                local = local_part(p)
                local.mul_(1 - group["lr"] * group["weight_decay"])
                kept = local_part(shard_like(update.view(p.shape), p))
                local.add_(kept.to(local.dtype), alpha=-group["lr"])

    def _whole(self, parameter: DTensor, dtype: torch.dtype) -> Tensor:
        local = self._nesterov(parameter).to(dtype)
        shape, stride = parameter.shape, parameter.stride()
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(local, mesh, placements, shape=shape, stride=stride).full_tensor()


def time_sides(world: World, parallel: str, shards: int, quick: bool, turns: int) -> list[list[tuple[float, float]]]:
    """By side, ours first: seconds of every step, and of them those that this rank's processor worked."""
    torch.manual_seed(0)
    config = presets.debug() if quick else presets.laptop()
    objective = LanguageModeling(AgentModel(config), LanguageModelingConfig())
    optimizer = build_optimizer(objective.model, OptimConfig())
    build_engine(objective, optimizer, EngineConfig(parallel, shard_ranks=shards), world)
    for parameter in objective.parameters():
        parameter.grad = parameter.detach().clone()

    def step(side: type[MuonAdamW]) -> tuple[float, float]:
        optimizer.__class__ = side  # the same state and parameters
        dist.barrier()
        started, worked = time.perf_counter(), time.process_time()
        optimizer.step()
        dist.barrier()
        return time.perf_counter() - started, time.process_time() - worked

    sides = (MuonAdamW, EachAll)
    found: list[list[tuple[float, float]]] = [[], []]
    for turn in range(-1, turns):
        for n in (0, 1) if turn % 2 == 0 else (1, 0):
            taken = step(sides[n])
            if turn >= 0:
                found[n].append(taken)
    return found


def rows(settings: Settings) -> Iterator[Row]:
    for name, (ranks, parallel, shards) in list(CASES.items())[: 1 if settings.quick else None]:
        everyone = run_ranks(time_sides, ranks, parallel, shards, settings.quick, settings.repeats, timeout=600.0)
        wall = [[max(s for s, _ in turn) for turn in zip(*(r[n] for r in everyone), strict=True)] for n in (0, 1)]
        work = [[sum(w for _, w in turn) for turn in zip(*(r[n] for r in everyone), strict=True)] for n in (0, 1)]
        yield _row(f"a step under {name}", *wall)
        yield _row(f"a step under {name}: processor", *work)


def _row(name: str, ours: Sequence[float], peer: Sequence[float]) -> Row:
    ratios = sorted(p / o for o, p in zip(ours, peer, strict=True))
    ratio, quarter = statistics.median(ratios), len(ratios) // 4
    spread = (ratios[-1 - quarter] - ratios[quarter]) / 2 / ratio
    return Row(name, 1e3 * statistics.median(ours), 1e3 * statistics.median(peer), "each does all", ratio, "ms", spread)
