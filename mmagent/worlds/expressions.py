"""Formulas that somebody wrote, read and compared without running anything.

Whether two formulas are one is undecidable, and simplifiers take as long as they like. So a formula is read by a
grammar of bounded length and depth, and two are equal where their values agree at points that were drawn once, in
complex numbers: the time is that of a few hundred operations, whatever was written. A formula that is another one
agrees at every point only by being made for it.
"""

from __future__ import annotations

import cmath
import random
import re
from collections.abc import Callable, Mapping

LONGEST = 300
"""Characters of a formula that is read."""
DEEPEST = 24
"""Brackets, signs and powers within one another."""
TOLERANCE = 1e-5
"""Relative, of values that must agree."""
POINTS = tuple(complex(r.uniform(0.4, 2.6), r.uniform(-0.4, 0.4)) for r in [random.Random(7)] for _ in range(8))
_TOKEN = re.compile(r"\s*(?:(\d{1,15}(?:\.\d{1,15})?)|\\?([A-Za-z]+)|(\*\*|[-+*/^(){}]))", re.ASCII)
_FUNCTIONS: Mapping[str, Callable[[complex], complex]] = {
    "sqrt": cmath.sqrt, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp, "ln": cmath.log,
    "log": cmath.log,
}  # fmt: skip
_CONSTANTS = {"pi": complex(cmath.pi), "e": complex(cmath.e)}
_PLAIN = ((r"\left", ""), (r"\right", ""), (r"\cdot", "*"), (r"\times", "*"), ("·", "*"), ("×", "*"), ("−", "-"))
Values = Mapping[str, complex]


class Unreadable(ValueError):
    """A text that is no formula of this grammar; the message says where it ceases to be one."""


def value_of(text: str, values: Values | None = None) -> complex:
    """The value of a formula where its letters stand for ``values``.

    Numbers, ``+ - * / ^``, brackets, products without a sign (``3x``, ``2(x+1)``), :data:`_FUNCTIONS`, ``pi``, ``e``,
    and the same in LaTeX with ``\\frac`` and ``\\sqrt``. Raises :class:`Unreadable` for anything else, for values that
    are not finite or too large, and for letters without a value.
    """
    if len(text) > LONGEST:
        raise Unreadable(f"{len(text)} characters, at most {LONGEST} are read")
    for written, plain in _PLAIN:
        text = text.replace(written, plain)
    reader = _Reader(_tokens(text), values or {})
    try:
        value = reader.sum(0)
    except (OverflowError, ZeroDivisionError, ValueError) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"no value: {error}") from error
    if reader.next:
        raise Unreadable(f"{reader.next!r} is not expected")
    if not cmath.isfinite(value) or abs(value) > 1e30:
        raise Unreadable("the value is not finite or too large")
    return value


def near(one: complex, other: complex) -> bool:
    """Whether two values agree but for :data:`TOLERANCE` of the second."""
    return abs(one - other) <= TOLERANCE * max(abs(other), 1e-9)


def same(said: str, truth: str, letter: str = "x") -> bool:
    """Whether two formulas in one ``letter`` are equal. Raises :class:`Unreadable` for either."""
    return all(near(value_of(said, {letter: at}), value_of(truth, {letter: at})) for at in POINTS)


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    text = text.strip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise Unreadable(f"{text[at : at + 10]!r} is no part of a formula")
        found.append(token[1] or token[2] or token[3])
        at = token.end()
    return found


class _Reader:
    """Reads tokens from the left, and works out what they say on the way."""

    def __init__(self, tokens: list[str], values: Values):
        self.tokens, self.values, self.at = tokens, values, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> bool:
        found = self.next in wanted and bool(self.next)
        self.at += found
        return found

    def need(self, wanted: str) -> None:
        if not self.take(wanted):
            raise Unreadable(f"{self.next or 'the end'!r} where {wanted!r} should stand")

    def sum(self, depth: int) -> complex:
        if depth > DEEPEST:
            raise Unreadable("nested too deep")
        total = self.product(depth)
        while self.next in ("+", "-") and self.next:
            sign = -1 if self.take("-") else self.take("+")
            total += sign * self.product(depth)
        return total

    def product(self, depth: int) -> complex:
        value = self.signed(depth)
        while self.next:
            if self.take("*"):
                value *= self.signed(depth)
            elif self.take("/"):
                value /= self.signed(depth)
            elif self.next[0].isalpha() or self.next == "(":  # a number behind a factor is no product: "2 3"
                value *= self.power(depth)
            else:
                break
        return value

    def signed(self, depth: int) -> complex:
        if depth > DEEPEST:
            raise Unreadable("nested too deep")
        if self.take("-"):
            return -self.signed(depth + 1)
        return self.signed(depth + 1) if self.take("+") else self.power(depth)

    def power(self, depth: int) -> complex:
        base = self.atom(depth)
        return base ** self.signed(depth + 1) if self.take("^", "**") else base

    def atom(self, depth: int) -> complex:
        for opening, closing in (("(", ")"), ("{", "}")):
            if self.take(opening):
                value = self.sum(depth + 1)
                self.need(closing)
                return value
        token = self.next
        self.at += 1
        if token[:1].isdigit():
            return complex(float(token))
        if token == "frac":
            above = self.group(depth)
            return above / self.group(depth)
        if token in _FUNCTIONS:
            return self.function(token, depth)
        if token in self.values or token in _CONSTANTS:
            return self.values.get(token, _CONSTANTS.get(token, 0j))
        if len(token) > 1 and all(letter in self.values for letter in token):  # xx
            value = complex(1)
            for letter in token:
                value *= self.values[letter]
            return value
        raise Unreadable(f"{token or 'the end'!r} where a value should stand")

    def group(self, depth: int) -> complex:
        self.need("{")
        value = self.sum(depth + 1)
        self.need("}")
        return value

    def function(self, name: str, depth: int) -> complex:
        power = self.signed(depth + 1) if self.take("^", "**") else complex(1)  # sin^2 x
        if self.next not in ("(", "{"):
            return _FUNCTIONS[name](self.power(depth + 1)) ** power
        return _FUNCTIONS[name](self.atom(depth + 1)) ** power
