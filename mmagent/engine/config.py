"""What is asked of an engine: one config for all of them, of which ``parallel`` chooses one."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mmagent.dist import World

TORCH = ("none", "ddp", "fsdp2", "hsdp")
ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
"""Stages of DeepSpeed's ZeRO (arXiv 1910.02054) by their names here."""
DTYPES = ("float32", "bfloat16")


@dataclass
class EngineConfig:
    """``parallel``: ``none`` (one process), ``ddp``, ``fsdp2``, ``hsdp`` (FSDP2 within groups of ``shard_ranks``
    neighbours, which share one copy of everything; 0 takes the ranks of a host), or ``zero1``, ``zero2``, ``zero3``
    (DeepSpeed: optimizer state, gradients as well, weights as well are spread over ranks).

    ``dtype``: ``float32`` or ``bfloat16`` (autocast; FSDP2 also gathers parameters in it, but those of blocks that say
    ``full_precision``; gradients are reduced in float32 everywhere). ``clip_norm`` 0 leaves gradients as they are. A
    trainable parameter that a step does not use is an error, unless ``allow_unused``. ``context_parallel`` neighbouring
    ranks compute every pack together, each a slice of its tokens; the world must be one ``with_context`` of as many, so
    that the stream gives them the same packs. ``expert_parallel`` neighbouring ranks share each layer's experts; 1
    leaves every rank all of them (or, where weights are sharded, gathers them all)."""

    parallel: str = "ddp"
    dtype: str = "float32"
    clip_norm: float = 1.0
    allow_unused: bool = False
    context_parallel: int = 1
    expert_parallel: int = 1
    shard_ranks: int = 0

    def __post_init__(self) -> None:
        if self.parallel not in (*TORCH, *ZERO):
            raise ValueError(f"engine.parallel {self.parallel!r} is none of {', '.join((*TORCH, *ZERO))}")
        if self.dtype not in DTYPES:
            raise ValueError(f"engine.dtype {self.dtype!r} is neither float32 nor bfloat16")
        if self.clip_norm < 0:
            raise ValueError(f"engine.clip_norm must not be negative, got {self.clip_norm}")
        if self.expert_parallel < 1 or self.context_parallel < 1:
            raise ValueError("engine.expert_parallel and engine.context_parallel must be at least 1 (1: not shared)")
        if self.shard_ranks < 0 or (self.shard_ranks and self.parallel != "hsdp"):
            raise ValueError(
                f"engine.shard_ranks {self.shard_ranks} says how many ranks share one copy under hsdp; "
                f"with {self.parallel!r} leave it at 0"
            )
        if self.parallel in ZERO and self.expert_parallel > 1:
            raise ValueError(
                f"engine.expert_parallel {self.expert_parallel} under {self.parallel}: DeepSpeed would spread the "
                f"shared experts a second time; use fsdp2 or hsdp, or leave every rank all experts"
            )
        if self.parallel in ZERO and self.allow_unused:
            raise ValueError(
                f"engine.allow_unused under {self.parallel}: DeepSpeed adds up gradients in buckets that all ranks "
                f"must fill alike; freeze what is not used, or use ddp or fsdp2"
            )

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds all weights between steps."""
        return self.parallel in ("fsdp2", "hsdp", "zero3")

    @property
    def meets_in_micro_batches(self) -> bool:
        """Whether ranks wait for one another in every micro-batch, to gather weights, to trade tokens or to reduce
        gradients; else they do at the end of a step."""
        return self.shards_weights or self.parallel == "zero2" or self.expert_parallel > 1

    @property
    def holds_whole(self) -> bool:
        """Whether every rank holds all weights, and steps them where the model reads them: ZeRO writes them through
        buffers of its own, which a generator beside the trainer does not see."""
        return self.parallel in ("none", "ddp") and max(self.expert_parallel, self.context_parallel) == 1

    def copy_ranks(self, world: World) -> int:
        """How many neighbouring ranks share one copy of everything under ``hsdp``. ``ValueError`` where so many do not
        divide the world, or share experts between copies."""
        ranks = self.shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        if world.size % ranks:
            raise ValueError(
                f"engine.shard_ranks: {world.size} ranks do not divide into copies of {ranks}; set it to a divisor"
            )
        if ranks % self.expert_parallel:
            raise ValueError(
                f"engine.expert_parallel {self.expert_parallel} does not divide the {ranks} ranks that share a copy "
                f"under hsdp: make it a divisor of engine.shard_ranks"
            )
        return ranks
