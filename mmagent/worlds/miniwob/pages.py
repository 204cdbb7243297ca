"""MiniWoB++ episodes on a browser page: start from a seed, look, and read the benchmark's own reward."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmagent.browser import BrowserTimeout, Page
from mmagent.geometry import ImageView
from mmagent.worlds.elements import MOST_ELEMENTS, Element, TextLine, collector, parse

WIDTH, HEIGHT = 160, 210
VIEW = ImageView((HEIGHT, WIDTH), (HEIGHT, WIDTH))
"""Of the screen as it is; actions of the experts are in its frame."""

READY_ATTEMPTS = 250


@dataclass(frozen=True)
class Screen:
    """``image (210, 160, 3)`` uint8; ``utterance``, what is asked for; ``elements`` and ``lines`` on the screen,
    empty where they were not asked for."""

    image: np.ndarray
    utterance: str
    elements: tuple[Element, ...] = ()
    lines: tuple[TextLine, ...] = ()


def html_folder() -> Path:
    """The folder of the installed ``miniwob`` package that holds its pages; the package itself is not imported.

    It must be among the roots of the browser pool.
    """
    spec = importlib.util.find_spec("miniwob")
    if spec is None or spec.origin is None:
        raise ValueError("the MiniWoB++ pages are missing: `pip install miniwob`")
    return Path(spec.origin).parent / "html"


@functools.cache
def _harness() -> str:
    sources = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("harness.js", "experts.js"))
    harness, experts = (source[source.index("\n(") :].strip() for source in sources)
    return f"task => ({harness})(task, {collector()}, {experts})"


async def start(page: Page, task: str, seed: int, *, elements: bool = True) -> Screen:
    """Begin the episode of ``task`` that ``seed`` describes, on a page of 160 x 210 pixels, and look at it.

    The same seed gives the same pixels whatever the page showed before.
    """
    return await _screen(page, await _begin(page, task, seed, MOST_ELEMENTS if elements else 0))


async def restart(page: Page, task: str, seed: int, *, park: bool = True) -> None:
    """:func:`start` without looking, for an episode that is known: a third of its cost is saved. It is cheaper
    still without parking the mouse in its corner, which nothing sees where the first action moves it."""
    await _begin(page, task, seed, 0, park)


async def _begin(page: Page, task: str, seed: int, most: int, park: bool = True) -> dict:
    if (page.width, page.height) != (WIDTH, HEIGHT):
        raise ValueError(f"MiniWoB++ needs a page of {WIDTH}x{HEIGHT} pixels, this one has {page.width}x{page.height}")
    begin = "(task, seed, most) => window.mmagent && mmagent.task === task ? mmagent.start(seed, most) : null"
    if park:
        await page.move(0, 0)  # where nothing lies under the mouse
    begun = None if task in RELOADED else await page.evaluate(begin, task, seed, most)
    if begun is None:
        file = html_folder() / "miniwob" / f"{task}.html"
        if not file.is_file():
            raise ValueError(f"MiniWoB++ has no task {task!r}")
        await page.goto(file)
        await page.evaluate(_harness(), task)
        await page.evaluate(begin, task, seed, 0)
        await page.evaluate("mmagent.settle()")
        begun = await page.evaluate(begin, task, seed, most)
    ready = begun["ready"]
    for _ in range(READY_ATTEMPTS):
        if ready:
            return begun
        await page.wait(0.02)
        ready = await page.evaluate("mmagent.ready()")
    raise BrowserTimeout(f"the page of {task!r} did not become ready for seed {seed}")


async def observe(page: Page, *, elements: bool = True) -> Screen:
    """The screen as it is now."""
    return await _screen(page, await page.evaluate("most => mmagent.observe(most)", MOST_ELEMENTS if elements else 0))


async def state(page: Page) -> tuple[bool, float]:
    """Whether the episode is over, and the benchmark's raw reward: -1..1, no penalty for time."""
    done, reward = await page.evaluate("mmagent.state()")
    return bool(done), float(reward)


async def _screen(page: Page, seen: dict) -> Screen:
    found = parse(seen["found"]) if seen["found"] else ((), ())
    return Screen(await page.screenshot(), seen["utterance"], *found)


RELOADED: frozenset[str] = frozenset()
"""Tasks whose pages keep something from one episode to the next, so that each begins by loading them anew."""
