"""How long a step takes: a roofline of every component, and what of the communication computation cannot hide.

Operations come from :mod:`tools.planner.work`, bytes from shapes, rates from the hardware table times the few shares of
:class:`Efficiency`, which :mod:`tools.planner.calibration` fits to published rows. Everything else is stated here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.planner.hardware import Gpu
from tools.planner.inventory import Weight
from tools.planner.mesh import Mesh
from tools.planner.work import Load, Model, Passes, head_passes, operations, passes


@dataclass(frozen=True)
class Efficiency:
    """What is calibrated, and nothing else is.

    ``ampere``, ``hopper``: share of the peak in large matrix products (newer families take Hopper's). ``attention``,
    ``grouped``: rate of attention and of grouped products, relative to those. ``traffic``: bytes moved over those that
    fused kernels must move; ``eager``: the same again where kernels are not fused. ``network``: share of the nominal
    bandwidth that collectives reach. ``overlap``: share of hideable communication that is hidden. ``waiting``: what a
    doubling of the ranks adds to a step, for the slowest of them.
    """

    ampere: float = 0.75
    hopper: float = 0.62
    attention: float = 0.6
    grouped: float = 0.7
    traffic: float = 1.5
    eager: float = 1.6
    network: float = 0.7
    overlap: float = 0.9
    waiting: float = 0.005

    def products(self, gpu: Gpu) -> float:
        """Operations a second in large matrix products."""
        return gpu.peak * (self.ampere if gpu.family == "ampere" else self.hopper)


TILE_ROWS = 256
"""Rows at which a product reaches half of the rate that it has with many: below, tiles are not full."""

HOP = 2e-6
"""Seconds that each rank of a ring adds to a collective."""

LAUNCH = {"eager": 6e-6 * 45, "fused": 6e-6 * 15}
"""Seconds of the host for one layer's forward: kernels times microseconds; a backward costs twice as much."""


@dataclass(frozen=True)
class Run:
    """One training set-up. ``micro_batches`` a step and group of ranks that share a pack; ``recompute`` and ``frozen``
    are roles. ``fused``: kernels are fused or compiled. ``attention_again``: whether recomputation repeats attention,
    too (not where its result is kept), ``part_again`` how much of the products. ``hidden``: tensor and pipeline
    communication overlaps. ``parallel_block``: attention and feed-forward share one exchange. ``copies``: of a token in
    an expert exchange, 0 for one an expert. ``gathers_keys``: a context gathers keys and values, where ours trades
    heads. ``stays``: parameters are gathered once a step. ``once``: gradients are reduced after the last micro-batch
    alone; else that is so only where ranks keep whole gradients, and others reduce theirs after each. ``flushes``:
    times a step the pipeline runs empty. ``imbalance``: work of the heaviest rank over the mean; ``hot``: rows of the
    busiest rank's experts over the mean. ``low``, ``reduce``: bytes of a value in matrix products, of a gradient on its
    way. ``muon``: the optimizer."""

    mesh: Mesh
    gpu: Gpu
    load: Load
    micro_batches: int = 1
    recompute: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    fused: bool = False
    attention_again: bool = True
    part_again: float = 1.0
    hidden: bool = False
    parallel_block: bool = False
    copies: float = 0.0
    gathers_keys: bool = False
    stays: bool = False
    once: bool = False
    flushes: int = 1
    imbalance: float = 1.0
    hot: float = 1.0
    low: int = 2
    reduce: int = 4
    muon: bool = False

    @property
    def reductions(self) -> int:
        """Times a step that gradients are reduced over the ranks that share a copy."""
        shared = self.mesh.sharded or self.mesh.parallel == "zero2"
        return self.micro_batches if shared and not self.once else 1


@dataclass
class StepTime:
    """Seconds of one step by component; ``whole`` of communication before hiding. ``useful``: operations."""

    parts: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    useful: float = 0.0
    tokens: float = 0.0
    gpus: int = 1
    peak: float = 1.0

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def mfu(self) -> float:
        """Useful operations over what all accelerators could do in the time."""
        return self.useful / (self.seconds * self.gpus * self.peak)

    @property
    def tokens_per_gpu(self) -> float:
        """A second."""
        return self.tokens / (self.seconds * self.gpus)

    @property
    def limits(self) -> dict[str, float]:
        """Shares of the step by what is to blame, the largest first."""
        groups: dict[str, float] = {}
        for part, seconds in self.parts.items():
            groups[LIMITS[part]] = groups.get(LIMITS[part], 0.0) + seconds / self.seconds
        return dict(sorted(groups.items(), key=lambda item: -item[1]))

    @property
    def limit(self) -> str:
        """The largest of :attr:`limits`, and what else takes most."""
        first, *others = self.limits.items()
        beside = f", then {others[0][0]} {others[0][1]:.0%}" if others else ""
        return f"{first[0]} {first[1]:.0%}{beside}"


LIMITS = {
    "matrix products": "compute",
    "experts": "compute",
    "attention": "compute",
    "vision encoder": "compute",
    "output head": "compute",
    "norms, rotary, activations": "memory bandwidth",
    "host, launching kernels": "the host (too little work a layer)",
    "gathering parameters": "gathering parameters",
    "reducing gradients": "reducing gradients",
    "expert exchange": "the expert exchange",
    "context exchange": "the context exchange",
    "tensor parallel": "tensor-parallel communication",
    "pipeline transfers": "pipeline communication",
    "pipeline bubble": "the pipeline's bubble",
    "optimizer": "the optimizer's step",
    "imbalance": "imbalance between ranks",
    "waiting for the slowest": "waiting for the slowest rank",
}
"""What a component's time is blamed on."""


def step_time(model: Model, run: Run, efficiency: Efficiency, weights: Sequence[Weight] = ()) -> StepTime:
    """``weights``: of our models, whose optimizer's matrix products are then counted one by one."""
    mesh, gpu = run.mesh, run.gpu
    times = passes(run.frozen, run.recompute)
    compute, backward = _compute(model, run, efficiency, times)
    slices = mesh.tensor * mesh.pipeline * mesh.context
    step = StepTime(gpus=mesh.gpus, peak=gpu.peak, tokens=run.load.tokens * run.micro_batches * mesh.data)
    pixels = 2.0 * run.load.patches * model.patch if times["encoder"].useful == 3 else 0.0
    useful = operations(model, run.load).training(times, pixels)
    step.useful = useful * run.micro_batches * mesh.data
    for part, seconds in compute.items():
        step.parts[part] = seconds / slices * run.micro_batches
    busy = sum(step.parts.values())
    kind = "fused" if run.fused else "eager"
    layers = sum(layer.times for layer in model.layers if layer.role != "encoder" or run.load.patches) / mesh.pipeline
    host = LAUNCH[kind] * layers * 3 * run.micro_batches
    if host > busy:
        step.parts["host, launching kernels"] = host - busy
    _exchange(step, model, run, efficiency, times)
    if mesh.pipeline > 1:
        bubble = (mesh.pipeline - 1) * run.flushes / (mesh.interleave * run.micro_batches)
        step.parts["pipeline bubble"] = sum(step.parts.values()) * bubble
    _share(step, model, run, efficiency, times, busy, busy * backward * run.reductions / run.micro_batches)
    step.parts["imbalance"] = sum(step.parts.values()) * (run.imbalance - 1)
    step.parts["optimizer"] = _optimizer(model, run, efficiency, weights)
    step.parts["waiting for the slowest"] = step.seconds * efficiency.waiting * math.log2(mesh.gpus)
    step.parts = {part: seconds for part, seconds in step.parts.items() if seconds > 0}
    return step


def _compute(
    model: Model, run: Run, efficiency: Efficiency, times: dict[str, Passes]
) -> tuple[dict[str, float], float]:
    """Seconds of a micro-batch's computation were one rank to do it all, and the backward's share of them."""
    rate, load, mesh = efficiency.products(run.gpu), run.load, run.mesh
    done = operations(model, load)
    full = filled(load.tokens / mesh.context, TILE_ROWS)
    parts: dict[str, float] = {"matrix products": 0.0, "vision encoder": 0.0, "experts": 0.0, "attention": 0.0}
    first = 0.0
    for role, ops in done.dense.items():
        useful = float(times[role].useful)
        if role == "head":
            useful = head_passes(model, times[role].useful, run.low) if not run.fused else useful
        seconds = ops * (useful + times[role].again * run.part_again) / (rate * full)
        part = {"head": "output head", "encoder": "vision encoder", "projector": "vision encoder"}.get(
            role, "matrix products"
        )
        parts[part] = parts.get(part, 0.0) + seconds
        first += ops / (rate * full)
    for role, ops in done.attention.items():
        useful = 3.5 if times[role].attention == 3 else 1.0  # a flash backward forms the scores again
        useful += times[role].again * run.attention_again
        seconds = ops * useful / (rate * efficiency.attention)
        parts["vision encoder" if role == "encoder" else "attention"] += seconds
        first += ops / (rate * efficiency.attention)
    for role, ops in done.experts.items():
        layer = next(layer for layer in model.layers if layer.role == role and layer.top_k) if ops else None
        if layer is not None:
            rows = load.tokens * layer.top_k * mesh.expert / layer.routes / mesh.context
            speed = rate * efficiency.grouped * filled(rows, TILE_ROWS)
            parts["experts"] += ops * (times[role].useful + times[role].again * run.part_again) * run.hot / speed
            first += ops / speed
    moved = _traffic(model, run, times) * efficiency.traffic * (1.0 if run.fused else efficiency.eager)
    parts["norms, rotary, activations"] = moved / run.gpu.bandwidth
    whole = sum(parts.values())
    return parts, max(1 - (first + parts["norms, rotary, activations"] / 3) / whole, 0.0) if whole else 0.0


def filled(rows: float, half: float) -> float:
    """Share of the rate that a product with so many rows reaches."""
    return rows / (rows + half)


def _traffic(model: Model, run: Run, times: dict[str, Passes]) -> float:
    """Bytes a micro-batch's elementwise operations move at the least: each value in and out once."""
    total = 0.0
    for layer in model.layers:
        rows = run.load.patches if layer.role == "encoder" else run.load.tokens
        values = 10 * layer.width + 2 * (layer.queries + 2 * layer.keys) + 3 * layer.inner
        values += layer.top_k * (3 * layer.width + 3 * layer.expert_inner) + 4 * layer.routes
        own = times[layer.role]
        total += 2.0 * rows * layer.times * values * (own.useful + own.again * run.part_again)
    targets = run.load.tokens * run.load.supervised * model.terms
    return total + targets * model.vocabulary * 16.0 * (times["head"].useful > 1)


def ring_rate(ranks: int, stride: int, gpu: Gpu, efficiency: Efficiency) -> float:
    """Bytes a second of a ring over ``ranks`` that stand ``stride`` apart: what enters a host comes through the cards
    of those of its ranks that take part."""
    if (ranks - 1) * stride < gpu.host:
        return gpu.link * efficiency.network
    return min(gpu.link, gpu.network * max(gpu.host // stride, 1)) * efficiency.network


def _ring(size: float, ranks: int, gpu: Gpu, efficiency: Efficiency, stride: int = 1, calls: float = 1) -> float:
    """Seconds to gather, or to reduce and scatter, ``size`` bytes in all over ``ranks``, in so many ``calls``."""
    if ranks <= 1 or not size:
        return 0.0
    return size * (ranks - 1) / ranks / ring_rate(ranks, stride, gpu, efficiency) + calls * HOP * ranks


def _all_to_all(size: float, ranks: int, gpu: Gpu, efficiency: Efficiency) -> float:
    """Seconds in which each of ``ranks`` neighbours sends ``size`` bytes, evenly to all."""
    if ranks <= 1:
        return 0.0
    near = min(ranks, gpu.host)
    inside, outside = (near - 1) / ranks * size / gpu.link, (ranks - near) / ranks * size / gpu.network
    return max(inside, outside) / efficiency.network + HOP * ranks


def _exchange(step: StepTime, model: Model, run: Run, efficiency: Efficiency, times: dict[str, Passes]) -> None:
    """Communication that layers wait for, of all micro-batches."""
    mesh, gpu, load = run.mesh, run.gpu, run.load
    tokens = load.tokens / mesh.context
    for layer in model.layers:
        if layer.role == "encoder":
            continue
        rounds = layer.times / mesh.pipeline * run.micro_batches * (2 + times[layer.role].again)
        if mesh.expert > 1 and layer.top_k:
            copies = run.copies or layer.top_k
            size = tokens * copies * layer.width * run.low * run.hot
            seconds = 2 * rounds * _all_to_all(size, mesh.expert, gpu, efficiency)
            _add(step, "expert exchange", seconds, seconds)
        if mesh.context > 1:
            if run.gathers_keys:
                size = tokens * mesh.context * 2 * layer.keys * run.low
                seconds = rounds * _ring(size, mesh.context, gpu, efficiency, mesh.tensor)
            else:  # there and back: queries, keys and values, and the result
                size = tokens * (layer.queries + layer.keys) * run.low
                seconds = 2 * rounds * _all_to_all(size, mesh.context, gpu, efficiency)
            _add(step, "context exchange", seconds, seconds)
        if mesh.tensor > 1:
            size = tokens * layer.width * run.low
            times_a_pass = 2 if run.parallel_block else 4  # gathers and scatters of a sequence-parallel layer
            seconds = times_a_pass * rounds * _ring(size, mesh.tensor, gpu, efficiency)
            _add(step, "tensor parallel", seconds * (1 - efficiency.overlap * run.hidden), seconds)
    if mesh.pipeline > 1:
        size = tokens * model.width * run.low / mesh.tensor
        seconds = 2 * 2 * mesh.interleave * run.micro_batches * size / (gpu.network * efficiency.network)
        _add(step, "pipeline transfers", seconds * (1 - efficiency.overlap * run.hidden), seconds)


def _add(step: StepTime, part: str, seconds: float, whole: float) -> None:
    step.parts[part] = step.parts.get(part, 0.0) + seconds
    step.whole[part] = step.whole.get(part, 0.0) + whole


def _share(
    step: StepTime, model: Model, run: Run, efficiency: Efficiency, times: dict[str, Passes], busy: float, back: float
) -> None:
    """Parameters gathered and gradients reduced: ``busy`` seconds of computation hide the former, the ``back`` ones of
    backwards in which gradients are reduced the latter."""
    mesh, gpu, low = run.mesh, run.gpu, run.reduce if run.mesh.deepspeed else run.low  # ZeRO gathers float32
    cut = mesh.tensor * mesh.pipeline
    gather = reduce = 0.0
    stride = mesh.tensor
    for layer in model.layers:
        learns = times[layer.role].useful > 1
        dense, experts = (layer.parameters - layer.experts) / cut, layer.experts / cut
        each = ((dense, mesh.share, stride), (experts / mesh.expert, mesh.share // mesh.expert, stride * mesh.expert))
        if mesh.expert == 1:
            each = ((dense + experts, mesh.share, stride),)
        visits = 2 if learns else 1
        for size, ranks, apart in each:
            if not size:
                continue
            whole, alone = size * layer.times, size * layer.stored
            if mesh.sharded:
                gather += visits * _ring(low * whole, ranks, gpu, efficiency, apart, layer.times / mesh.pipeline)
            if learns:
                reduce += _reduce(run, efficiency, alone, ranks, apart, layer.stored / mesh.pipeline)
    root = (model.embedding + model.head + model.root) / cut
    if mesh.sharded:
        gather += _ring(low * root, mesh.share, gpu, efficiency, stride)
    reduce += _reduce(run, efficiency, root, mesh.share, stride, 1)
    gather *= 1 if run.stays else run.micro_batches
    for part, seconds, hides in (("gathering parameters", gather, busy), ("reducing gradients", reduce, back)):
        exposed = max(seconds - hides, 0.0) + (1 - efficiency.overlap) * min(seconds, hides)
        _add(step, part, exposed, seconds)


def _reduce(run: Run, efficiency: Efficiency, size: float, ranks: int, apart: int, calls: float) -> float:
    """Seconds a step to sum the gradients of ``size`` parameters of a rank over ``ranks``, and, once, over replicas of
    these."""
    mesh, gpu = run.mesh, run.gpu
    if mesh.sharded:
        seconds = run.reductions * _ring(run.reduce * size, ranks, gpu, efficiency, apart, calls)
        replicas = mesh.ranks // mesh.share
        return seconds + 2 * _ring(run.reduce * size / ranks, replicas, gpu, efficiency, mesh.share, calls)
    rounds = run.reductions + 1  # ZeRO-1 and 2 gather what was stepped once, and others what was summed
    return rounds * _ring(run.reduce * size, ranks, gpu, efficiency, apart, calls)


def _optimizer(model: Model, run: Run, efficiency: Efficiency, weights: Sequence[Weight]) -> float:
    """Seconds of the optimizer's memory traffic and, for Muon, of its matrix products and what it gathers for them."""
    mesh, gpu = run.mesh, run.gpu
    cut = mesh.tensor * mesh.pipeline
    experts = sum(layer.stored * layer.experts for layer in model.layers) / cut
    dense = model.parameters / cut - experts
    spread = mesh.share if mesh.sharded or mesh.deepspeed else 1
    own = dense / spread + experts / (max(spread, mesh.expert))
    seconds = 28.0 * own / (0.8 * gpu.bandwidth)
    if run.muon and weights:
        for weight in weights:
            if weight.muon and weight.role not in run.frozen:
                seconds += _muon(weight, run, efficiency)
    return seconds


NEWTON_SCHULZ_STEPS = 5


def _muon(weight: Weight, run: Run, efficiency: Efficiency) -> float:
    """Ranks share matrices out: parts travel to the one that works on them and back, or, from copy to copy, what it
    made. Experts are where they are: a rank works on its own."""
    mesh, gpu = run.mesh, run.gpu
    *batch, rows, columns = weight.shape
    products = 0.0
    for piece in weight.splits or (rows,):
        short, long = sorted((piece, columns))
        products += NEWTON_SCHULZ_STEPS * (4.0 * short * short * long + 2.0 * short**3)
    products *= math.prod(batch) * weight.count
    seconds = products / (efficiency.products(gpu) * filled(min(rows, columns), TILE_ROWS))
    if mesh.gpus == 1:
        return seconds
    apart = weight.expert and mesh.expert > 1
    if apart or (batch and mesh.sharded and not mesh.deepspeed):
        ranks = mesh.share if mesh.sharded else mesh.expert
        return seconds / (ranks if apart else min(ranks, math.prod(batch)))
    shards = mesh.share if mesh.sharded or mesh.deepspeed else 1
    copies, part = mesh.gpus // shards, 2.0 * weight.total / shards
    travel = 2 * _all_to_all(part / copies, shards, gpu, efficiency)
    if copies > 1:
        travel += part / (ring_rate(copies, shards, gpu, efficiency) * (gpu.host if shards == 1 else 1))
    return seconds / mesh.gpus + travel
