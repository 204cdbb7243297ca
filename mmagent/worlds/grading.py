"""Judging answers: one function a kind of answer, from the answer and the truth to a :class:`Score`.

Whoever writes an answer is not to be trusted: it is read by patterns of bounded length, never evaluated, and what
cannot be read is wrong, not an error.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from mmagent.geometry import FRAME
from mmagent.trajectories import Score
from mmagent.worlds.examples import Example

_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3}){1,6}|\d{1,3}(?: \d{3}){1,6}|\d{1,18})?(?:\.(\d{1,18}))?", re.ASCII)
_EQUATION = re.compile(r"([A-Za-z])\s?=\s?(\S.*)", re.DOTALL)
_FRACTION = re.compile(r"([+-]?\d{1,9})\s?/\s?(\d{1,9})", re.ASCII)
_INTEGER = re.compile(r"-?\d{1,6}", re.ASCII)
_DECIMAL = re.compile(r"-?\d{1,6}(?:\.\d{1,6})?", re.ASCII)
_BETWEEN = re.compile(r"\s?\b(?:to|seconds?)\b|(?<=\d)\s?s\b|(?<=[\ds])\s*[-–—−]\s*(?=\d)")
_UNITS = ("%", "°", "degrees", "cm²", "cm2", "cm", "m²", "m2", "m", "seconds", "s")
_WRAPPING = (("$", "$"), ("**", "**"), ("`", "`"), ('"', '"'), ("\\boxed{", "}"))
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
Judge = Callable[[Example, str], Score]


def wrong(reason: str) -> Score:
    """Zero, and why, as the name of a part."""
    return Score(0.0, {reason: 1.0})


def right(value: bool) -> Score:
    return Score(float(value), {"right": float(value)})


def plain(answer: str) -> str:
    """An answer without what people write around a word or a number: quotes, stars, a full stop, doubled spaces."""
    answer = " ".join(narrow(composed(answer)).split()) if len(answer) < 2000 else answer
    for _ in range(3):
        answer = answer.removesuffix(".").removesuffix("。").strip()
        for opening, closing in _WRAPPING:
            if len(answer) > len(opening) + len(closing) and answer.startswith(opening) and answer.endswith(closing):
                answer = answer[len(opening) : -len(closing)].strip()
    return answer


def composed(text: str) -> str:
    """Letters and their accents as one sign each: the same word is the same text however it was typed."""
    return unicodedata.normalize("NFC", text)


def narrow(text: str) -> str:
    """Full-width letters, digits and signs, as Chinese and Japanese keyboards write them, as the plain ones that they
    stand for. Not all that Unicode calls compatible: a raised two is no two."""
    return text.translate(_NARROW)


def read_number(text: str) -> Fraction | None:
    """A number as people write it, exactly: ``-1,250.5``, ``1 250``, ``3/4``, ``12 %``, ``$7``, full-width digits. None
    for anything else, powers of ten, infinities and digits of other scripts among it."""
    if len(text) > 60:
        return None
    text = plain(text).replace("−", "-").removeprefix("$").removeprefix("€").strip()
    for unit in _UNITS:
        if text.endswith(unit):
            text = text.removesuffix(unit).strip()
            break
    if ratio := _FRACTION.fullmatch(text):
        below = int(ratio[2])
        return Fraction(int(ratio[1]), below) if below else None
    found = _NUMBER.fullmatch(text)
    if found is None or (found[2] is None and found[3] is None):
        return None
    return Fraction(f"{found[1]}{re.sub('[, ]', '', found[2] or '0')}.{found[3] or '0'}")


def number(example: Example, answer: str) -> Score:
    """A number, off by at most the example's tolerance; "x = 5" says it, too, where x is what the question asks for."""
    truth, said = read_number(example.answer), read_number(_value(example.question, answer))
    assert truth is not None, f"{example.key}: {example.answer!r} is no number"
    if said is None:
        return wrong("malformed")
    return right(abs(said - truth) <= Fraction(example.tolerance) + Fraction(1, 10**9))


def _value(question: str, answer: str) -> str:
    """What stands behind the name of the unknown that ``question`` ends a sentence with, as in "Solve for x."."""
    said = _EQUATION.fullmatch(plain(answer)) if len(answer) <= 60 else None
    if said and re.search(rf"\b(?:for|find|is|of)\s+{said[1]}\s*[.?]", question, re.IGNORECASE):
        return said[2]
    return answer


def word(example: Example, answer: str) -> Score:
    """A word or a name; capitals do not matter."""
    return right(plain(answer).casefold() == plain(example.answer).casefold())


def verbatim(example: Example, answer: str) -> Score:
    """Exactly these characters, but for space at the ends of lines and code fences around the whole."""
    return right(lines_of(unfenced(answer)) == lines_of(example.answer))


def reading(example: Example, answer: str) -> Score:
    """Text that was read: 1 - edit distance / the longer length, over its characters with runs of space as one."""
    truth, said = (" ".join(composed(text).split()) for text in (example.answer, unfenced(answer)))
    alike = similarity(truth, said)
    return Score(alike, {"similarity": alike, "right": float(truth == said)})


def items(example: Example, answer: str) -> Score:
    """Words in order, with commas (or lines) between them."""
    return right(_list(answer) == _list(example.answer))


def members(example: Example, answer: str) -> Score:
    """Words in any order; each said once."""
    return right(sorted(_list(answer)) == sorted(_list(example.answer)))


def _list(answer: str) -> list[str]:
    return [plain(item).casefold() for item in re.split(r"[,\n;、]", narrow(answer).strip().strip("[]()")[:4000])]


def read_box(text: str) -> tuple[int, ...] | None:
    """``x1,y1,x2,y2`` in the frame of coordinates, in any brackets; None for anything else."""
    numbers = read_integers(text, 4)
    if numbers is None or not all(0 <= n < FRAME for n in numbers):
        return None
    return numbers if numbers[0] <= numbers[2] and numbers[1] <= numbers[3] else None


def read_integers(text: str, wanted: int) -> tuple[int, ...] | None:
    """So many integers with commas or spaces between them, in any brackets."""
    bare = re.sub(r"[\[\]()<>{}]", " ", narrow(text[:200])).replace(",", " ").split() if len(text) <= 200 else []
    if len(bare) != wanted or not all(_INTEGER.fullmatch(word) for word in bare):
        return None
    return tuple(int(word) for word in bare)


def read_decimals(text: str, wanted: int) -> tuple[float, ...] | None:
    """So many numbers with commas or spaces between them, in any brackets."""
    if len(text) > 200:
        return None
    bare = re.sub(r"[\[\]()<>{},]", " ", narrow(text)).split()
    if len(bare) != wanted or not all(_DECIMAL.fullmatch(word) for word in bare):
        return None
    return tuple(float(word) for word in bare)


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes ``(x1, y1, x2, y2)`` whose last cell counts, as those of the frame do."""
    shared, areas = 1.0, [1.0, 1.0]
    for low in range(2):
        high = low + 2
        shared *= max(min(one[high], other[high]) - max(one[low], other[low]) + 1, 0)
        areas = [a * (box[high] - box[low] + 1) for a, box in zip(areas, (one, other), strict=True)]
    return shared / (sum(areas) - shared)


def box(example: Example, answer: str) -> Score:
    """A box of the frame: its intersection over union with the true one, 0 below a half."""
    truth, said = read_box(example.answer), read_box(answer)
    assert truth is not None, f"{example.key}: {example.answer!r} is no box"
    if said is None:
        return wrong("malformed")
    iou = overlap(truth, said)
    return Score(iou if iou >= 0.5 else 0.0, {"iou": iou, "right": float(iou >= 0.5)})


def point(example: Example, answer: str) -> Score:
    """A point of the frame within the box of the frame that ``example.state`` is."""
    truth = example.state
    assert isinstance(truth, tuple), f"{example.key}: no box to point into"
    said = read_integers(answer, 2)
    if said is None or not all(0 <= n < FRAME for n in said):
        return wrong("malformed")
    x1, y1, x2, y2 = truth
    return right(x1 <= said[0] <= x2 and y1 <= said[1] <= y2)


def interval(example: Example, answer: str) -> Score:
    """``from-to`` in seconds, a comma, a dash or "to" between them: intersection over union of the times, 0 below a
    half."""
    truth, said = (read_decimals(_BETWEEN.sub(" ", text[:200]), 2) for text in (example.answer, answer))
    assert truth is not None, f"{example.key}: {example.answer!r} is no interval"
    if said is None or said[0] > said[1]:
        return wrong("malformed")
    shared = max(min(truth[1], said[1]) - max(truth[0], said[0]), 0.0)
    iou = shared / max(truth[1] - truth[0] + said[1] - said[0] - shared, 1e-9)
    return Score(iou if iou >= 0.5 else 0.0, {"iou": iou, "right": float(iou >= 0.5)})


def fields(example: Example, answer: str) -> Score:
    """A JSON object of texts, numbers and lists: the share of fields that are right, among those asked and given."""
    truth, said = read_object(example.answer), read_object(answer)
    assert truth, f"{example.key}: {example.answer!r:.80} is no object"
    if said is None:
        return wrong("malformed")
    good = sum(key in said and _same(truth[key], said[key]) for key in truth)
    share = good / max(len(truth), len(said), 1)
    return Score(share, {"fields": share, "right": float(share == 1.0)})


def read_object(text: str) -> Mapping[str, object] | None:
    """A JSON object, in a fence or bare; None for anything else, names that stand twice included."""

    def once_each(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        read = dict(pairs)
        if len(read) < len(pairs):
            raise ValueError("a name twice")
        return read

    try:
        found = json.loads(unfenced(text), object_pairs_hook=once_each)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _same(truth: object, said: object) -> bool:
    if isinstance(truth, list):
        alike = isinstance(said, list) and len(truth) == len(said)
        return alike and all(_same(a, b) for a, b in zip(truth, said, strict=True))
    if isinstance(truth, dict):
        return isinstance(said, dict) and truth.keys() == said.keys() and all(_same(truth[k], said[k]) for k in truth)
    if isinstance(truth, bool) or isinstance(said, bool) or truth is None:
        return truth is said
    if isinstance(said, list | dict):
        return False
    one, other = read_number(str(truth)[:60]), read_number(str(said)[:60])
    if one is not None and other is not None:
        return one == other
    return plain(str(truth)).casefold() == plain(str(said)[:2000]).casefold()


def unfenced(answer: str) -> str:
    """What a code fence around the whole answer holds."""
    answer = answer.strip("\n")
    bare = answer.strip()
    if bare.startswith("```") and bare.endswith("```") and len(bare) > 6 and "\n" in bare:
        return bare[bare.index("\n") + 1 : -3].strip("\n")
    return answer


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in composed(text).strip("\n").splitlines()]


def similarity(truth: Sequence[object], said: Sequence[object]) -> float:
    """1 - edit distance / the longer length; 1 for two empty ones, 0 where one is far longer than the other."""
    longest = max(len(truth), len(said))
    if longest == 0:
        return 1.0
    if len(said) > 4 * len(truth) + 200:
        return 0.0
    return 1.0 - edit_distance(truth, said) / longest


def edit_distance(one: Sequence[object], other: Sequence[object]) -> int:
    """The fewest insertions, deletions and replacements of items that make one sequence the other: a row of the table
    at a time, in ``O(len(one))`` operations on arrays."""
    numbers: dict[object, int] = {}
    a, b = (np.array([numbers.setdefault(item, len(numbers)) for item in row], dtype=np.int64) for row in (one, other))
    if len(a) > len(b):
        a, b = b, a
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for n, item in enumerate(a, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != item))
        # an insertion costs one more than what stands to its left: a running minimum once the steps are taken out
        row = np.minimum.accumulate(np.concatenate([[n], best]) - steps) + steps
    return int(row[-1])
