"""Small things in large pictures, and the tool that enlarges: what is lost, what a crop shows, what is none."""

from __future__ import annotations

import asyncio
from itertools import islice

import numpy as np
import pytest

from mmagent.tasks import all_task_names, open_tasks
from mmagent.tasks.looking import MAX_CROPS, SHOWN, CropTask, cut, shrunk
from mmagent.testing import check_task
from mmagent.worlds import search
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.seeds import SPLITS

NAMES = [name for world in search.worlds() for name in (world.name, f"{world.name}/crop")]


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_of_tasks(name):
    async def work():
        async with open_tasks([name]) as (task,):
            await check_task(task, count=3)

    assert name in all_task_names()
    asyncio.run(work())


async def play(task, item, actions):
    environment = task.environment(item)
    seen = [await environment.reset()]
    for action in actions:
        seen.append(await environment.step(action))
    return seen


def test_the_answer_is_what_the_picture_shows():
    attribute, position, _ = search.worlds()
    for level in range(3):
        example = attribute.example("test", 5, level)
        assert example.images[0].shape[:2] == search.SIZES[level]
        x1, y1, x2, y2 = (round(v) for v in example.boxes[0].coordinates)
        middle = example.images[0][(y1 + y2) // 2 - 1 : (y1 + y2) // 2 + 2, (x1 + x2) // 2 - 1 : (x1 + x2) // 2 + 2]
        assert np.abs(middle.reshape(-1, 3).mean(0) - COLOURS[example.answer]).max() < 12
        assert max(x2 - x1, y2 - y1) < 0.06 * search.SIZES[level][0]
        found = position.example("test", 5, level)
        one, other = (region.coordinates for region in found.boxes)
        assert found.answer.split()[0] == ("upper" if one[1] + one[3] < other[1] + other[3] else "lower")
        assert found.answer.split()[1] == ("left" if one[0] + one[2] < other[0] + other[2] else "right")


def test_a_sign_is_lost_when_the_picture_is_small_and_there_in_the_crop():
    """Contrast of fine detail on the sign: what is left of it in the reduced picture, and in the part enlarged."""
    task = CropTask(search.worlds()[2], level=2)
    item = next(task.items("test", 0))
    first, second, last = asyncio.run(play(task, item, list(task.gold(item))))
    assert max(first.images[0].shape) == max(second.images[0].shape) == SHOWN
    assert (last.done, last.reward, last.parts["crops"]) == (True, 1.0, 1 / MAX_CROPS)
    example = task.example(item)
    x1, y1, x2, y2 = example.boxes[0].coordinates
    scale = SHOWN / max(example.images[0].shape)
    y1 = y2 - 2.2 * search.SIGN  # the sign alone
    small = first.images[0][round(y1 * scale) : round(y2 * scale), round(x1 * scale) : round(x2 * scale)]
    assert small.shape[0] * small.shape[1] < 100  # four letters in fewer pixels than one letter needs
    assert second.images[0].std() > 30


def test_crops_that_are_none_end_the_episode():
    task = CropTask(search.worlds()[0], level=0)
    item = next(task.items("test", 1))
    for action, says in (("crop(1,2,3)", "not of the form"), ("crop(900,900,100,100)", "turned inside out"),
                         ("crop(0,0,1000,500)", "1000 is not in 0..999"), ("crop(5,5,5,5)", "too small")):  # fmt: skip
        seen = asyncio.run(play(task, item, [action]))[-1]
        assert (seen.done, seen.reward, seen.parts) == (True, 0.0, {"malformed": 1.0})
        assert says in seen.text
    many = asyncio.run(play(task, item, ["crop(0,0,500,500)"] * (MAX_CROPS + 1)))
    assert [seen.done for seen in many] == [False] * (MAX_CROPS + 1) + [True]
    assert "more than 6 crops" in many[-1].text


def test_a_part_is_that_part():
    pixels = np.arange(200 * 100 * 3, dtype=np.uint8).reshape(200, 100, 3)
    assert np.array_equal(cut(pixels, (0, 0, 999, 999)), pixels)
    assert np.array_equal(cut(pixels, (500, 250, 999, 499)), pixels[50:100, 50:])
    assert shrunk(pixels).shape == (SHOWN, SHOWN // 2, 3)


def test_splits_never_share_a_picture():
    for world in search.worlds():
        task = CropTask(world, 0)
        seen = {split: {task.example(item).answer + str(task.example(item).boxes) for item in
                        islice(task.items(split, 0), 6)} for split in SPLITS}  # fmt: skip
        assert not seen["train"] & seen["test"]
