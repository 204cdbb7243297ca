"""Who is let in, who steps back, and who is through: what becomes of requests and of the blocks that they own.

Nothing is computed here. :mod:`mmagent.generation.generator` runs what this module has let in.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Sequence_

import numpy as np

from mmagent.generation.blocks import BlockPool
from mmagent.generation.paged import PagedKV
from mmagent.generation.running import Running
from mmagent.generation.sequences import Sequence
from mmagent.generation.speculation import Drafter, Wanted
from mmagent.trajectories import Completion


class Scheduler:
    """Requests in flight: they wait, their prompts are fed (``filling``), they decode (``running``), and they end.

    ``max_sequences`` are inside at a time. ``most_blocks``: so many blocks of ``kv`` the pool may come to have.
    ``finds``: what was computed for one is found by others that begin alike. ``steady``: sequences are let in with all
    the room they may come to want, for who steps back is read again by other instructions."""

    def __init__(
        self,
        pool: BlockPool,
        kv: PagedKV,
        drafter: Drafter | None,
        *,
        max_sequences: int,
        most_blocks: int,
        finds: bool,
        steady: bool,
    ):
        self.pool, self.kv, self.max_sequences, self.most_blocks = pool, kv, max_sequences, most_blocks
        self.finds, self.steady, self.drafter = finds, steady, drafter
        self.counts: Counter[str] = Counter()
        self.hold = False
        """Where true, nothing new is let in."""
        self.requests: dict[int, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.filling: list[Sequence] = []
        self.running = Running(kv.device)
        self.cancelled: list[int] = []
        self.ended: dict[int, Completion] = {}  # and not yet handed out

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Tickets of requests that have begun: something of theirs is computed already, or is being."""
        filling = [m for s in self.filling for m in (s, *s.followers)]
        begun = [s for s in self.waiting if s.produced]  # they were pushed out
        return tuple(s.ticket for s in (*self.running.sequences, *filling, *begun))

    @property
    def load(self) -> dict[str, int]:
        """How many requests wait, are being read, and decode; blocks of the cache that are owned, known and there."""
        filling = len(self.filling) + sum(len(s.followers) for s in self.filling)
        owned = len(self.pool) - self.pool.free
        return {"waiting": len(self.waiting), "filling": filling, "running": len(self.running), "blocks": owned,
                "blocks_known": self.pool.known, "blocks_there": len(self.pool)}  # fmt: skip

    def queue(self, sequence: Sequence) -> None:
        """A new request."""
        self.requests[sequence.ticket] = sequence
        self._line_up(sequence)

    def _line_up(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def hand_out(self) -> dict[int, Completion]:
        """Completions of those that have ended since it was asked last."""
        ended, self.ended = self.ended, {}
        return ended

    # ------------------------------------------------------------ who goes in

    def admit(self) -> None:
        """Let those in that wait, in their order, while there is room."""
        prompts = self._prompts()
        while sequence := next((s for s in self.waiting if s.produced or not self.hold), None):
            inside = len(self.running) + sum(1 + len(s.followers) for s in self.filling)
            leader = None if sequence.resumed or sequence.anew else prompts.get(self._content(sequence))
            if inside >= self.max_sequences or not (leader or self._begin(sequence)):
                if not self._make_room(sequence):
                    return
                prompts = self._prompts()
                continue
            self.waiting.remove(sequence)
            if leader is not None:
                leader.followers.append(sequence)
            else:
                self.filling.append(sequence)
                if not sequence.resumed:
                    prompts[self._content(sequence)] = sequence

    def _prompts(self) -> dict[tuple[object, ...], Sequence]:
        """Those that others with the very same prompt may follow. Not who goes on: the token sampled last, which such a
        prompt has, is not fed with the others."""
        return {self._content(s): s for s in self.filling if not s.resumed}

    def _content(self, sequence: Sequence) -> tuple[object, ...]:
        return (*sequence.ids, *(key for _, _, key in sequence.image_spans))

    def _spans(self, sequence: Sequence) -> list[tuple[int, bytes]]:
        """What the keys and values of a sequence depend on beside the ids up to each, and where that begins."""
        return sequence.spans()

    def _begin(self, sequence: Sequence) -> bool:
        """Blocks for all it has to be fed; false where there are none."""
        keys: Sequence_[bytes] = ()
        if self.finds and not sequence.anew:
            keys = sequence.keys.extend(sequence.ids, self._spans(sequence))
            keys = keys[: (sequence.target - 1) // self.pool.block_tokens]  # a token is left, to say what comes next
        found = self.pool.match(keys)
        wanted = self.blocks_for(sequence.most if self.steady else sequence.target + 1) - len(found)
        if not self.have(wanted + (0 if self.steady else len(self.running))):
            alone = not (self.running.sequences or self.filling)
            if not (alone and self.have(wanted)):
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
        inside = () if self.steady else (*self.running.sequences, *self.filling)
        lower = [s for s in inside if -s.standing[0] < sequence.priority]
        if lower:
            self.push_out(lower)
        return bool(lower)

    def forked(self, leader: Sequence) -> list[Sequence]:
        """Those with the very same prompt: they share its full blocks and get a copy of the one that is not."""
        size, members = self.pool.block_tokens, []
        full = leader.fed // size
        sources, targets = [], []
        for member in leader.followers:
            wanted = self.blocks_for(member.most if self.steady else member.target + 1) - full
            if not self.have(wanted):
                self.wait_again(member)
                continue
            self.pool.share(leader.blocks[:full])
            own = self.pool.take(wanted)
            member.blocks, member.fed, member.known = leader.blocks[:full] + own, leader.fed, full
            member.keys.keys = list(leader.keys.keys[:full])
            member.cached_tokens = min(leader.fed, member.begun)
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

    def extend(self) -> Wanted:
        """Room for the next token of every running sequence, and for its drafts, of which it returns how many there are
        to be; who came last or matters least steps back if there is none."""
        run = self.running
        while True:
            wanted = Wanted.none(len(run)) if self.drafter is None else self.drafter.wanted(run)
            have = np.array([len(s.blocks) for s in run.sequences])
            need = -(-(run.fed + 1 + wanted.room) // self.pool.block_tokens) - have
            if self.have(int(need.clip(0).sum())):
                for row in np.flatnonzero(need > 0).tolist():
                    run.give(row, self.pool.take(int(need[row])))
                return wanted
            inside = [*run.sequences, *self.filling]
            assert len(inside) > 1, "a sequence alone fits, or submit refuses it"
            self.push_out(inside)

    # ------------------------------------------------------------ room

    def have(self, blocks: int) -> bool:
        """Whether so many blocks can be had; the cache grows for it before it forgets anything."""
        missing = blocks - self.pool.unknown
        if missing > 0 and len(self.pool) < self.most_blocks:
            wanted = min(max(len(self.pool) + missing, len(self.pool) * 3 // 2), self.most_blocks)
            self.kv.grow(wanted)  # first: memory may end here, and then there are no more than there were
            self.pool.grow(wanted)
        return self.pool.free >= blocks

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_tokens)

    def drop(self, sequence: Sequence) -> None:
        blocks, sequence.blocks, sequence.fed, sequence.known = sequence.blocks, [], 0, 0
        if sequence.reason == "sick":  # whatever made it so, nobody else is to find it
            self.pool.untell(blocks)
        self.pool.release(blocks)
        if sequence.reason == "sick":
            self.kv.wipe([block for block in blocks if not self.pool.owners[block]])

    def push_out(self, some: Iterable[Sequence]) -> None:
        """Whoever came last of those that matter least is put back, for others' sake. A prompt that several share
        matters as much as it does to the first of them."""
        victim = max(some, key=lambda s: s.standing)
        if victim in self.filling:
            self.put_back([victim])
        else:
            self.running.change(s for s in self.running.sequences if s is not victim)
            self.wait_again(victim)
        self.counts["preempted"] += 1

    def wait_again(self, sequence: Sequence) -> None:
        """What it has sampled is kept, and goes in again as a whole."""
        self.drop(sequence)
        sequence.resumed, sequence.stale = sequence.produced > 0, False
        if not sequence.resumed:
            sequence.cached_tokens = 0
        self._line_up(sequence)

    def put_back(self, filling: list[Sequence]) -> None:
        """Prompts that are half read, and those that wait for them."""
        self.filling = [s for s in self.filling if s not in filling]
        for sequence in filling:
            followers, sequence.followers = sequence.followers, []
            for member in (sequence, *followers):
                self.wait_again(member)

    def reread(self) -> None:
        """Everything in flight gives up its keys and values, and is read again, with what it has sampled."""
        self.put_back(self.filling)
        running = self.running.sequences
        self.running.change([])
        for sequence in running:
            self.wait_again(sequence)

    def begin_anew(self) -> None:
        """All requests wait, and the cache is empty, whatever state a failure left them in."""
        self.waiting, self.filling = [], []
        self.running.change([])
        self.pool.clear()
        self.kv.wipe(range(len(self.pool)))
        for sequence in list(self.requests.values()):
            sequence.blocks, sequence.followers = [], []
            del sequence.experts[max(sequence.produced - 1, 0) :]
            if sequence.reason:
                self._through(sequence)
            else:
                self.wait_again(sequence)

    def forget(self) -> None:
        """Nothing is found any more. Prompts that are half read begin again; who decodes has keys and values that
        nobody else is to find."""
        self.pool.forget()
        self.put_back([s for s in self.filling if s.fed])
        for sequence in self.requests.values():
            sequence.stale = sequence.fed > 0

    def abandon(self) -> None:
        """All requests are gone, and none has ended."""
        self.requests.clear()
        self.cancelled, self.ended = [], {}
        self.begin_anew()

    def tell(self, sequence: Sequence) -> None:
        """Blocks that have become full can be found from now on."""
        fed = sequence.fed if self.drafter is None else min(sequence.fed, sequence.headed)
        full = fed // self.pool.block_tokens
        if full <= sequence.known or sequence.stale or not self.finds:
            return
        keys = sequence.keys.extend(sequence.ids[: full * self.pool.block_tokens], self._spans(sequence))
        for n in range(sequence.known, full):
            self.pool.tell(sequence.blocks[n], keys[n])
        sequence.known = full

    # ------------------------------------------------------------ ends

    def give_up(self) -> None:
        """End what was cancelled."""
        cancelled, self.cancelled = self.cancelled, []
        for sequence in [self.requests[ticket] for ticket in dict.fromkeys(cancelled) if ticket in self.requests]:
            self.stop(sequence, "cancelled")

    def stop(self, sequence: Sequence, reason: str, retry: bool = False) -> None:
        """End it before its time, wherever it is; or let it begin again."""
        sequence.reason, sequence.retry = reason, retry
        if sequence in self.running.sequences:
            return self.collect()
        if sequence in self.filling:
            self.put_back([sequence])
        for place in (self.waiting, *(s.followers for s in self.filling)):
            if sequence in place:
                place.remove(sequence)
        self._through(sequence)

    def collect(self) -> None:
        """End those that are through."""
        ended = [s for s in self.running.sequences if s.reason]
        if ended:
            self.running.change(s for s in self.running.sequences if not s.reason)
        for sequence in ended:
            self._through(sequence)

    def _through(self, sequence: Sequence) -> None:
        """It ends, or begins again from its prompt where it is to be tried once more."""
        if not sequence.retry:
            return self._end(sequence)
        self.drop(sequence)
        sequence.begin_again()
        self.counts["retried"] += 1
        self._line_up(sequence)

    def _end(self, sequence: Sequence) -> None:
        self.drop(sequence)
        del self.requests[sequence.ticket]
        self.counts[sequence.reason] += 1
        self.ended[sequence.ticket] = sequence.completion()
