"""Synthetic pages: seeded HTML of graded difficulty, rendered in a browser, with the truth about every element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmagent.browser import Page
from mmagent.worlds.elements import MOST_ELEMENTS, Element, TextLine, collector, parse
from mmagent.worlds.pages.kit import LEVELS, Kit
from mmagent.worlds.pages.templates import TEMPLATES

__all__ = ["LEVELS", "TEMPLATES", "PageSource", "Scene", "generate", "render"]


@dataclass(frozen=True)
class PageSource:
    """A page to be rendered at ``width`` x ``height``: its ``html`` and how it came about."""

    html: str
    width: int
    height: int
    template: str
    difficulty: int
    seed: int


@dataclass(frozen=True)
class Scene:
    """A rendered page: ``image (height, width, 3)`` uint8, its ``html``, and the visible ``elements`` and ``lines``."""

    image: np.ndarray
    html: str
    elements: tuple[Element, ...]
    lines: tuple[TextLine, ...]


def generate(seed: int, width: int, height: int, difficulty: int = 3, template: str | None = None) -> PageSource:
    """The page that ``seed`` describes for a screen of ``width`` x ``height`` pixels.

    ``difficulty`` 1..5: more and smaller elements, darker themes, weaker contrast, things that cover others.
    ``template``: one of :data:`TEMPLATES`, None draws it from the seed. Use :func:`mmagent.worlds.seeds.seed_for`
    for seeds that keep training and evaluation apart.
    """
    if not 1 <= difficulty <= LEVELS:
        raise ValueError(f"difficulty {difficulty} is not in 1..{LEVELS}")
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"template {template!r} is none of {', '.join(TEMPLATES)}")
    if width < 120 or height < 90:
        raise ValueError(f"a page of {width}x{height} pixels is too small to hold anything; at least 120x90")
    kit = Kit(seed, width, height, difficulty)
    drawn = kit.rng.choice(tuple(TEMPLATES))
    name = template or drawn
    return PageSource(kit.document(TEMPLATES[name](kit)), width, height, name, difficulty, seed)


async def render(page: Page, html: str, width: int, height: int, *, trusted: bool = False) -> Scene:
    """Show ``html`` at ``width`` x ``height`` pixels and read what is on it.

    The reading happens in a script world of its own, which scripts of the page cannot tamper with. ``trusted``
    pages (our own, without scripts) are replaced in place, which is faster. Raises what the page raises.
    """
    if (page.width, page.height) != (width, height):
        await page.resize(width, height)
    await page.set_content(html, fresh=not trusted)
    image = await page.screenshot()
    found = await page.evaluate(collector(), "body", MOST_ELEMENTS, isolated=True)
    return Scene(image, html, *parse(found))
