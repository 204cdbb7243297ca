"""Decoding by blocks, for models that learnt by discrete diffusion: several tokens a forward, keys and values exact.

A sequence's answer is said block by block. The open block begins as masks; every forward looks at it behind the stored
past, and says what it is sure of, one token at least (Fast-dLLM, arXiv 2505.22618). When it is whole, it is read once
more as it is, in the same forward that opens the next block: then its keys and values are those that training saw, and
are never computed again. Prompts, pages of the cache, pushing out, cancelling and new weights are those of
:class:`~mmagent.generation.generator.Generator`, and :class:`~mmagent.generation.local.LocalPolicy` serves both.

A model whose tokens all see each other (LLaDA, arXiv 2502.09992) says blocks in the same way, left to right, but its
prompt sees what is said: nothing that was computed stays true, and every look computes all of it anew.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mmagent.generation.features import chunks
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.generation.runner import Piece, Runner
from mmagent.generation.running import Running
from mmagent.generation.sampling import sample, uniforms
from mmagent.generation.scheduler import Scheduler
from mmagent.generation.sequences import Sequence
from mmagent.models.agent_model import AgentModel
from mmagent.ops.block_attention import block_ids
from mmagent.trajectories import Limits, Trajectory
from mmagent.vocab import Vocab

ORDERS = ("sure", "random")
LONGEST = 1 << 16
"""Steps of a block that draws are numbered within."""
PICK = 3
"""The stream of draws that choose places, apart from those that choose tokens."""


@dataclass
class BlockConfig(GeneratorConfig):
    """``block`` tokens are open at a time; 0 for as many as the model learnt. A place is said at once where the chance
    of its token is ``threshold`` or more, and the surest of all in any case; above 1 one place a step. ``order``:
    ``random`` says one place a step, whichever. ``revise``: what the open block has said is looked at again with every
    forward, and replaced where the model is as sure of something else; a block that is whole gets so many forwards
    more, while they change it. Not with ``speculate``, ``steady`` and ``record_routing``."""

    block: int = 0
    threshold: float = 0.9
    order: str = "sure"
    revise: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 0 or self.revise < 0 or self.threshold <= 0:
            raise ValueError(
                f"generator: block {self.block} and revise {self.revise} must not be negative, threshold "
                f"{self.threshold} be positive"
            )
        if self.order not in ORDERS:
            raise ValueError(f"generator.order {self.order!r} is none of {', '.join(ORDERS)}")
        refused = [name for name in ("speculate", "steady", "record_routing") if getattr(self, name)]
        if refused:
            raise ValueError(f"generator: {' and '.join(refused)} cannot go with blocks that are said at once")


@dataclass
class _Open:
    """The block that a sequence is saying: ``ids (B,)`` with masks where nothing is said yet, and of what is said the
    log-prob and the step. ``looked``: forwards since it was whole. ``versions`` of the weights that looked at it;
    ``steps`` are those of all tokens before it."""

    ids: np.ndarray
    logprobs: np.ndarray
    step_of: np.ndarray
    step: int = 0
    looked: int = 0
    versions: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def make_generator(model: AgentModel, vocab: Vocab, config: GeneratorConfig | None = None) -> Generator:
    """The generator that says what ``model`` learnt to say: by blocks where it denoises, else token by token. Settings
    of a plain ``config`` hold for both. Raises ``ValueError`` for blocks of a model that never learnt any."""
    if model.config.denoises:
        own = config if isinstance(config, BlockConfig) else BlockConfig(**vars(config or GeneratorConfig()))
        return (WholeGenerator if model.config.bidirectional else BlockGenerator)(model, vocab, own)
    if isinstance(config, BlockConfig):
        raise ValueError("generator: this model says token by token (denoises 0); it learnt no blocks")
    return Generator(model, vocab, config)


class BlockRunner(Runner):
    """Reads what was said by blocks as training does: the tokens of a block see each other."""

    def __init__(self, plain: Runner, block: int):
        super().__init__(plain.model, plain.kv, plain.features, plain.steady)
        self.block = block

    def ends(self, sequence: Sequence) -> np.ndarray:
        """``(L,)``: the last place of the block of every token that a sequence has."""
        said = torch.ones(len(sequence.ids), dtype=torch.bool)
        said[: sequence.begun] = torch.tensor(sequence.prompt.trainable[: sequence.begun])
        blocks = block_ids(said, self.block).numpy()
        return np.searchsorted(blocks, blocks, side="right") - 1

    def reach(self, pieces: Sequence_[Piece]) -> np.ndarray | None:
        return np.concatenate([self.ends(s)[start:stop] for s, start, stop in pieces])

    def cut(self, sequence: Sequence, stop: int) -> int:
        """No block is torn apart: a piece ends before the one that does not fit, or behind it where it is the first."""
        ends = self.ends(sequence)
        if ends[stop - 1] == stop - 1:
            return stop
        begin = int(np.searchsorted(ends, ends[stop - 1]))
        return begin if begin > sequence.fed else int(ends[stop - 1]) + 1

    def spans(self, sequence: Sequence) -> list[tuple[int, bytes]]:
        """Pictures, and of every block of several tokens all it holds: its first token has seen its last."""
        ends, at, blocks = self.ends(sequence), 0, []
        while at < len(ends):
            stop = int(ends[at]) + 1
            if stop - at > 1:
                blocks.append((at, b"block" + np.asarray(sequence.ids[at:stop], dtype=np.int64).tobytes()))
            at = stop
        return sorted([*sequence.spans(), *blocks])


class WholeRunner(BlockRunner):
    """Reads a sequence as a model does whose tokens all see each other, to the last mask."""

    def reach(self, pieces: Sequence_[Piece]) -> np.ndarray | None:
        return np.concatenate([np.full(stop - start, stop - 1) for _, start, stop in pieces])


class BlockScheduler(Scheduler):
    """Who goes in and out while each says a block: ``opened`` are those blocks, by ticket."""

    def __init__(self, plain: Scheduler, runner: BlockRunner, opened: dict[int, _Open]):
        super().__init__(
            plain.pool, plain.kv, None, max_sequences=plain.max_sequences, most_blocks=plain.most_blocks,
            finds=plain.finds, steady=plain.steady,
        )  # fmt: skip
        self._runner, self._opened = runner, opened

    def wait_again(self, sequence: Sequence) -> None:
        """Whole blocks that it has said are read like a prompt; what is open stays as it is."""
        super().wait_again(sequence)
        sequence.resumed = False

    def abandon(self) -> None:
        self._opened.clear()
        super().abandon()

    def _content(self, sequence: Sequence) -> tuple[object, ...]:
        return (*super()._content(sequence), tuple(sequence.prompt.trainable), sequence.begun)

    def _spans(self, sequence: Sequence) -> list[tuple[int, bytes]]:
        return self._runner.spans(sequence)

    def _through(self, sequence: Sequence) -> None:
        opened = self._opened.pop(sequence.ticket, None)
        super()._through(sequence)
        if opened is not None and sequence.ticket in self.ended:
            done = self.ended[sequence.ticket]
            self.ended[sequence.ticket] = replace(done, revealed=tuple(opened.steps))


class BlockGenerator(Generator):
    """A :class:`Generator` that says blocks. A completion's ``revealed`` has the step of its block that said each
    token; its log-probs are those under which they were said. ``counts["looks"]`` are forwards of sequences: tokens
    sampled, divided by it, are tokens a forward."""

    whole = False
    """Whether it is for models whose tokens all see each other."""

    def __init__(self, model: AgentModel, vocab: Vocab, config: BlockConfig | None = None):
        config = config or BlockConfig()
        super().__init__(model, vocab, config)
        if model.config.bidirectional != self.whole:
            raise ValueError(
                f"generator: bidirectional is {model.config.bidirectional}, which {type(self).__name__} is not for; "
                f"make_generator takes the right one"
            )
        self.block = config.block or model.config.denoises
        if not self.block:
            raise ValueError(
                "generator.block: this model says token by token (recipes.diffusion teaches it blocks), so name a size"
            )
        self._settings = config
        self.runner = (WholeRunner if self.whole else BlockRunner)(self.runner, self.block)
        self._mask = vocab.pad_id
        self._open: dict[int, _Open] = {}
        self.scheduler = BlockScheduler(self.scheduler, self.runner, self._open)

    def submit(self, prompt: Trajectory, limits: Limits, *, priority: int = 0) -> int:
        """As :meth:`Generator.submit`. Blocks are counted from where an answer begins, so a prompt that ends within an
        answer must end with a whole block of it."""
        trailing = _trailing(prompt.trainable)
        if not self.whole and trailing % self.block:
            raise ValueError(
                f"{prompt.key}: the prompt ends with {trailing} tokens of an answer, no multiple of {self.block}"
            )
        last = len(prompt) + (limits.max_tokens - 1) // self.block * self.block  # where the last block begins
        more = self._until(prompt.trainable, last) - len(prompt)
        room = self.scheduler.most_blocks * self.pool.block_tokens
        if limits.max_tokens > 0 and len(prompt) + more > room:
            raise ValueError(
                f"{prompt.key}: {len(prompt)} tokens and {more} more, in whole blocks, do not fit the generator's "
                f"cache of {room}; raise cache_tokens"
            )
        return super().submit(prompt, limits, priority=priority)

    def _until(self, said: Sequence_[bool], has: int) -> int:
        """How many places a look has at a sequence of so many tokens, whose prompt ``said`` these."""
        return has + self.block

    def _first(self, sequences: list[Sequence], hidden_SD: Tensor) -> None:
        """Nothing is said by the prompt's last token; the first block opens with the next forward."""

    def _block_of(self, sequence: Sequence) -> _Open:
        if sequence.ticket not in self._open:
            self._open[sequence.ticket] = self._masks([])
        return self._open[sequence.ticket]

    def _masks(self, steps: list[int]) -> _Open:
        ids = np.full(self.block, self._mask, dtype=np.int64)
        return _Open(ids, np.zeros(self.block), np.full(self.block, -1), steps=steps)

    # ------------------------------------------------------------ a forward

    def _decode(self) -> None:
        """One look at every open block, behind the whole one before it where that is not stored yet."""
        run = self.scheduler.running
        self._room_for_blocks()
        if not len(run):
            return
        opened = [self._block_of(s) for s in run.sequences]
        pending = np.array([len(s.ids) - s.fed for s in run.sequences])
        history, counts = np.array([s.fed for s in run.sequences]), pending + self.block
        ids = [part for s, o in zip(run.sequences, opened, strict=True) for part in (s.ids[s.fed :], o.ids)]
        places = np.concatenate([np.arange(at, at + n) for at, n in zip(history, counts, strict=True)])
        shift = [s.following - s.begun for s in run.sequences]
        ends = [
            np.repeat([at + n - 1, at + n + self.block - 1], [n, self.block])
            for at, n in zip(history, pending, strict=True)
        ]
        fed = self.runner.decode(
            np.concatenate(ids).astype(np.int64), places + np.repeat(shift, counts), run.table, history, counts,
            np.concatenate(ends),
        )  # fmt: skip
        self.counts["looks"] += len(run)
        for sequence, more in zip(run.sequences, pending.tolist(), strict=True):
            sequence.fed += more
        last = (np.cumsum(counts)[:, None] - self.block + np.arange(self.block)).ravel()
        self._take_in(run, opened, fed.hidden[torch.from_numpy(last).to(self.device)])

    def _take_in(self, run: Running, opened: list[_Open], hidden_RD: Tensor) -> None:
        """What a look at all open blocks, ``(S * B, D)``, gave each."""
        tokens, logprobs = self._sampled(run, opened, hidden_RD)
        for row, sequence in enumerate(run.sequences):
            self._say(sequence, opened[row], tokens[row], logprobs[row])
            if sequence.reason != "sick":
                self.scheduler.tell(sequence)
        run.fed = np.array([s.fed for s in run.sequences], dtype=np.int64)

    def _places_of(self, sequence: Sequence) -> int:
        """Those of the next look at it. Its caller's trajectory may have grown meanwhile."""
        return self._until(sequence.prompt.trainable[: sequence.begun], len(sequence.ids))

    def _room_for_blocks(self) -> None:
        """Room for the open block of every running sequence; who came last or matters least steps back if there is
        none."""
        run = self.scheduler.running
        while True:
            wanted = [self.scheduler.blocks_for(self._places_of(s)) for s in run.sequences]
            need = np.array(wanted) - np.array([len(s.blocks) for s in run.sequences])
            if self.scheduler.have(int(need.clip(0).sum())):
                for row in np.flatnonzero(need > 0).tolist():
                    run.give(row, self.pool.take(int(need[row])))
                return
            inside = [*run.sequences, *self.scheduler.filling]
            assert len(inside) > 1, "a sequence alone fits, or submit refuses it"
            self.scheduler.push_out(inside)

    def _sampled(self, run: Running, opened: list[_Open], hidden_RD: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """``(S, B)`` a token for every place of every open block, and its log-prob: NaN where nothing is finite."""
        size = self.block
        scores, sick = self.runner.scores(hidden_RD, self._barred)
        places = np.array([len(s.ids) for s in run.sequences])[:, None] + np.arange(size)
        steps = np.array([o.step for o in opened])[:, None]
        uniform = uniforms(np.repeat(run.seeds, size), (places * LONGEST + steps).ravel())
        columns = [run.temperature, None, None, None]
        if run.narrowed:
            columns = [run.temperature, run.top_p, run.top_k, run.min_p]
        temperature, top_p, top_k, min_p = (None if c is None else c.repeat_interleave(size) for c in columns)
        assert temperature is not None
        drawn = torch.from_numpy(uniform).to(self.device)
        ids, logprobs = sample(scores, temperature, top_p, drawn, top_k, min_p)
        logprobs = logprobs.masked_fill(sick, float("nan"))
        return ids.cpu().numpy().reshape(-1, size), logprobs.cpu().numpy().astype(np.float64).reshape(-1, size)

    # ------------------------------------------------------------ what is said

    def _say(self, sequence: Sequence, opened: _Open, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Take in one look at the open block; end it where that made it whole."""
        hidden = opened.ids == self._mask
        if not np.isfinite(logprobs).all():
            self._watch(sequence, sequence.take([self._mask], [float("nan")], self.version))
            return
        if self.version not in opened.versions:
            opened.versions.append(self.version)
        new = self._places(sequence, opened, hidden, logprobs)
        changed = np.zeros_like(hidden)
        if self._settings.revise:
            sure = np.exp(logprobs) >= min(self._settings.threshold, 1.0)
            changed = ~hidden & (tokens != opened.ids) & sure
        for places in (new, changed):
            opened.ids[places] = tokens[places]
            opened.logprobs[places] = logprobs[places]
            opened.step_of[places] = opened.step
        opened.step += 1
        masks = np.flatnonzero(opened.ids == self._mask)
        if not len(masks) and self._settings.revise:
            opened.looked += not hidden.any()
            if opened.looked < self._settings.revise and (hidden.any() or changed.any()):
                return
        stops = np.flatnonzero(np.isin(opened.ids, sequence.limits.stop_ids))
        whole = int(masks[0]) if len(masks) else self.block
        if not len(masks) or (len(stops) and stops[0] < whole and not self._settings.revise):
            self._finish(sequence, opened, whole)

    def _places(self, sequence: Sequence, opened: _Open, hidden: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """``(B,)`` bool: those of the ``hidden`` places that are said now, one at least where there are any."""
        said = np.zeros_like(hidden)
        open_places = np.flatnonzero(hidden)
        if not len(open_places):
            return said
        if self._settings.order == "random":
            counter = len(sequence.ids) * LONGEST + opened.step
            draw = uniforms(np.array([sequence.limits.seed]), np.array([counter]), PICK)[0]
            said[open_places[int(draw * len(open_places))]] = True
            return said
        said[open_places] = np.exp(logprobs[open_places]) >= self._settings.threshold
        said[open_places[np.argmax(logprobs[open_places])]] = True
        return said

    def _finish(self, sequence: Sequence, opened: _Open, count: int) -> None:
        """The first ``count`` tokens of the block are said for good, by every version that looked at it."""
        for version in opened.versions[:-1]:
            if not sequence.versions or sequence.versions[-1] != version:
                sequence.versions.append(version)
        kept = sequence.take(opened.ids[:count].tolist(), opened.logprobs[:count].tolist(), self.version)
        self.tokens_sampled += kept
        self._watch(sequence, kept)
        steps = [*opened.steps, *opened.step_of[:kept].tolist()]
        self._open[sequence.ticket] = self._masks(steps)


def _trailing(said: Sequence_[bool]) -> int:
    """Tokens of an answer that a prompt ends with."""
    return next((n for n, flag in enumerate(reversed(said)) if not flag), len(said))


class WholeGenerator(BlockGenerator):
    """Blocks of a model whose tokens all see each other. The answer stands among as many places as it learnt
    (``denoises``), or a multiple of them; ``block`` of those are open, and later ones are masks. Nothing computed is
    kept but pictures: a look computes a whole sequence, ``prefill_tokens`` at a time where there are several.
    ``counts["looked"]``: tokens so computed."""

    whole = True

    def __init__(self, model: AgentModel, vocab: Vocab, config: BlockConfig | None = None):
        super().__init__(model, vocab, config)
        self.scheduler.finds = False

    def _until(self, said: Sequence_[bool], has: int) -> int:
        begin, span = len(said) - _trailing(said), self.model.config.denoises
        return begin + -(-(has + self.block - begin) // span) * span

    def _fill(self) -> None:
        """Nothing is read ahead: whoever is let in is looked at."""
        begun, self.scheduler.filling = self.scheduler.filling, []
        joined = [member for leader in begun for member in (leader, *self.scheduler.forked(leader))]
        for sequence in joined:
            sequence.resumed = False
        if joined:
            self.scheduler.running.change([*self.scheduler.running.sequences, *joined])

    def _decode(self) -> None:
        """One look at every open block, between all that was said and what is not open yet."""
        run = self.scheduler.running
        self._room_for_blocks()
        if not len(run):
            return
        opened = [self._block_of(s) for s in run.sequences]
        shown = [self._shown(s, o) for s, o in zip(run.sequences, opened, strict=True)]
        hidden = []
        for part in chunks(list(range(len(run))), lambda row: len(shown[row].ids), self.config.prefill_tokens):
            fed = self.runner.feed([Piece(shown[row], 0, len(shown[row].ids)) for row in part])
            starts = np.cumsum(fed.counts) - fed.counts + [len(run.sequences[row].ids) for row in part]
            hidden.append(fed.hidden[torch.from_numpy(starts[:, None] + np.arange(self.block)).ravel().to(self.device)])
            self.counts["looked"] += int(fed.counts.sum())
        self.counts["looks"] += len(run)
        self._take_in(run, opened, torch.cat(hidden))

    def _shown(self, sequence: Sequence, opened: _Open) -> Sequence:
        """The sequence with its open block and the masks behind it, in the pages that it owns."""
        later = self._places_of(sequence) - len(sequence.ids) - self.block
        return replace(sequence, ids=[*sequence.ids, *opened.ids.tolist(), *[self._mask] * later])
