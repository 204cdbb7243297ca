"""Saved rollouts come back as they were."""

from __future__ import annotations

import json

import pytest
import torch

from mmagent.agent.batching import policy_batches
from mmagent.agent.store import load_trajectories, save_trajectories
from mmagent.packing import Size
from tests.agent_kit import tiny_vocab
from tests.unit.agent.test_batching import group


def test_round_trip(tmp_path):
    groups = [group("a", (1.0, 0.0), routed=True), group("b", (0.25, 0.0, 1.0), image_seed=2)]
    rows = [row for g in groups for row in g.trajectories]
    rows[1].parts, rows[1].note = {"wrong": 1.0}, "said nothing"
    save_trajectories(tmp_path / "step", rows)
    save_trajectories(tmp_path / "step", rows)  # again, over the first
    back = load_trajectories(tmp_path / "step")
    for before, after in zip(rows, back, strict=True):
        for name in ("key", "source", "group", "policy_version", "input_ids", "trainable", "logprobs", "reward"):
            assert getattr(before, name) == getattr(after, name), name
        assert (before.parts, before.note, before.status) == (after.parts, after.note, after.status)
        assert before.images[0].grid == after.images[0].grid
        assert before.images[0].view == after.images[0].view
        assert torch.equal(before.images[0].patches, after.images[0].patches)
        assert len(before.routed_experts) == len(after.routed_experts)
        assert all(torch.equal(x, y) for x, y in zip(before.routed_experts, after.routed_experts, strict=True))
    assert back[0].images[0] is back[1].images[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step"]


def test_a_replayed_batch_is_the_same_batch(tmp_path):
    from mmagent.agent.advantages import Group

    def build(rows):
        budget = Size(4000, 4000)
        return policy_batches([Group("a", tuple(rows), 0)], budget, image_id=tiny_vocab().image_id, merge_size=2)[0]

    rows = group("a", (1.0, 0.0, 1.0)).trajectories
    save_trajectories(tmp_path / "step", rows)
    before, after = build(rows), build(load_trajectories(tmp_path / "step"))
    assert torch.equal(before.stream.input_ids, after.stream.input_ids)
    assert torch.equal(before.stream.vision.patches, after.stream.vision.patches)
    assert torch.equal(before.behavior_logprobs, after.behavior_logprobs)
    assert torch.equal(before.advantages, after.advantages)


def test_nothing_and_something_else(tmp_path):
    save_trajectories(tmp_path / "empty", [])
    assert load_trajectories(tmp_path / "empty") == []
    with pytest.raises(ValueError, match="no saved trajectories"):
        load_trajectories(tmp_path / "missing")
    index = json.loads((tmp_path / "empty" / "trajectories.json").read_text())
    (tmp_path / "empty" / "trajectories.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_trajectories(tmp_path / "empty")
