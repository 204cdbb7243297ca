"""Stage 2: contrastive image-text training of an encoder at native resolution, packed, with the sigmoid loss.

    torchrun --standalone --nproc_per_node=2 -m recipes.align_encoder --preset laptop \\
        init=runs/distill/encoder tokenizer=runs/data/tokenizer.json output=runs/align

Negatives come from every rank by a two-way ring. Learning rates go by role (``optim.role_lr``: encoder, text, head).
The run resumes by itself and leaves an encoder folder in ``output/encoder``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from data_pipelines.documents import Quarantine, QuarantineConfig
from data_pipelines.galleries import ShardGallery, built_in
from data_pipelines.vision import VisionStreamConfig, pair_stream
from mmagent import dist
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.schedule import ScheduleConfig
from mmagent.engine.torch_engine import TorchEngine, TorchEngineConfig
from mmagent.interop.encoder_folder import load_encoder, save_encoder
from mmagent.models.text_tower import TextTower, TextTowerConfig, text_debug, text_laptop
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.train.hooks import usual_hooks
from mmagent.train.launch import launch
from mmagent.train.loop import fit
from mmagent.train.phases import Phase
from mmagent.train.run import Run
from mmagent.vocab import Vocab
from mmagent.worlds.questions import KINDS


@dataclass
class Config:
    """``init``: the encoder folder of stage 1. ``text.vocab_size`` is raised to the tokenizer's if it is smaller.
    ``mix`` weighs the galleries: those that are drawn here, and ``shards`` by name, whose boxes say what patches show:
    ``kinds`` are classes 1 and on of ``objective.classes``."""

    output: str = "runs/align"
    init: str = "runs/distill/encoder"
    tokenizer: str = "runs/data/tokenizer.json"
    seed: int = 0
    steps: int = 1000
    max_text: int = 64
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    mix: dict[str, float] = field(default_factory=lambda: {"scenes": 0.8, "panels": 0.2})
    shards: dict[str, str] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    data: VisionStreamConfig = field(default_factory=VisionStreamConfig)
    objective: AlignmentConfig = field(default_factory=AlignmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=5))
    engine: TorchEngineConfig = field(default_factory=TorchEngineConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in self.shards:
            if name not in self.mix:
                raise ConfigError(f"shards.{name} has no weight and would not be seen; add mix.{name}=0.5, or =0")
        if self.shards and self.objective.classes not in (0, 1 + len(self.kinds)):
            raise ConfigError(
                f"objective.classes {self.objective.classes} must be 0 or, with the ground, "
                f"{1 + len(self.kinds)} for {len(self.kinds)} kinds"
            )


def debug() -> Config:
    """Seconds: for tests."""
    data = VisionStreamConfig(images_per_step=8, patches_per_microbatch=512, sequence_lengths=[64])
    return Config(
        steps=4,
        text=text_debug(512),
        data=data,
        objective=AlignmentConfig(32, classes=1 + len(KINDS), places=10),
        save_every=2,
    )


def laptop() -> Config:
    """A minute on two cores: the quickstart's stage. With screens among its ``shards`` it learns what stands where."""
    return Config(
        steps=75,
        text=text_laptop(2048),
        data=VisionStreamConfig(images_per_step=48, patches_per_microbatch=8192, sequence_lengths=[192]),
        objective=AlignmentConfig(width=128, classes=1 + len(KINDS), places=20),
        optim=OptimConfig(lr=4e-3),
        engine=TorchEngineConfig(dtype="bfloat16"),
    )


def large() -> Config:
    """The published stage's shape: global batch 64K, sequence lengths drawn per step."""
    return Config(
        steps=100_000,
        data=VisionStreamConfig(1 << 16, 1 << 18, sequence_lengths=[128, 256, 576, 784, 1024]),
        optim=OptimConfig(lr=1e-3, role_lr={"encoder": 0.1}),
        schedule=ScheduleConfig(warmup=2000),
        engine=TorchEngineConfig(parallel="fsdp2", dtype="bfloat16"),
        save_every=1000,
    )


def main() -> None:
    """Build encoder, text tower, objective, engine, stream and run; fit."""
    config = parse_cli({"laptop": laptop, "debug": debug, "large": large}, __doc__ or "")
    if not config.init:
        raise ConfigError("init: alignment starts from an encoder folder, such as runs/distill/encoder")
    config = replace(config, quarantine=config.quarantine.within(config.output))
    world = dist.init()
    dist.seed_everything(config.seed)
    vocab = Vocab.load(config.tokenizer)
    encoder, geometry = load_encoder(config.init)
    tower = TextTower(replace(config.text, vocab_size=max(config.text.vocab_size, vocab.size)))
    objective = Alignment(encoder, tower, config.objective)
    engine = TorchEngine(objective, build_optimizer(objective, config.optim), config.engine, world)
    quarantine = Quarantine(config.quarantine, world.rank)
    galleries = {
        name: ShardGallery(path, geometry, config.seed, name, quarantine, config.kinds)
        for name, path in config.shards.items()
        if config.mix[name]
    }
    pictures = built_in(config.mix, classes="", others=galleries)
    stream = pair_stream(config.data, pictures, geometry, vocab, config.max_text, world)
    run = Run(config.output, world, {"objective": objective, "engine": engine, "stream": stream}, config=config)
    hooks = usual_hooks(run, "align", config.steps, config.save_every)
    rate = Phase(steps=config.steps, schedule=config.schedule).rate(0)
    fit(run, objective, engine, stream, steps=config.steps, schedule=rate, hooks=hooks)
    stream.close()
    weights = gather_weights(encoder)  # by all ranks, for they may be sharded
    if world.is_main:
        save_encoder(run.directory / "encoder", encoder, geometry, weights=weights)
    dist.shutdown()


if __name__ == "__main__":
    launch(main)
