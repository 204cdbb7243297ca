"""Synthetic pages: seeded HTML of graded difficulty, rendered in a browser, with the truth about every element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmagent.browser import Page
from mmagent.worlds.elements import MOST_ELEMENTS, Box, Element, Group, TextLine, collector, parse, parse_groups
from mmagent.worlds.pages.kit import LEVELS, Kit
from mmagent.worlds.pages.templates import TEMPLATES

__all__ = ["LEVELS", "TEMPLATES", "PageSource", "Scene", "generate", "look", "render"]


@dataclass(frozen=True)
class PageSource:
    """A page to be rendered at ``width`` x ``height``: its ``html`` and how it came about."""

    html: str
    width: int
    height: int
    template: str
    difficulty: int
    seed: int
    spoken: str = "en"
    scale: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A rendered page: ``image (height, width, 3)`` uint8, its ``html``, and the visible ``elements`` and ``lines``.

    ``groups`` hold elements together. ``unread``: boxes of text that is in no line, as it shows
    in part only.
    """

    image: np.ndarray
    html: str
    elements: tuple[Element, ...]
    lines: tuple[TextLine, ...]
    groups: tuple[Group, ...] = ()
    unread: tuple[Box, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` in pixels."""
        return self.image.shape[0], self.image.shape[1]


def generate(
    seed: int, width: int, height: int, difficulty: int = 3, template: str | None = None, spoken: str = "en"
) -> PageSource:
    """The page that ``seed`` describes for a screen of ``width`` x ``height`` pixels.

    ``difficulty`` 1..5: more and smaller elements, darker themes, weaker contrast, things that cover others.
    ``template``: one of :data:`TEMPLATES`, None draws it from the seed. ``spoken``: one of
    :data:`mmagent.worlds.languages.NAMES`; :mod:`mmagent.worlds.pages.fonts` knows which can be drawn here. Use
    :func:`mmagent.worlds.seeds.seed_for` for seeds that keep training and evaluation apart.
    """
    if not 1 <= difficulty <= LEVELS:
        raise ValueError(f"difficulty {difficulty} is not in 1..{LEVELS}")
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"template {template!r} is none of {', '.join(TEMPLATES)}")
    if width < 120 or height < 90:
        raise ValueError(f"a page of {width}x{height} pixels is too small to hold anything; at least 120x90")
    kit = Kit(seed, width, height, difficulty, spoken)
    drawn = kit.rng.choice(tuple(TEMPLATES))
    name = template or drawn
    html = kit.document(kit.framed(TEMPLATES[name](kit)))
    return PageSource(html, width, height, name, difficulty, seed, spoken)


async def render(page: Page, html: str, width: int, height: int, *, scale: float = 1.0, trusted: bool = False) -> Scene:
    """Show ``html`` at ``width`` x ``height`` pixels of CSS and read what is on it, in pixels of the image: ``scale``
    to one of CSS, as on the screens of phones and of many laptops.

    The reading happens in a script world of its own, which scripts of the page cannot tamper with. ``trusted``
    pages (our own, without scripts) are replaced in place, which is faster. Raises what the page raises.
    """
    if (page.width, page.height, page.scale) != (width, height, scale):
        await page.resize(width, height, scale)
    await page.set_content(html, fresh=not trusted)
    return await look(page, html)


async def look(page: Page, html: str = "") -> Scene:
    """What ``page`` shows now, and what is on it."""
    image = await page.screenshot()
    found = await page.evaluate(collector(), "body", MOST_ELEMENTS, isolated=True)
    return Scene(image, html, *parse(found), parse_groups(found), tuple(tuple(box) for box in found["unread"]))
