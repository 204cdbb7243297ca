"""Answers of the worlds against what can be found without their own code: measured in pixels, or worked out anew."""

from __future__ import annotations

import ast
import contextlib
import io
import operator
import re
from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmagent.chat import Text
from mmagent.worlds import grading
from mmagent.worlds.boxes3d import Box, draw_view, paint_view
from mmagent.worlds.catalogue import all_worlds
from mmagent.worlds.drawing import COLOURS, generator
from mmagent.worlds.examples import Example
from mmagent.worlds.figures import _ANGLES, _AREAS, _LENGTHS, _angle_at
from mmagent.worlds.formulas import set_formula, tokens
from mmagent.worlds.plots import draw_plot, paint_plot
from mmagent.worlds.programs import write_program
from mmagent.worlds.puzzles import Sudoku, slide, solutions
from mmagent.worlds.spatial import carve, shortest
from mmagent.worlds.svg import SvgError, draw_svg, flatten, likeness
from mmagent.worlds.table_text import (
    Cell,
    alignment,
    read_html,
    read_markdown,
    rows_of,
    table_score,
    to_html,
    to_markdown,
)

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def worked_out(node: ast.AST) -> Fraction:
    """Arithmetic over the syntax tree of Python."""
    match node:
        case ast.Expression(body=body):
            return worked_out(body)
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](worked_out(left), worked_out(right))
        case ast.UnaryOp(operand=operand):
            return -worked_out(operand)
        case ast.Constant(value=int(value)):
            return Fraction(value)
    raise AssertionError(ast.dump(node))


def test_arithmetic_is_right():
    world = all_worlds()["text/arithmetic"]
    for index in range(200):
        one = world.example("test", index)
        asked = re.match(r"What is (.*)\? Answer", one.question)[1].replace("x", "*")
        assert worked_out(ast.parse(asked, mode="eval")) == int(one.answer)


@pytest.mark.parametrize("level", range(4))
def test_bars_are_as_high_as_their_numbers(level):
    """Read back from the pixels alone: where the colour of a bar ends, against the lines of the axis."""
    for seed in range(8):
        plot = draw_plot(generator("bars", seed, "test"), level, ("bar",))
        (image,) = paint_plot(plot, generator("looks", seed, "test"))
        found = {}
        for colour, values in zip(plot.colours, plot.values, strict=True):
            far = np.abs(image.astype(int) - np.array(COLOURS[colour])).max(axis=2)
            columns = (far[48 if len(plot.series) > 1 else 0 :] < 14).sum(axis=0)  # below the legend
            groups = np.split(np.flatnonzero(columns > 2), np.flatnonzero(np.diff(np.flatnonzero(columns > 2)) > 1) + 1)
            heights = [float(np.median(columns[group])) for group in groups if len(group) >= 4]
            assert len(heights) == len(values), (seed, colour)
            found[colour] = heights
        drawn = [
            pair for c, vs in zip(plot.colours, plot.values, strict=True) for pair in zip(found[c], vs, strict=True)
        ]
        height, value = max(drawn)
        for pixels, number in drawn:  # the tallest gives the scale; all others must be on it, to half a unit
            assert abs(pixels * value / height - number) < 0.5 * plot.unit


def test_angles_are_those_of_the_drawing():
    """What a figure says beside an angle is what its points enclose, and the answer is what the asked ones do."""
    for kinds in _ANGLES:
        for kind in kinds:
            random = generator(kind.__name__, 0, "test")
            made = [kind(lambda low, high, r=random: int(r.integers(low, high))) for _ in range(60)]
            problems = [one for one in made if one is not None]
            assert problems, kind.__name__
            for figure, question, answer, _ in problems:
                for angle in figure.angles:
                    drawn = _angle_at(figure.points, angle.one, angle.at, angle.other)
                    assert drawn == pytest.approx(int(angle.text.rstrip("°") or 90), abs=0.6)  # of four, whole degrees
                names = re.search(r"angle (?:at )?([A-Z]+)\?", question)[1]
                if len(names) == 1:
                    around = {"A": "CAB", "B": "ABC", "C": "ACB"} if "D" not in figure.points else {"D": "CDA"}
                    names = around[names]
                assert _angle_at(figure.points, *names) == pytest.approx(answer, abs=1.6)


def shoelace(points: list[tuple[float, float]]) -> float:
    x, y = np.array(points).T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def test_lengths_and_areas_are_those_of_the_drawing():
    for kind in {kind for kinds in (*_AREAS, *_LENGTHS) for kind in kinds}:
        random = generator(kind.__name__, 1, "test")
        made = [kind(lambda low, high, r=random: int(r.integers(low, high))) for _ in range(150)]
        problems = [one for one in made if one is not None]
        assert problems, kind.__name__
        for figure, question, answer, _ in problems:
            at = figure.points
            for names, text in figure.sides:
                assert np.hypot(*np.subtract(at[names[0]], at[names[1]])) == pytest.approx(int(text), rel=1e-6)
            if figure.filled:
                assert shoelace([at[name] for name in figure.filled]) == pytest.approx(answer)
            elif asked := re.search(r"How long is ([A-Z]{2})\?", question):
                assert np.hypot(*np.subtract(*(at[name] for name in asked[1]))) == pytest.approx(answer)
            elif "perimeter" in question:
                ring = [at[name] for name in figure.paths[0]]
                around = sum(np.hypot(*np.subtract(a, b)) for a, b in pairwise(ring))
                assert around == pytest.approx(answer)


def test_formulas_are_worked_out_rightly():
    """The LaTeX of an expression as Python, for the levels without roots and sums."""
    world = all_worlds()["formulas/evaluate"]
    for index in range(60):
        for level in (0, 1):
            idea = world.think(generator("formula", index, "test"), level)
            latex = idea.facts
            text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)", latex)
            text = text.replace("\\cdot", "*").replace("\\left", "").replace("\\right", "").replace("^{2}", "**2")
            text = re.sub(r"(\d+)\*\*2", r"(\1*\1)", text)
            assert worked_out(ast.parse(text.strip(), mode="eval")) == Fraction(idea.answer)


def test_latex_is_compared_by_what_it_sets():
    same = [
        ("\\frac{a}{b} + x^{2}", "\\dfrac ab+x^2"), ("a \\leq b", "a\\le b"), ("\\left( a \\right)", "(a)"),
        ("x_{1}^{2}", "x^2_1"), ("a^{10}", "a ^ { 10 }"),
    ]  # fmt: skip
    assert all(tokens(a) == tokens(b) for a, b in same)
    for a, b in (("x^{12}", "x^1 2"), ("a + b", "b + a"), ("\\frac{a}{b}", "\\frac{b}{a}")):
        assert tokens(a) != tokens(b)
    assert set_formula("x", 16).max() > 0.5


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_edit_distance_is_that_of_the_textbook(one, other):
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    table[:, 0], table[0] = np.arange(len(one) + 1), np.arange(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    assert grading.edit_distance(one, other) == table[-1, -1]
    assert alignment(one, other, lambda _: 1.0, lambda a, b: float(a != b)) == table[-1, -1]


TEXTS = st.text("ab|<&\\ 1", min_size=1, max_size=4).map(lambda text: " ".join(text.split()) or "x")


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), min_size=2, max_size=4))
def test_tables_survive_being_written(table):
    rows = rows_of([["h", "i", "j"], *table])
    if all("\\" not in cell for row in table for cell in row):
        assert table_score(rows, read_markdown(to_markdown(rows))).value == 1.0
    assert table_score(rows, read_html(to_html(rows))).value == 1.0


def test_likeness_of_tables():
    truth = [[Cell("a", 2)], *rows_of([["x", "1"], ["y", "2"]])]
    assert table_score(truth, truth).value == 1.0
    less = table_score(truth, truth[:-1]).value
    assert less == pytest.approx(1 - 3 / 9)  # a row and its two cells of nine nodes: table, three rows, five cells
    assert table_score(truth, [[Cell("a")], *truth[1:]]).value == pytest.approx(1 - 1 / 9)
    assert table_score(truth, None).value == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("-1,250.5", Fraction(-2501, 2)), ("3/4", Fraction(3, 4)), ("$7", 7), ("12 %", 12), (" 90° ", 90),
        ("**5**", 5), ("\\boxed{8}", 8), (".5", Fraction(1, 2)), ("1e5", None), ("1/0", None), ("٤٢", None),
        ("1 250", 1250), ("1\u202f250 000.5", Fraction(2500001, 2)), ("１，２５０．５", Fraction(2501, 2)),
        ("－５％", -5), ("5。", 5), ("5²", None), ("½", None), ("1 25", None), ("12 50", None), ("1 250,000", None),
        ("1,250 000", None),
        ("4 2", None), ("12,34", None), ("", None), ("-", None), ("nan", None), ("9" * 40, None),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, value):
    assert grading.read_number(text) == value


def test_boxes_and_times_are_judged_by_their_overlap():
    assert grading.read_box("[10, 20, 30, 40]") == (10, 20, 30, 40)
    assert grading.read_box("10 20 30 1000") is grading.read_box("30,20,10,40") is grading.read_box("1,2,3") is None
    assert grading.overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert grading.overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert grading.overlap((0, 0, 9, 9), (10, 10, 19, 19)) == 0.0
    for said in ("1.0, 3.5", "1 3.5", "[1.0, 3.5]"):
        assert grading.read_decimals(said, 2) == (1.0, 3.5)
    assert grading.read_decimals("1.0 -3.5", 2) == (1.0, -3.5)
    assert grading.read_decimals("1e9-2", 2) is None


def test_objects_are_read_strictly():
    assert grading.read_object('```json\n{"a": 1}\n```') == {"a": 1}
    assert grading.read_object('{"a": 1, "a": 2}') is grading.read_object("[1]") is grading.read_object("{") is None


def test_html_tables_of_others_are_read():
    """Sections and unclosed cells, as browsers take them."""
    said = "<table><thead><tr><th>a<th>b</thead><tbody><tr><td>1<td><b>2</b></tbody></table>"
    assert read_html(said) == rows_of([["a", "b"], ["1", "2"]])


def test_the_camera_is_a_pinhole():
    """Lines stay straight, the floor's middle lies on the axis, what is twice as far is half as large."""
    view = next(filter(None, (draw_view(generator("view", n, "test"), 1) for n in range(50))))
    camera = view.camera
    right, up, ahead = np.array(camera.axes)
    assert np.allclose(np.array(camera.axes) @ np.array(camera.axes).T, np.eye(3))
    assert up[2] > 0
    foot = np.array([camera.x, camera.y, camera.z])
    assert camera(foot + 3 * ahead) == pytest.approx((camera.u, camera.v))
    near, far = (camera(foot + d * ahead + right)[0] - camera.u for d in (2.0, 4.0))
    assert near == pytest.approx(2 * far) == pytest.approx(camera.focal / 2)
    points = np.array([camera(foot + 5 * ahead + t * (right + ahead)) for t in (0.0, 1.0, 2.0)])
    assert abs(np.linalg.det(np.stack([points[1] - points[0], points[2] - points[0]]))) < 1e-6


def test_boxes_are_painted_behind_what_is_nearer():
    """Against a depth test of every pixel: rays through the picture, met with the boxes in space."""
    for seed in range(30):
        view = draw_view(generator("depth", seed, "test"), 2)
        if view is None:
            continue
        (image,) = paint_view(view, generator("looks", 5, "train"))
        right, up, ahead = np.array(view.camera.axes)
        eye = np.array([view.camera.x, view.camera.y, view.camera.z])
        wrong = total = 0
        for u, v in np.random.default_rng(seed).uniform((20, 20), (300, 260), (400, 2)).astype(int):
            ray = ahead + ((u + 0.5 - view.camera.u) * right - (v + 0.5 - view.camera.v) * up) / view.camera.focal
            met = {box.colour: t for box in view.boxes if (t := first_meeting(eye, ray, box)) is not None}
            if met:
                paint = image[v, u].astype(float)
                nearest = min(met, key=met.get)
                shown = min((np.abs(paint - np.array(COLOURS[c]) * s).max(), c) for c in met for s in (1.0, 0.8, 0.62))
                total += 1
                wrong += shown[1] != nearest and shown[0] < 20
        assert wrong <= 0.03 * total, "more than the seams between boxes"


def first_meeting(eye: np.ndarray, ray: np.ndarray, box: Box) -> float | None:
    """Where a ray enters a box: by slabs."""
    low, high = np.array([box.x, box.y, 0.0]), np.array([box.x + box.w, box.y + box.d, box.h])
    with np.errstate(divide="ignore"):
        one, other = (low - eye) / ray, (high - eye) / ray
    enter, leave = np.minimum(one, other).max(), np.maximum(one, other).min()
    return float(enter) if enter < leave and leave > 0 else None


def test_mazes_are_left_by_the_shortest_way():
    """Against distances by squaring the graph's matrix, step by step."""
    for seed in range(20):
        doors = carve(np.random.default_rng(seed), 4, 5, loops=2)
        cells = [(r, c) for r in range(4) for c in range(5)]
        near = np.eye(20, dtype=bool)
        for a, b in doors:
            near[cells.index(a), cells.index(b)] = near[cells.index(b), cells.index(a)] = True
        reach, steps = np.eye(20, dtype=bool)[0], 0
        while not reach[19]:
            reach, steps = reach @ near, steps + 1
        assert len(shortest(doors, (0, 0), (3, 4))) == steps


def test_svg_is_drawn_as_it_says():
    head, tail = '<svg viewBox="0 0 10 10">', "</svg>"

    def drawn(body: str) -> np.ndarray:
        return draw_svg(head + body + tail, 40)

    half = drawn('<rect x="0" y="0" width="5" height="10" fill="#ff0000"/>')
    assert (half[:, :20] == (255, 0, 0)).all()
    assert (half[:, 21:] == 255).all()
    same = (
        '<path d="M0 0H5V10H0Z" fill="red"/>', '<path d="m0,0 h5 v10 h-5 z" fill="red"/>',
        '<polygon points="0,0 5,0 5,10 0,10" style="fill: red"/>',
        '<g fill="red" transform="translate(5 0) scale(-1 1)"><rect width="5" height="10"/></g>',
        '<g transform="rotate(90 5 5)"><rect fill="red" width="10" height="5" y="5"/></g>',
        '<rect width="9" height="9" fill="none"/><rect width="5" height="10" fill="rgb(255,0,0)"/>',
    )  # fmt: skip
    for body in same:
        assert np.abs(drawn(body).astype(int) - half).mean() < 4, body
    disc = drawn('<circle cx="5" cy="5" r="4" fill="black"/>')
    assert (disc == 0).all(axis=2).mean() == pytest.approx(np.pi * 16 / 100, abs=0.03)
    curve = list(flatten("M 0 0 C 0 1 1 1 1 0 Q 2 -1 3 0 L 4 0"))
    assert curve[0][0][-1] == (4.0, 0.0)
    assert curve[0][0][6] == pytest.approx((0.5, 0.75))


@pytest.mark.parametrize(
    "svg",
    [
        "", "<svg>", "<svg><rect></svg>", "<svg><!DOCTYPE x></svg>", '<svg viewBox="0 0 0 0"></svg>',
        '<svg viewBox="0 0 1e999 1"></svg>', '<svg><circle r="1e9"/></svg>',
        "<svg>" + "<g>" * 40 + "</g>" * 40 + "</svg>",
        '<svg><path d="M 1 2 3"/></svg>', '<svg><path d="12 3"/></svg>', '<svg><path d="M 0 0 A 1 1 0 0 0 2 2"/></svg>',
        "<svg>" + "<rect/>" * 400 + "</svg>", '<svg><rect width="9" height="9" fill="url(#a)"/></svg>',
        '<svg><g transform="scale(99999) scale(99999)"><rect width="9" height="9"/></g></svg>',
        "<svg>&lol;</svg>", '<svg><path d="' + "M0 0L9 9" * 2500 + '"/></svg>',
    ],
)  # fmt: skip
def test_svg_that_is_none_or_too_much_is_refused(svg):
    with pytest.raises(SvgError):
        draw_svg(svg)


def test_likeness_of_pictures():
    truth = draw_svg('<svg viewBox="0 0 9 9"><circle cx="4" cy="4" r="3" fill="red"/></svg>', 56)
    moved = draw_svg('<svg viewBox="0 0 9 9"><circle cx="4.1" cy="4" r="3" fill="red"/></svg>', 56)
    other = draw_svg('<svg viewBox="0 0 9 9"><circle cx="4" cy="4" r="3" fill="blue"/></svg>', 56)
    blank, full = np.full_like(truth, 255), np.zeros_like(truth)
    assert likeness(truth, truth) == 1.0
    assert 0.8 < likeness(truth, moved) < 1.0
    assert likeness(truth, other) < 0.4
    assert likeness(truth, blank) == likeness(truth, full) == 0.0


def test_sudokus_have_one_solution():
    """Tried out number by number, without the solver's ways."""
    world = all_worlds()["puzzles/sudoku"]
    for index in range(4):
        one = world.example("test", index, 1)
        full = [int(c) for c in one.answer.replace("\n", "")]
        for n in range(4):
            assert sorted(full[4 * n : 4 * n + 4]) == sorted(full[n::4]) == [1, 2, 3, 4]
            top, left = n // 2 * 2, n % 2 * 2
            assert sorted(full[(top + r) * 4 + left + c] for r in range(2) for c in range(2)) == [1, 2, 3, 4]
    empty = Sudoku((0,) * 16, 2, 2)
    assert len(solutions(empty, 400)) == 288  # as many as there are of four by four
    assert solutions(empty.put(0, 1).put(1, 1)) == []


def test_sliding_tiles_take_any_way_that_ends_in_order():
    world = all_worlds()["puzzles/sliding"]
    one = world.example("train", 3, 0)
    moves = one.answer.split(", ")
    assert world.grade(one, ", ".join([*moves, moves[-1], moves[-1]])).value == 1.0
    assert world.grade(one, ", ".join(moves[:-1])).value == 0.0
    assert slide((1, 2, 3, 4, 0, 5), 5, 3) == (1, 2, 3, 4, 5, 0)
    assert slide((1, 2, 3, 0, 4, 5), 3, 3) is None


def test_patterns_follow_their_rules():
    """Of the four answers only the right one continues what the first two rows and columns do, feature by feature."""
    world = all_worlds()["puzzles/pattern"]
    for index in range(60):
        idea = world.think(generator("pattern", index, "train"), index % 3)
        if idea is None:
            continue
        squares, answers = idea.facts
        assert answers["ABCD".index(idea.answer)] == squares[8]
        fitting = []
        for answer in answers:
            grid = [*squares[:8], answer]
            rows = [grid[0:3], grid[3:6], grid[6:9]]
            columns = [grid[0::3], grid[1::3], grid[2::3]]
            fitting.append(all(
                {kind(rows, name), kind(columns, name)} in ({"same", "each"}, {"each"}, {"same"})
                for name in ("shape", "colour", "size", "count")
            ))  # fmt: skip
        assert fitting == [letter == idea.answer for letter in "ABCD"]


def kind(lines: list, name: str) -> str:
    """What a feature does along three lines: the same in each of them, another at every place of each, or neither."""
    found = [[getattr(figure, name) for figure in line] for line in lines]
    if all(len(set(line)) == 1 for line in found):
        return "same"
    return "each" if all(len(set(line)) == 3 for line in found) else "neither"


def test_turned_figures_are_told_from_their_mirror_images():
    """By the sign of every way round: a figure's distances are its mirror image's, its turns are not."""
    world = all_worlds()["puzzles/rotation"]
    for index in range(20):
        idea = world.think(generator("turned", index, "train"), index % 3)
        if idea is None:
            continue
        figure, shown = idea.facts

        def turned(cells: list) -> set:
            points = np.array(cells)
            ways = set()
            for quarter in range(4):
                matrix = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), quarter)
                moved = points @ matrix
                ways.add(tuple(sorted(map(tuple, (moved - moved.min(axis=0)).tolist()))))
            return ways

        assert [bool(turned(figure) & turned(cells)) for cells in shown] == [c == idea.answer for c in "ABCD"]


@pytest.mark.parametrize("name", ["videos/when", "videos/count", "videos/order"])
def test_videos_show_what_is_said(name):
    """From pixels: frames in which a colour occurs, and on which side of the line."""
    world = all_worlds()[name]
    for index in range(6):
        one = world.example("test", index)
        times = one.prompt[0].timestamps

        def where(frame: np.ndarray, colour: str) -> np.ndarray:
            return np.argwhere(np.abs(frame.astype(int) - COLOURS[colour]).max(axis=2) < 12)

        if name == "videos/when":
            colour = re.search(r"is the (\w+) ", one.question)[1]
            there = [t for t, frame in zip(times, one.images, strict=True) if len(where(frame, colour)) > 20]
            assert one.answer == f"{there[0]:.1f}-{there[-1]:.1f}"
        elif name == "videos/count":
            colour = re.search(r"does the (\w+) ", one.question)[1]
            sides = [np.median(where(frame, colour)[:, 1]) > frame.shape[1] / 2 for frame in one.images]
            assert int(one.answer) == int(np.abs(np.diff(np.array(sides, dtype=int))).sum())
        else:
            named = [said.split()[0] for said in one.answer.split(", ")]
            seen = [[len(where(frame, colour)) > 20 for frame in one.images] for colour in named]
            changes = [int(np.flatnonzero(np.diff(np.array(row, dtype=int)))[0]) for row in seen]
            assert changes == sorted(set(changes))


def ink_within(image: np.ndarray, box: tuple[float, ...], around: int = 2) -> tuple[int, ...]:
    """The box of what differs from the ground in and just around a box."""
    ground = np.median(image[::5, ::5].reshape(-1, 3), axis=0)
    left, top = (max(int(v) - around, 0) for v in box[:2])
    right, bottom = (round(v) + around for v in box[2:])
    spots = np.argwhere(np.abs(image[top:bottom, left:right] - ground).max(axis=2) > 45) + np.array([top, left])
    (y1, x1), (y2, x2) = spots.min(axis=0), spots.max(axis=0) + 1
    return x1, y1, x2, y2


def test_boxes_of_a_track_are_around_the_shape():
    world = all_worlds()["videos/track"]
    for index in range(6):
        one = world.example("test", index)
        for region in one.boxes:
            found = ink_within(one.images[region.image], region.coordinates)
            assert np.abs(np.subtract(found, region.coordinates)).max() <= 3.5  # outlines stand out at a star's tips


def test_jigsaws_fit_together():
    """Across the cuts of the order that is answered, neighbouring pixels are more alike than in any other."""
    world = all_worlds()["puzzles/jigsaw"]
    for index in range(4):
        idea = world.think(generator("jigsaw", index, "train"), 0)
        if idea is None:
            continue
        (sheet,) = idea.paint(generator("looks", 3, "train"))
        pieces = {"ABC"[n]: sheet[28:224, 10 + 75 * n : 10 + 75 * n + 65].astype(float) for n in range(3)}
        fit = {
            order: sum(np.abs(pieces[a][:, -1] - pieces[b][:, 0]).mean() for a, b in pairwise(order))
            for order in permutations("ABC")
        }
        assert ", ".join(min(fit, key=fit.get)) == idea.answer


@pytest.mark.parametrize("name", ["documents/fields", "documents/locate", "documents/read"])
def test_boxes_of_words_are_around_their_ink(name):
    world = all_worlds()[name]
    for index in range(6):
        one = world.example("test", index)
        (image,) = one.images
        for region in one.boxes:
            assert np.abs(np.subtract(ink_within(image, region.coordinates), region.coordinates)).max() <= 2.5


@pytest.mark.parametrize("level", range(3))
def test_programs_print_what_is_said(level):
    """They are carried out by Python, here alone: what a test wrote itself may be run."""
    for seed in range(60):
        code, output, _ = write_program(generator("program", seed, "test"), level)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "program", "exec"), {})
        assert printed.getvalue().strip() == output


def test_strings_and_facts_are_right():
    strings, facts, order = (all_worlds()[f"text/{name}"] for name in ("strings", "facts", "order"))
    for index in range(150):
        one = strings.example("test", index)
        word = re.search(r'"([a-z]+)"( backwards|\?| in capitals)', one.question)
        if "backwards" in one.question:
            assert one.answer == "".join(reversed(word[1]))
        elif "How many letters" in one.question:
            assert int(one.answer) == len(word[1])
        elif "How often" in one.question:
            letter, inside = re.search(r'"(.)" occur in "(\w+)"', one.question).groups()
            assert int(one.answer) == sum(c == letter for c in inside)
    for index in range(60):
        one = facts.example("test", index)
        assert one.answer in one.question
        ranked = order.example("test", index)
        said = re.findall(r"(\w+) is (\w+) than (\w+)\.", ranked.question)
        up = {"taller": 1, "older": 1, "faster": 1}
        above = {(a, b) if how in up else (b, a) for a, how, b in said}
        people = {name for pair in above for name in pair}
        rank = {name: sum(_over(above, other, name) for other in people) for name in people}
        row = sorted(people, key=rank.get)
        asked = re.search(r"Who is the (\w+)( \w+)?\?", ranked.question)
        place = {"second": 1, "third": 2, "fourth": 3, "fifth": 4}.get(asked[1], 0)
        if asked[1] in ("shortest", "youngest", "slowest"):
            place = len(row) - 1
        assert ranked.answer == row[place]


def _over(above: set, one: str, other: str) -> bool:
    """Whether one person is above another, by whatever others between."""
    return (one, other) in above or any(a == one and _over(above, b, other) for a, b in above)


def test_shapes_are_counted_in_the_picture():
    """Of the first level: separate patches of ink, found by flooding."""
    from skimage.measure import label

    world = all_worlds()["counting/objects"]
    for index in range(12):
        one = world.example("test", index, 0)
        ground = np.median(one.images[0].reshape(-1, 3), axis=0)
        inked = np.abs(one.images[0].astype(int) - ground).max(axis=2) > 40
        patches = label(inked, connectivity=2)
        assert int(one.answer) == sum(int((patches == n).sum()) > 30 for n in range(1, patches.max() + 1))


def test_tiles_are_where_the_camera_sees_them():
    """The middle of the box's ground, sent back from the picture to the floor, lies on the tile of the answer."""
    world = all_worlds()["boxes3d/tile"]
    checked = 0
    for index in range(12):
        idea = world.think(generator("tile", index, "test"), 0)
        if idea is None:
            continue
        camera, colour = idea.facts.camera, re.search(r"the (\w+) box", idea.question)[1]
        box = next(box for box in idea.facts.boxes if box.colour == colour)
        u, v = camera((box.x + box.w / 2, box.y + box.d / 2, 0.0))
        right, up, ahead = np.array(camera.axes)
        ray = ahead + ((u - camera.u) * right - (v - camera.v) * up) / camera.focal
        x, y, _ = np.array([camera.x, camera.y, camera.z]) - camera.z / ray[2] * ray
        assert idea.answer == f"{'ABCDEF'[int(x)]}{int(y) + 1}"
        checked += 1
    assert checked >= 4


def test_an_equation_for_the_unknown_is_its_value():
    def grade(answer: str, question: str = "x - 2 = 3\nSolve for x. Answer with a number.") -> float:
        return grading.number(Example("key", (Text(question),), (), "5", 0), answer).value

    for said in ("5", "x = 5", "x=5.", "$x = 5$", "ｘ＝５", "x = 10/2", "**x = 5**"):
        assert grade(said) == 1.0, said
    for said in ("x = 6", "y = 5", "2x = 5", "x = 3 + 2", "x = y = 5", "x =", "= 5", "x = 5 or 6", "x - 5"):
        assert grade(said) == 0.0, said
    assert grade("a = 5", "How many apples are there? Is a 5 right? Answer with a number.") == 0.0


def test_lists_and_boxes_are_read_from_full_width_signs():
    one = Example("key", (), (), "red, blue", 0)
    assert grading.items(one, "red，blue").value == grading.items(one, "red、blue").value == 1.0
    assert grading.items(one, "blue，red").value == 0.0
    assert grading.read_box("（１，２，３，４）") == (1, 2, 3, 4)
    assert grading.read_decimals("１．５，２", 2) == (1.5, 2.0)


def test_the_lowest_of_a_chain_is_told_by_its_overlaps():
    """From the pixels alone: where two neighbours meet, the colour of the upper one; no other has all of its meetings
    lost (or won)."""
    world, asked = all_worlds()["spatial/depth"], set()
    for level in (1, 2):
        for index in range(16):
            one = world.example("test", index, level)
            found = re.search(r"Which lies (lowest|highest) in the pile", one.question)
            if found is None:
                assert level == 1
                continue
            asked.add((level, found[1]))
            things = world_facts(world, "test", index, level)
            won = {thing.colour: [] for thing in things}
            for a, b in ((a, b) for a, b in permutations(things, 2) if a.colour < b.colour):
                if np.hypot(a.x - b.x, a.y - b.y) < 60:
                    x, y = round((a.x + b.x) / 2), round((a.y + b.y) / 2)
                    near = {t.colour: np.abs(one.images[0][y, x].astype(int) - COLOURS[t.colour]).sum() for t in (a, b)}
                    upper = min(near, key=near.get)
                    for colour in near:
                        won[colour].append(colour == upper)
            wanted = found[1] == "highest"
            ends = [colour for colour, meetings in won.items() if all(above is wanted for above in meetings)]
            assert ends == [one.answer]
            assert len(things) == (3, 5)[level - 1]
    assert len(asked) == 4


def world_facts(world, split: str, index: int, level: int) -> tuple:
    """The facts of an example, thought again as it was."""
    ideas = (world.think(generator(f"{world.name}/{level}/{n}", index, split), level) for n in range(2000))
    return next(idea.facts for idea in ideas if idea is not None and idea.split == split)


def test_an_arrow_points_at_one_thing_and_past_all_others():
    """The way of the arrow, followed pixel by pixel from its tip, meets the answer first; every level is closer."""
    world, beside = all_worlds()["spatial/direction"], []
    for level in range(3):
        angles = []
        for index in range(40):
            one = world.example("test", index, level)
            if "the arrow" not in one.question:
                continue
            *things, tail, tip = world_facts(world, "test", index, level)
            ahead = np.subtract(tip, tail) / np.linalg.norm(np.subtract(tip, tail))
            steps = [np.add(tip, ahead * n) for n in range(4, 400)]
            met = [t.name for x, y in steps for t in things if np.hypot(x - t.x, y - t.y) <= t.radius]
            assert met[0] == one.answer
            assert set(met) == {one.answer}
            red, green, blue = one.images[0][round(tip[1] - 4 * ahead[1]), round(tip[0] - 4 * ahead[0])].astype(int)
            assert max(red, green, blue) < 110, "the head is drawn in ink"
            for thing in things:
                if thing.name != one.answer:
                    way = np.subtract((thing.x, thing.y), tip)
                    angles.append(np.degrees(np.arccos(np.clip(way @ ahead / np.linalg.norm(way), -1, 1))))
        assert angles
        beside.append(min(angles))
    assert beside[0] > beside[1] > beside[2]


def test_tiles_hold_more_boxes_with_every_level():
    world = all_worlds()["boxes3d/tile"]
    for level in range(3):
        ideas = [world.think(generator("tile", n, "test"), level) for n in range(12)]
        for idea in filter(None, ideas):
            boxes = idea.facts.boxes
            assert len(boxes) == level + 2
            assert all(int(box.x) == int(box.x + box.w - 0.01) for box in boxes)  # each keeps to its tile
            if level == 1:
                way = max if "highest" in idea.question else min
                box = way(boxes, key=lambda box: box.h)
                assert idea.answer == f"{'ABCDEF'[int(box.x)]}{int(box.y) + 1}"
                assert sum(one.h == box.h for one in boxes) == 1
        assert any(ideas)
