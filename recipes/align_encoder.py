"""Stage 2: contrastive image-text training of an encoder at native resolution, packed, with the sigmoid loss.

    torchrun --standalone --nproc_per_node=2 -m recipes.align_encoder --preset laptop \\
        init=runs/distill/encoder tokenizer=runs/data/tokenizer.json output=runs/align

Negatives come from the whole step of every rank, by a two-way ring and cached gradients. Learning rates and schedules
go by role (``optim.role_lr``, ``role_schedules``: encoder, text, projection). Your own pairs: ``sources.mine=FOLDER
mix.mine=1``. The run resumes by itself and leaves an encoder folder in ``output/encoder``, and both towers in
``output/image_text``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from data_pipelines.vision import VisionStreamConfig, pair_stream
from mmagent import dist
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig
from mmagent.engine.schedule import ScheduleConfig
from mmagent.interop.encoder_folder import open_encoder, save_encoder
from mmagent.interop.image_text import save_image_text
from mmagent.models.text_tower import TextTower, TextTowerConfig, text_debug, text_laptop
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.train.launch import launch
from mmagent.vocab import Vocab
from mmagent.worlds.questions import KINDS
from recipes.encoder_stage import StageConfig, part_of, pictures, train


@dataclass
class Config(StageConfig):
    """``init``: the encoder of stage 1, or any that :func:`~mmagent.interop.encoder_folder.open_encoder` takes.
    ``text.vocab_size`` is raised to the tokenizer's if it is smaller. ``sources`` whose records have labelled boxes say
    what patches show: ``kinds`` are classes 1 and on of ``objective.classes``, and kinds of your own are also those of
    plain images' maps (``IMAGE.mask.png``)."""

    output: str = "runs/align"
    init: str = "runs/distill/encoder"
    tokenizer: str = "runs/data/tokenizer.json"
    max_text: int = 64
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    mix: dict[str, float] = field(default_factory=lambda: {"scenes": 0.8, "panels": 0.2})
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    objective: AlignmentConfig = field(default_factory=AlignmentConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=5))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources and self.objective.classes not in (0, 1 + len(self.kinds)):
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
        engine=EngineConfig(dtype="bfloat16"),
    )


def large() -> Config:
    """The published stage's shape: global batch 64K, sequence lengths drawn per step."""
    return Config(
        steps=100_000,
        data=VisionStreamConfig(1 << 16, 1 << 18, sequence_lengths=[128, 256, 576, 784, 1024]),
        optim=OptimConfig(lr=1e-3, role_lr={"encoder": 0.1}),
        schedule=ScheduleConfig(warmup=2000),
        engine=EngineConfig(parallel="fsdp2", dtype="bfloat16"),
        save_every=1000,
    )


def main() -> None:
    """Build encoder, text tower, objective and stream; train; save the encoder, and both towers."""
    config = parse_cli({"laptop": laptop, "debug": debug, "large": large}, __doc__ or "")
    if not config.init:
        raise ConfigError("init: alignment starts from an encoder folder, such as runs/distill/encoder")
    world = dist.init()
    dist.seed_everything(config.seed)
    vocab = Vocab.load(config.tokenizer)
    encoder, geometry, custom = open_encoder(config.init)
    size = max(config.text.vocab_size, vocab.size)
    tower = TextTower(replace(config.text, vocab_size=size, max_length=max(config.text.max_length, config.max_text)))
    objective = Alignment(encoder, tower, config.objective)
    asked = config.objective
    kinds = tuple(config.kinds) if asked.classes or asked.places else ()
    texts = bool(asked.contrastive_weight or asked.words_weight)
    own = kinds != KINDS  # a map of plain images cannot mean the widgets that our own screens have
    gallery = pictures(config, geometry, world, kinds=kinds, captions=texts, maps=own, classes="")
    stream = pair_stream(config.data, gallery, geometry, vocab, config.max_text, world)
    run, weights = train(config, "align", objective, stream, world, part="encoder")
    if world.is_main:
        whole = part_of(weights, "encoder")
        save_encoder(run.directory / "encoder", encoder, geometry, custom=custom, weights=whole)
        if config.objective.contrastive_weight:
            limits = {"max_text": config.max_text, "max_patches": max(config.data.sequence_lengths)}
            both = run.directory / "image_text"
            save_image_text(both, objective, geometry, vocab, **limits, custom=custom, weights=weights)
    dist.shutdown()


if __name__ == "__main__":
    launch(main)
