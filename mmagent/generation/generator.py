"""Decoding in the trainer's own process: continuous batching over one key-value cache.

Prompts are trajectories, taken as they are: their ids, their pixels. Equal prompts (a group of rollouts) are run
through the model once and share what it computed; an image is encoded once while the weights stand. A trajectory
that comes back longer (a later turn of an episode) goes on from the cache it left.

A change of the model's weights is noticed by itself: everything computed before is then forgotten.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmagent.generation.cache import (
    ExtendAttention,
    KVCache,
    LeadingRows,
    PromptAttention,
    StepAttention,
    round_up,
)
from mmagent.generation.rows import Request, Rows
from mmagent.generation.sampling import sample, uniforms
from mmagent.geometry import document_positions
from mmagent.models.agent_model import AgentModel, logits
from mmagent.trajectories import Completion, Limits, Status, Trajectory
from mmagent.types import PackedVision, PatchedImage, Segments
from mmagent.vocab import Vocab

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADROOM = 64
"""Places for sampled tokens that a cache starts with; it grows by half when they are used up."""
BURST = 8
"""Tokens a sequence that one step decodes: under autocast every step casts the weights anew."""
COMPACT_BELOW = 0.75
"""Finished sequences are carved out of the batch when fewer than this share is left."""
STEADY_ROWS = 32
"""Decoded rows come in multiples of this where they are to be steady: CPUs compute fewer than 4, and what is left over
by their vectors, by other instructions. So it is at the end of what each thread gets, wherever that falls: they are
computed by one (compared bit for bit in float32 and bfloat16 with AVX-512 and oneMKL)."""
STEADY_EXPERTS = 32
"""With more, products of experts run in a kernel that knows no least number of rows."""


@dataclass
class GeneratorConfig:
    """``max_sequences`` are decoded at a time; others wait. ``prefill_tokens`` bounds one forward over prompts,
    ``parked_tokens`` the places kept for trajectories that may go on (0: none). ``record_routing`` returns the
    experts that served every sampled token but the last, which is not fed (-1 there).

    ``steady``: what a sequence gets depends on itself alone, to the last bit, and not on who else is decoded or in
    which order they came. Prompts and images are run one at a time, and nothing is parked: a later turn runs its whole
    trajectory anew, all on one thread. It is what CPUs are known to keep; elsewhere it is refused."""

    max_sequences: int = 256
    prefill_tokens: int = 16384
    parked_tokens: int = 1 << 19
    dtype: str = "float32"
    record_routing: bool = False
    steady: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"generator dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if min(self.max_sequences, self.prefill_tokens) < 1 or self.parked_tokens < 0:
            raise ValueError(f"generator: sizes must be positive, got {self}")


@dataclass(frozen=True)
class _Parked:
    """Where a trajectory's first ``ids`` lie: row ``row`` of ``cache``."""

    cache: KVCache
    row: int
    ids: list[int]
    images: int


@dataclass(frozen=True)
class _Prompt:
    """New tokens of one row: ``ids (n,)``, ``positions (3, n)``, their images, and the position that comes next."""

    ids: Tensor
    positions: Tensor
    images: tuple[PatchedImage, ...]
    following: int


class Generator:
    """``generate`` completes prompts and returns; ``submit`` and ``step`` do the same piece by piece.

    Log-probabilities are those of the distribution that is sampled from, before ``top_p``: at the request's
    temperature (1 for greedy), with ``barred`` ids impossible. A trainer that passes the same temperature and
    barred ids to :func:`~mmagent.ops.selected_logprobs` recomputes them.
    """

    def __init__(self, model: AgentModel, vocab: Vocab, config: GeneratorConfig | None = None):
        self.model, self.config = model, config or GeneratorConfig()
        self.image_id, self.merge_size = model.config.image_id, model.encoder.merge_size
        self.barred = vocab.barred(model.config.vocab_size)
        self._barred = torch.tensor(self.barred, device=self.device)
        if self.config.steady:
            self._require_steady()
        self.tokens_sampled = 0
        self._routing = (model.config.decoder.moe_layers, model.config.decoder.moe.top_k)
        self._routing = self._routing if self.config.record_routing and self._routing[0] else (0, 0)
        self._waiting: list[Request] = []
        self._rows: Rows | None = None
        self._tickets = 0
        self._weights: tuple[int, ...] = ()
        self._features: dict[int, tuple[weakref.ref[PatchedImage], Tensor]] = {}
        self._parked: weakref.WeakKeyDictionary[Trajectory, _Parked] = weakref.WeakKeyDictionary()

    @property
    def _at_once(self) -> int:
        """Tokens that one forward over prompts may have; one thing alone always may."""
        return 1 if self.config.steady else self.config.prefill_tokens

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    # ------------------------------------------------------------ interface

    def generate(self, requests: Sequence[tuple[Trajectory, Limits]]) -> list[Completion]:
        """Complete every prompt; answers in the order of ``requests``.

        Raises ``ValueError`` naming a prompt that is empty, has ended, or whose images and visual slots disagree.
        """
        order = [self.submit(prompt, limits) for prompt, limits in requests]
        done: dict[int, Completion] = {}
        while self.busy:
            done.update(self.step())
        return [done[ticket] for ticket in order]

    def submit(self, prompt: Trajectory, limits: Limits) -> int:
        """Queue one prompt; its ticket comes back from :meth:`step` with the completion."""
        if not prompt.input_ids or prompt.status is not Status.RUNNING:
            raise ValueError(f"{prompt.key}: cannot complete a trajectory that is empty or {prompt.status.value}")
        if limits.max_tokens < 1 or limits.temperature < 0 or not 0 < limits.top_p <= 1:
            raise ValueError(f"{prompt.key}: {limits} cannot be sampled")
        self._tickets += 1
        self._waiting.append(Request(self._tickets, prompt, limits, len(prompt)))
        return self._tickets

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self._rows is not None

    def abandon(self) -> None:
        """Give up everything queued and in flight."""
        self._waiting, self._rows = [], None
        self.forget()

    def forget(self) -> None:
        """Drop cached features and parked sequences. A change of weights does this by itself."""
        self._features.clear()
        self._parked.clear()

    def step(self) -> dict[int, Completion]:
        """Admit waiting prompts if there is room, then decode a few tokens a sequence. Returns what has ended."""
        with self._inference():
            active = len(self._rows) if self._rows is not None else 0
            if self._waiting and (room := self.config.max_sequences - active) > 0:
                admitted, self._waiting = self._waiting[:room], self._waiting[room:]
                rows = self._admit(admitted)
                self._rows = rows if self._rows is None else Rows.join(self._rows, rows)
            done = self._collect()
            for _ in range(BURST):
                if self._rows is not None:
                    self._decode(self._rows)
                    done.update(self._collect())
            return done

    # ------------------------------------------------------------ internals

    def _require_steady(self) -> None:
        experts = self.model.config.decoder.moe.experts
        if self.device.type != "cpu" or experts > STEADY_EXPERTS:
            raise ValueError(
                f"generator.steady: known of CPUs and up to {STEADY_EXPERTS} experts, not of {self.device.type} and "
                f"{experts}; leave it false"
            )

    def _full(self, x: Tensor, value: float = 0.0) -> Tensor:
        """``(S, ...)`` with rows added that nobody reads, where sequences are to be steady."""
        missing = -x.shape[0] % STEADY_ROWS if self.config.steady else 0
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing), value=value) if missing else x

    @contextmanager
    def _inference(self) -> Iterator[None]:
        weights = tuple(x._version for x in (*self.model.parameters(), *self.model.buffers()))
        if weights != self._weights:
            self._require_whole_weights()
            assert self._rows is None, "the weights changed while sequences were being decoded"
            self.forget()
            self._weights = weights
        dtype = DTYPES[self.config.dtype]
        threads = torch.get_num_threads()
        if self.config.steady and threads > 1:
            torch.set_num_threads(1)
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    def _require_whole_weights(self) -> None:
        """Ranks that share weights would have to decode in step, and wait for ever for the first that is done."""
        shared = [
            name
            for name, p in self.model.named_parameters()
            if hasattr(p, "ds_tensor") or (isinstance(p, DTensor) and p.device_mesh.size() > 1)  # ZeRO-3, FSDP2
        ]
        if shared:
            raise ValueError(
                f"{shared[0]} (and {len(shared) - 1} more) is shared by ranks: generate from a whole copy of the model"
            )

    def _admit(self, requests: Sequence[Request]) -> Rows:
        """Run prompts through the model and sample the first token of each."""
        again = [request for request in requests if self._resumable(request.prompt)]
        fresh = [request for request in requests if not self._resumable(request.prompt)]
        parts = []
        if fresh:
            parts.append(self._start(fresh))
        if again:
            parts += [self._resume(again[at : at + 256]) for at in range(0, len(again), 256)]
        rows = parts[0][0]
        for part, _ in parts[1:]:
            rows = Rows.join(rows, part)
        self._sample(rows, torch.cat([hidden for _, hidden in parts]))
        return rows

    def _resumable(self, prompt: Trajectory) -> bool:
        parked = self._parked.get(prompt)
        known = parked is not None and len(prompt) > len(parked.ids)
        return known and prompt.input_ids[: len(parked.ids)] == parked.ids

    def _start(self, requests: Sequence[Request]) -> tuple[Rows, Tensor]:
        """Prompts without history: equal ones run once, many in one packed forward."""
        number: dict[tuple[object, ...], int] = {}
        distinct: list[_Prompt] = []
        index = []
        for request in requests:
            prompt = request.prompt
            key = (*prompt.input_ids, *map(id, prompt.images))
            if key not in number:
                number[key] = len(distinct)
                distinct.append(self._prompt(prompt, 0, 0))
            index.append(number[key])
        longest = max(prompt.ids.shape[0] for prompt in distinct)
        caches, hidden = [], []
        for prompts in _chunks(distinct, lambda prompt: prompt.ids.shape[0], self._at_once):
            segments = Segments([prompt.ids.shape[0] for prompt in prompts], self.device)
            cache = KVCache(torch.zeros(len(prompts), dtype=torch.int64, device=self.device), longest)
            hidden.append(self._prefill(prompts, segments, PromptAttention(cache, segments)))
            cache.advance(torch.tensor(segments.lengths, device=self.device), segments.longest)
            caches.append(cache)
        rows = torch.tensor(index, device=self.device)
        cache = KVCache.join(caches).select(rows, self._capacity(longest, requests))
        following = torch.tensor([distinct[n].following for n in index], device=self.device)
        return Rows.start(requests, cache, following, self._routing), torch.cat(hidden)[rows]

    def _resume(self, requests: Sequence[Request]) -> tuple[Rows, Tensor]:
        """Prompts that continue what lies in parked rows."""
        parked = [self._parked.pop(request.prompt) for request in requests]
        order = sorted(range(len(parked)), key=lambda n: id(parked[n].cache))
        requests, parked = [requests[n] for n in order], [parked[n] for n in order]
        longest = max(len(request.prompt) for request in requests)
        capacity = self._capacity(longest, requests)
        caches = []
        for owner in dict.fromkeys(entry.cache for entry in parked):
            members = [entry for entry in parked if entry.cache is owner]
            part = owner.select(torch.tensor([entry.row for entry in members], device=self.device), capacity)
            part.lengths = torch.tensor([len(entry.ids) for entry in members], device=self.device)
            caches.append(part)
        cache = KVCache.join(caches)
        cache.longest = max(len(entry.ids) for entry in parked)
        prompts = [self._prompt(r.prompt, len(p.ids), p.images) for r, p in zip(requests, parked, strict=True)]
        segments = Segments([prompt.ids.shape[0] for prompt in prompts], self.device)
        attend = ExtendAttention(cache, segments)
        hidden = self._prefill(prompts, segments, attend)
        cache.advance(attend.counts, attend.reach)
        following = torch.tensor([prompt.following for prompt in prompts], device=self.device)
        return Rows.start(requests, cache, following, self._routing), hidden

    def _capacity(self, longest: int, requests: Sequence[Request]) -> int:
        return round_up(longest + min(max(request.limits.max_tokens for request in requests), HEADROOM))

    def _prompt(self, prompt: Trajectory, tokens: int, images: int) -> _Prompt:
        """What of ``prompt`` lies behind its first ``tokens`` tokens and ``images`` images."""
        ids = torch.tensor(prompt.input_ids)
        try:
            positions = document_positions(
                ids == self.image_id, [image.grid for image in prompt.images], self.merge_size
            )
        except ValueError as error:
            raise ValueError(f"{prompt.key}: {error}") from error
        new = tuple(prompt.images[images:])
        return _Prompt(ids[tokens:], positions[:, tokens:], new, int(positions.max()) + 1)

    def _prefill(
        self, prompts: Sequence[_Prompt], segments: Segments, attend: PromptAttention | ExtendAttention
    ) -> Tensor:
        """``(S, D)``: hidden state of the last token of every prompt."""
        ids = torch.cat([prompt.ids for prompt in prompts]).to(self.device)
        positions = torch.cat([prompt.positions for prompt in prompts], dim=1).to(self.device)
        embeddings = self.model.embed_tokens(ids)
        visual = self._encode([image for prompt in prompts for image in prompt.images])
        if visual is not None:
            slots = (ids == self.image_id).nonzero().squeeze(1)
            embeddings = embeddings.index_copy(0, slots, visual.to(embeddings.dtype))
        hidden = self.model.hidden(embeddings, positions, attend)
        return hidden[segments.cu_seqlens[1:].long() - 1]

    def _encode(self, images: Sequence[PatchedImage]) -> Tensor | None:
        """Merged visual tokens of all images in order; each distinct image is encoded once."""
        if not images:
            return None
        missing = list({id(image): image for image in images if id(image) not in self._features}.values())
        unit = self.merge_size**2
        for part in _chunks(missing, lambda image: image.patches.shape[0], self._at_once * unit):
            visual = self.model.encode(PackedVision.pack(part).to(self.device))
            sizes = [image.patches.shape[0] // unit for image in part]
            for image, tokens in zip(part, visual.split(sizes), strict=True):
                self._features[id(image)] = (weakref.ref(image, self._forgetter(id(image))), tokens)
        return torch.cat([self._features[id(image)][1] for image in images])

    def _forgetter(self, key: int) -> object:
        features = weakref.ref(self)

        def forget(_: object) -> None:
            generator = features()
            if generator is not None:
                generator._features.pop(key, None)

        return forget

    def _decode(self, rows: Rows) -> None:
        """One token for every sequence."""
        cache = rows.cache
        if cache.longest + 1 > cache.capacity:
            everything = torch.arange(len(rows), device=self.device)
            cache = rows.cache = cache.select(everything, round_up(cache.capacity * 3 // 2))
        attend = LeadingRows(StepAttention(cache, self.config.steady), len(rows))
        positions = self._full(rows.positions).expand(3, -1)
        out = self.model.decoder(self.model.embed_tokens(self._full(rows.last)), positions, attend)
        if self._routing[0]:
            rows.record_experts(out.routed()[: len(rows)])
        living = torch.from_numpy(rows.alive).to(self.device)
        cache.advance(living, cache.longest + 1)
        rows.positions = rows.positions + living
        self._sample(rows, out.hidden[: len(rows)])

    def _sample(self, rows: Rows, hidden_SD: Tensor) -> None:
        scores = logits(self.model, self._full(hidden_SD))
        scores.index_fill_(1, self._barred, float("-inf"))
        uniform = torch.from_numpy(uniforms(rows.seeds, rows.counters())).to(self.device)
        narrowed = any(request.limits.top_p < 1 for request in rows.requests)
        top_p = self._full(rows.top_p, 1.0) if narrowed else None
        ids, logprobs = sample(scores, self._full(rows.temperature, 1.0), top_p, self._full(uniform))
        self.tokens_sampled += int(rows.alive.sum())
        rows.record(ids[: len(rows)], logprobs[: len(rows)])

    def _collect(self) -> dict[int, Completion]:
        """Completions of the rows that have just ended; the rest moves together when enough have left."""
        rows = self._rows
        if rows is None or rows.alive.all():
            return {}
        done: dict[int, Completion] = {}
        for row in np.flatnonzero(~rows.alive & ~rows.told):
            request, completion = rows.requests[row], rows.completion(row)
            done[request.ticket] = completion
            if self.config.parked_tokens and not self.config.steady:
                ids = [*request.prompt.input_ids[: request.length], *completion.ids[:-1]]
                self._parked[request.prompt] = _Parked(rows.cache, int(row), ids, len(request.prompt.images))
        rows.told = ~rows.alive
        living = np.flatnonzero(rows.alive)
        if not living.size:
            self._rows = None
            self._evict()
        elif living.size < COMPACT_BELOW * len(rows):
            self._rows = rows.select(living, rows.cache.capacity)
        return done

    def _evict(self) -> None:
        """Keep the newest parked trajectories that fit the budget; those that have ended go first."""
        for prompt in [p for p in self._parked if p.status is not Status.RUNNING]:
            del self._parked[prompt]
        owners = dict.fromkeys(entry.cache for entry in reversed(list(self._parked.values())))
        room = self.config.parked_tokens
        for cache in owners:
            room -= cache.rows * cache.capacity
            if room < 0:
                for prompt in [p for p, entry in self._parked.items() if entry.cache is cache]:
                    del self._parked[prompt]


def _chunks(things: Sequence[T], size: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Consecutive runs of things whose sizes add up to at most ``budget``, at least one thing each."""
    run: list[T] = []
    total = 0
    for thing in things:
        if run and total + size(thing) > budget:
            yield run
            run, total = [], 0
        run.append(thing)
        total += size(thing)
    if run:
        yield run
