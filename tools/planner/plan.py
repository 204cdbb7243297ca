"""One plan: a preset on a cluster, its memory a rank and its step time, what limits it, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mmagent.models import presets
from mmagent.models.agent_model import AgentModelConfig
from mmagent.models.memory import RECOMPUTABLE
from tools.planner.calibration import CALIBRATED
from tools.planner.hardware import Gpu
from tools.planner.inventory import Weight, inventory
from tools.planner.memory import Memory, Settings, plan_memory
from tools.planner.mesh import Mesh, check_runs
from tools.planner.steptime import Efficiency, Run, StepTime, step_time
from tools.planner.work import Load, model_of

EVERY_BLOCK = frozenset(RECOMPUTABLE)
PRESETS: dict[str, Callable[[], AgentModelConfig]] = {
    function.__name__: function
    for function in (
        presets.debug, presets.laptop, presets.small, presets.glm_ocr,
        presets.glm45_air, presets.glm45v, presets.glm45,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is to be planned. ``load`` is one pack; ``tokens_per_step`` of all ranks together (0: one micro-batch each).
    ``imbalance`` and ``hot`` as in :class:`~tools.planner.steptime.Run`."""

    preset: str
    config: AgentModelConfig
    gpu: Gpu
    mesh: Mesh
    load: Load
    tokens_per_step: int = 0
    settings: Settings = field(default_factory=Settings)
    imbalance: float = 1.02
    hot: float = 1.1

    @property
    def micro_batches(self) -> int:
        """A step and group of ranks that share a pack.

        Raises ``ValueError`` where a step is less than one micro-batch of every group."""
        at_once = self.load.tokens * self.mesh.data
        if not self.tokens_per_step:
            return 1
        if self.tokens_per_step < at_once:
            raise ValueError(
                f"{self.tokens_per_step:,} tokens a step are less than one micro-batch of {self.load.tokens:,} tokens "
                f"on each of {self.mesh.data:,} data ranks ({at_once:,})"
            )
        return -(-self.tokens_per_step // at_once)


@dataclass(frozen=True)
class Plan:
    """``parameters`` and ``active`` (met by a text token) of the model; ``job`` as asked."""

    job: Job
    parameters: int
    active: int
    memory: Memory
    step: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.job.gpu.memory

    def days(self, tokens: float) -> float:
        """To train on so many, without interruptions."""
        return tokens / (self.step.tokens_per_gpu * self.job.mesh.gpus) / 86400

    def as_json(self) -> dict[str, Any]:
        """Everything in bytes, seconds and shares."""
        job = self.job
        return {
            "preset": job.preset,
            "gpu": asdict(job.gpu),
            "mesh": asdict(job.mesh),
            "micro_batches": job.micro_batches,
            "tokens_per_microbatch": job.load.tokens,
            "tokens_per_step": int(self.step.tokens),
            "parameters": self.parameters,
            "active_parameters": self.active,
            "fits": self.fits,
            "memory": {"peak": self.memory.peak, "moment": self.memory.fullest, "available": job.gpu.memory,
                       "kinds": self.memory.kinds(), "roles": self.memory.roles},
            "seconds": self.step.seconds,
            "parts": self.step.parts,
            "communication": self.step.whole,
            "mfu": self.step.mfu,
            "tokens_per_second": self.step.tokens_per_gpu * job.mesh.gpus,
            "tokens_per_second_per_gpu": self.step.tokens_per_gpu,
            "limits": self.step.limits,
        }  # fmt: skip


def plan(job: Job, efficiency: Efficiency = CALIBRATED, weights: Sequence[Weight] = ()) -> Plan:
    """``weights``: the inventory of the job's model, where there is one already.

    Raises ``ValueError``, naming both numbers, for what cannot run."""
    decoder = job.config.decoder
    check_runs(job.mesh, decoder.moe.experts if decoder.moe_layers else 0, decoder.heads, decoder.kv_heads)
    model, weights = model_of(job.preset, job.config), weights or inventory(job.config)
    hot = job.hot if job.mesh.expert > 1 else 1.0
    settings = replace(job.settings, accumulation=job.micro_batches, hot=hot)
    memory = plan_memory(job.config, weights, job.mesh, job.load, settings)
    run = Run(
        job.mesh,
        job.gpu,
        job.load,
        job.micro_batches,
        recompute=settings.recompute | settings.chunked(job.load.patches),
        frozen=settings.frozen,
        imbalance=job.imbalance,
        hot=hot,
        low=settings.low,
        muon=settings.muon,
    )
    return Plan(job, model.parameters, model.active, memory, step_time(model, run, efficiency, weights))


def meshes(job: Job) -> Iterator[Mesh]:
    """All that our engines run on as many GPUs, with experts and packs shared by powers of two within reason."""
    gpus, decoder = job.mesh.gpus, job.config.decoder
    experts = decoder.moe.experts if decoder.moe_layers else 0
    for parallel in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"):
        for expert in (2**n for n in range(10) if 2**n <= max(experts, 1)):
            for context in (1, 2, 4, 8):
                shards = [job.gpu.host, 8 * job.gpu.host] if parallel == "hsdp" else [0]
                for shard in shards:
                    try:
                        mesh = Mesh(gpus, parallel, expert, context, shard)
                        check_runs(mesh, experts, decoder.heads, decoder.kv_heads)
                    except ValueError:
                        continue  # refused by the engines, too
                    if not shard or shard < gpus:
                        yield mesh


def search(job: Job, efficiency: Efficiency = CALIBRATED) -> list[Plan]:
    """Every mesh, with recomputation where nothing else makes it fit: the fastest that fit first, then what misses by
    least."""
    found, weights = [], inventory(job.config)
    for mesh in meshes(job):
        for recompute in dict.fromkeys((job.settings.recompute, EVERY_BLOCK)):
            tried = replace(job, mesh=mesh, settings=replace(job.settings, recompute=recompute))
            try:
                one = plan(tried, efficiency, weights)
            except ValueError:
                break  # fewer tokens a step than this mesh computes at one time
            found.append(one)
            if one.fits:
                break
    return sorted(found, key=lambda one: (not one.fits, -one.step.tokens_per_gpu if one.fits else one.memory.peak))


@dataclass(frozen=True)
class Change:
    """A change to a job, in words, and the plan with it."""

    words: str
    plan: Plan


def suggestions(current: Plan, efficiency: Efficiency = CALIBRATED) -> list[Change]:
    """Single changes that make a plan fit that does not, or one that fits at least 3 % faster; best first. Where no
    single change makes it fit, every one on top of recomputing all blocks, and then of one micro-batch a step, too."""
    job, weights = current.job, inventory(current.job.config)
    recomputing = replace(job, settings=replace(job.settings, recompute=EVERY_BLOCK))
    bases = [("", job), ("recompute all; ", recomputing)]
    if job.micro_batches > 1:
        step = job.load.tokens * job.mesh.data
        bases.append((f"{bases[1][0]}{step:,} tokens a step; ", replace(recomputing, tokens_per_step=step)))
    for before, base in bases:
        found = []
        for words, changed in _changes(base):
            try:
                one = plan(changed, efficiency, weights)
            except ValueError:
                continue  # not a mesh that runs
            faster = one.step.tokens_per_gpu > 1.03 * current.step.tokens_per_gpu
            if one.fits and (faster or not current.fits):
                found.append(Change(before + words, one))
        if found or current.fits:
            break
    return sorted(found, key=lambda change: -change.plan.step.tokens_per_gpu)


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    mesh, settings, decoder = job.mesh, job.settings, job.config.decoder
    for roles in (frozenset({"decoder"}), EVERY_BLOCK, frozenset()):
        if roles != settings.recompute:
            words = "recompute all" if roles == EVERY_BLOCK else f"recompute {', '.join(roles) or 'nothing'}"
            yield words, replace(job, settings=replace(settings, recompute=roles))
    ways: list[tuple[str, dict[str, Any]]] = [("fsdp2", {"parallel": "fsdp2", "shards": 0})] if mesh.gpus > 1 else []
    if decoder.moe_layers:
        ways += [(f"expert parallel {n}", {"expert": n}) for n in (2, 4, 8, 16, 32, 64)]
    ways += [(f"context parallel {n}", {"context": n}) for n in (2, 4, 8)]
    for words, way in ways:
        try:
            other = replace(mesh, **way)
        except ValueError:
            continue  # the numbers do not divide
        if other != mesh:
            yield words, replace(job, mesh=other)
    chunk = 4 * max(job.load.frames, default=0)
    if not settings.chunk_patches and 0 < chunk < job.load.patches:
        yield f"images in chunks of {chunk:,} patches", replace(job, settings=replace(settings, chunk_patches=chunk))
    for factor in (0.25, 0.5, 2.0, 4.0):
        load = job.load.resized(factor)
        if load.tokens >= 512:
            yield f"{load.tokens:,} tokens a micro-batch", replace(job, load=load)
    if job.micro_batches > 1:
        at_once = job.load.tokens * mesh.data
        yield f"one micro-batch a step ({at_once:,} tokens)", replace(job, tokens_per_step=at_once)
    parallel = "fsdp2" if mesh.parallel == "none" else mesh.parallel
    for factor in (2, 4):
        more = replace(mesh, gpus=mesh.gpus * factor, parallel=parallel)
        yield f"{more.gpus} GPUs", replace(job, mesh=more, tokens_per_step=job.tokens_per_step * factor)
