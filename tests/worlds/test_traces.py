"""Apps work, their experts reach the goal with real input, and a trace that did not is refused."""

from __future__ import annotations

import dataclasses
import html
import re
from random import Random

import numpy as np
import pytest

from mmagent.actions import Click, Drag, Type
from mmagent.browser import perform, run_sync
from mmagent.geometry import ImageView
from mmagent.worlds.changes import changes
from mmagent.worlds.languages import NAMES
from mmagent.worlds.pages import LEVELS, render
from mmagent.worlds.pages.app_kinds import APPS, generate_app
from mmagent.worlds.pages.apps import App, Step
from mmagent.worlds.seeds import SPLITS, seed_for
from mmagent.worlds.traces import Trace, TraceError, play, reached

SIZE = (320, 240)


def played(pool, app: App, **options) -> Trace:
    async def run() -> Trace:
        async with pool.page(app.width, app.height) as page:
            return await play(page, app, **options)

    return run_sync(run())


def test_a_seed_is_an_app_and_no_app_belongs_to_two_splits():
    for kind in APPS:
        assert generate_app(5, *SIZE, 3, kind) == generate_app(5, *SIZE, 3, kind)
    apps = {split: {generate_app(seed_for(split, n), *SIZE).html for n in range(60)} for split in SPLITS}
    assert sum(map(len, apps.values())) == len(set.union(*apps.values())) == 180
    assert {generate_app(n, *SIZE).kind for n in range(200)} == set(APPS)


def test_difficulty_asks_for_more_steps():
    steps = [np.mean([len(generate_app(n, 480, 360, level).steps) for n in range(150)]) for level in (1, 3, LEVELS)]
    assert steps[0] < steps[1] < steps[2]


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="app 'mines' is none of sign_up"):
        generate_app(1, *SIZE, 3, "mines")
    with pytest.raises(ValueError, match="difficulty 9"):
        generate_app(1, *SIZE, 9)
    with pytest.raises(ValueError, match="100x90 pixels is too small"):
        generate_app(1, 100, 90)


@pytest.mark.parametrize("spoken", NAMES)
def test_no_menu_holds_a_word_twice(spoken):
    """On a large screen there was room for more entries than the language has words: "Choose X" meant either."""
    for size in ((1280, 720), (768, 1024), SIZE):
        for seed in range(12):
            app = generate_app(seed, *size, LEVELS, "menu_bar", spoken)
            items = re.findall(r'role="menuitem">([^<]+)<', app.html)
            named = [html.unescape(item).removesuffix(" ›").casefold() for item in items]
            assert len(set(named)) == len(named), [item for item in named if named.count(item) > 1]


QUICK = ("sign_up", "board", "painting", "long_list")
"""Kinds of apps in the default suite: fields, a drag, a canvas, a wheel."""


@pytest.mark.browser
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in APPS])
def test_the_expert_reaches_the_goal_and_its_actions_do_so_again(browser_pool, kind):
    """Once by the expert, who sees the document; once by its actions alone, on a fresh page."""
    n = list(APPS).index(kind)
    app = generate_app(40 + n, *((320, 240), (480, 360))[n % 2], 1 + n % LEVELS, kind, tuple(NAMES)[n % len(NAMES)])
    trace = played(browser_pool, app)
    view = ImageView((app.height, app.width), (app.height, app.width))
    assert len(trace.scenes) == len(trace.actions) + 1 == len(trace.boxes) + 1
    for action, box in zip(trace.actions, trace.boxes, strict=True):
        if isinstance(action, Click):
            x, y = view.from_frame(action.x, action.y)
            assert box[0] <= x <= box[2]
            assert box[1] <= y <= box[3]

    async def again() -> tuple[list[bool], list[np.ndarray]]:
        async with browser_pool.page(app.width, app.height) as page:
            await page.set_content(app.html)
            held, screens = [await reached(page, app)], []
            for action in trace.actions:
                await perform(page, action, view)
                held.append(await reached(page, app))
                screens.append(await page.screenshot())
            return held, screens

    held, screens = run_sync(again())
    assert held == [False] * len(trace.actions) + [True]
    assert all((a == b.image).all() for a, b in zip(screens, trace.scenes[1:], strict=True))
    typed = {action.text for action in trace.actions if isinstance(action, Type)}
    for quoted in re.findall(r'"(.+?)"', app.goal):
        assert quoted in typed or html.escape(quoted) in app.html, quoted


@pytest.mark.browser
def test_what_does_not_work_is_no_trace(browser_pool):
    app = generate_app(3, *SIZE, 3, "options")
    for broken, says in (
        ({"wanted": {"state.saved": 5}}, r"options: the goal is not reached after \d+ actions"),
        ({"wanted": {"state.saved": None}}, "options: the goal holds before anything is done"),
        ({"steps": (*app.steps, app.steps[-1])}, "options: the goal holds before step"),
        ({"steps": (Step("click", "#absent"),)}, "options: nothing to reach at #absent"),
        ({"steps": (Step("click", "section[style]"),)}, "options: nothing to reach at section"),
    ):
        with pytest.raises(TraceError, match=says):
            played(browser_pool, dataclasses.replace(app, **broken), elements=False)
    far = generate_app(3, *SIZE, 3, "long_list")
    still = far.html.replace("overflow-y:scroll", "overflow:hidden;pointer-events:none")
    covered = dataclasses.replace(far, html=still)
    with pytest.raises(TraceError, match="long_list"):
        played(browser_pool, covered, elements=False)


def judge(before: str, after: str, pool) -> list[str]:
    async def run() -> list[str]:
        async with pool.page(*SIZE) as page:
            return changes(await render(page, before, *SIZE), await render(page, after, *SIZE))

    return run_sync(run())


@pytest.mark.browser
def test_changes_are_told_in_words(browser_pool):
    page = """<label><input type=checkbox A> News</label><br><label>Name <input B></label><br><button C>Save</button>
    <p>stays</p>D"""

    def of(**parts: str) -> str:
        made = page
        for letter in "ABC":
            made = made.replace(f" {letter}>", f" {parts.get(letter, '')}>")
        return made.replace("</p>D", "</p>" + parts.get("D", ""))

    assert judge(of(), of(), browser_pool) == []
    assert judge(of(), of(A="checked"), browser_pool) == ['the checkbox "News" is now checked']
    assert judge(of(A="checked"), of(), browser_pool) == ['the checkbox "News" is no longer checked']
    assert judge(of(), of(B="value=Ada"), browser_pool) == ['the text field "Name" now contains "Ada"']
    assert judge(of(B="value=Ada"), of(), browser_pool) == ['the text field "Name" is now empty']
    assert judge(of(), of(C="disabled"), browser_pool) == ['the button "Save" is no longer enabled']
    assert judge(of(), of(B="autofocus"), browser_pool) == ['the text field "Name" has the focus']
    assert judge(of(), of(C="style='margin-left:30px'"), browser_pool) == ['the button "Save" has moved']
    assert judge(of(), of(D="<p>new</p>"), browser_pool) == ['the text "new" has appeared']
    assert judge(of(D="<p>new</p>"), of(), browser_pool) == ['the text "new" is gone']
    twice = of(D="<button>Save</button>")
    assert judge(of(), twice, browser_pool) == []  # which of the two is new, nobody can say


@pytest.mark.browser
def test_most_steps_change_something_that_words_can_tell(browser_pool):
    told = total = 0
    for n, kind in enumerate(("sign_up", "options", "confirm")):
        trace = played(browser_pool, generate_app(Random(n).randrange(999), *SIZE, 3, kind))
        for before, after, action in zip(trace.scenes, trace.scenes[1:], trace.actions, strict=False):
            said = changes(before, after)
            told, total = told + bool(said), total + 1
            if isinstance(action, Type):
                assert any(action.text in sentence for sentence in said)
            assert not isinstance(action, Drag)
    assert told > 0.7 * total
