"""How ranks share a model and its batch: the meshes that our engines run, and those of published systems."""

from __future__ import annotations

from dataclasses import dataclass

PARALLEL = ("none", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
"""What our engines run. ``hsdp`` shards as ``fsdp2`` does, within groups of ``shards`` ranks, which are replicas."""


@dataclass(frozen=True)
class Mesh:
    """``gpus`` ranks. ``expert`` neighbours share the experts of a layer, ``context`` neighbours every pack; ``shards``
    is for ``hsdp`` alone. ``tensor``, ``pipeline`` and ``interleave`` (virtual stages of a rank) are of published
    systems: our engines have none, and :func:`check_runs` refuses them.

    Raises ``ValueError`` where the numbers do not divide.
    """

    gpus: int
    parallel: str = "fsdp2"
    expert: int = 1
    context: int = 1
    shards: int = 0
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel {self.parallel!r} is none of {', '.join(PARALLEL)}")
        for name in ("gpus", "expert", "context", "tensor", "pipeline", "interleave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.parallel == "none" and self.gpus > 1:
            raise ValueError(f"parallel 'none' with {self.gpus} GPUs: each would train alone")
        if (self.parallel == "hsdp") != bool(self.shards):
            raise ValueError(
                f"shards {self.shards} with parallel {self.parallel!r}: hsdp needs them, no other has them"
            )
        if self.shards and self.gpus % self.shards:
            raise ValueError(f"{self.gpus} GPUs do not divide into replicas of {self.shards} shards")
        if self.shards and self.shards % self.expert:
            raise ValueError(f"{self.shards} shards do not divide into groups of {self.expert} that share experts")
        model = self.tensor * self.pipeline
        if self.gpus % (model * self.context):
            raise ValueError(f"{self.gpus} GPUs do not divide by tensor {self.tensor} x pipeline {self.pipeline} x "
                             f"context {self.context}")  # fmt: skip
        if (self.gpus // model) % self.expert:
            raise ValueError(
                f"{self.gpus // model} ranks do not divide into groups of {self.expert} that share experts"
            )

    @property
    def ranks(self) -> int:
        """Those that hold the same slice of the model's layers: all without tensor and pipeline parallelism."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def data(self) -> int:
        """Packs that are computed at one time."""
        return self.ranks // self.context

    @property
    def sharded(self) -> bool:
        """Whether parameters are gathered for every use."""
        return self.parallel in ("fsdp2", "hsdp", "zero3")

    @property
    def deepspeed(self) -> bool:
        return self.parallel.startswith("zero")

    @property
    def share(self) -> int:
        """Ranks that a parameter outside the experts is cut over, where parameters are."""
        return self.shards or self.ranks

    def name(self) -> str:
        """``fsdp2 x512, ep 8``"""
        parts = [f"{self.parallel} x{self.gpus}" + (f" ({self.shards} shards)" if self.shards else "")]
        words = {"ep": self.expert, "cp": self.context, "tp": self.tensor, "pp": self.pipeline, "vp": self.interleave}
        return ", ".join([*parts, *(f"{word} {n}" for word, n in words.items() if n > 1)])


def check_runs(mesh: Mesh, experts: int, heads: int, kv_heads: int) -> None:
    """Raise ``ValueError``, naming both numbers, for a mesh that our engines refuse with such a model."""
    if mesh.tensor > 1 or mesh.pipeline > 1:
        raise ValueError(f"tensor {mesh.tensor}, pipeline {mesh.pipeline}: our engines have neither; see --published")
    if mesh.expert > 1 and not experts:
        raise ValueError(f"expert parallel {mesh.expert}: the model has no experts")
    if mesh.expert > 1 and experts % mesh.expert:
        raise ValueError(f"{experts} experts cannot be shared evenly by {mesh.expert} ranks")
    if mesh.expert > 1 and mesh.deepspeed:
        raise ValueError(f"expert parallel {mesh.expert} with {mesh.parallel}: only ddp and fsdp2 share experts")
    if heads % mesh.context:
        raise ValueError(f"{heads} heads cannot be shared evenly by {mesh.context} ranks of a context")
    if kv_heads % mesh.context and mesh.context % kv_heads:
        raise ValueError(
            f"{kv_heads} key-value heads and contexts of {mesh.context}: one must be a multiple of the other"
        )
