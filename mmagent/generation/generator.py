"""Decoding in the trainer's own process: continuous batching over one paged key-value cache.

Prompts are trajectories, taken as they are: their ids, their pixels. What was computed for one sequence serves every
other that begins alike, by content: the prompt of a group of rollouts, the turns of an episode, a system text with its
pictures. Long prompts are fed in pieces, so that those who decode wait for a piece only; where the cache is too small
for all, who came last or matters least steps back and goes on later.

A change of the model's weights is noticed by itself: nothing computed before is found any more, and sequences that
decode on are marked with both versions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmagent.generation.blocks import BlockPool
from mmagent.generation.dispatch import computes_on
from mmagent.generation.features import ImageFeatures
from mmagent.generation.health import Action, HealthConfig, Watchdogs
from mmagent.generation.paged import PagedKV
from mmagent.generation.runner import Fed, Piece, Runner, computing
from mmagent.generation.running import Running
from mmagent.generation.sampling import check_limits
from mmagent.generation.scheduler import Scheduler
from mmagent.generation.sequences import Sequence, begin
from mmagent.generation.speculation import Drafter, Verdict
from mmagent.generation.stopping import StopStrings
from mmagent.generation.weights import HalfWritten, WeightVersions, require_steady, require_whole
from mmagent.models.agent_model import AgentModel
from mmagent.trajectories import Completion, Limits, Status, Trajectory
from mmagent.vocab import Vocab

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BURST = 8
"""Tokens a sequence that one step decodes: under autocast every step casts the weights anew."""
BLOCK_TOKENS = {"cpu": 32, "cuda": 256}
"""Places of a block; what the kernel that reads block tables wants on CUDA."""
FIRST_BLOCKS = 64
"""A cache begins with so many and grows by half where more are wanted."""


@dataclass
class GeneratorConfig:
    """``max_sequences`` are decoded at a time; others wait. ``prefill_tokens`` bounds the new tokens of prompts in one
    forward: a longer prompt is fed in pieces. ``cache_tokens``: places of the key-value cache, which grows up to them;
    ``reuse``: what it holds of ended sequences is found by those that begin alike. ``feature_tokens``: visual tokens
    of images that are kept likewise. ``record_routing`` returns the experts that served every sampled token but the
    last, which is not fed (-1 there).

    ``speculate``: tokens at most that the model's MTP head drafts at a time (0: none), for one forward of the decoder
    to check; one is drafted while the chance that it is accepted, reckoned from its sequence's own past, is at least
    ``speculate_least`` (greedy: and from what the head gives to the drafts before it). Where nothing is sampled, and on
    CPUs, that forward also tries the next likeliest in place of each draft, while the head gives them something,
    ``speculate_width`` tokens at most (1: the draft alone), and fewer beside many sequences; while more than
    ``speculate_requests`` are decoded, which keep a CPU busy enough, it tries none. Greedy tokens
    are those without drafts, sampled ones have the same distribution; which ones they are depends on the first two
    settings and on the sequence alone.

    ``health``: when a request counts as sick (looping, garbled), and what becomes of it; by default it is counted.

    ``steady``: what a sequence gets depends on itself alone, to the last bit, and not on who else is decoded or in
    which order they came. Prompts and images are run one at a time, and nothing is found again: a later turn runs its
    whole trajectory anew, all on one thread. It is what CPUs are known to keep; elsewhere it is refused."""

    max_sequences: int = 256
    prefill_tokens: int = 16384
    cache_tokens: int = 1 << 18
    reuse: bool = True
    feature_tokens: int = 1 << 16
    dtype: str = "float32"
    record_routing: bool = False
    speculate: int = 0
    speculate_least: float = 0.5
    speculate_width: int = 8
    speculate_requests: int = 8
    steady: bool = False
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"generator dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if min(self.max_sequences, self.prefill_tokens, self.cache_tokens) < 1 or self.feature_tokens < 0:
            raise ValueError(f"generator: sizes must be positive, got {self}")
        counts = self.speculate_width, self.speculate_requests
        if self.speculate < 0 or not 0 <= self.speculate_least < 1 or min(counts) < 1:
            raise ValueError(
                "generator: speculate must not be negative, speculate_least be in [0, 1), speculate_width and "
                f"speculate_requests at least 1, got {self.speculate}, {self.speculate_least} and {counts}"
            )


class Generator:
    """``generate`` completes prompts and returns; ``submit`` and ``step`` do the same piece by piece. One thread at a
    time may use it.

    Log-probabilities are those of the distribution that is sampled from, before ``top_p``, ``top_k`` and ``min_p``: at
    the request's temperature (1 for greedy), with ``barred`` ids impossible. A trainer that passes the same temperature
    and barred ids to :func:`~mmagent.ops.selected_logprobs` recomputes them.

    ``version`` is what completions are stamped with; whoever changes the weights sets it. While somebody writes them in
    place he is the ``writer``, whose text says how far he is, and ``submit`` and ``step`` raise
    :class:`~mmagent.generation.weights.HalfWritten`.
    """

    def __init__(self, model: AgentModel, vocab: Vocab, config: GeneratorConfig | None = None):
        self.model, self.vocab, self.config = model, vocab, config or GeneratorConfig()
        self.barred = vocab.barred(model.config.vocab_size)
        self._barred = torch.tensor(self.barred, device=self.device)
        if self.config.steady:
            require_steady(self.device, model.config.decoder.moe.experts)
        self.version = 0
        self.tokens_sampled = 0
        self.writer: object | None = None
        self.interrupt: Callable[[], bool] = lambda: False
        """Asked between two tokens: true makes :meth:`step` return early, for somebody waits to be let in. One token is
        decoded in any case: else those who come and go would hold up the others for ever."""
        moe = model.config.decoder.moe_layers
        self._records = self.config.record_routing and moe > 0
        size = BLOCK_TOKENS.get(self.device.type, BLOCK_TOKENS["cuda"])
        most_blocks = max(-(-self.config.cache_tokens // size), 1)
        self.pool = BlockPool(min(FIRST_BLOCKS, most_blocks), size)
        self.kv = PagedKV(len(self.pool), size, self.device)
        at_once = 1 if self.config.steady else self.config.prefill_tokens
        self.features = ImageFeatures(model, at_once, self.config.feature_tokens)
        self.runner = Runner(model, self.kv, self.features, self.config.steady)
        self.drafter: Drafter | None = None
        if self.config.speculate:
            settings = self.config.speculate_least, self.config.speculate_width, self.config.speculate_requests
            self.drafter = Drafter(self.runner, self.config.speculate, *settings, self._barred)
        self.scheduler = Scheduler(
            self.pool, self.kv, self.drafter, max_sequences=self.config.max_sequences, most_blocks=most_blocks,
            finds=self.config.reuse and not self.config.steady, steady=self.config.steady,
        )  # fmt: skip
        self.watchdogs = Watchdogs(self.config.health, vocab)
        self._tickets = 0
        self._versions = WeightVersions(model)
        self._weights: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        return computes_on(self.model.embedding)

    @property
    def counts(self) -> Counter[str]:
        """What happened since it was made: tokens ``prefilled`` and ``cached``, sequences ``preempted``, ..."""
        return self.scheduler.counts

    # ------------------------------------------------------------ interface

    def generate(self, requests: Sequence_[tuple[Trajectory, Limits]]) -> list[Completion]:
        """Complete every prompt; answers in the order of ``requests``.

        Raises ``ValueError`` naming a prompt that is empty, has ended, or whose images and visual slots disagree.
        """
        order: list[int] = []
        done: dict[int, Completion] = {}
        try:
            for prompt, limits in requests:
                order.append(self.submit(prompt, limits))
            while any(ticket in self.scheduler.requests for ticket in order):
                done.update(self.step())
        except BaseException:  # nobody waits for the others any more
            self.scheduler.cancelled += order
            self.scheduler.give_up()
            for ticket in order:
                self.scheduler.ended.pop(ticket, None)
            raise
        answers = [done.pop(ticket) for ticket in order]
        self.scheduler.ended |= done  # whose requests came by submit
        return answers

    def submit(self, prompt: Trajectory, limits: Limits, *, priority: int = 0) -> int:
        """Queue one prompt; its ticket comes back from :meth:`step` with the completion. Higher ``priority`` goes
        first, and may push out what is lower. Raises ``ValueError`` naming what cannot be completed."""
        self._require_weights()
        if not prompt.input_ids or prompt.status is not Status.RUNNING:
            raise ValueError(f"{prompt.key}: cannot complete a trajectory that is empty or {prompt.status.value}")
        check_limits(limits, prompt.key)
        if len(prompt) + limits.max_tokens > self.scheduler.most_blocks * self.pool.block_tokens:
            raise ValueError(
                f"{prompt.key}: {len(prompt)} tokens and {limits.max_tokens} more do not fit the generator's cache of "
                f"{self.scheduler.most_blocks * self.pool.block_tokens}; raise cache_tokens"
            )
        sequence = begin(prompt, limits, self.model.config, self.features, self.pool.block_tokens)
        sequence.health = self.watchdogs.request(limits.temperature)
        if limits.stop_strings:
            sequence.matcher = StopStrings(self.vocab, limits.stop_strings).matcher()
        self._tickets += 1
        sequence.ticket, sequence.priority = self._tickets, priority
        self.scheduler.queue(sequence)
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Give up one request; what it sampled so far comes with the next :meth:`step`. Nothing where it has ended."""
        if ticket in self.scheduler.requests:
            self.scheduler.cancelled.append(ticket)

    def sampled(self, ticket: int) -> tuple[list[int], list[float]]:
        """Ids and log-probs that a request in flight has so far."""
        sequence = self.scheduler.requests[ticket]
        sequence.told = sequence.produced > 0
        return sequence.ids[sequence.begun :], list(sequence.logprobs)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.requests or self.scheduler.ended)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Tickets of requests that have begun: something of theirs is computed already, or is being."""
        return self.scheduler.in_flight

    @property
    def load(self) -> dict[str, int]:
        """How many requests wait, are being read, and decode; blocks of the cache that are owned, known and there."""
        return self.scheduler.load

    def abandon(self) -> None:
        """Give up everything queued and in flight."""
        self.features.forget()
        self.scheduler.abandon()

    def reread(self) -> None:
        """Everything in flight gives up its keys and values, and is read again, with what it has sampled."""
        self.scheduler.reread()

    def forget(self) -> None:
        """Find nothing again of what was computed. A change of weights does this by itself. Prompts that are half read
        begin again, for nothing they sample would tell that two versions had read them."""
        self.features.forget()
        self.scheduler.forget()

    def step(self) -> dict[int, Completion]:
        """Admit waiting prompts if there is room, feed some of what prompts have, then decode a few tokens a sequence:
        one at least. Returns what has ended.

        Where it raises, what was in flight waits again with the tokens that it has, and nothing is left in the cache:
        the next step tries again; :meth:`cancel` or :meth:`abandon` what should not be."""
        self._require_weights()
        try:
            with self._computing():
                self.scheduler.give_up()
                self.scheduler.admit()
                self._fill()
                for count in range(BURST):
                    if not len(self.scheduler.running) or (count and self.interrupt()):
                        break
                    self._decode()
                    self.scheduler.collect()
        except BaseException:
            self.features.forget()
            self.scheduler.begin_anew()
            raise
        return self.scheduler.hand_out()

    # ------------------------------------------------------------ weights

    def _computing(self) -> AbstractContextManager[None]:
        """With the weights as they are: what was computed with others is forgotten."""
        weights = (self.version, *self._versions.of())  # writing to a tensor's ``data`` leaves no other trace
        if weights != self._weights:
            require_whole(self.model)
            self.forget()
            self._weights = weights
        return computing(self.device, DTYPES[self.config.dtype], self.config.steady)

    def _require_weights(self) -> None:
        if self.writer is not None:
            raise HalfWritten(str(self.writer))

    # ------------------------------------------------------------ prompts

    def _fill(self) -> None:
        """Feed prompts: as much as one forward may have of those that matter most; each whole and alone where sequences
        are to be steady."""
        if not self.scheduler.filling:
            return
        if self.config.steady:
            for sequence in self.scheduler.filling[:]:
                self._fed([Piece(sequence, 0, sequence.target)])
            return self.scheduler.collect()
        room, pieces = self.config.prefill_tokens, []
        for sequence in sorted(self.scheduler.filling, key=lambda s: s.standing):
            if room <= 0:
                break
            stop = self.runner.cut(sequence, min(sequence.target, sequence.fed + room))
            pieces.append(Piece(sequence, sequence.fed, stop))
            room -= stop - sequence.fed
        self._fed(pieces)
        self.scheduler.collect()

    def _fed(self, pieces: list[Piece]) -> None:
        """Run the pieces; whoever is fed whole samples its first token and decodes from then on."""
        fed = self.runner.feed(pieces)
        if self.drafter is not None:
            self.drafter.read(pieces, fed)
        ends = np.cumsum(fed.counts) - 1
        self.counts["prefilled"] += int(fed.counts.sum())
        finite = np.logical_and.reduceat(fed.hidden.isfinite().all(-1).cpu().numpy(), ends - fed.counts + 1)
        whole, at = [], []
        for piece, end, sound in zip(pieces, ends.tolist(), finite.tolist(), strict=True):
            if not sound:
                self.scheduler.stop(piece.sequence, "sick", self._once_more(piece.sequence))
                continue
            piece.sequence.fed = piece.stop
            self.scheduler.tell(piece.sequence)
            if piece.stop == piece.sequence.target:
                whole.append(piece.sequence)
                at.append(end)
        if not whole:
            return
        self.scheduler.filling = [s for s in self.scheduler.filling if s not in whole]
        first, rows = [], []
        for sequence, end in zip(whole, at, strict=True):
            for member in (sequence, *self.scheduler.forked(sequence)):
                if not member.resumed:
                    first.append(member)
                    rows.append(end)
        if first:
            self._first(first, fed.hidden[torch.tensor(rows, device=self.device)])
        joined = [*whole, *(s for s in first if s not in whole)]
        for sequence in joined:
            sequence.resumed = False
        self.scheduler.running.change([*self.scheduler.running.sequences, *joined])

    def _first(self, sequences: list[Sequence], hidden_SD: Tensor) -> None:
        """The first token of each."""
        column = Running(self.device)
        column.change(sequences)
        column.fed -= 1  # all they have is fed, and no token waits
        ids, logprobs = self.runner.sample(column, hidden_SD, self._barred)
        for sequence, token, logprob in zip(sequences, ids.tolist(), logprobs.tolist(), strict=True):
            self._watch(sequence, sequence.take([token], [logprob], self.version))
        self.tokens_sampled += len(sequences)

    def _watch(self, sequence: Sequence, taken: int, drafted: int = 0, accepted: int = 0) -> None:
        """Show the watchdogs the tokens that were ``taken`` just now. Who has ended is not called sick any more."""
        if sequence.reason == "sick":  # what it would have taken is not finite
            sequence.retry = self._once_more(sequence)
            return
        ids, logprobs = sequence.ids[len(sequence.ids) - taken :], sequence.logprobs[len(sequence.logprobs) - taken :]
        assert sequence.health is not None
        found = sequence.health.feed(ids, logprobs, drafted, accepted)
        if found is None or sequence.reason:
            return
        action = self.watchdogs.decide(sequence.retries, sequence.told)
        if action is not Action.NONE:
            sequence.reason, sequence.retry = "sick", action is Action.RETRY

    def _once_more(self, sequence: Sequence) -> bool:
        return self.watchdogs.not_finite(sequence.retries, sequence.told)

    # ------------------------------------------------------------ decoding

    def _decode(self) -> None:
        """A token for every sequence, or several where its drafts are accepted."""
        run = self.scheduler.running
        wanted = self.scheduler.extend()
        if not len(run):
            return
        drafts = None if self.drafter is None else self.drafter.draft(run, wanted)
        if drafts is None:
            ones = np.ones(len(run), dtype=np.int64)
            fed = self.runner.decode(run.last, run.positions, run.table, run.fed, ones)
            tokens, logprobs = (x[:, None] for x in self.runner.sample(run, fed.hidden, self._barred))
            none, path = np.zeros_like(ones), np.arange(len(run))[:, None]
            return self._advance(run, fed, none, Verdict(none, none > 0, ones, path, tokens, logprobs))
        assert self.drafter is not None
        shape = self.drafter.shape(run, drafts)
        fed = self.runner.decode(shape.ids, shape.positions, run.table, run.fed, shape.counts, shape.reach)
        self._advance(run, fed, drafts.counts.cpu().numpy(), self.drafter.judge(run, drafts, fed))

    def _advance(self, run: Running, fed: Fed, made: np.ndarray, verdict: Verdict) -> None:
        """Take in what stays of the drafts that were ``made``, and the token behind."""
        routed = fed.routed.cpu().numpy().astype(np.int16) if self._records else None
        taken = np.empty(len(run), dtype=np.int64)
        for row, sequence in enumerate(run.sequences):
            many, drafted, accepted = int(verdict.taken[row]), int(made[row]), int(verdict.accepted[row])
            tokens, logprobs = verdict.tokens[row, :many].tolist(), verdict.logprobs[row, :many].tolist()
            kept = sequence.take(tokens, logprobs, self.version)
            path = verdict.path[row, :kept]
            if routed is not None:
                sequence.experts.extend(routed[path])
            if self.drafter is not None:
                hidden = fed.hidden[torch.from_numpy(path).to(fed.hidden.device)]
                self.drafter.judged(sequence, drafted, accepted, bool(verdict.instead[row]), hidden)
            self._watch(sequence, kept, drafted, accepted)
            sequence.fed += kept
            taken[row] = kept
        self.tokens_sampled += int(taken.sum())
        size = self.pool.block_tokens
        full = np.flatnonzero((run.fed + taken) // size > run.fed // size) if self.drafter is None else range(len(run))
        run.advance(taken)
        for row in full:
            if run.sequences[row].reason != "sick":
                self.scheduler.tell(run.sequences[row])
