"""The engine that a config asks for."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from mmagent.dist import World
from mmagent.engine.config import ZERO, EngineConfig
from mmagent.engine.torch_engine import TorchEngine
from mmagent.engine.zero_engine import ZeroEngine
from mmagent.protocols import Engine


def build_engine(objective: nn.Module, optimizer: Optimizer, config: EngineConfig, world: World) -> Engine:
    """The one engine for ``config.parallel``; a collective. ``optimizer`` must be fresh and hold every trainable
    parameter of ``objective``. Raises ``ValueError`` for what cannot go together, and where DeepSpeed is asked for and
    not installed."""
    kind = ZeroEngine if config.parallel in ZERO else TorchEngine
    return kind(objective, optimizer, config, world)
