"""Reinforce an agent on tasks that verify themselves: GRPO with rollouts in a real browser, in the trainer's process.

    torchrun --standalone --nproc_per_node=2 -m recipes.rl --preset laptop init=runs/sft/agent output=runs/rl
Kill it at any moment; the same command goes on, and plays no finished episode twice."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from mmagent import dist
from mmagent.agent.batching import rank_batches
from mmagent.agent.codec import Codec
from mmagent.agent.collector import Collector, CollectorConfig
from mmagent.agent.rollout import RolloutConfig
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.build import EngineConfig, build_engine
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.schedule import ScheduleConfig, schedule
from mmagent.generation.block_decoding import GeneratorConfig, make_generator
from mmagent.generation.local import LocalPolicy
from mmagent.interop.agent_folder import load_agent, save_agent
from mmagent.models.memory import MemoryConfig
from mmagent.objectives.block_policy import PolicyGradientConfig, policy_objective
from mmagent.packing import Size
from mmagent.tasks import easy_task_names, open_tasks
from mmagent.train.hooks import LeaveOnSignal, RunConfig, run_settings, tell, usual_hooks
from mmagent.train.launch import launch
from mmagent.train.metrics import rollout_pace
from mmagent.train.run import Run
from mmagent.train.work import Work, WorkConfig


@dataclass
class Config(RunConfig):
    """``tasks``: :func:`mmagent.tasks.all_task_names` or import paths. ``pages`` and ``browsers`` are a rank's."""

    output: str = "runs/rl"
    init: str = "runs/sft/agent"
    tasks: list[str] = field(default_factory=easy_task_names)
    seed: int = 1
    steps: int = 100
    updates: int = 1
    freeze: list[str] = field(default_factory=lambda: ["encoder", "mtp"])
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    work: WorkConfig = field(default_factory=WorkConfig)
    tokens_per_microbatch: int = 16384
    patches_per_microbatch: int = 16384
    pages: int = 16
    browsers: int = 1
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    policy: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("constant", warmup=3))
    engine: EngineConfig = field(default_factory=EngineConfig)
    save_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.engine.holds_whole:
            raise ConfigError("engine: rollouts in the trainer's process need whole weights; use ddp or none, unshared")
        if self.policy.kl_weight:
            raise ConfigError("policy.kl_weight: this recipe has no reference model to stay near; leave it at 0")
        if self.policy.mtp_weight and "mtp" in self.freeze:
            raise ConfigError("policy.mtp_weight: freeze holds mtp, so nothing would learn; name freeze without it")


def laptop() -> Config:
    """Two minutes on two cores: the quickstart's stage, an action an episode."""
    return Config(
        steps=45,
        collector=CollectorConfig(prompts=16, rollout=RolloutConfig(group_size=8, max_steps=1, max_context=512)),
        generator=GeneratorConfig(dtype="bfloat16"),
        optim=OptimConfig(lr=6e-4, weight_decay=0.0),
        schedule=ScheduleConfig("wsd", warmup=3, floor=0.1, decay=0.3),
        engine=EngineConfig(dtype="bfloat16"),
    )


def debug() -> Config:
    """Seconds: for tests."""
    collector = CollectorConfig(prompts=2, rollout=RolloutConfig(group_size=4, max_steps=2, max_tokens=12))
    return Config(steps=2, pages=2, collector=collector, generator=GeneratorConfig(steady=True), save_every=1)


def small() -> Config:
    """About 1B parameters on one node: 64 groups of 16, encoder trained as well."""
    rollout = RolloutConfig(group_size=16, max_steps=15, max_tokens=512, max_context=16384, lockstep=False)
    return Config(
        steps=1000,
        freeze=["mtp"],
        memory=MemoryConfig(recompute=["encoder", "decoder"]),
        tokens_per_microbatch=1 << 15,
        patches_per_microbatch=1 << 16,
        pages=32,
        browsers=4,
        collector=CollectorConfig(prompts=64, rollout=rollout),
        generator=GeneratorConfig(max_sequences=512, dtype="bfloat16", cache_tokens=1 << 22),
        optim=OptimConfig(lr=2e-6, weight_decay=0.0),
        engine=EngineConfig(dtype="bfloat16"),
        tensorboard=True,
    )


async def train(config: Config) -> None:
    """Build everything in order, then collect and step."""
    world = dist.init()
    dist.seed_everything(config.seed)
    agent, most = load_agent(config.init), config.collector.rollout.max_steps
    model = agent.model
    model.freeze(config.freeze)
    model.set_memory(config.memory)
    generator = make_generator(model.to(world.device), agent.vocab, config.generator)
    objective = policy_objective(model, config.policy, agent.vocab)
    engine = build_engine(objective, build_optimizer(model, config.optim), config.engine, world)
    policy, codec = LocalPolicy(generator), Codec(agent.vocab, agent.geometry, agent.chat)
    work = Work(config.work, config.engine, model, world, config.freeze, config.memory.recompute)
    how = {"estimator": config.collector.advantages.estimator, "share_prompts": objective.shares_prompts}
    how |= {"budget": Size(config.tokens_per_microbatch, config.patches_per_microbatch), **work.dealing}
    async with open_tasks(config.tasks, processes=config.browsers, pages=config.pages, max_steps=most) as tasks:
        collector = Collector(tasks, policy, codec, config.collector, world, config.seed, f"{config.output}/rollouts")
        parts = {"model": model, "engine": engine, "collector": collector}
        run = Run(config.output, world, parts, config=config, **run_settings(config))
        run.caches.append(collector)
        hooks = usual_hooks(run, "rl", config.steps, config, figures=("reward", "entropy"), engine=engine)
        leave = next(hook for hook in hooks if isinstance(hook, LeaveOnSignal))
        for step in run.guard.steps(run.resume(config.steps), config.steps):
            started, policy.version, sampled = time.perf_counter(), step, generator.tokens_sampled
            with run.segments("rollout"):
                collected = await collector.collect(not run.guard.leaves_out(step), lambda: leave.asked)
            if collected.left:
                leave.leave(step)  # every rank, and none comes back
            record = {"lr_scale": schedule(step, config.steps, config.schedule), **collected.metrics}
            for part in range(config.updates):
                if packs := rank_batches(collected.groups[part :: config.updates], world, codec, **how):
                    record |= run.guard.step(step, objective, engine, packs, record["lr_scale"], part=part) or {}
            if run.guard.went_back:
                continue
            record |= rollout_pace(time.perf_counter() - started, record, generator.tokens_sampled - sampled)
            tell(hooks, run, step + 1, record | run.guard.figures(step))
        run.finish(config.steps)
    if world.is_main:
        save_agent(run.directory / "agent", model, agent.vocab, agent.geometry, codec.chat, encoder=agent.encoder)
    dist.shutdown()


if __name__ == "__main__":
    launch(lambda: asyncio.run(train(parse_cli({"laptop": laptop, "debug": debug, "small": small}, __doc__ or ""))))
