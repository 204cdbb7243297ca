"""What a shared beginning is worth: a group of rollouts of one prompt, the second turn of conversations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mmagent.trajectories import Trajectory
from tools.benchmarks.our_generation import Ours
from tools.benchmarks.row import Row, Settings, durations, throughputs, turns
from tools.benchmarks.their_generation import Peer, continuous
from tools.benchmarks.traffic import Requests, Size, equal, prompt, words


def group_rows(ours: Ours, peer: Peer, size: Size, settings: Settings) -> Iterator[Row]:
    """Rollouts of one prompt, with an image against ``generate``, of text against continuous batching, which computes
    the prompt once, too."""
    vocab, count, output = peer.vocab, size.group, size.output[1]
    for kind, images in (("image", 1), ("text", 0)):
        whole = prompt(size.shared, images, vocab, 0)
        group = Requests(tuple(_copy(whole, n) for n in range(count)), (output,) * count, 1.0)
        one = replace(group.chosen([0]), temperature=1.0)
        peer.choose(group)
        calls = {str(peer.way): partial(peer.batch, one, num_return_sequences=count)}
        name, mine = f"prefix, group of {count}, {kind}", partial(ours.generate, group)
        if images:
            yield from throughputs(name, mine, calls, group.tokens, "tokens/s", settings)
            continue
        with continuous(peer, one, share=True, copies=count) as served:
            calls["continuous batching"] = partial(served.generate, one)
            yield from throughputs(name, mine, calls, group.tokens, "tokens/s", settings)


def turn_rows(ours: Ours, peer: Peer, size: Size, settings: Settings) -> Iterator[Row]:
    """Only the second turn is timed. The answers of the first are part of it, on both sides their own; they are the
    same ones. Raises ``ValueError`` where those of the second differ."""
    count, first, second = size.turns
    for kind, images in (("image", 1), ("text", 0)):
        requests = equal(count, first, size.output[0], peer.vocab, images)
        more = [words(second, peer.vocab, 1000 + n) for n in range(count)]
        peer.choose(requests)
        calls: dict[str, Callable[[], tuple[float, list[list[int]]]]] = {
            f"{replace(peer.way, cache='dynamic')}, kept": partial(_their_second, peer, requests, more)
        }
        if not images:
            calls["continuous batching"] = partial(_batched_second, peer, requests, more)
        for name, call in calls.items():
            title = f"prefix, second turn of {count}, {kind}"
            found = turns([partial(_our_second, ours, requests, more), call], settings)
            if ours.generator.device.type == "cpu" and found[0][0][1] != found[1][0][1]:
                raise ValueError(f"{title}: {name} answers otherwise than ours")
            mine, theirs = ([spent for spent, _ in side] for side in found)
            yield durations(title, mine, theirs, name, 1.0, "s")


def _copy(whole: Trajectory, number: int) -> Trajectory:
    copy = Trajectory(f"{whole.key}-{number}", whole.source, whole.key)
    copy.extend(whole.input_ids, trainable=False, images=whole.images)
    return copy


def _our_second(ours: Ours, requests: Requests, more: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Seconds, and the answers."""
    talks = replace(requests, prompts=tuple(_copy(whole, n) for n, whole in enumerate(requests.prompts)))
    ours.generator.forget()
    answers = ours.generator.generate(talks.ours())
    for talk, answer, ids in zip(talks.prompts, answers, more, strict=True):
        talk.extend(answer.ids, trainable=True, logprobs=answer.logprobs)
        talk.extend(ids, trainable=False)
    started = time.perf_counter()
    done = ours.generator.generate(talks.ours())
    return time.perf_counter() - started, [list(answer.ids) for answer in done]


def _their_second(peer: Peer, requests: Requests, more: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Going on from the cache of the first turn; all rows are of one length, so nothing is padded within them."""
    peer.set_experts(peer.way)
    with torch.inference_mode():
        inputs = peer.inputs(requests.prompts)
        config = peer.config(requests, return_dict_in_generate=True)
        out = peer.model.generate(**inputs, generation_config=config)
        ids: Tensor = torch.cat([out.sequences, torch.tensor(more, device=peer.device)], dim=1)
        started = time.perf_counter()
        kept = out.past_key_values
        done = peer.model.generate(input_ids=ids, past_key_values=kept, generation_config=config).sequences
        answers = done[:, ids.shape[1] :].tolist()
    return time.perf_counter() - started, answers


def _batched_second(peer: Peer, requests: Requests, more: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Whole pages of the first turn are found again."""
    longer = replace(requests, outputs=tuple(2 * n + len(ids) for n, ids in zip(requests.outputs, more, strict=True)))
    with continuous(peer, longer, share=True) as served:
        answers = served.generate(requests)
        talks = tuple(_copy(whole, n) for n, whole in enumerate(requests.prompts))
        for talk, answer, ids in zip(talks, answers, more, strict=True):
            talk.extend([*answer, *ids], trainable=False)
        started = time.perf_counter()
        done = served.generate(replace(requests, prompts=talks))
        return time.perf_counter() - started, done
