"""Stage 1: distil CogViT from frozen vision teachers; the student sees a corrupted image and describes all of it.

    torchrun --standalone --nproc_per_node=2 -m recipes.distill_encoder --preset laptop \\
        teachers.siglip2.source=google/siglip2-base-patch16-224 \\
        teachers.dinov3.source=facebook/dinov3-vits16-pretrain-lvd1689m output=runs/distill

A teacher's source is a folder, a hub id, or ``timm:`` and a model name; a third teacher is one more line. The run
resumes by itself, the teachers' statistics included. It leaves an encoder folder in ``output/encoder``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from data_pipelines.galleries import built_in
from data_pipelines.masking import MaskConfig
from data_pipelines.vision import CropConfig, VisionStreamConfig, distillation_stream
from mmagent import dist
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.schedule import ScheduleConfig
from mmagent.engine.torch_engine import TorchEngine, TorchEngineConfig
from mmagent.geometry import WHITE_MEAN, GeometryConfig
from mmagent.interop.encoder_folder import save_encoder
from mmagent.models.cogvit import CogViT, CogViTConfig, cogvit_403m, cogvit_debug, cogvit_laptop
from mmagent.models.teachers import Teacher
from mmagent.objectives.distillation import Distillation, DistillationConfig
from mmagent.train.hooks import usual_hooks
from mmagent.train.launch import launch
from mmagent.train.loop import fit
from mmagent.train.phases import Phase
from mmagent.train.run import Run

TEACHERS = ("siglip2", "dinov3")


@dataclass
class TeacherConfig:
    """``source`` as in :func:`mmagent.models.teachers.load_backbone`; empty leaves the teacher out. ``resolution`` 0
    matches the teacher's grid to the student's. ``summary`` false: nothing has trained its summary, none is learned."""

    source: str = ""
    resolution: int = 0
    summary: bool = True


@dataclass
class Config:
    """``mix``: weights of the built-in galleries (``scenes``, ``panels`` and kinds of photographs)."""

    output: str = "runs/distill"
    seed: int = 0
    steps: int = 1000
    calibration: int = 4  # steps' worth of images that the teachers' statistics are estimated from
    teacher_dtype: str = "float32"
    teachers: dict[str, TeacherConfig] = field(default_factory=lambda: {n: TeacherConfig() for n in TEACHERS})
    vision: CogViTConfig = field(default_factory=cogvit_laptop)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    mix: dict[str, float] = field(default_factory=lambda: {"scenes": 0.8, "panels": 0.1, "scientific": 0.1})
    side: int = 0  # pixels of drawn squares; 0 draws many sizes
    data: VisionStreamConfig = field(default_factory=VisionStreamConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    objective: DistillationConfig = field(default_factory=DistillationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=10))
    engine: TorchEngineConfig = field(default_factory=TorchEngineConfig)
    save_every: int = 50


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
        engine=TorchEngineConfig(dtype="bfloat16"),
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
        engine=TorchEngineConfig(parallel="fsdp2", dtype="bfloat16"),
        save_every=1000,
    )


def main() -> None:
    """Build teachers, student, objective, engine, stream and run; calibrate once; fit."""
    config = parse_cli({"laptop": laptop, "debug": debug, "large": large}, __doc__ or "")
    world = dist.init()
    dist.seed_everything(config.seed)
    sources = {name: t for name, t in config.teachers.items() if t.source}
    if not sources:
        raise ConfigError(f"teachers: give at least one of {', '.join(config.teachers)} a source (a folder or hub id)")
    dtype = getattr(torch, config.teacher_dtype)
    known = {n: {"resolution": t.resolution, "summary": t.summary} for n, t in sources.items()}
    load = {n: Teacher.load(t.source, n, dtype=dtype, **known[n]) for n, t in sources.items()}
    student = CogViT(replace(config.vision, mask_token=True))
    objective = Distillation(student, [teacher.to(world.device) for teacher in load.values()], config.objective)
    engine = TorchEngine(objective, build_optimizer(objective, config.optim), config.engine, world)
    pictures = built_in(config.mix, config.side)
    stream = distillation_stream(config.data, pictures, config.geometry, config.mask, config.crop, world)
    run = Run(config.output, world, {"objective": objective, "engine": engine, "stream": stream}, config=config)
    if not run.resume():
        first = distillation_stream(config.data, pictures, config.geometry, config.mask, config.crop, world)
        objective.calibrate(batch.to(world.device) for step in islice(first, config.calibration) for batch in step)
        first.close()
    hooks = usual_hooks(run, "distill", config.steps, config.save_every)
    rate = Phase(steps=config.steps, schedule=config.schedule).rate(0)
    fit(run, objective, engine, stream, steps=config.steps, schedule=rate, hooks=hooks)
    stream.close()
    weights = gather_weights(student)  # by all ranks, for they may be sharded
    if world.is_main:
        save_encoder(run.directory / "encoder", student, config.geometry, weights=weights)
    dist.shutdown()


if __name__ == "__main__":
    launch(main)
