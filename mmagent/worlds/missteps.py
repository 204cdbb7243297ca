"""Wrong next actions: what an agent might do instead of the expert's step, and what is wrong with it.

Each is proven by the trace and by what the page shows: the expert writes another text, drags and scrolls the other way,
a later step's target is not there yet. What could be as good a way to the goal is not put forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from mmagent.actions import Action, Click, DoubleClick, Drag, Finished, Hotkey, Key, RightClick, Scroll, Type
from mmagent.geometry import FRAME, ImageView
from mmagent.worlds.changes import states
from mmagent.worlds.critic import describe_hit, misread
from mmagent.worlds.elements import Box, Element
from mmagent.worlds.pages import Scene
from mmagent.worlds.questions import noun, targets
from mmagent.worlds.traces import Trace

KINDS = ("idle", "text", "field", "key", "way", "button", "early", "finished", "late")
"""A click on what is never needed; a wrong text; typing where it does not belong; a wrong key; a drag or a turn of the
wheel the wrong way; a click of the wrong sort; a later step before its time; an end before the goal; going on after
it."""
_NOT_ENTER = ("Escape", "Tab", "Delete", "ArrowDown")
_NOT_ALL: tuple[Action, ...] = (Hotkey("ctrl+c"), Hotkey("ctrl+x"), Key("Home"), Key("End"))
_QUOTED = re.compile(r'"(.+?)"')
_LEAST_DRAG = 30  # thousandths that a drag goes, so that its direction is plain


@dataclass(frozen=True)
class Misstep:
    """``action`` is not the next one; ``says`` what it comes to, as in "that ...". ``kind``: one of :data:`KINDS`."""

    kind: str
    action: Action
    says: str


def missteps(trace: Trace, at: int, random: Random) -> list[Misstep]:
    """Wrong actions instead of the expert's number ``at``, at most one of each kind; ``at`` may be the number of all
    actions, where the expert says that it has finished. Empty where nothing can be proven wrong."""
    expert = trace.actions[at] if at < len(trace.actions) else Finished()
    made = []
    for kind in KINDS:
        found = [m for m in _MAKERS[kind](trace, at, random) if m.action != expert]
        if found:
            made.append(random.choice(found))
    return made


def _idle(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    """A click on something that the expert never touches. What the goal names may be as good a way to it: a field's
    label, or an entry that a scroll brings into sight."""
    scene, used = trace.scenes[at], [box for box in trace.boxes if box is not None]
    for _, element in targets(scene.elements):
        named = element.text and f'"{element.text}"' in trace.app.goal
        if not named and not any(_meet(element.box, box) for box in used):
            action = Click(*ImageView(scene.size, scene.size).to_frame(*element.point))
            yield Misstep("idle", action, f"hits {describe_hit(element)}")


def _text(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    """Another text of the goal, or one that was misread from it."""
    match trace.actions[at : at + 1]:
        case (Type(text),) if text in trace.app.goal:
            field = _focused(trace.scenes[at])
            where = f" into {_field(field)}" if field else ""
            for other in (*_QUOTED.findall(trace.app.goal), misread(text, random)):
                if other is not None and other != text:
                    yield Misstep("text", Type(other), f'writes "{other}"{where}, where "{text}" is asked for')


def _where(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    """The next text before its field has the focus, or before what stands in it is selected."""
    number = next((n for n in range(at, len(trace.actions)) if isinstance(trace.actions[n], Type)), None)
    if number in (None, at) or not all(isinstance(a, Click | Hotkey) for a in trace.actions[at:number]):
        return
    typed, field, now = trace.actions[number], _focused(trace.scenes[number]), _focused(trace.scenes[at])
    if field is None:
        return
    if now is None:
        yield Misstep("field", typed, "comes before a text field has the focus")
    elif now.box != field.box:
        yield Misstep("field", typed, f"writes into {_field(now)}, which has the focus")
    elif isinstance(trace.actions[at], Hotkey) and now.value:
        yield Misstep("field", typed, f'leaves "{now.value}" standing in {_field(now)}')


def _key(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    match trace.actions[at : at + 2]:
        case (Key("Enter"), *_):
            for key in _NOT_ENTER:
                yield Misstep("key", Key(key), f"presses {key}, which does not confirm what is written")
        case (Hotkey("ctrl+a"), *_):
            for action in _NOT_ALL:
                name = action.keys if isinstance(action, Hotkey) else action.key
                yield Misstep("key", action, f"presses {name}, which does not select what stands in the field")
        case (Type(text), Key(key)):
            yield Misstep("key", Key(key), f'presses {key} before "{text}" is written')


def _way(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    """A drag to the other side or from its end to its start, a turn of the wheel away from what is sought."""
    match trace.actions[at : at + 1]:
        case (Scroll(x, y, 0, dy),):
            way, back = ("up", "down") if dy > 0 else ("down", "up")
            yield Misstep("way", Scroll(x, y, 0, -dy), f"scrolls {way}, and what is sought lies further {back}")
        case (Drag(x1, y1, x2, y2),):
            if not _named_at(trace, at, x2, y2):
                yield Misstep("way", Drag(x2, y2, x1, y1), "drags from where it is to end to where it is to begin")
            mirrored = min(max(2 * x1 - x2, 0), FRAME - 1)
            if abs(x2 - x1) >= _LEAST_DRAG and abs(mirrored - x1) >= _LEAST_DRAG:
                way, instead = ("left", "right") if x2 > x1 else ("right", "left")
                yield Misstep("way", Drag(x1, y1, mirrored, y2), f"drags to the {way}, not to the {instead}")


def _named_at(trace: Trace, at: int, x: int, y: int) -> bool:
    """Whether something that the goal names stands there: a drag that begins on it may be another one's."""
    here = _all_at(trace.scenes[at], x, y)
    return any(e.text and f'"{e.text}"' in trace.app.goal for e in here)


def _button(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    match trace.actions[at : at + 1]:
        case (DoubleClick(x, y),):
            yield Misstep("button", Click(x, y), "is a single click, where it takes a double one")
        case (RightClick(x, y),):
            yield Misstep("button", Click(x, y), "is a click of the left button, where it takes the right one")


def _early(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    """A later click: on what is not there yet, or the last one while something that it needs is still to be done."""
    scene, last = trace.scenes[at], len(trace.actions) - 1
    texts = {e.text.casefold() for e in scene.elements} | {e.value.casefold() for e in scene.elements}
    lines = [line.text.casefold() for line in scene.lines]
    for number in range(at + 1, last + 1):
        action = trace.actions[number]
        if not isinstance(action, Click):
            continue
        meant, now = (_hit(trace.scenes[n], action.x, action.y) for n in (number, at))
        used = [box for box in trace.boxes[at:number] if box is not None]
        if meant is None or not meant.text or any(_holds(box, *_pixel(scene, action.x, action.y)) for box in used):
            continue
        name, text = describe_hit(meant), meant.text.casefold()
        if now is not None and now.text and noun(now) == noun(meant) and now.text != meant.text:
            if f'"{now.text}"' not in trace.app.goal:
                yield Misstep("early", action, f"comes too early: it hits {describe_hit(now)}")
        elif text not in texts and not any(text in line for line in lines):
            yield Misstep("early", action, f"comes too early: {name} is not on the screen yet")
        elif now is None or number < last or meant.role != "button":
            continue
        elif (noun(now), now.text) == (noun(meant), meant.text):
            for state in states(scene, trace.scenes[last])[:1]:
                yield Misstep("early", action, f"presses {name} before {state}")


def _finished(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    """A trace knows of every state before its last that the goal does not hold there."""
    yield Misstep("finished", Finished(), "comes before the goal is reached")


def _late(trace: Trace, at: int, random: Random) -> Iterator[Misstep]:
    if at == len(trace.actions):
        yield Misstep("late", trace.actions[-1], "comes after the goal is reached")


_MAKERS: dict[str, Callable[[Trace, int, Random], Iterator[Misstep]]] = dict(
    zip(KINDS, (_idle, _text, _where, _key, _way, _button, _early, _finished, _late), strict=True)
)


def _focused(scene: Scene) -> Element | None:
    """The text field that has the focus."""
    return next((e for e in scene.elements if e.focused and e.role == "textbox"), None)


def _field(element: Element) -> str:
    return f'the text field "{element.text}"' if element.text else "the text field"


def _pixel(scene: Scene, x: int, y: int) -> tuple[float, float]:
    return ImageView(scene.size, scene.size).from_frame(x, y)


def _holds(box: Box, x: float, y: float) -> bool:
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def _all_at(scene: Scene, x: int, y: int) -> list[Element]:
    point = _pixel(scene, x, y)
    return [e for e in scene.elements if _holds(e.box, *point)]


def _hit(scene: Scene, x: int, y: int) -> Element | None:
    """What is drawn last at a point of the frame."""
    return max(_all_at(scene, x, y), key=lambda e: e.z, default=None)


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
