"""The streaming packer: one logical stream of drafts, a buffer that waits, and packs that are nearly full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipelines.documents import DocumentBuilder, Draft, Quarantine
from data_pipelines.mixture import Mixture, Source
from mmagent.packing import Size, select
from mmagent.records import RecordError, from_sample
from mmagent.types import Cost


class Waiting(NamedTuple):
    """A draft and where it came from, which is all that a checkpoint keeps of it: piece ``piece`` of ``pieces``."""

    source: str
    sample: int
    draft: Draft
    piece: int = 0
    pieces: int = 1


@dataclass(frozen=True)
class PackPlan:
    """The documents of a pack, chosen but not decoded. ``short_of_patches``: one more that waits would have fitted by
    its tokens."""

    documents: tuple[Waiting, ...]
    short_of_patches: bool = False

    def cost(self) -> Cost:
        """What :meth:`mmagent.types.PackedBatch.cost` will say of it."""
        frames = [rows * cols for d in self.documents for t, rows, cols in d.draft.grids for _ in range(t)]
        tokens = [d.draft.size.tokens for d in self.documents]
        return Cost(sum(n * n for n in frames), sum(frames), sum(n * n for n in tokens), sum(tokens))


class StreamPacker:
    """A logical stream: mixes, drafts and packs under the two budgets, for ever.

    At least ``buffer`` documents, and two packs' worth of tokens, wait to be chosen from. The oldest always goes
    into the next pack, so a document waits for at most as many packs as there were documents before it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        builder: DocumentBuilder,
        quarantine: Quarantine,
        *,
        number: int,
        streams: int,
        budget: Size,
        buffer: int,
        seed: int,
        by_tokens: bool,
    ):
        unit = budget.tokens if by_tokens else len(sources)
        self.mixture = Mixture(sources, number, streams, seed, unit)
        self.builder, self.quarantine = builder, quarantine
        self.budget, self.buffer, self.by_tokens = budget, buffer, by_tokens
        self.waiting: list[Waiting] = []
        self.packs = 0

    def next(self, step: int = 0) -> PackPlan:
        """The next pack, of ``step``, whose weights count. Raises
        :class:`~data_pipelines.documents.QuarantineError` when too much is unusable."""
        self.mixture.at(step)
        self._refill()
        chosen = select([w.draft.size for w in self.waiting], self.budget)
        gone = set(chosen)
        documents = tuple(self.waiting[n] for n in chosen)
        self.waiting = [w for n, w in enumerate(self.waiting) if n not in gone]
        room = self.budget.tokens - sum(w.draft.size.tokens for w in documents)  # filled exactly, so if by tokens
        plan = PackPlan(documents, any(w.draft.size.tokens <= room for w in self.waiting))  # one fits, patches are full
        self.packs += 1
        return plan

    def _refill(self) -> None:
        tokens = sum(w.draft.size.tokens for w in self.waiting)
        while len(self.waiting) < self.buffer or tokens < 2 * self.budget.tokens:
            name, sample = self.mixture.next()
            shards = self.mixture.sources[name].shards
            try:
                drafts = self.builder.drafts(from_sample(shards.read(sample)))
            except RecordError as error:
                self.mixture.take(name, 1)  # or a source of nothing but bad samples would be asked for ever
                self.quarantine.add(name, shards.where(sample), error)
                continue
            self.quarantine.good(name)
            size = sum(draft.size.tokens for draft in drafts)
            self.mixture.take(name, size if self.by_tokens else 1)
            self.waiting += [Waiting(name, sample, draft, n, len(drafts)) for n, draft in enumerate(drafts)]
            tokens += size

    def state_dict(self) -> dict[str, Any]:
        """Counters and references: kilobytes, whatever the documents weigh."""
        names = list(self.mixture.sources)
        waiting = [[names.index(w.source), w.sample, w.piece, w.pieces] for w in self.waiting]
        return {"mixture": self.mixture.state_dict(), "waiting": waiting, "sources": names, "packs": self.packs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read the waiting documents again; one that a smaller budget or another geometry refuses, or cuts elsewhere,
        is quarantined."""
        self.mixture.load_state_dict(state["mixture"])
        self.waiting = []
        last, drafts = None, []
        for number, sample, piece, pieces in state["waiting"]:
            name = state["sources"][number]
            shards = self.mixture.sources[name].shards
            try:
                if last != (number, sample):  # pieces of one record wait side by side
                    drafts = self.builder.drafts(from_sample(shards.read(sample)))
                    last = number, sample
                if len(drafts) != pieces:
                    key = drafts[0].record.key
                    raise RecordError(key, "pieces", f"was to be cut into {pieces} documents, now into {len(drafts)}")
            except RecordError as error:
                self.quarantine.add(name, shards.where(sample), error, counted=True)
                continue
            self.waiting.append(Waiting(name, sample, drafts[piece], piece, pieces))
        self.packs = int(state["packs"])
