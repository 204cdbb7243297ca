r"""What a worked answer states as its result, and which value or texts that is.

A result is what stands in the last ``\boxed{}``, behind the last "answer is" or "answer:", or in the last line. It is
hostile: lengths are bounded, patterns take linear time, and formulas are read by the grammar of
`mmagent.worlds.expressions`, never run. What is stated must be one value as a whole, with its unit: to take a number
out of ``5 or 7`` or ``12\sqrt{3}`` would make wrong answers right. Of a last line alone, a sentence as it may be, the
last number counts that stands free.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from mmagent.worlds.expressions import LONGEST as LONGEST_FORMULA
from mmagent.worlds.expressions import Unreadable, value_of
from mmagent.worlds.grading import read_number

LONGEST = 2000
"""Characters of a short answer that are read."""
BOXED = 200
"""Characters that a box may hold."""
REASONED = 20_000
"""Characters of an answer that ends in its result."""
_STATED = re.compile(r"\banswer(?: is\b:?|:| =)", re.IGNORECASE)


class Value(NamedTuple):
    """A number and its ``unit``, empty where none is said."""

    number: complex
    unit: str = ""


def read(answer: str, longest: int = LONGEST) -> str:
    """An answer without space around it. Raises ``ValueError`` for one that is empty or too long."""
    if len(answer) > longest:
        raise ValueError(f"an answer of {len(answer)} characters, at most {longest} are read")
    if not answer.strip():
        raise ValueError("an empty answer")
    return answer.strip()


def stated(answer: str) -> tuple[str, bool]:
    """What a worked answer gives as its result: what its last ``\\boxed{}`` holds; else the line behind its last
    "answer is" or "answer:"; else its last line. And whether it said so, which a last line does not."""
    said = read(answer, REASONED)
    at = said.rfind("\\boxed{")
    if at >= 0:
        depth, start = 0, at + len("\\boxed{")
        for place in range(start, min(len(said), start + BOXED)):
            depth += {"{": 1, "}": -1}.get(said[place], 0)
            if depth < 0:
                return said[start:place].strip(), True
    marks = list(_STATED.finditer(said))
    if marks:
        behind = said[marks[-1].end() :].strip().split("\n")[0].strip()
        if behind:
            return behind, True
    return said.split("\n")[-1].strip(), False


def pieces(said: str, sure: bool) -> tuple[str, ...]:
    """What of a result may be read as a whole: all of it, or what stands before a reason ("5, as ...") or the next
    sentence where it was ``sure``; behind the last "is" of a last line."""
    if len(said) > LONGEST:
        return ()
    return said, _REASON.split(said, maxsplit=1)[0] if sure else _IS.split(said)[-1]


_REASON = re.compile(r"\.\s+(?=[A-Z][a-z])|,?\s(?:as|since|because)\s")
_IS = re.compile(r"\s(?:is|are)\s")


# ------------------------------------------------------------------------------------------ texts


_SET = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathsf|mathbf|mathit|mathtt|boldsymbol|bm|mbox|emph|"
    r"underline)\s?\{([^{}]{0,200})\}"
)
_DOLLARS = re.compile(r"\$\$?([^$]{0,300})\$\$?")
_STARS = re.compile(r"(?<![\w)}])\*\*([^*]{1,200})\*\*")
_NOTHING = re.compile(r"\\[!()\[\]]|\\(?:rm|bf|it|sf|tt|displaystyle|textstyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])")
_SPACE = re.compile(r"\\[,;: >]|~|\\q?quad(?![A-Za-z])")


def unset(text: str) -> str:
    """A text without what only sets it: dollar signs around formulas, stars around words, commands for letters and
    spaces. ``text`` is of bounded length."""
    text = text.replace("\\$", "＄")
    for _ in range(3):  # within one another
        text = _SET.sub(r" \1", text)
    text = _STARS.sub(r"\1", _DOLLARS.sub(r"\1", text)).replace("＄", "$")
    return _SPACE.sub(" ", _NOTHING.sub("", text))


def words(text: str) -> str:
    """A text as texts are compared where capitals count: :func:`unset`, spaces as one, no full stop."""
    plain = " ".join(unset(text).split())
    if plain.startswith("{") and plain.endswith("}") and plain.count("{") == 1:
        plain = plain[1:-1].strip()
    return plain.rstrip(".")


def small(text: str) -> str:
    """:func:`words` where capitals do not count."""
    return words(text).lower()


def bare(text: str) -> str:
    """A text as results are compared: small letters, without space, without brackets around a single letter, and
    without what it is said to be equal to."""
    plain = "".join(_tidy(text).lower().split())
    return plain[1] if _BRACKETED.fullmatch(plain) else plain


_BRACKETED = re.compile(r"\([a-z]\)")


def alike(said: str, truth: str, depth: int = 4) -> bool:
    """Whether two results are one: the same text, the same value to two decimals, or a list, a tuple or an interval of
    such, element by element."""
    if bare(said) == bare(truth):
        return bool(bare(said))
    values = value_in(said), value_in(truth)
    if values[0] is not None and values[1] is not None:
        return same_value(values[0], values[1], places=2)
    first, second = _elements(said), _elements(truth)
    if not first or not second or depth == 0:
        return False
    (around, left), (beside, right) = first, second
    if around != beside or len(left) != len(right):
        return False
    if "=" in said or "=" in truth:  # which is which must be told alike
        return "".join("".join(left).lower().split()) == "".join("".join(right).lower().split())
    return all(alike(one, other, depth - 1) for one, other in zip(left, right, strict=True))


def _elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list and what stands between its commas; None for what is none."""
    text = _tidy(text)
    if len(text) > LONGEST_FORMULA:
        return None
    around = ""
    if text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}") and _closes_last(text):
        around, text = text[0] + text[-1], text[1:-1]
    found, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            found.append("")
        else:
            found[-1] += sign
    return (around, found) if len(found) > 1 else None


def _closes_last(text: str) -> bool:
    """Whether the bracket that a text begins with closes at its end."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def list_in(text: str) -> list[Value | None]:
    """The values of the last ``[...]`` in a text; commas stand between them, never within. Raises ``ValueError`` where
    there is no list."""
    lists = _LIST.findall(text[-LONGEST:])
    if not lists:
        raise ValueError(f"{text[:60]!r} holds no list")
    return [value_in(each) for each in lists[-1].split(",")]


_LIST = re.compile(r"\[([^\[\]]{0,300})\]")


# ------------------------------------------------------------------------------------------ values


_WRITTEN = {
    "\\approx": "=", "\\simeq": "=", "≈": "=", "^{\\circ}": "°", "^\\circ": "°", "\\degree": "°", "π": "\\pi ",
    "√": "\\sqrt ", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "{,}": ",", "\\%": "%", "−": "-", "\\colon": ":",
    "\\{": "{", "\\}": "}", "\\div": "/", "÷": "/",
}  # fmt: skip
_EQUALS = re.compile(r"(?<![<>!])=")
_SEVERAL = re.compile(r"[,;]|\b(?:or|and)\b")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3}){1,6}(?![\d,])", re.ASCII)
_HEDGE = re.compile(r"(?:about|approximately|roughly|exactly)\s+", re.IGNORECASE)
_CURRENCY = re.compile(r"([-+]?)\s?[$€£¥]\s?")
_UNIT_WORD = r"[A-Za-zµμΩ]{1,20}(?:\^\{?-?[1-3]\}?|[²³]|[23](?!\d))?"
_UNIT = re.compile(
    rf"(.*(?:[\d)}}]|\\pi))(\s*)(%|°\s?[CF]?|{_UNIT_WORD}(?:(?:\s?/\s?|\s){_UNIT_WORD}){{0,3}})", re.DOTALL | re.ASCII
)
_SYMBOLS = frozenset(
    (
        "mm", "cm", "dm", "m", "km", "in", "ft", "yd", "mi", "mg", "g", "kg", "lb", "oz", "ms", "s", "min", "h", "hr",
        "hrs", "ml", "mL", "l", "L", "dl", "cl", "N", "kN", "J", "kJ", "W", "kW", "V", "A", "mA", "K", "C", "F", "Hz",
        "kHz", "MHz", "Pa", "kPa", "mph", "px", "deg", "rad", "sq", "unit", "units", "degree", "degrees", "percent",
    )
)  # fmt: skip
"""Units that may be short, and follow a number without a space: others would be letters of a formula."""
_NO_UNITS = frozenset(
    (
        "or", "and", "to", "but", "not", "plus", "minus", "times", "over", "pi", "sqrt", "frac", "sin", "cos", "tan",
        "log", "ln", "exp", "hundred", "hundreds", "thousand", "thousands", "million", "millions", "billion",
        "billions", "trillion", "dozen", "dozens", "half", "halves", "third", "thirds", "quarter", "quarters",
        "squared", "cubed", "factorial", "choose", "mod", "less", "than",
    )
)  # fmt: skip
"""Words behind a number that make another one of it, or a formula."""
_SAME_UNITS = {"degree": "°", "degrees": "°", "deg": "°", "percent": "%", "unit": "", "units": ""}
_MIXED = re.compile(r"([-+]?)(\d{1,9})\s+(\d{1,9})/(\d{1,9})", re.ASCII)
_MIXED_FORMULA = re.compile(r"(?<![\w.}^)])(?<!\d\s)(\d{1,9})\s?\\frac\{(\d{1,9})\}\{(\d{1,9})\}", re.ASCII)
_HAS_VALUE = re.compile(r"\d|(?<![A-Za-z])pi(?![A-Za-z])", re.ASCII)


def result(said: str, sure: bool) -> Value:
    """The value that a result is (:func:`stated`): all of it, or what is stated before a reason; of a last line also
    what stands behind its last "is", or its last number. Raises ``ValueError`` where there is none."""
    for piece in pieces(said, sure):
        found = value_in(piece)
        if found is not None:
            return found
    if sure:
        raise ValueError(f"{said[:60]!r} is no number, as a whole")
    return _last_number(said)


def value_in(text: str) -> Value | None:
    """The value that a text is, as a whole: one number or formula without letters, ``pi`` and ``e`` apart, a currency
    before it or a unit behind. None for anything else; a single letter is a text."""
    if len(text) > LONGEST:
        return None
    text = _CURRENCY.sub(r"\1", _tidy(text), count=1) if _CURRENCY.match(_tidy(text)) else _tidy(text)
    if len(text) > LONGEST_FORMULA:
        return None
    found = _UNIT.fullmatch(text)
    if found and _is_unit(found[3], glued=not found[2]):
        number = _number(found[1])
        if number is not None:
            return Value(number, _unit(found[3]))
    number = _number(text)
    return None if number is None else Value(number)


def same_value(one: Value, other: Value, places: int = 9) -> bool:
    """Whether two values are one, rounded to so many decimals; a unit that only one of them has does not count."""
    if one.unit and other.unit and one.unit != other.unit:
        return False
    alike = abs(one.number.imag - other.number.imag) < 0.5 * 10**-places
    return alike and round(one.number.real, places) == round(other.number.real, places)


def _tidy(text: str) -> str:
    """A result in plain signs, behind what it is said to equal; all of it where it says so of several things."""
    text = unset(text[:LONGEST])
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text) if "=" in text else text
    said = _EQUALS.split(text)
    if not any(_SEVERAL.search(part) for part in said[1:-1]):
        text = said[-1]
    return _HEDGE.sub("", text.strip().strip("*").strip().lstrip(":").strip(), count=1).rstrip(".;,").strip()


def _is_unit(unit: str, *, glued: bool) -> bool:
    names = re.findall(r"[A-Za-zµμΩ]+", unit)
    if any(name.lower() in _NO_UNITS for name in names):
        return False
    return all(name in _SYMBOLS or (len(name) > 2 and not glued) for name in names)


def _unit(said: str) -> str:
    plain = "".join(said.split()).translate(str.maketrans({"{": "", "}": "", "²": "^2", "³": "^3"}))
    return _SAME_UNITS.get(plain.lower(), plain)


def _number(text: str) -> complex | None:
    """What a text without a unit is worth."""
    text = text.strip()
    if not re.search("[A-Za-z]", text):
        if mixed := _MIXED.fullmatch(text):
            whole, above, below = (int(mixed[n]) for n in (2, 3, 4))
            return complex((-1 if mixed[1] == "-" else 1) * (whole + above / below)) if above < below else None
        exact = read_number(text)
        if exact is not None:
            return complex(float(exact))
    if not _HAS_VALUE.search(text):
        return None
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    try:
        return value_of(_MIXED_FORMULA.sub(_summed, _braced(text)))
    except Unreadable:
        return None


def _summed(found: re.Match[str]) -> str:
    """A whole number before a proper fraction is added to it, not multiplied."""
    if int(found[2]) >= int(found[3]):
        return found[0]
    return rf"({found[1]}+\frac{{{found[2]}}}{{{found[3]}}})"


def _braced(text: str) -> str:
    """A formula whose fractions have braces around both parts: LaTeX takes the next sign of ``\\frac12``."""
    at = len(text)
    while (at := text.rfind("\\frac", 0, at)) >= 0:
        place, parts = at + len("\\frac"), []
        for _ in range(2):
            while text[place : place + 1].isspace():
                place += 1
            end = _end_of_group(text, place)
            part = text[place:end]
            parts.append(part if part.startswith("{") else f"{{{part}}}")
            place = end
        text = f"{text[:at]}\\frac{parts[0]}{parts[1]}{text[place:]}"
    return text


def _end_of_group(text: str, start: int) -> int:
    """Where the sign or the braces at ``start`` end."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth <= 0:
            return place + 1
    return len(text)


_FREE = re.compile(r"(?:(?<![\w)\]}.%°])[-+])?(?<![\w.])(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?", re.ASCII)
_GLUE = "\\^_{}/√²³"
_RATIO = re.compile(r"\d\s?:\s?\Z", re.ASCII)


def _last_number(line: str) -> Value:
    """The last number of a line, which must stand free: not the 3 of ``2\\sqrt{3}``, ``10^3`` or ``3x``."""
    text = unset(line[-LONGEST:])
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    every = list(_FREE.finditer(text))
    found = every[-1] if every else None
    if found is None or (found.start() == 0 and len(line) > LONGEST):
        raise ValueError(f"{line[-60:]!r} holds no number")
    letters = re.match("[A-Za-z]*", text[found.end() :])
    assert letters is not None
    before, behind = text[: found.start()][-1:], text[found.end() : found.end() + 1]
    said = found[0].rstrip(",")
    number = read_number(said if _THOUSANDS.search(said) else said.split(",")[-1])
    if (
        number is None
        or _RATIO.search(text[: found.start()])
        or (before and before in _GLUE)
        or (behind and behind in _GLUE)
        or (letters[0] and letters[0] not in _SYMBOLS)
    ):
        raise ValueError(f"{line[-60:]!r}: its last number is part of something else")
    return Value(complex(float(number)))
