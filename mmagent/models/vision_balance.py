"""Encoder work that moves between ranks: whole images go to ranks with less to encode, their visual tokens come back.

Dealing packs evens out what ranks do in all, but the same pack may be heavy for the encoder and light for the decoder.
Here neighbouring ranks trade images before every forward (arXiv 2503.23830 and 2408.04275 do, too):

1. once a step they tell each other the sizes of their images (:meth:`VisionBalance.prepare`), and all make the same
   plan: the rank with most to encode gives an image to the one with least, again and again. An image is never split;
2. in the forward patches travel by one all-to-all, each rank encodes what it got, and a second all-to-all brings the
   embeddings back to their slots. In the backward gradients travel the other way, once.

Sums over ranks, so losses and gradients, are those of ranks that keep their images, but for the order of additions.
Every rank takes part in every exchange, with nothing to send, too: one without images encodes a blank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmagent import dist
from mmagent.balance import CostWeights
from mmagent.dist import World
from mmagent.types import Cost, PackedBatch, PackedVision, Ratio

MODES = ("off", "auto", "always")
Grid = tuple[int, int, int]


@dataclass
class VisionBalanceConfig:
    """``mode``: ``off``, ``always``, or ``auto``: a step's images move where that makes the step shorter by at least
    ``min_gain`` of what it takes, as the cost model predicts it. Groups of at most ``ranks`` neighbours trade (the
    largest number that divides all): the ranks of a node, where links are fast. ``operations_per_byte``: how many
    operations a rank does in the time in which it sends a byte; 0 takes 8000 on an accelerator (400 T/s over 50 GB/s)
    and 100 on a CPU (100 G/s over gloo's 1 GB/s)."""

    mode: str = "auto"
    ranks: int = 8
    min_gain: float = 0.02
    operations_per_byte: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"vision_balance.mode {self.mode!r} is none of {', '.join(MODES)}")
        if self.ranks < 1 or self.min_gain < 0 or self.operations_per_byte < 0:
            raise ValueError(f"vision_balance: ranks must be positive, the others not negative, got {self}")


@dataclass(frozen=True)
class Plan:
    """Who encodes what of one micro-batch: ``owners[r][n]`` encodes image ``n`` of rank ``r``. ``before`` and
    ``after``: each rank's encoder work in operations."""

    grids: tuple[tuple[Grid, ...], ...]
    owners: tuple[tuple[int, ...], ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def moves(self) -> bool:
        """Whether any image leaves its rank."""
        return any(owner != r for r, own in enumerate(self.owners) for owner in own)

    def patches(self, source: int, owner: int) -> int:
        """Patches of ``source`` that ``owner`` encodes."""
        return sum(_patches(g) for g, o in zip(self.grids[source], self.owners[source], strict=True) if o == owner)

    def most_moved(self) -> int:
        """Patches that the busiest rank sends or receives."""
        ranks = range(len(self.owners))
        table = [[self.patches(r, o) if r != o else 0 for o in ranks] for r in ranks]
        return max(chain(map(sum, table), map(sum, zip(*table, strict=True))), default=0)


def plan_images(grids: Sequence[Sequence[Grid]], weights: CostWeights) -> Plan:
    """Even out the encoder work of ranks whose images have these ``grids``, by few moves.

    The rank with most gives the one with least the image that brings both nearest to each other, until no image would
    make the heavier of two lighter. Never is a rank left with more work than the heaviest had, nor with more patches
    than the fullest had (its memory held those). All ranks get the same answer.
    """
    costs = [[_cost(grid, weights) for grid in own] for own in grids]
    before = tuple(sum(own) for own in costs)
    held = [sum(map(_patches, own)) for own in grids]
    owners = [[r] * len(own) for r, own in enumerate(grids)]
    hosted = [[_Image(cost, r, n) for n, cost in enumerate(own)] for r, own in enumerate(costs)]
    loads, room, enough = list(before), max(held, default=0), 0.01 * sum(before) / max(len(grids), 1)

    def best_gift(giver: int) -> tuple[_Image, int] | None:
        for taker in sorted(range(len(loads)), key=lambda r: (loads[r], r)):
            gap, space = loads[giver] - loads[taker], room - held[taker]
            if gap <= enough:
                return None
            fitting = [
                i for i in hosted[giver] if i.cost <= gap - enough and _patches(grids[i.rank][i.number]) <= space
            ]
            if fitting:
                return min(fitting, key=lambda i: (abs(gap / 2 - i.cost), i.rank, i.number)), taker
        return None

    while loads and (gift := best_gift(giver := loads.index(max(loads)))):
        image, taker = gift
        hosted[giver].remove(image)
        hosted[taker].append(image)
        owners[image.rank][image.number] = taker
        for rank, sign in ((giver, -1), (taker, 1)):
            loads[rank] += sign * image.cost
            held[rank] += sign * _patches(grids[image.rank][image.number])
    return Plan(tuple(map(tuple, grids)), tuple(map(tuple, owners)), before, tuple(loads))


class _Image(NamedTuple):
    cost: float
    rank: int
    number: int


def pays(
    plans: Sequence[Plan],
    text: Sequence[Sequence[float]],
    bytes_a_patch: float,
    rate: float,
    min_gain: float,
    meets: bool = False,
) -> bool:
    """Whether a step of ``plans`` becomes shorter by more than ``min_gain`` of itself; ``text``: the decoder's
    operations by micro-batch and rank, ``rate``: operations in the time that one byte takes.

    Without moves ranks wait for one another at the end of the step at the latest, so it takes as long as the rank with
    most work. With them they meet between encoder and decoder, too: the heaviest of each counts, and what travels.
    Ranks that ``meets`` in every layer (sharded ones) wait so without moves as well.
    """
    if meets:
        before = float(sum(max(plan.before) + max(own) for plan, own in zip(plans, text, strict=True)))
    else:
        totals = [sum(plan.before[r] + own[r] for plan, own in zip(plans, text, strict=True)) for r in _ranks(plans)]
        before = max(totals, default=0.0)
    after = sum(max(plan.after) + max(own) for plan, own in zip(plans, text, strict=True))
    travel = rate * bytes_a_patch * sum(plan.most_moved() for plan in plans)
    return after + travel < before * (1 - min_gain)


def _ranks(plans: Sequence[Plan]) -> range:
    return range(len(plans[0].before) if plans else 0)


class Exchange(NamedTuple):
    """One rank's part in a :class:`Plan`. ``send``: its images in order of their owners, ``sends[r]`` patches to rank
    r; ``receives[r]`` come from rank r, of images of ``grids``. ``back (V,)`` puts the visual tokens that return, in
    order of owners, in the order of the rank's own images."""

    send: tuple[int, ...]
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    grids: tuple[Grid, ...]
    back: Tensor


def exchange_of(plan: Plan, rank: int, merge_size: int) -> Exchange:
    """What ``rank`` does under ``plan``."""
    own, owners, ranks = plan.grids[rank], plan.owners[rank], range(len(plan.grids))
    send = sorted(range(len(own)), key=lambda n: owners[n])  # stable: images of one owner stay in order
    tokens = [_patches(grid) // merge_size**2 for grid in own]
    starts = [0] * len(own)  # of each image among the tokens that return
    at = 0
    for n in send:
        starts[n], at = at, at + tokens[n]
    back = [torch.arange(start, start + count) for start, count in zip(starts, tokens, strict=True)]
    return Exchange(
        tuple(send),
        tuple(plan.patches(rank, r) for r in ranks),
        tuple(plan.patches(r, rank) for r in ranks),
        tuple(g for r in ranks for g, o in zip(plan.grids[r], plan.owners[r], strict=True) if o == rank),
        torch.cat(back) if back else torch.empty(0, dtype=torch.int64),
    )


class VisionBalance:
    """The trade of images in one group of ranks: :meth:`prepare` plans a step, :meth:`encode` takes its micro-batches
    one after the other. Forwards without gradient (evaluation, generation) keep their images."""

    def __init__(
        self,
        group: ProcessGroup,
        config: VisionBalanceConfig,
        weights: CostWeights,
        merge_size: int,
        meets: bool = False,
    ):
        self.group, self.config, self.weights, self.merge_size = group, config, weights, merge_size
        self.meets = meets
        self.metrics: dict[str, Ratio] = {}
        """Of the forward done last, if it was one of a step, to be summed over ranks: encoder work of the heaviest rank
        over the mean, without moves (``balance/vision_before``) and as it was (``balance/vision``), and the share of
        patches that were encoded elsewhere (``balance/moved``)."""
        self._steps: deque[tuple[Plan, bool]] = deque()

    def prepare(self, batches: Sequence[PackedBatch], bytes_a_patch: float, device: torch.device) -> None:
        """Plan who encodes the images of a step's micro-batches. ``bytes_a_patch``: what it takes to send a patch and
        to get its embedding back. A collective: each rank of the group brings as many micro-batches."""
        known = _tell(batches, self.group, self.weights)
        plans = [plan_images(grids, self.weights) for grids, _ in known]
        rate = self.config.operations_per_byte or (8000.0 if device.type == "cuda" else 100.0)
        text = [work for _, work in known]
        go = self.config.mode == "always" or pays(plans, text, bytes_a_patch, rate, self.config.min_gain, self.meets)
        self._steps = deque((plan, go and plan.moves) for plan in plans)

    def encode(self, encode: Callable[[PackedVision | None], Tensor], patches: Tensor, grids: Tensor) -> Tensor | None:
        """``(V, D)`` embeddings of this rank's images, ``patches (P, C)`` of ``grids (I, 3)`` (both may be empty), or
        None where every rank of the group keeps its own. ``encode(None)`` encodes a blank.

        A collective, as is its backward: what it returns must take part in the loss, however little it is. Raises
        ``ValueError`` for other images than those that the step was prepared for.
        """
        self.metrics = {}
        if not self._steps or not torch.is_grad_enabled():
            return None
        (plan, go), rank = self._steps.popleft(), self.group.rank()
        own = _grids(grids)
        if plan.grids[rank] != own:
            raise ValueError(
                f"vision_balance: a forward over images of {own[:3]}..., but the step was prepared for "
                f"{plan.grids[rank][:3]}...: give train_step the micro-batches in their order"
            )
        self.metrics = _metrics(plan, go, rank, patches.device)
        if not go:
            return None
        part, block = exchange_of(plan, rank, self.merge_size), self.merge_size**2
        images = patches.split([_patches(grid) for grid in own]) if own else ()
        leaving = torch.cat([images[n] for n in part.send]) if own else patches
        came = dist.all_to_all(leaving, part.sends, part.receives, self.group)
        visual = encode(PackedVision(came, torch.tensor(part.grids)) if part.grids else None)
        if not part.grids:
            visual = visual[:0]  # nobody wants the blank; the encoder's parameters get a gradient of zero from it
        sends, receives = ([n // block for n in patches_of] for patches_of in (part.receives, part.sends))
        back = dist.all_to_all(visual, sends, receives, self.group)
        return back.index_select(0, part.back.to(back.device))


def balance_vision(
    config: VisionBalanceConfig, world: World, weights: CostWeights, merge_size: int, meets: bool = False
) -> VisionBalance | None:
    """The trade of ``config`` in this world, or None where there is nobody to trade with. Called by all ranks.

    ``weights`` are operations (:func:`mmagent.models.flops.cost_weights`); ``meets``: whether ranks wait for one
    another in every micro-batch anyway, as an engine's config says (``meets_in_micro_batches``). Raises ``ValueError``
    where ``always`` meets context parallelism: the ranks of a context share their images already, and others do not
    trade with them.
    """
    if config.mode == "always" and world.context > 1:
        raise ValueError(
            f"vision_balance.mode always with context_parallel {world.context}: the ranks of a context share the "
            f"images of their packs already; leave it at auto or off"
        )
    ranks = max(n for n in range(1, min(config.ranks, world.size) + 1) if world.size % n == 0)
    if config.mode == "off" or world.context > 1 or ranks == 1:
        return None
    # a group of its own even where it holds all ranks: gradients are reduced meanwhile, in another order on each
    group = world.mesh({"nodes": world.size // ranks, "images": ranks}).get_group("images")
    return VisionBalance(group, config, weights, merge_size, meets)


def _tell(
    batches: Sequence[PackedBatch], group: ProcessGroup, weights: CostWeights
) -> list[tuple[list[list[Grid]], list[float]]]:
    """By micro-batch, what all ranks bring: the grids of their images, and their decoders' work. A collective."""
    rows = []
    for n, batch in enumerate(batches):
        cost = batch.cost()
        rows.append((n, 0, cost.tokens_squared, cost.tokens))  # no image has zero frames
        rows += [(n, *grid) for grid in ([] if batch.vision is None else batch.vision.grids.tolist())]
    everyone = dist.gather_rows(torch.tensor(rows), group)
    grids: list[list[list[Grid]]] = [[[] for _ in everyone] for _ in batches]
    text = [[0.0] * len(everyone) for _ in batches]
    for rank, told in enumerate(everyone):
        for n, frames, *rest in told.tolist():
            if n >= len(batches):
                raise ValueError(f"rank {rank} of the group brings more than {len(batches)} micro-batches to the step")
            if frames:
                grids[n][rank].append((frames, rest[0], rest[1]))
            else:
                text[n][rank] = weights.text(Cost(0, 0, *rest))
    return list(zip(grids, text, strict=True))


def _metrics(plan: Plan, moved: bool, rank: int, device: torch.device) -> dict[str, Ratio]:
    after = plan.after if moved else plan.before
    patches = sum(map(_patches, plan.grids[rank]))
    away = patches - plan.patches(rank, rank) if moved else 0

    def ratio(numerator: float, denominator: float) -> Ratio:
        return Ratio(*torch.tensor([numerator, denominator], dtype=torch.float64).to(device).unbind())

    return {
        "balance/vision_before": ratio(max(plan.before), plan.before[rank]),
        "balance/vision": ratio(max(after), after[rank]),
        "balance/moved": ratio(away, patches),
    }


def _grids(grids: Tensor) -> tuple[Grid, ...]:
    return tuple((frames, rows, columns) for frames, rows, columns in grids.tolist())


def _patches(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _cost(grid: Grid, weights: CostWeights) -> float:
    frames, rows, columns = grid
    return weights.vision(Cost(frames * (rows * columns) ** 2, _patches(grid), 0, 0))
