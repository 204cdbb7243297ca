"""Questions about a screen whose answers are known from its document: grounding, reading and perception.

Targets of grounding tasks and questions of training data come from the same phrases, so a model is tested in the
words it was taught. Points and boxes are in the frame of :mod:`mmagent.geometry`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (230, 20, 20),
    "green": (0, 140, 30), "lime": (50, 245, 50), "blue": (10, 20, 245), "yellow": (250, 240, 30),
    "orange": (255, 160, 10), "purple": (130, 20, 150), "magenta": (250, 20, 250), "cyan": (20, 235, 245),
    "pink": (255, 170, 195), "brown": (140, 80, 40), "navy": (0, 0, 110),
}  # fmt: skip
_NAMELESS = frozenset({"textbox", "slider", "checkbox", "combobox", "image", "spinbutton", "progressbar", "radio"})
_LONGEST = 40  # characters of a name that still make a phrase
_LONGEST_TEXT = 24  # of text that is no control: a sentence is read, not pointed at


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
    if len(element.text) > (_LONGEST_TEXT if element.role == "text" else _LONGEST):
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


WEIGHTS = {
    "locate": 8.0, "where": 1.0, "what": 3.0, "read": 3.0, "find": 2.0,
    "text": 0.3, "count": 0.7, "list": 0.5, "state": 1.0, "colour": 1.0,
}  # fmt: skip
"""How often each kind is asked: locating most, as everything an agent does begins with it."""


def ask(
    size: tuple[int, int],
    elements: Sequence[Element],
    lines: Sequence[TextLine],
    random: Random,
    count: int,
    weights: Mapping[str, float] = WEIGHTS,
) -> list[Question]:
    """At most ``count`` different questions about a screen of ``size (height, width)``, in random order.

    ``weights``: relative frequency of kinds; kinds that are not named are not asked.
    """
    view = ImageView(size, size)
    named = targets(elements)
    candidates = {
        "locate": _locate(view, named),
        "where": _where(view, named),
        "what": _what(view, named),
        "read": _read(view, lines),
        "find": _find(view, lines),
        "text": _text(lines),
        "count": _count(elements),
        "list": _list(elements),
        "state": _state(named),
        "colour": _colour(named),
    }
    unknown = set(weights) - set(candidates)
    if unknown:
        raise ValueError(f"no questions of kind {sorted(unknown)}; there are {', '.join(candidates)}")
    open_questions = {kind: list(candidates[kind]) for kind in candidates if weights.get(kind, 0) > 0}
    asked: list[Question] = []
    while len(asked) < count:
        left = [kind for kind, questions in open_questions.items() if questions]
        if not left:
            break
        (kind,) = random.choices(left, [weights[kind] for kind in left])
        questions = open_questions[kind]
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
            state = "checked" if element.role in ("checkbox", "radio", "switch") else "selected"
            yield Question("state", f"Is {phrase} {state}?", "yes" if element.checked else "no")
        elif element.role == "textbox":
            yield Question("state", f"What does {phrase} contain?", element.value or "nothing")


def _colour(found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        if element.role in ("button", "link", "tab", "text", "heading"):
            name = color_name(element.color)
            if name is not None:
                yield Question("colour", f"What colour is the text of {phrase}?", name)
