"""Train a small teacher on the spot, for machines that cannot download one: real SigLIP2 and DINOv3 architectures.

    torchrun --standalone --nproc_per_node=1 -m recipes.teachers --preset siglip2 tokenizer=runs/data/tokenizer.json \\
        output=runs/teachers/siglip2
    torchrun --standalone --nproc_per_node=1 -m recipes.teachers --preset dinov3 output=runs/teachers/dinov3

They stand in for models that billions of images taught, so they are told what those found out. SigLIP2 learns words for
shapes, colours and places: the sigmoid loss, a classifier of the caption's words, and of which shape each patch shows.
DINOv3 learns texture: descriptors of hidden patches, and the drawn scenes' exact maps of materials, which no caption
names. The folder ``output/teacher`` loads in transformers, and as a teacher of `recipes.distill_encoder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from data_pipelines.galleries import CLASSES
from data_pipelines.masking import MaskConfig
from data_pipelines.vision import CropConfig, VisionStreamConfig, distillation_stream, pair_stream
from mmagent import dist
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig
from mmagent.engine.schedule import ScheduleConfig
from mmagent.geometry import GeometryConfig
from mmagent.models.backbones import BackboneEncoder, new_backbone, save_backbone
from mmagent.models.text_tower import TextTower, text_laptop
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.objectives.reconstruction import MaskedReconstruction, ReconstructionConfig
from mmagent.train.launch import launch
from mmagent.vocab import Vocab
from recipes.encoder_stage import StageConfig, part_of, pictures, train


@dataclass
class Config(StageConfig):
    """``kind``: ``siglip2`` (needs a ``tokenizer``) or ``dinov3``; sizes are those of a vision transformer.
    ``classes``: which classes of patches it is told (:data:`data_pipelines.galleries.CLASSES`). ``side``: pixels of the
    drawn squares."""

    kind: str = "siglip2"
    output: str = "runs/teachers/siglip2"
    tokenizer: str = "runs/data/tokenizer.json"
    classes: str = ""  # what patches show, for an objective with a classifier of it
    steps: int = 180
    width: int = 128
    depth: int = 4
    heads: int = 2
    patch_size: int = 14
    side: int = 112
    mix: dict[str, float] = field(default_factory=lambda: {"scenes": 0.8, "panels": 0.2})
    data: VisionStreamConfig = field(default_factory=lambda: VisionStreamConfig(16, 8192, sequence_lengths=[64]))
    mask: MaskConfig = field(default_factory=MaskConfig)
    crop: CropConfig = field(default_factory=lambda: CropConfig(1.0))
    alignment: AlignmentConfig = field(default_factory=lambda: AlignmentConfig(width=96))
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=5))
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(dtype="bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("siglip2", "dinov3"):
            raise ConfigError(f"kind {self.kind!r} is neither siglip2 nor dinov3")
        asked = self.alignment.classes if self.kind == "siglip2" else self.reconstruction.classes
        if asked and asked != CLASSES.get(self.classes):
            raise ConfigError(
                f"classes {self.classes!r} has {CLASSES.get(self.classes)} classes, the objective {asked}"
            )


def siglip2() -> Config:
    """Three quarters of a minute on two cores."""
    return Config(
        steps=210,
        mix={"scenes0": 0.6, "scenes1": 0.4},
        classes="shapes",
        alignment=AlignmentConfig(96, words_weight=4.0, classes=CLASSES["shapes"], classes_weight=12.0),
    )


def dinov3() -> Config:
    """Half a minute on two cores."""
    return Config(
        kind="dinov3",
        classes="materials",
        output="runs/teachers/dinov3",
        mix={"scenes1": 0.45, "scenes2": 0.45, "panels": 0.1},
        mask=MaskConfig(ratio=0.1),
        reconstruction=ReconstructionConfig(classes=CLASSES["materials"], classes_weight=6.0),
    )


def main() -> None:
    """Build backbone, objective, engine, stream and run; fit; save the teacher's folder."""
    config = parse_cli({"siglip2": siglip2, "dinov3": dinov3}, __doc__ or "")
    if config.engine.shards_weights:
        raise ConfigError("engine.parallel: a teacher is written by transformers, which needs whole weights; use ddp")
    world = dist.init()
    dist.seed_everything(config.seed)
    encoder = BackboneEncoder(new_backbone(config.kind, config.width, config.depth, config.heads, config.patch_size))
    geometry = GeometryConfig(patch_size=config.patch_size, min_tokens=1)
    texts = config.kind == "siglip2"
    gallery = pictures(config, geometry, world, captions=texts, side=config.side, classes=config.classes)
    if config.kind == "siglip2":
        vocab = Vocab.load(config.tokenizer)
        objective: Any = Alignment(encoder, TextTower(replace(text_laptop(vocab.size), depth=1)), config.alignment)
        stream = pair_stream(config.data, gallery, geometry, vocab, world=world, square=True)
    else:
        objective = MaskedReconstruction(encoder, config.reconstruction)
        stream = distillation_stream(config.data, gallery, geometry, config.mask, config.crop, world)
    _, weights = train(config, f"teacher {config.kind}", objective, stream, world)
    if world.is_main:
        encoder.load_state_dict(part_of(weights, "encoder"))  # the average, where there is one
        save_backbone(encoder.backbone, f"{config.output}/teacher")
    dist.shutdown()


if __name__ == "__main__":
    launch(main)
