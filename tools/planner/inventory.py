"""Every parameter of a model without building it: shapes, roles, and which of them are gathered together.

Layers of one kind are alike, so a model with one layer of each kind is built on the meta device and its layers are
counted as often as they occur. Nothing here repeats a formula of the library's layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mmagent.models.agent_model import AgentModel, AgentModelConfig
from mmagent.models.moe import Experts
from mmagent.models.presets import on_meta


@dataclass(frozen=True)
class Weight:
    """A parameter of ``shape`` that occurs ``count`` times. ``unit``: what FSDP2 gathers it with (the ``root`` unit
    stays gathered from the forward to the backward). ``muon``: it would be Muon's. ``expert``: routed experts, whose
    first dimension counts them. ``full``: gathered in float32 whatever the others are. ``splits``: rows of matrices in
    it."""

    name: str
    role: str
    unit: str
    shape: tuple[int, ...]
    count: int
    muon: bool
    expert: bool
    full: bool
    splits: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Elements of one."""
        return math.prod(self.shape)

    @property
    def total(self) -> int:
        return self.count * self.size


def total(weights: Iterable[Weight]) -> int:
    """Parameters of all of them."""
    return sum(weight.total for weight in weights)


def inventory(config: AgentModelConfig) -> tuple[Weight, ...]:
    """All parameters of ``AgentModel(config)``."""
    decoder, dense = config.decoder, config.decoder.layers - config.decoder.moe_layers
    kinds = [n for n in (dense, decoder.moe_layers) if n]
    small = replace(decoder, layers=len(kinds), dense_layers=int(dense > 0))
    model = on_meta(replace(config, decoder=small, vision=replace(config.vision, depth=1)))
    counts = {f"decoder.blocks.{n}.": times for n, times in enumerate(kinds)}
    return tuple(_weights(model, counts | {"encoder.blocks.0.": config.vision.depth}))


def _weights(model: AgentModel, counts: dict[str, int]) -> list[Weight]:
    modules = {id(module): name for name, module in model.named_modules()}
    units = [modules[id(block)] for block in model.blocks()]  # inner ones first
    full = [name for name, module in model.named_modules() if getattr(module, "full_precision", False)]
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    roles, found = model.roles(), []
    for name, parameter in model.named_parameters():
        times = next((n for prefix, n in counts.items() if name.startswith(prefix)), 1)
        owner = name.rpartition(".")[0]
        found.append(
            Weight(
                name,
                roles[name].role,
                next((unit for unit in units if name.startswith(f"{unit}.")), "root"),
                tuple(parameter.shape),
                times,
                roles[name].matrix,
                owner in experts,
                any(name.startswith(f"{unit}.") for unit in full),
                tuple(roles[name].splits),
            )
        )
    return found
