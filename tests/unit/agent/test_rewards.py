"""Shaped rewards and filters by hand."""

from __future__ import annotations

import pytest
import torch

from mmagent.agent.advantages import AdvantageConfig, Group, estimate, select, whiten
from mmagent.agent.batching import policy_batches
from mmagent.agent.rewards import RewardConfig, Shaping, overlong, rvpo
from mmagent.config import resolve
from mmagent.dist import World, run_ranks
from mmagent.packing import Size
from mmagent.trajectories import Status, Trajectory
from tests.agent_kit import prompt, tiny_vocab


def row(n: int, reward: float = 0.0, status=Status.FINISHED, tokens: int = 2, group: str = "g", **parts) -> Trajectory:
    out = prompt("say it", group=group, key=f"{group}#{n}")
    out.extend([5] * tokens, trainable=True, logprobs=[-0.5] * tokens)
    out.reward, out.status, out.parts = reward, status, parts
    return out


def test_rvpo_by_hand():
    # rendered and not worse than 0.5: 0.9, 0.7, 0.7; the first beats two, each of the others ties with one
    assert rvpo([0.9, 0.7, None, 0.2, 0.7], reference=0.5) == [3.0, 1.5, -1.0, 0.0, 1.5]
    assert rvpo([0.0, 0.1]) == [1.0, 2.0]
    assert rvpo([None, None]) == [-1.0, -1.0]


def test_overlong_by_hand():
    assert [overlong(n, 100, 20) for n in (0, 80, 85, 100, 500)] == [0.0, 0.0, -0.25, -1.0, -1.0]


def test_rewards_are_shaped_in_order():
    config = RewardConfig(weights={"toy": {"right": 1.0, "format": 0.5}}, malformed=True, overlong=4)
    members = [row(0, right=1.0, format=1.0), row(1, right=0.2, tokens=9), row(2, malformed=1.0, right=9.0)]
    assert Shaping(config, 10)(members) == pytest.approx([1.5, 0.2 - 0.75, 0.2])
    assert [m.reward for m in members] == [0.0] * 3  # what the verifier said stays


def test_groups_are_judged_as_one_where_a_task_asks_for_it():
    config = resolve(RewardConfig(), ["groups={toy: rvpo}"])
    members = [row(0, visual=0.3), row(1, visual=0.6), row(2, render_failure=1.0)]
    assert Shaping(config, 10)(members) == [1.0, 2.0, -1.0]
    elsewhere = RewardConfig(groups={"other": "rvpo"})
    assert Shaping(elsewhere, 10)([row(0, 0.25)]) == [0.25]
    with pytest.raises(ValueError, match=r"rewards\.groups\.toy"):
        RewardConfig(groups={"toy": "elo"})
    with pytest.raises(ValueError, match="overlong 10 must be less"):
        Shaping(RewardConfig(overlong=10), 10)


def one_for_all(members):
    return [1.0]


def test_a_group_reward_must_judge_everyone():
    shaping = Shaping(RewardConfig(groups={"toy": f"{__name__}:one_for_all"}), 10)
    with pytest.raises(ValueError, match=r"rewards\.groups\.toy must give 2 finite numbers"):
        shaping([row(0), row(1)])


def test_failures_are_no_zeros_for_shaped_rewards_either():
    rows = [row(0, visual=0.3), row(1, status=Status.FAILED), row(2, visual=0.6)]
    (group,) = select(rows, shape=Shaping(RewardConfig(groups={"toy": "rvpo"}), 10)).groups
    assert group.rewards == (1.0, 2.0, 1.0)
    assert [t.key for t in group.trajectories] == ["g#0", "g#2", "g#0"]


def test_filters_decide_about_groups_and_samples():
    rows = [row(n, n / 4, Status.TRUNCATED if n == 3 else Status.FINISHED) for n in range(4)]
    found = select(rows, keep=lambda group: max(group.rewards) > 0.9)
    assert (found.groups, found.degenerate) == ((), 1)
    (group,) = select(rows, trains=lambda t: t.status is Status.FINISHED).groups
    assert group.silent == {3}
    vocab = tiny_vocab()
    settings = {"image_id": vocab.image_id, "merge_size": 2}
    (pack,) = policy_batches([group], Size(999, 999), share_prompts=False, estimator="dr_grpo", **settings)
    assert pack.keys == ("g#0", "g#1", "g#2")
    sampled = pack.stream.labels != -100
    # the silent one's 0.75 is in the mean, 0.375
    assert pack.advantages[sampled].tolist() == pytest.approx([-0.375] * 2 + [-0.125] * 2 + [0.125] * 2)
    assert select(rows, trains=lambda t: False).groups == ()


def groups_of(*rewards: tuple[float, ...]) -> list[Group]:
    return [
        Group(f"g{n}", tuple(row(m, r, group=f"g{n}") for m, r in enumerate(own)), 0) for n, own in enumerate(rewards)
    ]


def test_reinforce_plus_plus_by_hand():
    groups = groups_of((1.0, 0.0), (0.0, 0.0))  # mean 1/4, deviation 1/2
    assert estimate(groups, "reinforce++") == pytest.approx([1.5, -0.5, -0.5, -0.5])
    # less their groups' means: 1/2 -1/2 0 0, whose deviation is sqrt(1/2 / 3)
    half = 0.5 / (1 / 6) ** 0.5
    assert estimate(groups, "reinforce++_baseline") == pytest.approx([half, -half, 0.0, 0.0])
    assert estimate(groups, "raw") == [1.0, 0.0, 0.0, 0.0]
    assert estimate([], "reinforce++") == []
    assert whiten(torch.ones(3, dtype=torch.float64)).tolist() == [0.0] * 3


def _on_ranks(world: World) -> list[float]:
    mine = groups_of((1.0, 0.0), (0.0, 0.25))[world.rank :: world.size]
    return estimate(mine, "reinforce++", world)


def test_deviations_are_those_of_all_ranks():
    (alone,) = run_ranks(_on_ranks, 1)
    first, second = run_ranks(_on_ranks, 2)
    assert first + second == pytest.approx(alone)


def halves(rewards, groups):
    assert len(groups) == rewards.numel()
    return rewards / 2


def test_an_estimator_of_ones_own():
    config = AdvantageConfig(f"{__name__}:halves")
    assert estimate(groups_of((1.0, 0.0)), config.estimator) == [0.5, 0.0]
    with pytest.raises(ValueError, match="must give 2 finite numbers"):
        estimate(groups_of((1.0, 0.0)), f"{__name__}:one_for_all_rewards")


def one_for_all_rewards(rewards, groups):
    return rewards[:1]
