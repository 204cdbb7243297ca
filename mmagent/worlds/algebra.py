"""School algebra whose answers are formulas or sets of numbers: judged by what they are, however they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.expressions import Unreadable, near, same, value_of

_ASSIGNED = re.compile(r"^\s*(?:[a-zA-Z]\s*\(x\)|[a-zA-Z]'?(?:\(x\))?|d?y/dx)\s*=\s*")
_APART = re.compile(r"\s*(?:,|;|\bor\b|\band\b)\s*")


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("algebra/derivative", "math", 4, _derivative, judge_formula),
        Seeded("algebra/expand", "math", 3, _expand, judge_expanded),
        Seeded("algebra/roots", "math", 3, _roots, judge_roots),
    )


def _bare(answer: str) -> str:
    """A formula without what people write around it: ``f'(x) = ``, dollars, a full stop."""
    return _ASSIGNED.sub("", grading.plain(answer)) if len(answer) <= 400 else answer


def judge_formula(example: Example, answer: str) -> Score:
    """A formula in x that is equal to the example's answer at every point (:mod:`mmagent.worlds.expressions`)."""
    try:
        return grading.right(same(_bare(answer), example.answer))
    except Unreadable:
        return grading.wrong("malformed")


def judge_expanded(example: Example, answer: str) -> Score:
    """The same, without brackets and with no more terms than needed: else the question would be its own answer."""
    said = _bare(answer)
    expanded = not re.search(r"[()]|\\left", said) and _terms(said) <= _terms(example.answer)
    score = judge_formula(example, answer)
    return score if expanded or score.value == 0.0 else grading.wrong("not expanded")


def _terms(formula: str) -> int:
    return len(re.findall(r"(?<![\^*/(])[+-]", formula.strip().lstrip("+-"))) + 1


def judge_roots(example: Example, answer: str) -> Score:
    """Numbers in any order with commas, "or" or "and" between them, each said once; "x = " may stand before any."""
    truth = [value_of(part) for part in _APART.split(example.answer)]
    if len(answer) > 200:
        return grading.wrong("malformed")
    text = grading.plain(answer)
    text = text[1:-1] if text[:1] + text[-1:] in ("{}", "[]") else text
    try:
        said = [value_of(_ASSIGNED.sub("", part)) for part in _APART.split(text)]
    except Unreadable:
        return grading.wrong("malformed")
    found = {n for value in said for n, root in enumerate(truth) if near(value, root)}
    return grading.right(len(said) == len(truth) == len(found))


def polynomial(coefficients: Sequence[int], letter: str = "x") -> str:
    """Coefficients from the constant upwards as ``3x^2 - x + 5``."""
    out = ""
    for power in range(len(coefficients) - 1, -1, -1):
        factor = coefficients[power]
        if factor == 0:
            continue
        number = "" if abs(factor) == 1 and power else str(abs(factor))
        what = number + (letter if power else "") + (f"^{power}" if power > 1 else "")
        out += (" - " if factor < 0 else " + ") + what if out else ("-" if factor < 0 else "") + what
    return out or "0"


def _draw(random: np.random.Generator, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high`` that is not 0."""
    value = 0
    while value == 0:
        value = int(random.integers(low, high + 1))
    return value


def _derivative(random: np.random.Generator, level: int) -> Idea | None:
    """0: a power; 1: a polynomial; 2: a product with a sine or an exponential; 3: a chain."""
    a, b, c, n = _draw(random, 2, 9), _draw(random, -9, 9), _draw(random, -9, 9), _draw(random, 2, 5)
    if level == 0:
        said, answer = f"{a}x^{n}", polynomial([0] * (n - 1) + [a * n])
    elif level == 1:
        terms = [c, b, *(int(v) for v in random.integers(-6, 7, size=n - 1)), a]
        said, answer = polynomial(terms), polynomial([k * v for k, v in enumerate(terms)][1:])
    elif level == 2:
        name = ("sin", "cos", "exp")[int(random.integers(3))]
        after = {"sin": "cos(x)", "cos": "(-sin(x))", "exp": "exp(x)"}[name]
        said = f"{a}x^{n} * {name}(x)"
        answer = f"{polynomial([0] * (n - 1) + [a * n])} * {name}(x) + {a}x^{n} * {after}"
    else:
        inner, slope = polynomial([c, b, a]), polynomial([b, 2 * a])
        kind = int(random.integers(3))
        said = (f"sin({inner})", f"exp({inner})", f"({inner})^{n}")[kind]
        answer = (f"({slope}) * cos({inner})", f"({slope}) * exp({inner})", f"{n}({slope}) * ({inner})^{n - 1}")[kind]
    rules = ("the power rule", "term by term", "the product rule", "the chain rule")
    return Idea(
        f"Differentiate f(x) = {said}. Answer with f'(x) alone.", answer, reasoning=f"By {rules[level]}: {answer}."
    )


def _expand(random: np.random.Generator, level: int) -> Idea | None:
    """0: a number times a sum; 1: two sums; 2: three sums."""
    factors = [[_draw(random, -9, 9), _draw(random, 1, 5)] for _ in range(max(level + 1, 1))]
    product = np.array([1], dtype=np.int64)
    for factor in factors:
        product = np.convolve(product, factor)
    said = "".join(f"({polynomial(factor)})" for factor in factors)
    if level == 0:
        by = _draw(random, 2, 12)
        said, product = f"{by}{said}", product * by
    answer = polynomial([int(v) for v in product])
    return Idea(f"Multiply out and gather like terms: {said}.", answer, reasoning=f"{said} = {answer}.")


def _roots(random: np.random.Generator, level: int) -> Idea | None:
    """0: two whole roots; 1: one of them a fraction; 2: roots of numbers that are no squares."""
    if level == 2:
        middle, under = int(random.integers(-6, 7)), int(random.choice((2, 3, 5, 6, 7, 10, 11, 13)))
        answer = f"{middle} + sqrt({under}), {middle} - sqrt({under})"
        equation = polynomial([middle * middle - under, -2 * middle, 1])
        steps = f"(x - {middle})^2 = {under}" if middle >= 0 else f"(x + {-middle})^2 = {under}"
    else:
        one, other, below = _draw(random, -9, 9), _draw(random, -9, 9), (1, _draw(random, 2, 4))[level]
        if math.gcd(other, below) != 1 or other == one * below or (level and below == 1):
            return None
        factor = _draw(random, 1, 3)
        product = factor * np.convolve([-one, 1], [-other, below])
        equation = polynomial([int(v) for v in product])
        answer = f"{one}, {other}" if below == 1 else f"{one}, {other}/{below}"
        steps = f"It is {factor}({polynomial([-one, 1])})({polynomial([-other, below])}) = 0"
    question = f"Solve {equation} = 0. Answer with all values of x, a comma between them, exactly: sqrt(2), not 1.414."
    return Idea(question, answer, reasoning=f"{steps}, so x is {answer.replace(', ', ' or ')}.")
