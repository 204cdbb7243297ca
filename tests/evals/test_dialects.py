"""Styles of other houses: answers as their documents write them, in their coordinates, to points of our frame."""

from __future__ import annotations

import base64
import io
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evals.dialects import CENTRE, NO_PHONE, PHONE_STYLES, STYLES, Turn, look, moved, style_of
from evals.dialects.base import press, read_call, split_keys
from mmagent.actions import ACTIONS, PHONE_ACTIONS, ActionError, format_action, parse_action
from mmagent.geometry import ImageView

HD = (1080, 1920)


def told(style: str, text: str, original=HD, cursor=CENTRE) -> list[str]:
    """The actions of an answer to a screen of ``original`` height and width, in our words."""
    dialect = STYLES[style]
    view = ImageView(original, dialect.size(*original))
    return [format_action(action) for action in dialect.actions(text, view, cursor)]


def call(**arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'computer_use', 'arguments': arguments})}\n</tool_call>"


SAID = [
    # UI-TARS 1.0: thousandths
    ("ui-tars", "Thought: here.\nAction: click(start_box='(500,250)')", ["click(500.0,250.0)"]),
    ("ui-tars", "Action: click(start_box='<|box_start|>(100,999)<|box_end|>')", ["click(100.0,999.0)"]),
    ("ui-tars", "Action: click(point='<point>5 1000</point>')", ["click(5.0,999.999)"]),
    ("ui-tars", "Action: left_double(start_box='[100, 200, 300, 400]')", ["double_click(200.0,300.0)"]),
    ("ui-tars", "Action: right_single(start_box='(1,2)')", ["right_click(1.0,2.0)"]),
    ("ui-tars", "Action: drag(start_box='(1,2)', end_box='(3,4)')", ["drag(1.0,2.0,3.0,4.0)"]),
    ("ui-tars", "Action: hotkey(key='ctrl shift t')", ['hotkey("ctrl+shift+t")']),
    ("ui-tars", "Action: hotkey(key='enter')", ['key("Enter")']),
    ("ui-tars", r"Action: type(content='it\'s 5\n')", ['type("it\'s 5\\n")']),
    ("ui-tars", "Action: type(content='it's 5')", ['type("it\'s 5")']),
    ("ui-tars", "Action: scroll(start_box='(500,500)', direction='down')", ["scroll(500.0,500.0,0,463)"]),
    ("ui-tars", "Action: wait()", ["wait()"]),
    ("ui-tars", "Action: finished(content='42')", ['finished("42")']),
    ("ui-tars", "Action: finished()", ["finished()"]),
    ("ui-tars", "Action: call_user()", ['fail("asked for the user")']),
    ("ui-tars", "Action: click(start_box='(1,2)')\n\ntype(content='a')", ["click(1.0,2.0)", 'type("a")']),
    # UI-TARS 1.5: pixels of the image resized to 1932 x 1092
    ("ui-tars-1.5", "Action: click(start_box='(966,546)')", ["click(500.0,500.0)"]),
    ("ui-tars-1.5", "Action: click(point='<point>1932 0</point>')", ["click(999.999,0.0)"]),
    # GLM-4.5V
    ("glm-4.5v", "I click.\n<|begin_of_box|>left_click(start_box='[500,250]', element_info='OK')<|end_of_box|>\n"
     "Memory:\n[]", ["click(500.0,250.0)"]),
    ("glm-4.5v", "<think>left_click(start_box='[1,1]')</think>left_click(start_box='[9,9]')", ["click(9.0,9.0)"]),
    ("glm-4.5v", "I press (OK).\nkey(keys='ctrl+c')\nMemory:\n[]", ['hotkey("ctrl+c")']),
    ("glm-4.5v", "I shall click (the menu) and type (a name).\nleft_click(start_box='[9,8]')", ["click(9.0,8.0)"]),
    ("glm-4.5v", "left_drag(start_box='[1,2]', end_box='[3,4]', element_info='')", ["drag(1.0,2.0,3.0,4.0)"]),
    ("glm-4.5v", "<|begin_of_box|>scroll(start_box='[1,2]', direction='up', step=2)<|end_of_box|>",
     ["scroll(1.0,2.0,0,-185)"]),
    ("glm-4.5v", "hover(start_box='[[10,20,30,40]]')", ["move(20.0,30.0)"]),
    ("glm-4.5v", "type(content='a (b) \"c\"')", ['type("a (b) \\"c\\"")']),
    ("glm-4.5v", "<|begin_of_box|>DONE()<|end_of_box|>", ["finished()"]),
    ("glm-4.5v", "<|begin_of_box|>FAIL()<|end_of_box|>", ["fail()"]),
    # Qwen2.5-VL: pixels of the resized image; without a coordinate where the mouse is
    ("qwen2.5-vl", call(action="left_click", coordinate=[966, 546]), ["click(500.0,500.0)"]),
    ("qwen2.5-vl", "I will.\n" + call(action="left_click", coordinate=[0, 1092]), ["click(0.0,999.999)"]),
    ("qwen2.5-vl", '<tool_call>{"name": "computer_use", "arguments": {"action": "wait", "time": 2}}', ["wait()"]),
    ("qwen2.5-vl", call(action="left_click"), ["click(500.0,500.0)"]),
    ("qwen2.5-vl", call(action="left_click_drag", coordinate=[966, 0]), ["drag(500.0,500.0,500.0,0.0)"]),
    ("qwen2.5-vl", call(action="key", keys=["ctrl", "a"]), ['hotkey("ctrl+a")']),
    ("qwen2.5-vl", call(action="scroll", pixels=-1092), ["scroll(500.0,500.0,0,999)"]),
    ("qwen2.5-vl", call(action="scroll", coordinate=[0, 0], pixels=546), ["scroll(0.0,0.0,0,-500)"]),
    ("qwen2.5-vl", call(action="type", text="café"), ['type("café")']),
    ("qwen2.5-vl", call(action="terminate", status="success"), ["finished()"]),
    ("qwen2.5-vl", call(action="terminate", status="failure"), ["fail()"]),
    ("qwen2.5-vl", call(action="answer", text="7"), ['finished("7")']),
    ("qwen3-vl", call(action="left_click", coordinate=[500, 500]), ["click(500.0,500.0)"]),
    # OpenAI: pixels of the screenshot as it is
    ("openai", '{"type": "click", "button": "left", "x": 960, "y": 540}', ["click(500.0,500.0)"]),
    ("openai", '{"type": "computer_call", "call_id": "c", "action": {"type": "double_click", "x": 0, "y": 0}}',
     ["double_click(0.0,0.0)"]),
    ("openai", '{"type": "computer_call", "actions": [{"type": "move", "x": 96, "y": 54}, {"type": "wait"}]}',
     ["move(50.0,50.0)", "wait()"]),
    ("openai", '{"type": "drag", "path": [{"x": 0, "y": 0}, {"x": 5, "y": 5}, {"x": 192, "y": 108}]}',
     ["drag(0.0,0.0,100.0,100.0)"]),
    ("openai", '{"type": "scroll", "x": 960, "y": 540, "scroll_x": 0, "scroll_y": 540}',
     ["scroll(500.0,500.0,0,500)"]),
    ("openai", '{"type": "keypress", "keys": ["CTRL", "A"]}', ['hotkey("ctrl+a")']),
    ("openai", '{"type": "keypress", "keys": ["ARROWLEFT"]}', ['key("ArrowLeft")']),
    ("openai", "The price is 5.", ['finished("The price is 5.")']),
    # Anthropic: pixels of the screenshot made smaller, here to 1429 x 804
    ("anthropic", '{"action": "left_click", "coordinate": [1429, 402]}', ["click(999.999,500.0)"]),
    ("anthropic", 'Now. {"type": "tool_use", "name": "computer", "input": {"action": "key", "text": "Return"}}',
     ['key("Enter")']),
    ("anthropic", '{"action": "triple_click", "coordinate": [0, 0]}', ["triple_click(0.0,0.0)"]),
    ("anthropic", '{"action": "left_click_drag", "start_coordinate": [0, 0], "coordinate": [1429, 804]}',
     ["drag(0.0,0.0,999.999,999.999)"]),
    ("anthropic", '{"action": "scroll", "coordinate": [0, 0], "scroll_direction": "up", "scroll_amount": 1}',
     ["scroll(0.0,0.0,0,-93)"]),
    ("anthropic", '{"action": "key", "text": "ctrl+shift+Page_Down"}', ['hotkey("ctrl+shift+PageDown")']),
]  # fmt: skip


@pytest.mark.parametrize("style, text, ours", SAID)
def test_answers_as_their_houses_write_them(style, text, ours):
    assert told(style, text) == ours
    for action in ours:
        assert format_action(parse_action(action, (*ACTIONS, *PHONE_ACTIONS))) == action


PHONE = (2400, 1080)


def swiped(**arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'mobile_use', 'arguments': arguments})}\n</tool_call>"


def said_of(**arguments) -> str:
    return f"Memory: None\nReason: It is there.\nAction: {json.dumps(arguments)}"


SAID_TO_PHONES = [
    # UI-TARS 1.0: thousandths; a scroll says where the finger goes
    ("ui-tars", "Action: click(start_box='<|box_start|>(100,200)<|box_end|>')", ["click(100.0,200.0)"]),
    ("ui-tars", "Action: long_press(start_box='<|box_start|>(7,8)<|box_end|>', time='2')", ["long_press(7.0,8.0)"]),
    ("ui-tars", "Action: scroll(start_box='<|box_start|>(500,800)<|box_end|>', "
     "end_box='<|box_start|>(500,200)<|box_end|>')", ["drag(500.0,800.0,500.0,200.0)"]),
    ("ui-tars", "Action: press_home()", ["go_home()"]),
    ("ui-tars", "Action: type(content='milk\\n')", ['type("milk\\n")']),
    # UI-TARS 1.5: pixels of the image resized to 1092 x 2408
    ("ui-tars-1.5", "Thought: back.\nAction: press_back()", ["go_back()"]),
    ("ui-tars-1.5", "Action: click(point='<point>546 1204</point>')", ["click(500.0,500.0)"]),
    ("ui-tars-1.5", "Action: long_press(point='<point>0 602</point>')", ["long_press(0.0,250.0)"]),
    ("ui-tars-1.5", "Action: scroll(point='<point>546 0</point>', direction='down')", ["scroll(500.0,0.0,0,500)"]),
    ("ui-tars-1.5", "Action: scroll(direction='left')", ["scroll(500.0,500.0,-500,0)"]),
    ("ui-tars-1.5", "Action: drag(start_point='<point>0 0</point>', end_point='<point>546 1204</point>')",
     ["drag(0.0,0.0,500.0,500.0)"]),
    ("ui-tars-1.5", "Action: open_app(app_name='Simple Calendar Pro')", ['open_app("Simple Calendar Pro")']),
    ("ui-tars-1.5", "Action: open_app(app_name='Joe's Notes')", ['open_app("Joe\'s Notes")']),
    ("ui-tars-1.5", "Action: wait()", ["wait()"]),
    ("ui-tars-1.5", "Action: finished(content='42')", ['finished("42")']),
    # Qwen2.5-VL's mobile_use: pixels of the resized image; Qwen3-VL's: thousandths
    ("qwen2.5-vl", swiped(action="click", coordinate=[546, 1204]), ["click(500.0,500.0)"]),
    ("qwen2.5-vl", swiped(action="long_press", coordinate=[0, 602], time=2), ["long_press(0.0,250.0)"]),
    ("qwen2.5-vl", swiped(action="swipe", coordinate=[546, 1806], coordinate2=[546, 602]),
     ["drag(500.0,750.0,500.0,250.0)"]),
    ("qwen2.5-vl", swiped(action="type", text="café"), ['type("café")']),
    ("qwen2.5-vl", swiped(action="system_button", button="Back"), ["go_back()"]),
    ("qwen2.5-vl", swiped(action="system_button", button="Home"), ["go_home()"]),
    ("qwen2.5-vl", swiped(action="system_button", button="Enter"), ['key("Enter")']),
    ("qwen2.5-vl", swiped(action="key", text="KEYCODE_ENTER"), ['key("Enter")']),
    ("qwen2.5-vl", swiped(action="open", text="Clock"), ['open_app("Clock")']),
    ("qwen2.5-vl", swiped(action="wait", time=2), ["wait()"]),
    ("qwen2.5-vl", swiped(action="terminate", status="failure"), ["fail()"]),
    # GLM-4.5V: boxes in thousandths; a swipe is named by where the finger goes
    ("glm-4.5v", said_of(action_type="click", box_2d=[[100, 200, 300, 400]]), ["click(200.0,300.0)"]),
    ("glm-4.5v", said_of(action_type="long_press", box_2d=[[0, 0, 999, 999]]), ["long_press(499.5,499.5)"]),
    ("glm-4.5v", said_of(action_type="input_text", text="oat milk", box_2d=[[0, 10, 20, 30]], override=True),
     ["click(10.0,20.0)", 'replace("oat milk")']),
    ("glm-4.5v", said_of(action_type="input_text", text="café", box_2d=[[0, 10, 20, 30]], override=False),
     ["click(10.0,20.0)", 'type("café")']),
    ("glm-4.5v", said_of(action_type="keyboard_enter"), ['key("Enter")']),
    ("glm-4.5v", said_of(action_type="navigate_home"), ["go_home()"]),
    ("glm-4.5v", said_of(action_type="navigate_back"), ["go_back()"]),
    ("glm-4.5v", said_of(action_type="swipe", direction="up"), ["scroll(500.0,500.0,0,500)"]),
    ("glm-4.5v", said_of(action_type="swipe", direction="left", box_2d=[[0, 100, 400, 300]]),
     ["scroll(200.0,200.0,200,0)"]),
    ("glm-4.5v", said_of(action_type="open_app", app_name="Broccoli"), ['open_app("Broccoli")']),
    ("glm-4.5v", said_of(action_type="wait"), ["wait()"]),
    ("glm-4.5v", said_of(action_type="answer", text="42"), ['finished("42")']),
    ("glm-4.5v", said_of(action_type="status", goal_status="complete"), ["finished()"]),
    ("glm-4.5v", said_of(action_type="status", goal_status="infeasible"), ["fail()"]),
    ("glm-4.5v", "<think>Action: {}</think><answer>Memory: None\nReason: Not this:\nAction: tap.\n"
     'Action: <|begin_of_box|>{"action_type": "wait"}<|end_of_box|></answer>', ["wait()"]),
    ("qwen3-vl", swiped(action="click", coordinate=[500, 250]), ["click(500.0,250.0)"]),
    ("qwen3-vl", swiped(action="answer", text="7"), ['finished("7")']),
]  # fmt: skip


def done_on_phone(style: str, text: str) -> list[str]:
    dialect = style_of(style, phone=True)
    view = ImageView(PHONE, dialect.size(*PHONE))
    return [format_action(action) for action in dialect.actions(text, view, (3.0, 4.0))]


@pytest.mark.parametrize("style, text, ours", SAID_TO_PHONES)
def test_answers_to_a_phones_screen_as_their_houses_write_them(style, text, ours):
    assert done_on_phone(style, text) == ours
    for action in ours:
        assert format_action(parse_action(action, PHONE_ACTIONS)) == action


@pytest.mark.parametrize(
    "style, text, says",
    [
        ("ui-tars", "Action: left_double(start_box='(1,2)')", "'left_double' is no action of ui-tars on a phone"),
        ("ui-tars", "Action: hotkey(key='ctrl c')", "'hotkey' is no action of ui-tars on a phone"),
        ("ui-tars", "Action: scroll(start_box='(1,2)')", "scroll: end_box is missing"),
        ("ui-tars-1.5", "Action: scroll(point='<point>1 1</point>', direction='on')", "'on' is no direction"),
        ("ui-tars-1.5", "Action: open_app(app_name='')", "the name is empty"),
        ("qwen2.5-vl", call(action="left_click", coordinate=[1, 1]), "'computer_use' is not the tool mobile_use"),
        ("qwen2.5-vl", swiped(action="left_click", coordinate=[1, 1]), "'left_click' is no action of mobile_use"),
        ("qwen2.5-vl", swiped(action="swipe", coordinate=[1, 1]), "coordinate2 None is no point"),
        ("qwen2.5-vl", swiped(action="system_button", button="Menu"), "'Menu' cannot be pressed here"),
        ("qwen2.5-vl", swiped(action="key", text="volume_up"), "'volume_up' cannot be pressed here"),
        ("glm-4.5v", "left_click(start_box='[1,2]')", "no line of .* begins with Action:"),
        ("glm-4.5v", "Action: {'action_type': 'wait'}", "is no JSON"),
        ("glm-4.5v", "Action: []", "is no object"),
        ("glm-4.5v", said_of(action_type="wait") + "\nThen on.", "'.nThen on.' follows the action"),
        ("glm-4.5v", said_of(action_type="left_click"), "'left_click' is no action of glm-4.5v on a phone"),
        ("glm-4.5v", said_of(action_type="click", box_2d=[1, 2, 3, 4]), r"is not \[\[xmin, ymin, xmax, ymax\]\]"),
        ("glm-4.5v", said_of(action_type="click", box_2d=[[1, 2, 3, 1000]]), r"is outside 0\.\.999"),
        ("glm-4.5v", said_of(action_type="swipe", direction="on"), "swipe: 'on' is no direction; there are up, down"),
        ("glm-4.5v", said_of(action_type="swipe", direction=["up"]), "is no direction"),
        ("glm-4.5v", said_of(action_type=["wait"]), "is no action of glm-4.5v"),
        ("glm-4.5v", "Action: " + "[" * 30_000, "is no JSON"),
        ("glm-4.5v", said_of(action_type="input_text", text="x", box_2d=[[1, 2, 3, 4]]), "override None is neither"),
        ("glm-4.5v", said_of(action_type="input_text", text="", box_2d=[[1, 2, 3, 4]], override=True), "is empty"),
        ("glm-4.5v", said_of(action_type="open_app", app_name=3), "open_app: app_name 3 is no text"),
        ("glm-4.5v", said_of(action_type="status", goal_status="done"), "'done' is neither complete nor infeasible"),
    ],
)
def test_what_a_phone_cannot_be_told_is_named(style, text, says):
    with pytest.raises(ActionError, match=says):
        done_on_phone(style, text)


@pytest.mark.parametrize("style", sorted(PHONE_STYLES))
def test_models_are_told_what_they_may_do_on_a_phone_and_nothing_of_a_mouse(style):
    dialect = style_of(style, phone=True)
    assert (dialect.name, dialect.version) == (STYLES[style].name, STYLES[style].version)  # one pin tells both
    image, view = look(np.zeros((240, 108, 3), np.uint8), dialect)
    told = json.dumps(dialect.messages([Turn("Buy milk.", image, view)]))
    assert "long_press" in told
    assert told.count("Buy milk.") == 1
    for words in ("left_double", "right_single", "hotkey", "mouse", "left_click", "direction" * (style == "ui-tars")):
        assert not words or words not in told, words
    for words in {"ui-tars": ("end_box='<|box_start|>(x3,y3)<|box_end|>')",), "ui-tars-1.5": ("open_app", "press_back"),
                  "glm-4.5v": ("[[xmin,ymin,xmax,ymax]]", "navigate_home"),
                  "qwen2.5-vl": ("coordinate2", "system_button"), "qwen3-vl": ("1000x1000",)}[style]:  # fmt: skip
        assert words in told


def test_a_style_without_a_phone_is_refused_there():
    """And no style is without one that is not said to have none."""
    assert style_of("openai", phone=False) is STYLES["openai"]
    for name, words in (("openai", "knows windows, mac, linux, ubuntu and browser"), ("anthropic", "is for a desktop")):
        with pytest.raises(ValueError, match=f"{name} has no actions of a phone: its house publishes none .*{words}"):
            style_of(name, phone=True)
    assert NO_PHONE.keys() == STYLES.keys() - PHONE_STYLES.keys()


def test_glm_on_a_phone_is_told_every_step_in_order_and_shown_the_last_screen():
    dialect = style_of("glm-4.5v", phone=True)
    image, view = look(np.zeros((240, 108, 3), np.uint8), dialect)
    answers = [
        "<think>Hm.</think>Memory: None\nReason: The app is not open.\n"
        'Action: {"action_type": "open_app", "app_name": "Broccoli"}',
        "Memory: Two pizzas.\nReason: It's twice there.\n"
        'Action: <|begin_of_box|>{"action_type": "click", "box_2d": [[1, 2, 3, 4]]}<|end_of_box|>',
    ]
    turns = [Turn("Delete duplicates.", image, view, answers[0]), Turn("", image, view, answers[1])]
    (message,) = dialect.messages([*turns, Turn("", image, view)])
    assert [part["type"] for part in message["content"]] == ["text", "image_url"]
    words = message["content"][0]["text"]
    # as in the published example: steps from 0, actions as Python writes them, between the actions and the format
    assert (
        "# Historical Actions and Current Memory\n"
        "Step 0:\nMemory: None\nReason: The app is not open.\n"
        "Action: {'action_type': 'open_app', 'app_name': 'Broccoli'}\n"
        "Step 1:\nMemory: Two pizzas.\nReason: It's twice there.\n"
        "Action: {'action_type': 'click', 'box_2d': [[1, 2, 3, 4]]}\n\n# Output Format\n"
    ) in words
    heads = ["# Task:\nDelete duplicates.\n", "# Task Platform\nMobile\n", "# Action Space\n", "# Historical Actions"]
    places = [words.index(head) for head in heads]
    assert places == sorted(places)
    (first,) = dialect.messages([Turn("Delete duplicates.", image, view)])
    assert "Current Memory\nNone\n\n# Output Format" in first["content"][0]["text"]


@pytest.mark.parametrize(
    "style, text, says",
    [
        ("ui-tars", "Action: press_back()", "'press_back' is no action of ui-tars"),
        ("ui-tars", "click(start_box='(1,2)')", "no 'Action:'"),
        ("ui-tars", "Action: ", "nothing behind"),
        ("ui-tars", "Action: click(start_box='(1200,2)')", r"point \(1200, 2\) is outside 0..1000"),
        ("ui-tars", "Action: click(start_box='here')", "holds no coordinates"),
        ("ui-tars", "Action: click(1,2)", "cannot read"),
        ("ui-tars", "Action: click()", "start_box is missing"),
        ("ui-tars", "Action: fly(start_box='(1,2)')", "'fly' is no action of ui-tars"),
        ("ui-tars", "Action: wait() and then I rest", "follows an action"),
        ("ui-tars", "Action: scroll(start_box='(1,2)', direction='sideways')", "is no direction"),
        ("ui-tars", "Action: hotkey(key='ctrl')", "is not one key"),
        ("ui-tars", "Action: click(start_box='(1,2,3)')", "neither a point nor a box"),
        ("ui-tars-1.5", "Action: click(start_box='(1933,2)')", "outside the image of 1932x1092"),
        ("glm-4.5v", "I do not know.", "no action in"),
        ("glm-4.5v", "I shall click (the menu).", "no action in"),
        ("glm-4.5v", "left_click(start_box='[1,1]'\nDONE()", "cannot read"),  # and nothing else is looked for
        ("glm-4.5v", "<|begin_of_box|>click it: DONE()<|end_of_box|>", "more than an action"),
        ("glm-4.5v", "<|begin_of_box|>DONE() DONE()<|end_of_box|>", "follows the action"),
        ("glm-4.5v", "left_click(start_box='[1001,1]')", "outside 0..1000"),
        ("qwen2.5-vl", '{"name": "computer_use"}', "no <tool_call>"),
        ("qwen2.5-vl", "<tool_call>{'name'", "is not JSON"),
        ("qwen2.5-vl", "<tool_call>[1]</tool_call>", "no JSON object"),
        ("qwen2.5-vl", '<tool_call>{"name": "bash", "arguments": {}}</tool_call>', "is not the tool"),
        ("qwen2.5-vl", call(action="left_click", coordinate=[1933, 0]), "outside the image"),
        ("qwen2.5-vl", call(action="left_click", coordinate="[1, 2]"), "is no point"),
        ("qwen2.5-vl", call(action="left_click", coordinate=[True, 2]), "is no point"),
        ("qwen2.5-vl", call(action="terminate"), "neither success nor failure"),
        ("qwen2.5-vl", call(action="left_mouse_down"), "no action of computer_use"),
        ("qwen2.5-vl", call(action=["left_click"]), "no action of computer_use"),
        ("openai", '{"type": "click", "button": "back", "x": 1, "y": 1}', "no button 'back'"),
        ("openai", '{"type": "click", "x": "1", "y": 1}', "x '1' is no number"),
        ("openai", '{"type": "click", "x": 1, "y": 1, "keys": ["CTRL"]}', "with keys held"),
        ("openai", '{"type": "computer_call"}', "computer_call holds None"),
        ("openai", "", "the answer is empty"),
        ("anthropic", '{"action": "left_mouse_down"}', "no action of the computer tool"),
        ("anthropic", '{"action": "left_click", "coordinate": [1, 2], "text": "shift"}', "held cannot be done"),
        (
            "anthropic",
            '{"action": "scroll", "coordinate": [1, 2], "scroll_direction": "up", "text": "ctrl"}',
            "scroll with 'ctrl' held cannot be done",
        ),
        ("ui-tars", "Action: " + "wait()\n\n" * 17, "more than 16 actions in one answer"),
        ("openai", json.dumps({"type": "computer_call", "actions": [{"type": "wait"}] * 17}), "more than 16 actions"),
        ("anthropic", '{"action": "left_click", "coordinate": [1500, 2]}', "outside the image of 1429x804"),
    ],
)
def test_what_cannot_be_read_is_named_and_not_repaired(style, text, says):
    with pytest.raises(ActionError, match=says) as caught:
        told(style, text)
    assert len(str(caught.value)) < 400


@settings(deadline=None)  # the machine may be busy
@given(st.sampled_from(sorted(STYLES)), st.text(max_size=80) | st.sampled_from(
    [text for _, text, _ in SAID + SAID_TO_PHONES]).flatmap(
    lambda text: st.tuples(st.integers(0, len(text)), st.text(max_size=4)).map(
        lambda cut: text[: cut[0]] + cut[1] + text[cut[0] + 1 :])))  # fmt: skip
def test_any_answer_is_actions_or_an_error_that_says_why(style, text):
    for does, kinds in ((told, ACTIONS), (done_on_phone, PHONE_ACTIONS)):
        if does is done_on_phone and style not in PHONE_STYLES:
            continue
        try:
            actions = does(style, text)
        except ActionError:
            continue
        for action in actions:
            parse_action(action, kinds)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_long_and_deep_answers_are_read_in_no_time(style):
    for text in ("Action: " + "click(" * 50_000, "<tool_call>" + "[" * 200_000, "{" * 100_000, '{"a":' * 100_000,
                 "type(content='" + "\\" * 100_001, "Action: type(content='" + "'a" * 30_000,
                 "Action: " + "wait()\n\n" * 50_000):  # fmt: skip
        with pytest.raises(ActionError):
            told(style, text)


def published_smart_resize(height: int, width: int, least: int, most: int, cell: int = 28) -> tuple[int, int]:
    """As Qwen2-VL's image processor has it, restated."""
    h, w = max(cell, round(height / cell) * cell), max(cell, round(width / cell) * cell)
    if h * w > most:
        beta = math.sqrt(height * width / most)
        return math.floor(height / beta / cell) * cell, math.floor(width / beta / cell) * cell
    if h * w < least:
        beta = math.sqrt(least / (height * width))
        return math.ceil(height * beta / cell) * cell, math.ceil(width * beta / cell) * cell
    return h, w


def test_screens_have_the_size_that_the_models_own_processor_would_give_them():
    rng = random.Random(0)
    sizes = [HD, (210, 160), (2160, 3840), (768, 1366), (5000, 7000)]
    sizes += [(rng.randrange(60, 5000), rng.randrange(60, 5000)) for _ in range(300)]
    for size in sizes:
        assert STYLES["qwen2.5-vl"].size(*size) == published_smart_resize(*size, 3136, 12845056), size
        assert STYLES["ui-tars-1.5"].size(*size) == published_smart_resize(*size, 78400, 12845056), size
        # patches of 16 pixels since Qwen3-VL; its processor_config: shortest_edge 65536, longest_edge 16777216
        assert STYLES["qwen3-vl"].size(*size) == published_smart_resize(*size, 65536, 16777216, 32), size
    assert STYLES["openai"].size(*HD) == HD
    for size in sizes:
        height, width = STYLES["anthropic"].size(*size)
        assert max(height, width) <= 1568
        assert height * width <= 1_150_000


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_pixel_said_is_the_pixel_meant(style):
    """The point of a target survives the way to the model and back to within a pixel that the model is shown."""
    original = (1440, 2560)
    dialect = STYLES[style]
    view = ImageView(original, dialect.size(*original))
    x, y = 1777.0, 333.0
    sx, sy = (round(v) for v in view.to_seen(x, y))
    tx, ty = round(x / 2560 * 1000), round(y / 1440 * 1000)
    text = {
        "ui-tars": f"Action: click(start_box='({tx},{ty})')",
        "ui-tars-1.5": f"Action: click(start_box='({sx},{sy})')",
        "glm-4.5v": f"left_click(start_box='[{tx},{ty}]')",
        "qwen2.5-vl": call(action="left_click", coordinate=[sx, sy]),
        "qwen3-vl": call(action="left_click", coordinate=[tx, ty]),
        "openai": json.dumps({"type": "click", "x": sx, "y": sy}),
        "anthropic": json.dumps({"action": "left_click", "coordinate": [sx, sy]}),
    }[style]
    (action,) = dialect.actions(text, view, CENTRE)
    back = view.from_frame(*vars(parse_action(format_action(action))).values())
    pixel = 2.56 if style in ("ui-tars", "glm-4.5v", "qwen3-vl") else original[1] / view.seen[1]
    assert back == pytest.approx((x, y), abs=pixel / 2 + 0.01)


def shades(message) -> list[int]:
    """The brightness of the pictures of a message, in their order."""
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    data = [base64.b64decode(url.partition(",")[2]) for url in urls]
    return [int(np.asarray(Image.open(io.BytesIO(one)))[0, 0, 0]) for one in data]


def test_glm_is_shown_its_history_in_the_order_of_its_house():
    """As in the example of messages that GLM-4.5V's page on agents has: steps with their screens, the current last."""
    dialect, turns = STYLES["glm-4.5v"], []
    for n in range(7):
        image, view = look(np.full((100, 200, 3), 20 * n, np.uint8), dialect)
        said = f"I act.\n<|begin_of_box|>left_click(start_box='[{n},1]')<|end_of_box|>\nMemory:\n[{n}]"
        turns.append(Turn("Buy milk." if n == 0 else "", image, view, said if n < 6 else None))
    (message,) = dialect.messages(turns)
    kinds = "".join(part["type"][0] for part in message["content"])
    assert kinds == "tititititi"
    assert shades(message) == [40, 60, 80, 100, 120]
    words = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert words[0].endswith("step 2: Screenshot:(Omitted in context.) I act.\nleft_click(start_box='[1,1]')\n"
                             "step 3: Screenshot:")  # fmt: skip
    assert words[1] == " I act.\nleft_click(start_box='[2,1]')\nstep 4: Screenshot:"
    assert words[-1] == " I act.\nleft_click(start_box='[5,1]')\nMemory:\n[5]\n\nCurrent Screenshot:\n"


@pytest.mark.parametrize("style", sorted(STYLES))
def test_the_task_and_the_last_screens_are_told(style):
    dialect = STYLES[style]
    turns = []
    for n in range(8):
        image, view = look(np.full((100, 200, 3), 20 * n, np.uint8), dialect)
        turns.append(
            Turn("Buy milk." if n == 0 else "", image, view, f"<think>hm</think>answer {n}" if n < 7 else None)
        )
    messages = dialect.messages(turns)
    text = json.dumps(messages)
    assert text.count("Buy milk.") == 1
    assert "answer 6" in text
    assert text.count("data:image/png") == 5
    assert shades(messages[-1])[-1] == 140  # the screen as it is comes last
    if style in ("qwen2.5-vl", "openai", "anthropic"):
        height, width = dialect.size(100, 200)
        assert f"{width}x{height}" in text


def test_the_mouse_stays_where_the_last_action_left_it():
    actions = STYLES["qwen2.5-vl"].actions(call(action="mouse_move", coordinate=[193.2, 109.2]), _hd(), CENTRE)
    assert moved(actions, CENTRE) == (100.0, 100.0)
    assert told("qwen2.5-vl", call(action="left_click"), cursor=moved(actions, CENTRE)) == ["click(100.0,100.0)"]
    assert moved(STYLES["ui-tars"].actions("Action: drag(start_box='(1,2)', end_box='(3,4)')", _hd(), CENTRE),
                 CENTRE) == (3.0, 4.0)  # fmt: skip


def _hd() -> ImageView:
    return ImageView(HD, (1092, 1932))


def test_names_of_keys():
    for names, key in ((["Return"], 'key("Enter")'), (["page_down"], 'key("PageDown")'), (["KP_Enter"], 'key("Enter")'),
                       (["cmd", "Shift_L", "4"], 'hotkey("shift+meta+4")'), (["a"], 'key("a")'), (["A"], 'key("A")'),
                       (split_keys("ctrl++"), 'hotkey("ctrl++")'), (split_keys("+"), 'key("+")')):  # fmt: skip
        assert format_action(press(names)) == key
    for names in ([], ["a", "b"], ["hyper", "a"], ["ctrl"]):
        with pytest.raises(ActionError):
            press(names)
    assert read_call("f(a='(', b=\"x\", c=-2.5)").arguments == {"a": "(", "b": "x", "c": "-2.5"}
