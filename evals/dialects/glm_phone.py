"""GLM-4.5V on a phone (zai-org/GLM-V, its AndroidWorld instructions): ``Action: {"action_type": "click", ...}``.

Places are boxes, ``[[xmin, ymin, xmax, ymax]]``, in thousandths of the screen, 0 to 999. A request is one message and
one picture: the task, the actions, every earlier step from step 0 on in the order Memory, Reason, Action, how to
answer, then the screen as it is; earlier screens are not sent. An earlier action is told as Python writes it, as in the
published example. Signatures are the published ones; the sentences around them are ours, and which apps there are is
not told: we do not know it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evals.dialects.base import CENTRE, MOST_TEXT, Message, Point, Turn, frame_point, scroll, text_part, towards
from evals.dialects.glm import Glm
from mmagent.actions import (
    Action,
    ActionError,
    Click,
    Fail,
    Finished,
    GoBack,
    GoHome,
    Key,
    LongPress,
    OpenApp,
    Replace,
    Type,
    Wait,
)
from mmagent.generation.http import image_part
from mmagent.geometry import FRAME, ImageView

PHONE_SPACE = """{"action_type": "status", "goal_status": "<complete|infeasible>"}
# ends the task: it is done, or cannot be done
{"action_type": "answer", "text": "<answer_text>"}
# answers the user's question
{"action_type": "click", "box_2d": [[xmin,ymin,xmax,ymax]]}
# taps the element in the box
{"action_type": "long_press", "box_2d": [[xmin,ymin,xmax,ymax]]}
# holds a finger on the element in the box
{"action_type": "input_text", "text": "<text_input>", "box_2d": [[xmin,ymin,xmax,ymax]], "override": true/false}
# taps the text field in the box, types the text and presses enter; with override true the field is cleared before
{"action_type": "keyboard_enter"}
# presses enter
{"action_type": "navigate_home"}
# goes to the home screen
{"action_type": "navigate_back"}
# goes back
{"action_type": "swipe", "direction": "<up|down|left|right>", "box_2d": [[xmin,ymin,xmax,ymax]](optional)}
# moves the finger in that direction, over the element in the box or the whole screen; up shows what is below
{"action_type": "open_app", "app_name": "<name>"}
# opens an app by its name
{"action_type": "wait"}
# waits for the screen to change"""
_OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}
_MARKS = re.compile(r"<\|(?:begin|end)_of_box\|>|</?answer>")
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*", re.MULTILINE)
_DECODER = json.JSONDecoder()


class GlmPhone(Glm):
    """The phone's action space of GLM-4.5V."""

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        now, before = turns[-1], turns[:-1]
        steps = [f"Step {number}:\n{_told(turn.answer or '')}" for number, turn in enumerate(before)]
        words = (
            "You are a GUI Agent. Look at the screen and do what the user asks for, or answer what is asked, step by "
            "step. All coordinates are thousandths of the screen (0-999).\n\n"
            f"# Task:\n{turns[0].text}\n\n# Task Platform\nMobile\n\n# Action Space\n{PHONE_SPACE}\n\n"
            f"# Historical Actions and Current Memory\n{chr(10).join(steps) or 'None'}\n\n# Output Format\n"
            "1. Memory: what is on the screen and later actions need.\n"
            "2. Reason: why this action, from what the screen shows.\n"
            "3. Action: one action of the list above, as JSON.\n\n"
            'Your answer should look like:\nMemory: ...\nReason: ...\nAction: {"action_type":...}'
        )
        return [
            {"role": "user", "content": [text_part(words), *([] if now.image is None else [image_part(now.image)])]}
        ]

    def actions(self, text: str, view: ImageView, cursor: Point) -> list[Action]:
        """What the last line that begins with ``Action:`` asks for, and nothing may follow it."""
        told, _ = _read(text)
        return self._phone_actions(told, view)

    def _phone_actions(self, told: Mapping[str, Any], view: ImageView) -> list[Action]:
        match told.get("action_type"):
            case "status":
                status = told.get("goal_status")
                if status not in ("complete", "infeasible"):
                    raise ActionError(f"status: goal_status {status!r:.40} is neither complete nor infeasible")
                return [Finished() if status == "complete" else Fail()]
            case "answer":
                return [Finished(_string(told, "text"))]
            case "click":
                return [Click(*_centre(_box(told), view))]
            case "long_press":
                return [LongPress(*_centre(_box(told), view))]
            case "input_text":
                if not isinstance(told.get("override"), bool):
                    raise ActionError(f"input_text: override {told.get('override')!r:.40} is neither true nor false")
                write = Replace if told["override"] else Type
                return [Click(*_centre(_box(told), view)), write(_string(told, "text"))]
            case "keyboard_enter":
                return [Key("Enter")]
            case "navigate_home":
                return [GoHome()]
            case "navigate_back":
                return [GoBack()]
            case "swipe":
                return [_swipe(told, view)]
            case "open_app":
                return [OpenApp(_string(told, "app_name"))]
            case "wait":
                return [Wait()]
        raise ActionError(f"{told.get('action_type')!r:.60} is no action of {self.name} on a phone")


def _swipe(told: Mapping[str, Any], view: ImageView) -> Action:
    """Half of what is swiped goes by: the finger moves up, and what is below comes."""
    direction = told.get("direction")
    if not isinstance(direction, str) or direction not in _OPPOSITE:
        raise ActionError(f"swipe: {direction!r:.40} is no direction; there are {', '.join(_OPPOSITE)}")
    box = _box(told) if told.get("box_2d") else None
    x1, y1, x2, y2 = box or (0, 0, FRAME, FRAME)
    height, width = view.original
    dx, dy = towards(_OPPOSITE[direction], 0.5)
    at = CENTRE if box is None else _centre(box, view)
    return scroll(at, view, dx * width * abs(x2 - x1) / FRAME, dy * height * abs(y2 - y1) / FRAME)


def _read(text: str) -> tuple[dict[str, Any], str]:
    """The action of an answer, and what stands before it, without thoughts and marks."""
    text = text[:MOST_TEXT]
    said = _MARKS.sub("", re.sub(r"^.*?</think>", "", text, count=1, flags=re.DOTALL)).strip()
    found = list(_ACTION.finditer(said))
    if not found:
        raise ActionError(f"no line of {said[:60]!r} begins with Action:")
    start = found[-1]
    try:
        told, end = _DECODER.raw_decode(said, start.end())
    except (ValueError, RecursionError) as error:
        raise ActionError(f"{said[start.end() : start.end() + 60]!r} is no JSON") from error
    if not isinstance(told, dict):
        raise ActionError(f"{said[start.end() : start.end() + 60]!r} is no object")
    if said[end:].strip():
        raise ActionError(f"{said[end : end + 60]!r} follows the action")
    return told, said[: start.start()].strip()


def _told(answer: str) -> str:
    """An earlier answer as history tells it. One that could not be read ended its episode and is not told."""
    told, before = _read(answer)
    return f"{before}\nAction: {told}".strip()


def _string(told: Mapping[str, Any], name: str) -> str:
    value = told.get(name)
    if not isinstance(value, str):
        raise ActionError(f"{told['action_type']}: {name} {value!r:.40} is no text")
    return value


def _box(told: Mapping[str, Any]) -> tuple[float, ...]:
    boxes = told.get("box_2d")
    box = boxes[0] if isinstance(boxes, list) and len(boxes) == 1 else None
    if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        raise ActionError(f"{told['action_type']}: box_2d {boxes!r:.60} is not [[xmin, ymin, xmax, ymax]]")
    if not all(0 <= value < FRAME for value in box):
        raise ActionError(f"{told['action_type']}: box_2d {boxes!r:.60} is outside 0..{FRAME - 1}")
    return tuple(map(float, box))


def _centre(box: Sequence[float], view: ImageView) -> Point:
    return frame_point(box, view, thousandths=True)
