"""The one action space of GUI agents: typed actions, their text, and a strict parser.

Text form, one action a line and nothing else in it::

    click(x,y)  double_click(x,y)  triple_click(x,y)  right_click(x,y)  middle_click(x,y)  move(x,y)
    drag(x1,y1,x2,y2)  scroll(x,y,dx,dy)  type("text")  key("Enter")  hotkey("ctrl+a")
    wait()  finished("answer")  fail("reason")
    long_press(x,y)  replace("text")  open_app("name")  go_back()  go_home()                 # phones alone

Coordinates are thousandths of the image's width and height, in [0, 1000); :class:`mmagent.geometry.ImageView` converts
them from and to pixels, and nothing else does. An integer names a cell, which is what a model is taught. A number with
a decimal point is an exact point: what a foreign model said in pixels is translated so (`evals.dialects`), for a
thousandth of a large screen is several pixels. Strings are JSON strings. ``format_action`` writes the canonical form;
``parse_action`` also accepts spaces around arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from mmagent.geometry import FRAME

KEYS = (
    "Enter", "Tab", "Escape", "Backspace", "Delete", "Space", "Home", "End", "PageUp", "PageDown", "Insert",
    "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", *(f"F{n}" for n in range(1, 13)),
)  # fmt: skip
"""Named keys; a single printable ASCII character is a key as well."""
MODIFIERS = ("ctrl", "alt", "shift", "meta")
MAX_TEXT = 10_000
"""Characters of one string argument; more is refused, so that a runaway generation cannot flood a page."""


class ActionError(ValueError):
    """A text that is no action; the message says what is wrong with it, in words for the one who wrote it."""


Number = int | float
"""A coordinate: an integer is a cell of the frame, a float an exact point."""


def _check_point(name: str, *values: Number) -> None:
    for value in values:
        if type(value) is int and not 0 <= value < FRAME:
            raise ActionError(f"{name}: coordinate {value!r} is not an integer in 0..{FRAME - 1}")
        if type(value) is not int and not (type(value) is float and 0 <= value < FRAME):  # NaN is refused, too
            raise ActionError(f"{name}: coordinate {value!r} is not a number in [0, {FRAME})")


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise ActionError(f"{name}: {text!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ActionError(f"{name}: {text[:60]!r} holds half of a surrogate pair") from None
    if len(text) > MAX_TEXT:
        raise ActionError(f"{name}: {len(text)} characters, at most {MAX_TEXT} are allowed")


def _check_key(name: str, key: str) -> None:
    if not isinstance(key, str) or not (key in KEYS or (len(key) == 1 and "!" <= key <= "~")):
        raise ActionError(f"{name}: {key!r} is neither a single ASCII character nor one of {', '.join(KEYS)}")


@dataclass(frozen=True)
class Click:
    """Press and release the left button at a point of the frame."""

    name: ClassVar[str] = "click"
    x: Number
    y: Number

    def __post_init__(self) -> None:
        _check_point(self.name, self.x, self.y)


@dataclass(frozen=True)
class DoubleClick(Click):
    """Two quick clicks of the left button at a point of the frame."""

    name: ClassVar[str] = "double_click"


@dataclass(frozen=True)
class TripleClick(Click):
    """Three quick clicks of the left button at a point of the frame: they select a field's line or a paragraph."""

    name: ClassVar[str] = "triple_click"


@dataclass(frozen=True)
class RightClick(Click):
    """Press and release the right button at a point of the frame."""

    name: ClassVar[str] = "right_click"


@dataclass(frozen=True)
class MiddleClick(Click):
    """Press and release the middle button at a point of the frame."""

    name: ClassVar[str] = "middle_click"


@dataclass(frozen=True)
class Move:
    """Move the mouse to a point of the frame and press nothing: what opens under it can be seen."""

    name: ClassVar[str] = "move"
    x: Number
    y: Number

    def __post_init__(self) -> None:
        _check_point(self.name, self.x, self.y)


@dataclass(frozen=True)
class Drag:
    """Press the left button at the first point, move to the second, release."""

    name: ClassVar[str] = "drag"
    x1: Number
    y1: Number
    x2: Number
    y2: Number

    def __post_init__(self) -> None:
        _check_point(self.name, self.x1, self.y1, self.x2, self.y2)


@dataclass(frozen=True)
class Scroll:
    """Turn the wheel over a point: positive ``dy`` shows what is below, positive ``dx`` what is to the right,
    both in thousandths of the screen's height and width."""

    name: ClassVar[str] = "scroll"
    x: Number
    y: Number
    dx: int
    dy: int

    def __post_init__(self) -> None:
        _check_point(self.name, self.x, self.y)
        for value in (self.dx, self.dy):
            if type(value) is not int or abs(value) >= FRAME:
                raise ActionError(f"{self.name}: distance {value!r} is not an integer in -{FRAME - 1}..{FRAME - 1}")


@dataclass(frozen=True)
class Type:
    """Type text into whatever has the focus."""

    name: ClassVar[str] = "type"
    text: str

    def __post_init__(self) -> None:
        _check_text(self.name, self.text)
        if not self.text:
            raise ActionError(f"{self.name}: the text is empty")


@dataclass(frozen=True)
class Key:
    """Press and release one key: a name of :data:`KEYS` or a single ASCII character."""

    name: ClassVar[str] = "key"
    key: str

    def __post_init__(self) -> None:
        _check_key(self.name, self.key)


@dataclass(frozen=True)
class Hotkey:
    """Press a key with modifiers held: ``ctrl``, ``alt``, ``shift``, ``meta``, each at most once, with plus signs."""

    name: ClassVar[str] = "hotkey"
    keys: str

    def __post_init__(self) -> None:
        _check_text(self.name, self.keys)
        held = self.modifiers
        if any(part not in MODIFIERS for part in held) or len(set(held)) < len(held):
            raise ActionError(f"{self.name}: {self.keys!r} is not modifiers of {', '.join(MODIFIERS)} and a key")
        _check_key(self.name, self.key)

    @property
    def key(self) -> str:
        """What is pressed, which may be the plus sign itself."""
        return "+" if self.keys.endswith("++") else self.keys.rpartition("+")[2]

    @property
    def modifiers(self) -> list[str]:
        """What is held meanwhile."""
        return self.keys[: -len(self.key) - 1].split("+")


@dataclass(frozen=True)
class Wait:
    """Let the screen change by itself."""

    name: ClassVar[str] = "wait"


@dataclass(frozen=True)
class Finished:
    """The task is done; ``answer`` where it asks for one."""

    name: ClassVar[str] = "finished"
    answer: str = ""

    def __post_init__(self) -> None:
        _check_text(self.name, self.answer)


@dataclass(frozen=True)
class Fail:
    """What is asked for cannot be done here, or is not on the screen; ``reason`` says why."""

    name: ClassVar[str] = "fail"
    reason: str = ""

    def __post_init__(self) -> None:
        _check_text(self.name, self.reason)


@dataclass(frozen=True)
class LongPress(Click):
    """Hold a finger on a point of the frame."""

    name: ClassVar[str] = "long_press"


@dataclass(frozen=True)
class Replace:
    """Clear the field of a phone that has the focus, then type text into it: there is no key that selects it all."""

    name: ClassVar[str] = "replace"
    text: str

    def __post_init__(self) -> None:
        _check_text(self.name, self.text)
        if not self.text:
            raise ActionError(f"{self.name}: the text is empty")


@dataclass(frozen=True)
class OpenApp:
    """Start an app of a phone by its name."""

    name: ClassVar[str] = "open_app"
    app: str

    def __post_init__(self) -> None:
        _check_text(self.name, self.app)
        if not self.app:
            raise ActionError(f"{self.name}: the name is empty")


@dataclass(frozen=True)
class GoBack:
    """A phone's button to go back."""

    name: ClassVar[str] = "go_back"


@dataclass(frozen=True)
class GoHome:
    """A phone's button to its first screen."""

    name: ClassVar[str] = "go_home"


Action = (
    Click | DoubleClick | TripleClick | RightClick | MiddleClick | Move | Drag | Scroll | Type | Key | Hotkey | Wait
    | Finished | Fail | LongPress | Replace | OpenApp | GoBack | GoHome
)  # fmt: skip
ACTIONS: tuple[type, ...] = (
    Click, DoubleClick, TripleClick, RightClick, MiddleClick, Move, Drag, Scroll, Type, Key, Hotkey, Wait, Finished,
    Fail,
)  # fmt: skip
"""What a mouse and a keyboard can do."""
PHONE_ACTIONS: tuple[type, ...] = (
    Click, DoubleClick, LongPress, Drag, Scroll, Type, Replace, Key, OpenApp, GoBack, GoHome, Wait, Finished, Fail,
)  # fmt: skip
"""What a finger can do; ``drag`` is a swipe."""
ENDINGS = (Finished, Fail)
"""Actions with which an agent ends its episode."""
_CALL = re.compile(r"\s*([a-z_]+)\s*\((.*)\)\s*", re.DOTALL)
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(?P<fraction>\.[0-9]+)?")
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def format_action(action: Action) -> str:
    """The canonical text: ``click(512,340)``, ``type("caf\\u00e9")`` with the character itself, ``finished()``."""
    values = [getattr(action, field.name) for field in fields(action)]
    if values == [""] and isinstance(action, ENDINGS):
        values = []
    return f"{action.name}({','.join(json.dumps(value, ensure_ascii=False) for value in values)})"


def parse_action(text: str, kinds: Sequence[type] = ACTIONS) -> Action:
    """The action of ``kinds`` that ``text``, apart from space around it, spells out in full.

    Raises :class:`ActionError` saying what is wrong: an unknown action, a wrong number or kind of arguments,
    a coordinate outside the frame, or anything before or after.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise ActionError(f"{_shown(text)} is not of the form name(arguments)")
    kind = next((kind for kind in kinds if kind.name == match[1]), None)
    if kind is None:
        raise ActionError(f"{_shown(match[1])} is no action; there are {', '.join(kind.name for kind in kinds)}")
    arguments = _arguments(kind.name, match[2])
    wanted = [field.name for field in fields(kind)]
    least = 0 if kind in ENDINGS else len(wanted)
    if not least <= len(arguments) <= len(wanted):
        raise ActionError(f"{kind.name} takes ({', '.join(wanted)}), got {len(arguments)} arguments")
    for field, value in zip(fields(kind), arguments, strict=False):
        known = type(value) in (int, float) if field.type == "Number" else type(value).__name__ == field.type
        if not known:
            needed = "a number" if field.type == "Number" else field.type
            raise ActionError(f"{kind.name}: {field.name} must be {needed}, got {_shown(repr(value))}")
    return kind(*arguments)


def _arguments(name: str, text: str) -> list[Number | str]:
    at = _SPACE.match(text).end()
    if at == len(text):
        return []
    values: list[Number | str] = []
    while True:
        number = _NUMBER.match(text, at)
        if number:
            if len(number[0]) > 12:
                raise ActionError(f"{name}: the number {_shown(number[0])} is too long")
            values.append(float(number[0]) if number["fraction"] else int(number[0]))
            at = number.end()
        elif text.startswith('"', at):
            try:
                value, at = _DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise ActionError(f"{name}: {_shown(text[at:])} is not a JSON string ({error.msg})") from None
            values.append(value)
        else:
            raise ActionError(f"{name}: {_shown(text[at:])} begins neither a number nor a string in double quotes")
        at = _SPACE.match(text, at).end()
        if at == len(text):
            return values
        if text[at] != ",":
            raise ActionError(f"{name}: expected a comma or the end before {_shown(text[at:])}")
        at = _SPACE.match(text, at + 1).end()


def _shown(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


_HEAD = f"Act on the screen with exactly one of these, coordinates in thousandths of the image (0-{FRAME - 1}):"
PROMPT = f"""{_HEAD}
click(x,y)
double_click(x,y)
triple_click(x,y)  selects a line of text
right_click(x,y)
middle_click(x,y)
move(x,y)  the mouse, without a click
drag(x1,y1,x2,y2)
scroll(x,y,dx,dy)  positive dy shows what is below
type("text")  into the focused field
key("Enter")  one key
hotkey("ctrl+a")  a key with modifiers
wait()
finished("answer")  when done
fail("reason")  when it cannot be done"""
"""Describes :data:`ACTIONS` to a model."""
PHONE_PROMPT = f"""{_HEAD}
click(x,y)  a tap
double_click(x,y)
long_press(x,y)
drag(x1,y1,x2,y2)  a swipe
scroll(x,y,dx,dy)  positive dy shows what is below
type("text")  into the focused field
replace("text")  the same, after what stands there is cleared
key("Enter")  one key
open_app("name")
go_back()
go_home()
wait()
finished("answer")  when done
fail("reason")  when it cannot be done"""
"""Describes :data:`PHONE_ACTIONS` to a model."""


def schema(kinds: Sequence[type] = ACTIONS) -> dict[str, Any]:
    """JSON schema of an action of ``kinds`` as ``{"action": name, **arguments}``, coordinates in whole thousandths, for
    servers that constrain their output."""
    point = {"type": "integer", "minimum": 0, "maximum": FRAME - 1}
    distance = {"type": "integer", "minimum": 1 - FRAME, "maximum": FRAME - 1}
    string = {"type": "string", "maxLength": MAX_TEXT}
    variants = []
    for kind in kinds:
        properties: dict[str, Any] = {"action": {"const": kind.name}}
        for field in fields(kind):
            properties[field.name] = (
                string if field.type == "str" else distance if field.name in ("dx", "dy") else point
            )
        required = [name for name in properties if kind not in ENDINGS or name == "action"]
        variants.append(
            {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        )
    return {"oneOf": variants}
