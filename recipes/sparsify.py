"""Prune a trained agent in stages, each with a short fine-tuning: tile-wise sparsity (arXiv 2008.13006).

    torchrun --standalone --nproc_per_node=2 -m recipes.sparsify --preset laptop \\
        init=runs/sft/agent data.folder=runs/data/sft data.sources.episodes.weight=5 output=runs/sparse
    python tools/pack.py runs/sparse/agent --into runs/packed

The same stage as fine-tuning (`recipes.language_stage`) with ``sparsity``, which every stage has: an encoder is pruned
by its own, as in ``recipes.distill_encoder encoder=FOLDER sparsity.levels=[0.25,0.5,0.75] ...``. How many steps it
takes follows from the levels; ``phases.0`` says how they are trained. The run resumes by itself, bitwise. It leaves a
dense agent with zeros in ``output/agent`` and the masks in ``output/sparsity.safetensors``.
"""

from __future__ import annotations

from dataclasses import replace

from mmagent.config import ConfigError, parse_cli
from mmagent.engine.schedule import ScheduleConfig
from mmagent.sparsity.patterns import PatternConfig
from mmagent.sparsity.stages import SparsityConfig
from mmagent.train.launch import launch
from mmagent.train.phases import Phase
from recipes import sft
from recipes.language_stage import Config, train

LEVELS = [0.25, 0.35, 0.5, 0.6, 0.7, 0.75]
"""The paper's road to 75 %: little at a time, for what a stage drops must be made up for by those that are left."""


def debug() -> Config:
    """Seconds: for tests."""
    sparsity = SparsityConfig([0.25, 0.5], 2, 2, pattern=PatternConfig(granularity=8))
    return replace(sft.debug(), output="runs/sparse", phases=[Phase("sparse", 6)], sparsity=sparsity)


def laptop() -> Config:
    """140 steps. Tiles of 32 outputs: matrices here have some hundred, the paper's some thousand."""
    schedule = ScheduleConfig("wsd", warmup=5, floor=0.0, decay=0.2)
    sparsity = SparsityConfig(LEVELS, 20, 20, pattern=PatternConfig(granularity=32))
    return replace(
        sft.laptop(), output="runs/sparse", phases=[Phase("sparse", lr=0.25, schedule=schedule)], sparsity=sparsity
    )


def small() -> Config:
    """About 1B parameters on one node, tiles of 128 outputs; the encoder stays as it is."""
    sparsity = SparsityConfig(LEVELS, 500, 1000, roles=["decoder"])
    schedule = ScheduleConfig("wsd", warmup=100, floor=0.0, decay=0.2)
    return replace(
        sft.small(),
        output="runs/sparse",
        phases=[Phase("sparse", freeze=["encoder"], schedule=schedule)],
        sparsity=sparsity,
    )


def main() -> None:
    """Parse, check that there is something to prune and how far, train."""
    config = parse_cli({"laptop": laptop, "debug": debug, "small": small}, __doc__ or "")
    if not config.init:
        raise ConfigError("init: pruning starts from an agent folder, such as runs/sft/agent")
    if not config.sparsity.levels or len(config.phases) != 1:
        raise ConfigError("sparsity.levels: at least one, and one phase to reach them in")
    train(replace(config, phases=[replace(config.phases[0], steps=config.sparsity.total)]), "sparse")


if __name__ == "__main__":
    launch(main)
