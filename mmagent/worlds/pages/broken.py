"""Pages that are badly made: one flaw in one named place of a sound page, seen to be there, with the way back.

A flaw is a style that is written into one start tag, so the sound page is the repair. The browser is asked before and
after: a flaw that does not show, or that the page had already, is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from random import Random

from mmagent.browser import Page
from mmagent.worlds.elements import Box, Element
from mmagent.worlds.pages import PageSource, Scene, render
from mmagent.worlds.pages.themes import contrast
from mmagent.worlds.questions import Target, noun, targets

FLAWS = ("overlap", "contrast", "alignment", "cut", "spacing", "size", "edge")
"""What can be wrong with a page."""
_OWN_TEXT = ("button", "link", "text", "heading", "label", "tab", "cell", "columnheader", "menuitem")
_TRIES = 6  # places of a page that invite a flaw and are tried for it
_LEAST_CONTRAST = 1.6
_LEAST_SHOWN = 0.25  # of a text that is looked at: half of it may lie beyond the edge
_SHIFTS = {"column": (9, 18), "edge": (9, 18), "row": (6, 10)}  # pixels, by what the place is in line with


@dataclass(frozen=True)
class Broken:
    """``html`` shows ``scene``; ``flaw`` is one of :data:`FLAWS`, ``says`` tells it in a sentence, ``box`` is where.
    ``sound`` is the page as it should be, and ``source`` how it was made."""

    source: PageSource
    sound: Scene
    html: str
    scene: Scene
    flaw: str
    says: str
    box: Box


class _Tags(HTMLParser):
    """Start tags in order, with the place in the text where each one's name ends."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=False)
        self.found: list[tuple[str, int]] = []
        self._starts = [0]
        for line in html.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("html", "head", "body", "style", "script"):
            row, column = self.getpos()
            self.found.append((tag, self._starts[row - 1] + column + 1 + len(tag)))

    handle_startendtag = handle_starttag


def styled(html: str, number: int, style: str) -> str:
    """``html`` with ``style`` added to its start tag ``number``, after what stands there already.

    Raises ``ValueError`` when there is no such tag.
    """
    tags = _Tags(html).found
    if not 0 <= number < len(tags):
        raise ValueError(f"there is no start tag {number}; the page has {len(tags)}")
    _, at = tags[number]
    end = html.index(">", at)
    inside = html[at:end]
    if ' style="' in inside:
        place = at + inside.index(' style="') + len(' style="')
        close = html.index('"', place)
        return f"{html[:close]};{style}{html[close:]}"
    return f'{html[:at]} style="{style}"{html[at:]}'


def _script() -> str:
    source = Path(__file__).with_name("broken.js").read_text(encoding="utf-8")
    return source[source.index("\nplaces =>") :].strip()


async def own_flaws(page: Page, scene: Scene) -> list[str]:
    """Flaws that a page has by itself, by the measures that prove a made one: kinds of :data:`FLAWS`, each once.

    ``page`` shows ``scene``. Texts that lie over one another, have next to no contrast, are cut off other than by the
    screen's lower border, or reach beyond its right one. What is out of line, out of size or too close is so only
    against a page that is sound, and no template makes it.
    """
    texts = [e for e in scene.elements if e.role in _OWN_TEXT and e.text and e.shown >= _LEAST_SHOWN]
    places = (await page.evaluate(_script(), [[*e.point, e.tag] for e in texts], isolated=True))["places"]
    seen = {facts["number"] for facts in places if facts is not None}
    height = scene.size[0]
    found = set()
    for element, facts in zip(texts, places, strict=True):
        if contrast(element.color, element.background) < _LEAST_CONTRAST:
            found.add("contrast")
        if element.cut and element.box[3] < height - 1:
            found.add("cut")
        if facts is not None and facts["room"] < -8:
            found.add("edge")
        if facts is not None and seen & set(facts["under"]):
            found.add("overlap")
    return sorted(found)


async def break_page(
    page: Page, source: PageSource, random: Random, flaw: str | None = None, sound: Scene | None = None
) -> Broken | None:
    """``source`` with a flaw (drawn from the seeded generator when None), or None where it offers no place for one.

    Every place that can be named is asked what it offers first, and only those that invite the flaw are tried.
    ``sound``: the scene of ``source``, where ``page`` shows it already. Raises ``ValueError`` for an unknown flaw, and
    what the page raises.
    """
    if flaw is not None and flaw not in FLAWS:
        raise ValueError(f"flaw {flaw!r} is none of {', '.join(FLAWS)}")
    if sound is None:
        sound = await render(page, source.html, source.width, source.height, trusted=True)
    named = [t for t in targets(sound.elements, 0.9) if t.element.role in _OWN_TEXT and t.element.text]
    random.shuffle(named)
    found = await page.evaluate(_script(), [[*t.element.point, t.element.tag] for t in named], isolated=True)
    if found["tags"] != [tag for tag, _ in _Tags(source.html).found]:
        return None
    kinds = random.sample(FLAWS, len(FLAWS)) if flaw is None else [flaw]
    for kind in kinds:
        tries = 0
        for target, facts in zip(named, found["places"], strict=True):
            style = None if facts is None else _style(kind, facts, target.element, random)
            if style is None:
                continue
            broken = await _tried(page, source, sound, target, kind, facts, style)
            tries += 1
            if broken is not None:
                return broken
            if tries == _TRIES:
                break
    return None


async def _tried(
    page: Page, source: PageSource, sound: Scene, target: Target, flaw: str, facts: dict, style: str
) -> Broken | None:
    """``source`` with ``style`` where ``flaw`` wants it, None where that does not show the flaw."""
    number = facts["holder"] if flaw == "spacing" else facts["number"]
    gap = flaw == "spacing" and facts["spacer"] >= 0
    html = styled(source.html, facts["spacer"] if gap else number, style)
    scene = await render(page, html, source.width, source.height, trusted=True)
    after = (await page.evaluate(_script(), [[-1, number]], isolated=True))["places"][0]
    says = _shown(flaw, facts, after, target, sound, scene)
    if says is None or (scene.image == sound.image).all():
        return None
    x1, y1, x2, y2 = after["box"]
    box = (max(0, x1), max(0, y1), min(source.width, x2), min(source.height, y2))
    if box[2] - box[0] < 4 or box[3] - box[1] < 4:
        return None
    right = facts["box"][2] if flaw == "cut" else box[2]  # what is cut off stood beside the letters that are left
    there = slice(box[1], box[3]), slice(box[0], max(box[2], right))
    if flaw != "spacing" and (scene.image[there] == sound.image[there]).all():
        return None  # what was moved is hidden by a box around it; where a gap closes, only its neighbours move
    return Broken(source, sound, html, scene, flaw, says, box)


def _style(flaw: str, facts: dict, element: Element, random: Random) -> str | None:
    """The style that should bring the flaw about, None where the place does not invite it."""
    wide = facts["ink"][2] - facts["ink"][0]
    match flaw:
        case "overlap":
            other = facts["above"]
            lift = None if other is None else element.box[1] - other["box"][1] - random.randint(0, 3)
            return f"position:relative;top:{-lift}px" if lift and lift > 6 else None
        case "contrast" if contrast(element.color, element.background) > 3:
            return f"color:{_near(element.background, random)}"
        case "alignment":
            way = _neighbours(facts)
            if way is None:
                return None
            return f"position:relative;{'top' if way == 'row' else 'left'}:{random.randint(*_SHIFTS[way])}px"
        case "cut" if wide > 24 and _one_line(facts):
            kept = round(wide * random.uniform(0.4, 0.6)) + (facts["ink"][0] - facts["box"][0])
            rules = f"display:inline-block;box-sizing:border-box;width:{kept}px;min-width:0;overflow:hidden"
            return f"{rules};white-space:nowrap;text-overflow:clip;flex:none"
        case "spacing" if facts["spacer"] >= 0:
            return "gap:0"
        case "spacing" if facts["holder"] >= 0:
            return f"margin-top:{-facts['above_margin']:g}px"
        case "size" if facts["alike"] >= 2:
            return f"font-size:{round(facts['size'] * random.choice((0.55, 1.8)))}px"
        case "edge" if facts["room"] < 400 and wide > 24:
            return f"position:relative;left:{facts['room'] + round(wide * random.uniform(0.3, 0.6))}px"
        case _:
            return None


def _neighbours(facts: dict) -> str | None:
    """What a place is in line with: two or more of its kind in a column or a row, three or more texts of any kind at
    their left edge."""
    known = (("column", 2), ("row", 2), ("edge", 3))
    return next((way for way, least in known if facts[way] >= least), None)


def _one_line(facts: dict) -> bool:
    return facts["ink"][3] - facts["ink"][1] < 2.2 * facts["size"]


def _near(color: str, random: Random) -> str:
    """A colour that hardly differs."""
    parts = [int(color[n : n + 2], 16) for n in (1, 3, 5)]
    step = random.randint(14, 26)
    moved = [part - step if sum(parts) > 380 else part + step for part in parts]
    return "#" + "".join(f"{min(max(part, 0), 255):02x}" for part in moved)


def _shown(flaw: str, before: dict, after: dict, target: Target, sound: Scene, scene: Scene) -> str | None:
    """The flaw in words, None where the browser does not see it."""
    phrase, element = target
    name = f"{phrase[0].upper()}{phrase[1:]}"
    now = [e for e in scene.elements if (noun(e), e.text) == (noun(element), element.text)]
    match flaw:
        case "overlap":
            other = before["above"]
            if _common(after["ink"], other["box"]) < 0.3 or _common(before["ink"], other["box"]) > 0:
                return None
            return f'{name} overlaps the text "{other["text"]}".'
        case "contrast" if len(now) == 1 and contrast(now[0].color, now[0].background) < _LEAST_CONTRAST:
            return f"The text of {phrase} has too little contrast to its ground."
        case "alignment" if after[_neighbours(before)] == 0:
            return f"{name} is not in line with its neighbours."
        case "cut" if _written(element, sound) and not _written(element, scene):
            return f"The text of {phrase} is cut off."
        case "spacing" if after["gap" if before["spacer"] >= 0 else "lift"] in (-1, 0, 1):
            held = phrase if before["holder"] == before["number"] else f"what holds {phrase}"
            other = "its neighbours" if before["spacer"] >= 0 else "what stands above"
            return f"There is no space between {held} and {other}."
        case "size" if after["alike"] == 0 and abs(after["size"] / before["size"] - 1) > 0.3:
            return (
                f"{name} is much {'larger' if after['size'] > before['size'] else 'smaller'} than others of its kind."
            )
        case "edge" if after["room"] < -8 and before["room"] >= 0:
            return f"{name} reaches beyond the right edge of the page."
    return None


def _written(element: Element, scene: Scene) -> bool:
    """Whether its text stands there in whole lines."""
    return any(element.text in line.text for line in scene.lines)


def _common(one: Box, other: Box) -> float:
    """Shared area of two boxes, relative to the smaller."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(0, width) * max(0, height) / max(1, min(areas))


def repair_request(html: str) -> str:
    """What is asked for when a page is to be mended."""
    return f"This page has a flaw in its look. Its HTML:\n{html}\nWrite the HTML without the flaw."
