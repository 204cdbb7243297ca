"""Printed documents, set by Pillow: receipts, forms, pages of columns; what they say, in reading order and by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.records import Region
from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, Paint, face, grainy, text_width
from mmagent.worlds.drawing import COLOURS
from mmagent.worlds.examples import Idea, Seeded
from mmagent.worlds.passages import pick
from mmagent.worlds.things import box_text, frame_box
from mmagent.worlds.words import ADJECTIVES, CITIES, FIRST_NAMES, LAST_NAMES, MONTHS, NOUNS, VERBS

_FACES = ("sans", "serif", "times")
_PLAIN_NAMES = tuple(name for name in FIRST_NAMES if name.isascii())
_PLAIN_LAST = tuple(name for name in LAST_NAMES if name.isascii())
_PLAIN_CITIES = tuple(name for name in CITIES if name.isascii())
_INK = (28, 28, 34)


@dataclass(frozen=True)
class Line:
    """A run of text, placed at ``(x, y)`` pixels by Pillow's ``anchor``, in letters of ``size`` pixels of the typeface
    ``name``."""

    x: float
    y: float
    text: str
    size: float
    name: str
    anchor: str = "la"


@dataclass(frozen=True)
class Paper:
    """A page of ``height`` x ``width`` pixels: ``lines`` in reading order and ``rules``, lines from point to point."""

    height: int
    width: int
    lines: tuple[Line, ...]
    rules: tuple[tuple[float, float, float, float], ...] = ()

    def box(self, n: int) -> tuple[float, float, float, float]:
        """Around the ink of a line, in pixels."""
        line = self.lines[n]
        letters = face(line.name, max(round(line.size * 2), 4))
        box = letters.getbbox(line.text, anchor=line.anchor)
        x1, y1, x2, y2 = (value / 2 for value in box)
        return (
            max(line.x + x1, 0.0), max(line.y + y1, 0.0), min(line.x + x2, float(self.width)),
            min(line.y + y2, float(self.height)),
        )  # fmt: skip


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("documents/read", "ocr", 3, _read, grading.reading),
        Seeded("documents/fields", "key-information-extraction", 3, _fields, grading.fields),
        Seeded("documents/lookup", "document-qa", 3, _lookup, grading.word),
        Seeded("documents/locate", "ocr", 3, _locate, grading.box),
    )


def paint_paper(paper: Paper, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Its picture: on paper of some tint, now and then with a stain or a fold."""
    tint: Paint = [int(v) for v in (255, 253, 248) - random.integers(0, 14, 3)]
    canvas = Canvas(paper.height, paper.width, tint)
    if random.random() < 0.3:
        x, y = float(random.uniform(0, paper.width)), float(random.uniform(0, paper.height))
        canvas.disc(x, y, float(random.uniform(20, 60)), [max(v - int(random.integers(8, 20)), 0) for v in tint])
    if random.random() < 0.3:
        fold = float(random.uniform(0.3, 0.7)) * paper.height
        canvas.line([(0, fold), (paper.width, fold + 2)], 1.0, [max(v - 24, 0) for v in tint])
    ink = (_INK, COLOURS["black"], (30, 40, 90))[int(random.integers(3))]
    for x1, y1, x2, y2 in paper.rules:
        canvas.line([(x1, y1), (x2, y2)], 1.0, (120, 120, 126))
    for line in paper.lines:
        canvas.text(line.x, line.y, line.text, line.size, ink, line.anchor, line.name)
    return (grainy(canvas.pixels(), random, 0.3),)


def wrap(text: str, width: float, size: float, name: str) -> list[str]:
    """Lines no wider than ``width`` pixels, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, name) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _sentence(random: np.random.Generator) -> str:
    def one(words: Sequence[str]) -> str:
        return words[int(random.integers(len(words)))]

    forms = (
        f"the {one(ADJECTIVES)} {one(NOUNS)} {one(VERBS)} the {one(NOUNS)}",
        f"{one(_PLAIN_NAMES)} {one(VERBS)} one {one(ADJECTIVES)} {one(NOUNS)}",
        f"in {one(_PLAIN_CITIES)} the {one(NOUNS)} {one(VERBS)} its {one(NOUNS)}",
        f"every {one(NOUNS)} {one(VERBS)} {int(random.integers(2, 90))} {one(ADJECTIVES)} things",
    )
    text = forms[int(random.integers(len(forms)))]
    return text[0].upper() + text[1:] + "."


def _title(random: np.random.Generator) -> str:
    adjective, noun = pick(random, ADJECTIVES, 1)[0], pick(random, NOUNS, 1)[0]
    return f"The {adjective} {noun}".title()


def _columns(random: np.random.Generator, level: int) -> Paper:
    """A title over one, two or three columns of sentences; each column is read down before the next."""
    count = level + 1
    width, size, name = (280, 420, 560)[level], (13.0, 12.0, 11.0)[level], _FACES[int(random.integers(3))]
    margin, gap, leading = 16.0, 22.0, size * 1.42
    wide = (width - 2 * margin - gap * (count - 1)) / count
    lines = [Line(width / 2, 14, _title(random), size * 1.5, name, "ma")]
    top, bottom = 14 + size * 2.6, 0.0
    rules: list[tuple[float, float, float, float]] = []
    for n in range(count):
        text = " ".join(_sentence(random) for _ in range(int(random.integers(*((2, 4), (3, 5), (3, 5))[level]))))
        left = margin + n * (wide + gap)
        for row, words in enumerate(wrap(text, wide, size, name)):
            lines.append(Line(left, top + row * leading, words, size, name))
        bottom = max(bottom, lines[-1].y + leading)
    if random.random() < 0.5:
        between = [margin + n * (wide + gap) - gap / 2 for n in range(1, count)]
        rules += [(x, top, x, bottom) for x in between]
    return Paper(round(bottom + 14), width, tuple(lines), tuple(rules))


def _read(random: np.random.Generator, level: int) -> Idea | None:
    paper = _columns(random, level)
    if paper.height > 560:
        return None
    answer = " ".join(line.text for line in paper.lines)
    question = "Read this page: the title, then each column downwards, from left to right. Answer with the text."
    return _asked(paper, question, answer, range(len(paper.lines)))


def _asked(paper: Paper, question: str, answer: str, shown: Sequence[int] = (), reasoning: str = "") -> Idea:
    boxes = tuple(Region(0, paper.box(n), f'text "{paper.lines[n].text}"') for n in shown)
    paint: Callable[[np.random.Generator], Sequence[np.ndarray]] = lambda looks: paint_paper(paper, looks)  # noqa: E731
    return Idea(question, answer, paper, paint, boxes=boxes, reasoning=reasoning)


def _price(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


@dataclass(frozen=True)
class _Filled:
    """A paper with what it says, and by field the number of the line that says it."""

    paper: Paper
    values: dict[str, str]
    at: dict[str, int]


def _receipt(random: np.random.Generator, level: int) -> _Filled:
    """A shop, a date, goods with their prices, tax and total."""
    width, name, size = 252, ("mono", "sans")[int(random.integers(2))], 12.0
    goods = pick(random, [noun for noun in NOUNS if len(noun) < 10], (2, 4, 7)[level])
    prices = [int(p) for p in random.integers(100, 4000, len(goods))]
    counts = [int(n) for n in random.integers(1, 5 if level else 2, len(goods))]
    total = sum(p * n for p, n in zip(prices, counts, strict=True))
    shop = f"{pick(random, _PLAIN_LAST, 1)[0]} & {pick(random, _PLAIN_LAST, 1)[0]}"
    values = {"shop": shop, "date": _date(random), "total": _price(total)}
    city = pick(random, _PLAIN_CITIES, 1)[0]
    lines = [Line(width / 2, 12, shop, 17, "bold", "ma"), Line(width / 2, 36, city, size, name, "ma")]
    lines.append(Line(16, 58, values["date"], size, name))
    at = {"shop": 0, "date": 2}
    y, rules = 84.0, [(16.0, 79.0, width - 16.0, 79.0)]
    for good, price, count in zip(goods, prices, counts, strict=True):
        lines.append(Line(16, y, f"{count} x {good}" if level else good, size, name))
        lines.append(Line(width - 16, y, _price(price * count), size, name, "ra"))
        y += 19
    rules.append((16.0, y + 1, width - 16.0, y + 1))
    if level:
        tax = round(total * 0.19 / 1.19)
        values["tax"] = _price(tax)
        lines += [Line(16, y + 7, "Tax included", size, name), Line(width - 16, y + 7, values["tax"], size, name, "ra")]
        at["tax"] = len(lines) - 1
        y += 19
    lines += [Line(16, y + 8, "TOTAL", 14, "bold"), Line(width - 16, y + 8, values["total"], 14, "bold", "ra")]
    at["total"] = len(lines) - 1
    y += 34
    if level:
        values["paid by"] = ("card", "cash", "voucher")[int(random.integers(3))]
        lines.append(Line(width / 2, y, f"Paid by {values['paid by']}", size, name, "ma"))
        at["paid by"] = len(lines) - 1
        y += 22
    return _Filled(Paper(round(y + 14), width, tuple(lines), tuple(rules)), values, at)


def _date(random: np.random.Generator) -> str:
    day, month, year = int(random.integers(1, 29)), int(random.integers(1, 13)), int(random.integers(1995, 2030))
    return (f"{year}-{month:02}-{day:02}", f"{day} {MONTHS[month - 1]} {year}")[int(random.integers(2))]


def _form(random: np.random.Generator, level: int) -> _Filled:
    """Labels with what was filled in, in one or two columns of fields."""
    noun = pick(random, NOUNS, 1)[0]
    every = {
        "name": f"{pick(random, _PLAIN_NAMES, 1)[0]} {pick(random, _PLAIN_LAST, 1)[0]}",
        "city": pick(random, _PLAIN_CITIES, 1)[0],
        "date of birth": _date(random),
        "phone": f"0{int(random.integers(20, 99))} {int(random.integers(100, 999))} {int(random.integers(1000, 9999))}",
        "member no.": str(int(random.integers(10_000, 99_999))),
        "street": f"{int(random.integers(1, 199))} {pick(random, ADJECTIVES, 1)[0].title()} Street",
        "valid until": _date(random),
        "department": pick(random, ("Sales", "Archive", "Repairs", "Research", "Transport"), 1)[0],
    }
    names = pick(random, list(every), (3, 5, 8)[level])
    columns, face_name, size = (1, 1, 2)[level], _FACES[int(random.integers(3))], 12.0
    width = 280 if columns == 1 else 476
    room = (width - 32) / columns
    lines = [Line(16, 12, f"{noun.title()} {('registration', 'request', 'card')[int(random.integers(3))]}", 17, "bold")]
    rules, at = list[tuple[float, float, float, float]](), dict[str, int]()
    for n, name in enumerate(names):
        x, y = 16 + n % columns * room, 48.0 + n // columns * 44
        lines.append(Line(x, y, name.capitalize(), size * 0.88, face_name))
        lines.append(Line(x + 4, y + 15, every[name], size * 1.1, "mono"))
        at[name] = len(lines) - 1
        rules.append((x, y + 33, x + room - 14, y + 33))
    height = round(48 + -(-len(names) // columns) * 44 + 10)
    return _Filled(Paper(height, width, tuple(lines), tuple(rules)), {name: every[name] for name in names}, at)


def _invoice(random: np.random.Generator, level: int) -> _Filled:
    """Sender, addressee and numbers in corners of their own, then one line of what is owed."""
    width, name, size = 420, _FACES[int(random.integers(3))], 12.0
    sender, to = (f"{pick(random, _PLAIN_NAMES, 1)[0]} {pick(random, _PLAIN_LAST, 1)[0]}" for _ in range(2))
    values = {
        "sender": f"{pick(random, _PLAIN_LAST, 1)[0]} Ltd", "to": to, "number": f"R-{int(random.integers(1000, 9999))}",
        "date": _date(random), "amount": _price(int(random.integers(1000, 900_000))),
    }  # fmt: skip
    city, due = pick(random, _PLAIN_CITIES, 1)[0], _date(random)
    lines = [
        Line(18, 14, values["sender"], 18, "bold"), Line(18, 38, city, size, name),
        Line(width - 18, 16, "INVOICE", 15, "bold", "ra"), Line(width - 18, 38, values["number"], size, name, "ra"),
        Line(18, 76, "To", size * 0.9, name), Line(18, 92, values["to"], size * 1.1, name),
        Line(width - 18, 76, "Date", size * 0.9, name, "ra"),
        Line(width - 18, 92, values["date"], size * 1.1, name, "ra"),
        Line(18, 132, f"For {pick(random, ADJECTIVES, 1)[0]} {pick(random, NOUNS, 1)[0]}", size * 1.1, name),
        Line(width - 18, 132, values["amount"], size * 1.1, name, "ra"),
    ]  # fmt: skip
    at = {"sender": 0, "to": 5, "number": 3, "date": 7, "amount": 9}
    if level == 2:
        values["pay by"], values["contact"] = due, sender
        lines += [Line(18, 176, f"Pay by {due}", size, name), Line(18, 196, f"Questions: {sender}", size, name)]
        at |= {"pay by": 10, "contact": 11}
    rules = ((18.0, 122.0, width - 18.0, 122.0), (18.0, 156.0, width - 18.0, 156.0))
    return _Filled(Paper(176 if level < 2 else 226, width, tuple(lines), rules), values, at)


def _filled(random: np.random.Generator, level: int) -> _Filled:
    kinds = (_receipt, _form) if level == 0 else (_receipt, _form, _invoice)
    return kinds[int(random.integers(len(kinds)))](random, level)


def _fields(random: np.random.Generator, level: int) -> Idea | None:
    filled = _filled(random, level)
    names = ", ".join(f'"{name}"' for name in filled.values)
    question = f"Write down what this document says as a JSON object of texts, as printed, with the fields {names}."
    return _asked(filled.paper, question, json.dumps(filled.values), list(filled.at.values()))


def _lookup(random: np.random.Generator, level: int) -> Idea | None:
    filled = _filled(random, level)
    name = pick(random, list(filled.values), 1)[0]
    question = f'What does the document give as "{name}"? Answer with the text as printed.'
    return _asked(filled.paper, question, filled.values[name], [filled.at[name]])


def _locate(random: np.random.Generator, level: int) -> Idea | None:
    """Where a line of text stands; one that is there once."""
    paper = _columns(random, level) if random.random() < 0.5 else _filled(random, level).paper
    n = int(random.integers(len(paper.lines)))
    text = paper.lines[n].text
    if paper.height > 560 or len(text) < 3 or sum(text in line.text for line in paper.lines) > 1:
        return None
    truth = frame_box(paper.box(n), (paper.height, paper.width))
    question = (
        f'Where does it say "{text}"? Answer with the box of the text as x1,y1,x2,y2, in thousandths of the picture\'s '
        "width and height (0 to 999)."
    )
    return _asked(paper, question, box_text(truth), [n])
