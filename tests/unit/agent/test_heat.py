"""The temperature of episodes: raised where rewards have settled, taken back where that costs too much."""

from __future__ import annotations

import pytest

from mmagent.agent.heat import Heat, HeatConfig


def run(rewards, **settings) -> tuple[Heat, list[float]]:
    heat, seen = Heat(1.0, HeatConfig(**{"rise": 0.1, "most": 1.25, "window": 2, "flat": 0.02, **settings})), []
    for reward in rewards:
        seen.append(round(heat.now, 6))
        heat.update(reward)
    return heat, seen


def test_it_waits_until_rewards_have_settled():
    """Two windows of two: rising ones do not raise it, settled ones do."""
    heat, seen = run([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert seen == [1.0] * 7
    heat.update(0.5)
    assert heat.now == pytest.approx(1.1)


def test_it_rises_step_by_step_as_far_as_it_may():
    heat, _ = run([0.5] * 40)
    assert heat.now == pytest.approx(1.2)  # a third step would pass 1.25


def test_a_rise_that_costs_too_much_is_taken_back_for_good():
    _, seen = run([0.5] * 4 + [0.45, 0.45] + [0.5] * 20)
    assert seen[4:6] == [1.1, 1.1]
    assert set(seen[6:]) == {1.0}
    kept, _ = run([0.5] * 4 + [0.496, 0.496])  # less than a hundredth
    assert kept.now == pytest.approx(1.1)


def test_without_a_rise_it_stays():
    heat, seen = run([0.5] * 20, rise=0.0)
    assert set(seen) == {1.0}
    assert heat.state_dict()["rewards"] == []


@pytest.mark.parametrize("cut", range(12))
def test_it_resumes_at_any_moment(cut):
    rewards = [0.5] * 4 + [0.5] * 4 + [0.3] * 4
    whole, seen = run(rewards)
    first, begun = run(rewards[:cut])
    second = Heat(1.0, first.config)
    second.load_state_dict(first.state_dict())
    for reward in rewards[cut:]:
        begun.append(round(second.now, 6))
        second.update(reward)
    assert (begun, second.now) == (seen, whole.now)


@pytest.mark.parametrize("settings", [{"rise": -0.1}, {"window": 0}, {"drop": 1.0}, {"most": 0.0}])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match="heat"):
        HeatConfig(**settings)
    with pytest.raises(ValueError, match="lies below the temperature 2"):
        Heat(2.0, HeatConfig(rise=0.1, most=1.5))
