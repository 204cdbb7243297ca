"""Trajectories to policy packs: alignment, shared images, equal numbers of packs."""

from __future__ import annotations

import math

import pytest
import torch

from mmagent.agent.advantages import Group
from mmagent.agent.batching import policy_batches
from mmagent.packing import Size
from mmagent.types import IGNORE, Status, Trajectory
from tests.agent_kit import picture, prompt, tiny_vocab

BUDGET = Size(tokens=400, patches=400)


def group(name: str, rewards: tuple[float, ...], image_seed: int = 1, routed: bool = False) -> Group:
    image = picture(image_seed)
    rows = []
    for n, reward in enumerate(rewards):
        row = prompt(f"click {name}", (image,), group=name, key=f"{name}#{n}")
        ids = tiny_vocab().encode("ok" + "!" * n)
        experts = [torch.full((2, 2), n)] * len(ids) if routed else ()
        row.extend(ids, trainable=True, logprobs=[-0.1 * (n + 1)] * len(ids), routed_experts=experts)
        row.reward, row.status = reward, Status.FINISHED
        rows.append(row)
    return Group(name, tuple(rows), 0)


def build(groups, budget=BUDGET, **kwargs):
    return policy_batches(groups, budget, image_id=tiny_vocab().image_id, merge_size=2, **kwargs)


def test_values_stand_at_the_tokens_they_belong_to():
    groups = [group("a", (1.0, 0.0)), group("b", (0.0, 0.0, 1.0), image_seed=2)]
    (batch,) = build(groups, estimator="dr_grpo")
    rows = [row for g in groups for row in g.trajectories]
    ids = torch.tensor([i for row in rows for i in row.input_ids])
    trainable = torch.tensor([t for row in rows for t in row.trainable])
    assert torch.equal(batch.stream.input_ids, ids)
    assert torch.equal(batch.stream.labels, torch.where(trainable, ids, IGNORE))
    torch.testing.assert_close(batch.behavior_logprobs, torch.tensor([x for row in rows for x in row.logprobs]))
    expected = [0.5, -0.5, -1 / 3, -1 / 3, 2 / 3]
    advantages = torch.cat([torch.full((len(row),), value) for row, value in zip(rows, expected, strict=True)])
    torch.testing.assert_close(batch.advantages, advantages)
    assert batch.stream.sources == ("toy",) * 5
    assert batch.routed_experts is None


def test_a_group_stores_its_image_once():
    groups = [group("a", (1.0, 0.0, 1.0)), group("b", (0.0, 1.0), image_seed=2)]
    (batch,) = build(groups)
    assert batch.num_patches == 2 * picture(1).patches.shape[0]
    assert batch.stream.visual_slots.shape[0] == 5 * picture(1).patches.shape[0] // 4


def test_budgets_hold_and_packs_are_made_up():
    groups = [group(name, (1.0, 0.0, 1.0, 0.0), seed) for seed, name in enumerate("abcd")]
    longest = max(len(row) for g in groups for row in g.trajectories)
    batches = build(groups, Size(tokens=3 * longest, patches=100))
    assert all(b.num_tokens <= 3 * longest and b.num_patches <= 100 for b in batches)
    assert sorted(k for b in batches for k in b.keys) == sorted(t.key for g in groups for t in g.trajectories)

    more = build(groups, BUDGET, packs=7)
    assert len(more) == 7
    assert all(b.keys for b in more)
    most = build(groups[:1], BUDGET, packs=6)
    assert [len(b.keys) for b in most] == [1, 1, 1, 1, 0, 0]
    assert build([], BUDGET, packs=2)[1].num_tokens == 0


def test_recorded_experts_are_aligned():
    (batch,) = build([group("a", (1.0, 0.0), routed=True), group("b", (1.0, 0.0), image_seed=2)])
    assert batch.routed_experts.shape == (batch.stream.input_ids.shape[0], 2, 2)
    recorded = (batch.routed_experts >= 0).all(-1).all(-1)
    first = torch.tensor([n < 2 for n in range(4)])[batch.stream.segments.ids()]
    assert torch.equal(recorded, (batch.stream.labels != IGNORE) & first)


def test_log_probs_that_are_no_numbers_are_refused():
    row = Trajectory("mute#0", "toy", "mute")
    row.extend([1, 2], trainable=True, logprobs=[-1.0, math.nan])
    with pytest.raises(ValueError, match=r"mute#0: .*finite"):
        build([Group("mute", (row,), 0)])
    with pytest.raises(ValueError, match=r"a#0: .* tokens exceed"):
        build([group("a", (1.0, 0.0))], Size(10, 1000))
