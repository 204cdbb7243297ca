"""Every page of MiniWoB++ runs, in a group, or has a reason; those without an expert show the same for the same."""

from __future__ import annotations

import asyncio
from random import Random

import numpy as np
import pytest

from mmagent.actions import Click, Drag, format_action
from mmagent.browser import find_chromium
from mmagent.tasks import all_task_names, open_tasks
from mmagent.tasks.base import Screens
from mmagent.tasks.miniwob import MiniWobTask
from mmagent.worlds import miniwob

PAGES = ("click-menu", "drag-items", "draw-line", "hot-cold", "text-editor")
needs_browser = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")


def test_every_page_runs_or_has_a_reason():
    found = {path.stem for path in (miniwob.html_folder() / "miniwob").glob("*.html")}
    assert found == set(miniwob.RUNNING) | set(miniwob.LEFT_OUT)
    assert not set(miniwob.RUNNING) & set(miniwob.LEFT_OUT)
    assert not set(miniwob.TASKS) & set(miniwob.UNTAUGHT)
    groups = [miniwob.group_of(page) for page in miniwob.RUNNING]
    assert {groups.count(group) >= 4 for group in set(groups)} == {True}
    assert miniwob.group_of("visual-addition") == "numbers"
    assert {f"miniwob/{page}" for page in miniwob.RUNNING} <= set(all_task_names())
    with pytest.raises(ValueError, match="chase-circle' does not run here: it moves by the clock"):
        miniwob.group_of("chase-circle")
    with pytest.raises(ValueError, match="not supported: needs a clipboard"):
        MiniWobTask("copy-paste", Screens(None, 160, 210))


def episodes(names, salt=0):
    """Two episodes of the same random actions for each page, on pages that others use between; what both showed."""

    async def play(task, item, actions):
        environment, seen = task.environment(item), []
        seen.append(await environment.reset())
        for action in actions:
            if seen[-1].done:
                break
            seen.append(await environment.step(action))
        await environment.close()
        return seen

    async def inside():
        found = {}
        async with open_tasks([f"miniwob/{name}" for name in names], pages=1) as tasks:
            for task in tasks:
                item, other = (next(task.items("test", seed)) for seed in (0, 1))
                rng = Random(f"{task.name} {salt}")
                points = [[rng.randrange(50, 950), rng.randrange(260, 950)] for _ in range(5)]
                actions = [
                    format_action(a) for a in (Click(*points[0]), Click(*points[1]), Drag(*points[2], *points[3]))
                ]
                first = await play(task, item, actions)
                await play(task, other, actions[:1])
                task._seen.clear()
                found[task.page] = first, await play(task, item, actions)
        return found

    return asyncio.run(inside())


def differing(found):
    def same(a, b):
        return (a.done, a.reward, len(a.images)) == (b.done, b.reward, len(b.images)) and all(
            np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True)
        )

    return [page for page, (one, two) in found.items()
            if len(one) != len(two) or not all(same(a, b) for a, b in zip(one, two, strict=True))]  # fmt: skip


@pytest.mark.browser
@needs_browser
def test_pages_without_an_expert_show_the_same_again():
    found = episodes(PAGES)
    assert differing(found) == []
    assert all(first[0].text for first, _ in found.values())


@pytest.mark.slow
@pytest.mark.browser
@needs_browser
def test_all_pages_without_an_expert_show_the_same_again():
    assert differing(episodes(miniwob.UNTAUGHT)) == []


@pytest.mark.browser
@needs_browser
def test_a_page_without_an_expert_has_no_gold():
    async def inside():
        async with open_tasks(["miniwob/click-menu"]) as (task,):
            await task.demonstrate(next(task.items("test", 0)))

    with pytest.raises(ValueError, match="no expert for 'click-menu'"):
        asyncio.run(inside())
