"""What reinforcement learning is configured by, and its presets; the loop is in :mod:`recipes.rl`."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmagent.agent.collector import CollectorConfig
from mmagent.agent.engines import EnginesConfig
from mmagent.agent.points import PointsConfig
from mmagent.agent.rollout import RolloutConfig
from mmagent.agent.stream import StreamConfig
from mmagent.config import ConfigError
from mmagent.engine.build import EngineConfig
from mmagent.engine.optim import OptimConfig
from mmagent.engine.schedule import ScheduleConfig
from mmagent.generation.generator import GeneratorConfig
from mmagent.models.memory import MemoryConfig
from mmagent.objectives.policy_gradient import PolicyGradientConfig
from mmagent.tasks import easy_task_names
from mmagent.train.alarms import AlarmConfig
from mmagent.train.hooks import RunConfig
from mmagent.train.work import WorkConfig


@dataclass
class Config(RunConfig):
    """``tasks``: :func:`mmagent.tasks.all_task_names` or import paths. ``pages`` and ``browsers`` are a rank's.
    ``train=false`` only plays. ``fresh_optimizer``: what the optimizer remembers is forgotten whenever new weights are
    served (GLM-5, arXiv 2602.15763): for steps of several ``updates``. ``reference``: an agent to stay near, or to
    learn from; see ``policy``."""

    output: str = "runs/rl"
    init: str = "runs/sft/agent"
    tasks: list[str] = field(default_factory=easy_task_names)
    seed: int = 1
    steps: int = 100
    updates: int = 1
    fresh_optimizer: bool = False
    train: bool = True
    reference: str = ""
    evaluate_every: int = 0
    freeze: list[str] = field(default_factory=lambda: ["encoder", "mtp"])
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    work: WorkConfig = field(default_factory=WorkConfig)
    tokens_per_microbatch: int = 16384
    patches_per_microbatch: int = 16384
    pages: int = 16
    browsers: int = 1
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    rollout: EnginesConfig = field(default_factory=EnginesConfig)
    points: PointsConfig = field(default_factory=PointsConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    policy: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    generator: GeneratorConfig = field(default_factory=lambda: GeneratorConfig(record_routing=True))
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("constant", warmup=3))
    engine: EngineConfig = field(default_factory=EngineConfig)
    save_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.engine.holds_whole:
            raise ConfigError("engine: rollouts in the trainer's process need whole weights; use ddp or none, unshared")
        if self.policy.needs_reference and not self.reference:
            raise ConfigError(
                "policy.kl_weight and policy.distill_weight need another agent: name its folder, reference="
            )
        if self.train and self.policy.temperature != self.collector.rollout.temperature:
            raise ConfigError(
                f"policy.temperature {self.policy.temperature} must be collector.rollout.temperature "
                f"{self.collector.rollout.temperature}: probabilities are of what was drawn from; set both"
            )
        if bool(self.points.evaluate) != bool(self.evaluate_every):
            raise ConfigError(
                "points.evaluate and evaluate_every go together: one says what is measured, one how often"
            )
        if self.policy.mtp_weight and "mtp" in self.freeze:
            raise ConfigError("policy.mtp_weight: freeze holds mtp, so nothing would learn; name freeze without it")


def laptop() -> Config:
    """Two minutes on two cores: the quickstart's stage, an action an episode."""
    return Config(
        steps=45,
        collector=CollectorConfig(prompts=16, rollout=RolloutConfig(group_size=8, max_steps=1, max_context=512)),
        generator=GeneratorConfig(dtype="bfloat16", record_routing=True),
        optim=OptimConfig(lr=6e-4, weight_decay=0.0),
        schedule=ScheduleConfig("wsd", warmup=3, floor=0.1, decay=0.3),
        engine=EngineConfig(dtype="bfloat16"),
    )


def debug() -> Config:
    """Seconds: for tests."""
    collector = CollectorConfig(prompts=2, rollout=RolloutConfig(group_size=4, max_steps=2, max_tokens=12))
    return Config(
        steps=2, pages=2, collector=collector, generator=GeneratorConfig(steady=True, record_routing=True), save_every=1
    )


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
        generator=GeneratorConfig(max_sequences=512, dtype="bfloat16", cache_tokens=1 << 22, record_routing=True),
        optim=OptimConfig(lr=2e-6, weight_decay=0.0),
        engine=EngineConfig(dtype="bfloat16"),
        tensorboard=True,
    )
