"""Let an agent that says blocks learn from its own ways to right answers: in which order, or in fewer steps.

    torchrun --standalone --nproc_per_node=2 -m recipes.own_ways --preset laptop learn=order \\
        init=runs/diffusion/agent data=runs/data/sft output=runs/own_ways

Questions are the documents of ``data`` up to their first answer; right is what says that answer, token for token.
``learn=order`` follows the likeliest of ``ways`` random orders of each question (constrained order of Seed Diffusion,
arXiv 2508.02193); ``learn=speed`` reinforces, on policy, right answers whose steps say much. Kill it at any moment; the
same command goes on. It leaves an agent in ``output/agent``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from data_pipelines.documents import DocumentBuilder
from data_pipelines.questions import Questions, verbatim
from mmagent import dist
from mmagent.agent.unmasking import best, explore, figures, level, speed_advantages, unmasking_batches
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.build import EngineConfig, build_engine
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.schedule import ScheduleConfig, schedule
from mmagent.generation.block_decoding import BlockConfig, BlockGenerator
from mmagent.interop.agent_folder import Agent, load_agent, save_agent
from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.block_policy import BlockPolicyConfig, BlockPolicyGradient
from mmagent.objectives.noise import NoiseConfig, NoiseIds
from mmagent.packing import Size
from mmagent.train.hooks import RunConfig, run_settings, tell, usual_hooks
from mmagent.train.launch import launch
from mmagent.train.metrics import rollout_pace
from mmagent.train.run import Run
from mmagent.trajectories import Limits, Trajectory, UnmaskingBatch

LEARN = ("order", "speed")


@dataclass
class Config(RunConfig):
    """Each step asks every rank ``questions``, ``ways`` times each, of at most ``longest`` tokens with their answer.
    ``keep`` ways of each are followed; ``weight`` is what speed is worth beside being right. Without ``verify`` all
    answers are taken for right."""

    output: str = "runs/own_ways"
    init: str = "runs/diffusion/agent"
    data: str = "runs/data/sft"
    learn: str = "order"
    steps: int = 50
    questions: int = 16
    ways: int = 8
    keep: int = 1
    verify: bool = True
    weight: float = 0.5
    longest: int = 1024
    temperature: float = 1.0
    patches_per_microbatch: int = 8192
    freeze: list[str] = field(default_factory=lambda: ["encoder", "mtp"])
    generator: BlockConfig = field(default_factory=BlockConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4))
    engine: EngineConfig = field(default_factory=EngineConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("constant", warmup=2))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn not in LEARN:
            raise ConfigError(f"learn: {self.learn!r} is none of {', '.join(LEARN)}")


def debug() -> Config:
    """Seconds: for tests."""
    return Config(steps=2, questions=2, ways=3, longest=160, save_every=1)


def laptop() -> Config:
    """Minutes on two cores."""
    return Config(engine=EngineConfig(dtype="bfloat16"), questions=8, longest=512)


def collect(
    config: Config, agent: Agent, generator: BlockGenerator, asked: Sequence[tuple[Trajectory, list[int]]], seed: int
) -> tuple[list[UnmaskingBatch], dict[str, float]]:
    """What is learnt from this rank's questions, and figures of it."""
    longest = max(len(answer) for _, answer in asked)
    limits = Limits(longest, config.temperature, stop_ids=agent.vocab.stop_ids, seed=seed)
    judge = verbatim(asked) if config.verify else None
    groups = explore(generator, [prompt for prompt, _ in asked], limits, config.ways, judge)
    ways, worth = best(groups, config.keep), None
    if config.learn == "speed":
        told = speed_advantages(groups, generator.block, config.weight)
        ways, worth = [way for way, _ in told], [value for _, value in told]
    budget = Size(config.longest + longest, config.patches_per_microbatch)
    how = {"image_id": agent.vocab.image_id, "merge_size": agent.geometry.merge_size, "advantages": worth}
    return unmasking_batches(ways, budget, **how), figures(groups, generator.block)


def train(config: Config) -> None:
    """Build everything in order, then ask and step."""
    world, agent = dist.init(), load_agent(config.init)
    dist.seed_everything(config.seed)
    model = agent.model
    model.freeze(config.freeze)
    said = replace(config.generator, order="random") if config.learn == "order" else config.generator
    generator = BlockGenerator(model.to(world.device), agent.vocab, said)
    ids, noise = NoiseIds.of_vocab(agent.vocab, model.config.vocab_size), NoiseConfig(generator.block)
    follows = BlockDiffusion(model, BlockDiffusionConfig(noise), ids)
    objective = follows if config.learn == "order" else BlockPolicyGradient(model, BlockPolicyConfig(noise), ids)
    engine = build_engine(objective, build_optimizer(model, config.optim), config.engine, world)
    builder = DocumentBuilder(agent.vocab, agent.geometry, agent.chat)
    questions = Questions(config.data, builder, agent.vocab.image_id, agent.geometry.merge_size)
    run = Run(
        config.output,
        world,
        {"model": model, "engine": engine, "draws": follows.draws},
        config=config,
        **run_settings(config),
    )
    hooks = usual_hooks(run, "own ways", config.steps, config, figures=("right", "closeness"), engine=engine)
    for step in run.guard.steps(run.resume(config.steps), config.steps):
        started, sampled = time.perf_counter(), generator.tokens_sampled
        seed = dist.stable_seed(config.seed, step, world.rank)
        with run.segments("rollout"):
            asked = questions.draw(seed, config.questions, config.longest)
            model.eval()
            packs, found = collect(config, agent, generator, asked, seed % (1 << 31))
            model.train()
        packs, rate = level(packs, world, agent.vocab.pad_id), schedule(step, config.steps, config.schedule)
        record = {"lr_scale": rate, "packs": float(len(packs)), "time/rollout": time.perf_counter() - started, **found}
        if packs:
            record |= run.guard.step(step, objective, engine, packs, rate) or {}
        if not run.guard.went_back:
            record |= rollout_pace(time.perf_counter() - started, record, generator.tokens_sampled - sampled)
            tell(hooks, run, step + 1, record | run.guard.figures(step))
    run.finish(config.steps)
    if world.is_main:
        save_agent(run.directory / "agent", model, agent.vocab, agent.geometry, agent.chat, encoder=agent.encoder)
    dist.shutdown()


def main() -> None:
    """Parse and train."""
    train(parse_cli({"laptop": laptop, "debug": debug}, __doc__ or ""))


if __name__ == "__main__":
    launch(main)
