"""Finished packs change ranks: all ranks deal what they brought by cost, and send one another what moves.

A stream deals the packs of a few ranks that plan alike before anything is decoded, at the price of planning for all of
them. Here it is the packs themselves that travel, in one exchange, so any number of ranks deals together, and packs
that nobody else could have planned, of trajectories that a rank has played, are dealt as well. What a step sums up
does not depend on who computed it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from mmagent import dist
from mmagent.balance import CostWeights, deal, max_over_mean
from mmagent.dist import World
from mmagent.packing import empty_pack
from mmagent.trajectories import PolicyBatch
from mmagent.types import PackedBatch, PackedVision, Segments

Batch = TypeVar("Batch", PackedBatch, PolicyBatch)
POLICY_TENSORS = (
    *("advantages", "behavior_logprobs", "reference_logprobs"),
    *("routed_experts", "old_logprobs", "old_values"),
)


class Hand(NamedTuple):
    """Who computes which packs: ``packs[r]`` are ``(home, place)`` of what rank r gets, heavy ones first: the rank that
    brought it, and which of its packs it is. ``before`` and ``after``: what ranks wait for over what all would take if
    they shared evenly (the heaviest rank's work, or that of the heaviest pack in every micro-batch, over the mean)."""

    packs: tuple[tuple[tuple[int, int], ...], ...]
    before: float
    after: float

    @property
    def moves(self) -> bool:
        """Whether any pack leaves its rank."""
        return any(home != rank for rank, own in enumerate(self.packs) for home, _ in own)


def deal_hands(costs: Sequence[Sequence[float]], min_gain: float = 0.02, meets: bool = False) -> Hand:
    """Deal the packs of ranks that bring these ``costs``, in numbers that may differ; no rank gets more than an equal
    share, rounded up. Where all bring as many and ranks would wait less by less than ``min_gain``, each keeps its own.

    Ranks wait for one another at the end of a step, for the one with most work; or, where they ``meets`` in every
    micro-batch, in each for the heaviest pack, whatever they do in all. Packs that are alike are then computed at one
    time: of the sorted ones the first go to the first micro-batch, which no other way to deal beats. Of the ways to
    give equal hands to ranks one is taken that leaves many packs where they are.
    """
    ranks, own = len(costs), [(home, place) for home, some in enumerate(costs) for place in range(len(some))]
    each = -(-len(own) // ranks)
    kept = [sorted(((home, n) for n in range(len(some))), key=lambda p: (-costs[p[0]][p[1]], p[1]))
            for home, some in enumerate(costs)]  # fmt: skip
    if meets:
        hands = _like_with_like(sorted(own, key=lambda p: (-costs[p[0]][p[1]], p)), costs)
    else:
        flat = [costs[home][place] for home, place in own] + [0.0] * (each * ranks - len(own))  # of empty packs
        hands = _near_home([[own[n] for n in hand if n < len(own)] for hand in deal(flat, ranks, 0.0)])
    total = sum(map(sum, costs))

    def uneven(hands: Sequence[Sequence[tuple[int, int]]]) -> float:
        loads = [[costs[home][place] for home, place in hand] for hand in hands]
        if not meets:
            return max_over_mean([sum(load) for load in loads])
        return sum(map(max, zip_longest(*loads, fillvalue=0.0))) * ranks / total if total > 0 else 1.0

    before, after = uneven(kept), uneven(hands)
    if len({len(some) for some in costs}) == 1 and after > before * (1 - min_gain):
        return Hand(tuple(map(tuple, kept)), before, before)
    return Hand(tuple(map(tuple, hands)), before, after)


def _like_with_like(
    heavy_first: Sequence[tuple[int, int]], costs: Sequence[Sequence[float]]
) -> list[list[tuple[int, int]]]:
    """Hands whose n-th packs are those of the n-th micro-batch: as many as there are ranks, neighbours in cost. In each
    a rank keeps one that it brought; what is left goes, heavy ones first, to those who have least so far."""
    ranks = len(costs)
    hands: list[list[tuple[int, int]]] = [[] for _ in costs]
    loads = [0.0] * ranks
    for start in range(0, len(heavy_first), ranks):
        stays: dict[int, tuple[int, int]] = {}
        leaves = [pack for pack in heavy_first[start : start + ranks] if stays.setdefault(pack[0], pack) != pack]
        takers = sorted((rank for rank in range(ranks) if rank not in stays), key=lambda rank: (loads[rank], rank))
        for rank, (home, place) in (*stays.items(), *zip(takers, leaves, strict=False)):
            hands[rank].append((home, place))
            loads[rank] += costs[home][place]
    return hands


def _near_home(hands: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Give each hand to a rank that brought much of it: the fullest matches first, the rest in order."""
    homes = [Counter(home for home, _ in own) for own in hands]
    matches = [(-count, hand, home) for hand, counter in enumerate(homes) for home, count in counter.items()]
    placed: dict[int, int] = {}
    taken: set[int] = set()
    for _, hand, home in sorted(matches):
        if hand not in taken and home not in placed:
            placed[home] = hand
            taken.add(hand)
    left = iter(n for n in range(len(hands)) if n not in taken)
    return [hands[placed[rank] if rank in placed else next(left)] for rank in range(len(hands))]


def deal_batches(
    batches: Sequence[Batch],
    world: World,
    weights: CostWeights,
    empty: Callable[[], Batch],
    min_gain: float = 0.02,
    meets: bool = False,
) -> tuple[list[Batch], dict[str, float]]:
    """This rank's share of the packs (on the host) that all ranks bring, as many on every rank (``empty()`` where packs
    are too few), and ``balance/...`` for the log, the same on every rank.

    ``meets``: whether ranks wait for one another in every micro-batch, as an engine's config says
    (``meets_in_micro_batches``). A collective. Packs stay where they are under context parallelism, whose ranks read
    theirs in common.
    """
    if world.size == 1 or world.context > 1:
        return list(batches), {}
    own = torch.tensor([weights(_stream(batch).cost()) for batch in batches], dtype=torch.float64)
    everyone = [some.tolist() for some in dist.gather_rows(own)]
    hand = deal_hands(everyone, min_gain, meets)
    most = max(map(len, hand.packs))
    metrics = {"balance/dealt_before": hand.before, "balance/dealt": hand.after}
    found = {(world.rank, place): batch for place, batch in enumerate(batches)}
    if hand.moves:
        found |= _trade(batches, hand, world)
    share = [found[key] for key in hand.packs[world.rank]]
    return share + [empty() for _ in range(most - len(share))], metrics


def _trade(batches: Sequence[Batch], hand: Hand, world: World) -> dict[tuple[int, int], Batch]:
    """The packs that come to this rank, by home and place."""
    going = [[key for key in hand.packs[rank] if key[0] == world.rank != rank] for rank in range(world.size)]
    coming = [key for key in sorted(hand.packs[world.rank]) if key[0] != world.rank]
    parcels = {place: to_bytes(batches[place]) for keys in going for _, place in keys}
    lengths = [parcels[n].numel() if n in parcels else 0 for n in range(len(batches))]
    sizes = [some.tolist() for some in dist.gather_rows(torch.tensor(lengths, dtype=torch.int64))]  # of none as well
    order = [place for keys in going for _, place in sorted(keys)]
    rows = torch.cat([parcels[place] for place in order]) if order else torch.empty(0, dtype=torch.uint8)
    sends = [sum(sizes[home][place] for home, place in keys) for keys in going]
    receives = [sum(sizes[home][place] for home, place in coming if home == rank) for rank in range(world.size)]
    came = dist.all_to_all(rows.to(world.device), sends, receives, None).cpu()
    parts = came.split([sizes[home][place] for home, place in coming]) if coming else ()
    return {key: from_bytes(part) for key, part in zip(coming, parts, strict=True)}


class Dealt(Iterator[list[PackedBatch]]):
    """A stream whose packs are dealt among all ranks, step by step. What it delivers is that of the stream, so its
    state is the stream's alone: list that among the parts of a run."""

    def __init__(self, stream: Any, world: World, weights: CostWeights, min_gain: float = 0.02, meets: bool = False):
        """``stream`` yields as many packs on every rank, and tells of them in ``metrics``. The others are those of
        :func:`deal_batches`."""
        self.stream, self.world, self.weights = stream, world, weights
        self.min_gain, self.meets = min_gain, meets
        self.metrics: dict[str, float] = {}

    def __next__(self) -> list[PackedBatch]:
        batches, metrics = deal_batches(
            next(self.stream), self.world, self.weights, lambda: empty_pack(0), self.min_gain, self.meets
        )
        self.metrics = {**self.stream.metrics, **metrics}
        return [batch.pin() for batch in batches] if self.world.device.type == "cuda" else batches


def _stream(batch: PackedBatch | PolicyBatch) -> PackedBatch:
    return batch.stream if isinstance(batch, PolicyBatch) else batch


def to_bytes(batch: PackedBatch | PolicyBatch) -> Tensor:
    """``(n,)`` uint8 on the host: everything that ``batch`` holds."""
    stream, tensors = _stream(batch), {}
    for name in ("input_ids", "labels", "positions", "visual_slots", "visual_index"):
        tensors[name] = getattr(stream, name)
    if stream.vision is not None:
        tensors |= {"patches": stream.vision.patches, "grids": stream.vision.grids}
    if isinstance(batch, PolicyBatch):
        for name in POLICY_TENSORS:
            tensors[name] = getattr(batch, name)
    facts = {
        "lengths": stream.segments.lengths,
        "sources": stream.sources,
        "keys": stream.keys,
        "tail": stream.tail,
        "prefix_of": stream.prefix_of,
    }
    tensors["facts"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    given = {name: tensor.contiguous().cpu() for name, tensor in tensors.items() if tensor is not None}
    return torch.frombuffer(bytearray(save(given)), dtype=torch.uint8)


def from_bytes(data: Tensor) -> Any:
    """What :func:`to_bytes` was given."""
    tensors = load(data.numpy().tobytes())
    facts = json.loads(tensors.pop("facts").numpy().tobytes())
    vision = PackedVision(tensors["patches"], tensors["grids"]) if "patches" in tensors else None
    stream = PackedBatch(
        input_ids=tensors["input_ids"],
        labels=tensors["labels"],
        positions=tensors["positions"],
        segments=Segments(facts["lengths"]),
        visual_slots=tensors["visual_slots"],
        vision=vision,
        sources=tuple(facts["sources"]),
        keys=tuple(facts["keys"]),
        visual_index=tensors.get("visual_index"),
        tail=facts["tail"],
        prefix_of=None if facts["prefix_of"] is None else tuple(facts["prefix_of"]),
    )
    if "advantages" not in tensors:
        return stream
    return PolicyBatch(stream, **{name: tensors.get(name) for name in POLICY_TENSORS})
