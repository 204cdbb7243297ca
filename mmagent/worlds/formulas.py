"""Formulas, set by matplotlib's mathtext: writing them down as LaTeX, and working them out."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import Paint, grainy, grounds
from mmagent.worlds.examples import Example, Idea, Seeded

_LETTERS = "abcdkmnpqrstuvwxyz"
_GREEK = ("\\alpha", "\\beta", "\\gamma", "\\delta", "\\theta", "\\lambda", "\\mu", "\\pi", "\\sigma", "\\phi")
_FAMILIES = ("cm", "stix", "stixsans", "dejavusans", "dejavuserif")
_RELATIONS = ("=", "\\leq", "\\geq", "<", "\\neq")
_WIDEST = 560  # pixels of a formula
_setting = threading.Lock()  # mathtext's parser has a state of its own


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("formulas/latex", "formula-ocr", 4, _latex, _judge_latex),
        Seeded("formulas/evaluate", "math", 4, _evaluate, grading.number),
    )


@cache
def _parser() -> tuple[Any, Any]:
    """Mathtext's parser and its class of fonts. Loading them takes half a second, which is for those who need them."""
    try:
        from matplotlib.font_manager import FontProperties
        from matplotlib.mathtext import MathTextParser
    except ImportError as error:
        raise ValueError("formulas are set by matplotlib, which is not installed") from error
    return MathTextParser("agg"), FontProperties


def set_formula(latex: str, size: float, family: str = "cm") -> np.ndarray:
    """``(h, w)`` float32 in [0, 1]: the ink of a formula without its dollars, in letters of ``size`` points at 100 dots
    an inch."""
    with _setting:
        parser, fonts = _parser()
        raster = parser.parse(f"${latex}$", 100, fonts(size=size, math_fontfamily=family))
        return np.asarray(raster.image, dtype=np.float32) / 255


def paint_formulas(lines: Sequence[str], random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Formulas below one another, on one picture."""
    ground, ink = grounds(random)
    family, size = _FAMILIES[int(random.integers(len(_FAMILIES)))], float(random.uniform(18, 23))
    inked = [set_formula(line, size, family) for line in lines]
    if (widest := max(one.shape[1] for one in inked)) > _WIDEST:
        inked = [set_formula(line, size * _WIDEST / widest * 0.97, family) for line in lines]
    margin, gap = int(random.integers(10, 24)), 14
    height = max(sum(one.shape[0] for one in inked) + gap * (len(inked) - 1) + 2 * margin, 64)
    width = max(max(one.shape[1] for one in inked) + 2 * margin, 112)
    share, top = np.zeros((height, width), dtype=np.float32), (height - sum(o.shape[0] + gap for o in inked) + gap) // 2
    for one in inked:
        share[top : top + one.shape[0], margin : margin + one.shape[1]] = one
        top += one.shape[0] + gap
    return (grainy(_blend(share, ground, ink), random),)


def _blend(share: np.ndarray, ground: Paint, ink: Paint) -> np.ndarray:
    paper = np.asarray(ground, dtype=np.float32)
    return np.rint(paper + share[..., None] * (np.asarray(ink, dtype=np.float32) - paper)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- written down


def _letter(random: np.random.Generator, greek: float = 0.2) -> str:
    if random.random() < greek:
        return _GREEK[int(random.integers(len(_GREEK)))]
    return _LETTERS[int(random.integers(len(_LETTERS)))]


def _atom(random: np.random.Generator, level: int) -> str:
    kind = random.random()
    if kind < 0.3:
        return str(int(random.integers(1, (10, 20, 100, 100)[level])))
    letter = _letter(random, (0.0, 0.2, 0.3, 0.3)[level])
    if kind < 0.5 and level >= 1:
        return f"{letter}_{{{int(random.integers(0, 10))}}}"
    if kind < 0.75:
        return f"{letter}^{{{int(random.integers(2, 10))}}}"
    return letter


def _sum(random: np.random.Generator, level: int, depth: int) -> str:
    terms = [_term(random, level, depth) for _ in range(int(random.integers(2, 4)))]
    out = terms[0]
    for term in terms[1:]:
        out += f" {'+-'[int(random.integers(2))]} {term}"
    return out


def _term(random: np.random.Generator, level: int, depth: int) -> str:
    if depth == 0 or random.random() < 0.35:
        return _atom(random, level)
    kinds: list[Callable[[], str]] = [
        lambda: f"\\frac{{{_sum(random, level, depth - 1)}}}{{{_atom(random, level)}}}",
        lambda: f"\\sqrt{{{_sum(random, level, depth - 1)}}}",
        lambda: f"{int(random.integers(2, 10))} \\left( {_sum(random, level, depth - 1)} \\right)",
    ]
    if level >= 2:
        name = ("\\sin", "\\cos", "\\log", "\\exp")[int(random.integers(4))]
        kinds += [
            lambda: f"\\sum_{{k=1}}^{{{_LETTERS[int(random.integers(5, 9))]}}} {_atom(random, level)}",
            lambda: f"\\int_{{0}}^{{{int(random.integers(1, 10))}}} {_atom(random, level)} d{'tuvx'[level]}",
            lambda: f"{name} \\left( {_atom(random, level)} \\right)",
        ]
    return kinds[int(random.integers(len(kinds)))]()


def _latex(random: np.random.Generator, level: int) -> Idea | None:
    """Level 0 has sums of powers, 1 fractions, roots and brackets, 2 sums, integrals and functions, 3 two deep."""
    left = _sum(random, level, (0, 1, 1, 2)[level])
    relation = _RELATIONS[int(random.integers(len(_RELATIONS)))] if level else "="
    latex = f"{left} {relation} {_atom(random, level)}"
    if not 8 <= len(tokens(latex)) <= 70 or len(latex) > 110:
        return None
    return Idea("Write this formula in LaTeX.", latex, None, lambda looks: paint_formulas([latex], looks))


_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\s]")
_IGNORED = {"\\left", "\\right", "\\,", "\\;", "\\!", "\\:", "\\ ", "\\quad", "\\displaystyle", "$", "\\big", "\\Big"}
_SAME = {"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\le": "\\leq", "\\ge": "\\geq", "\\ne": "\\neq", "\\lt": "<"}


def tokens(latex: str) -> list[str]:
    """LaTeX as what it sets, whatever its spaces: commands under one name each, braces around single tokens left out,
    a subscript before a superscript."""
    latex = latex.replace("\\(", "").replace("\\)", "").replace("\\[", "").replace("\\]", "")
    found = [_SAME.get(token, token) for token in _TOKEN.findall(latex) if token not in _IGNORED]
    out: list[str] = []
    for token in found:
        out.append(token)
        if token == "}" and len(out) >= 3 and out[-3] == "{" and out[-2] not in "{}":
            out[-3:] = [out[-2]]
    for n in range(len(out)):
        if out[n] == "^" and (low := _behind(out, n + 1)) < len(out) and out[low] == "_":
            end = _behind(out, low + 1)
            out[n:end] = [*out[low:end], *out[n:low]]
    return out


def _behind(found: Sequence[str], at: int) -> int:
    """The place behind the token, or the group in braces, at ``at``."""
    depth = 0
    for n in range(at, len(found)):
        depth += (found[n] == "{") - (found[n] == "}")
        if depth <= 0:
            return n + 1
    return len(found)


def _judge_latex(example: Example, answer: str) -> Score:
    truth, said = tokens(example.answer), tokens(grading.unfenced(answer))
    alike = grading.similarity(truth, said)
    return Score(alike, {"tokens": alike, "right": float(truth == said)})


# ---------------------------------------------------------------------------------------------- worked out


def _evaluate(random: np.random.Generator, level: int) -> Idea | None:
    """Level 0 has sums and powers, 1 fractions, 2 roots and sums over an index, 3 a linear equation to solve."""

    def draw(low: int, high: int) -> int:
        return int(random.integers(low, high))

    a, b, c, d = draw(2, 10), draw(2, 10), draw(2, 10), draw(2, 10)
    sign = "+-"[draw(0, 2)]
    sense = 1 if sign == "+" else -1
    kind = draw(0, 2)
    if level == 0:
        latex, value = f"{a}^{{2}} {sign} {b} \\cdot {c}", Fraction(a * a + sense * b * c)
        steps = f"{a * a} {sign} {b * c} = {value}"
        if kind:
            latex, value = f"{a} \\cdot \\left( {b} {sign} {c} \\right)", Fraction(a * (b + sense * c))
            steps = f"{b} {sign} {c} = {b + sense * c}, times {a} is {value}"
    elif level == 1:
        one, other = Fraction(a, b), Fraction(c, d)
        latex, value = f"\\frac{{{a}}}{{{b}}} {sign} \\frac{{{c}}}{{{d}}}", one + sense * other
        steps = f"over {b * d} it is ({a * d} {sign} {c * b}) / {b * d} = {value}"
        if kind:
            latex, value = f"\\frac{{{a}}}{{{b}}} \\cdot \\frac{{{c}}}{{{d}}}", one * other
            steps = f"{a * c} / {b * d} = {value}"
    elif level == 2:
        root = math.isqrt(a * a)
        latex, value = f"\\sqrt{{{a * a}}} {sign} \\frac{{{b * c}}}{{{b}}}", Fraction(root + sense * c)
        steps = f"the root is {a}, the fraction {c}: {a} {sign} {c} = {value}"
        if kind:
            last = draw(3, 6)
            parts = [b * k**2 if sense > 0 else b * k + c for k in range(1, last + 1)]
            inner = f"{b} k^{{2}}" if sense > 0 else f"\\left( {b} k + {c} \\right)"
            latex, value = f"\\sum_{{k=1}}^{{{last}}} {inner}", Fraction(sum(parts))
            steps = f"{' + '.join(map(str, parts))} = {value}"
    else:
        return _solve(random, a, b, c)
    question = "What is the value of this expression? Answer with a whole number or a fraction like 3/4."
    return Idea(question, str(value), latex, lambda looks: paint_formulas([latex], looks), reasoning=f"{steps}.")


def _solve(random: np.random.Generator, a: int, b: int, c: int) -> Idea:
    """One or two linear equations with whole numbers for answers."""
    x, y = int(random.integers(-9, 10)), int(random.integers(-9, 10))

    def signed(number: int) -> str:
        return f"+ {number}" if number >= 0 else f"- {-number}"

    if random.random() < 0.5:
        right = a * x + b - c * x
        lines = [f"{a} x {signed(b)} = {c} x {signed(right)}"]
        if a == c:
            a, right = a + 1, right + x
            lines = [f"{a} x {signed(b)} = {c} x {signed(right)}"]
        steps = f"{a - c} x = {right - b}, so x = {x}"
    else:
        lines = [f"x + y = {x + y}", f"{a} x - y = {a * x - y}"]
        steps = f"adding both, {a + 1} x = {x + y + a * x - y}, so x = {x}"
    paint = tuple(lines)
    question = "Solve for x. Answer with a number."
    return Idea(question, str(x), paint, lambda looks: paint_formulas(paint, looks), reasoning=f"{steps}.")
