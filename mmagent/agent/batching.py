"""Groups of trajectories to packs for the policy-gradient objective, under two budgets.

A pack holds whole trajectories; the images that the rollouts of a group share are stored, and encoded, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmagent.agent.advantages import Group, group_advantages
from mmagent.dist import World, gather_ints
from mmagent.geometry import GeometryConfig
from mmagent.packing import Size, empty_pack, pack, plan_packs
from mmagent.types import PackedBatch, PolicyBatch, Trajectory
from mmagent.vocab import Vocab


def policy_batches(
    groups: Sequence[Group],
    budget: Size,
    *,
    image_id: int,
    merge_size: int,
    pad_id: int = 0,
    estimator: str = "grpo",
    packs: int = 1,
) -> list[PolicyBatch]:
    """Micro-batches of at most ``budget`` each, and at least ``packs`` of them.

    Ranks that bring different numbers of trajectories agree on one ``packs`` and get as many micro-batches each: the
    heaviest are split, and where nothing is left to split, empty packs follow, which count for nothing.

    Raises ``ValueError`` naming a trajectory that exceeds the budget, or whose log-probs are not finite numbers (a
    server that does not tell them cannot serve training).
    """
    rows = [trajectory for group in groups for trajectory in group.trajectories]
    rewards = torch.tensor([trajectory.reward for trajectory in rows], dtype=torch.float64)
    advantages = group_advantages(rewards, [group.name for group in groups for _ in group.trajectories], estimator)
    documents = [trajectory.document() for trajectory in rows]
    plan = _split(plan_packs(documents, budget, share_images=True) if rows else [], packs)
    out = []
    for chosen in plan:
        stream = pack(
            [documents[n] for n in chosen], image_id=image_id, merge_size=merge_size, share_images=True, pad_id=pad_id
        )
        out.append(_policy_batch(stream, [rows[n] for n in chosen], [advantages[n].item() for n in chosen]))
    return out + [_policy_batch(empty_pack(pad_id), [], []) for _ in range(packs - len(out))]


def rank_batches(
    groups: Sequence[Group], budget: Size, world: World, vocab: Vocab, geometry: GeometryConfig, estimator: str = "grpo"
) -> list[PolicyBatch]:
    """:func:`policy_batches` of this rank's ``groups``, as many on every rank; none anywhere when no rank has a group.

    A collective.
    """
    settings = {"image_id": vocab.image_id, "merge_size": geometry.merge_size, "pad_id": vocab.pad_id}
    batches = policy_batches(groups, budget, estimator=estimator, packs=0, **settings)
    most = max(gather_ints(len(batches), world.device))
    if len(batches) == most:
        return batches
    return policy_batches(groups, budget, estimator=estimator, packs=most, **settings)


def _split(plan: list[list[int]], packs: int) -> list[list[int]]:
    """Halve the longest packs until there are ``packs``, or none has two members."""
    plan = [list(chosen) for chosen in plan]
    while len(plan) < packs and any(len(chosen) > 1 for chosen in plan):
        at = max(range(len(plan)), key=lambda n: len(plan[n]))
        half = len(plan[at]) // 2
        plan[at : at + 1] = [plan[at][:half], plan[at][half:]]
    return plan


def _policy_batch(stream: PackedBatch, rows: Sequence[Trajectory], advantages: Sequence[float]) -> PolicyBatch:
    total = stream.input_ids.shape[0]
    spread = [torch.full((len(row),), value) for row, value in zip(rows, advantages, strict=True)]
    behavior = [_logprobs(row) for row in rows]
    return PolicyBatch(
        stream=stream,
        advantages=_padded(spread, total),
        behavior_logprobs=_padded(behavior, total),
        routed_experts=_routed(rows, total),
    )


def _logprobs(trajectory: Trajectory) -> Tensor:
    values = torch.tensor(trajectory.logprobs, dtype=torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"{trajectory.key}: the policy gave no finite log-prob for every token it sampled")
    return values


def _padded(parts: Sequence[Tensor], total: int) -> Tensor:
    out = torch.zeros(total)
    if parts:
        joined = torch.cat(list(parts))
        out[: joined.shape[0]] = joined
    return out


def _routed(rows: Sequence[Trajectory], total: int) -> Tensor | None:
    """``(T, M, K)`` recorded experts, -1 where none; None when no trajectory recorded any."""
    known = next((row.routed_experts[0] for row in rows if row.routed_experts), None)
    if known is None:
        return None
    out = torch.full((total, *known.shape), -1, dtype=torch.int64)
    at = 0
    for row in rows:
        if row.routed_experts:
            out[at : at + len(row.routed_experts)] = torch.stack(row.routed_experts)
        at += len(row)
    return out
