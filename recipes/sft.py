"""Fine-tune a pretrained agent on chat and GUI traces; the renderer's mask says which tokens are learnt.

    torchrun --standalone --nproc_per_node=2 -m recipes.sft --preset laptop \\
        init=runs/pretrain/agent data.folder=runs/data/sft data.sources.episodes.weight=5 output=runs/sft

The same stage as pretraining over other data (`recipes.language_stage`). The encoder is frozen at ``small`` and
``debug``, as in Seed1.5-VL; at ``laptop`` it is young and learns on. It leaves an agent folder in ``output/agent``.
"""

from __future__ import annotations

from dataclasses import replace

from data_pipelines.stream import StreamConfig
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig
from mmagent.engine.schedule import ScheduleConfig
from mmagent.models.memory import MemoryConfig
from mmagent.objectives.language_modeling import LanguageModelingConfig
from mmagent.train.launch import launch
from mmagent.train.phases import Phase
from recipes import pretrain
from recipes.language_stage import Config, train


def debug() -> Config:
    """Seconds: for tests."""
    phases = [Phase("sft", 4, freeze=["encoder"])]
    return replace(pretrain.debug(), output="runs/sft", init="runs/pretrain/agent", phases=phases)


def laptop() -> Config:
    """A minute and a quarter on two cores: the quickstart's stage."""
    return Config(
        output="runs/sft",
        init="runs/pretrain/agent",
        data=StreamConfig(tokens_per_step=4096, tokens_per_microbatch=2048, patches_per_microbatch=8192),
        optim=OptimConfig(lr=4e-3),
        engine=EngineConfig(dtype="bfloat16"),
        phases=[Phase("sft", 60, schedule=ScheduleConfig("wsd", warmup=5, floor=0.0, decay=0.5))],
        save_every=50,
    )


def small() -> Config:
    """About 1B parameters on one node; 32K tokens a document (GLM-4.5V: length 32,768)."""
    return Config(
        output="runs/sft",
        init="runs/pretrain/agent",
        data=StreamConfig(tokens_per_step=1 << 20, tokens_per_microbatch=1 << 15, patches_per_microbatch=1 << 16),
        objective=LanguageModelingConfig(mtp_weight=0.1),
        optim=OptimConfig(lr=5e-5),
        engine=EngineConfig(parallel="fsdp2", dtype="bfloat16"),
        memory=MemoryConfig(recompute=["encoder", "decoder", "mtp"]),
        phases=[Phase("sft", 5000, freeze=["encoder"], schedule=ScheduleConfig(warmup=100))],
        tensorboard=True,
    )


def main() -> None:
    """Parse, check that there is something to fine-tune, train."""
    config = parse_cli({"laptop": laptop, "debug": debug, "small": small}, __doc__ or "")
    if not config.init:
        raise ConfigError("init: supervised fine-tuning starts from an agent folder, such as runs/pretrain/agent")
    train(config, "sft")


if __name__ == "__main__":
    launch(main)
