"""Episodes: what is written where, how they end, and that they can be repeated."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from mmagent.agent.codec import Codec
from mmagent.agent.rollout import RolloutConfig, make_episodes, roll_out, run_freely, run_lockstep
from mmagent.chat import (
    ChatConfig,
    Generation,
    Image,
    Text,
    Thinking,
    Tool,
    ToolCall,
    assistant,
    observation,
    render,
    user,
)
from mmagent.generation.generator import Generator
from mmagent.generation.local import LocalPolicy
from mmagent.interop.agent_folder import load_agent, save_agent
from mmagent.interop.chat_template import chat_template
from mmagent.trajectories import Completion, Item, Limits, Observation, Score, Status, Trajectory
from tests.agent_kit import GEOMETRY, recompute, tiny_model, tiny_vocab
from tests.toy_tasks import EchoTask, ScriptedPolicy, last_request


def codec(**kwargs) -> Codec:
    return Codec(tiny_vocab(), GEOMETRY, **kwargs)


def prompts(task: EchoTask, count: int):
    return [(task, item) for item in islice(task.items("train", 0), count)]


def play(policy, task: EchoTask, count: int = 3, **settings):
    return asyncio.run(roll_out(prompts(task, count), policy, codec(), RolloutConfig(**settings), seed=0))


def parrot(text: str, turn: int) -> str:
    return last_request(text) or "a"


@pytest.mark.parametrize("lockstep", [True, False])
def test_gold_scores_one_and_everything_is_closed(lockstep):
    task = EchoTask()
    done = play(ScriptedPolicy(tiny_vocab(), parrot), task, group_size=4, lockstep=lockstep)
    assert [t.reward for t in done] == [1.0] * 12
    assert all(t.status is Status.FINISHED for t in done)
    assert task.opened == task.closed == 12
    assert [t.key for t in done[:5]] == [f"echo/train-0-0#{n}" for n in range(4)] + ["echo/train-0-2#0"]
    assert {t.policy_version for t in done} == {3}
    assert len({id(t.images[0]) for t in done[:4]}) == 4  # an environment's own array each; EchoTask shares nothing


def test_the_ids_are_those_of_the_renderer():
    vocab = tiny_vocab()
    task = EchoTask(steps=3)
    (done,) = play(ScriptedPolicy(vocab, parrot), task, 1, group_size=1)
    turns = []
    for _ in range(3):
        turns += [user(Image(), Text("a")), assistant(Text("a"))]
    expected = render(turns, vocab, [4] * 3)
    sampled = [i for i, t in zip(done.input_ids, done.trainable, strict=True) if t]
    assert vocab.decode(sampled) == "a<|user|>" * 3  # this policy leaves out the newline that the template writes
    without = [i for i, t in zip(done.input_ids, done.trainable, strict=True) if not t]
    context = [i for i, t in zip(expected.ids, expected.trainable, strict=True) if not t]
    assert without == context
    assert len(done.images) == 3
    assert codec().actions(done) == ["a"] * 3
    assert done.logprobs == [-0.5 if t else 0.0 for t in done.trainable]


@pytest.mark.parametrize("reason", ["sick", "cancelled"])
def test_what_the_policy_gave_up_is_neither_judged_nor_trained_on(reason):
    class Sick(ScriptedPolicy):
        async def complete(self, prompt, limits):
            said = await super().complete(prompt, limits)
            return replace(said, stopped=False, reason=reason) if prompt.key.endswith("#1") else said

    done = play(Sick(tiny_vocab(), parrot), EchoTask(), 1, group_size=3)
    assert [row.status for row in done] == [Status.FINISHED, Status.FAILED, Status.FINISHED]
    assert done[1].note.endswith(f"tokens: {reason}")


class Thinker(ScriptedPolicy):
    """Thinks, then says what is asked for, word for word as the template writes it."""

    def __init__(self, generation: Generation):
        super().__init__(tiny_vocab(), parrot)
        self.between = "\n" if generation is Generation.GLM45 else ""

    def said(self) -> list[int]:
        vocab = tiny_vocab()
        return [*vocab.encode("z"), vocab.id("</think>"), *vocab.encode(f"{self.between}a"), vocab.id("<|user|>")]

    async def complete(self, prompt, limits):
        return Completion(tuple(self.said()), (-0.5,) * len(self.said()), stopped=True)


@pytest.mark.parametrize("generation", list(Generation))
def test_a_policy_that_thinks_keeps_its_thoughts_and_is_served_so(tmp_path, generation):
    """A trajectory only grows, where the template drops thoughts before the last turn of the user. What the policy is
    saved with says which contexts it knows, to our renderer and to the template of an export."""
    vocab, asked = tiny_vocab(), ChatConfig(generation, thinking=True)
    thinks, task = codec(chat=asked), EchoTask(letters="a", steps=3)
    (done,) = asyncio.run(
        roll_out(prompts(task, 1), Thinker(generation), thinks, RolloutConfig(group_size=1, max_tokens=64), seed=0)
    )
    assert (done.status, done.reward) == (Status.FINISHED, 1.0)
    talk = [user(Image(), Text("a")), assistant(Thinking("z"), "a")] * 3
    whole = render(talk, vocab, [4] * 3, thinks.chat)
    assert (done.input_ids, done.trainable) == (whole.ids, whole.trainable)
    assert render(talk, vocab, [4] * 3, asked).ids != whole.ids, "the template would have dropped them"
    model = tiny_model()
    save_agent(tmp_path / "agent", model, vocab, GEOMETRY, thinks.chat)
    served = load_agent(tmp_path / "agent").chat
    assert served.preserve_thinking
    last = whole.ids[: len(whole.ids) - len(Thinker(generation).said())]
    assert render(talk[:-1], vocab, [4] * 3, served, generate=True).ids == last
    assert chat_template(served) != chat_template(asked)
    assert not codec(chat=ChatConfig(generation)).chat.preserve_thinking, "who has no thoughts has none to keep"


class Elsewhere(ScriptedPolicy):
    """A server whose answers name the versions that said them: of the first turn and of those after it."""

    def __init__(self, first: tuple[int, ...], later: tuple[int, ...]):
        super().__init__(tiny_vocab(), parrot)
        self.first, self.later = first, later

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        said = await super().complete(prompt, limits)
        return replace(said, versions=self.later if any(prompt.trainable) else self.first)


@pytest.mark.parametrize(
    ("first", "later", "oldest"), [((3,), (3,), 3), ((1, 3), (3,), 1), ((3,), (2,), 2), ((), (), 3)]
)
def test_a_trajectory_is_as_old_as_the_oldest_version_that_an_answer_names(first, later, oldest):
    """Whatever version the policy believed it had when the episode began."""
    rows = play(Elsewhere(first, later), EchoTask(steps=2), group_size=1)
    assert [row.policy_version for row in rows] == [oldest] * len(rows)


def test_a_wrong_answer_is_a_zero_with_its_parts():
    (done,) = play(ScriptedPolicy(tiny_vocab(), lambda *_: "nonsense"), EchoTask(), 1, group_size=1)
    assert (done.reward, done.status, done.note) == (0.0, Status.FINISHED, "wrong")
    assert done.parts == {"wrong": 1.0}


def test_a_completion_without_end_is_truncated_and_not_acted_on():
    task = EchoTask()
    (done,) = play(ScriptedPolicy(tiny_vocab(), lambda *_: "a" * 50, stops=False), task, 1, group_size=1, max_tokens=6)
    assert done.status is Status.TRUNCATED
    assert "within 6 tokens" in done.note
    assert done.reward == 0.0


@pytest.mark.parametrize("steps", [1, 2])
def test_a_cut_answer_is_judged_where_the_environment_takes_it_and_ends_the_episode(steps):
    task = EchoTask(steps=steps, takes_cut=True)
    (done,) = play(ScriptedPolicy(tiny_vocab(), parrot, stops=False), task, 1, group_size=1, max_tokens=6)
    assert done.status is Status.TRUNCATED
    assert "no end of turn within 1 tokens" in done.note
    assert done.reward == float(steps == 1)
    assert task.opened == task.closed == 1


def test_a_cut_thought_is_no_answer():
    prompt, config = prompts(EchoTask(takes_cut=True), 1), RolloutConfig(group_size=1)
    for thinking, reward in ((True, 0.0), (False, 1.0)):
        policy = ScriptedPolicy(tiny_vocab(), parrot, stops=False)
        (done,) = asyncio.run(roll_out(prompt, policy, codec(chat=ChatConfig(thinking=thinking)), config, seed=0))
        assert (done.status, done.reward) == (Status.TRUNCATED, reward)
    assert codec(chat=ChatConfig(thinking=True)).answers([5, tiny_vocab().id("</think>"), 6])


def test_an_environment_that_breaks_over_a_cut_answer_fails():
    task = EchoTask(breaks={0: 1}, steps=2, takes_cut=True)
    policy = ScriptedPolicy(tiny_vocab(), parrot, stops=False)
    with pytest.raises(RuntimeError, match="the environment broke"):
        play(policy, task, 1, group_size=1)


def test_limits_on_steps_and_context():
    (steps,) = play(ScriptedPolicy(tiny_vocab(), parrot), EchoTask(steps=9), 1, group_size=1, max_steps=4)
    assert (steps.status, "4 steps" in steps.note) == (Status.TRUNCATED, True)
    (context,) = play(ScriptedPolicy(tiny_vocab(), parrot), EchoTask(steps=9), 1, group_size=1, max_context=60)
    assert (context.status, "60 tokens" in context.note) == (Status.TRUNCATED, True)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("at", [0, 1])
def test_a_broken_environment_fails_and_is_no_zero(lockstep, at, caplog):
    task = EchoTask(steps=2, breaks={2: at})
    done = play(ScriptedPolicy(tiny_vocab(), parrot), task, group_size=2, lockstep=lockstep)
    assert [t.status for t in done] == [Status.FINISHED] * 2 + [Status.FAILED] * 2 + [Status.FINISHED] * 2
    assert done[2].note == "RuntimeError: the environment broke"
    assert "the environment broke" in caplog.text
    assert task.opened == task.closed


def test_when_all_fail_the_run_stops_with_the_reason():
    with pytest.raises(RuntimeError, match=r"all 2 episodes failed; .*the environment broke"):
        play(ScriptedPolicy(tiny_vocab(), parrot), EchoTask(breaks={0: 0}), 1, group_size=2)


@pytest.mark.parametrize("run", [run_lockstep, lambda episodes, policy: run_freely(episodes, policy, 2)])
def test_a_broken_policy_raises_and_aborts_the_rest(run):
    class Broken(ScriptedPolicy):
        async def complete(self, prompt, limits):
            if prompt.key.endswith("#1"):
                raise ConnectionError("no answer")
            return await super().complete(prompt, limits)

    task = EchoTask(steps=3)
    episodes = make_episodes(prompts(task, 2), codec(), RolloutConfig(group_size=2), seed=0, version=0)
    with pytest.raises(ConnectionError, match="no answer"):
        asyncio.run(run(episodes, Broken(tiny_vocab(), parrot)))
    assert task.opened == task.closed
    assert {e.trajectory.status for e in episodes} <= {Status.ABORTED, Status.FINISHED}
    assert Status.ABORTED in {e.trajectory.status for e in episodes}


def test_seeds_belong_to_the_trajectory_and_not_to_its_place():
    few, many = ScriptedPolicy(tiny_vocab(), parrot), ScriptedPolicy(tiny_vocab(), parrot)
    play(few, EchoTask(), 1, group_size=2)
    play(many, EchoTask(), 3, group_size=2)
    assert few.asked == many.asked[:2]
    assert len(set(many.asked)) == 6


def test_lockstep_with_the_generator_repeats_bit_for_bit():
    def run():
        policy = LocalPolicy(Generator(tiny_model(), tiny_vocab()))
        return play(policy, EchoTask(), 4, group_size=4, max_tokens=6)

    first, second = run(), run()
    assert [t.input_ids for t in first] == [t.input_ids for t in second]
    assert [t.logprobs for t in first] == [t.logprobs for t in second]
    free = play(
        LocalPolicy(Generator(tiny_model(), tiny_vocab())), EchoTask(), 4, group_size=4, max_tokens=6, lockstep=False
    )
    assert [t.input_ids for t in first] == [t.input_ids for t in free]


def test_one_screen_is_patched_once():
    shared = codec()
    screen = np.zeros((56, 56, 3), dtype=np.uint8)
    assert shared.patch(screen) is shared.patch(screen)
    assert shared.patch(screen) is not shared.patch(screen.copy())
    torch.testing.assert_close(shared.patch(screen).patches, shared.patch(screen.copy()).patches)
    with pytest.raises(ValueError, match="must be a"):
        shared.patch("not a picture")


def test_rules_come_first():
    trajectory = Trajectory("t", "s")
    codec(rules="Be brief.").open(trajectory, Observation("go"))
    assert tiny_vocab().decode(trajectory.input_ids).startswith("[gMASK]<sop><|system|>\nBe brief.<|user|>\ngo/nothink")


# ---------------------------------------------------------------------------------------------- thinking on a budget


class Ponderer(ScriptedPolicy):
    """Thinks in the letter "z" until somebody ends it, then answers what is asked for."""

    async def complete(self, prompt, limits):
        self.limits = [*getattr(self, "limits", []), limits.max_tokens]
        ending = tiny_vocab().id("</think>")
        opened = prompt.input_ids[len(prompt) - 1 - prompt.input_ids[::-1].index(tiny_vocab().id("<think>")) :]
        if ending not in opened:
            ids = tiny_vocab().encode("z" * 100)[: limits.max_tokens]
            return Completion(tuple(ids), (-0.5,) * len(ids), stopped=False)
        return await super().complete(prompt, limits)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("generation", list(Generation))
def test_a_thought_over_its_budget_is_ended_and_the_answer_counts(lockstep, generation):
    vocab, task = tiny_vocab(), EchoTask(steps=2)
    think = codec(chat=ChatConfig(generation, thinking=True, preserve_thinking=True))
    config = RolloutConfig(group_size=2, max_tokens=20, thinking_tokens=7, lockstep=lockstep)
    policy = Ponderer(vocab, parrot)
    done = asyncio.run(roll_out(prompts(task, 2), policy, think, config, seed=0))
    assert [(t.reward, t.status) for t in done] == [(1.0, Status.FINISHED)] * 4
    assert set(policy.limits) == {7, 20 - 7 - 1}
    letter, ending = "a", vocab.id("</think>")
    first = done[0]
    turn = [*vocab.encode("z" * 7), ending, *vocab.encode(letter), vocab.id("<|user|>")]
    assert think.turns(first) == [turn, turn]
    assert think.actions(first) == [letter, letter]
    forced = [n for n, token in enumerate(first.input_ids) if token == ending]
    assert len(forced) == 2
    assert not any(first.trainable[n] for n in forced)  # it was not sampled
    assert sum(first.trainable) == 2 * (len(turn) - 1)


def test_a_budget_of_thinking_changes_nothing_for_who_does_not_think():
    def run(**settings):
        return play(ScriptedPolicy(tiny_vocab(), parrot), EchoTask(steps=2), group_size=2, **settings)

    assert [t.input_ids for t in run()] == [t.input_ids for t in run(thinking_tokens=5)]


def test_a_thought_without_room_for_an_answer_ends_the_episode():
    think = codec(chat=ChatConfig(thinking=True))
    opening = Trajectory("t", "s")
    think.open(opening, Observation("a", (np.zeros((56, 56, 3), dtype=np.uint8),)))
    config = RolloutConfig(group_size=1, max_tokens=20, thinking_tokens=7, max_context=len(opening) + 8)
    (done,) = asyncio.run(roll_out(prompts(EchoTask(), 1), Ponderer(tiny_vocab(), parrot), think, config, seed=0))
    assert (done.status, done.reward) == (Status.TRUNCATED, 0.0)
    assert "no end of turn within 7 tokens" in done.note
    with pytest.raises(ValueError, match="thinking_tokens 19 must leave room"):
        RolloutConfig(max_tokens=20, thinking_tokens=19)


def test_who_stops_in_the_middle_of_a_thought_has_said_nothing():
    think = codec(chat=ChatConfig(thinking=True))
    ids = [*tiny_vocab().encode("a"), tiny_vocab().id("<|user|>")]
    assert think.text(ids) == ""
    assert codec().text(ids) == "a"


def test_log_probs_behind_a_forced_answer_are_those_of_the_whole_sequence():
    """The generator goes on from its cache: what a trainer recomputes in one forward is the same."""
    model, think = tiny_model(), codec(chat=ChatConfig(thinking=True))
    config = RolloutConfig(group_size=3, max_tokens=24, thinking_tokens=6, max_steps=2)
    policy = LocalPolicy(Generator(model, tiny_vocab()))
    done = asyncio.run(roll_out(prompts(EchoTask(steps=2), 2), policy, think, config, seed=1))
    ending = tiny_vocab().id("</think>")
    forced = 0
    for row in done:
        forced += sum(i == ending and not t for i, t in zip(row.input_ids, row.trainable, strict=True))
        wanted = recompute(model, row)
        sampled = torch.tensor([x for x, t in zip(row.logprobs, row.trainable, strict=True) if t])
        torch.testing.assert_close(sampled, wanted, atol=2e-4, rtol=1e-4)  # fp32, another order of the same sums
    assert forced >= 3


# ---------------------------------------------------------------------------------------------- tools


LOOK = Tool('{"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}')


class Desk:
    """A task whose environment is asked through a tool, then answered in words."""

    name, category = "desk", "toy"

    def __init__(self) -> None:
        self.told: list[str] = []

    def items(self, split, seed):
        yield Item(self.name, "0", 0, "b")

    def environment(self, item):
        return self

    async def reset(self):
        return Observation("what is at x?")

    async def step(self, action):
        self.told.append(action)
        if action.startswith("{"):
            assert json.loads(action) == {"name": "look", "arguments": {"at": "x"}}
            return Observation("b", (np.zeros((56, 56, 3), dtype=np.uint8),))
        return Observation("", done=True, reward=float(action == "b"))

    async def close(self) -> None:
        pass

    async def score(self, item, trajectory):
        return Score(trajectory.reward)


class Looker:
    """Calls the tool, then says the last word of what came back."""

    version = 0

    def __init__(self, config: ChatConfig, ending: str):
        self.config, self.ending = config, ending

    async def complete(self, prompt, limits):
        vocab = tiny_vocab()
        asked = [user("what is at x?")]
        call = render([*asked, assistant(ToolCall("look", {"at": "x"}))], vocab, config=self.config, tools=[LOOK])
        shown = render(asked, vocab, config=self.config, tools=[LOOK], generate=True)
        assert prompt.input_ids[: len(shown.ids)] == shown.ids
        ids = [*call.ids[len(shown.ids) : -1], vocab.id(self.ending)]
        if len(prompt) > len(shown.ids):
            ids = [*vocab.encode("b"), vocab.id("<|user|>")]
        return Completion(tuple(ids), (-0.5,) * len(ids), stopped=True)


@pytest.mark.parametrize("generation", list(Generation))
@pytest.mark.parametrize("ending", ["<|observation|>", "<|endoftext|>"])
def test_a_called_tool_is_answered_by_an_observation(generation, ending):
    chat, task = ChatConfig(generation), Desk()
    item = next(iter(task.items("train", 0)))
    tooled = codec(chat=chat, tools=[LOOK])
    (done,) = asyncio.run(
        roll_out([(task, item)], Looker(chat, ending), tooled, RolloutConfig(group_size=1, max_tokens=64), seed=0)
    )
    assert (done.status, done.reward) == (Status.FINISHED, 1.0)
    assert task.told == ['{"name": "look", "arguments": {"at": "x"}}', "b"]
    talk = [user("what is at x?"), assistant(ToolCall("look", {"at": "x"})), observation(Image(), "b")]
    whole = render(talk, tiny_vocab(), [4], chat, tools=[LOOK], generate=True).ids
    extra = int(ending == "<|endoftext|>")  # it stands before the role that the renderer writes
    assert [i for n, i in enumerate(done.input_ids) if i != tiny_vocab().end_id][: len(whole)] == whole
    assert done.input_ids.count(tiny_vocab().end_id) == extra
