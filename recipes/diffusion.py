"""Teach an agent to say blocks of tokens at once: discrete diffusion, from an agent that says one after the other.

    torchrun --standalone --nproc_per_node=2 -m recipes.diffusion --preset laptop \\
        init=runs/sft/agent data.folder=runs/data/sft data.sources.episodes.weight=5 output=runs/diffusion

The same stage as fine-tuning over the same data, with another objective: first masks, in the last ``edits_share`` of
the steps edits as well (Seed Diffusion, arXiv 2508.02193). Prompts and pictures are never noised, and are read as
before. ``objective.noise.block`` tokens are said together; the agent in ``output/agent`` tells so, and evals, serving
and ``recipes.rl`` decode it by blocks. The MTP head does not learn, and is not used.

With ``objective.noise.block=0 objective.noise.span=64`` every token sees every other (LLaDA, arXiv 2502.09992), and
answers of up to 64 tokens stand among as many places. Evals and serving decode that too, with every look anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipelines.stream import StreamConfig
from mmagent.config import ConfigError, parse_cli
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig
from mmagent.engine.schedule import ScheduleConfig
from mmagent.interop.agent_folder import Agent
from mmagent.models.memory import MemoryConfig
from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.noise import NoiseConfig, NoiseIds
from mmagent.train.launch import launch
from mmagent.train.phases import Phase
from recipes import language_stage, pretrain


@dataclass
class Config(language_stage.Config):
    """``edits_share`` of the steps, the last ones, have edited copies beside masked ones; 0: none.
    ``objective.edits_after`` follows from it. Without ``init`` the agent is new."""

    output: str = "runs/diffusion"
    init: str = "runs/sft/agent"
    edits_share: float = 0.2
    objective: BlockDiffusionConfig = field(default_factory=BlockDiffusionConfig)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.edits_share <= 1:
            raise ConfigError(f"edits_share {self.edits_share} is no share of the steps")
        noise = self.objective.noise
        if not noise.block and not (noise.span and noise.fill):
            raise ConfigError(
                "objective.noise.span: with block 0 and nothing filled up, the number of masks would tell how long an "
                "answer is, and nothing could decode it; name a span, such as 64"
            )
        if self.engine.context_parallel > 1:
            raise ConfigError("engine.context_parallel: noised packs are not shared by ranks")


def debug() -> Config:
    """Seconds: for tests."""
    plain = pretrain.debug()
    noise = NoiseConfig(block=4)
    phases = [Phase("diffusion", 4, freeze=["encoder", "mtp"])]
    objective = BlockDiffusionConfig(noise)
    return Config(model=plain.model, data=plain.data, objective=objective, phases=phases, save_every=2, edits_share=0.5)


def laptop() -> Config:
    """Minutes on two cores, from the quickstart's agent."""
    return Config(
        data=StreamConfig(tokens_per_step=4096, tokens_per_microbatch=2048, patches_per_microbatch=8192),
        objective=BlockDiffusionConfig(NoiseConfig(block=8), copies=2),
        optim=OptimConfig(lr=4e-3),
        engine=EngineConfig(dtype="bfloat16"),
        phases=[
            Phase("diffusion", 200, freeze=["mtp"], schedule=ScheduleConfig("wsd", warmup=10, floor=0.0, decay=0.4))
        ],
        save_every=50,
    )


def small() -> Config:
    """About 1B parameters on one node of eight accelerators."""
    return Config(
        data=StreamConfig(tokens_per_step=1 << 20, tokens_per_microbatch=1 << 14, patches_per_microbatch=1 << 15),
        objective=BlockDiffusionConfig(NoiseConfig(block=16)),
        optim=OptimConfig(lr=1e-4),
        engine=EngineConfig(parallel="fsdp2", dtype="bfloat16"),
        memory=MemoryConfig(recompute=["encoder", "decoder"]),
        phases=[Phase("diffusion", 10000, freeze=["encoder", "mtp"], schedule=ScheduleConfig(warmup=200))],
        tensorboard=True,
    )


def learns(config: Config, agent: Agent) -> tuple[BlockDiffusion, Mapping[str, Any]]:
    """The objective, and the count of steps that its noise goes by. From now on the model denoises."""
    model = agent.model
    total = sum(phase.steps for phase in config.phases)
    edits = round(total * (1 - config.edits_share)) if config.edits_share else -1
    noise = config.objective.noise
    model.config.denoises, model.config.bidirectional = noise.block or noise.span, not noise.block
    ids = NoiseIds.of_vocab(agent.vocab, model.config.vocab_size)
    objective = BlockDiffusion(model, replace(config.objective, edits_after=edits), ids)
    return objective, {"draws": objective.draws}


def main() -> None:
    """Parse and train."""
    config = parse_cli({"laptop": laptop, "debug": debug, "small": small}, __doc__ or "")
    language_stage.train(config, "diffusion", lambda agent: learns(config, agent))


if __name__ == "__main__":
    launch(main)
