"""Stage 1: distil an encoder from frozen vision teachers; the student sees a corrupted image and describes all of it.

    torchrun --standalone --nproc_per_node=2 -m recipes.distill_encoder --preset laptop \\
        teachers.siglip2.source=google/siglip2-base-patch16-224 \\
        teachers.dinov3.source=facebook/dinov3-vits16-pretrain-lvd1689m output=runs/distill

A teacher's source is a folder, a hub id, or ``timm:`` and a model name; a third teacher is one more line
(``teachers.clip.source=...``). So is the student's (``encoder=timm:vit_small_patch16_224``), which is a CogViT of
``vision`` otherwise. Your own images: ``sources.mine=FOLDER mix.mine=1``. The run resumes by itself, the teachers'
statistics included. It leaves an encoder folder in ``output/encoder``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from data_pipelines.masking import MaskConfig
from data_pipelines.vision import CropConfig, VisionStreamConfig, distillation_stream
from mmagent import dist
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig
from mmagent.engine.schedule import ScheduleConfig
from mmagent.geometry import WHITE_MEAN, GeometryConfig
from mmagent.interop.encoder_folder import save_encoder
from mmagent.models.cogvit import CogViTConfig, cogvit_403m, cogvit_debug, cogvit_laptop, seed_vit
from mmagent.models.feature_cache import FeatureCache, FeatureCacheConfig
from mmagent.models.teachers import TeacherConfig, load_teachers
from mmagent.objectives.distillation import Distillation, DistillationConfig
from mmagent.train.launch import launch
from recipes.encoder_stage import StageConfig, part_of, pictures, student, train

TEACHERS = ("siglip2", "dinov3")


@dataclass
class Config(StageConfig):
    """``encoder``: what :func:`~mmagent.interop.encoder_folder.open_encoder` takes, to go on from; empty for a new
    CogViT of ``vision``. ``calibration``: steps' worth of images that the teachers' statistics are estimated from.
    ``side``: pixels of drawn squares; 0 draws many sizes. ``cache`` keeps teachers' features on disk."""

    output: str = "runs/distill"
    teachers: dict[str, TeacherConfig] = field(default_factory=lambda: {n: TeacherConfig() for n in TEACHERS})
    teacher_dtype: str = "float32"
    calibration: int = 4
    cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    encoder: str = ""
    vision: CogViTConfig = field(default_factory=cogvit_laptop)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    side: int = 0
    mask: MaskConfig = field(default_factory=MaskConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    objective: DistillationConfig = field(default_factory=DistillationConfig)


def debug() -> Config:
    """Seconds: for tests."""
    data = VisionStreamConfig(images_per_step=8, patches_per_microbatch=256, sequence_lengths=[64])
    return Config(steps=4, calibration=1, vision=cogvit_debug(), data=data, save_every=2)


def laptop() -> Config:
    """Half a minute on two cores: the quickstart's stage. The small DINOv3's class token has learned nothing."""
    return Config(
        steps=100,
        teachers={"siglip2": TeacherConfig(), "dinov3": TeacherConfig(summary=False)},
        geometry=GeometryConfig(mean=WHITE_MEAN),
        side=112,
        teacher_dtype="bfloat16",
        data=VisionStreamConfig(images_per_step=16, patches_per_microbatch=8192, sequence_lengths=[64]),
        mask=MaskConfig(ratio=0.2),
        crop=CropConfig(1.0),
        objective=DistillationConfig(visible_weight=1.0, summary_weight=0.02),
        optim=OptimConfig(lr=3e-3),
        engine=EngineConfig(dtype="bfloat16"),
    )


def large() -> Config:
    """The published recipe's sizes: 224 x 224, 35 % masked, the 403M tower."""
    return Config(
        steps=100_000,
        calibration=16,
        teacher_dtype="bfloat16",
        vision=cogvit_403m(),
        data=VisionStreamConfig(images_per_step=4096, patches_per_microbatch=1 << 16),
        optim=OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup=2000),
        engine=EngineConfig(parallel="fsdp2", dtype="bfloat16"),
        save_every=1000,
    )


def seed() -> Config:
    """Seed-ViT's masked stage (arXiv 2505.07062): one CLIP teacher (``teachers.clip.source=``), 75 % masked, cosine."""
    return replace(
        large(),
        teachers={"clip": TeacherConfig(summary=False)},
        vision=seed_vit(),
        geometry=GeometryConfig(temporal_patch=1),
        data=VisionStreamConfig(images_per_step=55_296, patches_per_microbatch=1 << 16),
        mask=MaskConfig(ratio=0.75),
        objective=DistillationConfig(standardise="none", cosine=1.0, smooth_l1=0.0),
        optim=OptimConfig(lr=7.06e-3),
    )


def main() -> None:
    """Build teachers, student, objective and stream; calibrate once; train; save the student."""
    config = parse_cli({"laptop": laptop, "debug": debug, "large": large, "seed": seed}, __doc__ or "")
    world = dist.init()
    dist.seed_everything(config.seed)
    if not any(teacher.source for teacher in config.teachers.values()):
        raise ConfigError(f"teachers: give at least one of {', '.join(config.teachers)} a source (a folder or hub id)")
    dtype, cache = getattr(torch, config.teacher_dtype), FeatureCache.open(config.cache)
    teachers = load_teachers(config.teachers, dtype, world.device, cache)
    mask_token = config.objective.blind == "token"
    encoder, geometry, custom = student(config.encoder, config.vision, config.geometry, mask_token)
    objective = Distillation(encoder, teachers, config.objective)
    gallery = pictures(config, geometry, world, side=config.side)
    stream = distillation_stream(config.data, gallery, geometry, config.mask, config.crop, world)

    def calibrate() -> None:
        first = distillation_stream(config.data, gallery, geometry, config.mask, config.crop, world)
        objective.calibrate(batch.to(world.device) for step in islice(first, config.calibration) for batch in step)
        first.close()

    run, weights = train(config, "distill", objective, stream, world, calibrate, part="student")
    if world.is_main:
        whole = part_of(weights, "student")
        save_encoder(run.directory / "encoder", encoder, geometry, custom=custom, weights=whole)
    dist.shutdown()


if __name__ == "__main__":
    launch(main)
