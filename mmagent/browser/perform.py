"""Carry out an action of the agent's action space on a page."""

from __future__ import annotations

from mmagent.actions import (
    Action,
    Click,
    DoubleClick,
    Drag,
    Fail,
    Finished,
    Hotkey,
    Key,
    LongPress,
    MiddleClick,
    Move,
    RightClick,
    Scroll,
    TripleClick,
    Type,
    Wait,
)
from mmagent.browser.page import Page
from mmagent.geometry import FRAME, ImageView

WAIT_SECONDS = 0.25
POINTING = (Click, Drag, Move)
"""Actions that begin by moving the mouse to where they act."""


async def perform(page: Page, action: Action, view: ImageView) -> None:
    """Do ``action`` on ``page``; ``view`` is the screenshot that its coordinates speak of (one pixel of the original
    is one pixel of the viewport). ``Finished`` and ``Fail`` do nothing.

    Raises what the page raises: :class:`BrowserTimeout`, :class:`BrowserCrashed`; ``ValueError`` for a key that
    the keyboard lacks, ``TypeError`` for what only phones can do.
    """
    match action:
        case RightClick(x, y):
            await page.right_click(*view.from_frame(x, y))
        case MiddleClick(x, y):
            await page.click(*view.from_frame(x, y), button="middle")
        case DoubleClick(x, y):
            await page.double_click(*view.from_frame(x, y))
        case TripleClick(x, y):
            await page.click(*view.from_frame(x, y), count=3)
        case LongPress():
            raise TypeError(f"{action!r}: a page is not held")
        case Click(x, y):
            await page.click(*view.from_frame(x, y))
        case Move(x, y):
            await page.move(*view.from_frame(x, y))
        case Drag(x1, y1, x2, y2):
            await page.drag(*view.from_frame(x1, y1), *view.from_frame(x2, y2))
        case Scroll(x, y, dx, dy):
            height, width = view.original
            await page.scroll(*view.from_frame(x, y), dx * width / FRAME, dy * height / FRAME)
        case Type(text):
            await page.type_text(text)
        case Key(key) | Hotkey(key):
            await page.press(key)
        case Wait():
            await page.wait(WAIT_SECONDS)
        case Finished() | Fail():
            pass
        case _:
            raise TypeError(f"{action!r} is no action")
