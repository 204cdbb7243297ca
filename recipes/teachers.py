"""Train a small teacher on the spot, for machines that cannot download one: real SigLIP2 and DINOv3 architectures.

    torchrun --standalone --nproc_per_node=1 -m recipes.teachers --preset siglip2 tokenizer=runs/data/tokenizer.json \\
        output=runs/teachers/siglip2
    torchrun --standalone --nproc_per_node=1 -m recipes.teachers --preset dinov3 output=runs/teachers/dinov3

They stand in for models that billions of images taught, so they are told what those found out. SigLIP2 learns words for
shapes, colours and places: the sigmoid loss, a classifier of the caption's words, and descriptors of its patches.
DINOv3 learns texture: descriptors of hidden patches, and the drawn scenes' exact maps of materials, which no caption
names. The folder ``output/teacher`` loads in transformers, and as a teacher of `recipes.distill_encoder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from data_pipelines.galleries import built_in
from data_pipelines.masking import MaskConfig
from data_pipelines.vision import VisionStream, VisionStreamConfig, distillation_stream, pair_stream
from mmagent import dist
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.schedule import ScheduleConfig
from mmagent.engine.torch_engine import TorchEngine, TorchEngineConfig
from mmagent.geometry import GeometryConfig
from mmagent.models.layers import matrix_std
from mmagent.models.teachers import BackboneEncoder, save_backbone, wrap
from mmagent.models.text_tower import TextTower, text_laptop
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.objectives.reconstruction import MaskedReconstruction, ReconstructionConfig
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.train.hooks import JsonlLog, LeaveOnSignal, Progress, SaveHook
from mmagent.train.loop import fit
from mmagent.train.phases import Phase
from mmagent.train.run import Run
from mmagent.vocab import Vocab
from mmagent.worlds.images import MATERIALS


@dataclass
class Config:
    """``kind``: ``siglip2`` (needs a ``tokenizer``) or ``dinov3``; sizes are those of a vision transformer."""

    kind: str = "siglip2"
    output: str = "runs/teachers/siglip2"
    tokenizer: str = "runs/data/tokenizer.json"
    seed: int = 0
    steps: int = 200
    width: int = 128
    depth: int = 4
    heads: int = 2
    patch_size: int = 16
    mix: dict[str, float] = field(default_factory=lambda: {"scenes": 0.8, "panels": 0.2})
    data: VisionStreamConfig = field(default_factory=VisionStreamConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    alignment: AlignmentConfig = field(default_factory=lambda: AlignmentConfig(width=96))
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=5))
    engine: TorchEngineConfig = field(default_factory=lambda: TorchEngineConfig(dtype="bfloat16"))
    save_every: int = 50

    def __post_init__(self) -> None:
        if self.kind not in ("siglip2", "dinov3"):
            raise ConfigError(f"kind {self.kind!r} is neither siglip2 nor dinov3")


def siglip2() -> Config:
    """Half a minute on two cores."""
    return Config(
        mix={"scenes0": 0.6, "scenes1": 0.3, "panels": 0.1},
        data=VisionStreamConfig(images_per_step=32, patches_per_microbatch=8192, sequence_lengths=[64]),
        alignment=AlignmentConfig(width=96, words_weight=8.0, describe_weight=1.0),
    )


def dinov3() -> Config:
    """Half a minute on two cores."""
    return Config(
        "dinov3",
        "runs/teachers/dinov3",
        mix={"scenes1": 0.45, "scenes2": 0.45, "panels": 0.1},
        data=VisionStreamConfig(images_per_step=32, patches_per_microbatch=8192, sequence_lengths=[64]),
        mask=MaskConfig(ratio=0.2),
        reconstruction=ReconstructionConfig(visible_weight=0.5, classes=len(MATERIALS)),
    )


def backbone(config: Config) -> Any:
    """A new transformers vision model of the wanted kind."""
    ensure_torchvision()
    from transformers import DINOv3ViTConfig, DINOv3ViTModel, Siglip2VisionConfig, Siglip2VisionModel

    sizes = {
        "hidden_size": config.width,
        "intermediate_size": 3 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
    }
    if config.kind == "siglip2":
        module: Any = Siglip2VisionModel(Siglip2VisionConfig(num_patches=64, **sizes))
    else:
        module = DINOv3ViTModel(DINOv3ViTConfig(**sizes))
    module.set_attn_implementation("eager")  # torch's fused attention is slow backwards in bf16 on a CPU
    for layer in module.modules():  # their own 0.02 is meant for wide models
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=matrix_std(layer.weight[0].numel(), 0))
    return module


def main() -> None:
    """Build backbone, objective, engine, stream and run; fit; save the teacher's folder."""
    config = parse_cli({"siglip2": siglip2, "dinov3": dinov3}, __doc__ or "")
    if config.engine.parallel == "fsdp2":
        raise ConfigError("engine.parallel: a teacher is written by transformers, which needs whole weights; use ddp")
    world = dist.init()
    dist.seed_everything(config.seed)
    encoder = BackboneEncoder(wrap(backbone(config)))
    geometry = GeometryConfig(patch_size=config.patch_size, min_tokens=1)
    pictures, objective, stream = built_in(config.mix), None, None
    if config.kind == "siglip2":
        vocab = Vocab.load(config.tokenizer)
        objective = Alignment(encoder, TextTower(replace(text_laptop(vocab.size), depth=1)), config.alignment)
        stream = pair_stream(config.data, pictures, geometry, vocab, world=world, square=True)
    else:
        objective = MaskedReconstruction(encoder, config.reconstruction)
        stream = distillation_stream(config.data, pictures, geometry, config.mask, world=world)
    _train(config, objective, stream, world)
    if world.is_main:
        save_backbone(encoder.backbone, f"{config.output}/teacher")
    dist.shutdown()


def _train(config: Config, objective: Any, stream: VisionStream[Any], world: dist.World) -> None:
    engine = TorchEngine(objective, build_optimizer(objective, config.optim), config.engine, world)
    run = Run(config.output, world, {"objective": objective, "engine": engine, "stream": stream}, config=config)
    title = f"teacher {config.kind}"
    hooks = [Progress(title, config.steps), JsonlLog(run.directory / "log.jsonl"), SaveHook(run, config.save_every)]
    rate = Phase(steps=config.steps, schedule=config.schedule).rate(0)
    fit(run, objective, engine, stream, steps=config.steps, schedule=rate, hooks=[*hooks, LeaveOnSignal(run)])
    stream.close()


if __name__ == "__main__":
    main()
