"""Experts for MiniWoB++: the next right action, computed from the page's document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mmagent.actions import Action, Click, Drag, Finished, Hotkey, Key, Scroll, Type
from mmagent.browser import Page
from mmagent.geometry import FRAME
from mmagent.worlds.miniwob.pages import HEIGHT, VIEW, WIDTH

Expert = Callable[[Page], Awaitable[Action]]


def expert(task: str) -> Expert:
    """A function from the page of a started episode to the next action, in the frame of ``pages.VIEW``.

    It answers ``Finished()`` when it knows nothing more to do. Raises ``ValueError`` for a task without expert.
    """
    if task not in TASKS:
        raise ValueError(f"no expert for {task!r}; there are experts for {', '.join(TASKS)}")

    async def act(page: Page) -> Action:
        return _action(await page.evaluate("mmagent.act()"))

    return act


def _action(found: dict[str, Any] | None) -> Action:
    if found is None:
        return Finished()
    match found["kind"]:
        case "click":
            return Click(*VIEW.to_frame(found["x"], found["y"]))
        case "drag":
            return Drag(*VIEW.to_frame(found["x1"], found["y1"]), *VIEW.to_frame(found["x2"], found["y2"]))
        case "scroll":
            dx, dy = (_distance(found["dx"], WIDTH), _distance(found["dy"], HEIGHT))
            return Scroll(*VIEW.to_frame(found["x"], found["y"]), dx, dy)
        case "type":
            return Type(found["text"])
        case "key":
            return Key(found["key"])
        case "hotkey":
            return Hotkey(found["keys"])
        case kind:
            raise AssertionError(f"experts.js answered with {kind!r}")


def _distance(pixels: float, size: int) -> int:
    return min(max(round(pixels / size * FRAME), 1 - FRAME), FRAME - 1)


TASKS: tuple[str, ...] = (
    "ascending-numbers", "bisect-angle", "circle-center", "click-button", "click-button-sequence", "click-checkboxes",
    "click-checkboxes-large", "click-checkboxes-soft", "click-checkboxes-transfer", "click-collapsible",
    "click-collapsible-2", "click-collapsible-2-nodelay", "click-collapsible-nodelay", "click-color", "click-dialog",
    "click-dialog-2", "click-link", "click-option", "click-shades", "click-shape",
    "click-tab", "click-tab-2", "click-tab-2-easy", "click-tab-2-hard", "click-tab-2-medium", "click-test",
    "click-test-2", "click-test-transfer", "click-widget", "count-shape", "drag-box", "enter-password", "enter-text",
    "enter-text-2", "enter-text-dynamic", "find-greatest", "find-midpoint", "find-word", "focus-text", "focus-text-2",
    "form-sequence", "form-sequence-2", "generate-number", "grid-coordinate", "guess-number", "identify-shape",
    "login-user", "login-user-popup", "multi-orderings", "navigate-tree", "number-checkboxes", "odd-or-even",
    "phone-book", "read-table", "read-table-2", "right-angle", "sign-agreement", "simple-algebra",
    "simple-arithmetic", "text-transform", "unicode-test", "use-slider", "use-spinner", "visual-addition",
)  # fmt: skip
"""Tasks with an expert, which are the supported ones. Not among them: click-pie, whose first slice no mouse can
reach (its page re-inserts the slice whenever the pointer enters it), and copy-paste (pages of one browser share
one clipboard)."""
