"""Traces: an expert works an app with a mouse and a keyboard, and every screen on the way is kept.

A trace exists only where the browser says so: the goal did not hold at the start nor before the last action, and holds
after it. Whatever else happens raises :class:`TraceError`, so that no record teaches what does not work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from mmagent.actions import Action, Click, DoubleClick, Drag, Hotkey, Key, RightClick, Scroll, Type
from mmagent.browser import Page
from mmagent.browser.perform import perform
from mmagent.geometry import FRAME, ImageView
from mmagent.worlds.pages import Scene, look
from mmagent.worlds.pages.apps import App, Step

MOST_SCROLLS = 12
_WHERE = """(selector, spot) => {
  const el = document.querySelector(selector);
  if (!el) return null;
  const r = el.getBoundingClientRect();
  const hits = (x, y) => {
    const hit = x >= 0 && y >= 0 && x < innerWidth && y < innerHeight && document.elementFromPoint(x, y);
    return hit && (hit === el || el.contains(hit) || hit.control === el) ? [x, y] : null;
  };
  if (spot) return hits(r.left + r.width * spot[0], r.top + r.height * spot[1]);
  for (const fy of [0.5, 0.3, 0.7]) for (const fx of [0.5, 0.3, 0.7, 0.15, 0.85]) {
    const found = hits(r.left + r.width * fx, r.top + r.height * fy);
    if (found) return found;
  }
  return null;
}"""
_BOX = """selector => {
  const r = document.querySelector(selector).getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom];
}"""
_ON_SCREEN = """selector => {
  const r = document.querySelector(selector).getBoundingClientRect();
  return [r.top, r.bottom];
}"""


class TraceError(RuntimeError):
    """The expert's steps do not work; the message says which and how."""


@dataclass(frozen=True)
class Trace:
    """``scenes[n]`` is what is seen before ``actions[n]``; the last scene shows what has come of it all."""

    app: App
    scenes: tuple[Scene, ...]
    actions: tuple[Action, ...]
    boxes: tuple[tuple[int, int, int, int] | None, ...]
    """What each action is about, where it is about a place."""


async def play(page: Page, app: App, *, elements: bool = True) -> Trace:
    """Work ``app`` on ``page`` as its expert does. ``elements`` false leaves the scenes' truth out, which is faster.

    Raises :class:`TraceError`, and what the page raises.
    """
    if (page.width, page.height, page.scale) != (app.width, app.height, 1.0):
        await page.resize(app.width, app.height)
    await page.move(0, 0)
    await page.set_content(app.html)
    view = ImageView((app.height, app.width), (app.height, app.width))
    scenes, actions, boxes = [await _seen(page, elements)], [], []
    if await reached(page, app):
        raise TraceError(f"{app.kind}: the goal holds before anything is done")
    for number, step in enumerate(app.steps):
        async for action, box in step_actions(page, step, view, app.kind):
            if actions and await reached(page, app):
                raise TraceError(f"{app.kind}: the goal holds before step {number + 1} of {len(app.steps)}")
            await perform(page, action, view)
            actions.append(action)
            boxes.append(box)
            scenes.append(await _seen(page, elements))
    if not await reached(page, app):
        raise TraceError(f"{app.kind}: the goal is not reached after {len(actions)} actions")
    return Trace(app, tuple(scenes), tuple(actions), tuple(boxes))


async def reached(page: Page, app: App) -> bool:
    """Whether everything that is wanted holds."""
    return all([await page.evaluate(f"({js}) ?? null") == value for js, value in app.wanted.items()])


async def _seen(page: Page, elements: bool) -> Scene:
    return await look(page) if elements else Scene(await page.screenshot(), "", (), ())


async def _point(page: Page, what: str, selector: str, spot: tuple[float, float] | None) -> tuple[float, float]:
    found = await page.evaluate(_WHERE, selector, spot)
    if found is None:
        raise TraceError(f"{what}: nothing to reach at {selector}")
    return found[0], found[1]


async def _box(page: Page, selector: str) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = await page.evaluate(_BOX, selector)
    return max(0, int(x1)), max(0, int(y1)), min(page.width, int(x2) + 1), min(page.height, int(y2) + 1)


async def step_actions(
    page: Page, step: Step, view: ImageView, what: str
) -> AsyncIterator[tuple[Action, tuple[int, int, int, int] | None]]:
    """The actions of a step, computed from the page as it then is, with the box that each is about. Whoever asks
    carries an action out before asking for the next. Raises :class:`TraceError` that begins with ``what``."""
    match step.kind:
        case "type":
            yield Type(step.text), None
        case "key":
            yield Key(step.text), None
        case "hotkey":
            yield Hotkey(step.text), None
        case "scroll":
            async for action in _scrolls(page, step, view, what):
                yield action, None
        case "drag":
            start = view.to_frame(*await _point(page, what, step.at, step.spot))
            end = await _point(page, what, step.to, step.end)
            yield Drag(*start, *view.to_frame(*end)), await _box(page, step.at)
        case "click" | "double_click" | "right_click":
            kinds = {"click": Click, "double_click": DoubleClick, "right_click": RightClick}
            at = view.to_frame(*await _point(page, what, step.at, step.spot))
            yield kinds[step.kind](*at), await _box(page, step.at)


async def _scrolls(page: Page, step: Step, view: ImageView, what: str) -> AsyncIterator[Action]:
    """Turn the wheel until what is meant lies whole in its box."""
    at = view.to_frame(*await _point(page, what, step.at, None))
    for _ in range(MOST_SCROLLS):
        top, bottom = await page.evaluate(_ON_SCREEN, step.at)
        first, last = await page.evaluate(_ON_SCREEN, step.to)
        if first >= top and last <= bottom:
            return
        way = 1 if last > bottom else -1
        yield Scroll(*at, 0, way * max(1, round(0.75 * (bottom - top) / view.original[0] * FRAME)))
    raise TraceError(f"{what}: {step.to} is not in sight after {MOST_SCROLLS} turns of the wheel")
