"""Decoding in the trainer's own process: continuous batching over one paged key-value cache.

Prompts are trajectories, taken as they are: their ids, their pixels. What was computed for one sequence serves every
other that begins alike, by content: the prompt of a group of rollouts, the turns of an episode, a system text with its
pictures. Long prompts are fed in pieces, so that those who decode wait for a piece only; where the cache is too small
for all, who came last or matters least steps back and goes on later.

A change of the model's weights is noticed by itself: nothing computed before is found any more, and sequences that
decode on are marked with both versions.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequence_
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmagent.generation.blocks import BlockPool
from mmagent.generation.dispatch import computes_on
from mmagent.generation.features import ImageFeatures
from mmagent.generation.paged import PagedKV
from mmagent.generation.runner import Fed, Piece, Runner, computing
from mmagent.generation.running import Running
from mmagent.generation.sampling import check_limits
from mmagent.generation.sequences import Sequence, begin
from mmagent.generation.speculation import Drafter
from mmagent.generation.stopping import StopStrings
from mmagent.generation.weights import HalfWritten, require_steady, require_whole, weight_versions
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
    ``speculate_least``. Greedy tokens are those without drafts, sampled ones have the same distribution; which ones
    they are depends on these two settings and on the sequence alone.

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
    speculate_least: float = 0.35
    steady: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"generator dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if min(self.max_sequences, self.prefill_tokens, self.cache_tokens) < 1 or self.feature_tokens < 0:
            raise ValueError(f"generator: sizes must be positive, got {self}")
        if self.speculate < 0 or not 0 <= self.speculate_least < 1:
            raise ValueError(
                f"generator: speculate must not be negative and speculate_least be in [0, 1), got {self.speculate} and "
                f"{self.speculate_least}"
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
        self.counts: Counter[str] = Counter()
        """What happened since it was made: tokens ``prefilled`` and ``cached``, sequences ``preempted``, ..."""
        self.writer: object | None = None
        self.hold = False
        """Where true, nothing new begins: :meth:`step` goes on with what is in flight alone."""
        self.interrupt: Callable[[], bool] = lambda: False
        """Asked between two tokens: true makes :meth:`step` return early, for somebody waits to be let in. One token is
        decoded in any case: else those who come and go would hold up the others for ever."""
        moe = model.config.decoder.moe_layers
        self._records = self.config.record_routing and moe > 0
        size = BLOCK_TOKENS.get(self.device.type, BLOCK_TOKENS["cuda"])
        self._most_blocks = max(-(-self.config.cache_tokens // size), 1)
        self.pool = BlockPool(min(FIRST_BLOCKS, self._most_blocks), size)
        self.kv = PagedKV(len(self.pool), size, self.device)
        at_once = 1 if self.config.steady else self.config.prefill_tokens
        self.features = ImageFeatures(model, at_once, self.config.feature_tokens)
        self._runner = Runner(model, self.kv, self.features, self.config.steady)
        self.drafter: Drafter | None = None
        if self.config.speculate:
            least = self.config.speculate_least
            self.drafter = Drafter(self._runner, self.config.speculate, least, self._barred)
        self._tickets = 0
        self._weights: tuple[int, ...] = ()
        self._requests: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._filling: list[Sequence] = []
        self._running = Running(self.device)
        self._cancelled: list[int] = []
        self._ended: dict[int, Completion] = {}  # and not yet handed out

    @property
    def device(self) -> torch.device:
        return computes_on(self.model.embedding)

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
            while any(ticket in self._requests for ticket in order):
                done.update(self.step())
        except BaseException:  # nobody waits for the others any more
            self._cancelled += order
            self._give_up()
            self._ended = {ticket: completion for ticket, completion in self._ended.items() if ticket not in order}
            raise
        answers = [done.pop(ticket) for ticket in order]
        self._ended |= done  # whose requests came by submit
        return answers

    def submit(self, prompt: Trajectory, limits: Limits, *, priority: int = 0) -> int:
        """Queue one prompt; its ticket comes back from :meth:`step` with the completion. Higher ``priority`` goes
        first, and may push out what is lower. Raises ``ValueError`` naming what cannot be completed."""
        self._require_weights()
        if not prompt.input_ids or prompt.status is not Status.RUNNING:
            raise ValueError(f"{prompt.key}: cannot complete a trajectory that is empty or {prompt.status.value}")
        check_limits(limits, prompt.key)
        if len(prompt) + limits.max_tokens > self._most_blocks * self.pool.block_tokens:
            raise ValueError(
                f"{prompt.key}: {len(prompt)} tokens and {limits.max_tokens} more do not fit the generator's cache of "
                f"{self._most_blocks * self.pool.block_tokens}; raise cache_tokens"
            )
        sequence = begin(prompt, limits, self.model.config, self.features, self.pool.block_tokens)
        if limits.stop_strings:
            sequence.matcher = StopStrings(self.vocab, limits.stop_strings).matcher()
        self._tickets += 1
        sequence.ticket, sequence.priority = self._tickets, priority
        self._requests[self._tickets] = sequence
        insort(self._waiting, sequence, key=lambda s: s.rank)
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Give up one request; what it sampled so far comes with the next :meth:`step`. Nothing where it has ended."""
        if ticket in self._requests:
            self._cancelled.append(ticket)

    def sampled(self, ticket: int) -> tuple[list[int], list[float]]:
        """Ids and log-probs that a request in flight has so far."""
        sequence = self._requests[ticket]
        return sequence.ids[sequence.begun :], list(sequence.logprobs)

    @property
    def busy(self) -> bool:
        return bool(self._requests or self._ended)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Tickets of requests that have begun: something of theirs is computed already, or is being."""
        filling = [m for s in self._filling for m in (s, *s.followers)]
        begun = [s for s in self._waiting if s.produced]  # they were pushed out
        return tuple(s.ticket for s in (*self._running.sequences, *filling, *begun))

    @property
    def load(self) -> dict[str, int]:
        """How many requests wait, are being read, and decode; blocks of the cache that are owned, known and there."""
        filling = len(self._filling) + sum(len(s.followers) for s in self._filling)
        owned = len(self.pool) - self.pool.free
        return {"waiting": len(self._waiting), "filling": filling, "running": len(self._running), "blocks": owned,
                "blocks_known": self.pool.known, "blocks_there": len(self.pool)}  # fmt: skip

    def abandon(self) -> None:
        """Give up everything queued and in flight."""
        self._requests.clear()
        self._cancelled, self._ended = [], {}
        self._begin_anew()

    def forget(self) -> None:
        """Find nothing again of what was computed. A change of weights does this by itself. Prompts that are half read
        begin again, for nothing they sample would tell that two versions had read them."""
        self.features.forget()
        self.pool.forget()
        self._put_back([s for s in self._filling if s.fed])
        for sequence in self._requests.values():
            sequence.stale = sequence.fed > 0

    def reread(self) -> None:
        """Everything in flight gives up its keys and values, and is read again, with what it has sampled."""
        self._put_back(self._filling)
        running = self._running.sequences
        self._running.change([])
        for sequence in running:
            self._wait_again(sequence)

    def step(self) -> dict[int, Completion]:
        """Admit waiting prompts if there is room, feed some of what prompts have, then decode a few tokens a sequence:
        one at least. Returns what has ended.

        Where it raises, what was in flight waits again with the tokens that it has, and nothing is left in the cache:
        the next step tries again; :meth:`cancel` or :meth:`abandon` what should not be."""
        self._require_weights()
        try:
            with self._computing():
                self._give_up()
                self._admit()
                self._fill()
                for count in range(BURST):
                    if not len(self._running) or (count and self.interrupt()):
                        break
                    self._decode()
                    self._collect()
        except BaseException:
            self._begin_anew()
            raise
        done, self._ended = self._ended, {}
        return done

    def _begin_anew(self) -> None:
        """All requests wait, and the cache is empty, whatever state a failure left them in."""
        self._waiting, self._filling = [], []
        self._running.change([])
        self.features.forget()
        self.pool.clear()
        self.kv.wipe(range(len(self.pool)))
        for sequence in list(self._requests.values()):
            sequence.blocks, sequence.followers = [], []
            del sequence.experts[max(sequence.produced - 1, 0) :]
            if sequence.reason:
                self._end(sequence)
            else:
                self._wait_again(sequence)

    # ------------------------------------------------------------ weights

    def _computing(self) -> AbstractContextManager[None]:
        """With the weights as they are: what was computed with others is forgotten."""
        weights = (self.version, *weight_versions(self.model))  # writing to a tensor's ``data`` leaves no other trace
        if weights != self._weights:
            require_whole(self.model)
            self.forget()
            self._weights = weights
        return computing(self.device, DTYPES[self.config.dtype], self.config.steady)

    def _require_weights(self) -> None:
        if self.writer is not None:
            raise HalfWritten(str(self.writer))

    # ------------------------------------------------------------ room

    def _have(self, blocks: int) -> bool:
        """Whether so many blocks can be had; the cache grows for it before it forgets anything."""
        missing = blocks - self.pool.unknown
        if missing > 0 and len(self.pool) < self._most_blocks:
            wanted = max(len(self.pool) + missing, len(self.pool) * 3 // 2)
            self.pool.grow(min(wanted, self._most_blocks))
            self.kv.grow(len(self.pool))
        return self.pool.free >= blocks

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_tokens)

    def _drop(self, sequence: Sequence) -> None:
        blocks, sequence.blocks, sequence.fed, sequence.known = sequence.blocks, [], 0, 0
        if sequence.reason == "sick":  # whatever made it so, nobody else is to find it
            self.pool.untell(blocks)
        self.pool.release(blocks)
        if sequence.reason == "sick":
            self.kv.wipe([block for block in blocks if not self.pool.owners[block]])

    def _push_out(self, some: Iterable[Sequence]) -> None:
        """Whoever came last of those that matter least is put back, for others' sake. A prompt that several share
        matters as much as it does to the first of them."""
        victim = max(some, key=lambda s: s.standing)
        if victim in self._filling:
            self._put_back([victim])
        else:
            self._running.change(s for s in self._running.sequences if s is not victim)
            self._wait_again(victim)
        self.counts["preempted"] += 1

    def _wait_again(self, sequence: Sequence) -> None:
        """What it has sampled is kept, and goes in again as a whole."""
        self._drop(sequence)
        sequence.resumed, sequence.stale = sequence.produced > 0, False
        if not sequence.resumed:
            sequence.cached_tokens = 0
        insort(self._waiting, sequence, key=lambda s: s.rank)

    def _put_back(self, filling: list[Sequence]) -> None:
        """Prompts that are half read, and those that wait for them."""
        self._filling = [s for s in self._filling if s not in filling]
        for sequence in filling:
            followers, sequence.followers = sequence.followers, []
            for member in (sequence, *followers):
                self._wait_again(member)

    def _tell(self, sequence: Sequence) -> None:
        """Blocks that have become full can be found from now on."""
        fed = sequence.fed if self.drafter is None else min(sequence.fed, sequence.headed)
        full = fed // self.pool.block_tokens
        if full <= sequence.known or sequence.stale or self.config.steady or not self.config.reuse:
            return
        keys = sequence.keys.extend(sequence.ids[: full * self.pool.block_tokens], self._runner.spans(sequence))
        for n in range(sequence.known, full):
            self.pool.tell(sequence.blocks[n], keys[n])
        sequence.known = full

    # ------------------------------------------------------------ prompts

    def _admit(self) -> None:
        """Let those in that wait, in their order, while there is room."""
        prompts = self._prompts()
        while sequence := next((s for s in self._waiting if s.produced or not self.hold), None):
            inside = len(self._running) + sum(1 + len(s.followers) for s in self._filling)
            leader = None if sequence.resumed else prompts.get(self._content(sequence))
            if inside >= self.config.max_sequences or not (leader or self._begin(sequence)):
                if not self._make_room(sequence):
                    return
                prompts = self._prompts()
                continue
            self._waiting.remove(sequence)
            if leader is not None:
                leader.followers.append(sequence)
            else:
                self._filling.append(sequence)
                if not sequence.resumed:
                    prompts[self._content(sequence)] = sequence

    def _prompts(self) -> dict[tuple[object, ...], Sequence]:
        """Those that others with the very same prompt may follow. Not who goes on: the token sampled last, which such a
        prompt has, is not fed with the others."""
        return {self._content(s): s for s in self._filling if not s.resumed}

    def _content(self, sequence: Sequence) -> tuple[object, ...]:
        return (*sequence.ids, *(key for _, _, key in sequence.image_spans))

    def _begin(self, sequence: Sequence) -> bool:
        """Blocks for all it has to be fed; false where there are none."""
        keys: Sequence_[bytes] = ()
        if self.config.reuse and not self.config.steady:
            keys = sequence.keys.extend(sequence.ids, self._runner.spans(sequence))
            keys = keys[: (sequence.target - 1) // self.pool.block_tokens]  # a token is left, to say what comes next
        found = self.pool.match(keys)
        wanted = self._blocks_for(sequence.most if self.config.steady else sequence.target + 1) - len(found)
        if not self._have(wanted + (0 if self.config.steady else len(self._running))):
            alone = not (self._running.sequences or self._filling)
            if not (alone and self._have(wanted)):
                self.pool.release(found)
                return False
        sequence.blocks = found + self.pool.take(wanted)
        sequence.known = len(found)
        sequence.fed = len(found) * self.pool.block_tokens
        sequence.cached_tokens = max(sequence.cached_tokens, min(sequence.fed, sequence.begun))
        self.counts["cached"] += sequence.fed
        if self.drafter is not None:
            self.drafter.begin(sequence)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Push out somebody who matters less than ``sequence``. Not where sequences are to be steady: what was decoded
        would be read again as a prompt, by other instructions."""
        inside = () if self.config.steady else (*self._running.sequences, *self._filling)
        lower = [s for s in inside if -s.standing[0] < sequence.priority]
        if lower:
            self._push_out(lower)
        return bool(lower)

    def _fill(self) -> None:
        """Feed prompts: as much as one forward may have of those that matter most; each whole and alone where sequences
        are to be steady."""
        if not self._filling:
            return
        if self.config.steady:
            for sequence in self._filling[:]:
                self._fed([Piece(sequence, 0, sequence.target)])
            return self._collect()
        room, pieces = self.config.prefill_tokens, []
        for sequence in sorted(self._filling, key=lambda s: s.standing):
            if room <= 0:
                break
            stop = self._runner.cut(sequence, min(sequence.target, sequence.fed + room))
            pieces.append(Piece(sequence, sequence.fed, stop))
            room -= stop - sequence.fed
        self._fed(pieces)
        self._collect()

    def _fed(self, pieces: list[Piece]) -> None:
        """Run the pieces; whoever is fed whole samples its first token and decodes from then on."""
        fed = self._runner.feed(pieces)
        if self.drafter is not None:
            self.drafter.read(pieces, fed)
        ends = np.cumsum(fed.counts) - 1
        self.counts["prefilled"] += int(fed.counts.sum())
        finite = np.logical_and.reduceat(fed.hidden.isfinite().all(-1).cpu().numpy(), ends - fed.counts + 1)
        whole, at = [], []
        for piece, end, sound in zip(pieces, ends.tolist(), finite.tolist(), strict=True):
            if not sound:
                self._stop(piece.sequence, "sick")
                continue
            piece.sequence.fed = piece.stop
            self._tell(piece.sequence)
            if piece.stop == piece.sequence.target:
                whole.append(piece.sequence)
                at.append(end)
        if not whole:
            return
        self._filling = [s for s in self._filling if s not in whole]
        first, rows = [], []
        for sequence, end in zip(whole, at, strict=True):
            for member in (sequence, *self._forked(sequence)):
                if not member.resumed:
                    first.append(member)
                    rows.append(end)
        if first:
            self._first(first, fed.hidden[torch.tensor(rows, device=self.device)])
        joined = [*whole, *(s for s in first if s not in whole)]
        for sequence in joined:
            sequence.resumed = False
        self._running.change([*self._running.sequences, *joined])

    def _forked(self, leader: Sequence) -> list[Sequence]:
        """Those with the very same prompt: they share its full blocks and get a copy of the one that is not."""
        size, members = self.pool.block_tokens, []
        full = leader.fed // size
        sources, targets = [], []
        for member in leader.followers:
            wanted = self._blocks_for(member.most if self.config.steady else member.target + 1) - full
            if not self._have(wanted):
                self._wait_again(member)
                continue
            self.pool.share(leader.blocks[:full])
            own = self.pool.take(wanted)
            member.blocks, member.fed, member.known = leader.blocks[:full] + own, leader.fed, full
            member.keys.keys = list(leader.keys.keys[:full])
            member.cached_tokens = leader.fed
            self.counts["cached"] += leader.fed
            if leader.fed % size:
                sources.append(leader.blocks[full])
                targets.append(own[0])
            if self.drafter is not None:
                self.drafter.fork(leader, member)
            members.append(member)
        leader.followers = []
        self.kv.copy(sources, targets)
        return members

    def _first(self, sequences: list[Sequence], hidden_SD: Tensor) -> None:
        """The first token of each."""
        column = Running(self.device)
        column.change(sequences)
        column.fed -= 1  # all they have is fed, and no token waits
        ids, logprobs = self._runner.sample(column, hidden_SD, self._barred)
        for sequence, token, logprob in zip(sequences, ids.tolist(), logprobs.tolist(), strict=True):
            sequence.take([token], [logprob], self.version)
        self.tokens_sampled += len(sequences)

    # ------------------------------------------------------------ decoding

    def _decode(self) -> None:
        """A token for every sequence, or several where its drafts are accepted."""
        run = self._running
        wanted = self._extend()
        if not len(run):
            return
        drafts = None if self.drafter is None else self.drafter.draft(run, wanted)
        counts = np.ones(len(run), dtype=np.int64)
        ids, positions = run.last, run.positions
        if drafts is not None:
            counts = 1 + wanted
            said = drafts.ids.cpu().numpy()
            within = np.arange(1 + said.shape[1]) < counts[:, None]
            ids = np.concatenate([run.last[:, None], said], axis=1)[within]
            positions = (run.positions[:, None] + np.arange(1 + said.shape[1]))[within]
        fed = self._runner.decode(ids, positions, run.table, run.fed, counts)
        if drafts is None:
            tokens, logprobs = (x[:, None] for x in self._runner.sample(run, fed.hidden, self._barred))
            accepted = np.zeros(len(run), dtype=np.int64)
        else:
            assert self.drafter is not None
            accepted, tokens, logprobs = self.drafter.judge(run, drafts, fed)
        self._advance(run, fed, accepted, tokens, logprobs)

    def _advance(self, run: Running, fed: Fed, accepted: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Take in the ``accepted`` drafts of each row and the token behind them."""
        routed = fed.routed.cpu().numpy().astype(np.int16) if self._records else None
        starts = (np.cumsum(fed.counts) - fed.counts).tolist()
        taken = np.empty(len(run), dtype=np.int64)
        for row, sequence in enumerate(run.sequences):
            many, start = int(accepted[row]) + 1, starts[row]
            kept = sequence.take(tokens[row, :many].tolist(), logprobs[row, :many].tolist(), self.version)
            if routed is not None:
                sequence.experts.extend(routed[start : start + kept])
            if self.drafter is not None:
                made = int(fed.counts[row]) - 1
                self.drafter.judged(sequence, made, many - 1, fed.hidden[start : start + kept])
            sequence.fed += kept
            taken[row] = kept
        self.tokens_sampled += int(taken.sum())
        size = self.pool.block_tokens
        full = np.flatnonzero((run.fed + taken) // size > run.fed // size) if self.drafter is None else range(len(run))
        run.advance(taken)
        for row in full:
            if run.sequences[row].reason != "sick":
                self._tell(run.sequences[row])

    def _extend(self) -> np.ndarray:
        """Room for the next token of every running sequence, and for its drafts, of which it returns how many there are
        to be; who came last or matters least steps back if there is none."""
        run = self._running
        while True:
            wanted = np.zeros(len(run), dtype=np.int64) if self.drafter is None else self.drafter.wanted(run)
            have = np.array([len(s.blocks) for s in run.sequences])
            need = -(-(run.fed + 1 + wanted) // self.pool.block_tokens) - have
            if self._have(int(need.clip(0).sum())):
                for row in np.flatnonzero(need > 0).tolist():
                    run.give(row, self.pool.take(int(need[row])))
                return wanted
            inside = [*run.sequences, *self._filling]
            assert len(inside) > 1, "a sequence alone fits, or submit refuses it"
            self._push_out(inside)

    # ------------------------------------------------------------ ends

    def _give_up(self) -> None:
        """End what was cancelled."""
        cancelled, self._cancelled = self._cancelled, []
        for sequence in [self._requests[ticket] for ticket in dict.fromkeys(cancelled) if ticket in self._requests]:
            self._stop(sequence, "cancelled")

    def _stop(self, sequence: Sequence, reason: str) -> None:
        """End it before its time, wherever it is."""
        sequence.reason = reason
        if sequence in self._running.sequences:
            return self._collect()
        if sequence in self._filling:
            self._put_back([sequence])
        for place in (self._waiting, *(s.followers for s in self._filling)):
            if sequence in place:
                place.remove(sequence)
        self._end(sequence)

    def _collect(self) -> None:
        """End those that are through."""
        ended = [s for s in self._running.sequences if s.reason]
        if ended:
            self._running.change(s for s in self._running.sequences if not s.reason)
        for sequence in ended:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._drop(sequence)
        del self._requests[sequence.ticket]
        self.counts[sequence.reason] += 1
        self._ended[sequence.ticket] = sequence.completion()
