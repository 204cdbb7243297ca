"""What is on a page, read from its document: the exact truth behind grounding, OCR and perception questions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Box = tuple[int, int, int, int]
"""``(x1, y1, x2, y2)`` in pixels of the screenshot; the right and lower borders are excluded."""
MOST_ELEMENTS = 400


@dataclass(frozen=True)
class Element:
    """One visible element.

    ``role``: button, link, textbox, checkbox, radio, tab, slider, combobox, option, menuitem, image, heading,
    cell, columnheader, listitem, label, text, shape (an SVG figure), box (a coloured area without text), ...
    ``text``: what is written on it or, for fields, beside it. ``color``, ``background``: ``#rrggbb`` of its
    text (or figure) and of what lies under it. ``visible``: share of it where a click reaches it, of a grid of points;
    ``shown``: share where nothing opaque hides it, which is more under a translucent shade and less under what the
    mouse passes through. ``z``: rank in the order of painting, the greatest is drawn last. ``point``: pixels where a
    click reaches it. ``checked`` is None where that has no meaning. ``value``: what is written in it, as it is seen: a
    password is dots. ``cut``: whether some of its text or value does not show, as a box cuts it off.
    """

    box: Box
    text: str
    role: str
    tag: str
    color: str
    background: str
    visible: float
    point: tuple[float, float]
    value: str = ""
    checked: bool | None = None
    enabled: bool = True
    focused: bool = False
    z: int = 0
    shown: float = 1.0
    cut: bool = False

    @property
    def clear(self) -> float:
        """Share of it that can be both seen and clicked."""
        return min(self.visible, self.shown)


@dataclass(frozen=True)
class Group:
    """What holds elements together: a form, dialog, table, row, card, section, side panel, navigation or menu.

    ``name``: its visible title (of a row: its first words), empty without one. ``members``: numbers of the elements
    within, in the document's order.
    """

    role: str
    name: str
    box: Box
    members: tuple[int, ...]


@dataclass(frozen=True)
class TextLine:
    """One line of text as drawn, wholly inside the screen and not covered, what stands in fields included.
    ``size``: font size in pixels."""

    box: Box
    text: str
    color: str
    background: str
    size: float


@functools.cache
def collector() -> str:
    """The script that reads a page: a JavaScript function of (root selector, most elements)."""
    source = Path(__file__).with_name("elements.js").read_text(encoding="utf-8")
    return source[source.index("(selector, most)") :].rstrip()


def parse(found: Mapping[str, Any]) -> tuple[tuple[Element, ...], tuple[TextLine, ...]]:
    """What the script returned, as types."""
    elements = tuple(Element(**{**e, "box": tuple(e["box"]), "point": tuple(e["point"])}) for e in found["elements"])
    return elements, tuple(TextLine(**{**line, "box": tuple(line["box"])}) for line in found["lines"])


def parse_groups(found: Mapping[str, Any]) -> tuple[Group, ...]:
    """The groups that the script returned."""
    return tuple(Group(**{**g, "box": tuple(g["box"]), "members": tuple(g["members"])}) for g in found["groups"])
