"""Wrong next actions are wrong: the goal is not reached with one of them in the place of the expert's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from mmagent.actions import Action, Click, Drag, Finished, Hotkey, Key, Scroll, Type
from mmagent.browser import perform, run_sync
from mmagent.geometry import ImageView
from mmagent.worlds.elements import Element
from mmagent.worlds.missteps import KINDS, Misstep, missteps
from mmagent.worlds.pages import LEVELS, Scene
from mmagent.worlds.pages.app_kinds import APPS, generate_app
from mmagent.worlds.traces import Trace, play, reached
from tests.worlds.test_questions import element

SIZE = (320, 240)
EMPTY = np.zeros((240, 320, 3), np.uint8)


def trace_of(goal: str, screens: list[list[Element]], actions: list[Action], boxes: list | None = None) -> Trace:
    """A trace of which nothing was played: the screens hold these elements."""
    scenes = tuple(Scene(EMPTY, "", tuple(elements), ()) for elements in screens)
    app = replace(generate_app(3, *SIZE, kind="sign_up"), goal=goal)
    return Trace(app, scenes, tuple(actions), tuple(boxes or [None] * len(actions)))


def of(kind: str, trace: Trace, at: int, tries: int = 40) -> set[tuple[Action, str]]:
    found = [m for n in range(tries) for m in missteps(trace, at, Random(n)) if m.kind == kind]
    return {(m.action, m.says) for m in found}


EMAIL = element("textbox", "Email", (10, 30, 90, 50))
CITY = element("textbox", "City", (10, 60, 90, 80))


def test_what_the_goal_names_is_no_wrong_step():
    """A click on a field's label is as good as one on the field, and an entry that shows already need not be scrolled
    to."""
    named = element("label", "Email", (10, 10, 60, 24))
    screens = [[named, EMAIL], [named, EMAIL]]
    trace = trace_of('Fill in "Email" = "x".', screens, [Click(100, 160)], [EMAIL.box])
    assert of("idle", trace, 0) == set()
    other = element("label", "City", (10, 60, 60, 74))
    trace = trace_of('Fill in "Email" = "x".', [[*s, other] for s in screens], [Click(100, 160)], [EMAIL.box])
    assert {says for _, says in of("idle", trace, 0)} == {'hits the label "City"'}


def test_wrong_texts_and_fields_are_told_by_the_focus():
    goal = 'Fill in "Email" = "ab", "City" = "cd".'
    plain, first, written = [EMAIL, CITY], [replace(EMAIL, focused=True), CITY], replace(EMAIL, value="ab")
    screens = [plain, first, [replace(written, focused=True), CITY], [written, replace(CITY, focused=True)], plain]
    trace = trace_of(goal, screens, [Click(100, 160), Type("ab"), Click(100, 290), Type("cd")])
    texts = of("text", trace, 1)
    assert (Type("cd"), 'writes "cd" into the text field "Email", where "ab" is asked for') in texts
    assert all(action != Type("ab") for action, _ in texts)
    assert of("field", trace, 0) == {(Type("ab"), "comes before a text field has the focus")}
    assert of("field", trace, 2) == {(Type("cd"), 'writes into the text field "Email", which has the focus')}
    assert of("field", trace, 1) == of("field", trace, 3) == set()


def test_a_field_that_has_the_focus_already_may_be_written_into():
    focused = replace(EMAIL, focused=True)
    trace = trace_of('Fill in "Email" = "ab".', [[focused]] * 3, [Click(100, 160), Type("ab")])
    assert of("field", trace, 0) == set()
    full = replace(focused, value="old")
    trace = trace_of('Fill in "Email" = "ab".', [[full]] * 3, [Hotkey("ctrl+a"), Type("ab")])
    assert of("field", trace, 0) == {(Type("ab"), 'leaves "old" standing in the text field "Email"')}
    assert (Key("End"), "presses End, which does not select what stands in the field") in of("key", trace, 0)


def test_keys_drags_and_wheels_go_the_other_way():
    trace = trace_of('Find "x".', [[]] * 3, [Type("x"), Key("Enter")])
    assert of("key", trace, 0) == {(Key("Enter"), 'presses Enter before "x" is written')}
    assert (Key("Escape"), "presses Escape, which does not confirm what is written") in of("key", trace, 1)
    trace = trace_of("Scroll.", [[]] * 2, [Scroll(500, 500, 0, 300)])
    says = "scrolls up, and what is sought lies further down"
    assert of("way", trace, 0) == {(Scroll(500, 500, 0, -300), says)}
    trace = trace_of('Move the card "A" and "B".', [[]] * 2, [Drag(200, 300, 600, 400)])
    back = (Drag(600, 400, 200, 300), "drags from where it is to end to where it is to begin")
    left = (Drag(200, 300, 0, 400), "drags to the left, not to the right")
    assert of("way", trace, 0) == {back, left}
    other = element("text", "B", (180, 80, 220, 120))  # a card that is to be moved, too, where the drag ends
    trace = trace_of('Move the card "A" and "B".', [[other]] * 2, [Drag(200, 300, 600, 400)])
    assert of("way", trace, 0) == {left}


def test_a_later_step_is_early_only_where_the_screen_says_so():
    menu, entry = element("menuitem", "File", (10, 10, 40, 24)), element("menuitem", "Save", (10, 30, 60, 44))
    clicks = [Click(70, 70), Click(100, 150)]
    goal = 'Choose "Save" in the menu "File".'
    trace = trace_of(goal, [[menu], [menu, entry], [menu]], clicks, [menu.box, entry.box])
    assert of("early", trace, 0) == {(clicks[1], 'comes too early: the menu item "Save" is not on the screen yet')}
    trace = trace_of(goal, [[menu, entry]] * 3, clicks, [menu.box, entry.box])
    assert of("early", trace, 0) == set()
    send, box = element("button", "Send", (10, 100, 60, 120)), element("checkbox", "News", (10, 70, 20, 80))
    off, on = [replace(box, checked=False), send], [replace(box, checked=True), send]
    trace = trace_of('Tick "News", then press "Send".', [off, on, on], [Click(40, 310), Click(100, 460)])
    assert of("early", trace, 0) == {
        (Click(100, 460), 'presses the button "Send" before the checkbox "News" is checked')
    }


def test_to_finish_is_right_at_the_end_only():
    trace = trace_of("Press it.", [[]] * 2, [Click(1, 2)])
    assert of("finished", trace, 0) == {(Finished(), "comes before the goal is reached")}
    assert of("finished", trace, 1) == set()
    assert of("late", trace, 1) == {(Click(1, 2), "comes after the goal is reached")}


async def replayed(page, trace: Trace, at: int, wrong: Misstep) -> bool:
    """Whether the goal is reached with ``wrong`` in the place of the expert's action ``at``."""
    app, size = trace.app, (trace.app.height, trace.app.width)
    await page.move(0, 0)
    await page.set_content(app.html)
    for action in (*trace.actions[:at], wrong.action, *trace.actions[at + 1 :]):
        await perform(page, action, ImageView(size, size))
        if await reached(page, app):
            return True
    return False


QUICK = ("renaming", "cells", "long_list")


@pytest.mark.browser
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in APPS])
def test_no_misstep_leads_to_the_goal(browser_pool, kind):
    """The browser judges: with one of them in the place of the expert's action the goal is not reached."""

    async def run() -> Counter[str]:
        kinds: Counter[str] = Counter()
        async with browser_pool.page(*SIZE) as page:
            for level in (2, LEVELS):
                trace = await play(page, generate_app(60 + level, *SIZE, level, kind))
                for at in range(len(trace.actions)):
                    for wrong in missteps(trace, at, Random(at)):
                        kinds[wrong.kind] += 1
                        if wrong.kind != "finished":
                            assert not await replayed(page, trace, at, wrong), (trace.app.goal, at, wrong)
        return kinds

    kinds = run_sync(run())
    assert len(kinds) >= 2
    assert set(kinds) <= set(KINDS)
