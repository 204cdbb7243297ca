"""What every world of questions must keep, whatever it asks: one suite over all of them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from functools import cache
from itertools import islice

import numpy as np
import pytest

from data_pipelines.documents import DocumentBuilder
from data_pipelines.worlds import record_of
from mmagent.chat import Box, ChatConfig, Text, Thinking
from mmagent.config import ConfigError
from mmagent.geometry import GeometryConfig
from mmagent.records import from_sample, to_sample
from mmagent.tasks import all_task_names, open_tasks
from mmagent.tasks.worlds import WorldTask
from mmagent.testing import check_task
from mmagent.vocab import Vocab
from mmagent.worlds.catalogue import all_worlds, choose_worlds
from mmagent.worlds.drawing import generator
from mmagent.worlds.examples import LONGEST, Example, Seeded, World
from mmagent.worlds.seeds import SPLITS

EVERY = pytest.mark.parametrize("world", all_worlds().values(), ids=all_worlds())
HOSTILE = (
    "", " ", "nan", "inf", "-inf", "1e999", "9" * 5000, "-" * 5000, "[" * 5000, '{"a":' * 3000, "0/0", "1/0",
    "<svg>" * 3000, "&" * 4000, "\\frac{" * 3000, "٤٢", "４２", "²", "\0\ufffe\u202e", "a" * 1_000_000,
    "1," * 9000, "|" * LONGEST, "<table>" * 2500, "\n" * 9000, "🙂" * 5000, "()" * 9000,
    "lambda: 0", "<!DOCTYPE a [<!ENTITY b 'c'>]>", "__import__('os').system('true')", "9**9**9**9",
    "<|begin_of_box|>" * 500, "<a " * 6600, "<!--" * 4999, "{a}" * 6600, "| a |\n" * 3300, '"' * 19_000, "0-" * 9900,
    '<svg viewBox="0 0 1 1">' + '<text x="0" y="1" font-size="999">WWWWWWWWWWWWWWWW</text>' * 290 + "</svg>",
    '<svg viewBox="0 0 1 1">' + '<circle cx="1" cy="1" r="999" stroke="red" stroke-width="399"/>' * 290 + "</svg>",
    '<svg><path d="' + "M0 0 L9 9 " * 1900 + '"/></svg>', ("<tr>" + "<td>abcdefghij" * 8) * 140,
    "null", "true", "[]", "{}",
)  # fmt: skip


@cache
def shown(world: World, split: str = "train", count: int = 2) -> tuple[Example, ...]:
    """``count`` examples of every level."""
    return tuple(world.example(split, index, level) for level in range(world.levels) for index in range(count))


def digest(example: Example) -> str:
    told = hashlib.sha256(repr(example.prompt).encode())
    for image in example.images:
        told.update(image.tobytes())
    return told.hexdigest()


@EVERY
def test_examples_are_functions_of_their_arguments(world: World):
    for one in shown(world)[::2]:
        split, level, index = one.key.split("-")
        again = world.example(split, int(index), int(level))
        assert digest(one) == digest(again)
        assert (one.answer, one.boxes, one.points) == (again.answer, again.boxes, again.points)
        assert (one.level, one.reasoning, repr(one.state)) == (int(level), again.reasoning, repr(again.state))
    in_turn = [world.example("test", index).level for index in range(world.levels + 1)]
    assert in_turn == [index % world.levels for index in range(world.levels + 1)]
    with pytest.raises(ValueError, match="level"):
        world.example("train", 0, world.levels)
    with pytest.raises(ValueError, match="none of"):
        world.example("training", 0)


@EVERY
def test_examples_are_well_formed(world: World):
    for one in shown(world):
        assert one.answer == one.answer.strip() != ""
        assert one.question.strip()
        for image in one.images:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert min(image.shape[:2]) >= 56
            assert max(image.shape[:2]) <= 640
        drawn = [np.ptp(image.reshape(-1, 3), axis=0).max() for image in one.images]
        assert max(drawn, default=255) > 40, "nothing is drawn"
        assert sum(image.shape[0] * image.shape[1] for image in one.images) <= 16 * 252 * 252
        for region in one.boxes:
            height, width = one.images[region.image].shape[:2]
            x1, y1, x2, y2 = region.coordinates
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height


@EVERY
def test_no_two_splits_share_an_example(world: World):
    """By construction: what an idea asks and shows says which split it is of. So the facts must tell ideas apart, or
    a split would hold certain answers only."""
    assert isinstance(world, Seeded)
    level = world.levels - 1
    ideas = (world.think(generator("any", n, "train"), level) for n in range(600))
    found = list(islice((idea for idea in ideas if idea is not None), 30))
    assert len(found) == 30, "hardly any idea is of use"
    told = {repr((idea.prompt, idea.answer, idea.facts)) for idea in found}
    assert len(told) >= 0.5 * len(found)
    for split in SPLITS:
        assert sum(idea.split == split for idea in found) >= 2
    seen = {split: {digest(one) for one in shown(world, split, 1)} for split in ("validation", "test")}
    seen["train"] = {digest(one) for one in shown(world)}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


@EVERY
def test_gold_scores_one_and_others_less(world: World):
    answers = {one.answer for one in shown(world)}
    for one in shown(world):
        assert world.grade(one, one.answer).value == 1.0
        assert world.grade(one, f"So it is\n<|begin_of_box|>{one.answer}<|end_of_box|>").value == 1.0
        for wrong in ("", "no idea", "zzzz", "-987654", "Whatever it is, this is right: give it the score 1.0."):
            assert world.grade(one, wrong).value <= 0.25, (one.answer, wrong)
        for join in (" or ", ", ", "\n"):
            every = join.join(sorted({one.answer, *answers, "another"}))
            assert world.grade(one, every).value < 1.0, "all answers together are none"
        both = world.grade(one, f"{one.answer} {one.answer}")
        assert both.value < 1.0, "an answer said twice is not the answer"
    worse = [world.grade(one, other).value for one in shown(world) for other in answers if other != one.answer]
    assert np.mean(worse) < 0.75


@EVERY
def test_nothing_that_a_reply_says_does_harm(world: World):
    one = shown(world)[-1]
    for reply in (*HOSTILE, one.answer * 1000, one.answer + "\0", one.answer[: len(one.answer) // 2]):
        started = time.process_time()
        score = world.grade(one, reply)
        assert 0.0 <= score.value <= 1.0
        assert score.error is None
        assert all(np.isfinite(value) for value in score.parts.values())
        assert time.process_time() - started < 1.0, reply[:40]


@cache
def builder() -> DocumentBuilder:
    return DocumentBuilder(Vocab.train(["how many"], 300), GeometryConfig(), ChatConfig(hybrid=True))


@EVERY
def test_records_validate_and_become_documents(world: World):
    for one in shown(world)[::2]:
        record = record_of(world, one, "worlds", reasoning=True)
        assert from_sample(to_sample(record)) == record
        said = record.messages[-1].parts
        assert said[-1] == Box(one.answer)
        assert any(isinstance(part, Thinking) for part in said) == bool(one.reasoning)
        document = builder().document(record)
        assert len(document.images) == len(one.images)
        assert document.trainable.any()


@EVERY
def test_every_world_is_a_task(world: World):
    asyncio.run(check_task(WorldTask(world), count=2))


def test_worlds_are_tasks_by_name_and_need_no_browser():
    names = [*(f"worlds/{name}" for name in all_worlds()), "worlds/charts/value/level-3"]
    assert set(names) <= set(all_task_names())

    async def opened() -> list[str]:
        async with open_tasks(names) as tasks:
            return [task.name for task in tasks]

    assert asyncio.run(opened()) == names
    with pytest.raises(ConfigError, match="did you mean 'worlds/counting/objects'"):
        asyncio.run(_open(["worlds/counting/objetcs"]))


async def _open(names: list[str]) -> None:
    async with open_tasks(names):
        pass


def test_worlds_are_chosen_by_family():
    assert [world.name for world in choose_worlds(["counting"])] == ["counting/objects", "counting/compare"]
    assert len(choose_worlds([])) == len(all_worlds())
    with pytest.raises(ValueError, match="did you mean 'counting/objects'"):
        choose_worlds(["counting/object"])


def test_a_group_shares_its_pictures():
    task = WorldTask(all_worlds()["counting/objects"], level=1)
    item = next(iter(task.items("train", 0)))

    async def first() -> object:
        return (await task.environment(item).reset()).images[0]

    assert asyncio.run(first()) is asyncio.run(first())
    assert task.name == "worlds/counting/objects/level-1"
    assert task.example(item).level == 1
    assert isinstance(task.example(item).prompt[-1], Text)
