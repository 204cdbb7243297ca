"""What a rendered page teaches is exact: regions cut nothing, boxes hold elements, claims are as true as asked."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from mmagent.actions import Click, Type, parse_action
from mmagent.browser import run_sync
from mmagent.geometry import ImageView
from mmagent.worlds.critic import RIGHT, balanced, claims, describe_hit, misread, next_step
from mmagent.worlds.languages import NAMES
from mmagent.worlds.lessons import KINDS, LESSONS, caption, lessons
from mmagent.worlds.pages import LEVELS, TEMPLATES, PageSource, Scene, generate, render
from mmagent.worlds.questions import noun, targets
from mmagent.worlds.referring import expressions
from tests.worlds.test_questions import element

SIZE = (480, 360)
VIEW = ImageView((SIZE[1], SIZE[0]), (SIZE[1], SIZE[0]))


@pytest.fixture(scope="module")
def pages(browser_pool) -> list[tuple[PageSource, Scene]]:
    async def run() -> list[tuple[PageSource, Scene]]:
        shown = []
        async with browser_pool.page(*SIZE, hide_scrollbars=True) as page:
            for n, name in enumerate(TEMPLATES):
                source = generate(3000 + n, *SIZE, 1 + n % LEVELS, name, tuple(NAMES)[n % len(NAMES)])
                shown.append((source, await render(page, source.html, *SIZE, trusted=True)))
        return shown

    return run_sync(run())


def test_every_template_has_words_for_its_caption():
    assert set(KINDS) == set(TEMPLATES)


@pytest.mark.browser
def test_a_page_teaches_all_kinds_and_is_a_function_of_the_seed(pages):
    kinds: Counter[str] = Counter()
    for source, scene in pages:
        for kind in LESSONS:
            kinds[kind] += len(lessons(scene, source, Random(0), 1, {kind: 1.0}))
        asked = lessons(scene, source, Random(1), 9)
        assert asked == lessons(scene, source, Random(1), 9)
        assert len(asked) >= 4, source.template
    assert all(kinds[kind] >= 5 for kind in LESSONS), kinds


@pytest.mark.browser
def test_regions_hold_whole_lines_only(pages):
    seen = 0
    for source, scene in pages:
        for question in lessons(scene, source, Random(2), 5, {"region": 1.0}):
            x1, y1, x2, y2 = question.box
            inside = []
            for line in scene.lines:
                across = line.box[0] < x2 and line.box[2] > x1 and line.box[1] < y2 and line.box[3] > y1
                if across:
                    assert x1 <= line.box[0] and line.box[2] <= x2 and y1 <= line.box[1] and line.box[3] <= y2  # noqa: PT018
                    inside.append(line.text)
            assert question.answer == "\n".join(inside)
            for box in scene.unread:
                assert box[0] >= x2 or box[2] <= x1 or box[1] >= y2 or box[3] <= y1
            seen += 1
    assert seen > 50


@pytest.mark.browser
def test_a_whole_page_is_read_only_where_nothing_is_cut(pages):
    read = [(scene, q) for source, scene in pages for q in lessons(scene, source, Random(0), 1, {"page": 1.0})]
    assert len(read) > 8
    for scene, question in read:
        assert not scene.unread
        assert question.answer.split("\n") == [line.text for line in scene.lines]


@pytest.mark.browser
def test_perception_names_every_element_of_a_kind(pages):
    for source, scene in pages:
        for question in lessons(scene, source, Random(0), 3, {"perceive": 1.0}):
            kind = question.question.split('"')[1]
            same = [e for e in scene.elements if noun(e) == kind and e.role not in ("text", "label", "box")]
            rows = question.answer.split("\n")
            assert len(rows) == len(same)
            for row, e in zip(rows, same, strict=True):
                numbers = list(map(int, row.split(" ")[0].split(",")))
                back = [*VIEW.from_frame(*numbers[:2]), *VIEW.from_frame(*numbers[2:])]
                assert all(abs(a - b) <= 1 for a, b in zip(back, e.box, strict=True))


@pytest.mark.browser
def test_clicks_for_expressions_hit_what_they_mean(pages):
    for source, scene in pages:
        meant = dict(expressions(scene.elements, scene.groups))
        for question in lessons(scene, source, Random(3), 4, {"refer": 1.0}):
            x, y = VIEW.from_frame(*(lambda click: (click.x, click.y))(parse_action(question.answer)))
            box = meant[question.question.removeprefix("Click ").removesuffix(".")].box
            assert box[0] <= x < box[2]
            assert box[1] <= y < box[3]


@pytest.mark.browser
def test_captions_tell_kind_language_title_and_what_is_there(pages):
    for source, scene in pages:
        text = caption(scene, source)
        assert KINDS[source.template][2:10] in text
        assert NAMES[source.spoken] in text
        title = next((e.text for e in scene.elements if e.role == "heading" and 0 < len(e.text) <= 60), "")
        assert title in text
        for count, kind in re.findall(r"(\d+) (button|link|checkbox)e?s?\b", text.split(" It shows ")[-1]):
            assert int(count) == sum(noun(e) == kind and e.clear >= 0.5 for e in scene.elements)


def judged(claim: str, scene: Scene) -> bool:
    """Whether a claim about a scene holds, read from its words alone."""
    if match := re.fullmatch(r'The text at ([\d,]+) reads "(.*)"\.', claim, re.DOTALL):
        return any(
            ",".join(map(str, VIEW.box_to_frame(ln.box))) == match[1] and ln.text == match[2] for ln in scene.lines
        )
    named = {t.phrase: t.element for t in targets(scene.elements)}
    if match := re.fullmatch(r"The (.*) is at ([\d,]+)\.", claim, re.DOTALL):
        return ",".join(map(str, VIEW.box_to_frame(named[f"the {match[1]}"].box))) == match[2]
    if match := re.fullmatch(r"At (\d+),(\d+) is (.*)\.", claim, re.DOTALL):
        x, y = VIEW.from_frame(int(match[1]), int(match[2]))
        box = named[match[3]].box
        return box[0] - 1 <= x <= box[2] + 1 and box[1] - 1 <= y <= box[3] + 1
    if match := re.fullmatch(r'There are (\d+) elements of kind "(.*)"\.', claim):
        shown = [e for e in scene.elements if noun(e) == match[2] and e.clear >= 0.5]
        return len(shown) == int(match[1])
    if match := re.fullmatch(r"The (.*) is (not )?(checked|selected)\.", claim, re.DOTALL):
        return named[f"the {match[1]}"].checked is (match[2] is None)
    if match := re.fullmatch(r'The (.*) contains (?:"(.*)"|nothing)\.', claim, re.DOTALL):
        return named[f"the {match[1]}"].value == (match[2] or "")
    if match := re.fullmatch(r"To click (.*), the action is (click\(\d+,\d+\))\.", claim, re.DOTALL):
        click = parse_action(match[2])
        x, y = VIEW.from_frame(click.x, click.y)
        every = named | dict(expressions(scene.elements, scene.groups))
        box = every[match[1]].box
        return box[0] <= x < box[2] and box[1] <= y < box[3]
    match = re.fullmatch(r"The text of (.*) is (\w+)\.", claim, re.DOTALL)
    from tests.worlds.test_referring import nearest_color

    return nearest_color(named[match[1]].color) == match[2]


@pytest.mark.browser
def test_claims_are_true_or_not_as_they_are_asked_for(pages):
    """A judge of its own finds out from the words of each claim, and half of all are right."""
    kinds: Counter[tuple[str, bool]] = Counter()
    for n, (_, scene) in enumerate(pages):
        for turn in range(6):
            random = Random(100 * n + turn)
            truths = list(balanced(random, 4))
            for claim, truth in zip(claims(scene, random, truths), truths, strict=False):
                assert claim.question.endswith(" Is that right?")
                assert judged(claim.question.removesuffix(" Is that right?"), scene) is truth, claim
                assert (claim.answer == RIGHT) is truth
                assert truth or claim.answer.startswith("Wrong: ")
                kinds[claim.kind, truth] += 1
    assert len({kind for kind, _ in kinds}) == 7
    assert all(kinds[kind, truth] >= 10 for kind, _ in kinds for truth in (True, False)), kinds
    right = sum(count for (_, truth), count in kinds.items() if truth)
    assert 0.45 < right / kinds.total() < 0.55


def test_truths_are_balanced():
    for count in range(9):
        for seed in range(20):
            truths = list(balanced(Random(seed), count))
            assert abs(2 * sum(truths) - count) <= 1


def test_what_is_misread_is_one_detail():
    for n, text in enumerate(["Order 1249", "Blue hill", "Montag 日程", "ЖЖ", "!!"]):
        wrong = misread(text, Random(n))
        if text in ("ЖЖ", "!!"):
            assert wrong is None
        else:
            assert len(wrong) == len(text)
            assert 1 <= sum(a != b for a, b in zip(wrong, text, strict=True)) <= 2
    assert not {misread("Il", Random(n)) for n in range(60)} & {"II", "ll"}  # drawn alike: that claim would be right


def test_the_next_step_is_judged_by_the_experts():
    right = next_step("Save it.", [Click(1, 2)], Type("x"), Type("x"), "")
    assert right.question == 'Goal: Save it. So far: click(1,2). The next action is type("x"). Is that right?'
    assert right.answer == RIGHT
    wrong = next_step("Save it.", [], Click(5, 5), Type("x"), f"hits {describe_hit(element('button', 'OK'))}")
    assert wrong.answer == 'Wrong: that hits the button "OK"; it is type("x").'
