"""Questions about a screen whose answers are known from its document: grounding, reading and perception.

Targets of grounding tasks and questions of training data come from the same phrases, so a model is tested in the
words it was taught. Points and boxes are in the frame of :mod:`mmagent.geometry`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import NamedTuple

from mmagent.actions import Click, Type, format_action
from mmagent.geometry import ImageView
from mmagent.prompts import grounding_text
from mmagent.worlds.elements import Box, Element, TextLine

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
_COUNTED = ("button", "link", "textbox", "checkbox", "radio", "tab", "slider", "combobox", "menuitem", "spinbutton")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_REGION = 16  # times the area of a box within it
_LONGEST = 40  # characters of a name that still make a phrase
_LONGEST_TEXT = 24  # of text that is no control: a sentence is read, not pointed at


class Target(NamedTuple):
    """Something on a screen, and the words that mean it and nothing else there."""

    phrase: str
    element: Element


@dataclass(frozen=True)
class Question:
    """``kind``: one of :data:`WEIGHTS`. ``box``: the pixels asked about, where it is not the whole screen."""

    kind: str
    question: str
    answer: str
    box: tuple[float, ...] | None = None


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
    if element.cut and element.role != "textbox":  # nobody can tell how it ends
        return None
    return " ".join(words) + (f' "{element.text}"' if element.text else "")


KINDS = (
    "button", "link", "text field", "checkbox", "radio button", "tab", "drop-down", "slider", "number field",
    "menu item", "option", "image", "heading", "cell", "column header", "list item", "label", "text",
)  # fmt: skip
"""What stands on screens, by :func:`noun`."""


def labels(elements: Sequence[Element], min_visible: float = 0.5) -> list[tuple[Box, str]]:
    """Everything of :data:`KINDS` that shows, as ``(box, label)``: its noun and, in quotes, what is written on it."""
    shown = [e for e in elements if noun(e) in KINDS and e.clear >= min_visible]
    return [(e.box, noun(e) + (f' "{e.text}"' if e.text else "")) for e in shown]


def targets(elements: Sequence[Element], min_visible: float = 0.5) -> list[Target]:
    """What on a screen can be named without a doubt, in the document's order: enough of it shows, and no other
    element answers to its phrase. Controls without a name of their own go by their place: "the second text field".
    """
    phrases = [describe(element) for element in elements]
    often = Counter(phrases)
    kinds = Counter(_bare(element, phrase) for element, phrase in zip(elements, phrases, strict=True))
    places = _places(elements)
    named = []
    for element, phrase in zip(elements, phrases, strict=True):
        alone = phrase is not None and often[phrase] == 1 and (bool(element.text) or kinds[phrase] == 1)
        unique = phrase if alone else places.get(id(element))
        if unique is not None and element.clear >= min_visible:
            named.append(Target(unique, element))
    return named


def _bare(element: Element, phrase: str | None) -> str:
    """A phrase without the text in quotes: "the text field" could as well mean one that has a name."""
    return f"the {noun(element)}" if phrase is None else phrase.removesuffix(f' "{element.text}"')


def _places(elements: Sequence[Element]) -> dict[int, str]:
    """By ``id``: controls counted in reading order, where their kind is few and stands in clear lines."""
    out: dict[int, str] = {}
    for role in _COUNTED:
        same = sorted((e for e in elements if e.role == role), key=lambda e: (e.box[1], e.box[0]))
        clear = all(
            after.box[1] - before.box[1] >= 4 or (after.box[1] == before.box[1] and after.box[0] >= before.box[2])
            for before, after in pairwise(same)
        )
        if clear and 2 <= len(same) <= len(_ORDINALS):
            out |= {id(e): f"the {word} {noun(e)}" for word, e in zip(_ORDINALS, same, strict=False)}
    return out


def _alone(elements: Sequence[Element]) -> Iterator[Target]:
    """Controls that need no name, as they are the only ones of their kind: "the button"."""
    often = Counter(element.role for element in elements)
    for element in elements:
        if element.role in _COUNTED and often[element.role] == 1 and element.clear >= 0.5:
            yield Target(f"the {noun(element)}", element)


WEIGHTS = {
    "locate": 8.0, "where": 1.0, "what": 3.0, "read": 3.0, "find": 2.0,
    "text": 0.3, "count": 0.7, "list": 0.5, "state": 1.0, "colour": 1.0, "step": 1.0, "describe": 0.3,
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

    No two are about the same place: an answer to one would tell the other's coordinates, and a model that can copy
    them from the text does not learn to find them in the image.

    ``weights``: relative frequency of kinds; kinds that are not named are not asked.
    """
    return pick(candidates(size, elements, lines), random, count, weights)


def candidates(
    size: tuple[int, int], elements: Sequence[Element], lines: Sequence[TextLine]
) -> dict[str, Iterator[Question]]:
    """All questions there are about a screen, by kind."""
    view = ImageView(size, size)
    named = targets(elements)
    return {
        "locate": _locate(view, [*named, *_alone(elements)]),
        "where": _where(view, named),
        "what": _what(view, [target for target in named if _smallest_there(target.element, elements)]),
        "read": _read(view, lines),
        "find": _find(view, lines),
        "text": _text(lines),
        "count": _count(elements),
        "list": _list(elements),
        "state": _state(named),
        "colour": _colour(named),
        "step": _step(view, named),
        "describe": _describe(elements),
    }


def pick(
    known: Mapping[str, Iterable[Question]], random: Random, count: int, weights: Mapping[str, float]
) -> list[Question]:
    """At most ``count`` of the questions ``known`` by kind, no two about the same place; see :func:`ask`."""
    unknown = set(weights) - set(known)
    if unknown:
        raise ValueError(f"no questions of kind {sorted(unknown)}; there are {', '.join(known)}")
    open_questions = {kind: list(known[kind]) for kind in known if weights.get(kind, 0) > 0}
    asked: list[Question] = []
    while len(asked) < count:
        left = [kind for kind, questions in open_questions.items() if questions]
        if not left:
            break
        (kind,) = random.choices(left, [weights[kind] for kind in left])
        questions = open_questions[kind]
        chosen = questions.pop(random.randrange(len(questions)))
        asked.append(chosen)
        if chosen.box is not None:
            for name, others in open_questions.items():
                open_questions[name] = [q for q in others if q.box is None or not same_place(q.box, chosen.box)]
    return asked


def same_place(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes overlap so that one tells where the other is: not where one is a whole region round it."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = sorted((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width > 0 and height > 0 and 2 * width * height > areas[0] and areas[1] < _REGION * areas[0]


def _box(view: ImageView, box: Sequence[float]) -> str:
    return ",".join(map(str, view.box_to_frame(box)))


def _locate(view: ImageView, found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        point = view.to_frame(*element.point)
        yield Question("locate", grounding_text(phrase), format_action(Click(*point)), element.box)


def _where(view: ImageView, found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        yield Question("where", f"Where is {phrase}?", _box(view, element.box), element.box)


def _what(view: ImageView, found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        x, y = view.to_frame(*element.point)
        yield Question("what", f"What is at {x},{y}?", phrase.removeprefix("the "), element.box)


def _smallest_there(element: Element, elements: Sequence[Element]) -> bool:
    """Whether nothing smaller lies at the element's point, so that "what is here" has one answer."""

    def area(e: Element) -> int:
        return (e.box[2] - e.box[0]) * (e.box[3] - e.box[1])

    x, y = element.point
    here = (e for e in elements if e.box[0] <= x < e.box[2] and e.box[1] <= y < e.box[3])
    return all(e is element or area(e) > area(element) for e in here)


def _read(view: ImageView, lines: Sequence[TextLine]) -> Iterator[Question]:
    for line in lines:
        yield Question("read", f"Read the text at {_box(view, line.box)}.", line.text, line.box)


def _find(view: ImageView, lines: Sequence[TextLine]) -> Iterator[Question]:
    often = Counter(line.text for line in lines)
    for line in lines:
        if often[line.text] == 1 and len(line.text) <= _LONGEST:
            yield Question("find", f'Where does it say "{line.text}"?', _box(view, line.box), line.box)


def _text(lines: Sequence[TextLine], most: int = 400) -> Iterator[Question]:
    text = "\n".join(line.text for line in lines)
    if 0 < len(text) <= most:
        yield Question("text", "Read all the text.", text)


def _named(elements: Sequence[Element]) -> dict[str, list[Element]]:
    """Elements by kind; without kinds of which one shows in part only, as whether it counts is anyone's guess."""
    groups: dict[str, list[Element]] = {}
    for element in elements:
        if element.role not in ("text", "label", "box"):
            groups.setdefault(noun(element), []).append(element)
    return {name: group for name, group in groups.items() if all(element.clear >= 0.5 for element in group)}


def _count(elements: Sequence[Element]) -> Iterator[Question]:
    for name, group in sorted(_named(elements).items()):
        yield Question("count", f'How many elements of kind "{name}" are there?', str(len(group)))


def _list(elements: Sequence[Element], most: int = 12) -> Iterator[Question]:
    for name, group in sorted(_named(elements).items()):
        if 2 <= len(group) <= most and all(0 < len(e.text) <= _LONGEST and not e.cut for e in group):
            yield Question("list", f'List the elements of kind "{name}".', "\n".join(e.text for e in group))


def _state(found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        if element.checked is not None:
            state = "checked" if element.role in ("checkbox", "radio", "switch") else "selected"
            yield Question("state", f"Is {phrase} {state}?", "yes" if element.checked else "no")
        elif element.role == "textbox" and not element.cut:
            yield Question("state", f"What does {phrase} contain?", element.value or "nothing")


def _colour(found: Sequence[Target]) -> Iterator[Question]:
    for phrase, element in found:
        if element.role in ("button", "link", "tab", "text", "heading"):
            name = color_name(element.color)
            if name is not None:
                yield Question("colour", f"What colour is the text of {phrase}?", name)


def _step(view: ImageView, found: Sequence[Target]) -> Iterator[Question]:
    """What one action brings about, said as its aim and not as a click."""
    for phrase, element in found:
        if not element.enabled:
            continue
        click = format_action(Click(*view.to_frame(*element.point)))
        if element.role == "checkbox":
            yield Question("step", f"{'Untick' if element.checked else 'Tick'} {phrase}.", click, element.box)
        elif element.role in ("radio", "tab") and not element.checked:
            yield Question("step", f"Select {phrase}.", click, element.box)
        elif element.role in ("combobox", "link", "menuitem"):
            yield Question("step", f"Open {phrase}.", click, element.box)
        elif element.role == "textbox" and element.focused and not element.value:
            yield Question(
                "step", f'Type "{element.text or "hello"}" into {phrase}.', format_action(Type(element.text or "hello"))
            )
        elif element.role == "textbox":
            yield Question("step", f"Put the cursor into {phrase}.", click, element.box)


def _describe(elements: Sequence[Element]) -> Iterator[Question]:
    """A sentence on what a screen holds: its title, how many controls of each kind, the names of its buttons."""
    counts = Counter(noun(e) for e in elements if e.role not in ("text", "label", "heading", "button"))
    title = next((e.text for e in elements if e.role == "heading" and e.text), "")
    buttons = [e.text for e in elements if e.role == "button" and e.text]
    parts = [f'"{title}"'] if title and len(title) <= _LONGEST else []
    parts += [
        f"{counts[kind]} {kind}{'' if counts[kind] == 1 else 'es' if kind.endswith('x') else 's'}" for kind in counts
    ]
    if buttons:
        parts.append("buttons " + ", ".join(f'"{text}"' for text in buttons[:6]))
    if parts:
        yield Question("describe", "Describe the screen.", "; ".join(parts))
