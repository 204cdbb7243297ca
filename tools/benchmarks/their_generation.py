"""How transformers is asked for the same tokens: ``generate`` over padded batches, and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmagent.trajectories import Trajectory
from mmagent.vocab import Vocab
from tools.benchmarks.our_generation import Watched
from tools.benchmarks.row import seconds
from tools.benchmarks.traffic import Requests

T = TypeVar("T")
EXPERTS = ("grouped_mm", "eager")
"""Its third, ``batched_mm``, copies an expert's matrices for every token: 15 GB for the padded prompts of 32 requests.
On accelerators ``generate`` decodes by it of itself, where ``grouped_mm`` is asked for; not on CPUs."""
CACHES = ("dynamic", "static")
PAGE = 32
"""Tokens of a page of its paged cache: its default of 256 makes every short request read, and mask, mostly nothing."""
BATCH = 2048
"""Tokens that continuous batching runs at a time; its mask has as many rows, and what is in the cache for columns."""
PROBE = 24
"""Tokens a request that are enough to tell which way is faster."""


@dataclass(frozen=True)
class Way:
    """How ``generate`` is called: the implementation of experts (None for a model that has but its own), the cache, and
    in how many groups of like lengths."""

    experts: str | None = None
    cache: str = "dynamic"
    groups: int = 1

    def __str__(self) -> str:
        batches = "one batch" if self.groups == 1 else f"{self.groups} batches"
        return ", ".join(part for part in (f"generate, {batches}", self.experts, self.cache) if part)


class Steps:
    """A streamer that notes when each step's tokens came. ``generate`` hands it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def padded(prompts: Sequence[Trajectory], pad: int) -> dict[str, Tensor]:
    """Prompts as a batch, padded on the left. Without padding there is no mask, which is faster."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt.input_ids)
        mask[row, longest - len(prompt) :] = 1
    batch = {"input_ids": ids}
    if not bool(mask.all()):
        batch["attention_mask"] = mask
    images = [image for prompt in prompts for image in prompt.images]
    if images:
        batch["pixel_values"] = torch.cat([image.patches for image in images])
        batch["image_grid_thw"] = torch.tensor([image.grid for image in images])
    return batch


@dataclass
class Peer:
    """``model`` of transformers, and the fastest :class:`Way` that was found so far. ``autocast`` runs it in bf16 over
    its fp32 weights. ``tries``: runs of each way by which they are told apart; 0 takes the first."""

    model: nn.Module
    vocab: Vocab
    tries: int = 1
    way: Way = field(default_factory=Way)
    autocast: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_stock(self) -> bool:
        return hasattr(self.model, "set_experts_implementation") and not hasattr(self.model, "agent")

    def inputs(self, prompts: Sequence[Trajectory]) -> dict[str, Tensor]:
        batch = padded(prompts, self.vocab.pad_id)
        if self.is_stock and "pixel_values" in batch:  # by which the class finds its images
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.vocab.image_id).int()
        kept = next(self.model.parameters())
        return {name: x.to(kept.device, kept.dtype if x.is_floating_point() else None) for name, x in batch.items()}

    def config(self, requests: Requests, **how: Any) -> Any:
        """As a practitioner sets it for these requests; nothing ends before its length."""
        from transformers import GenerationConfig

        sampled = {"temperature": requests.temperature, "top_p": requests.top_p, "top_k": 0}
        how |= {"do_sample": True, **sampled} if requests.temperature else {"do_sample": False}
        return GenerationConfig(
            max_new_tokens=max(requests.outputs), pad_token_id=self.vocab.pad_id, eos_token_id=None, **how
        )

    def batch(self, requests: Requests, way: Way | None = None, streamer: Steps | None = None, **more: Any) -> Tensor:
        """``(B, most)``: what one batch is given, all rows as long as the longest."""
        way = way or self.way
        self.set_experts(way)
        inputs = self.inputs(requests.prompts)
        kinds = {} if way.cache == "dynamic" else {"cache_implementation": way.cache}
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            config = self.config(requests, **kinds, **more)
            out = self.model.generate(**inputs, generation_config=config, streamer=streamer)
        return out[:, inputs["input_ids"].shape[1] :]

    def set_experts(self, way: Way) -> None:
        if way.experts:
            self.model.set_experts_implementation(way.experts)

    def ways(self) -> list[Way]:
        """All that one batch can be run by."""
        caches = CACHES[:1] if self.autocast else CACHES  # a static one is made for the weights' type
        return [Way(experts, cache) for experts in (EXPERTS if self.is_stock else (None,)) for cache in caches]

    def watched(self, requests: Requests, arrivals: Sequence[float] = ()) -> Watched:
        """As :meth:`Ours.watched`. A batch cannot be joined: who arrives meanwhile waits, and is of the next one."""
        due = list(arrivals) or [0.0] * len(requests)
        started, waiting, first = time.perf_counter(), sorted(range(len(due)), key=lambda n: due[n]), {}
        prefill, before = 0.0, 0
        while waiting:
            time.sleep(max(started + due[waiting[0]] - time.perf_counter(), 0.0))
            batch = [n for n in waiting if due[n] <= time.perf_counter() - started]
            waiting = waiting[len(batch) :]
            steps = Steps()
            self.batch(requests.chosen(batch), streamer=steps)
            first |= {n: steps.times[1] - started - due[n] for n in batch}
            prefill, before = steps.times[1] - started, len(batch)
        spent = time.perf_counter() - started - prefill
        return Watched(tuple(first[n] for n in range(len(due))), prefill, spent, requests.tokens - before)

    def groups(self, requests: Requests, count: int) -> list[list[int]]:
        """Places of the requests of each batch: those that are given alike many tokens go together, as if somebody knew
        beforehand how long an answer will be."""
        order = sorted(range(len(requests)), key=lambda n: (requests.outputs[n], len(requests.prompts[n])))
        size = -(-len(order) // count)
        return [order[at : at + size] for at in range(0, len(order), size)]

    def generate(self, requests: Requests, way: Way | None = None) -> list[list[int]]:
        """Ids of every request, those cut off that nobody asked for."""
        way = way or self.way
        done: list[list[int]] = [[] for _ in requests.prompts]
        for places in self.groups(requests, way.groups):
            for n, ids in zip(places, self.batch(requests.chosen(places), way).tolist(), strict=True):
                done[n] = ids[: requests.outputs[n]]
        return done

    def choose(self, requests: Requests, counts: Sequence[int] = (1,)) -> dict[str, Way]:
        """Set :attr:`way` to the fastest on ``requests``; returns the candidates that were run whole, by their name.
        Experts and cache are chosen by a short run, the number of batches by whole ones."""
        short = requests.cut(PROBE)
        best = fastest({way: partial(self.generate, short, way) for way in self.ways()}, self.tries)
        ways = [replace(best, groups=count) for count in dict.fromkeys(counts)]
        self.way = fastest({way: partial(self.generate, requests, way) for way in ways}, self.tries, warm=False)
        return {str(way): way for way in dict.fromkeys((ways[0], self.way))}


def fastest(ways: Mapping[T, Callable[[], object]], tries: int, warm: bool = True) -> T:
    """By the best of so many runs, after one that pays for allocations (``warm``); the first where there are none."""
    times = dict.fromkeys(ways, 0.0)
    for way, call in ways.items() if len(ways) > 1 and tries else ():
        if warm:
            call()
        times[way] = min(seconds(call) for _ in range(tries))
    return min(times, key=lambda way: times[way])


# ---------------------------------------------------------------------------------------------- continuous batching


@dataclass(frozen=True)
class Continuous:
    """Its continuous batching, with its manager running. ``copies``: answers a prompt."""

    manager: Any
    copies: int = 1

    def generate(self, requests: Requests) -> list[list[int]]:
        return [list(answer.generated_tokens) for answer in self._serve(requests)]

    def watched(self, requests: Requests, arrivals: Sequence[float] = ()) -> Watched:
        """As :meth:`Ours.watched`, by its own clock of every token."""
        due, started = list(arrivals) or [0.0] * len(requests), time.perf_counter()
        times = [answer.timestamps for answer in self._serve(requests, due)]
        first = tuple(own[0] - started - at for own, at in zip(times, due, strict=True))
        ready, end = max(own[0] for own in times), max(own[-1] for own in times)
        after = sum(time > ready for own in times for time in own)
        return Watched(first, ready - started, end - ready, after)

    def _serve(self, requests: Requests, arrivals: Sequence[float] = ()) -> list[Any]:
        """Answers in the order of the requests, those of a prompt together. Raises ``RuntimeError`` with what its
        thread died of."""
        manager, started, names = self.manager, time.perf_counter(), []
        for n, (prompt, count) in enumerate(zip(requests.prompts, requests.outputs, strict=True)):
            if arrivals:
                time.sleep(max(started + arrivals[n] - time.perf_counter(), 0.0))
            names.append(manager.add_request(list(prompt.input_ids), max_new_tokens=count, record_timestamps=True))
        found: dict[str, Any] = {}
        while len(found) < len(names) * self.copies:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended early") from manager.background_thread_status.fatal_error
            if result is not None and result.error is not None:
                raise RuntimeError(f"continuous batching: {result.error}")
            if result is not None and result.is_finished():
                found[result.request_id] = result
        return [answer for name in names for key, answer in found.items() if key.partition("__child")[0] == name]


@contextmanager
def continuous(peer: Peer, requests: Requests, share: bool = False, copies: int = 1) -> Iterator[Continuous]:
    """With room for all of ``requests``. ``share``: equal beginnings of prompts are computed once; else nothing is
    looked for, which is faster where there is nothing to find."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    peer.set_experts(peer.way)
    pages = sum(-(-(len(p) + n) // PAGE) + 1 for p, n in zip(requests.prompts, requests.outputs, strict=True))
    rows = len(requests) * copies
    room = {"num_blocks": copies * pages, "max_batch_tokens": max(BATCH, rows), "max_requests_per_batch": rows}
    config = ContinuousBatchingConfig(page_size=PAGE, allow_block_sharing=share, **room)
    told = peer.config(requests, **({"num_return_sequences": copies} if copies > 1 else {}))
    told.eos_token_id = -1  # none, said so that it does not warn
    manager = peer.model.init_continuous_batching(told, config)
    manager.start()
    try:
        yield Continuous(manager, copies)
    finally:
        manager.stop(block=True)
        manager.destroy()


def batched(peer: Peer, requests: Requests) -> list[list[int]]:
    """One call of continuous batching."""
    with continuous(peer, requests) as served:
        return served.generate(requests)
