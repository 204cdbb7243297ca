"""Reinforcement learning with its stages apart against in step: trajectories a second, who waits, what packs save.

Both sides are the loop of ``recipes.rl``: the same tasks, model, collector, learner and engine. Environments of rows of
`latency` answer after as long as a browser may take (lognormal, median 80 ms, a tail up to 2 s), in three turns, with a
picture each; those of `browser` are MiniWoB++ pages in Chromium. Nothing that the policy says is right, so rewards are
drawn by lot, and every group teaches. One step before the clock starts is not counted. `idle` is the share of its time
that the trainer waits for rollouts; stages are shares of a step. What bounds the gain: where training and decoding both
keep all processors busy, only the environments' latency can be hidden.

`packs` are of a collection's trajectories: places that are computed, in packs under two budgets with shared prompts,
against rows padded to the longest of a micro-batch of as many places.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from mmagent import dist
from mmagent.agent.actor import Actor
from mmagent.agent.codec import Codec
from mmagent.agent.collector import CollectorConfig
from mmagent.agent.curriculum import CurriculumConfig
from mmagent.agent.learner import Learner
from mmagent.agent.points import Points, PointsConfig
from mmagent.agent.rollout import RolloutConfig
from mmagent.agent.stream import StreamConfig
from mmagent.dist import stable_seed
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.generation.generator import GeneratorConfig
from mmagent.geometry import GeometryConfig
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.policy_gradient import PolicyGradient, PolicyGradientConfig
from mmagent.packing import Size
from mmagent.protocols import Task
from mmagent.tasks import easy_task_names, open_tasks
from mmagent.train.step import train_step
from mmagent.trajectories import Item, Observation, Score, Trajectory
from mmagent.vocab import Vocab
from tools.benchmarks.row import Row, Settings, smaller_is_better, turns

PARTS = ("latency", "browser", "packs")
BUDGET = Size(8192, 8192)
LATENCY, TAIL, LONGEST = 0.08, 0.8, 2.0
"""Median and deviation (of the logarithm) of an environment's answer, and the most of it, in seconds."""
TURNS = 3


class Waits:
    """A task whose environment answers late, and takes whatever is said."""

    name, category = "waits", "benchmark"

    def items(self, split: str, seed: int) -> Iterator[Item]:
        for n in count():
            yield Item(self.name, f"{split}-{seed}-{n}", n)

    def environment(self, item: Item) -> _Waits:
        return _Waits(item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return await by_lot(self, item, trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        yield "anything"


class _Waits:
    def __init__(self, item: Item):
        self.random = np.random.default_rng(item.seed)

    async def reset(self) -> Observation:
        return await self._answer()

    async def step(self, action: str) -> Observation:
        return await self._answer()

    async def close(self) -> None: ...

    async def _answer(self) -> Observation:
        await asyncio.sleep(min(LATENCY * float(np.exp(TAIL * self.random.standard_normal())), LONGEST))
        picture = self.random.integers(0, 256, (112, 140, 3), dtype=np.uint8)
        return Observation("what now?", (picture,), takes_cut=True)


async def by_lot(task: Task, item: Item, trajectory: Trajectory) -> Score:
    """Right or wrong by the trajectory's key."""
    return Score(float(stable_seed(trajectory.key) % 2))


class Measured(NamedTuple):
    """Of one side's turn: seconds and trajectories of all steps, and seconds by stage."""

    seconds: float
    trajectories: int
    stages: dict[str, float]


@dataclass
class Sizes:
    """Of one comparison."""

    prompts: int = 4
    group: int = 8
    tokens: int = 24
    steps: int = 6
    tasks: Callable[[], AbstractAsyncContextManager[list[Task]]] = field(default=lambda: _waiting())


@asynccontextmanager
async def _waiting():
    yield [Waits()]


@asynccontextmanager
async def _in_chromium():
    async with open_tasks(easy_task_names(), processes=1, pages=16, max_steps=TURNS) as tasks:
        yield tasks


def rows(settings: Settings) -> Iterator[Row]:
    wanted = [part for part in PARTS if settings.part in ("", part)]
    for part in wanted:
        sizes = Sizes(2, 4, 8, 2) if settings.quick else Sizes()
        if part == "packs":
            yield from packs(sizes)
            continue
        if part == "browser":
            sizes.tasks = _in_chromium
        sides = [partial(play, sizes, StreamConfig(on=True)), partial(play, sizes, StreamConfig())]
        ours, peer = turns(sides, settings)
        yield pace(f"asynchronous, {part}", ours, peer)
        yield from shares(part, ours, peer)
        held = turns([partial(play, sizes, StreamConfig(on=True, overlap=False))], settings)[0]
        yield pace(f"held while training, {part}", held, peer)


def pace(name: str, ours: Sequence[Measured], peer: Sequence[Measured]) -> Row:
    """Trajectories trained on a second."""
    mine, theirs = ([one.trajectories / one.seconds for one in side] for side in (ours, peer))
    ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
    ratio, quarter = statistics.median(ratios), len(ratios) // 4
    spread = (ratios[-1 - quarter] - ratios[quarter]) / 2 / ratio
    medians = (statistics.median(mine), statistics.median(theirs))
    return Row(name, *medians, "synchronous", ratio, "trajectories/s", spread)


def shares(part: str, ours: Sequence[Measured], peer: Sequence[Measured]) -> Iterator[Row]:
    """Of a step's wall time."""

    def share(side: Sequence[Measured], stage: str) -> float:
        return 100 * statistics.median(one.stages[stage] / one.seconds for one in side)

    names = {"waiting": "trainer idle", "building": "building batches", "training": "training", "weights": "weights"}
    for stage, told in names.items():
        yield smaller_is_better(f"{told}, {part}", share(ours, stage), share(peer, stage), "synchronous", "% of a step")


def play(sizes: Sizes, stream: StreamConfig) -> Measured:
    """A run of ``sizes.steps`` steps after a first one."""
    return asyncio.run(_play(sizes, stream))


async def _play(sizes: Sizes, stream: StreamConfig) -> Measured:
    world = dist.init()
    dist.seed_everything(1)
    vocab, model = _agent(sizes)
    model = model.to(world.device)
    model.freeze(["encoder", "mtp"])
    points = Points(PointsConfig(reward="tools.benchmarks.rl:by_lot"))
    actor = Actor(model, vocab, GeneratorConfig(), stream, points)
    objective = PolicyGradient(model, PolicyGradientConfig(), vocab.barred(model.config.vocab_size))
    optimizer = build_optimizer(objective, OptimConfig(lr=1e-6, weight_decay=0.0))
    engine = build_engine(objective, optimizer, EngineConfig(parallel="none"), world)
    codec = Codec(vocab, GeometryConfig(min_tokens=4, max_tokens=256))
    learner = Learner(objective, codec, world, BUDGET)
    rollout = RolloutConfig(sizes.group, TURNS, sizes.tokens, lockstep=not stream.on)
    config = CollectorConfig(sizes.prompts, rollout=rollout, curriculum=CurriculumConfig(max_oversampling=1.0))
    stages = dict.fromkeys(("waiting", "building", "training", "weights"), 0.0)
    clock = _Clock(stages)

    def learn(groups) -> None:
        with clock("building"):
            batches = learner.packs(groups)
        with clock("training"):
            for packs in batches:
                train_step(objective, engine, packs, world)

    trajectories, started = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        async with sizes.tasks() as tasks, actor:
            collector = actor.collects(tasks, codec, config, world, 1, folder)
            for step in range(sizes.steps + 1):
                if step == 1:
                    trajectories, started = 0, time.perf_counter()
                    stages.update(dict.fromkeys(stages, 0.0))
                with clock("weights"):
                    await actor.serve(step)
                with clock("waiting"):
                    collected = await collector.collect()
                trajectories += sum(len(group.trajectories) for group in collected.groups)
                if collected.groups:
                    await actor.beside(partial(learn, collected.groups))
            seconds = time.perf_counter() - started
    return Measured(seconds, trajectories, dict(stages))


class _Clock:
    """Adds the seconds of blocks to a table."""

    def __init__(self, table: dict[str, float]):
        self.table, self.name, self.since = table, "", 0.0

    def __call__(self, name: str) -> _Clock:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.table[self.name] += time.perf_counter() - self.since


def _agent(sizes: Sizes) -> tuple[Vocab, AgentModel]:
    vocab = Vocab.train(["what now? click(12,345) type the word into the field"] * 4, 330)
    make = presets.debug if sizes.steps < 3 else presets.laptop
    torch.manual_seed(0)
    return vocab, AgentModel(make(vocab.size + 6, vocab.image_id))


def packs(sizes: Sizes) -> Iterator[Row]:
    """Places of a collection's tokens and patches, packed and padded."""
    collected: list = []

    async def collect() -> None:
        world = dist.init()
        vocab, model = _agent(Sizes(steps=1))
        stream = StreamConfig()
        actor = Actor(
            model, vocab, GeneratorConfig(), stream, Points(PointsConfig(reward="tools.benchmarks.rl:by_lot"))
        )
        codec = Codec(vocab, GeometryConfig(min_tokens=4, max_tokens=256))
        rollout = RolloutConfig(sizes.group, TURNS, sizes.tokens)
        config = CollectorConfig(2 * sizes.prompts, rollout=rollout)
        objective = PolicyGradient(model, PolicyGradientConfig(), vocab.barred(model.config.vocab_size))
        async with _waiting() as tasks, actor:
            with tempfile.TemporaryDirectory() as folder:
                got = await actor.collects(tasks, codec, config, world, 1, folder).collect()
            collected.extend([got.groups, Learner(objective, codec, world, BUDGET).packs(got.groups)[0]])

    asyncio.run(collect())
    groups, batches = collected
    members = [row for group in groups for row in group.trajectories]
    lengths = sorted(len(row) for row in members)
    padded, at = 0, len(lengths)
    while at > 0:  # the longest first, as many rows as fit
        fits = max(BUDGET.tokens // lengths[at - 1], 1)
        padded += lengths[at - 1] * min(fits, at)
        at -= min(fits, at)
    seen = [sum(image.patches.shape[0] for image in row.images) for row in members]
    own = sum(batch.num_tokens for batch in batches)
    yield smaller_is_better("packs, places of tokens", own, padded, "padded", "places")
    patches = sum(batch.num_patches for batch in batches)
    yield smaller_is_better("packs, patches encoded", patches, max(seen) * len(seen), "padded", "patches")
