"""Worlds as tasks: what a policy sees is what it was taught with, and an answer in a box is judged alone."""

from __future__ import annotations

import asyncio
from itertools import islice

import numpy as np
import pytest

from data_pipelines.documents import DocumentBuilder
from data_pipelines.worlds import record_of
from evals.endpoint import OwnTalk
from mmagent.agent.codec import Codec
from mmagent.agent.rollout import RolloutConfig, roll_out
from mmagent.chat import ChatConfig
from mmagent.geometry import GeometryConfig
from mmagent.tasks.worlds import WorldTask
from mmagent.trajectories import Completion, Limits, Status, Trajectory
from mmagent.vocab import Vocab
from mmagent.worlds.catalogue import all_worlds

VOCAB = Vocab.train(["how many are there? answer with a number"], 400)


class Knower:
    """Says the right answers, in a box behind some words; every other time a wrong one."""

    version = 0

    def __init__(self, task: WorldTask):
        self.task, self.said = task, 0

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        item = next(i for i in islice(self.task.items("train", 0), 50) if i.key in prompt.key)
        self.said += 1
        answer = self.task.example(item).answer if self.said % 2 else "wrong"
        ids = [*VOCAB.encode("It is "), VOCAB.id("<|begin_of_box|>"), *VOCAB.encode(answer)]
        ids += [VOCAB.id("<|end_of_box|>"), *VOCAB.encode("."), VOCAB.id("<|user|>")]
        return Completion(tuple(ids), tuple(-0.1 for _ in ids), stopped=True)


@pytest.mark.parametrize("name", ["counting/objects", "videos/order", "puzzles/missing", "text/arithmetic"])
def test_a_prompt_is_the_one_it_was_taught_with(name):
    """Token for token and pixel for pixel, pictures between words and videos included."""
    world = all_worlds()[name]
    task, geometry, chat = WorldTask(world), GeometryConfig(), ChatConfig()
    item = next(task.items("train", 0))
    seen = asyncio.run(task.environment(item).reset())
    trajectory = Trajectory("t", "s")
    Codec(VOCAB, geometry, chat).open(trajectory, seen)
    document = DocumentBuilder(VOCAB, geometry, chat).document(record_of(world, task.example(item), "worlds"))
    length = len(trajectory)
    assert trajectory.input_ids == document.input_ids[:length].tolist()
    assert not document.trainable[:length].any()
    assert document.trainable[length:].any()
    assert len(trajectory.images) == len(document.images)
    for one, other in zip(trajectory.images, document.images, strict=True):
        assert np.array_equal(one.patches, other.patches)


@pytest.mark.parametrize("name", ["counting/objects", "videos/count", "svg/code", "documents/fields"])
def test_boxed_answers_are_rewarded(name):
    task = WorldTask(all_worlds()[name])
    prompts = [(task, item) for item in islice(task.items("train", 0), 2)]
    codec = Codec(VOCAB, GeometryConfig())
    config = RolloutConfig(group_size=2, max_steps=1, max_tokens=1500, max_context=20_000)
    done = asyncio.run(roll_out(prompts, Knower(task), codec, config, seed=0))
    assert [t.status for t in done] == [Status.FINISHED] * 4
    assert [t.reward for t in done] == [1.0, 0.0, 1.0, 0.0]


def test_an_endpoint_is_sent_a_video_as_frames_with_their_times():
    task = WorldTask(all_worlds()["videos/when"])
    seen = asyncio.run(task.environment(next(task.items("test", 0))).reset())
    content = OwnTalk("", GeometryConfig()).asked(seen)[-1]["content"]
    kinds = [part["type"] for part in content]
    assert kinds == [*["image_url", "text"] * len(seen.images), "text"]
    assert [part["text"] for part in content[1:-1:2]] == [f"{t:.1f} seconds" for t in seen.layout[0].timestamps]


def test_two_boxes_are_no_answer():
    """It was the last one that counted; who hedges must not be told which answer to give last."""
    opened, closed = VOCAB.id("<|begin_of_box|>"), VOCAB.id("<|end_of_box|>")
    task = WorldTask(all_worlds()["counting/objects"])
    item = next(task.items("train", 0))
    right = [opened, *VOCAB.encode(task.example(item).answer), closed]
    wrong = [opened, *VOCAB.encode("77"), closed]
    codec = Codec(VOCAB, GeometryConfig())

    async def reward(ids: list[int]) -> float | None:
        environment = task.environment(item)
        await environment.reset()
        return (await environment.step(codec.text([*ids, VOCAB.id("<|user|>")]))).reward

    assert asyncio.run(reward(right)) == 1.0
    assert [asyncio.run(reward(ids)) for ids in ([*wrong, *right], [*right, *wrong], [*right, *right])] == [0.0] * 3
