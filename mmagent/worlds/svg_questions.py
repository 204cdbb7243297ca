"""Drawings as SVG: writing down what a picture shows, telling from the text what it draws, and which text drew it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmagent.chat import Image, Text
from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.passages import pick
from mmagent.worlds.svg import SvgError, draw_svg, likeness

SIDE = 224
COLOURS = {
    "red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "gold": (255, 215, 0), "purple": (128, 0, 128),
    "orange": (255, 165, 0), "teal": (0, 128, 128), "black": (0, 0, 0), "pink": (255, 192, 203),
}  # fmt: skip
"""Of CSS, which SVG takes; a person tells them apart."""
_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">'
_LEVELS = 4


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("svg/code", "svg-drawing", _LEVELS, _code, _judge_code),
        Seeded("svg/question", "svg", 3, _question, grading.word),
        Seeded("svg/choice", "svg", 3, _choice, grading.word),
    )


def draw_lines(random: np.random.Generator, level: int, count: int | None = None) -> list[str]:
    """Elements of a drawing of 100 by 100 units, back to front. Level 0 has rectangles and circles, 1 ellipses and
    polygons as well, 2 strokes and curves, 3 turned groups and words."""
    count = int(random.integers(*((1, 3), (3, 6), (3, 7), (4, 8))[level])) if count is None else count
    kinds = [_rect, _circle, _ellipse, _polygon, _stroked, _curve, _turned, _word][: (2, 4, 6, 8)[level]]
    colours = pick(random, list(COLOURS), min(count, len(COLOURS)))
    return [kinds[int(random.integers(len(kinds)))](random, colours[n % len(colours)]) for n in range(count)]


def svg_of(lines: Sequence[str]) -> str:
    return "\n".join([_HEAD, *lines, "</svg>"])


def _draw(random: np.random.Generator, low: int, high: int) -> int:
    return int(random.integers(low, high))


def _rect(random: np.random.Generator, colour: str) -> str:
    w, h = _draw(random, 12, 50), _draw(random, 12, 50)
    x, y = _draw(random, 2, 98 - w), _draw(random, 2, 98 - h)
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{colour}"/>'


def _circle(random: np.random.Generator, colour: str) -> str:
    r = _draw(random, 6, 26)
    return f'<circle cx="{_draw(random, r + 1, 99 - r)}" cy="{_draw(random, r + 1, 99 - r)}" r="{r}" fill="{colour}"/>'


def _ellipse(random: np.random.Generator, colour: str) -> str:
    rx, ry = _draw(random, 8, 30), _draw(random, 6, 20)
    x, y = _draw(random, rx + 1, 99 - rx), _draw(random, ry + 1, 99 - ry)
    return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" fill="{colour}"/>'


def _polygon(random: np.random.Generator, colour: str) -> str:
    x, y, r = _draw(random, 24, 76), _draw(random, 24, 76), _draw(random, 12, 23)
    corners, turn = _draw(random, 3, 7), float(random.uniform(0, 6.28))
    points = [
        f"{round(x + r * np.cos(turn + 6.2832 * n / corners))},{round(y + r * np.sin(turn + 6.2832 * n / corners))}"
        for n in range(corners)
    ]
    return f'<polygon points="{" ".join(points)}" fill="{colour}"/>'


def _stroked(random: np.random.Generator, colour: str) -> str:
    wide = _draw(random, 2, 6)
    if random.random() < 0.5:
        ends = [_draw(random, 6, 95) for _ in range(4)]
        where = " ".join(f'{name}="{v}"' for name, v in zip(("x1", "y1", "x2", "y2"), ends, strict=True))
        return f'<line {where} stroke="{colour}" stroke-width="{wide}"/>'
    r = _draw(random, 8, 28)
    x, y = _draw(random, r + 4, 96 - r), _draw(random, r + 4, 96 - r)
    return f'<circle cx="{x}" cy="{y}" r="{r}" fill="none" stroke="{colour}" stroke-width="{wide}"/>'


def _curve(random: np.random.Generator, colour: str) -> str:
    a, b, c, d, e, f = (_draw(random, 6, 95) for _ in range(6))
    if random.random() < 0.5:
        wide = _draw(random, 2, 6)
        return f'<path d="M {a} {b} Q {c} {d} {e} {f}" fill="none" stroke="{colour}" stroke-width="{wide}"/>'
    return f'<path d="M {a} {b} Q {c} {d} {e} {f} Z" fill="{colour}"/>'


def _turned(random: np.random.Generator, colour: str) -> str:
    w, h, turn = _draw(random, 16, 40), _draw(random, 8, 24), 15 * _draw(random, 1, 12)
    x, y = _draw(random, 30, 71), _draw(random, 30, 71)
    box = f'<rect x="{-(w // 2)}" y="{-(h // 2)}" width="{w}" height="{h}" fill="{colour}"/>'
    return f'<g transform="translate({x} {y}) rotate({turn})">{box}</g>'


def _word(random: np.random.Generator, colour: str) -> str:
    word = ("go", "stop", "new", "SVG", "hello", "exit", "42")[_draw(random, 0, 7)]
    size, x, y = _draw(random, 14, 24), _draw(random, 4, 50), _draw(random, 24, 96)
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}">{word}</text>'


def _plain_enough(lines: Sequence[str]) -> bool:
    """Whether every element shows: half of what it covers, and a hundredth of the picture."""
    sheet = np.full((56, 56, 3), 255, dtype=np.int16)
    whole = draw_svg(svg_of(lines), 56).astype(np.int16)
    for n, line in enumerate(lines):
        alone = _differing(draw_svg(svg_of([line]), 56), sheet)
        shown = _differing(draw_svg(svg_of([*lines[:n], *lines[n + 1 :]]), 56), whole)
        if shown < max(0.012, 0.5 * alone):
            return False
    return True


def _differing(one: np.ndarray, other: np.ndarray) -> float:
    """The share of pixels that a person sees to be different."""
    return float((np.abs(other - one).max(axis=2) > 40).mean())


def _code(random: np.random.Generator, level: int) -> Idea | None:
    lines = draw_lines(random, level)
    if not _plain_enough(lines):
        return None
    svg = svg_of(lines)
    allowed = "rect, circle, ellipse, line, polygon, path, text and g"
    question = f"Write this picture as SVG with a viewBox of 0 0 100 100, from {allowed}."
    return Idea(question, svg, None, lambda _: (draw_svg(svg, SIDE),))


def _judge_code(example: Example, answer: str) -> Score:
    """What is drawn counts, not how it is said."""
    try:
        drawn = draw_svg(grading.unfenced(answer), SIDE)
    except SvgError:
        return grading.wrong("malformed")
    alike = likeness(example.images[0], drawn)
    return Score(alike, {"likeness": alike, "right": float(alike > 0.95)})


def _question(random: np.random.Generator, level: int) -> Idea | None:
    """From the text alone: how many there are, how large one is, what lies on top at a point."""
    lines = draw_lines(random, 1, int(random.integers(*((2, 4), (3, 6), (5, 8))[level])))
    svg = svg_of(lines)
    tags = Counter(line[1:].split()[0] for line in lines)
    tag = pick(random, sorted(tags), 1)[0]
    asked = [
        (f"How many elements of kind {tag} are there? Answer with a number.", str(tags[tag])),
        ("Which colour is drawn last? Answer with one word.", _fill(lines[-1])),
    ]
    if level >= 1:
        picture = draw_svg(svg, 200)
        spots = [(_draw(random, 8, 92), _draw(random, 8, 92)) for _ in range(12)]
        plain = [(x, y, colour) for x, y in spots if (colour := _colour_at(picture, x, y)) is not None]
        painted = [spot for spot in plain if spot[2] != "white"]
        if not painted:
            return None
        x, y, colour = painted[0] if random.random() < 0.8 else plain[0]
        question = (
            f"The ground is white. Which colour does the picture show at the point {x},{y}? Answer with one word."
        )
        asked = [*asked[:1], (question, colour), (question, colour)]
    question, answer = asked[int(random.integers(len(asked)))]
    return Idea(f"{svg}\n{question}", answer)


def _fill(line: str) -> str:
    return line.partition('fill="')[2].partition('"')[0]


def _colour_at(picture: np.ndarray, x: int, y: int) -> str | None:
    """The name of the one colour within three units of a point, at two pixels a unit."""
    around = picture[2 * y - 6 : 2 * y + 7, 2 * x - 6 : 2 * x + 7].reshape(-1, 3)
    if (around != around[0]).any():
        return None
    named = {paint: name for name, paint in {**COLOURS, "white": (255, 255, 255)}.items()}
    return named[tuple(int(v) for v in around[0])]


def _choice(random: np.random.Generator, level: int) -> Idea | None:
    """A picture and three texts, two of which differ from the third in a colour, a place or an order. Any of them is
    the picture's: were it always the third, the texts alone would tell which one the others have most of."""
    lines = draw_lines(random, (0, 1, 2)[level], 2 + level)
    options = [svg_of(lines)]
    pictures = [draw_svg(options[0], 112).astype(np.int16)]
    for _ in range(20):
        other = list(lines)
        n = _draw(random, 0, len(other))
        if random.random() < 0.3:
            other[n] = draw_lines(random, (0, 1, 2)[level], 1)[0]
        elif random.random() < 0.5:
            old = next(name for name in COLOURS if f'"{name}"' in other[n])
            new = pick(random, [name for name in COLOURS if name != old], 1)[0]
            other[n] = other[n].replace(f'"{old}"', f'"{new}"')
        else:
            other = pick(random, other, len(other))
        picture = draw_svg(svg_of(other), 112).astype(np.int16)
        if min((np.abs(picture - known).max(axis=2) > 60).mean() for known in pictures) > 0.01:
            options, pictures = [*options, svg_of(other)], [*pictures, picture]
        if len(options) == 3:
            break
    else:
        return None
    order = [int(n) for n in random.permutation(3)]
    told = "\n".join(f"{letter}:\n{options[n]}" for letter, n in zip("ABC", order, strict=True))
    prompt = (Image(), Text(f"Which text draws this picture?\n{told}\nAnswer with A, B or C."))
    drawn = _draw(random, 0, 3)
    right = options[drawn]
    return Idea(prompt, "ABC"[order.index(drawn)], None, lambda _: (draw_svg(right, SIDE),))
