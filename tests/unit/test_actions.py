"""The action space: every action has one text, and nothing else parses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmagent.actions import (
    ACTIONS,
    KEYS,
    MODIFIERS,
    PROMPT,
    ActionError,
    Click,
    DoubleClick,
    Drag,
    Finished,
    Hotkey,
    Key,
    RightClick,
    Scroll,
    Type,
    Wait,
    format_action,
    parse_action,
    schema,
)

coordinate, distance = st.integers(0, 999), st.integers(-999, 999)
text = st.text(max_size=50)
key = st.sampled_from(KEYS) | st.characters(min_codepoint=33, max_codepoint=126)
hotkey = st.builds(
    lambda held, key: "+".join([*held, key]), st.lists(st.sampled_from(MODIFIERS), min_size=1, unique=True), key
)
actions = st.one_of(
    st.builds(Click, coordinate, coordinate),
    st.builds(DoubleClick, coordinate, coordinate),
    st.builds(RightClick, coordinate, coordinate),
    st.builds(Drag, coordinate, coordinate, coordinate, coordinate),
    st.builds(Scroll, coordinate, coordinate, distance, distance),
    st.builds(Type, text.filter(bool)),
    st.builds(Key, key),
    st.builds(Hotkey, hotkey),
    st.builds(Wait),
    st.builds(Finished, text),
)


@given(actions)
def test_an_action_survives_its_text(action):
    assert parse_action(format_action(action)) == action
    assert type(parse_action(f"  {format_action(action)}\n")) is type(action)


@given(st.text(max_size=40) | st.builds(lambda a, b: format_action(a) + b, actions, st.text(min_size=1, max_size=3)))
def test_any_text_is_an_action_in_full_or_an_error(text):
    try:
        action = parse_action(text)
    except ActionError:
        return
    assert parse_action(format_action(action)) == action


@pytest.mark.parametrize(
    "written, canonical",
    [
        ("click( 512 , 340 )", "click(512,340)"),
        (' type("a\\nb \\"q\\" é")\n', 'type("a\\nb \\"q\\" é")'),
        ('type("\\u00e9")', 'type("é")'),
        ('finished("")', "finished()"),
        ("wait ( )", "wait()"),
        ('hotkey("ctrl++")', 'hotkey("ctrl++")'),
        ('type("click(1,2)")', 'type("click(1,2)")'),
    ],
)
def test_canonical_form(written, canonical):
    assert format_action(parse_action(written)) == canonical


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("", "not of the form"),
        ("click 5 5", "not of the form"),
        ("tap(1,2)", "'tap' is no action"),
        ("click(1)", r"takes \(x, y\), got 1"),
        ("click(1,2,3)", "got 3"),
        ("click(1000,2)", "1000 is not an integer in 0..999"),
        ("click(-1,2)", "-1 is not an integer in 0..999"),
        ("click(1.5,2)", "comma"),
        ("click(01,2)", "comma"),
        ("click(1e2,2)", "comma"),
        ("click(1,2,)", "neither an integer nor a string"),
        ('click("1","2")', "x must be int"),
        ("click(99999999999999999999,1)", "too long"),
        ("click(1,2) click(3,4)", "comma"),
        ("click(1,2)click(3,4)", "comma"),
        ("I will click(1,2)", "not of the form"),
        ("click(1,2).", "not of the form"),
        ('type("")', "empty"),
        ("type('a')", "neither an integer nor a string"),
        ("type(5)", "text must be str"),
        ('type("a)', "not a JSON string"),
        ('type("a\nb")', "not a JSON string"),
        ('key("enter")', "neither a single ASCII"),
        ('key("")', "neither a single ASCII"),
        ('hotkey("a")', "is not modifiers"),
        ('hotkey("ctrl+ctrl+a")', "is not modifiers"),
        ('hotkey("Ctrl+a")', "is not modifiers"),
        ('hotkey("ctrl+")', "neither"),
        ("scroll(5,5,0,1000)", "1000 is not an integer in -999..999"),
        ('key("é")', "neither"),
        ('type("\\ud800")', "surrogate"),
        ("wait(1)", "got 1"),
        (f'type("{"x" * 10_001}")', "at most 10000"),
    ],
)
def test_errors_say_what_is_wrong(wrong, says):
    with pytest.raises(ActionError, match=says) as caught:
        parse_action(wrong)
    assert len(str(caught.value)) < 400


def test_construction_refuses_what_has_no_text():
    with pytest.raises(ActionError, match="not an integer"):
        Click(1.0, 2)
    with pytest.raises(ActionError, match="not an integer"):
        Click(True, 2)


def test_schema_and_prompt_name_every_action():
    names = [variant["properties"]["action"]["const"] for variant in schema()["oneOf"]]
    assert names == [kind.name for kind in ACTIONS]
    assert all(f"{name}(" in PROMPT for name in names)
    json.dumps(schema())
