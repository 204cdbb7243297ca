"""Plane geometry: labelled figures, drawn to scale, with an angle, a length or an area to be worked out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, grainy, grounds
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.examples import Idea, Seeded

SIDE = 252
"""Pixels of a figure on a side."""
_TRIPLES = ((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29), (9, 40, 41), (12, 35, 37))
_NUMBER = "Answer with a number."
Point = tuple[float, float]


@dataclass(frozen=True)
class Angle:
    """At ``at``, between the rays to ``one`` and ``other``, with ``text`` beside it; a square where there is none."""

    one: str
    at: str
    other: str
    text: str = ""


@dataclass(frozen=True)
class Figure:
    """``points`` by name, y upwards; ``paths`` of names that lines join, ``dashed`` ones among them; ``sides``: texts
    beside the segment of two names; ``circle``: the centre's name and its radius; ``filled``: names of a polygon."""

    points: Mapping[str, Point]
    paths: tuple[str, ...]
    sides: tuple[tuple[str, str], ...] = ()
    angles: tuple[Angle, ...] = ()
    dashed: tuple[str, ...] = ()
    ticked: tuple[str, ...] = ()
    circle: tuple[str, float] | None = None
    filled: str = ""


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("geometry/angle", "geometry", 4, _of(_ANGLES, "degrees"), grading.number),
        Seeded("geometry/length", "geometry", 4, _of(_LENGTHS, ""), grading.number),
        Seeded("geometry/area", "geometry", 4, _of(_AREAS, ""), grading.number),
    )


Problem = tuple[Figure, str, int, str]
"""A figure, what is asked, the answer and the steps to it."""
Draw = Callable[[int, int], int]


def _of(levels: Sequence[Sequence[Callable[[Draw], Problem | None]]], unit: str) -> Callable:
    def think(random: np.random.Generator, level: int) -> Idea | None:
        kind = levels[level][int(random.integers(len(levels[level])))]
        tries = (kind(lambda low, high: int(random.integers(low, high))) for _ in range(200))
        made = next((problem for problem in tries if problem is not None), None)  # kinds that often fail stay as many
        if made is None:
            return None
        figure, question, answer, steps = made
        asked = f"{question} {_NUMBER.removesuffix('.')}{' of ' + unit if unit else ''}."
        return Idea(asked, str(answer), figure, lambda looks: paint_figure(figure, looks), reasoning=steps)

    return think


# ---------------------------------------------------------------------------------------------- drawing


def paint_figure(figure: Figure, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Its picture, turned by any angle, ``(252, 252, 3)`` uint8."""
    ground, ink = grounds(random)
    colour = COLOURS["blue"] if sum(ground) > 384 else COLOURS["yellow"]
    paint = (ink, colour)[int(random.integers(2))]
    canvas = Canvas(SIDE, SIDE, ground)
    placed = _placed(figure, float(random.uniform(0, 2 * math.pi)), bool(random.integers(2)))
    centre = tuple(np.mean([placed[name] for name in figure.points], axis=0))
    if figure.filled:
        tint = [round(0.75 * g + 0.25 * c) for g, c in zip(ground, COLOURS["green"], strict=True)]
        canvas.polygon([placed[name] for name in figure.filled], tint)
    if figure.circle:
        name, radius = figure.circle
        (x, y), scale = placed[name], _scale(figure, placed)
        canvas.disc(x, y, radius * scale, None, paint, 1.8)
        canvas.disc(x, y, 2.2, paint)
    for path in figure.paths:
        canvas.line([placed[name] for name in path], 1.8, paint)
    for path in figure.dashed:
        canvas.dashes([placed[name] for name in path], 1.2, paint)
    for one, other in figure.ticked:
        _tick(canvas, placed[one], placed[other], paint)
    for angle in figure.angles:
        _draw_angle(canvas, angle, placed, ink, paint)
    for (one, other), text in figure.sides:
        x, y = _beside(placed[one], placed[other], centre, 13)
        canvas.text(x, y, text, 13, ink, "mm")
    for name in figure.points:
        (x, y), away = placed[name], _away(figure, placed, name)
        canvas.text(x + 11 * away[0], y + 11 * away[1], name, 13, ink, "mm", "bold")
    return (grainy(canvas.pixels(), random),)


def _placed(figure: Figure, turn: float, mirrored: bool) -> dict[str, Point]:
    """Names to pixels: turned, scaled to fill the paper, y downwards."""
    cos, sin = math.cos(turn), math.sin(turn)
    turned = {}
    for name, (x, y) in figure.points.items():
        x = -x if mirrored else x
        turned[name] = (x * cos - y * sin, -(x * sin + y * cos))
    spots = list(turned.values())
    if figure.circle:
        (x, y), r = turned[figure.circle[0]], figure.circle[1]
        spots += [(x - r, y - r), (x + r, y + r)]
    low, high = np.min(spots, axis=0), np.max(spots, axis=0)
    scale = (SIDE - 64) / max(float((high - low).max()), 1e-9)
    shift = (SIDE - (high + low) * scale) / 2
    return {name: (x * scale + float(shift[0]), y * scale + float(shift[1])) for name, (x, y) in turned.items()}


def _scale(figure: Figure, placed: Mapping[str, Point]) -> float:
    """Pixels for a unit of the figure."""
    one, other = list(figure.points)[:2]
    return math.dist(placed[one], placed[other]) / math.dist(figure.points[one], figure.points[other])


def _unit(x: float, y: float) -> Point:
    length = math.hypot(x, y) or 1.0
    return x / length, y / length


def _away(figure: Figure, placed: Mapping[str, Point], name: str) -> Point:
    """Where there is room for a point's name: away from all the lines that leave it."""
    x, y = placed[name]
    rays = [
        _unit(placed[other][0] - x, placed[other][1] - y)
        for path in (*figure.paths, *figure.dashed)
        for one, two in pairwise(path)
        for other in ((two,) if one == name else (one,) if two == name else ())
    ]
    turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    nearest = [max((math.cos(a) * rx + math.sin(a) * ry for rx, ry in rays), default=-1.0) for a in turns]
    best = float(turns[int(np.argmin(nearest))])
    return math.cos(best), math.sin(best)


def _beside(one: Point, other: Point, centre: Sequence[float], far: float) -> Point:
    """The middle of a segment, moved off it and away from the figure's centre."""
    x, y = (one[0] + other[0]) / 2, (one[1] + other[1]) / 2
    across = _unit(one[1] - other[1], other[0] - one[0])
    side = 1 if (x - centre[0]) * across[0] + (y - centre[1]) * across[1] >= 0 else -1
    return x + side * far * across[0], y + side * far * across[1]


def _tick(canvas: Canvas, one: Point, other: Point, paint: Sequence[int]) -> None:
    x, y = (one[0] + other[0]) / 2, (one[1] + other[1]) / 2
    across = _unit(one[1] - other[1], other[0] - one[0])
    canvas.line([(x - 5 * across[0], y - 5 * across[1]), (x + 5 * across[0], y + 5 * across[1])], 1.8, paint)


def _draw_angle(
    canvas: Canvas, angle: Angle, placed: Mapping[str, Point], ink: Sequence[int], paint: Sequence[int]
) -> None:
    x, y = placed[angle.at]
    rays = [_unit(placed[name][0] - x, placed[name][1] - y) for name in (angle.one, angle.other)]
    middle = _unit(rays[0][0] + rays[1][0], rays[0][1] + rays[1][1])
    if not angle.text:
        (a, b), (c, d) = rays
        canvas.line(
            [(x + 12 * a, y + 12 * b), (x + 12 * (a + c), y + 12 * (b + d)), (x + 12 * c, y + 12 * d)], 1.2, paint
        )
        return
    first, last = (math.degrees(math.atan2(ry, rx)) % 360 for rx, ry in rays)
    if (last - first) % 360 > 180:
        first, last = last, first
    canvas.arc(x, y, 20, first, first + (last - first) % 360, 1.2, paint)
    width = (last - first) % 360
    far = 34 if width > 60 else 40 if width > 40 else 48
    canvas.text(x + far * middle[0], y + far * middle[1], angle.text, 12, ink, "mm")


# ---------------------------------------------------------------------------------------------- angles


def _triangle(a: float, b: float, side: float = 10.0) -> dict[str, Point]:
    """A, B, C with the angles ``a`` at A and ``b`` at B in degrees and AB of this length."""
    height = side / (1 / math.tan(math.radians(a)) + 1 / math.tan(math.radians(b)))
    return {"A": (0.0, 0.0), "B": (side, 0.0), "C": (height / math.tan(math.radians(a)), height)}


def _third_angle(draw: Draw) -> Problem | None:
    a, b = draw(30, 100), draw(30, 100)
    c = 180 - a - b
    if c < 28:
        return None
    figure = Figure(_triangle(a, b), ("ABCA",), angles=(Angle("C", "A", "B", f"{a}°"), Angle("A", "B", "C", f"{b}°")))
    return figure, "How large is the angle at C?", c, f"180 - {a} - {b} = {c}."


def _isosceles(draw: Draw) -> Problem | None:
    base = draw(35, 76)
    top = 180 - 2 * base
    figure = Figure(_triangle(base, base), ("ABCA",), ticked=("AC", "BC"), angles=(Angle("C", "A", "B", f"{base}°"),))
    if draw(0, 2):
        return (
            figure,
            "How large is the angle at C?",
            top,
            f"Both angles at the base are {base}: 180 - 2 x {base} = {top}.",
        )
    figure = Figure(_triangle(base, base), ("ABCA",), ticked=("AC", "BC"), angles=(Angle("A", "C", "B", f"{top}°"),))
    return figure, "How large is the angle at A?", base, f"(180 - {top}) / 2 = {base}."


def _right(draw: Draw) -> Problem | None:
    a = draw(30, 61)
    angles = (Angle("A", "C", "B"), Angle("C", "A", "B", f"{a}°"))
    figure = Figure(_triangle(a, 90 - a), ("ABCA",), angles=angles)
    return figure, "How large is the angle at B?", 90 - a, f"The angle at C is right: 90 - {a} = {90 - a}."


def _four(draw: Draw) -> Problem | None:
    """A quadrilateral of two triangles on one base, as any angles will have it."""
    points = {"A": (0.0, 0.0), "B": (draw(8, 12) * 1.0, -draw(0, 4) * 1.0)}
    points |= {"C": (draw(9, 13) * 1.0, draw(6, 10) * 1.0), "D": (draw(-2, 4) * 1.0, draw(6, 10) * 1.0)}
    names = "ABCD"
    exact = [_angle_at(points, names[n - 1], names[n], names[(n + 1) % 4]) for n in range(4)]
    whole = [round(angle) for angle in exact]
    if sum(whole) != 360 or min(whole) < 35 or max(whole) > 150:
        return None
    known = tuple(Angle(names[n - 1], names[n], names[(n + 1) % 4], f"{whole[n]}°") for n in range(3))
    steps = f"360 - {whole[0]} - {whole[1]} - {whole[2]} = {whole[3]}."
    return Figure(points, ("ABCDA",), angles=known), "How large is the angle at D?", whole[3], steps


def _angle_at(points: Mapping[str, Point], one: str, at: str, other: str) -> float:
    (ax, ay), (x, y), (bx, by) = points[one], points[at], points[other]
    cos = ((ax - x) * (bx - x) + (ay - y) * (by - y)) / (math.dist((ax, ay), (x, y)) * math.dist((bx, by), (x, y)))
    return math.degrees(math.acos(cos))


def _exterior(draw: Draw) -> Problem | None:
    """AB runs on to D; the angle CBD is outside."""
    a, b = draw(35, 80), draw(50, 111)
    c = 180 - a - b
    if c < 30:
        return None
    points = _triangle(a, b) | {"D": (15.0, 0.0)}
    outer = 180 - b
    angles = (Angle("C", "A", "B", f"{a}°"), Angle("C", "B", "D", f"{outer}°"))
    figure = Figure(points, ("ACBA", "BD"), angles=angles)
    steps = f"The outer angle is the sum of the two far ones: {outer} - {a} = {c}."
    return figure, "How large is the angle ACB?", c, steps


def _crossing(draw: Draw) -> Problem | None:
    """AB and CD are parallel; EF cuts them at P and Q."""
    a = draw(40, 141)
    if 80 < a < 100:
        return None
    lean = 4 / math.tan(math.radians(a))
    points = {
        "P": (lean, 4.0), "Q": (-lean, -4.0), "A": (lean - 7, 4.0), "B": (lean + 7, 4.0), "C": (-lean - 7, -4.0),
        "D": (-lean + 7, -4.0), "E": (lean * 1.9, 7.6), "F": (-lean * 1.9, -7.6),
    }  # fmt: skip
    figure = Figure(points, ("APB", "CQD", "EPQF"), angles=(Angle("B", "P", "E", f"{a}°"),))
    kind = draw(0, 3)
    asked = (("DQP", a, "corresponding angles are equal"), ("CQP", 180 - a, f"180 - {a} = {180 - a}"))
    asked += (("CQF", a, "it is the alternate of that at P"),)
    name, answer, why = asked[kind]
    return figure, f"AB is parallel to CD. How large is the angle {name}?", answer, f"{why}: {answer}."


def _bisected(draw: Draw) -> Problem | None:
    """AD halves the angle at A; what is the angle ADB?"""
    half, b = draw(15, 36), draw(35, 91)
    a = 2 * half
    answer = 180 - half - b
    if 180 - a - b < 30:
        return None
    points = _triangle(a, b)
    foot = 10 * math.sin(math.radians(b)) / math.sin(math.radians(answer))
    points |= {"D": (foot * math.cos(math.radians(half)), foot * math.sin(math.radians(half)))}
    figure = Figure(points, ("ABCA", "AD"), angles=(Angle("A", "B", "C", f"{b}°"),))
    question = f"AD halves the angle BAC, which is {a} degrees. How large is the angle ADB?"
    return figure, question, answer, f"BAD is {half}: 180 - {half} - {b} = {answer}."


_ANGLES = ((_third_angle,), (_third_angle, _isosceles, _right), (_four, _exterior), (_crossing, _bisected, _exterior))


# ---------------------------------------------------------------------------------------------- lengths and areas


def _rectangle(draw: Draw, unlike: bool = True) -> tuple[dict[str, Point], int, int]:
    wide, tall = draw(4, 20), draw(3, 15)
    if unlike and wide == tall:
        wide += 1
    if max(wide, tall) > 3 * min(wide, tall):  # nobody likes a ribbon
        wide = 2 * tall if wide > tall else wide
        tall = 2 * wide if tall > 3 * wide else tall
    corners = {"A": (0.0, 0.0), "B": (float(wide), 0.0), "C": (float(wide), float(tall)), "D": (0.0, float(tall))}
    return corners, wide, tall


def _rights(names: str) -> tuple[Angle, ...]:
    """Square marks at every corner of a polygon."""
    return tuple(Angle(names[n - 1], names[n], names[(n + 1) % len(names)]) for n in range(len(names)))


def _perimeter(draw: Draw) -> Problem | None:
    if draw(0, 2):
        points, wide, tall = _rectangle(draw)
        figure = Figure(points, ("ABCDA",), (("AB", str(wide)), ("BC", str(tall))), _rights("ABCD"))
        answer = 2 * (wide + tall)
        return figure, "What is the perimeter of the rectangle?", answer, f"2 x ({wide} + {tall}) = {answer}."
    a, b, c = draw(5, 20), draw(5, 20), draw(5, 20)
    if 2 * max(a, b, c) >= (a + b + c) - 2:
        return None
    x = (a * a + b * b - c * c) / (2 * a)
    points = {"A": (0.0, 0.0), "B": (float(a), 0.0), "C": (x, math.sqrt(b * b - x * x))}
    if min(_angle_at(points, *names) for names in ("CAB", "ABC", "BCA")) < 28:
        return None
    figure = Figure(points, ("ABCA",), (("AB", str(a)), ("AC", str(b)), ("BC", str(c))))
    return figure, "What is the perimeter of the triangle?", a + b + c, f"{a} + {b} + {c} = {a + b + c}."


def _triple(draw: Draw) -> tuple[int, int, int]:
    a, b, c = _TRIPLES[draw(0, len(_TRIPLES))]
    times = draw(1, max(90 // c, 2))
    return (a * times, b * times, c * times) if draw(0, 2) else (b * times, a * times, c * times)


def _pythagoras(draw: Draw) -> Problem | None:
    a, b, c = _triple(draw)
    if min(a, b) / max(a, b) < 0.4:
        return None
    points = {"C": (0.0, 0.0), "A": (float(b), 0.0), "B": (0.0, float(a))}
    corner = (Angle("A", "C", "B"),)
    if draw(0, 2):
        figure = Figure(points, ("ABCA",), (("CB", str(a)), ("CA", str(b))), corner)
        return figure, "How long is AB?", c, f"{a}² + {b}² = {a * a + b * b} = {c}²."
    figure = Figure(points, ("ABCA",), (("CB", str(a)), ("AB", str(c))), corner)
    return figure, "How long is CA?", b, f"{c}² - {a}² = {c * c - a * a} = {b}²."


def _similar(draw: Draw) -> Problem | None:
    """D on AB, E on AC, DE parallel to BC."""
    near, far, short = draw(2, 9), draw(2, 9), draw(2, 10)
    if (short * (near + far)) % near or not 0.3 < near / (near + far) < 0.75:
        return None
    base = short * (near + far) // near
    whole = near + far
    apex = (draw(-2, 8) * base / 6, 0.0)
    height = math.sqrt(max(whole * whole - apex[0] ** 2, 0.0))
    if height < 0.5 * base or height > 2 * base:
        return None
    points = {"A": (apex[0], height), "B": (0.0, 0.0), "C": (float(base), 0.0)}
    share = near / whole
    points["D"] = (apex[0] * (1 - share), height * (1 - share))
    points["E"] = (apex[0] + (base - apex[0]) * share, height * (1 - share))
    sides = (("AD", str(near)), ("DB", str(far)), ("DE", str(short)))
    figure = Figure(points, ("ADBCEA", "DE"), sides)
    steps = f"BC : DE = AB : AD = {whole} : {near}, so BC = {short} x {whole} / {near} = {base}."
    return figure, "DE is parallel to BC. How long is BC?", base, steps


def _diagonal(draw: Draw) -> Problem | None:
    a, b, c = _triple(draw)
    if min(a, b) / max(a, b) < 0.4:
        return None
    points = {"A": (0.0, 0.0), "B": (float(a), 0.0), "C": (float(a), float(b)), "D": (0.0, float(b))}
    figure = Figure(points, ("ABCDA", "AC"), (("AB", str(a)), ("AC", str(c))), (Angle("A", "B", "C"),))
    answer = 2 * (a + b)
    steps = f"BC² = {c}² - {a}² = {b}²; 2 x ({a} + {b}) = {answer}."
    return figure, "ABCD is a rectangle. What is its perimeter?", answer, steps


def _rectangle_area(draw: Draw) -> Problem | None:
    points, wide, tall = _rectangle(draw)
    figure = Figure(points, ("ABCDA",), (("AB", str(wide)), ("BC", str(tall))), _rights("ABCD"), filled="ABCD")
    return figure, "What is the area of the rectangle?", wide * tall, f"{wide} x {tall} = {wide * tall}."


def _triangle_area(draw: Draw) -> Problem | None:
    base, tall, foot = draw(6, 21), draw(5, 16), draw(1, 20)
    if base * tall % 2 or not 0.25 * base < foot < 0.75 * base or not 0.4 < tall / base < 2:
        return None
    points = {"A": (0.0, 0.0), "B": (float(base), 0.0), "C": (float(foot), float(tall)), "D": (float(foot), 0.0)}
    figure = Figure(points, ("ADBCA",), (("CD", str(tall)),), (Angle("B", "D", "C"),), dashed=("CD",), filled="ABC")
    area = base * tall // 2
    return figure, f"AB is {base} long. What is the area of ABC?", area, f"{base} x {tall} / 2 = {area}."


def _trapezoid(draw: Draw) -> Problem | None:
    low, high, tall, shift = draw(8, 20), draw(4, 15), draw(4, 13), draw(1, 6)
    if (low + high) * tall % 2 or not low - high >= 3 or shift + high > low:
        return None
    points = {
        "A": (0.0, 0.0),
        "B": (float(low), 0.0),
        "C": (float(shift + high), float(tall)),
        "D": (float(shift), float(tall)),
    }
    points["E"] = (float(shift), 0.0)
    sides = (("AB", str(low)), ("CD", str(high)), ("DE", str(tall)))
    figure = Figure(points, ("AEBCDA",), sides, (Angle("B", "E", "D"),), dashed=("DE",), filled="ABCD")
    area = (low + high) * tall // 2
    question = "AB is parallel to CD. What is the area of ABCD?"
    return figure, question, area, f"({low} + {high}) / 2 x {tall} = {area}."


def _disc_area(draw: Draw) -> Problem | None:
    radius = draw(2, 15)
    points = {"M": (0.0, 0.0), "A": (float(radius), 0.0)}
    figure = Figure(points, ("MA",), (("MA", str(radius)),), circle=("M", float(radius)))
    question = "The area of the circle around M is k times pi. What is k?"
    return figure, question, radius * radius, f"{radius}² = {radius * radius}."


def _bent(draw: Draw) -> Problem | None:
    """An L: a rectangle without a corner."""
    wide, tall, in_wide, in_tall = draw(8, 18), draw(7, 15), draw(3, 9), draw(3, 8)
    if not (0.3 * wide < in_wide < 0.7 * wide and 0.3 * tall < in_tall < 0.7 * tall):
        return None
    x, y = float(wide - in_wide), float(tall - in_tall)
    points = {
        "A": (0.0, 0.0), "B": (float(wide), 0.0), "C": (float(wide), y), "D": (x, y), "E": (x, float(tall)),
        "F": (0.0, float(tall)),
    }  # fmt: skip
    sides = (("AB", str(wide)), ("AF", str(tall)), ("CD", str(in_wide)), ("DE", str(in_tall)))
    marks = tuple(mark for mark in _rights("ABCDEF") if mark.at != "D")
    figure = Figure(points, ("ABCDEFA",), sides, marks, filled="ABCDEF")
    area = wide * tall - in_wide * in_tall
    return figure, "What is the area of the figure?", area, f"{wide} x {tall} - {in_wide} x {in_tall} = {area}."


def _cut(draw: Draw) -> Problem | None:
    """A rectangle without the triangle over its base."""
    points, wide, tall = _rectangle(draw)
    foot = draw(1, 20)
    if not 0.25 * wide < foot < 0.75 * wide or wide * tall % 2:
        return None
    points["E"] = (float(foot), float(tall))
    sides = (("AB", str(wide)), ("BC", str(tall)))
    figure = Figure(points, ("ABCEDA", "AE", "BE"), sides, _rights("ABCD"), filled="ABE")
    area = wide * tall // 2
    question = "ABCD is a rectangle. What is the area of the triangle ABE?"
    return figure, question, area, f"Its base is {wide} and its height {tall}: {wide} x {tall} / 2 = {area}."


def _right_area(draw: Draw) -> Problem | None:
    a, b, c = _triple(draw)
    if min(a, b) / max(a, b) < 0.4:
        return None
    points = {"C": (0.0, 0.0), "A": (float(b), 0.0), "B": (0.0, float(a))}
    figure = Figure(points, ("ABCA",), (("CB", str(a)), ("AB", str(c))), (Angle("A", "C", "B"),), filled="ABC")
    area = a * b // 2
    return figure, "What is the area of the triangle?", area, f"CA² = {c}² - {a}² = {b}²; {a} x {b} / 2 = {area}."


_LENGTHS = ((_perimeter,), (_pythagoras,), (_pythagoras, _similar), (_similar, _diagonal))
_AREAS = (
    (_rectangle_area,),
    (_rectangle_area, _triangle_area, _disc_area),
    (_trapezoid, _bent),
    (_cut, _right_area, _bent),
)
