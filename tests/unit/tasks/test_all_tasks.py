"""What ships: every category has tasks, every task keeps its protocol, and nothing in it can be fooled."""

from __future__ import annotations

import asyncio

import pytest

from mmagent.browser import find_chromium
from mmagent.protocols import Demonstrates
from mmagent.tasks import CATEGORIES, all_task_names, all_tasks, open_tasks
from mmagent.tasks.catalogue import needs_browser
from mmagent.testing import check_task

SHIPPED = all_tasks()


async def checked(names, **options):
    async with open_tasks(names, pages=2) as tasks:
        for task in tasks:
            await check_task(task, **options)


def test_every_category_has_tasks_and_every_task_its_category():
    assert len(CATEGORIES) == len(set(CATEGORIES)) >= 36
    assert list(SHIPPED)[: len(CATEGORIES)] == list(CATEGORIES)
    assert all(SHIPPED.values()), "a category without tasks"
    names = [name for some in SHIPPED.values() for name in some]
    assert len(names) == len(set(names))
    assert set(names) <= set(all_task_names())
    assert {name for name in all_task_names() if "/level-" not in name} == set(names)

    async def categories():
        plain = [name for name in names if not needs_browser(name)]
        async with open_tasks(plain) as tasks:
            return {task.name: task.category for task in tasks}

    for name, category in asyncio.run(categories()).items():
        assert name in SHIPPED[category]


@pytest.mark.parametrize(
    "name", ["functions/level-3", "index-search/level-0", "games/maze/level-2", "image-tools/level-1"]
)
def test_levels_are_tasks_by_name(name):
    asyncio.run(checked([name], count=1, hostile=()))


@pytest.mark.parametrize("name", ["grounding", "perception", "screenshot-to-html"])
@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
def test_tasks_on_pages_keep_their_protocol(name):
    asyncio.run(checked([name], count=2))


@pytest.mark.parametrize("name", ["grounding", "perception", "step/click-tab", "miniwob/click-tab"])
@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
def test_what_a_task_demonstrates_in_its_own_pages_is_its_gold(name):
    async def both():
        async with open_tasks([name], pages=1) as (task,):
            assert isinstance(task, Demonstrates)
            item = next(iter(task.items("train", 5)))
            gold = await asyncio.to_thread(lambda: list(task.gold(item)))
            return await task.demonstrate(item), gold

    demonstrated, gold = asyncio.run(both())
    assert demonstrated == gold


def test_no_task_is_named_like_a_folder_of_others():
    """But for its levels, and the same pictures with a tool to look closer."""
    names = {name for name in all_task_names() if "/level-" not in name and not name.endswith("/crop")}
    assert not [name for name in names if any(other.startswith(f"{name}/") for other in names)]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize("name", [*SHIPPED["gui-step"], *SHIPPED["gui-trajectory"]])
def test_every_task_on_miniwob_keeps_its_protocol(name):
    asyncio.run(checked([name], count=1, seconds=20.0))
