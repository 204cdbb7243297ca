"""Bodies and their fields, read strictly: what is malformed is refused by name, and nothing costs more than its bytes.

JSON is refused where two readers may understand it differently (a name said twice, NaN) and where reading it would cost
far more memory than it has bytes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmagent.chat import require_text
from mmagent.serve.refusals import Refused, bad

DEEPEST = 64
"""Lists and objects within one another; declarations of tools have about ten."""
MOST_ITEMS, MOST_CONTAINERS = 2_000_000, 300_000
"""Commas and opening brackets of a body: an empty list costs thirty times the memory of its three bytes."""


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises :class:`Refused` (400) saying why it is none."""
    for marks, most in (((b",",), MOST_ITEMS), ((b"[", b"{"), MOST_CONTAINERS)):
        if (found := sum(map(body.count, marks))) > most:
            raise bad(f"the body has {found} of {b' and '.join(marks).decode()}, more than {most}")
    try:
        read = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
    except RecursionError as error:
        raise bad(f"the body's lists and objects stand more than {DEEPEST} deep in one another") from error
    except UnicodeDecodeError as error:
        raise bad(f"the body is no UTF-8: byte {error.start}") from error
    except ValueError as error:
        raise bad(f"the body is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise bad(f"the body must be a JSON object, got {_kind(read)}")
    _require_shallow(read)
    return read


def _no_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r:.80} is said twice in one object")
    return read


def _require_shallow(value: Any) -> None:
    """Whoever writes JSON again, or walks through it, does so by recursion."""
    level, depth = [value], 1
    while level:
        if depth > DEEPEST:
            raise bad(f"the body's lists and objects stand more than {DEEPEST} deep in one another")
        inner: list[Any] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            inner += [item for item in items if isinstance(item, dict | list)]
        level, depth = inner, depth + 1


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**40:  # which Python would not write
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else _kind(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """The fields of one object, taken one by one; :meth:`done` refuses what nobody took.

    A field that is null counts as absent, as OpenAI's clients send it. ``inside`` names the object that holds them, ""
    for the request itself. All methods raise :class:`Refused` (400) naming the field.
    """

    def __init__(self, values: Mapping[str, Any], inside: str = ""):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._inside = f"{inside}." if inside else ""
        self._known: set[str] = set()

    def place(self, name: str) -> str:
        return self._inside + name

    def problem(self, name: str, problem: str, code: str = "") -> Refused:
        return bad(f"{self.place(name)}: {problem}", self.place(name), code)

    def take(self, name: str) -> Any:
        """As it stands; None where it is absent."""
        self._known.add(name)
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.problem(name, f"must be a whole number from {low} to {high}, got {shown(value)}")
        return value

    def number(
        self, name: str, low: float, high: float, default: float, *, above: bool = False, below: bool = False
    ) -> float:
        """``above``: ``low`` itself is too little; ``below``: ``high`` itself is too much."""
        value = self.take(name)
        if value is None:
            return default
        fits = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
        if not fits or not low <= value <= high or (above and value == low) or (below and value == high):
            wanted = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            wanted += ", which itself is too much" if below else ""
            raise self.problem(name, f"must be a number {wanted}, got {shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.problem(name, f"must be true or false, got {shown(value)}")
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name)
        return default if value is None else self.checked(name, value)

    def checked(self, name: str, value: Any) -> str:
        """A text that can be encoded."""
        try:
            return require_text(self.place(name), value)
        except ValueError as error:
            raise bad(str(error), self.place(name)) from error

    def objects(self, name: str) -> list[dict[str, Any]] | None:
        value = self.take(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise self.problem(name, f"must be a list of objects, got {shown(value)}")
        return value

    def within(self, name: str) -> Fields:
        """The fields of an object among the fields, of none where it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.problem(name, f"must be an object, got {shown(value)}")
        return Fields(value or {}, self.place(name))

    def ids(self, name: str, value: Any, size: int) -> tuple[int, ...]:
        """A list of token ids below ``size``."""
        if not isinstance(value, list):
            raise self.problem(name, f"must be a list of token ids, got {shown(value)}")
        for n, index in enumerate(value):
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
                raise self.problem(f"{name}[{n}]", f"must be a token id from 0 to {size - 1}, got {shown(index)}")
        return tuple(value)

    def only(self, name: str, neutral: Sequence[Any], why: str) -> None:
        """A field that is known, and only taken where it changes nothing."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(v) and value == v for v in neutral):
            raise self.problem(name, why, "unsupported")

    def done(self, ignored: Iterable[str] = ()) -> None:
        """Refuses the first field that nobody took; ``ignored`` have no effect."""
        known = {*self._known, *ignored}
        for name in self._values:
            if name not in known:
                near = difflib.get_close_matches(name[:100], known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise self.problem(name[:100], f"is no field that is known here{hint}", "unknown_field")
