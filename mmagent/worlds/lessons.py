"""Everything that one rendered page teaches: reading, captions, perception, grounding, referring, single steps.

More than :func:`mmagent.worlds.questions.ask`, which knows elements and lines only: a scene also tells what holds what
and which text shows in part, so that regions are read exactly and elements are meant by their company.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random

from mmagent.actions import Click, format_action
from mmagent.geometry import ImageView
from mmagent.prompts import grounding_text
from mmagent.worlds.elements import Box, Element, TextLine
from mmagent.worlds.languages import NAMES
from mmagent.worlds.pages import PageSource, Scene
from mmagent.worlds.pages.themes import luminance
from mmagent.worlds.questions import WEIGHTS, Question, candidates, noun, pick
from mmagent.worlds.referring import expressions

LESSONS = {**WEIGHTS, "refer": 6.0, "refer_box": 1.5, "perceive": 2.0, "region": 1.5, "page": 0.7, "caption": 0.7}
"""How often each kind is asked of a scene."""
KINDS = {
    "login": "a sign-in form", "form": "a form", "table": "a table", "items": "a list", "cards": "a grid of offers",
    "editor": "a text editor", "dialog": "a dialog over another page", "article": "an article",
    "dashboard": "a dashboard", "settings": "settings", "messages": "a conversation", "keypad": "a pad of keys",
    "results": "search results", "banner": "a page under a cookie notice", "dropdown": "a menu over another page",
    "mail": "an inbox", "calendar": "a calendar", "kanban": "a board of cards", "files": "a file manager",
    "code": "a code editor", "spreadsheet": "a spreadsheet", "wizard": "a form in steps", "log": "a log",
    "analytics": "a line chart", "product": "an offer in a shop", "basket": "a shopping basket",
    "pricing": "plans with prices", "catalogue": "a catalogue with filters", "invoice": "an invoice",
    "seats": "a seat plan", "tracking": "an order on its way", "profile": "a profile", "player": "a music player",
    "weather": "a weather forecast", "launcher": "the home screen of a phone", "gallery": "a picture gallery",
    "feed": "a feed of posts", "city_map": "a map", "drawing": "a drawing program", "quiz": "a quiz",
    "manual": "a manual", "nothing": "an error page",
}  # fmt: skip
"""What each template shows, in words."""
_MOST = 12  # elements of a kind that are all named
_LONGEST = 600  # characters that are read at once


def lessons(
    scene: Scene, source: PageSource, random: Random, count: int, weights: Mapping[str, float] = LESSONS
) -> list[Question]:
    """At most ``count`` questions about a rendered page, of the kinds that ``weights`` name, no two about one place."""
    view = ImageView(scene.size, scene.size)
    known = dict(candidates(scene.size, scene.elements, scene.lines))
    known["text"] = known["page"] = _whole(scene)
    known["region"] = _regions(scene, view)
    known["perceive"] = _perceive(scene, view)
    known["caption"] = _caption(scene, source)
    meant = expressions(scene.elements, scene.groups)
    known["refer"] = iter(
        Question("refer", grounding_text(phrase), format_action(Click(*view.to_frame(*element.point))), element.box)
        for phrase, element in meant
    )
    known["refer_box"] = iter(
        Question("refer_box", f"Where is {phrase}?", frame_box(view, element.box), element.box)
        for phrase, element in meant
    )
    return pick(known, random, count, weights)


def frame_box(view: ImageView, box: Box) -> str:
    """A box as answers write it: ``x1,y1,x2,y2`` in thousandths."""
    return ",".join(map(str, view.box_to_frame(box)))


def _whole(scene: Scene) -> Iterator[Question]:
    """All text, where none of it shows in part only."""
    text = "\n".join(line.text for line in scene.lines)
    if 0 < len(text) <= _LONGEST and not scene.unread:
        yield Question("page", "Read all the text.", text)


def _regions(scene: Scene, view: ImageView) -> Iterator[Question]:
    """What is written within a box that cuts no line: those of groups, and those round neighbouring lines."""
    boxes = [group.box for group in scene.groups]
    for n in range(len(scene.lines)):
        for many in (2, 3, 5):
            some = scene.lines[n : n + many]
            if len(some) == many:
                boxes.append(_round(some, scene.size))
    for box in dict.fromkeys(boxes):
        inside = [line for line in scene.lines if _share(line.box, box) == 1]
        cut = any(0 < _share(line.box, box) < 1 for line in scene.lines) or any(
            _share(b, box) > 0 for b in scene.unread
        )
        text = "\n".join(line.text for line in inside)
        if len(inside) >= 2 and not cut and len(text) <= _LONGEST:
            yield Question("region", f"Read the text in the region {frame_box(view, box)}.", text, box)


def _round(lines: tuple[TextLine, ...], size: tuple[int, int]) -> Box:
    x1, y1 = (min(line.box[side] for line in lines) for side in (0, 1))
    x2, y2 = (max(line.box[side] for line in lines) for side in (2, 3))
    return max(0, x1 - 1), max(0, y1 - 1), min(size[1], x2 + 1), min(size[0], y2 + 1)


def _share(box: Box, region: Box) -> float:
    """Part of ``box`` that lies in ``region``."""
    width = min(box[2], region[2]) - max(box[0], region[0])
    height = min(box[3], region[3]) - max(box[1], region[1])
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def _perceive(scene: Scene, view: ImageView) -> Iterator[Question]:
    """Every element of a kind with its box; kinds of which one shows only in part are not asked for."""
    kinds: dict[str, list[Element]] = {}
    for element in scene.elements:
        if element.role not in ("text", "label", "box"):
            kinds.setdefault(noun(element), []).append(element)
    for kind, same in sorted(kinds.items()):
        if len(same) <= _MOST and all(element.clear >= 0.5 and not element.cut for element in same):
            rows = [f"{frame_box(view, e.box)}{f' {e.text}' if e.text and len(e.text) <= 60 else ''}" for e in same]
            yield Question("perceive", f'Give the box of every element of kind "{kind}".', "\n".join(rows))


def _caption(scene: Scene, source: PageSource) -> Iterator[Question]:
    yield Question("caption", "Describe this page in a sentence or two.", caption(scene, source))


def caption(scene: Scene, source: PageSource) -> str:
    """What a page is, how it looks, its title, and what can be done on it."""
    grounds = Counter(element.background for element in scene.elements if element.role != "button")
    ground = grounds.most_common(1)[0][0] if grounds else "#ffffff"
    look = "dark" if luminance(ground) < 0.2 else "light"
    title = next((e.text for e in scene.elements if e.role == "heading" and 0 < len(e.text) <= 60), "")
    first = f"{KINDS[source.template]} in {look} colours, in {NAMES[source.spoken]}"
    first = first[0].upper() + first[1:] + (f', titled "{title}".' if title else ".")
    counts = Counter(
        noun(e) for e in scene.elements if e.clear >= 0.5 and e.role not in ("text", "label", "heading", "box")
    )
    parts = [_many(count, kind) for kind, count in counts.most_common(4)]
    named = [f'"{e.text}"' for e in scene.elements if e.role == "button" and e.clear >= 0.5 and 0 < len(e.text) <= 24][
        :3
    ]
    if not parts:
        return first
    held = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{first} It shows {held}{'; its buttons say ' + ', '.join(named) if named else ''}."


def _many(count: int, kind: str) -> str:
    ending = "" if count == 1 else "es" if kind.endswith("x") else "s"
    return f"{count} {kind}{ending}"
