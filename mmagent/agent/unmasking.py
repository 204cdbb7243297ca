"""Ways to an answer: which of a model's own to learn from, and which to take more often.

A *way* is an answer with the step of its block that said each token. Two things are learnt from ways (Seed Diffusion,
arXiv 2508.02193): *order*, from those of many that the model itself finds likeliest, and *speed*, from right answers
that took few steps. Counting steps and pushing the count down is unstable, so ways are judged by how far apart their
states lie: a step that says much moves far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mmagent.dist import World, gather_ints
from mmagent.generation.generator import Generator
from mmagent.packing import Size, empty_pack, pack, plan_packs
from mmagent.trajectories import Completion, Limits, Trajectory, UnmaskingBatch

Judge = Callable[[Trajectory, Completion], float]
"""How right an answer is, in [0, 1]."""


@dataclass(frozen=True)
class Way:
    """``bound``: the mean log-probability, in nats a token, under which the tokens were said, each in the state that it
    was said in: this way's part of the bound on the likelihood. ``score`` is the judge's."""

    prompt: Trajectory
    completion: Completion
    bound: float
    score: float

    @property
    def key(self) -> str:
        return self.prompt.key


def explore(
    generator: Generator, prompts: Sequence[Trajectory], limits: Limits, each: int, judge: Judge | None = None
) -> list[list[Way]]:
    """``each`` ways to answers of every prompt, under seeds ``limits.seed`` and following; those that ended sick or
    empty are left out. Raises ``ValueError`` for a generator that says token by token, which has one way only."""
    if each < 1:
        raise ValueError(f"ways: {each} of each prompt is none")
    requests = [
        (prompt, replace(limits, seed=limits.seed + n * each + k))
        for n, prompt in enumerate(prompts)
        for k in range(each)
    ]
    done = generator.generate(requests)
    groups: list[list[Way]] = [[] for _ in prompts]
    for number, ((prompt, _), completion) in enumerate(zip(requests, done, strict=True)):
        if not completion.ids or completion.reason == "sick":
            continue
        if len(completion.revealed) != len(completion.ids):
            raise ValueError(f"{prompt.key}: no steps were recorded; ways are those of a generator that says blocks")
        bound = sum(completion.logprobs) / len(completion.ids)
        score = 1.0 if judge is None else judge(prompt, completion)
        groups[number // each].append(Way(prompt, completion, bound, score))
    return groups


def best(groups: Sequence[Sequence[Way]], keep: int, least: float = 0.0) -> list[Way]:
    """Of every group the ``keep`` likeliest of those judged better than ``least``, or of all where it is negative."""
    chosen = []
    for group in groups:
        right = [way for way in group if way.score > least]
        chosen += sorted(right, key=lambda way: -way.bound)[:keep]
    return chosen


def closeness(completion: Completion, block: int) -> float:
    """How close the states of a way lie to each other, in (0, 1]: the mean over pairs of states of a block of one over
    their distance in tokens, and over blocks. The states of a block are its masks and what stands after each step; what
    a step says is said in its place, so the distance of two states is the number of tokens said between them (what was
    revised counts where it was last said). One token a step gives the most; all at once one over a block's tokens."""
    found = []
    for at in range(0, len(completion.revealed), block):
        steps = torch.tensor(completion.revealed[at : at + block])
        said = steps.unique(return_counts=True)[1].cumsum(0).tolist()
        states = [0, *said]
        pairs = [1 / (b - a) for n, a in enumerate(states) for b in states[n + 1 :]]
        found.append(sum(pairs) / len(pairs))
    return sum(found) / len(found)


def speed_advantages(groups: Sequence[Sequence[Way]], block: int, weight: float) -> list[tuple[Way, float]]:
    """Of every way ``score * (1 - weight * closeness)``, less the mean of its group: what is wrong gains nothing by
    being fast. Groups in which all are equal teach nothing and are left out. Raises ``ValueError`` unless ``weight``
    lies in [0, 1): a right answer must be worth more than a wrong one, however slow."""
    if not 0 <= weight < 1:
        raise ValueError(f"ways: a weight of speed of {weight} must lie in [0, 1)")
    out = []
    for group in groups:
        worth = [way.score * (1 - weight * closeness(way.completion, block)) for way in group]
        if len(group) > 1 and max(worth) - min(worth) > 1e-9:
            mean = sum(worth) / len(worth)
            out += [(way, value - mean) for way, value in zip(group, worth, strict=True)]
    return out


def unmasking_batches(
    ways: Sequence[Way], budget: Size, *, image_id: int, merge_size: int, advantages: Sequence[float] | None = None
) -> list[UnmaskingBatch]:
    """Packs of prompts with their answers, within ``budget`` each. Answers alone are learnt, turns before them are not.
    Raises ``ValueError`` naming a way that no pack could hold."""
    documents = [_trajectory(way).document() for way in ways]
    batches = []
    for members in plan_packs(documents, budget) if documents else ():
        stream = pack([documents[n] for n in members], image_id=image_id, merge_size=merge_size)
        order = [step for n in members for step in _steps(ways[n])]
        worth = None
        if advantages is not None:
            worth = torch.tensor([advantages[n] for n in members for _ in range(len(documents[n]))])
        batches.append(UnmaskingBatch(stream, torch.tensor(order), worth))
    return batches


def level(batches: Sequence[UnmaskingBatch], world: World, pad_id: int) -> list[UnmaskingBatch]:
    """As many on every rank as the rank with the most has; packs of padding make up for it. A collective."""
    stream = empty_pack(pad_id)
    nothing = UnmaskingBatch(stream, torch.full_like(stream.labels, -1), torch.zeros(stream.labels.shape))
    return [*batches, *[nothing] * (max(gather_ints(len(batches), world.device)) - len(batches))]


def figures(groups: Sequence[Sequence[Way]], block: int) -> dict[str, float]:
    """Means over all ways: how many are ``right`` and how close their states lie; nothing of no ways."""
    ways = [way for group in groups for way in group]
    if not ways:
        return {}
    close = [closeness(way.completion, block) for way in ways]
    return {"right": sum(way.score for way in ways) / len(ways), "closeness": sum(close) / len(ways)}


def _steps(way: Way) -> list[int]:
    return [*[-1] * len(way.prompt), *way.completion.revealed]


def _trajectory(way: Way) -> Trajectory:
    out = Trajectory(way.key, way.prompt.source, way.prompt.group)
    out.extend(way.prompt.input_ids, trainable=False, images=way.prompt.images)
    out.extend(way.completion.ids, trainable=True, logprobs=way.completion.logprobs)
    return out
