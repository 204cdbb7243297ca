"""Questions about screens: phrases mean one thing, answers are in the frame, and nothing is asked twice."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmagent.actions import Click, parse_action
from mmagent.geometry import ImageView
from mmagent.worlds.elements import Element, TextLine
from mmagent.worlds.questions import WEIGHTS, Question, ask, color_name, describe, labels, noun, targets

SIZE = (200, 400)


def element(role: str, text: str = "", box=(40, 20, 80, 40), tag: str = "div", **more: object) -> Element:
    x1, y1, x2, y2 = box
    facts = {"color": "#000000", "background": "#ffffff", "visible": 1.0, "point": ((x1 + x2) / 2, (y1 + y2) / 2)}
    return Element(box, text, role, tag, **(facts | more))


def line(text: str, box=(0, 0, 100, 10)) -> TextLine:
    return TextLine(box, text, "#000000", "#ffffff", 10.0)


def asked(elements=(), lines=(), weights=WEIGHTS, count=50) -> list[Question]:
    return ask(SIZE, elements, lines, Random(0), count, weights)


@pytest.mark.parametrize(
    "found, phrase",
    [
        (element("button", "OK"), 'the button "OK"'),
        (element("textbox", "Name"), 'the text field "Name"'),
        (element("textbox"), "the text field"),
        (element("combobox", "Red"), 'the drop-down "Red"'),
        (element("shape", tag="circle", color="#e61e1e"), "the red circle"),
        (element("shape", "A", tag="rect", color="#f5eb32"), 'the yellow rectangle "A"'),
        (element("box", background="#1e3ce6"), "the blue box"),
        (element("box", background="#7b4a6e"), None),
        (element("button"), None),
        (element("text", "short words"), 'the text "short words"'),
        (element("text", "a sentence that nobody would point at"), None),
        (element("link", "x" * 41), None),
    ],
)
def test_phrases(found, phrase):
    assert describe(found) == phrase


def test_targets_are_named_without_a_doubt_and_visible():
    twice = [element("button", "OK"), element("button", "OK", (0, 0, 9, 9)), element("link", "OK")]
    assert [t.phrase for t in targets([*twice, element("button", "Go", visible=0.3)])] == ['the link "OK"']
    covered = [element("button", "OK"), element("button", "OK", visible=0.1)]
    assert targets(covered) == []  # the covered one still shows a little


def test_what_is_alone_of_its_kind_needs_no_name():
    def clicks(*elements: Element) -> set[str]:
        return {q.question for n in range(20) for q in ask(SIZE, elements, [], Random(n), 9, {"locate": 1.0})}

    ok, more = element("button", "OK"), element("link", "more", (200, 20, 240, 40))
    assert clicks(ok, more) == {
        'Click the button "OK".',
        "Click the button.",
        'Click the link "more".',
        "Click the link.",
    }
    hidden = element("button", "Go", (100, 20, 140, 40), visible=0.1)
    assert clicks(ok, hidden) == {'Click the button "OK".'}, "a second one that hardly shows is still a second one"
    assert clicks(element("text", "words")) == {'Click the text "words".'}, "text is no kind of control"


def test_labels_name_what_shows():
    shown = [
        element("button", "OK"),
        element("textbox"),
        element("button", "Go", visible=0.2),
        element("shape", tag="g"),
    ]
    assert labels(shown) == [((40, 20, 80, 40), 'button "OK"'), ((40, 20, 80, 40), "text field")]


def test_controls_without_a_name_of_their_own_go_by_their_place():
    fields = [element("textbox", "", (0, y, 50, y + 10)) for y in (60, 20, 40)]
    assert [t.phrase for t in targets(fields)] == [
        "the third text field",
        "the first text field",
        "the second text field",
    ]
    assert targets([*fields, element("textbox", "", (0, 42, 50, 52))]) == []  # which of two on a crooked line is first?
    assert targets([element("text", "a", (0, n, 9, n + 9)) for n in (0, 20)]) == []


def test_what_is_asked_only_where_one_thing_is_meant():
    outer, inner = element("tab", "Outer", (0, 0, 100, 100)), element("button", "Inner", (40, 40, 60, 60))
    assert [q.answer for q in asked([outer, inner], weights={"what": 1.0})] == ['button "Inner"']


def test_steps_are_one_action():
    elements = [
        element("checkbox", "news", (0, 100, 10, 110), checked=False),
        element("tab", "One", (0, 150, 10, 160), checked=True),
        element("textbox", "Name", (200, 100, 300, 110), focused=True),
        element("textbox", "City", (200, 140, 300, 150)),
        element("checkbox", "off", (0, 50, 10, 60), checked=False, enabled=False),
    ]
    steps = {q.question: q.answer for q in asked(elements, weights={"step": 1.0})}
    assert steps == {
        'Tick the checkbox "news".': "click(12,525)",
        'Type "Name" into the text field "Name".': 'type("Name")',
        'Put the cursor into the text field "City".': "click(625,725)",
    }


@pytest.mark.parametrize("name", ["red", "green", "blue", "black", "white", "yellow", "grey", "orange"])
def test_colours_have_their_everyday_names(name):
    known = {"red": "#ff0000", "green": "#118822", "blue": "#0000ff", "black": "#000000"}
    known |= {"white": "#ffffff", "yellow": "#ffff00", "grey": "#808080", "orange": "#ffa500"}
    assert color_name(known[name]) == name


@given(st.integers(0, 2**24 - 1))
def test_any_colour_has_a_name_or_none(value):
    assert color_name(f"#{value:06x}") is None or " " not in str(color_name(f"#{value:06x}"))


def test_clicks_hit_what_they_name():
    elements = [element("button", "OK", (300, 150, 380, 190)), element("link", "more", (10, 10, 30, 20))]
    for question in asked(elements, weights={"locate": 1.0}):
        action = parse_action(question.answer)
        assert isinstance(action, Click)
        x, y = ImageView(SIZE, SIZE).from_frame(action.x, action.y)
        (named,) = [e for e in elements if question.question in (f"Click {describe(e)}.", f"Click the {noun(e)}.")]
        assert named.box[0] <= x < named.box[2]
        assert named.box[1] <= y < named.box[3]
    assert len(asked(elements, weights={"locate": 1.0})) == 2


def test_each_kind_says_what_is_true():
    elements = [
        element("button", "OK", (40, 20, 80, 40)),
        element("button", "Go", (100, 20, 140, 40), color="#ff0000"),
        element("checkbox", "news", (0, 100, 10, 110), checked=True),
        element("tab", "Two", (0, 150, 10, 160), checked=False),
        element("textbox", "Name", (200, 100, 300, 110), value="Ada"),
        element("textbox", "City", (200, 120, 300, 130)),
    ]
    found = {}
    for seed in range(60):  # one about a place rules out others about it
        some = ask(SIZE, elements, [line("Hello", (0, 0, 100, 19))], Random(seed), 50)
        found |= {(q.kind, q.question): q.answer for q in some}
    assert found["where", 'Where is the button "OK"?'] == "100,100,200,200"
    assert found["what", "What is at 150,150?"] == 'button "OK"'
    assert found["read", "Read the text at 0,0,250,95."] == "Hello"
    assert found["find", 'Where does it say "Hello"?'] == "0,0,250,95"
    assert found["text", "Read all the text."] == "Hello"
    assert found["count", 'How many elements of kind "button" are there?'] == "2"
    assert found["list", 'List the elements of kind "button".'] == "OK\nGo"
    assert found["state", 'Is the checkbox "news" checked?'] == "yes"
    assert found["state", 'Is the tab "Two" selected?'] == "no"
    assert found["state", 'What does the text field "Name" contain?'] == "Ada"
    assert found["state", 'What does the text field "City" contain?'] == "nothing"
    assert found["step", 'Untick the checkbox "news".'] == "click(12,525)"
    assert found["describe", "Describe the screen."] == '1 checkbox; 1 tab; 2 text fields; buttons "OK", "Go"'
    assert found["colour", 'What colour is the text of the button "Go"?'] == "red"
    assert {kind for kind, _ in found} == set(WEIGHTS)


def test_questions_differ_are_limited_and_seeded():
    elements = [element("button", f"B{n}", (n * 20, 0, n * 20 + 10, 10)) for n in range(9)]
    lines = [line(f"text {n}", (0, n * 10, 50, n * 10 + 9)) for n in range(9)]
    questions = asked(elements, lines, count=12)
    assert len({q.question for q in questions}) == 12
    assert questions == asked(elements, lines, count=12)
    assert questions != ask(SIZE, elements, lines, Random(1), 12)
    everything = asked(elements, lines, count=1000)
    assert len({q.question for q in everything}) == len(everything) < 100
    assert asked() == []


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"no questions of kind \['smell'\]"):
        asked(weights={"smell": 1.0})


def test_shapes_are_called_by_their_tag():
    assert noun(element("shape", tag="polygon")) == "polygon"


@given(st.integers(0, 2**32))
def test_no_answer_tells_where_another_one_is(seed):
    button, words = element("button", "OK"), line("OK", (50, 25, 70, 35))
    apart, dialog = element("link", "Help", (100, 100, 130, 110)), element("dialog", "Box", (0, 0, 200, 200))
    questions = ask(SIZE, [button, apart, dialog], [words], Random(seed), 50)
    about = [q for q in questions if q.box in (button.box, words.box)]
    assert len(about) == 1
    assert sum(q.box == apart.box for q in questions) == 1
    assert sum(q.box == dialog.box for q in questions) == 1


def test_what_has_no_name_is_meant_only_where_it_is_alone():
    """ "The text field" could as well be one that has a name."""
    fields = [element("textbox", "Email", (0, 0, 90, 20)), element("textbox", "", (0, 40, 90, 60))]
    assert [t.phrase for t in targets(fields)] == ['the text field "Email"', "the second text field"]
    shapes = [element("shape", "A", tag="circle", color="#e61e1e"), element("shape", tag="circle", color="#e61e1e")]
    assert [t.phrase for t in targets(shapes)] == ['the red circle "A"']


def test_kinds_of_which_one_shows_in_part_are_not_counted():
    whole = [element("button", "A"), element("button", "B", (0, 0, 9, 9))]
    counted = {q.question for q in asked(whole, weights={"count": 1.0, "list": 1.0})}
    assert len(counted) == 2
    assert asked([*whole, element("button", "C", visible=0.3)], weights={"count": 1.0, "list": 1.0}) == []
