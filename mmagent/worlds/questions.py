"""Questions about a screen whose answers are known from its document: grounding, reading and perception.

Targets of grounding tasks and questions of training data come from the same phrases, so a model is tested in the
words it was taught. Points and boxes are in the frame of :mod:`mmagent.geometry`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from mmagent.actions import Click, format_action
from mmagent.geometry import ImageView
from mmagent.prompts import grounding_text
from mmagent.worlds.elements import Element, TextLine

NOUNS = {
    "textbox": "text field", "radio": "radio button", "combobox": "drop-down", "spinbutton": "number field",
    "menuitem": "menu item", "columnheader": "column header", "listitem": "list item", "progressbar": "progress bar",
    "rect": "rectangle",
}  # fmt: skip
"""Roles (and shapes by their tag) whose everyday name differs from their own."""
COLORS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (230, 30, 30),
    "green": (20, 150, 40), "lime": (60, 240, 60), "blue": (30, 60, 230), "yellow": (245, 235, 50),
    "orange": (250, 150, 30), "purple": (130, 30, 150), "magenta": (245, 40, 245), "cyan": (50, 225, 235),
    "pink": (255, 160, 190), "brown": (140, 80, 40), "navy": (10, 10, 120),
}  # fmt: skip
_NAMELESS = frozenset({"textbox", "slider", "checkbox", "combobox", "image", "spinbutton", "progressbar", "radio"})
_LONGEST = 40  # characters of a name that still make a phrase


class Target(NamedTuple):
    """Something on a screen, and the words that mean it and nothing else there."""

    phrase: str
    element: Element


@dataclass(frozen=True)
class Question:
    """``kind``: locate, where, what, read, find, text, count, list, state or colour."""

    kind: str
    question: str
    answer: str


def color_name(color: str) -> str | None:
    """The everyday name of ``#rrggbb``, None when it is close to none or to several."""
    rgb = tuple(int(color[n : n + 2], 16) for n in (1, 3, 5))
    distances = sorted((sum((a - b) ** 2 for a, b in zip(rgb, known, strict=True)), n) for n, known in COLORS.items())
    nearest, second = distances[0], distances[1]
    return nearest[1] if nearest[0] < 70**2 and second[0] > 1.5 * nearest[0] else None


def noun(element: Element) -> str:
    """What kind of thing it is, in a word or two."""
    kind = element.tag if element.role == "shape" else element.role
    return NOUNS.get(kind, kind)


def describe(element: Element) -> str | None:
    """A phrase for an element, such as ``the button "OK"`` or ``the red circle``; None when words would not do."""
    words = ["the"]
    if element.role in ("shape", "box"):
        color = color_name(element.color if element.role == "shape" else element.background)
        if color is None:
            return None
        words.append(color)
    elif not element.text and element.role not in _NAMELESS:
        return None
    words.append(noun(element))
    if len(element.text) > _LONGEST:
        return None
    return " ".join(words) + (f' "{element.text}"' if element.text else "")


def targets(elements: Sequence[Element], min_visible: float = 0.5) -> list[Target]:
    """What on a screen can be named without a doubt, in the document's order: enough of it shows, and no other
    element answers to its phrase."""
    phrases = [describe(element) for element in elements]
    often = Counter(phrases)
    return [
        Target(phrase, element)
        for phrase, element in zip(phrases, elements, strict=True)
        if phrase is not None and often[phrase] == 1 and element.visible >= min_visible
    ]


def ask(
    size: tuple[int, int], elements: Sequence[Element], lines: Sequence[TextLine], random: Random, count: int
) -> list[Question]:
    """At most ``count`` different questions about a screen of ``size (height, width)``, in random order.

    Locating is asked most often, as everything an agent does begins with it.
    """
    view = ImageView(size, size)
    kinds = {
        "locate": (8.0, list(_locate(view, targets(elements)))),
        "where": (1.0, list(_where(view, targets(elements)))),
        "what": (3.0, list(_what(view, targets(elements)))),
        "read": (3.0, list(_read(view, lines))),
        "find": (2.0, list(_find(view, lines))),
        "text": (0.3, list(_text(lines))),
        "count": (0.7, list(_count(elements))),
        "list": (0.5, list(_list(elements))),
        "state": (1.0, list(_state(targets(elements)))),
        "colour": (1.0, list(_colour(targets(elements)))),
    }
    asked: list[Question] = []
    while len(asked) < count:
        left = [kind for kind, (_, questions) in kinds.items() if questions]
        if not left:
            break
        (kind,) = random.choices(left, [kinds[kind][0] for kind in left])
        questions = kinds[kind][1]
        asked.append(questions.pop(random.randrange(len(questions))))
    return asked


def _box(view: ImageView, box: Sequence[float]) -> str:
    return ",".join(map(str, view.box_to_frame(box)))


def _locate(view: ImageView, found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        point = view.to_frame(*element.point)
        yield Question("locate", grounding_text(phrase), format_action(Click(*point)))


def _where(view: ImageView, found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        yield Question("where", f"Where is {phrase}?", _box(view, element.box))


def _what(view: ImageView, found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        x, y = view.to_frame(*element.point)
        yield Question("what", f"What is at {x},{y}?", phrase.removeprefix("the "))


def _read(view: ImageView, lines: Sequence[TextLine]) -> Iterator[Question]:
    for line in lines:
        yield Question("read", f"Read the text at {_box(view, line.box)}.", line.text)


def _find(view: ImageView, lines: Sequence[TextLine]) -> Iterator[Question]:
    often = Counter(line.text for line in lines)
    for line in lines:
        if often[line.text] == 1 and len(line.text) <= _LONGEST:
            yield Question("find", f'Where does it say "{line.text}"?', _box(view, line.box))


def _text(lines: Sequence[TextLine], most: int = 400) -> Iterator[Question]:
    text = "\n".join(line.text for line in lines)
    if 0 < len(text) <= most:
        yield Question("text", "Read all the text.", text)


def _named(elements: Sequence[Element]) -> dict[str, list[Element]]:
    groups: dict[str, list[Element]] = {}
    for element in elements:
        if element.role not in ("text", "label", "box") and element.visible >= 0.5:
            groups.setdefault(noun(element), []).append(element)
    return groups


def _count(elements: Sequence[Element]) -> Iterator[Question]:
    for name, group in sorted(_named(elements).items()):
        yield Question("count", f'How many elements of kind "{name}" are there?', str(len(group)))


def _list(elements: Sequence[Element], most: int = 12) -> Iterator[Question]:
    for name, group in sorted(_named(elements).items()):
        if 2 <= len(group) <= most and all(0 < len(element.text) <= _LONGEST for element in group):
            yield Question("list", f'List the elements of kind "{name}".', "\n".join(e.text for e in group))


def _state(found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        if element.checked is not None:
            yield Question("state", f"Is {phrase} checked?", "yes" if element.checked else "no")
        elif element.role == "textbox":
            yield Question("state", f"What does {phrase} contain?", element.value or "nothing")


def _colour(found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        if element.role in ("button", "link", "tab", "text", "heading"):
            name = color_name(element.color)
            if name is not None:
                yield Question("colour", f"What colour is the text of {phrase}?", name)
