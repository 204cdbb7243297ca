"""Questions about plots: values, comparisons, courses, series, and the whole as a table or in a little language."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, grainy, grounds, palette
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.plots import HEIGHT, WIDTH, Plot, apart, draw_plot, fields_of, paint_plot, to_json
from mmagent.worlds.table_text import read_markdown, rows_of, table_score, to_markdown
from mmagent.worlds.things import places

_LEVELS = 4
_ORDINALS = ("", "second ", "third ")
_COURSES = ("rising", "falling", "rising, then falling", "falling, then rising")
_AXES = ("bar", "barh", "line")
_NUMBER = "Answer with a number."


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("charts/value", "chart-qa", _LEVELS, _value, grading.number),
        Seeded("charts/compare", "chart-qa", _LEVELS, _compare, grading.word),
        Seeded("charts/calculate", "chart-qa", _LEVELS, _calculate, grading.number),
        Seeded("charts/trend", "chart-qa", 3, _trend, grading.word),
        Seeded("charts/series", "chart-qa", 3, _series, grading.word),
        Seeded("charts/scatter", "chart-qa", 3, _scatter, grading.word),
        Seeded("charts/table", "chart-qa", _LEVELS, _table, _judge_table),
        Seeded("charts/code", "chart-to-code", _LEVELS, _code, _judge_code),
    )


def _asked(plot: Plot, question: str, answer: str, reasoning: str = "") -> Idea:
    return Idea(question, answer, plot, lambda random: paint_plot(plot, random), reasoning=reasoning)


def _exactness(plot: Plot) -> str:
    """What the picture must be read to, said aloud: so a reading has one right answer."""
    return "" if plot.printed else f" All values are multiples of {plot.unit}."


def _one(random: np.random.Generator, plot: Plot) -> tuple[int, int, str]:
    """The numbers of a series and of a name, and how they are called."""
    s, n = int(random.integers(len(plot.series))), int(random.integers(len(plot.names)))
    return s, n, _called(plot, s, n)


def _called(plot: Plot, s: int, n: int) -> str:
    return plot.names[n] if len(plot.series) == 1 else f"{plot.series[s]} at {plot.names[n]}"


def _value(random: np.random.Generator, level: int) -> Idea | None:
    plot = draw_plot(random, level, ("bar", "barh", "line", "pie") if level == 0 else _AXES)
    s, n, called = _one(random, plot)
    what = "percentage" if plot.kind == "pie" else "value"
    return _asked(plot, f"What is the {what} of {called}?{_exactness(plot)} {_NUMBER}", str(plot.values[s][n]))


def _compare(random: np.random.Generator, level: int) -> Idea | None:
    plot = draw_plot(random, level)
    s = int(random.integers(len(plot.series)))
    values = plot.values[s]
    place, most = int(random.integers(0, 1 + (level > 0) + (level > 1))), bool(random.integers(2))
    ordered = sorted(values, reverse=most)
    if len(values) <= place + 1 or len(set(ordered[: place + 2])) < place + 2:
        return None  # a tie above it would leave open what "third" means
    which = f"{_ORDINALS[place]}{'highest' if most else 'lowest'}"
    of = f" {plot.series[s]}" if len(plot.series) > 1 else " value"
    question = f"Which of {', '.join(sorted(plot.names))} has the {which}{of}? Answer with its name."
    read = ", ".join(f"{name} {value}" for name, value in zip(plot.names, values, strict=True))
    return _asked(plot, question, plot.names[values.index(ordered[place])], f"I read {read}.")


def _calculate(random: np.random.Generator, level: int) -> Idea | None:
    plot = draw_plot(random, level, _AXES)
    s, one, first = _one(random, plot)
    other = (one + 1 + int(random.integers(len(plot.names) - 1))) % len(plot.names)
    a, b, second = plot.values[s][one], plot.values[s][other], _called(plot, s, other)
    values = plot.values[s]
    whose = f" of {plot.series[s]}" if len(plot.series) > 1 else ""
    asked = [
        (f"What do {first} and {second} add up to?", a + b, f"{a} + {b} = {a + b}."),
        (f"How much higher is {first} than {second}? It may be negative.", a - b, f"{a} - {b} = {a - b}."),
        (f"What is the sum of all values{whose}?", sum(values), f"{' + '.join(map(str, values))} = {sum(values)}."),
    ]
    question, answer, reasoning = asked[int(random.integers(len(asked)))]
    return _asked(plot, f"{question}{_exactness(plot)} {_NUMBER}", str(answer), reasoning)


def _trend(random: np.random.Generator, level: int) -> Idea | None:
    """How a series runs, named by its legend; never two alike steps after another."""
    plot = draw_plot(random, level + 1, ("bar", "line"))
    course, s = int(random.integers(len(_COURSES))), int(random.integers(len(plot.series)))
    count = len(plot.names)
    most = plot.top // plot.unit
    if most <= count + 1:
        return None
    drawn = np.sort(random.choice(np.arange(1, most), count, replace=False)) * plot.unit
    turn = int(random.integers(1, count - 1)) if course >= 2 else 0
    if course == 0:
        values = drawn
    elif course == 1:
        values = drawn[::-1]
    else:  # the greatest in the middle, or turned over
        left = np.sort(random.permutation(drawn[:-1])[:turn])
        rest = np.array(sorted(set(drawn[:-1]) - set(left), reverse=True), dtype=drawn.dtype)
        values = np.concatenate([left, drawn[-1:], rest])
        values = values if course == 2 else plot.top - values
    new = tuple(int(v) for v in values)
    assert all(a != b for a, b in pairwise(new))
    rows = tuple(new if n == s else row for n, row in enumerate(plot.values))
    if not apart(rows):
        return None
    plot = replace(plot, values=rows)
    what = f"the values of {plot.series[s]}" if len(plot.series) > 1 else "the values"
    options = "; ".join(_COURSES)
    question = f"From the first to the last, {what} are: {options}. Answer with the one that fits."
    return _asked(plot, question, _COURSES[course], f"I read {', '.join(map(str, new))}.")


def _series(random: np.random.Generator, level: int) -> Idea | None:
    plot = draw_plot(random, (0, 2, 3)[level], ("pie",) if level == 0 else _AXES)
    if plot.kind == "pie":
        n = int(random.integers(len(plot.names)))
        asked = [
            ("How many slices has the pie? Answer with a number.", str(len(plot.names))),
            (f"Which colour has the slice {plot.names[n]}? Answer with one word.", plot.colours[n]),
            (f"What does the {plot.colours[n]} slice stand for? Answer with its name.", plot.names[n]),
        ]
    else:
        s, n, _ = _one(random, plot)
        here = [row[n] for row in plot.values]
        asked = [
            ("How many series are shown? Answer with a number.", str(len(plot.series))),
            (f"Which colour has {plot.series[s]}? Answer with one word.", plot.colours[s]),
            (f"Which series is {plot.colours[s]}? Answer with its name.", plot.series[s]),
        ]
        if here.count(max(here)) == 1:
            best = plot.series[here.index(max(here))]
            asked.append((f"Which series is highest at {plot.names[n]}? Answer with its name.", best))
    question, answer = asked[int(random.integers(len(asked)))]
    return _asked(plot, question, answer)


def _scatter(random: np.random.Generator, level: int) -> Idea | None:
    """Dots of one or more groups: how many of a colour, which group has most, how height goes with breadth."""
    names = palette(random, (1, 2, 3)[level])
    counts = [int(n) for n in random.integers(4, 12, len(names))]
    kind = int(random.integers(3 if level else 2))
    slopes = ["rises", "falls", "does neither"]
    slope = int(random.integers(3))
    if kind == 0:  # along a line, or over a whole square
        dots = _cloud(random, slope, counts)
    else:
        dots = places(random, [5] * sum(counts), (HEIGHT - 60, WIDTH - 60), 1.3)
    if dots is None:
        return None
    if kind == 0:
        question = "From left to right the cloud of all points: rises; falls; does neither. Which one fits?"
        answer = slopes[slope]
    elif kind == 1:
        n = int(random.integers(len(names)))
        question, answer = f"How many {names[n]} points are there? Answer with a number.", str(counts[n])
    else:
        if counts.count(max(counts)) > 1:
            return None
        question, answer = "Which colour do most points have? Answer with one word.", names[counts.index(max(counts))]
    colours = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        ground, ink = grounds(looks, dark=0.0)
        canvas = Canvas(HEIGHT, WIDTH, ground)
        for n in range(5):
            x, y = 40 + n * (WIDTH - 60) / 4.5, HEIGHT - 30 - n * (HEIGHT - 60) / 4.5
            canvas.text(x, HEIGHT - 24, str(n * 10), 11, ink, "ma")
            canvas.text(34, y, str(n * 10), 11, ink, "rm")
        canvas.line([(40, 14), (40, HEIGHT - 30), (WIDTH - 10, HEIGHT - 30)], 1.2, ink)
        for (x, y), colour in zip(dots, colours, strict=True):
            canvas.disc(x + 45, y + 20, 5, COLOURS[colour], ink, 0.8)
        return (grainy(canvas.pixels(), looks),)

    return Idea(question, answer, (tuple(dots), tuple(colours)), paint)


def _cloud(random: np.random.Generator, slope: int, counts: Sequence[int]) -> list[tuple[int, int]] | None:
    """Dots whose correlation says plainly what they do: beyond 0.85 either way, or within 0.25 of none."""
    height, width = HEIGHT - 70, WIDTH - 80
    total = sum(counts)
    x = np.sort(random.uniform(10, width, total))
    if slope == 2:
        y = random.uniform(10, height, total)
    else:
        y = height * (x / width) * 0.85 + random.normal(0, 12, total) + 15
        y = height - y if slope == 0 else y
    r = float(np.corrcoef(x, -y)[0, 1])
    plain = abs(r) < 0.25 if slope == 2 else (r > 0.85 if slope == 0 else r < -0.85)
    dots = [(int(a), int(np.clip(b, 6, height))) for a, b in zip(x, y, strict=True)]
    apart = all(math.dist(a, b) >= 6 for n, a in enumerate(dots) for b in dots[:n])
    order = random.permutation(total)
    return [dots[int(n)] for n in order] if plain and apart else None


def _table(random: np.random.Generator, level: int) -> Idea | None:
    plot = draw_plot(random, level, ("bar", "barh", "line", "pie") if level == 0 else _AXES)
    head = ["", *(plot.series if len(plot.series) > 1 else ["value"])]
    body = [[name, *(str(row[n]) for row in plot.values)] for n, name in enumerate(plot.names)]
    question = (
        f"Write the data as a table in Markdown: a row for each of the {len(plot.names)} names, in their order, and "
        f'{"a column for each series" if len(plot.series) > 1 else "one column"}, "{" | ".join(head[1:])}".'
    )
    return _asked(plot, question + _exactness(plot), to_markdown(rows_of([head, *body])))


def _judge_table(example: Example, answer: str) -> Score:
    """Whatever stands over the names, which the picture does not say."""
    truth, said = read_markdown(example.answer), read_markdown(answer)
    assert truth is not None
    if said is not None:
        said[0][0] = truth[0][0]
    return table_score(truth, said)


_FORM = (
    '{"type": "bar, barh or line", "title": ..., "x": [...], '
    '"series": {name: {"colour": ..., "values": [...]}}}'
)  # fmt: skip
_PIE_FORM = '{"type": "pie", "title": ..., "x": [...], "colours": [...], "values": [...]}'


def _code(random: np.random.Generator, level: int) -> Idea | None:
    plot = draw_plot(random, level)
    if plot.kind == "pie" and not plot.printed:
        return None
    if len(plot.series) == 1 and plot.kind != "pie":  # nothing names it
        plot = replace(plot, series=("values",))
    form = f"{_PIE_FORM if plot.kind == 'pie' else _FORM}"
    alone = ' Its one series is named "values".' if len(plot.series) == 1 and plot.kind != "pie" else ""
    return _asked(plot, f"Write this chart as JSON: {form}.{alone}{_exactness(plot)}", to_json(plot))


def _judge_code(example: Example, answer: str) -> Score:
    """The share of the facts of either that both say: so nothing can be gained by saying more."""
    truth, said = grading.read_object(example.answer), grading.read_object(answer)
    assert truth is not None
    if said is None:
        return grading.wrong("malformed")
    one, other = fields_of(truth), fields_of(said)
    both = sum(key in other and _same_fact(value, other[key]) for key, value in one.items())
    share = both / max(len(one), len(other))
    return Score(share, {"facts": share, "right": float(share == 1.0)})


def _same_fact(one: object, other: object) -> bool:
    """3 and 3.0 are one number; true is none."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return one == other and (numbers or type(one) is type(other))
