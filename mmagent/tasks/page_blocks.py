"""The text blocks of a rendered page, as Design2Code finds them (Si et al. 2024, ``metrics/ocr_free_utils.py``).

A page is rendered three times: as it is, and twice with transparent grounds and a colour of its own for every element
that may hold text, the second time with all colours shifted by 50. Pixels that follow the shift are text, and their
colour says whose. Pages are read by BeautifulSoup's ``html.parser``, as there, so that the same text nodes are found in
markup that is broken, too. What differs is only how it is computed: all colours in one pass over the text's pixels.

Where the published code would stop with an exception (a style that does not parse, more elements than colours), a style
counts as none and :class:`TooManyElements` is raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageColor

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

HOW_TO_INSTALL = "Design2Code reads pages with beautifulsoup4, as its authors do: pip install -e '.[evals]'"
TEXT_TAGS = (
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "div", "span", "a", "b", "li", "table", "td", "th", "button", "footer",
    "header", "figcaption",
)  # fmt: skip
LOWEST, STEP, LEVELS, SHIFT = 10, 16, 16, 50
NEAR_SHIFT, NEAR_COLOUR = 8, 4
CHUNK, REPEATS, ALIKE = 100, 5, 0.8
MOST_EQUAL = 50
MOST_WORK = 10_000_000
"""Of pairs of equal letters in the chunks that are compared: some seconds."""
MOST_TAGS, DEEPEST = 20_000, 1000
_TAG = re.compile("<(/?)([a-zA-Z]+)")
_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)
Colour = tuple[float, float, float]
Box = tuple[float, float, float, float]


class TooManyElements(ValueError):
    """More elements that may hold text than there are colours (4,096): no blocks can be told apart."""


class TooMuchWork(ValueError):
    """A page whose comparison would take minutes."""


@dataclass(frozen=True)
class Block:
    """``text`` in lower case; ``box`` (left, top, width, height) as shares of the picture; the mean ``colour`` of its
    pixels, 0 to 255."""

    text: str
    box: Box
    colour: Colour


@dataclass(frozen=True)
class Coloured:
    """What is rendered to find blocks: ``first`` and ``second`` are HTML; ``nodes`` are texts with the colour
    (``#rrggbb``, or what the page says) that they have in the first."""

    first: str
    second: str
    nodes: tuple[tuple[str, str], ...]


def read_html(html: str) -> BeautifulSoup:
    """``ImportError`` says what to install."""
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ImportError(HOW_TO_INSTALL) from error
    return BeautifulSoup(html.replace("\r\n", "\n").replace("\r", "\n"), "html.parser")


# ---------------------------------------------------------------------------------------------- what is rendered


def coloured(html: str) -> Coloured:
    """Raises :class:`TooManyElements`."""
    soup = read_html(html)
    for element in soup.find_all(True):
        _set_style(element, "background-color", "rgba(255, 255, 255, 0.0)")
    tags = soup.find_all(list(TEXT_TAGS))
    if len(tags) > LEVELS**3:
        raise TooManyElements(f"{len(tags)} elements that may hold text; {LEVELS**3} can be told apart")
    before = [tag["style"] for tag in tags]
    pages = []
    for shift in (0, SHIFT):
        for number, tag in enumerate(tags):
            tag["style"] = before[number]
            _set_style(tag, "color", f"#{_colour(number, shift)}")
            _set_style(tag, "opacity", "1.0")
        pages.append(str(soup))
    first, second = pages
    return Coloured(first, second, tuple(_text_nodes(read_html(first))))


def _colour(number: int, shift: int) -> str:
    """The last of the grid comes first."""
    index = LEVELS**3 - 1 - number
    levels = (index // LEVELS**2, index // LEVELS % LEVELS, index % LEVELS)
    return "".join(f"{(LOWEST + STEP * level + shift) % 256:02X}" for level in levels)


def _set_style(element: Tag, name: str, value: str) -> None:
    styles = str(element.attrs.get("style") or "").split(";")
    kept = [style for style in styles if not style.strip().startswith(name) and style.strip()]
    element["style"] = "; ".join([*kept, f"{name}: {value} !important"]).strip()


def _text_nodes(soup: BeautifulSoup) -> Iterator[tuple[str, str]]:
    """Texts of the body in order, each with the colour that the nearest element above it names."""
    from bs4 import Comment, NavigableString

    body = soup.body
    waiting: list[tuple[object, str]] = [] if body is None else [(body, "#000000")]
    while waiting:
        node, colour = waiting.pop()
        if isinstance(node, Comment):
            continue
        if isinstance(node, NavigableString):
            if text := node.strip():
                yield text, colour
            continue
        inner = _named_colour(node) or colour
        waiting += [(child, inner) for child in reversed(node.contents)]


def _named_colour(tag: Tag) -> str | None:
    """The colour that an element's own style names last, in the reading of the published code."""
    styles = [s for s in str(tag.attrs.get("style") or "").split(";") if "color" in s and "background-color" not in s]
    if not styles or ":" not in styles[-1]:
        return None
    name = styles[-1].split(":")[1].strip().replace(" !important", "")
    if name[:1] == "#":
        return name
    try:
        paint = tuple(map(int, name[4:-1].split(","))) if name.startswith("rgb") else ImageColor.getrgb(name)
        return "#{:02x}{:02x}{:02x}".format(*paint)
    except (ValueError, IndexError):
        return None


# ---------------------------------------------------------------------------------------------- what is found


def find_blocks(
    nodes: Sequence[tuple[str, str]], first: np.ndarray, second: np.ndarray, plain: np.ndarray
) -> list[Block]:
    """The blocks of ``nodes`` in the pictures ``(height, width, 3)`` of :class:`Coloured` and of the page as it is.

    None where the two coloured ones differ in size, or the plain one is too small to hold what was found.
    """
    if first.shape != second.shape:
        return []
    text = np.ones(first.shape[:2], dtype=bool)
    for channel in range(3):
        expected = first[..., channel] + np.uint8(SHIFT)  # modulo 256
        seen = second[..., channel]
        text &= np.where(expected > seen, expected - seen, seen - expected) <= NEAR_SHIFT
    rows, columns = np.nonzero(text)
    if rows.size == 0 or rows.max() >= plain.shape[0] or columns.max() >= plain.shape[1]:
        return []
    pixels = _Pixels(rows, columns, first[rows, columns], plain[rows, columns], first.shape[:2])
    found = ((words, pixels.of(name)) for words, name in nodes)
    return [Block(words.lower(), *seen) for words, seen in found if seen is not None]


class _Pixels:
    """The pixels of all text, sorted by the colour of the grid that they are near."""

    def __init__(
        self, rows: np.ndarray, columns: np.ndarray, paint: np.ndarray, plain: np.ndarray, size: tuple[int, int]
    ):
        self.rows, self.columns, self.paint, self.plain, self.size = rows, columns, paint, plain, size
        above = paint.astype(np.int16) - (LOWEST - NEAR_COLOUR)
        level, rest = above // STEP, above % STEP
        near = ((level >= 0) & (level < LEVELS) & (rest <= 2 * NEAR_COLOUR)).all(axis=1)
        code = np.where(near, (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2], -1)
        self.order = np.argsort(code, kind="stable")
        self.sorted = code[self.order]
        self.known: dict[str, tuple[Box, Colour] | None] = {}

    def of(self, name: str) -> tuple[Box, Colour] | None:
        """Box and mean colour of the pixels near a colour, or None where there are none."""
        if name not in self.known:
            chosen = self._near(name)
            self.known[name] = None if chosen is None or chosen.size == 0 else self._measure(chosen)
        return self.known[name]

    def _near(self, name: str) -> np.ndarray | None:
        digits = name.lstrip("#")
        try:
            paint = [int(digits[n : n + 2], 16) for n in (0, 2, 4)]
        except ValueError:
            return None
        if min(paint) < 0 or max(paint) > 255:
            return None
        if all((value - LOWEST) % STEP == 0 and value >= LOWEST for value in paint):
            r, g, b = ((value - LOWEST) // STEP for value in paint)
            code = (r * LEVELS + g) * LEVELS + b
            start, end = np.searchsorted(self.sorted, [code, code + 1])
            return self.order[start:end]
        low, high = (np.array([(value + d) % 256 for value in paint]) for d in (-NEAR_COLOUR, NEAR_COLOUR))
        return np.nonzero(((self.paint >= low) & (self.paint <= high)).all(axis=1))[0]

    def _measure(self, chosen: np.ndarray) -> tuple[Box, Colour]:
        rows, columns = self.rows[chosen], self.columns[chosen]
        top, left, bottom, right = int(rows.min()), int(columns.min()), int(rows.max()), int(columns.max())
        height, width = self.size
        box = (left / width, top / height, (right - left + 1) / width, (bottom - top + 1) / height)
        r, g, b = (int(v) for v in self.plain[chosen].mean(axis=0, dtype=np.float64))
        return box, (r, g, b)


# ---------------------------------------------------------------------------------------------- cleaning


def cleaned(html: str) -> str:
    """What is judged of an answer: cut where it begins to repeat itself, made a document, rid of elements that occur
    more than fifty times.

    Linear in time but for the comparison of its chunks, most of which their letters tell apart; :class:`TooMuchWork`
    where thousands are left, and for tens of thousands of tags."""
    html = html.replace("\r\n", "\n").replace("\r", "\n")
    if html.count("<") > MOST_TAGS:
        raise TooMuchWork(f"{html.count('<')} tags, at most {MOST_TAGS} are read")
    if _depth(html) > DEEPEST:  # which takes the parser quadratic time
        raise TooMuchWork(f"elements in more than {DEEPEST} others")
    html = html[: _repetition(html)]
    start = re.search("<html", html, re.IGNORECASE)
    if start is None or html.rfind(">") < start.end():
        html = f"<html><body><p>{html}</p></body></html>"
    return _without_repeats(read_html(html))


def _depth(html: str) -> int:
    """How many elements stand in one another at most, by their tags alone."""
    depth = deepest = 0
    for end, name in _TAG.findall(html):
        if name.lower() not in _VOID:
            depth = max(0, depth - 1) if end else depth + 1
            deepest = max(deepest, depth)
    return deepest


def _repetition(html: str) -> int:
    """Where the text without tags begins to say the same for the fifth time, as a place in ``html``; its length where
    it does not. The published code compares a place in the one text with a length of the other; so does this."""
    bare = _without_tags(html)
    chunks = [bare[start : start + CHUNK] for start in range(0, len(bare), CHUNK)]
    seen: list[tuple[str, list[int]]] = []
    counts = np.zeros((len(chunks), 128), dtype=np.int16)
    places: list[int] | None = None
    start, left = len(bare), MOST_WORK
    for number, chunk in enumerate(chunks):
        own = np.bincount(np.frombuffer(chunk.encode("utf-32-le", "surrogatepass"), np.uint32) % 128, minlength=128)
        shared = np.minimum(counts[: len(seen)], own.astype(np.int16)).sum(axis=1)  # no ratio can be above its share
        lengths = np.array([len(other) for other, _ in seen], dtype=np.int64) + len(chunk)
        likely = np.nonzero(2 * shared >= ALIKE * lengths - 1e-6)[0] if seen else ()
        match = None
        for n in likely:
            left -= 0 if chunk == seen[n][0] else int(counts[n] @ own)
            if left < 0:
                raise TooMuchWork("thousands of passages that are nearly alike")
            if _ratio(chunk, seen[n][0]) >= ALIKE:
                match = n
                break
        if match is None:
            counts[len(seen)] = own
            seen.append((chunk, [number]))
            continue
        numbers = seen[match][1]
        numbers.append(number)
        if len(numbers) >= REPEATS:
            places = places or _places(bare, html)
            clean = min(start, numbers[0] * CHUNK)
            start = min(start, places[clean] if clean < len(places) else len(html))
    return len(html) if start == len(bare) else start


def _ratio(one: str, other: str) -> float:
    from difflib import SequenceMatcher

    if one == other:
        return 1.0
    matcher = SequenceMatcher(None, one, other)
    return matcher.ratio() if matcher.quick_ratio() >= ALIKE else 0.0


def _without_tags(html: str) -> str:
    """As ``re.sub("<.*?>", "", html)``, which takes quadratic time where many tags begin and none ends."""
    kept = []
    for line in html.split("\n"):
        parts, at = [], 0
        while (begin := line.find("<", at)) >= 0 and (end := line.find(">", begin)) >= 0:
            parts.append(line[at:begin])
            at = end + 1
        kept.append("".join([*parts, line[at:]]))
    return "\n".join(kept)


def _places(bare: str, html: str) -> list[int]:
    """For each character of the text without tags, the first place not before its predecessor's that holds it."""
    places, at = [], 0
    for character in bare:
        at = html.index(character, at)
        places.append(at)
    return places


def _without_repeats(soup: BeautifulSoup) -> str:
    """``soup`` written, without the elements that are written like fifty before them. Elements are numbered by what
    they say, from the innermost: writing each one down, as published, takes quadratic time in their depth."""
    from bs4 import Tag

    numbers: dict[object, int] = {}
    spoken: dict[int, int] = {}
    sizes: dict[int, int] = {}
    elements = soup.find_all(True)
    for element in reversed(elements):  # children come behind their parents
        content: list[object] = []
        sizes[id(element)] = 1 + sum(sizes[id(child)] for child in element.contents if isinstance(child, Tag))
        for child in element.contents:
            if isinstance(child, Tag):
                content.append(spoken[id(child)])
            elif content and isinstance(content[-1], str):
                content[-1] += child.output_ready()
            else:
                content.append(child.output_ready())
        attributes = tuple((name, repr(value)) for name, value in sorted(element.attrs.items()))
        key = (element.name, element.prefix, attributes, tuple(content))
        spoken[id(element)] = numbers.setdefault(key, len(numbers))
    counts = dict.fromkeys(numbers.values(), 0)
    at = 0
    while at < len(elements):
        number = spoken[id(elements[at])]
        counts[number] += 1
        if counts[number] <= MOST_EQUAL:
            at += 1
            continue
        inside = sizes[id(elements[at])]  # which stand next in the list, and go with it
        elements[at].decompose()
        at += inside
    return str(soup)
