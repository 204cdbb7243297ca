"""Shards to training steps: packs that can be stopped anywhere and continued exactly, on more or fewer ranks.

The packs of a step are a function of the data and the config alone. They come from a fixed number of logical
streams, each with its own mixture and packer; ranks take logical streams in turn, so the world may change to any
size that divides their number. Ranks work in small groups that plan the same packs (planning decodes nothing) and
deal them among themselves by cost; every rank decodes only what it was dealt.

The state is that of the last step *delivered*, whatever has been prepared ahead.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data_pipelines.documents import DocumentBuilder, Quarantine, QuarantineConfig
from data_pipelines.mixture import SourceConfig, open_sources
from data_pipelines.packing import PackPlan, StreamPacker, Waiting
from mmagent import retries
from mmagent.balance import CostWeights, deal, max_over_mean
from mmagent.chat import ChatConfig
from mmagent.dist import World
from mmagent.geometry import GeometryConfig
from mmagent.packing import Size, empty_pack, pack
from mmagent.records import RecordError
from mmagent.types import Document, PackedBatch
from mmagent.vocab import Vocab

logger = logging.getLogger(__name__)
_JUDGED = 20  # steps after which a stream whose packs are not full says why
_ROOM = 1.1  # patches of packs differ: so many times their mean leaves hardly one short


@dataclass
class StreamConfig:
    """What is mixed, how much makes a step, and how it is prepared.

    Every sub-folder of ``folder`` that holds shards is a source; ``sources`` gives weights and paths by name.
    ``tokens_per_step`` is global and a multiple of ``tokens_per_microbatch``, which is local; accumulation follows
    from both and the world size. ``logical_streams`` 0 means one per micro-batch of a step; a run that may change
    ``tokens_per_step`` later fixes it. ``by_tokens``: weights are shares of tokens, else of documents.
    ``split_long``: a record that no pack could hold becomes several documents (:mod:`data_pipelines.splitting`), else
    it is refused. ``prefetch`` steps are prepared ahead by a thread, images decoded by ``threads`` more; the packs are
    the same for any number of them. Groups of at most ``balance_ranks`` ranks deal packs by cost: each plans the packs
    of all of them, which reads and tokenises that many times what it trains on. ``cost`` weighs what makes a pack slow;
    None takes what the stream is given, which recipes derive from their model.
    """

    folder: str = ""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokens_per_step: int = 16384
    tokens_per_microbatch: int = 4096
    patches_per_microbatch: int = 16384
    logical_streams: int = 0
    by_tokens: bool = True
    split_long: bool = False
    buffer: int = 64
    seed: int = 0
    prefetch: int = 1
    threads: int = 2
    balance_ranks: int = 8
    tail_multiple: int = 1
    cost: CostWeights | None = None
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "tokens_per_microbatch", "patches_per_microbatch", "buffer", "tail_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("logical_streams", "prefetch", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.tokens_per_step % self.tokens_per_microbatch:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} is no multiple of "
                f"tokens_per_microbatch {self.tokens_per_microbatch}"
            )

    @property
    def budget(self) -> Size:
        """What a pack may hold."""
        return Size(self.tokens_per_microbatch, self.patches_per_microbatch)

    @property
    def packs_per_step(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.tokens_per_step // self.tokens_per_microbatch

    @property
    def streams(self) -> int:
        """Logical streams."""
        return self.logical_streams or self.packs_per_step


@dataclass(frozen=True)
class _Step:
    """A prepared step and the state of the packers after it. ``short``: the share of its packs that patches kept from
    being full; ``density``: patches a token, of what was packed and what waits."""

    batches: list[PackedBatch]
    packers: dict[str, Any]
    metrics: dict[str, float]
    short: float
    density: float


class PackStream(Iterator[list[PackedBatch]]):
    """This rank's micro-batches, step after step, without end.

    ``next(stream)`` gives ``accumulation`` validated packs. ``state_dict()`` is plain numbers and text; load it
    into a stream of the same config on any world size that divides the logical streams. List the stream among
    the parts of a run, and :meth:`log` among its hooks.
    """

    shared_state = True  # one state says where all ranks stand, so a run stores it once and may change their number

    def __init__(
        self,
        config: StreamConfig,
        vocab: Vocab,
        geometry: GeometryConfig,
        chat: ChatConfig | None = None,
        world: World | None = None,
        weights: CostWeights | None = None,
    ):
        """``weights``: of the model that trains on the packs, where the config names none. Ranks of one context read
        the same packs: what must divide are micro-batches, logical streams and contexts. Raises ``ValueError`` naming
        both numbers where they do not."""
        self.config = config
        self.world = world
        rank, ranks = (world.data_rank, world.data_size) if world else (0, 1)
        streams, packs = config.streams, config.packs_per_step
        if packs % streams:
            raise ValueError(f"{packs} micro-batches a step cannot come evenly from {streams} logical streams")
        if streams % ranks:
            raise ValueError(f"{streams} logical streams cannot be shared evenly by {ranks} ranks")
        self.accumulation = packs // ranks
        self.weights = config.cost or weights or CostWeights()
        group = max(n for n in range(1, max(config.balance_ranks, 1) + 1) if ranks % n == 0)
        self._ranks, self._group, self._place = ranks, group, rank % group
        first = rank - self._place
        self._own = [n for n in range(streams) if n % ranks == rank]
        members = [n for n in range(streams) if first <= n % ranks < first + group]
        self.builder = DocumentBuilder(vocab, geometry, chat, config.budget, split_long=config.split_long)
        unlogged = Quarantine(replace(config.quarantine, folder=""), tell=False)  # for streams whose owner logs them
        logs = world is None or world.rank % world.context == 0  # the first of the ranks that read the same packs
        self.quarantine = Quarantine(config.quarantine, rank) if logs else copy.deepcopy(unlogged)
        self.sources = open_sources(config.sources, config.seed, config.folder)
        self._shards = {source.name: source.shards for source in self.sources}
        for source in self.sources:
            for torn in source.shards.torn:
                self.quarantine.torn(source.name, torn.shard, torn.offset, torn.problem)
        self._packers = {
            n: StreamPacker(
                self.sources,
                self.builder,
                self.quarantine if n in self._own else unlogged,
                number=n,
                streams=streams,
                budget=config.budget,
                buffer=config.buffer,
                seed=config.seed,
                by_tokens=config.by_tokens,
            )
            for n in members
        }
        self.steps = self._planned = 0
        self._delivered = self._packer_states()
        self.metrics: dict[str, float] = {}
        self._retries = retries.total()
        self._worker = ThreadPoolExecutor(1, "mmagent-stream") if config.prefetch else None
        self._decoders = ThreadPoolExecutor(config.threads, "mmagent-decode") if config.threads else None
        self._ahead: deque[Future[_Step]] = deque()
        self._error: BaseException | None = None
        self._pin = world is not None and world.device.type == "cuda"
        self._judged: list[tuple[float, float, float, float]] = []

    def describe(self) -> str:
        """One line for people: how a step is made up."""
        config, weights = self.config, {source: source.config.at(self.steps) for source in self.sources}
        total = sum(weights.values())
        mix = ", ".join(f"{s.name} {weight / total:.0%} of {len(s.shards)} samples" for s, weight in weights.items())
        context = self.world.context if self.world else 1
        who = f"{self._ranks} ranks" if context == 1 else f"{self._ranks} contexts of {context} ranks"
        return (
            f"step of {config.tokens_per_step} tokens = {who} x {self.accumulation} micro-batches of "
            f"{config.tokens_per_microbatch} tokens and {config.patches_per_microbatch} patches at most; "
            f"{config.streams} logical streams; {mix}"
        )

    def __next__(self) -> list[PackedBatch]:
        """The packs of the next step; ``metrics`` then tell how full they are and how long the caller waited."""
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        try:
            step = self._prepare() if self._worker is None else self._from_worker()
        except Exception as error:
            self._error = error  # what was prepared behind a failed step must not be delivered in its place
            raise
        self.steps += 1
        self._delivered = step.packers
        before, self._retries = self._retries, retries.total()
        failed = {"data/retries": float(self._retries - before)}
        self.metrics = {"time/data": time.perf_counter() - started, **failed, **step.metrics}
        self._judge_budgets(step)
        return step.batches

    def _judge_budgets(self, step: _Step) -> None:
        """Say once, early, when packs are far from full, as steps are then smaller than they are called, and why."""
        if len(self._judged) == _JUDGED:
            return
        self._judged.append((self.metrics["data/fill"], self.metrics["data/documents"], step.short, step.density))
        if len(self._judged) < _JUDGED:
            return
        fill, documents, short, density = (sum(column) / _JUDGED for column in zip(*self._judged, strict=True))
        if fill >= 0.9:
            return
        tokens, patches = self.config.tokens_per_microbatch, self.config.patches_per_microbatch
        if short >= 0.5:
            logger.warning(
                "packs hold %.0f%% of tokens_per_microbatch, as patches_per_microbatch %d is full in %.0f%% of them; "
                "about %d would do", 100 * fill, patches, 100 * short, math.ceil(_ROOM * density * tokens),
            )  # fmt: skip
        else:
            logger.warning(
                "packs hold %.0f%% of tokens_per_microbatch %d, as documents are large for it, %.0f tokens on average, "
                "and none that waits fits beside them; a larger one, or a larger buffer, gives fuller packs",
                100 * fill, tokens, fill * tokens * self.accumulation / max(documents, 1),
            )  # fmt: skip

    def _from_worker(self) -> _Step:
        assert self._worker is not None
        while len(self._ahead) <= self.config.prefetch:
            self._ahead.append(self._worker.submit(self._prepare))
        step = self._ahead[0].result()  # still in the queue should the wait be interrupted
        self._ahead.popleft()
        return step

    def _prepare(self) -> _Step:
        """Plan the group's packs of one step, and decode those dealt to this rank."""
        before = self.quarantine.total
        each = self.config.packs_per_step // self.config.streams
        plans = [self._packers[n].next(self._planned) for _ in range(each) for n in self._packers]
        self._planned += 1
        costs = [self.weights(plan.cost()) for plan in plans]
        dealt = deal(costs, self._group)
        batches = [self._decode(plans[n]) for n in dealt[self._place]]
        balance = {
            "balance/max_over_mean": max_over_mean([sum(costs[n] for n in packs) for packs in dealt]),
            "balance/in_turn": max_over_mean([sum(costs[rank :: self._group]) for rank in range(self._group)]),
        }
        quarantined = float(self.quarantine.total - before)  # of this step: a running sum would not survive a kill
        bad = {"data/quarantined": quarantined, "data/torn_shards": float(self.quarantine.tails)}
        short = sum(plan.short_of_patches for plan in plans) / len(plans)
        metrics = {**self._measure(batches), **balance, **bad}
        return _Step(batches, self._packer_states(), metrics, short, self._density(plans))

    def _density(self, plans: Sequence[PackPlan]) -> float:
        """Patches a token. Documents of many patches wait where these are short, so that what waits counts, too."""
        drawn = [w.draft.size for plan in plans for w in plan.documents]
        drawn += [w.draft.size for packer in self._packers.values() for w in packer.waiting]
        return sum(size.patches for size in drawn) / max(sum(size.tokens for size in drawn), 1)

    def _decode(self, plan: PackPlan) -> PackedBatch:
        run = map if self._decoders is None else self._decoders.map
        counts = [waiting.draft.size.patches for waiting in plan.documents]
        memory = torch.empty(sum(counts), self.builder.geometry.patch_values, pin_memory=self._pin)
        documents = []
        for waiting, result in zip(
            plan.documents, run(self._finish, plan.documents, memory.split(counts)), strict=True
        ):
            if isinstance(result, Document):
                documents.append(result)
            else:  # the pack stays shorter: what fills it was planned by several ranks
                where = self._shards[waiting.source].where(waiting.sample)
                self.quarantine.add(waiting.source, where, result, counted=True)
        vocab, merge = self.builder.vocab, self.builder.geometry.merge_size
        if not documents:
            return empty_pack(vocab.pad_id)
        multiple = self.config.tail_multiple
        batch = pack(documents, image_id=vocab.image_id, merge_size=merge, multiple=multiple, pad_id=vocab.pad_id)
        return batch.pin() if self._pin else batch

    def _finish(self, waiting: Waiting, into: Tensor) -> Document | RecordError:
        try:
            return self.builder.finish(waiting.draft, into)
        except RecordError as error:
            return error

    def _measure(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        tokens = sum(batch.num_tokens for batch in batches)
        first = next(iter(self._packers.values())).mixture
        return {
            "data/fill": tokens / (len(batches) * self.config.tokens_per_microbatch),
            "data/fill_patches": sum(b.num_patches for b in batches)
            / (len(batches) * self.config.patches_per_microbatch),
            "data/documents": float(sum(len(batch.keys) for batch in batches)),
            **{f"data/epoch/{name}": first.epoch(name) for name in first.sources},
        }

    def log(self, step: int, record: dict[str, float]) -> None:
        """A hook of the training loop: adds this rank's ``metrics`` to the step's record."""
        record.update(self.metrics)

    def _packer_states(self) -> dict[str, Any]:
        return {str(n): packer.state_dict() for n, packer in self._packers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last delivered step, for all ranks: plain numbers and text.

        When ranks work in more than one group this is a collective: call it on every rank.
        """
        if self._group == self._ranks:
            logical = copy.deepcopy(self._delivered)
        else:
            assert self.world is not None
            mine = {str(n): self._delivered[str(n)] for n in self._own}
            logical = {n: state for states in self.world.gather_objects(mine) for n, state in states.items()}
        return {
            "streams": self.config.streams,
            "seed": self.config.seed,
            "sources": {s.name: [len(s), s.fingerprint()] for s in self.sources},
            "contents": {s.name: s.shards.contents() for s in self.sources},
            "steps": self.steps,
            "logical": logical,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``. Raises ``ValueError`` naming both values of what must not have changed."""
        self._drain()
        for name, mine in (("logical_streams", self.config.streams), ("seed", self.config.seed)):
            theirs = state[name.removeprefix("logical_")]
            if theirs != mine:
                raise ValueError(f"{name}: the checkpoint has {theirs}, this run {mine}; data would repeat or be lost")
        have = {s.name: [len(s), s.fingerprint()] for s in self.sources}
        saved = {name: list(value) for name, value in state["sources"].items()}
        for name in sorted({*have, *saved}):
            if have.get(name) != saved.get(name):
                raise ValueError(
                    f"sources.{name}: the checkpoint has {_samples(saved.get(name))}, "
                    f"this run {_samples(have.get(name))}; data would repeat or be lost"
                )
        self._compare_contents(state.get("contents"))
        for n, packer in self._packers.items():
            packer.load_state_dict(state["logical"][str(n)])
        self.steps = self._planned = int(state["steps"])
        self._delivered = self._packer_states()
        self._error = None

    def _compare_contents(self, then: Mapping[str, Mapping[str, str]] | None) -> None:
        if then is None:
            logger.warning(
                "the checkpoint is older than the note of what is in its shards: their names, sizes and numbers of "
                "samples are as they were, and whether they were written anew since is not known"
            )
            return
        for source in self.sources:
            if changed := source.shards.changed(then[source.name]):
                raise ValueError(
                    f"sources.{source.name}: {changed[0]} holds other samples than the checkpoint was made with, in as "
                    f"many bytes ({len(changed)} of {len(source.shards.paths)} shards do); data would repeat or be lost"
                )

    def _drain(self) -> None:
        for ahead in self._ahead:
            ahead.cancel()
        for ahead in self._ahead:
            if not ahead.cancelled():
                ahead.exception()  # waits; an error of a step nobody asked for concerns nobody
        self._ahead.clear()

    def close(self) -> None:
        """Stop the threads. Iterating afterwards is an error."""
        self._drain()
        for pool in (self._worker, self._decoders):
            if pool is not None:
                pool.shutdown(cancel_futures=True)


def _samples(entry: Sequence[Any] | None) -> str:
    return "no such source" if entry is None else f"{entry[0]} samples ({entry[1]})"
