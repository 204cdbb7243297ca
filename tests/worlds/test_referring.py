"""Referring expressions mean one element: a checker of its own reads each phrase and finds that one and no other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mmagent.browser import run_sync
from mmagent.worlds.elements import Element, Group
from mmagent.worlds.languages import NAMES
from mmagent.worlds.pages import LEVELS, TEMPLATES, Scene, generate, render
from mmagent.worlds.questions import COLORS, NOUNS
from mmagent.worlds.referring import ORDINALS, expressions, lies
from tests.worlds.test_questions import element

SIZE = (480, 360)
WORDS = ("to the right of", "to the left of", "below", "above", "under", "in the", "most", "checked")


@pytest.fixture(scope="module")
def scenes(browser_pool) -> list[Scene]:
    """Every template at two levels, in all languages in turn."""

    async def run() -> list[Scene]:
        shown = []
        async with browser_pool.page(*SIZE, hide_scrollbars=True) as page:
            for n, name in enumerate(TEMPLATES):
                for level in (2, LEVELS):
                    source = generate(1000 + n, *SIZE, level, name, tuple(NAMES)[n % len(NAMES)])
                    shown.append(await render(page, source.html, *SIZE, trusted=True))
        return shown

    return run_sync(run())


def called(e: Element) -> str:
    kind = e.tag if e.role == "shape" else e.role
    return NOUNS.get(kind, kind)


def nearest_color(color: str) -> str:
    rgb = np.array(list(bytes.fromhex(color[1:])), float)
    return min(COLORS, key=lambda name: float(((np.array(COLORS[name]) - rgb) ** 2).sum()))


def plain(phrase: str, scene: Scene) -> list[Element]:
    """Elements that a phrase without a relation means: by name, by number, or alone of their kind."""
    match = re.fullmatch(r'the ([a-z -]+?)(?: "(.*)")?', phrase, re.DOTALL)
    assert match, phrase
    kind, text = match.groups()
    if text is not None:
        return [e for e in scene.elements if called(e) == kind and e.text == text]
    words = kind.split(" ", 1)
    if words[0] in ORDINALS and len(words) == 2:
        same = sorted((e for e in scene.elements if called(e) == words[1]), key=lambda e: (e.box[1], e.box[0]))
        return same[ORDINALS.index(words[0]) :][:1]
    return [e for e in scene.elements if called(e) == kind]


def beside(relation: str, anchor: Element) -> Callable[[Element], bool]:
    """By pixels: its rows (or columns) meet the anchor's, and no pixel of it lies on this side of the border."""
    ax, bx = (set(range(anchor.box[0], anchor.box[2])), set(range(anchor.box[1], anchor.box[3])))

    def fits(e: Element) -> bool:
        columns, rows = set(range(e.box[0], e.box[2])), set(range(e.box[1], e.box[3]))
        if relation in ("to the right of", "to the left of"):
            past = min(columns) >= max(ax) - 1 if "right" in relation else max(columns) <= min(ax) + 1
            return bool(rows & bx) and past
        past = min(rows) >= max(bx) - 1 if relation == "below" else max(rows) <= min(bx) + 1
        return bool(columns & ax) and past

    return fits


def held(role: str, name: str, scene: Scene) -> Group:
    (group,) = (g for g in scene.groups if (g.role, g.name) == (role, name))
    return group


def meant(phrase: str, scene: Scene) -> list[Element]:
    """Every element that a phrase could mean."""
    relation = re.fullmatch(r"the ([a-z -]+?) (to the right of|to the left of|below|above) (the .*)", phrase, re.DOTALL)
    if relation:
        kind, how, anchor = relation.groups()
        (known,) = plain(anchor, scene)
        return [e for e in scene.elements if called(e) == kind and beside(how, known)(e)]
    cell = re.fullmatch(r'the cell under "(.*?)" in the row "(.*)"', phrase, re.DOTALL)
    if cell:
        row = [scene.elements[n] for n in held("row", cell[2], scene).members]
        (head,) = (e for e in scene.elements if e.role == "columnheader" and e.text == cell[1])
        middle = {id(e): (e.box[0] + e.box[2]) / 2 for e in row}
        return [e for e in row if e.tag == "td" and head.box[0] <= middle[id(e)] < head.box[2]]
    numbers = "|".join((*ORDINALS, "last"))
    within = re.fullmatch(rf'the (?:({numbers}) )?([a-z -]+?) in the ([a-z ]+) "(.*)"', phrase, re.DOTALL)
    if within:
        number, kind, role, name = within.groups()
        same = [scene.elements[n] for n in held(role, name, scene).members if called(scene.elements[n]) == kind]
        same.sort(key=lambda e: (e.box[1], e.box[0]))
        return same if number is None else [same[-1 if number == "last" else ORDINALS.index(number)]]
    word, kind = re.fullmatch(r"the (\w+) ([a-z -]+)", phrase).groups()
    same = [e for e in scene.elements if called(e) == kind]
    boxes = np.array([e.box for e in same])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    tests: dict[str, np.ndarray] = {
        "leftmost": boxes[:, 0] < boxes[:, 0].min() + 6, "rightmost": boxes[:, 2] > boxes[:, 2].max() - 6,
        "topmost": boxes[:, 1] < boxes[:, 1].min() + 6, "lowest": boxes[:, 3] > boxes[:, 3].max() - 6,
        "largest": areas > areas.max() / 1.5, "smallest": areas < areas.min() * 1.5,
        "checked": np.array([e.checked is True for e in same]),
        "unchecked": np.array([e.checked is False for e in same]),
        "selected": np.array([e.checked is True for e in same]), "disabled": np.array([not e.enabled for e in same]),
        "empty": np.array([e.value == "" for e in same]), "focused": np.array([e.focused for e in same]),
    }  # fmt: skip
    if word in COLORS:
        return [e for e in same if nearest_color(e.background) == word]
    return [e for e, fits in zip(same, tests[word], strict=True) if fits]


@pytest.mark.browser
def test_an_independent_reader_finds_what_is_meant_and_nothing_else(scenes):
    kinds: Counter[str] = Counter()
    for scene in scenes:
        for phrase, target in expressions(scene.elements, scene.groups):
            assert meant(phrase, scene) == [target], phrase
            assert target.clear >= 0.5
            words = (
                "to the right of",
                "to the left of",
                "below",
                "above",
                "under",
                "in the",
                "most",
                "checked",
                "selected",
            )
            kinds[next((word for word in words if f" {word}" in phrase or f"{word} " in phrase), "other")] += 1
    assert all(
        kinds[word] >= 5 for word in ("to the right of", "below", "above", "under", "in the", "most", "checked")
    ), kinds
    assert kinds.total() > 8 * len(scenes)


def test_nothing_is_said_that_a_loose_reader_could_take_otherwise():
    label, near, far = element("label", "Mail", (0, 0, 40, 20)), element("textbox", "", (50, 0, 90, 20)), None
    said = {t.phrase for t in expressions([label, near])}
    assert 'the text field to the right of the label "Mail"' in said
    far = element("textbox", "", (120, 15, 160, 40))  # only a corner of it is level
    said = {t.phrase for t in expressions([label, near, far])}
    assert not [phrase for phrase in said if "right of the label" in phrase]
    hidden = element("textbox", "", (120, 0, 160, 20), visible=0.1)
    assert not [t for t in expressions([label, near, hidden]) if "right of the label" in t.phrase]


def test_colours_and_states_single_out():
    red, blue = (
        element("button", "A", background="#e61414"),
        element("button", "B", (0, 0, 20, 9), background="#0a14f5"),
    )
    assert {t.phrase: t.element for t in expressions([red, blue])}["the red button"] is red
    unsure = element("button", "C", (100, 0, 120, 9), background="#7b4a6e")  # it has no name
    assert "the red button" not in {t.phrase for t in expressions([red, blue, unsure])}
    on, off = element("checkbox", "x", checked=True), element("checkbox", "y", (0, 60, 9, 69), checked=False)
    found = {t.phrase: t.element for t in expressions([on, off])}
    assert found["the checked checkbox"] is on
    assert found["the unchecked checkbox"] is off


@pytest.mark.parametrize(
    ("box", "relation", "holds"),
    [
        ((50, 0, 60, 10), "to the right of", True),
        ((50, 30, 60, 40), "to the right of", False),
        ((30, 0, 60, 10), "to the right of", False),
        ((0, 30, 10, 40), "below", True),
        ((60, 30, 70, 40), "below", False),
    ],
)
def test_relations(box, relation, holds):
    assert lies(box, (0, 0, 40, 20), relation) is holds
