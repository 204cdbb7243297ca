"""What the encoder's two stages share: their settings, where pictures come from, the loop, and what they leave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from data_pipelines.documents import Quarantine, QuarantineConfig
from data_pipelines.galleries import Gallery, built_in, open_gallery
from data_pipelines.hub_images import ColumnsConfig
from data_pipelines.vision import VisionStream, VisionStreamConfig
from mmagent.config import ConfigError
from mmagent.dist import World
from mmagent.engine.average import AverageConfig, WeightAverage
from mmagent.engine.build import EngineConfig, build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.optim import OptimConfig, build_optimizer, check_known
from mmagent.engine.schedule import ScheduleConfig
from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import Encoder, can_hide, is_factory, open_encoder
from mmagent.interop.packed_folder import MASKS
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.sparsity.stages import SparsityConfig
from mmagent.testing import check_encoder
from mmagent.train.hooks import RunConfig, run_settings, usual_hooks
from mmagent.train.loop import fit
from mmagent.train.phases import Phase
from mmagent.train.run import Run
from mmagent.train.sparsify import Sparsifier


@dataclass
class StageConfig(RunConfig):
    """``mix`` weighs where pictures come from: galleries that are drawn here (``scenes``, ``panels``, ``charts``,
    ``icons``, ``digits`` and kinds of photographs), and your own ``sources`` by name: a folder, webdataset shards or
    ``datasets:ID``, whose ``columns`` can be named; ``split=train`` leaves out what ``evaluate_encoder`` judges by.
    ``role_schedules``: roles whose learning rate follows a schedule of its own. ``sparsity``: prune on the way. With
    ``average.decay`` the averaged weights are what is handed on."""

    output: str = "runs/encoder"
    steps: int = 1000
    mix: dict[str, float] = field(default_factory=lambda: {"scenes": 0.8, "panels": 0.1, "scientific": 0.1})
    sources: dict[str, str] = field(default_factory=dict)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    split: str = ""
    data: VisionStreamConfig = field(default_factory=VisionStreamConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=10))
    role_schedules: dict[str, ScheduleConfig] = field(default_factory=dict)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sources:
            if name not in self.mix:
                raise ConfigError(f"sources.{name} has no weight and would not be seen; add mix.{name}=0.5, or =0")


def pictures(
    config: StageConfig,
    geometry: GeometryConfig,
    world: World,
    *,
    kinds: tuple[str, ...] = (),
    captions: bool = False,
    maps: bool = True,
    **drawn: Any,
) -> Gallery:
    """All of ``config.mix`` in one gallery. ``kinds``, ``captions`` and ``maps`` go to
    :func:`~data_pipelines.galleries.open_gallery`, ``drawn`` to :func:`~data_pipelines.galleries.built_in`. Raises
    ``ConfigError`` naming a source that cannot be used so."""
    quarantine = Quarantine(config.quarantine.within(config.output), world.rank)
    how: dict[str, Any] = {"columns": config.columns, "split": config.split, "captions": captions, "maps": maps}
    others: dict[str, Gallery] = {}
    for name, source in config.sources.items():
        if not config.mix[name]:
            continue
        try:
            others[name] = open_gallery(source, geometry, config.seed, name, quarantine, kinds, **how)
        except ValueError as error:
            raise ConfigError(f"sources.{name}: {error}") from error
    mix = {name: weight for name, weight in config.mix.items() if weight or name not in config.sources}
    return built_in(mix, others=others, **drawn)


def student(source: str, vision: CogViTConfig, geometry: GeometryConfig, mask_token: bool) -> Encoder:
    """A new CogViT of ``vision``, or what :func:`~mmagent.interop.encoder_folder.open_encoder` finds at ``source``, to
    go on from. With ``mask_token`` it has one. Raises ``ConfigError`` for an encoder that cannot."""
    if not source:
        return Encoder(CogViT(replace(vision, mask_token=mask_token)), geometry)
    found = open_encoder(source, geometry)
    if is_factory(source):
        check_encoder(found.model)  # a student whose images see each other would train, and nothing would say so
    if mask_token and isinstance(found.model, CogViT):
        found.model.add_mask_token()
    elif mask_token and not can_hide(found.model):
        raise ConfigError(f"objective.blind: {source} has no mask token; with zero any encoder can be a student")
    return found


def train(
    config: StageConfig,
    title: str,
    objective: nn.Module,
    stream: VisionStream[Any],
    world: World,
    begin: Callable[[], None] = lambda: None,
    part: str = "",
) -> tuple[Run, dict[str, Any]]:
    """Build engine, average and run; ``begin()`` where there is nothing to resume; fit. What was pruned has masks in
    ``OUTPUT/sparsity.safetensors``, of ``part`` of the objective by the names there.

    Returns the run and the objective's full state dict (on rank 0; averaged, if so configured).
    """
    config = replace(config, quarantine=config.quarantine.within(config.output))  # as `pictures` has it
    optimizer = build_optimizer(objective, config.optim)
    check_known(config.role_schedules, (group["role"] for group in optimizer.param_groups), "role_schedules")
    engine = build_engine(objective, optimizer, config.engine, world)
    sparsifier = Sparsifier(objective, optimizer, config.sparsity.within(config.steps))
    average = WeightAverage(objective, config.average)
    parts = {"objective": objective, "engine": engine, "stream": stream, "average": average, **sparsifier.parts}
    run = Run(config.output, world, parts, config=config, **run_settings(config))
    first = run.resume(config.steps)
    if not first:
        begin()
    if first == config.steps and world.is_main:
        print(f"{title}: {config.output} stands at step {first} of {first}, nothing is left to train", file=sys.stderr)
    hooks = [average, sparsifier, *usual_hooks(run, title, config.steps, config, engine=engine)]
    rate = Phase(steps=config.steps, schedule=config.schedule).rate(0)
    own = {role: Phase(steps=config.steps, schedule=s).rate(0) for role, s in config.role_schedules.items()}
    fit(run, objective, engine, stream, steps=config.steps, schedule=rate, role_schedules=own, hooks=hooks)
    stream.close()
    with average.in_place():
        weights = gather_weights(objective)  # by all ranks, for it may be sharded
        weights = sparsifier.leave(weights, run.directory / MASKS, part)
        return run, {name: tensor.clone() for name, tensor in weights.items()}


def part_of(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The state dict of the child module ``prefix`` of what ``weights`` belong to."""
    return {name.removeprefix(f"{prefix}."): t for name, t in weights.items() if name.startswith(f"{prefix}.")}
