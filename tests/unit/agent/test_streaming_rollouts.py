"""Playing beside the trainer: exact counts, the staleness window, held turns, and a ledger that loses nobody."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from mmagent.agent.codec import Codec
from mmagent.agent.collector import CollectorConfig
from mmagent.agent.player import Player
from mmagent.agent.points import Points, PointsConfig
from mmagent.agent.rollout import RolloutConfig, judge_by_task
from mmagent.agent.stream import StreamCollector, StreamConfig
from mmagent.dist import World, init, run_ranks
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.generation.local import LocalPolicy
from mmagent.trajectories import Score, Status
from tests.agent_kit import GEOMETRY, recompute, tiny_model, tiny_vocab
from tests.toy_tasks import EchoEnvironment, EchoTask, ScriptedPolicy, last_request


class Half(ScriptedPolicy):
    """Right for half of a group; ``wait`` seconds a turn for those in ``slow``."""

    def __init__(self, slow=lambda key: 0.0, right: int = 2):
        super().__init__(tiny_vocab(), None)
        self.version, self.slow, self.right = 0, slow, right

    async def complete(self, prompt, limits):
        await asyncio.sleep(self.slow(prompt.key))
        good = int(prompt.key.rsplit("#", 1)[1]) < self.right
        self.script = lambda text, turn: last_request(text) if good else "zz"
        return await super().complete(prompt, limits)


def streaming(policy, tasks=None, world=None, points=None, stream=None, **settings) -> StreamCollector:
    rollout = RolloutConfig(group_size=4, max_tokens=4, lockstep=False)
    config = CollectorConfig(**{"prompts": 2, "rollout": rollout} | settings)
    stream = stream or StreamConfig(on=True)
    world = world or init(threads=1)
    return StreamCollector(
        tasks or [EchoTask()], policy, Codec(tiny_vocab(), GEOMETRY), config, stream, world, 0, Points(points)
    )


async def steps(target: StreamCollector, policy, count: int, busy: float = 0.0) -> list[list[str]]:
    """Names of the groups of every step."""
    out = []
    for _ in range(count):
        got = await target.collect()
        assert not got.left
        out.append([group.name for group in got.groups])
        await asyncio.sleep(busy)  # the trainer works in another thread
        policy.version += 1
    return out


def test_every_step_is_full_no_prompt_comes_twice_and_playing_goes_on_meanwhile():
    async def run():
        policy = Half(lambda key: 0.02)
        target = streaming(policy)
        got = await steps(target, policy, 5, busy=0.05)
        ready = len(target._ready)
        await target.close()
        return got, ready, list(target.ledger)

    got, ready, ledger = asyncio.run(run())
    names = [name for step in got for name in step]
    assert [len(step) for step in got] == [2] * 5
    assert len(set(names)) == len(names)
    assert not set(names) & set(ledger)
    assert ready > 0  # while the trainer worked
    # all of the first ones drawn were trained on or are still in the ledger
    drawn = {f"echo/train-0-{2 * n}" for n in range(len(names) + len(ledger))}
    assert drawn == set(names) | set(ledger)


def test_the_filter_is_made_up_for_to_the_group():
    class Solves(Half):
        async def complete(self, prompt, limits):
            self.right = 4 if last_request(self.vocab.decode(prompt.input_ids)) in "ab" else 2
            return await super().complete(prompt, limits)

    async def run():
        policy = Solves()
        target = streaming(policy, [EchoTask(letters="abcd")], prompts=3)
        got = [await target.collect() for _ in range(3)]
        await target.close()
        return got

    for one in asyncio.run(run()):
        assert len(one.groups) == 3
        assert not any(group.degenerate for group in one.groups)


def test_where_nothing_teaches_a_step_ends_all_the_same():
    async def run():
        target = streaming(Half(right=4), stream=StreamConfig(on=True, barren=2))
        got = await target.collect()
        await target.close()
        return got

    got = asyncio.run(run())
    assert got.groups == ()
    assert got.metrics["rollout/degenerate_groups"] == 1.0


def test_groups_of_a_policy_too_old_are_played_anew():
    """One prompt is slow: by the time it has ended its policy is out of the window. It comes all the same, later."""

    async def run():
        slow = "echo/train-0-0"
        plays = Counter()

        def wait(key):
            plays[key] += 1
            return 0.3 if key.startswith(f"{slow}#") and plays[key] == 1 else 0.0

        policy = Half(wait)
        target = streaming(policy)
        seen, stale = [], 0.0
        for _ in range(8):
            got = await target.collect()
            seen += [group.name for group in got.groups]
            stale += got.metrics["rollout/stale_groups"]
            for group in got.groups:
                assert policy.version - group.version <= 1
            assert got.metrics["rollout/staleness_most"] <= 1
            await asyncio.sleep(0.02)
            policy.version += 1
        await target.close()
        return seen, stale, plays[f"{slow}#0"], slow

    seen, stale, played, slow = asyncio.run(run())
    assert stale >= 1
    assert played == 2
    assert seen.count(slow) == 1


def test_after_a_kill_what_was_in_flight_or_ready_is_played_and_nothing_trained_twice():
    async def run():
        policy = Half(lambda key: 0.01)
        first = streaming(policy, [EchoTask("a"), EchoTask("b")])
        before = await steps(first, policy, 3, busy=0.03)
        state = first.state_dict()
        lost = await steps(first, policy, 1)  # after the checkpoint: will be trained on again, as if it had not been
        await first.close()
        second = streaming(policy, [EchoTask("a"), EchoTask("b")])
        second.load_state_dict(state)
        in_ledger = list(second.ledger)
        policy.version = 3
        after = await steps(second, policy, 4)
        await second.close()
        return before, lost, in_ledger, after

    before, lost, in_ledger, after = asyncio.run(run())
    trained = [name for step in (*before, *after) for name in step]
    assert len(set(trained)) == len(trained) == 14
    assert set(in_ledger) >= set(lost[0])
    assert set(in_ledger) <= {name for step in after for name in step}


def test_a_state_that_is_loaded_on_the_way_drops_what_is_in_flight():
    """As a run does that goes back to a checkpoint, from the trainer's thread."""

    async def run():
        policy = Half(lambda key: 0.01)
        task = EchoTask()
        target = streaming(policy, [task])
        await steps(target, policy, 1)
        state = target.state_dict()
        await steps(target, policy, 2)
        await asyncio.to_thread(target.load_state_dict, state)
        policy.version = 1
        again = await steps(target, policy, 2)
        await target.close()
        assert task.opened == task.closed
        return state, again

    state, again = asyncio.run(run())
    assert set(again[0]) <= {row[0] for row in state["ledger"]}
    assert len({name for step in again for name in step}) == 4


def test_what_breaks_is_tried_again_and_then_given_up():
    """Two prompts' judge is away: once for one of them, for ever for the other."""

    class Shaky(EchoTask):
        def __init__(self):
            super().__init__()
            self.asked = Counter()

        async def score(self, item, trajectory):
            self.asked[trajectory.key] += 1
            broken = item.seed == 0 or (item.seed == 2 and self.asked[trajectory.key] == 1)
            return Score(0.0, error="no judge") if broken else Score(trajectory.reward)

    async def run():
        task, policy = Shaky(), Half()
        target = streaming(policy, [task], stream=StreamConfig(on=True, tries=3))
        got = [name for step in await steps(target, policy, 6) for name in step]
        await target.close()
        return got, task.asked, target.ledger

    got, asked, ledger = asyncio.run(run())
    assert "echo/train-0-0" not in [*got, *ledger]
    assert asked["echo/train-0-0#0"] == 3
    assert got.count("echo/train-0-2") == 1
    assert asked["echo/train-0-2#0"] == 2


def test_after_a_while_a_step_takes_what_is_ready():
    async def run():
        policy = Half(lambda key: 0.0 if key.startswith("echo/train-0-0#") else 30.0)
        target = streaming(policy, stream=StreamConfig(on=True, patience=0.2))
        got = await target.collect()
        flying = got.metrics["rollout/in_flight"]
        await target.close()
        return got, flying

    got, flying = asyncio.run(run())
    assert [group.name for group in got.groups] == ["echo/train-0-0"]
    assert flying == 12


def test_a_policy_that_fails_is_an_error_and_no_wait_for_ever():
    class Broken(ScriptedPolicy):
        async def complete(self, prompt, limits):
            raise ConnectionError("the server is gone")

    async def run():
        target = streaming(Broken(tiny_vocab(), None))
        try:
            await target.collect()
        finally:
            await target.close()

    with pytest.raises(ConnectionError, match="server is gone"):
        asyncio.run(run())


def test_asked_to_leave_it_leaves_at_once():
    async def run():
        target = streaming(Half(lambda key: 60.0))
        got = await asyncio.wait_for(target.collect(asked=lambda: True), 5)
        await target.close()
        return got

    assert asyncio.run(run()).left


def test_a_buffer_filter_says_who_comes_first():
    async def run(points):
        policy = Half()
        target = streaming(policy, points=points)
        first = await target.collect()
        await target.close()
        return first.groups

    assert asyncio.run(run(PointsConfig(buffer_filter="tests.contracts.test_points:none_first"))) == ()
    assert len(asyncio.run(run(PointsConfig(buffer_filter="mmagent.agent.points:newest_first")))) == 2


def _on_ranks(world: World) -> list[list[str]]:
    async def run():
        policy = Half(lambda key: 0.005 * (1 + world.rank))
        target = streaming(policy, world=world, prompts=3)
        got = await steps(target, policy, 4)
        await target.close()
        return [*got, list(target.ledger)]

    return asyncio.run(run())


@pytest.mark.slow  # two processes start
def test_ranks_share_the_ledger_and_a_step():
    first, second = run_ranks(_on_ranks, 2)
    assert first[-1] == second[-1]
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert len(one) + len(other) == 3
    names = [name for got in (first, second) for step in got[:-1] for name in step]
    assert len(set(names)) == len(names)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="overlap=false"):
        StreamConfig(on=True, staleness=0)
    with pytest.raises(ValueError, match="in_flight 'drop'"):
        StreamConfig(in_flight="drop")
    with pytest.raises(ValueError, match=r"collector\.replay"):
        streaming(Half(), replay="somewhere")
    with pytest.raises(ValueError, match=r"points\.rollout"):
        streaming(Half(), points=PointsConfig(rollout="tests.contracts.test_points:twice"))


class Endless(EchoTask):
    """Every answer is taken, and followed by another picture."""

    def environment(self, item):
        return _Endless(self, item)


class _Endless(EchoEnvironment):
    async def step(self, action):
        self.taken += 1
        return self._look()


def test_turns_that_cannot_be_cut_are_waited_for_and_no_other_begins():
    async def run():
        policy, ended = Half(lambda key: 0.1), []
        config = RolloutConfig(group_size=2, max_tokens=4, max_steps=3, lockstep=False)
        player = Player(policy, Codec(tiny_vocab(), GEOMETRY), config, judge_by_task, ended.append)
        task = EchoTask(steps=3)
        player.add([(task, next(iter(task.items("train", 0))))], 0)
        await asyncio.sleep(0.05)
        await player.hold()
        asked = len(policy.asked)
        await asyncio.sleep(0.15)
        assert len(policy.asked) == asked == 2
        player.go_on()
        while player.playing:
            await asyncio.sleep(0.01)
        return ended[0].trajectories

    assert [row.reward for row in asyncio.run(run())] == [1.0, 1.0]


def test_held_turns_go_on_where_they_were_cut_and_their_log_probs_are_the_models():
    """Cut again and again, at any token: what a trajectory holds in the end is what one forward over it says."""

    async def run():
        model = tiny_model()
        policy = LocalPolicy(Generator(model, tiny_vocab(), GeneratorConfig()))
        ended, codec = [], Codec(tiny_vocab(), GEOMETRY)
        config = RolloutConfig(group_size=3, max_tokens=40, max_steps=2, lockstep=False)
        player = Player(policy, codec, config, judge_by_task, ended.append)
        task = Endless(takes_cut=True)
        player.add([(task, item) for item, _ in zip(task.items("train", 0), range(2), strict=False)], 7)
        cuts, pause = 0, 0.02
        while player.playing:
            await asyncio.sleep(pause := 1.2 * pause)  # what had said nothing yet begins anew
            said = {e.trajectory.key: len(e.trajectory) for g in player.playing.values() for e in g.episodes}
            await player.hold()
            await policy.idle()
            assert not policy.generator.busy
            after = {e.trajectory.key: len(e.trajectory) for g in player.playing.values() for e in g.episodes}
            cuts += any(after[key] > said.get(key, 0) for key in after)
            player.check()
            player.go_on()
        return model, [row for group in ended for row in group.trajectories], cuts

    model, rows, cuts = asyncio.run(run())
    assert len(rows) == 6
    assert cuts > 0  # something was kept of a turn that was cut
    for row in rows:
        assert row.status is Status.TRUNCATED
        sampled = [x for x, on in zip(row.logprobs, row.trainable, strict=True) if on]
        assert recompute(model, row).tolist() == pytest.approx(sampled, abs=1e-3)
