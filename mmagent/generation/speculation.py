"""Multi-token prediction as the drafter of its own model (self-speculative decoding, arXiv 2404.19737, 2412.19437).

The MTP head proposes tokens, one forward of the decoder over all of them says which ones it would have sampled, and
:func:`~mmagent.generation.sampling.accept` keeps those: the tokens of plain decoding where it is greedy, its very
distribution where it samples.

Depth ``k`` of the head, fed token ``i``, takes the hidden state of depth ``k - 1`` of token ``i - 1`` (of the decoder's
for ``k = 1``), attends to what it was fed before, and says what comes after token ``i``. That is
:meth:`mmagent.models.mtp.MTP.forward` with its places counted from the token embedded last, so what a depth stores at a
place depends on the tokens up to there alone, and lies in the block of that place like the decoder's keys and values.
Draft ``j`` comes of depth ``j``; beyond the depths that the model has, the last one goes on from its own states, as
servers of models with a single one do.

The head is fed a token behind the decoder: the token sampled last is fed to it first, and what it says of the next
ones are the drafts.
"""

from __future__ import annotations

from collections import Counter
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.generation.paged import FEW, OfLast, PagedAttention
from mmagent.generation.runner import Fed, Piece, Runner
from mmagent.generation.running import Running
from mmagent.generation.sampling import (
    ACCEPT,
    DRAFT,
    Drafts,
    accept,
    distribution,
    draw,
    uniforms,
)
from mmagent.generation.sequences import Hopes, Sequence
from mmagent.ops.grouped import LEAST_ROWS

CONTEXTS = ("text_only", "after_image")
ROWS = LEAST_ROWS - 1
"""Tokens of a forward up to which others are tried beside drafts: a CPU that has fetched the weights for a few rows
computes some more for little. With twice as many, eight requests took a quarter longer than without any drafts."""


BESIDE = 0.05
"""What the head gives to another token at least, for it to be tried in place of a draft: each is a row more to compute,
a fiftieth of a step, and saves half of one where it is right."""


class Wanted(NamedTuple):
    """How many ``drafts (S,)`` each row is to have at most, and how many others are tried ``beside (S,)`` each."""

    drafts: np.ndarray
    beside: np.ndarray

    @staticmethod
    def none(rows: int) -> Wanted:
        nothing = np.zeros(rows, dtype=np.int64)
        return Wanted(nothing, nothing)

    @property
    def room(self) -> np.ndarray:
        """``(S,)``: tokens that they are in all."""
        return self.drafts * (1 + self.beside)


class Shape(NamedTuple):
    """What the decoder is fed to judge drafts: of each row the token before them, the drafts and the others that are
    tried in place of each, ``counts (S,)`` in all. ``ids`` and ``positions (T,)``, and ``reach (T,)`` as in
    :class:`~mmagent.generation.paged.PagedAttention`: None where there are only drafts."""

    counts: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    reach: np.ndarray | None


class Verdict(NamedTuple):
    """``accepted (S,)`` drafts of each row stay, and ``instead (S,)`` says whether in place of the next comes one that
    was tried beside it. ``path (S, N)``: the rows of the forward that said what each has now, ``taken (S,)`` of them;
    ``tokens`` and ``logprobs (S, N)`` are what they said: NaN where there is nothing finite to judge by."""

    accepted: np.ndarray
    instead: np.ndarray
    taken: np.ndarray
    path: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray

    @staticmethod
    def none(rows: int, most: int) -> Verdict:
        """To be filled in."""
        accepted, path = np.zeros(rows, dtype=np.int64), np.zeros((rows, most), dtype=np.int64)
        return Verdict(
            accepted, accepted > 0, accepted + 1, path, path.copy(), np.zeros((rows, most), dtype=np.float32)
        )


class Drafter:
    """Keeps the MTP head's part of the cache and asks it for drafts: at most ``depth`` at a time, and one while the
    chance that it and all before it are accepted, reckoned from the sequence's own past, is at least ``least``; where
    nothing is sampled, also by what the head itself gives to those before it. There, and on CPUs, up to ``width - 1``
    others are tried in place of each: the next likeliest, from :data:`BESIDE` on (trees that follow what a drafter is
    sure of: EAGLE-2, arXiv 2406.16858); of more than ``most_rows`` nothing is drafted there.

    ``ends (blocks, B, D)`` has, for every known block, what the head needs to go on behind it: the decoder's state at
    its last token, and those of all depths but the last.
    """

    def __init__(self, runner: Runner, depth: int, least: float, width: int, most_rows: int, barred: Tensor):
        if runner.model.mtp is None:
            raise ValueError("generator.speculate: the model has no MTP head to make drafts; leave it 0")
        if depth >= FEW:
            raise ValueError(f"generator.speculate: at most {FEW - 1} drafts at a time, got {depth}")
        self.runner, self.depth, self.least, self.mtp, self.barred = runner, depth, least, runner.model.mtp, barred
        self.width, self.most_rows = min(width, runner.model.config.vocab_size), most_rows
        self.layers = runner.model.config.decoder.layers
        self.depths = min(self.mtp.config.depths, depth)
        width, dtype = runner.model.config.decoder.width, runner.model.embedding.weight.dtype
        self.ends = torch.zeros(0, self.depths, width, dtype=dtype, device=runner.device)
        self.stats: Counter[tuple[str, int, str]] = Counter()
        """By context, depth (from 1) and "tried", "accepted" or "instead" (another that was tried in its place was
        right): drafts all of whose forerunners were accepted."""

    # ------------------------------------------------------------ what the head is fed

    def begin(self, sequence: Sequence) -> None:
        """A sequence whose first ``fed`` tokens were found in the cache."""
        sequence.hopes = sequence.hopes or Hopes(self.depth)
        sequence.headed = sequence.fed
        if sequence.fed:
            end = self.ends[sequence.blocks[sequence.fed // self.runner.kv.block_tokens - 1]]
            sequence.unheaded, sequence.tails = [end[:1]], end[1:]
        else:
            nothing = self.ends.new_zeros(self.depths, self.ends.shape[2])
            sequence.unheaded, sequence.tails = [nothing[:1]], nothing[1:]

    def read(self, pieces: list[Piece], fed: Fed) -> None:
        """Feed the head what the decoder was fed of prompts."""
        ends = np.cumsum(fed.counts) - 1
        starts = ends - fed.counts + 1
        before = fed.hidden.roll(1, 0)
        before[torch.from_numpy(starts).to(before.device)] = self._cat(
            [p.sequence.unheaded[-1] for p in pieces], before
        )
        tails = torch.stack([piece.sequence.tails for piece in pieces])
        states = self._feed(before, fed.embeddings, fed.positions, fed.attend, tails, starts, ends, asks=False)
        for row, piece in enumerate(pieces):
            sequence, start, end = piece.sequence, int(starts[row]), int(ends[row]) + 1
            sequence.unheaded = [fed.hidden[end - 1 : end]]
            sequence.headed = piece.stop
            self._keep_ends(sequence, piece.start, 0, [x[start:end] for x in (fed.hidden, *states[:-1])])
        self._set_tails([piece.sequence for piece in pieces], states, ends)

    def fork(self, leader: Sequence, member: Sequence) -> None:
        """``member`` begins where ``leader`` is."""
        member.hopes = Hopes(self.depth)
        member.headed, member.unheaded, member.tails = leader.headed, list(leader.unheaded), leader.tails

    def _feed(
        self,
        before_TD: Tensor,
        embeddings_TD: Tensor,
        positions_3T: Tensor,
        attend: PagedAttention,
        tails: Tensor,
        starts: np.ndarray,
        ends: np.ndarray,
        asks: bool,
    ) -> list[Tensor]:
        """``(T, D)`` states of every depth but the last, and of that ``(S, D)`` at ``ends``, or ``(0, D)`` where nobody
        ``asks``: no depth goes on from the others, so they are not computed beyond their keys and values. ``tails (S, B
        - 1, D)``: those of each depth at the token before."""
        states = []
        for depth in range(1, self.depths + 1):
            if depth > 1:
                before_TD = states[-1].roll(1, 0)
                before_TD[torch.from_numpy(starts).to(before_TD.device)] = tails[:, depth - 2].to(before_TD.dtype)
            wanted = None if depth < self.depths else ends if asks else ends[:0]
            states.append(self._depth(depth, before_TD, embeddings_TD, positions_3T, attend.behind(depth), wanted))
        return states

    def _depth(
        self,
        depth: int,
        before: Tensor,
        embeddings: Tensor,
        positions: Tensor,
        attend: PagedAttention,
        wanted: np.ndarray | None = None,
    ) -> Tensor:
        """``(T, D)`` states of one depth, from those of the depth before at the token before; if ``wanted``, those
        alone, each the last of its sequence."""
        total, device = positions.shape[1], positions.device
        if wanted is not None and len(wanted) < total and not self.runner.steady:  # fewer rows would be other sums
            rows, module = torch.from_numpy(wanted).to(device), self.mtp.module_for(depth)
            rotation, few = self.runner.model.config.decoder.rotation(positions), OfLast(attend, len(wanted) > 0)
            return module(before, embeddings, rotation, few, self.layers + depth - 1, rows=rows)[0].to(device)
        count, led = self.runner.led(attend, total)
        if missing := count - total:
            before, embeddings = (F.pad(x, (0, 0, 0, missing)) for x in (before, embeddings))
            positions = F.pad(positions, (0, missing))
        rotation = self.runner.model.config.decoder.rotation(positions)
        out, _ = self.mtp.module_for(depth)(before, embeddings, rotation, led, self.layers + depth - 1)
        out = out[:total].to(device)  # where the model is spread, it may be on another
        return out if wanted is None else out[torch.from_numpy(wanted).to(device)]

    def _set_tails(self, sequences: list[Sequence], states: list[Tensor], ends: np.ndarray) -> None:
        if self.depths > 1:
            last = torch.from_numpy(ends).to(states[0].device)
            tails = torch.stack([state[last] for state in states[:-1]], dim=1)
            for row, sequence in enumerate(sequences):
                sequence.tails = tails[row]

    def _keep_ends(self, sequence: Sequence, start: int, depth: int, states: list[Tensor]) -> None:
        """Of the states of depths ``depth ...`` (0: the decoder's) at tokens from ``start`` on, keep those at the end
        of a block."""
        size = self.runner.kv.block_tokens
        ends = range(start + (-start - 1) % size, start + states[0].shape[0] if states else 0, size)
        if ends and self.ends.shape[0] < self.runner.kv.blocks:
            more = self.runner.kv.blocks - self.ends.shape[0]
            self.ends = torch.cat([self.ends, self.ends.new_zeros(more, *self.ends.shape[1:])])
        for at in ends:
            kept = torch.stack([x[at - start] for x in states])
            self.ends[sequence.blocks[at // size], depth : depth + len(states)] = kept.to(self.ends.dtype)

    def _cat(self, parts: list[Tensor], like: Tensor) -> Tensor:
        return torch.cat([part.to(like.dtype) for part in parts])

    # ------------------------------------------------------------ drafts

    def wanted(self, run: Running) -> Wanted:
        """As many drafts as a row's past lets hope for, and no more than its limit can use. None where every token
        costs and many are decoded already: which tokens come does not hang on that where all are greedy."""
        if len(run) > self.most_rows and self._free(run) and not self.runner.steady:
            return Wanted.none(len(run))
        drafts = [min(s.hopes.depth(self.least), s.most - len(s.ids) - 1) for s in run.sequences]
        return Wanted(np.array(drafts, dtype=np.int64), np.array(self._beside(run, drafts), dtype=np.int64))

    def _free(self, run: Running) -> bool:
        """Whether how much is tried is a question of time alone, and of a CPU's."""
        return not run.sampled and self.runner.device.type == "cpu"

    def _beside(self, run: Running, drafts: list[int]) -> list[int]:
        """How many others are tried in place of each draft of a row. Fewer beside more rows, which alters no token: of
        what is greedy, drafts change only the time it takes."""
        if self.width == 1 or not self._free(run):
            return [0] * len(drafts)
        size, most = self.runner.kv.block_tokens, FEW
        if not self.runner.steady:  # what a steady row gets must not hang on the others
            most = min(FEW, ROWS // len(run))
        out = []
        for sequence, count in zip(run.sequences, drafts, strict=True):
            room = min(most, -(-sequence.most // size) * size - sequence.fed)  # in the last block that it may have
            out.append(min(max((room - 1) // count - 1, 0), self.width - 1) if count else 0)
        return out

    def draft(self, run: Running, wanted: Wanted) -> Drafts | None:
        """Drafts behind the token that each row is to be fed next; None where nobody wants any."""
        most = int(wanted.drafts.max())
        behind = max(len(s.ids) - s.headed for s in run.sequences)
        if not most and behind < FEW and not self.runner.steady:  # how many at a time must not hang on the others
            return None
        state = self._catch_up(run, asks=most > 0 and self.depths == 1)  # a later depth answers what was drafted
        if not most:
            return None
        sampled, wide = run.sampled, int(wanted.beside.max())
        rows, sure, served = np.arange(len(run)), np.ones(len(run)), np.array([s.hopes.served for s in run.sequences])
        ids = torch.zeros(len(run), most, dtype=torch.int64, device=self.runner.device)
        others: list[list[list[int]]] | None = [[] for _ in rows] if wide else None
        shares: list[Tensor] = []
        made = np.zeros(len(run), dtype=np.int64)
        for at in range(most):
            if at:
                going = (wanted.drafts[rows] > at) & (sure[rows] * served[rows, at] >= self.least)
                if not going.any():
                    break
                left = torch.from_numpy(np.flatnonzero(going)).to(ids.device)
                rows, state = rows[going], {k: x[left] for k, x in state.items()}
                state = self._further(run, rows, at, ids[torch.from_numpy(rows).to(ids.device), at - 1], state)
            said, share = self._say(run, rows, at, state[min(at + 1, self.depths)], sampled)
            here = torch.from_numpy(rows).to(ids.device)
            ids[here, at] = said
            made[rows] += wanted.drafts[rows] > at  # at first some may want none
            if sampled:
                whole = share.new_zeros(len(run), share.shape[1])
                shares.append(whole.index_copy_(0, here, share))
            elif wide or at + 1 < most:
                sure[rows] *= self._likely(share, rows, wanted.beside, others)
        counts = torch.from_numpy(made).to(ids.device)
        return Drafts(ids[:, : at + 1], counts, torch.stack(shares, dim=1) if sampled else None, others)

    def _likely(
        self, scores: Tensor, rows: np.ndarray, beside: np.ndarray, others: list[list[list[int]]] | None
    ) -> np.ndarray:
        """What the head gives to the draft of each of ``rows``, by ``scores (R, V)``. To their ``others`` come those
        that are tried in its place."""
        top = scores.softmax(-1).topk(1 + int(beside.max()))
        likely, which = top.values.cpu().numpy(), top.indices.tolist()
        if others is not None:
            for row, said, found in zip(rows.tolist(), likely >= BESIDE, which, strict=True):
                tried = min(int(said[1:].sum()), int(beside[row]))  # the likeliest come first
                others[row].append(found[1 : 1 + tried])
        return likely[:, 0]

    def shape(self, run: Running, drafts: Drafts) -> Shape:
        """What the decoder is fed to judge them."""
        ids, counts, ahead, reach = [], [], [], []  # the last two behind what each row was fed
        for last, said, others in zip(run.last.tolist(), drafts.listed(), drafts.others or repeat([]), strict=False):
            before = len(ids)
            ids += [last, *said]
            ahead += range(1 + len(said))
            reach += range(1 + len(said))
            for draft, instead in enumerate(others):  # what stands in for it sees the token in front of it
                ids += instead
                ahead += [draft + 1] * len(instead)
                reach += [draft] * len(instead)
            counts.append(len(ids) - before)
        sizes = np.array(counts)
        positions = np.repeat(run.positions, sizes) + ahead
        seen = None if drafts.others is None else np.repeat(run.fed, sizes) + reach
        return Shape(sizes, np.array(ids), positions, seen)

    def _catch_up(self, run: Running, asks: bool) -> dict[int, Tensor]:
        """Feed the head all tokens of every row that it has not had; the state of every depth at the last of them, of
        the last depth where somebody ``asks``."""
        sequences = run.sequences
        headed = np.array([s.headed for s in sequences])
        counts = run.fed + 1 - headed
        ends = np.cumsum(counts) - 1
        starts = ends - counts + 1
        ids = [token for s in sequences for token in s.ids[s.headed :]]
        positions = np.repeat(run.positions - ends, counts) + np.arange(len(ids))
        places = torch.from_numpy(positions).to(self.runner.device).expand(3, -1)
        embeddings = self.runner.model.embed_tokens(torch.tensor(ids, device=self.runner.device))
        before = self._cat([part for s in sequences for part in s.unheaded], embeddings)
        tails = torch.stack([s.tails for s in sequences]) if self.depths > 1 else before
        attend = PagedAttention(self.runner.kv, run.table, headed, counts, self.runner.steady, first=1)
        states = self._feed(before, embeddings, places, attend, tails, starts, ends, asks)
        for row, sequence in enumerate(sequences):
            piece = slice(int(starts[row]), int(ends[row]) + 1)
            self._keep_ends(sequence, sequence.headed, 1, [state[piece] for state in states[:-1]])
            sequence.headed += int(counts[row])
            sequence.unheaded = []
        self._set_tails(sequences, states, ends)
        last = torch.from_numpy(ends).to(before.device)
        found = {depth: state[last] for depth, state in enumerate(states[:-1], start=1)}
        return found | {self.depths: states[-1]} if asks else found

    def _further(
        self, run: Running, rows: np.ndarray, at: int, ids: Tensor, state: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """One draft further for ``rows``: ``ids`` is their draft number ``at``."""
        history = run.fed[rows] + at
        positions = torch.from_numpy(run.positions[rows] + at).to(self.runner.device).expand(3, -1)
        embeddings = self.runner.model.embed_tokens(ids)
        ones = np.ones(len(rows), dtype=np.int64)
        first = min(at + 1, self.depths)
        attend = PagedAttention(self.runner.kv, run.table[rows], history, ones, self.runner.steady, first=first)
        if at >= self.depths:  # beyond the depths there are: the last one goes on from itself
            last = self.depths
            return {last: self._depth(last, state[last], embeddings, positions, attend.behind(last))}
        return {
            depth: self._depth(depth, state[depth - 1], embeddings, positions, attend.behind(depth))
            for depth in range(at + 1, self.depths + 1)
        }

    def _say(self, run: Running, rows: np.ndarray, at: int, hidden: Tensor, sampled: bool) -> tuple[Tensor, Tensor]:
        """Draft number ``at + 1`` of ``rows``, and the probabilities that it was drawn from where any row samples."""
        scores = self.runner.scores(hidden, self.barred)[0][: len(rows)]
        if not sampled:
            return scores.argmax(-1), scores
        chosen = torch.from_numpy(rows).to(scores.device)
        narrow = [x[chosen] for x in (run.top_p, run.top_k, run.min_p)] if run.narrowed else [None, None, None]
        _, share = distribution(scores, run.temperature[chosen], *narrow)
        uniform = uniforms(run.seeds[rows], run.counters[rows] + at, DRAFT)
        return draw(share, torch.from_numpy(uniform).to(scores.device)), share

    # ------------------------------------------------------------ verdicts

    def judge(self, run: Running, drafts: Drafts, fed: Fed) -> Verdict:
        """By what the decoder said of them (``fed``)."""
        if run.sampled:
            return self._judge_sampled(run, drafts, fed)
        said, others = drafts.listed(), drafts.others
        starts = (np.cumsum(fed.counts) - fed.counts).tolist()
        own = [start + draft for start, ids in zip(starts, said, strict=True) for draft in range(1 + len(ids))]
        tokens, logprobs = self._greedy(fed.hidden, own)
        verdict = Verdict.none(len(run), int(max(drafts.counts)) + 1)
        known, at, instead, moved = tokens.tolist(), 0, [], []
        for row, (start, ids) in enumerate(zip(starts, said, strict=True)):
            stays = 0
            while stays < len(ids) and known[at + stays] == ids[stays]:
                stays += 1
            path = slice(at, at + stays + 1)
            verdict.accepted[row], verdict.taken[row] = stays, stays + 1
            verdict.path[row, : stays + 1] = own[path]
            verdict.tokens[row, : stays + 1], verdict.logprobs[row, : stays + 1] = tokens[path], logprobs[path]
            if others and stays < len(ids) and known[at + stays] in others[row][stays]:
                before = sum(map(len, others[row][:stays]))
                place = 1 + len(ids) + before + others[row][stays].index(known[at + stays])
                instead.append((row, stays + 1, start + place))
                moved.append((row, int(run.fed[row]) + place, int(run.fed[row]) + 1 + stays))
            at += 1 + len(ids)
        if moved:
            self._move(run.table, np.array(moved).T)
            rows, ends, places = (list(x) for x in zip(*instead, strict=True))
            verdict.instead[rows], verdict.path[rows, ends] = True, places
            verdict.taken[rows] += 1
            verdict.tokens[rows, ends], verdict.logprobs[rows, ends] = self._greedy(fed.hidden, places)
        return verdict

    def _greedy(self, hidden_TD: Tensor, places: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest token, and its log-prob, behind each of these rows: what nobody will read is not computed."""
        if len(places) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.tensor(places, device=hidden_TD.device)]
        scores, sick = (x[: len(places)] for x in self.runner.scores(hidden_TD, self.barred))
        best = scores.argmax(-1)
        said = scores.log_softmax(-1).gather(1, best[:, None]).squeeze(1).masked_fill(sick, float("nan"))
        return best.cpu().numpy(), said.cpu().numpy()

    def _judge_sampled(self, run: Running, drafts: Drafts, fed: Fed) -> Verdict:
        scores, sick = (x[: len(fed.hidden)] for x in self.runner.scores(fed.hidden, self.barred))
        K, device = drafts.ids.shape[1], self.runner.device
        starts = torch.from_numpy(np.cumsum(fed.counts) - fed.counts).to(device)
        places = starts[:, None] + torch.minimum(torch.arange(K + 1, device=device), drafts.counts[:, None])
        rows = torch.from_numpy(np.repeat(np.arange(len(run)), fed.counts)).to(device)
        columns = [x[rows] for x in (run.top_p, run.top_k, run.min_p)] if run.narrowed else [None, None, None]
        logprobs, share = distribution(scores, run.temperature[rows], *columns)
        judges = uniforms(run.seeds[:, None], run.counters[:, None] + np.arange(K), ACCEPT)
        judges, draws = (torch.from_numpy(x).to(device) for x in (judges, uniforms(run.seeds, run.counters)))
        accepted, behind = accept(share[places], drafts, judges, draws)
        tokens = torch.cat([drafts.ids, behind[:, None]], dim=1)
        tokens.scatter_(1, accepted[:, None], behind[:, None])
        chosen = logprobs[places].gather(2, tokens[:, :, None]).squeeze(2).masked_fill(sick[places], float("nan"))
        stay, tokens, chosen, path = (x.cpu().numpy() for x in (accepted, tokens, chosen, places))
        return Verdict(stay, np.zeros(len(run), dtype=bool), stay + 1, path, tokens, chosen)

    def _move(self, table: np.ndarray, moved: np.ndarray) -> None:
        """``moved (3, n)``: of these rows, what the decoder stored at a place to another place of the sequence."""
        size, (rows, *places) = self.runner.kv.block_tokens, moved
        at, to = ((torch.from_numpy(table[rows, x // size]), torch.from_numpy(x % size)) for x in places)
        self.runner.kv.move(self.layers, at, to)

    def judged(self, sequence: Sequence, made: int, accepted: int, instead: bool, hidden: Tensor) -> None:
        """``accepted`` of ``made`` drafts stayed, and ``instead`` of the next one came another that was tried beside
        it; ``hidden (n, D)`` are the decoder's states at the tokens that were fed and stay."""
        sequence.hopes.judged(made, accepted, instead)
        context = CONTEXTS[bool(sequence.images)]
        for depth in range(1, min(made, accepted + 1) + 1):
            self.stats[context, depth, "tried"] += 1
            self.stats[context, depth, "accepted"] += depth <= accepted
            self.stats[context, depth, "instead"] += instead and depth > accepted
        sequence.unheaded.append(hidden)
        self._keep_ends(sequence, sequence.fed, 0, [hidden])
