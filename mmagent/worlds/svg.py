"""A small part of SVG, drawn by Pillow: enough for figures, and nothing that could reach beyond its own text.

``svg`` (``viewBox``, or ``width`` and ``height``), ``g``, ``rect``, ``circle``, ``ellipse``, ``line``, ``polyline``,
``polygon``, ``path`` (M L H V C Q Z, in both cases; every run is filled by itself) and ``text``; ``fill``, ``stroke``,
``stroke-width``, ``font-size`` and ``text-anchor``, as attributes or in ``style``, inherited from groups; ``transform``
by translate, scale and rotate. Everything else is passed over: there are no entities, links, scripts, style sheets or
images.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import ImageColor

from mmagent.worlds.canvas import Canvas

MOST_ELEMENTS, MOST_POINTS, DEEPEST = 300, 4000, 12
MOST_LETTERS = 20
"""Pictures that all letters of a drawing would fill, as squares of their size: large letters take long to set."""
_NUMBER = re.compile(r"[+-]?(?:\d{1,6}(?:\.\d{0,6})?|\.\d{1,6})", re.ASCII)
_COMMAND = re.compile(r"([MmLlHhVvCcQqZz])|([+-]?(?:\d{1,6}(?:\.\d{0,6})?|\.\d{1,6}))|([^\s,])", re.ASCII)
_TRANSFORM = re.compile(r"(translate|scale|rotate)\s*\(([^()]{0,80})\)", re.ASCII)
_ARGUMENTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "Q": 4, "Z": 0}
_STYLES = ("fill", "stroke", "stroke-width", "font-size", "text-anchor")
_FAR = 20_000.0  # units that a place may be away
Point = tuple[float, float]


class SvgError(ValueError):
    """What is wrong with a drawing, in words."""


@dataclass(frozen=True)
class Matrix:
    """``x' = a x + c y + e``, ``y' = b x + d y + f``."""

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 1.0
    e: float = 0.0
    f: float = 0.0

    def __call__(self, x: float, y: float) -> Point:
        return self.a * x + self.c * y + self.e, self.b * x + self.d * y + self.f

    def then(self, o: Matrix) -> Matrix:
        """First ``o``, then this: the matrix product."""
        return Matrix(
            self.a * o.a + self.c * o.b, self.b * o.a + self.d * o.b, self.a * o.c + self.c * o.d,
            self.b * o.c + self.d * o.d, self.a * o.e + self.c * o.f + self.e, self.b * o.e + self.d * o.f + self.f,
        )  # fmt: skip

    @property
    def size(self) -> float:
        """By how much lengths grow, on the average of both directions."""
        return math.sqrt(abs(self.a * self.d - self.b * self.c))


def draw_svg(text: str, side: int = 224) -> np.ndarray:
    """``(side, side, 3)`` uint8 of a drawing on white, its view box in the middle at the largest scale that fits.

    Raises :class:`SvgError` for what is no SVG, or more than a few hundred elements of it.
    """
    root = _parse(text)
    box = _view_box(root)
    scale = side / max(box[2], box[3])
    shift = ((side - box[2] * scale) / 2 - box[0] * scale, (side - box[3] * scale) / 2 - box[1] * scale)
    canvas = Canvas(side, side)
    place, letters = Matrix(scale, 0.0, 0.0, scale, *shift), 0.0
    for element, matrix, style in _shapes(root, place):
        if element.tag.endswith("text"):
            letters += (_length(style, "font-size", 16.0) * matrix.size) ** 2 * min(len(element.text or ""), 100)
            if letters > MOST_LETTERS * side * side:
                raise SvgError("more letters than the picture could hold")
        _DRAW[element.tag.rpartition("}")[2]](canvas, element, matrix, style)
    return canvas.pixels()


def _parse(text: str) -> ET.Element:
    start, end = text.find("<svg"), text.rfind("</svg>")
    if start < 0 or end < start:
        raise SvgError("no <svg> ... </svg>")
    text = text[start : end + 6]
    if "<!" in text.replace("<!--", ""):
        raise SvgError("a declaration, which may hold entities")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise SvgError(str(error)) from error


def _view_box(root: ET.Element) -> tuple[float, float, float, float]:
    if "viewBox" in root.attrib:
        numbers = [_number(word) for word in root.attrib["viewBox"].replace(",", " ").split()]
        if len(numbers) != 4:
            raise SvgError("a viewBox is four numbers")
        x, y, width, height = numbers
    else:
        x = y = 0.0
        width, height = (_length(root.attrib, name, 100.0) for name in ("width", "height"))
    if not (1 <= width <= _FAR and 1 <= height <= _FAR):
        raise SvgError("a view box of no size")
    return x, y, width, height


def _shapes(root: ET.Element, place: Matrix) -> Iterator[tuple[ET.Element, Matrix, Mapping[str, str]]]:
    """What can be drawn, in order, where and in which style."""
    waiting: list[tuple[ET.Element, Matrix, Mapping[str, str], int]] = [(root, place, {}, 0)]
    seen = 0
    while waiting:
        element, matrix, style, depth = waiting.pop()
        seen += 1
        if seen > MOST_ELEMENTS or depth > DEEPEST:
            raise SvgError(f"more than {MOST_ELEMENTS} elements, or {DEEPEST} deep")
        tag = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
        style = {**style, **_style(element)}
        if depth:
            matrix = matrix.then(_transform(element.get("transform", "")))
        if tag in ("svg", "g"):
            waiting += [(child, matrix, style, depth + 1) for child in reversed(element)]
        elif tag in _DRAW:
            yield element, matrix, style


def _style(element: ET.Element) -> dict[str, str]:
    found = {name: element.attrib[name] for name in _STYLES if name in element.attrib}
    for said in element.get("style", "")[:500].split(";"):
        name, _, value = said.partition(":")
        if name.strip() in _STYLES:
            found[name.strip()] = value.strip()
    return found


def _transform(text: str) -> Matrix:
    matrix = Matrix()
    for name, said in _TRANSFORM.findall(text[:400]):
        v = [_number(word) for word in said.replace(",", " ").split()]
        if name == "translate" and len(v) in (1, 2):
            matrix = matrix.then(Matrix(e=v[0], f=v[1] if len(v) == 2 else 0.0))
        elif name == "scale" and len(v) in (1, 2):
            matrix = matrix.then(Matrix(a=v[0], d=v[-1]))
        elif name == "rotate" and len(v) in (1, 3):
            turn, (x, y) = math.radians(v[0]), v[1:] or (0.0, 0.0)
            turned = Matrix(math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn))
            matrix = matrix.then(Matrix(e=x, f=y)).then(turned).then(Matrix(e=-x, f=-y))
        else:
            raise SvgError(f"{name} of {len(v)} numbers")
    return matrix


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise SvgError(f"{text[:20]!r} is no number")
    return float(text)


def _length(attributes: Mapping[str, str], name: str, default: float = 0.0) -> float:
    return _number(attributes[name].strip().removesuffix("px")) if name in attributes else default


def _colour(style: Mapping[str, str], name: str, default: str) -> tuple[int, ...] | None:
    said = style.get(name, default).strip().lower()[:40]
    if said in ("none", "transparent", ""):
        return None
    try:
        return ImageColor.getrgb(said)[:3]
    except ValueError as error:
        raise SvgError(f"{said!r} is no colour") from error


def _put(canvas: Canvas, points: Sequence[Point], matrix: Matrix, style: Mapping[str, str], closed: bool) -> None:
    """Fill and stroke a run of points."""
    placed = [matrix(x, y) for x, y in points]
    if any(abs(v) > _FAR for point in placed for v in point):
        raise SvgError("a point far beyond the picture")
    fill, stroke = _colour(style, "fill", "black"), _colour(style, "stroke", "none")
    if fill is not None and len(placed) > 2:
        canvas.polygon(placed, fill)
    wide = _length(style, "stroke-width", 1.0) * matrix.size
    if stroke is not None and wide > 0 and len(placed) > 1:
        ring = [*placed, *placed[:2]] if closed and len(placed) > 2 else placed
        canvas.line(ring, min(wide, 400.0), stroke)


def _rect(canvas: Canvas, element: ET.Element, matrix: Matrix, style: Mapping[str, str]) -> None:
    x, y, w, h = (_length(element.attrib, name) for name in ("x", "y", "width", "height"))
    if w > 0 and h > 0:
        _put(canvas, [(x, y), (x + w, y), (x + w, y + h), (x, y + h)], matrix, style, True)


def _round(canvas: Canvas, element: ET.Element, matrix: Matrix, style: Mapping[str, str]) -> None:
    """Circles and ellipses."""
    x, y, r = (_length(element.attrib, name) for name in ("cx", "cy", "r"))
    rx, ry = (_length(element.attrib, name, r) for name in ("rx", "ry"))
    if rx > 0 and ry > 0:
        turns = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        _put(canvas, [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in turns], matrix, style, True)


def _line(canvas: Canvas, element: ET.Element, matrix: Matrix, style: Mapping[str, str]) -> None:
    ends = [_length(element.attrib, name) for name in ("x1", "y1", "x2", "y2")]
    _put(canvas, [(ends[0], ends[1]), (ends[2], ends[3])], matrix, style, False)


def _poly(canvas: Canvas, element: ET.Element, matrix: Matrix, style: Mapping[str, str]) -> None:
    numbers = [_number(word) for word in element.get("points", "").replace(",", " ").split()[: 2 * MOST_POINTS]]
    if len(numbers) % 2:
        raise SvgError("half a point")
    points = list(zip(numbers[::2], numbers[1::2], strict=True))
    if points:
        _put(canvas, points, matrix, style, element.tag.endswith("polygon"))


def _path(canvas: Canvas, element: ET.Element, matrix: Matrix, style: Mapping[str, str]) -> None:
    for points, closed in flatten(element.get("d", "")):
        _put(canvas, points, matrix, style, closed)


def _text(canvas: Canvas, element: ET.Element, matrix: Matrix, style: Mapping[str, str]) -> None:
    x, y = matrix(_length(element.attrib, "x"), _length(element.attrib, "y"))
    size = min(_length(style, "font-size", 16.0) * matrix.size, 300.0)
    anchor = {"middle": "ms", "end": "rs"}.get(style.get("text-anchor", ""), "ls")
    words, fill = " ".join((element.text or "").split())[:100], _colour(style, "fill", "black")
    if words and fill is not None and size >= 2 and max(abs(x), abs(y)) <= _FAR:
        canvas.text(x, y, words, size, fill, anchor, "sans")


_Draw = Callable[[Canvas, ET.Element, Matrix, Mapping[str, str]], None]
_DRAW: dict[str, _Draw] = {
    "rect": _rect, "circle": _round, "ellipse": _round, "line": _line, "polyline": _poly, "polygon": _poly,
    "path": _path, "text": _text,
}  # fmt: skip


def flatten(d: str) -> Iterator[tuple[list[Point], bool]]:
    """The runs of points of a path's ``d``, curves as a dozen chords each, and whether each run is closed."""
    points: list[Point] = []
    at = start = (0.0, 0.0)
    total = 0
    for name, numbers in _commands(d):
        upper, base = name.upper(), (at if name.islower() else (0.0, 0.0))
        if upper == "Z":
            if points:
                yield points, True
            points, at = [], start
            continue
        if upper == "M":
            if len(points) > 1:
                yield points, False
            points = []
        ends = _ends(upper, numbers, base, at)
        fresh = [ends[-1]] if len(ends) == 1 else [_bezier([at, *ends], t) for t in np.linspace(0, 1, 13)[1:]]
        points = points or ([] if upper == "M" else [at])
        points += fresh
        total += len(fresh)
        if total > MOST_POINTS:
            raise SvgError(f"more than {MOST_POINTS} points")
        at = ends[-1]
        start = at if upper == "M" else start
    if len(points) > 1:
        yield points, False


def _ends(upper: str, numbers: Sequence[float], base: Point, at: Point) -> list[Point]:
    """The points that a command names, absolute; of a curve its controls and its end."""
    if upper == "H":
        return [(numbers[0] + base[0], at[1])]
    if upper == "V":
        return [(at[0], numbers[0] + base[1])]
    return [(x + base[0], y + base[1]) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def _commands(d: str) -> Iterator[tuple[str, list[float]]]:
    """Each command with the numbers of one use; what follows without a letter repeats it."""
    name, numbers = "", list[float]()
    for letter, number, odd in _COMMAND.findall(d):
        if odd or (not letter and not name):
            raise SvgError(f"{odd or number!r} in a path")
        if letter:
            if numbers:
                raise SvgError(f"too few numbers for {name}")
            name = letter
            if letter in "Zz":
                yield letter, []
            continue
        numbers.append(float(number))
        wanted = _ARGUMENTS[name.upper()]
        if wanted and len(numbers) == wanted:
            yield name, numbers
            numbers = []
            name = {"M": "L", "m": "l"}.get(name, name)
        elif not wanted:
            raise SvgError("a number behind Z")
    if numbers:
        raise SvgError(f"too few numbers for {name}")


def _bezier(points: Sequence[Point], t: float) -> Point:
    """De Casteljau."""
    while len(points) > 1:
        points = [(a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t) for a, b in pairwise(points)]
    return points[0]


def likeness(truth: np.ndarray, said: np.ndarray) -> float:
    """How much of what a picture differs from the best plain sheet another one has, in [0, 1]: 1 for the same, 0 for
    any sheet of one colour, or worse; the mean of all pixels' and of blocks of four by four, which forgive a pixel."""
    values = []
    for step in (1, 4):
        one, other = (_blocks(picture, step) for picture in (truth, said))
        sheet = np.median(one.reshape(-1, 3), axis=0)
        most = float(np.abs(one - sheet).sum())
        values.append(1.0 - float(np.abs(one - other).sum()) / most if most else float((one == other).all()))
    return max(sum(values) / len(values), 0.0)


def _blocks(picture: np.ndarray, step: int) -> np.ndarray:
    height, width = picture.shape[0] // step * step, picture.shape[1] // step * step
    blocks = picture[:height, :width].reshape(height // step, step, width // step, step, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float32)
