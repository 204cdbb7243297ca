"""Pretrain the language model that sees: CogViT + merger + MoE decoder + shared-token MTP on packed documents.

    python -m data_pipelines.build --preset laptop folder=runs/data
    torchrun --standalone --nproc_per_node=2 -m recipes.pretrain --preset laptop encoder=runs/align/encoder \\
        tokenizer=runs/data/tokenizer.json data.folder=runs/data/pretrain data.sources.screens.weight=6 \\
        output=runs/pretrain

Phases follow each other as in ``phases``; the run resumes by itself, bitwise. It leaves an agent in ``output/agent``.
"""

from __future__ import annotations

from data_pipelines.stream import StreamConfig
from mmagent.config import parse_cli
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig
from mmagent.engine.schedule import ScheduleConfig
from mmagent.geometry import WHITE_MEAN, GeometryConfig
from mmagent.models import presets
from mmagent.models.memory import MemoryConfig
from mmagent.train.launch import launch
from mmagent.train.phases import Phase
from recipes.language_stage import Config, train


def debug() -> Config:
    """Seconds: for tests."""
    data = StreamConfig(
        tokens_per_step=1024, tokens_per_microbatch=512, patches_per_microbatch=2048, split_long=True, buffer=16
    )
    phases = [Phase("adapter", 2, freeze=["encoder", "decoder"]), Phase("all", 4)]
    return Config(model=presets.debug(vocab_size=1024), data=data, phases=phases, save_every=2)


def laptop() -> Config:
    """Minutes on two cores: the quickstart's stage."""
    return Config(
        geometry=GeometryConfig(mean=WHITE_MEAN),
        data=StreamConfig(
            tokens_per_step=4096, tokens_per_microbatch=2048, patches_per_microbatch=4096, split_long=True
        ),
        optim=OptimConfig(lr=4e-3),
        engine=EngineConfig(dtype="bfloat16"),
        phases=[
            Phase("adapter", 10, freeze=["encoder"], schedule=ScheduleConfig("constant", warmup=10)),
            Phase("all", 200, schedule=ScheduleConfig("wsd", warmup=10, floor=0.0, decay=0.4)),
        ],
        save_every=50,
    )


def small() -> Config:
    """About 1B parameters on one node of eight accelerators."""
    return Config(
        model=presets.small(),
        data=StreamConfig(
            tokens_per_step=1 << 20, tokens_per_microbatch=1 << 15, patches_per_microbatch=1 << 16, split_long=True
        ),
        optim=OptimConfig(lr=4e-4, role_lr={"encoder": 0.1}),
        engine=EngineConfig(parallel="fsdp2", dtype="bfloat16"),
        memory=MemoryConfig(recompute=["encoder", "decoder", "mtp"]),
        phases=[
            Phase("adapter", 2000, freeze=["encoder", "decoder"], schedule=ScheduleConfig(warmup=200)),
            Phase("all", 50_000, schedule=ScheduleConfig(warmup=500)),
        ],
        save_every=500,
        tensorboard=True,
    )


def main() -> None:
    """Parse and train."""
    train(parse_cli({"laptop": laptop, "debug": debug, "small": small}, __doc__ or ""), "pretrain")


if __name__ == "__main__":
    launch(main)
