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
    PHONE_ACTIONS,
    PHONE_PROMPT,
    PROMPT,
    ActionError,
    Click,
    DoubleClick,
    Drag,
    Fail,
    Finished,
    GoBack,
    GoHome,
    Hotkey,
    Key,
    LongPress,
    MiddleClick,
    Move,
    OpenApp,
    Replace,
    RightClick,
    Scroll,
    TripleClick,
    Type,
    Wait,
    format_action,
    parse_action,
    schema,
)
from mmagent.geometry import ImageView

points = st.integers(0, 999_999).map(lambda n: n / 1000)  # exact points, of up to three decimals
coordinate, distance = st.integers(0, 999) | points, st.integers(-999, 999)
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
    st.builds(TripleClick, coordinate, coordinate),
    st.builds(MiddleClick, coordinate, coordinate),
    st.builds(Move, coordinate, coordinate),
    st.builds(Fail, text),
)
phone_actions = st.one_of(
    st.builds(LongPress, coordinate, coordinate),
    st.builds(Replace, text.filter(bool)),
    st.builds(OpenApp, text.filter(bool)),
    st.builds(GoBack),
    st.builds(GoHome),
)


@given(actions)
def test_an_action_survives_its_text(action):
    assert parse_action(format_action(action)) == action
    assert type(parse_action(f"  {format_action(action)}\n")) is type(action)


@given(phone_actions)
def test_what_phones_can_do_is_asked_for_by_name(action):
    assert parse_action(format_action(action), PHONE_ACTIONS) == action
    with pytest.raises(ActionError, match="is no action; there are click"):
        parse_action(format_action(action))


def test_a_decimal_point_is_an_exact_point_and_no_cell():
    assert parse_action("click(512.0,3)") == Click(512.0, 3)
    assert type(parse_action("click(512.0,3)").x) is float
    assert type(parse_action("click(512,3)").x) is int
    view = ImageView((2160, 3840), (2160, 3840))
    assert view.from_frame(512, 0)[0] == pytest.approx(1968.0)  # the centre of a cell of 3.84 pixels
    assert view.from_frame(512.0, 0.0) == pytest.approx((1966.08, 0.0))
    assert view.seen_to_frame(1966.08, 2160) == pytest.approx((512.0, 999.999))
    with pytest.raises(ValueError, match="outside the image of 3840x2160"):
        view.seen_to_frame(-1, 5)


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
    ("keys", "modifiers", "key"),
    [
        ("ctrl+a", ["ctrl"], "a"),
        ("ctrl+shift+ArrowLeft", ["ctrl", "shift"], "ArrowLeft"),
        ("ctrl++", ["ctrl"], "+"),
        ("alt+meta++", ["alt", "meta"], "+"),
    ],
)
def test_a_hotkey_knows_what_is_held_and_what_is_pressed(keys, modifiers, key):
    assert (Hotkey(keys).modifiers, Hotkey(keys).key) == (modifiers, key)


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
        ("click(1000.0,2)", r"1000.0 is not a number in \[0, 1000\)"),
        ("click(-0.5,2)", "not a number in"),
        ("click(1.,2)", "comma"),
        ("click(.5,2)", "neither a number"),
        ("scroll(1,2,0,3.5)", "dy must be int"),
        ("click(01,2)", "comma"),
        ("click(1e2,2)", "comma"),
        ("click(1,2,)", "neither a number nor a string"),
        ('click("1","2")', "x must be a number"),
        ("click(99999999999999999999,1)", "too long"),
        ("click(1,2) click(3,4)", "comma"),
        ("click(1,2)click(3,4)", "comma"),
        ("I will click(1,2)", "not of the form"),
        ("click(1,2).", "not of the form"),
        ('type("")', "empty"),
        ("type('a')", "neither a number nor a string"),
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
    with pytest.raises(ActionError, match="not a number in"):
        Click(float("nan"), 2)
    with pytest.raises(ActionError, match="not a number in"):
        Click(True, 2)
    with pytest.raises(ActionError, match="name is empty"):
        OpenApp("")
    with pytest.raises(ActionError, match="replace: the text is empty"):
        Replace("")


def test_schema_and_prompt_name_every_action():
    for kinds, prompt in ((ACTIONS, PROMPT), (PHONE_ACTIONS, PHONE_PROMPT)):
        variants = schema(kinds)["oneOf"]
        names = [variant["properties"]["action"]["const"] for variant in variants]
        assert names == [kind.name for kind in kinds]
        assert [line.partition("(")[0] for line in prompt.splitlines()[1:]] == names
        assert all(len(v["required"]) == (1 if v["properties"]["action"]["const"] in ("finished", "fail") else
                                          len(v["properties"])) for v in variants)  # fmt: skip
        json.dumps(variants)
