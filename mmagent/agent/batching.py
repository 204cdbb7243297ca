"""Groups of trajectories to packs for the policy-gradient objective, under two budgets.

The rollouts of a group share their prompt: it stands, and is computed, once in a pack, and its images are encoded
once. A trajectory is never split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmagent.agent.advantages import Group, estimate
from mmagent.agent.codec import Codec
from mmagent.agent.sharing import Unit, make_unit
from mmagent.balance import CostWeights
from mmagent.dealing import deal_batches
from mmagent.dist import World, gather_ints
from mmagent.packing import Size, check_fits, empty_pack, pack
from mmagent.trajectories import PolicyBatch, Trajectory
from mmagent.types import Document, PackedBatch


def policy_batches(
    groups: Sequence[Group],
    budget: Size,
    *,
    image_id: int,
    merge_size: int,
    pad_id: int = 0,
    estimator: str = "grpo",
    packs: int = 1,
    share_prompts: bool = True,
    advantages: Sequence[float] | None = None,
) -> list[PolicyBatch]:
    """Micro-batches of at most ``budget`` each, and at least ``packs`` of them.

    Ranks that bring different numbers of trajectories agree on one ``packs`` and get as many micro-batches each: the
    heaviest are split, and where nothing is left to split, empty packs follow, which count for nothing.
    ``share_prompts`` false repeats the prompt for every trajectory. ``advantages`` of all trajectories, group by group,
    where they are known; else ``estimator`` makes them of these groups alone.

    Raises ``ValueError`` naming a trajectory that exceeds the budget, or whose log-probs are not finite numbers (a
    server that does not tell them cannot serve training).
    """
    values = list(estimate(groups, estimator) if advantages is None else advantages)
    units: list[Unit] = []
    for group in groups:
        own, values = values[: len(group.trajectories)], values[len(group.trajectories) :]
        heard = [n for n in range(len(own)) if n not in group.silent]
        rows = [group.trajectories[n] for n in heard]
        units += make_unit(rows, [own[n] for n in heard], image_id, merge_size, share_prompts)
    plan = _split(_fill([part for unit in units for part in _fitting(unit, budget)], budget), packs)
    settings = {"image_id": image_id, "merge_size": merge_size, "pad_id": pad_id}
    return [_build(chosen, settings) for chosen in plan] + [_empty(pad_id)] * (packs - len(plan))


def rank_batches(
    groups: Sequence[Group],
    world: World,
    codec: Codec,
    *,
    budget: Size,
    weights: CostWeights | None = None,
    min_gain: float = 0.02,
    meets: bool = False,
    estimator: str = "grpo",
    share_prompts: bool = True,
) -> list[PolicyBatch]:
    """:func:`policy_batches` of what all ranks played, as many on every rank; none anywhere when no rank has a group.

    Ranks play different numbers of groups, of different lengths. With ``weights`` of the model their packs are dealt by
    cost over all ranks (:func:`mmagent.dealing.deal_batches`); without, each trains on what it played, and where it has
    fewer packs than others splits them. A collective.
    """
    advantages = estimate(groups, estimator, world)

    def build(packs: int) -> list[PolicyBatch]:
        return policy_batches(
            groups,
            budget,
            image_id=codec.vocab.image_id,
            merge_size=codec.geometry.merge_size,
            pad_id=codec.vocab.pad_id,
            packs=packs,
            share_prompts=share_prompts,
            advantages=advantages,
        )

    batches = build(0)
    counts = gather_ints(len(batches), world.device)
    if weights is None:
        return batches if len(batches) == max(counts) else build(max(counts))
    share = -(-sum(counts) // len(counts))
    if 0 < len(batches) < share:  # or there might be too few packs for all
        batches = build(share)
    if not share:
        return []
    filled = [batch for batch in batches if batch.keys]
    return deal_batches(filled, world, weights, lambda: _empty(codec.vocab.pad_id), min_gain, meets)[0]


def _empty(pad_id: int) -> PolicyBatch:
    return PolicyBatch(empty_pack(pad_id), torch.zeros(1), torch.zeros(1))


def _fitting(unit: Unit, budget: Size) -> list[Unit]:
    """The unit, or as many parts of it as the budget asks for."""
    if unit.size.fits(budget):
        return [unit]
    if len(unit.rows) == 1:
        check_fits(unit.rows[0].key, unit.size, budget)
    return [part for half in unit.halves() for part in _fitting(half, budget)]


def _fill(units: Sequence[Unit], budget: Size) -> list[list[Unit]]:
    """First fit, in the order given."""
    packs: list[list[Unit]] = []
    rooms: list[Size] = []
    for unit in units:
        for n in range(len(packs) + 1):
            if n == len(packs):
                packs.append([])
                rooms.append(budget)
            if unit.size.fits(rooms[n]):
                packs[n].append(unit)
                rooms[n] = rooms[n].less(unit.size)
                break
    return packs


def _split(plan: Sequence[Sequence[Unit]], packs: int) -> list[list[Unit]]:
    """Halve the longest packs until there are ``packs``, or none holds two trajectories."""
    plan = [list(chosen) for chosen in plan]
    while len(plan) < packs:
        at = max(range(len(plan)), key=lambda n: sum(len(unit.rows) for unit in plan[n]), default=None)
        if at is None or sum(len(unit.rows) for unit in plan[at]) < 2:
            break
        units = plan[at]
        if len(units) == 1:
            units = list(units[0].halves())
        half = len(units) // 2
        plan[at : at + 1] = [units[:half], units[half:]]
    return plan


def _build(units: Sequence[Unit], settings: dict[str, int]) -> PolicyBatch:
    """One pack: behind every shared prompt its continuations, whose positions go on where the prompt ends."""
    documents: list[Document] = []
    prefix_of: list[int] = []
    advantages: list[Tensor] = []
    behavior: list[Tensor] = []
    for unit in units:
        prefix = -1
        if unit.shared:
            prefix = len(documents)
            documents.append(_cut(unit.rows[0], 0, unit.shared, 0, unit.images, "/prompt"))
            prefix_of.append(-1)
            advantages.append(torch.zeros(unit.shared))
            behavior.append(torch.zeros(unit.shared))
        for row, value in zip(unit.rows, unit.advantages, strict=True):
            documents.append(_cut(row, unit.shared, len(row), unit.images, len(row.images)))
            prefix_of.append(prefix)
            advantages.append(torch.full((len(row) - unit.shared,), value))
            behavior.append(_logprobs(row)[unit.shared :])
    stream = pack(documents, share_images=True, **settings)
    if max(prefix_of) >= 0:
        stream = replace(stream, positions=_positions(stream, prefix_of), prefix_of=tuple(prefix_of))
    return PolicyBatch(stream, torch.cat(advantages), torch.cat(behavior), routed_experts=_routed(units))


def _cut(row: Trajectory, start: int, end: int, first_image: int, last_image: int, suffix: str = "") -> Document:
    whole = row.document()
    images = whole.images[first_image:last_image]
    return Document(whole.input_ids[start:end], whole.trainable[start:end], images, row.key + suffix, row.source)


def _positions(stream: PackedBatch, prefix_of: Sequence[int]) -> Tensor:
    """Rotary positions count on from the prompt: one more than the largest of them."""
    segments = stream.segments
    positions = stream.positions.clone()
    borders = segments.offsets()
    for n, prefix in enumerate(prefix_of):
        if prefix >= 0:
            positions[:, borders[n] : borders[n + 1]] += positions[:, borders[prefix] : borders[prefix + 1]].max() + 1
    return positions


def _logprobs(trajectory: Trajectory) -> Tensor:
    values = torch.tensor(trajectory.logprobs, dtype=torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"{trajectory.key}: the policy gave no finite log-prob for every token it sampled")
    return values


def _routed(units: Sequence[Unit]) -> Tensor | None:
    """``(T, M, K)`` recorded experts, -1 where none; None when no trajectory recorded any."""
    rows = [row for unit in units for row in unit.rows]
    known = next((row.routed_experts[0] for row in rows if row.routed_experts), None)
    if known is None:
        return None
    parts = []
    for unit in units:
        if unit.shared:
            parts.append(torch.full((unit.shared, *known.shape), -1))
        for row in unit.rows:
            own = torch.full((len(row), *known.shape), -1)
            if row.routed_experts:
                own[: len(row.routed_experts)] = torch.stack(row.routed_experts)
            parts.append(own[unit.shared :])
    return torch.cat(parts)
