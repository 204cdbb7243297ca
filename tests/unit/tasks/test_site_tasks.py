"""Local web apps as tasks, in the real browser: experts score 1 in every kind, and what is not asked for scores 0."""

from __future__ import annotations

import asyncio
from itertools import islice

import numpy as np
import pytest

from mmagent.browser import find_chromium
from mmagent.tasks import open_tasks
from mmagent.tasks.base import Screens
from mmagent.tasks.sites import MAX_STEPS, SiteTask, site_names
from mmagent.worlds.sites import SITES, document, make_errand, told
from mmagent.worlds.sites.errand import Errand

browser = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")]
ALL = [f"sites/{name}" for name in site_names()]


def run(work, names=ALL, **options):
    async def inside():
        async with open_tasks(names, **options) as tasks:
            return await work(tasks)

    return asyncio.run(inside())


async def play(task, item, actions):
    environment = task.environment(item)
    try:
        seen = await environment.reset()
        for action in actions:
            seen = await environment.step(action)
            if seen.done:
                break
        return seen
    finally:
        await environment.close()


def items(task, split="test", count=1):
    return list(islice(task.items(split, 0), count))


def marked(function):
    for mark in browser:
        function = mark(function)
    return function


@marked
def test_experts_reach_errands_at_every_site():
    async def work(tasks):
        return [(task.name, await play(task, item, await task.demonstrate(item))) for task in tasks
                for item in items(task)]  # fmt: skip

    some = [name for site in SITES for name in [n for n in ALL if n.startswith(f"sites/{site}/")][:2]]
    done = run(work, some)
    assert [name for name, seen in done if (seen.done, seen.reward) != (True, 1.0)] == []
    assert {name.split("/")[1] for name, _ in done} == set(SITES)


@pytest.mark.slow
@marked
def test_experts_reach_many_errands_of_every_kind():
    async def work(tasks):
        return [(item.key, task.name, (await play(task, item, await task.demonstrate(item))).reward) for task in tasks
                for split in ("train", "test") for item in items(task, split, 12)]  # fmt: skip

    assert [one for one in run(work, pages=4) if one[2] != 1.0] == []


@marked
def test_what_was_not_asked_for_and_half_of_it_score_nothing():
    async def work(tasks):
        found = {}
        for task in tasks:
            (item,) = items(task)
            gold = await task.demonstrate(item)
            found[task.name] = gold, [await play(task, item, actions) for actions in (
                gold[:-2] + gold[-1:],  # the last deed is left out
                [*gold[:-1], 'fail("no")'],
                ["finished()"],
                ["I would click"],
                gold[:-1],
            )]  # fmt: skip
        return found

    for name, (gold, (half, gave_up, idle, malformed, silent)) in run(
        work, ["sites/shop/buy", "sites/mail/archive", "sites/kanban/drag", "sites/wiki/correct"]
    ).items():
        assert gold[-1] == "finished()", name
        assert (half.done, half.reward, half.parts) == (True, 0.0, {"state": 0.0, "answer": 1.0}), name
        assert (gave_up.reward, gave_up.parts) == (0.0, {"state": 1.0, "answer": 0.0}), name
        assert (idle.done, idle.reward) == (True, 0.0), name
        assert malformed.parts == {"malformed": 1.0}, name
        assert (silent.done, silent.reward) == (False, None), name


@marked
def test_questions_want_the_answer_and_an_untouched_site():
    async def work(tasks):
        price, missing = tasks
        (item,) = items(price)
        right = price.errand(item).answer
        answers = [f'finished("{right}")', f'finished("It costs ${right}.")', 'finished("12")', "finished()"]
        seen = [(await play(price, item, [answer])).reward for answer in answers]
        seen.append((await play(missing, items(missing)[0], ['fail("none")'])).reward)
        seen.append((await play(missing, items(missing)[0], ["finished()"])).reward)
        return seen

    assert run(work, ["sites/shop/price", "sites/shop/missing"]) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


@marked
def test_episodes_that_share_a_page_see_what_they_would_see_alone():
    async def work(tasks):
        (task,) = tasks
        one, other = items(task, count=2)
        gold = {item.key: await task.demonstrate(item) for item in (one, other)}
        alone = {}
        for item in (one, other):
            environment = task.environment(item)
            alone[item.key] = [await environment.reset(), *[await environment.step(a) for a in gold[item.key]]]
            await environment.close()
        task._seen.clear()
        together = {item.key: task.environment(item) for item in (one, other)}
        seen = {key: [await environment.reset()] for key, environment in together.items()}
        for n in range(max(map(len, gold.values()))):  # turn about on one page, which plays every episode again
            for key, environment in together.items():
                if n < len(gold[key]):
                    seen[key].append(await environment.step(gold[key][n]))
        return alone, seen

    alone, seen = run(work, ["sites/calendar/add"], pages=1)
    for key, observations in alone.items():
        assert observations[-1].reward == seen[key][-1].reward == 1.0
        for a, b in zip(observations, seen[key], strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))


@marked
def test_an_episode_ends_after_its_last_step():
    async def work(tasks):
        return await play(tasks[0], items(tasks[0])[0], ["wait()", *["key(\"Tab\")"] * (MAX_STEPS - 1)])  # fmt: skip

    seen = run(work, ["sites/mail/code"])
    assert (seen.done, seen.reward, seen.text) == (True, 0.0, f"not finished after {MAX_STEPS} actions")


@marked
def test_what_is_typed_is_shown_and_never_run(browser_pool):
    from mmagent.browser import run_sync

    async def work():
        async with browser_pool.page(800, 600) as page:
            errand = make_errand("mail", "send", 3)
            errand.db["letters"][0]["subject"] = "</script><img src=x onerror=\"site.db.letters = 'gone'\">"
            await page.set_content(document("mail", errand.db, 3))
            await page.frame()
            return await page.evaluate("[site.db.letters.length, document.images.length]")

    assert run_sync(work()) == [len(make_errand("mail", "send", 3).db["letters"]), 0]


def test_errands_follow_from_their_seed_and_ask_for_a_change_or_an_answer():
    for site, kinds in SITES.items():
        for kind in kinds:
            for seed in range(40):
                errand = make_errand(site, kind, seed)
                assert errand == make_errand(site, kind, seed)
                assert (errand.db != errand.wanted) == (errand.answer is None and errand.possible), (site, kind, seed)
                assert document(site, errand.db, seed) == document(site, errand.db, seed)
                assert "DATA" not in document(site, errand.db, seed)
                if errand.answer is not None:
                    assert told(errand.answer, errand)
                    assert told(f"I think it is {errand.answer}.", errand)
                    assert not told(", ".join({*errand.others, errand.answer, "7777"}), errand) or not errand.others
                    assert not told("", errand)


def test_one_answer_is_told_and_not_several():
    errand = Errand("x", "", {}, {}, (), "Room Oak", ("Room Oak", "Room Elm", "Hall"))
    assert told("room  OAK.", errand)
    assert told("It is in Room Oak", errand)
    for said in ("Room Elm", "Room Oak or Hall", "Room Oakwood", "Room", ""):
        assert not told(said, errand), said
    number = Errand("x", "", {}, {}, (), "3", tuple(map(str, range(10))))
    assert told("3", number)
    assert not told("13", number)
    assert not told("3 of 5", number)


def test_unknown_errands_and_screens_are_refused():
    with pytest.raises(ValueError, match="no errand shop/steal; there are shop/buy, "):
        make_errand("shop", "steal", 0)
    with pytest.raises(ValueError, match="sites need screens of 800x600, got 320x240"):
        SiteTask("shop/buy", Screens(None, 320, 240))
