"""What pretraining and supervised fine-tuning of the language model that sees share: settings, parts, phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipelines.held_out import HeldOut, ValidationConfig
from data_pipelines.stream import PackStream, StreamConfig
from mmagent import dist
from mmagent.chat import ChatConfig
from mmagent.config import ConfigError
from mmagent.engine.build import EngineConfig, build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.merging import MergeConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.geometry import GeometryConfig
from mmagent.interop.agent_folder import Agent, load_agent, new_agent, save_agent
from mmagent.interop.packed_folder import MASKS
from mmagent.models import presets
from mmagent.models.agent_model import AgentModelConfig
from mmagent.models.memory import MemoryConfig
from mmagent.objectives.language_modeling import LanguageModeling, LanguageModelingConfig
from mmagent.objectives.routed import RoutedObjective
from mmagent.sparsity.stages import SparsityConfig
from mmagent.train.hooks import Every, RunConfig, Validate, run_settings, usual_hooks
from mmagent.train.loop import fit
from mmagent.train.merged import JudgeMerged, merged_in_place
from mmagent.train.phases import Phase, frozen_longest
from mmagent.train.run import Run
from mmagent.train.sparsify import Sparsifier
from mmagent.train.work import Work, WorkConfig
from mmagent.vocab import Vocab


@dataclass
class Config(RunConfig):
    """``init`` starts from an agent folder; else the model is new, with ``encoder`` if given: the folder of stage 2, or
    ``package.module:factory`` of a custom one. ``memory``: what a step keeps for its backward. The loss on held-out
    data is taken every ``validate_every`` steps and at the last; 0: never. ``sparsity``: prune on the way.
    ``merge``: the newest checkpoints are averaged, judged beside the newest one, and left in ``output/merged``."""

    output: str = "runs/pretrain"
    save_every: int = 200
    tokenizer: str = "runs/data/tokenizer.json"
    encoder: str = ""
    init: str = ""
    model: AgentModelConfig = field(default_factory=presets.laptop)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    data: StreamConfig = field(default_factory=StreamConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    validate_every: int = 0
    objective: LanguageModelingConfig = field(default_factory=LanguageModelingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    work: WorkConfig = field(default_factory=WorkConfig)
    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge.count > self.keep:
            raise ConfigError(f"merge.count {self.merge.count} needs as many checkpoints, keep is {self.keep}")
        if self.engine.parallel == "zero3" and self.memory.chunk_patches:
            raise ConfigError("memory.chunk_patches: ZeRO-3 gathers weights for every chunk; use zero2, fsdp2 or hsdp")
        self.validation.check(self.validate_every)


Learns = Callable[[Agent], tuple[RoutedObjective, Mapping[str, Any]]]
"""What an agent learns by, and what of that belongs to the state of the run."""


def train(config: Config, title: str, learns: Learns | None = None) -> None:
    """Build all parts of a run, then fit phase after phase. Supervised fine-tuning is the same over other data,
    discrete diffusion the same with another objective (``learns``)."""
    config = replace(config, data=replace(config.data, quarantine=config.data.quarantine.within(config.output)))
    world = dist.init().with_context(config.engine.context_parallel)
    dist.seed_everything(config.seed)
    if config.init:
        agent = load_agent(config.init)
    else:
        agent = new_agent(config.model, Vocab.load(config.tokenizer), config.geometry, config.chat, config.encoder)
    model, vocab = agent.model, agent.vocab
    model.set_memory(config.memory)
    model.config.denoises, model.config.bidirectional = 0, False  # unless what it learns by says otherwise
    objective, state = (LanguageModeling(model, config.objective), {}) if learns is None else learns(agent)
    total, end = sum(phase.steps for phase in config.phases), 0
    optimizer = build_optimizer(model, config.optim)
    engine = build_engine(objective, optimizer, config.engine, world)
    sparsifier = Sparsifier(model, optimizer, config.sparsity.within(total))
    work = Work(config.work, config.engine, model, world, frozen_longest(config.phases), config.memory.recompute)
    stream = PackStream(config.data, vocab, agent.geometry, agent.chat, world, work.weights)
    held_out = HeldOut(config.validation, stream) if config.validate_every else None
    parts = {"model": model, "engine": engine, "stream": stream, **state, **sparsifier.parts}
    run = Run(config.output, world, parts, config=config, **run_settings(config))
    if world.is_main:
        print(stream.describe(), *([held_out.describe()] if held_out else []), sep="\n", flush=True)

    hooks = [sparsifier, *usual_hooks(run, title, total, config, routed=objective, engine=engine)]
    if held_out:
        judges = [Validate(objective, held_out, world, engine)]
        if config.merge.count:
            merged = Validate(objective, held_out, world, engine, "merged/")
            judges.append(JudgeMerged(run, "model", config.merge, merged))
        hooks[:0] = [Every(config.validate_every, judge, total) for judge in judges]
    for phase in config.phases:
        start, end = end, end + phase.steps
        model.freeze(phase.freeze)
        if world.is_main:
            print(phase.describe(start), flush=True)
        fit(run, objective, engine, work.dealt(stream), steps=end, last=total, schedule=phase.rate(start), hooks=hooks)
    stream.close()

    def leave(name: str) -> None:
        weights = gather_weights(model)  # by all ranks, for they may be sharded
        weights = sparsifier.leave(weights, run.directory / MASKS)
        if world.is_main:
            whole = (model, vocab, agent.geometry, agent.chat)
            save_agent(run.directory / name, *whole, encoder=agent.encoder, weights=weights)

    leave("agent")
    if config.merge.count:
        with merged_in_place(run, "model", config.merge):
            leave("merged")
    dist.shutdown()
