"""Code: reading it from a picture, and telling what it prints. The programs are made here together with their output:
each line is carried out by the generator as it is written, so nothing is ever run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, Paint, grainy, text_width
from mmagent.worlds.examples import Idea, Seeded
from mmagent.worlds.words import NOUNS

_NAMES = ("a", "b", "n", "x", "y", "total", "count", "left", "size", "value", "step")
_LISTS = ("items", "row", "data", "numbers")
_THEMES = (
    ((255, 255, 255), (36, 41, 47), (207, 34, 46), (10, 48, 105), (110, 119, 129)),
    ((40, 42, 54), (248, 248, 242), (255, 121, 198), (241, 250, 140), (98, 114, 164)),
    ((253, 246, 227), (88, 110, 117), (133, 153, 0), (42, 161, 152), (147, 161, 161)),
    ((13, 17, 23), (201, 209, 217), (255, 123, 114), (165, 214, 255), (139, 148, 158)),
)
"""Ground, ink, keywords, texts and numbers, line numbers."""
_WORDS = re.compile(r"(\"[^\"]*\"|\b\d+\b|\b[A-Za-z_]+\b|\s+|.)")
_KEYWORDS = {"for", "in", "if", "else", "while", "print", "range", "len", "sum", "max"}


@dataclass
class _Run:
    """A program in the writing: its lines so far, the numbers and lists that its names hold, and what it printed."""

    random: np.random.Generator
    lines: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    lists: dict[str, list[int]] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def draw(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high))

    def one(self, choices: Sequence[str]) -> str:
        return choices[self.draw(0, len(choices))]

    def fresh(self, names: Sequence[str]) -> str:
        return self.one([name for name in names if name not in self.numbers and name not in self.lists])


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("code/read", "ocr", 3, _read, grading.verbatim),
        Seeded("code/output", "code", 3, _output, grading.verbatim),
        Seeded("code/output-picture", "code", 3, _output_picture, grading.verbatim),
    )


def _assign(run: _Run) -> None:
    name, value = run.fresh(_NAMES), run.draw(1, 20)
    run.lines.append(f"{name} = {value}")
    run.numbers[name] = value


def _compute(run: _Run) -> None:
    one, name = run.one(list(run.numbers)), run.fresh(_NAMES)
    sign, by = run.one("+-*"), run.draw(2, 10)
    before = run.numbers[one]
    run.lines.append(f"{name} = {one} {sign} {by}")
    run.numbers[name] = {"+": before + by, "-": before - by, "*": before * by}[sign]
    run.told.append(f"{name} is {run.numbers[name]}")


def _divide(run: _Run) -> None:
    one, sign, by = run.one(list(run.numbers)), run.one(("//", "%")), run.draw(2, 8)
    value = run.numbers[one]
    run.lines.append(f"{one} = {one} {sign} {by}")
    run.numbers[one] = value // by if sign == "//" else value % by
    run.told.append(f"{one} becomes {run.numbers[one]}")


def _make_list(run: _Run) -> None:
    name, values = run.fresh(_LISTS), [run.draw(0, 30) for _ in range(run.draw(3, 6))]
    run.lines.append(f"{name} = {values}")
    run.lists[name] = values


def _loop(run: _Run) -> None:
    """Adds up a range, or what of a list a condition lets through."""
    total = run.fresh(_NAMES)
    if run.lists and run.draw(0, 2):
        name, bound = run.one(list(run.lists)), run.draw(5, 20)
        run.lines += [f"{total} = 0", f"for v in {name}:", f"    if v > {bound}:", f"        {total} += v"]
        taken = [v for v in run.lists[name] if v > bound]
        run.numbers[total] = sum(taken)
        run.told.append(f"above {bound} are {', '.join(map(str, taken)) or 'none'}, so {total} is {sum(taken)}")
    else:
        first, last, by = run.draw(0, 3), run.draw(4, 8), run.draw(2, 5)
        run.lines += [f"{total} = 0", f"for i in range({first}, {last}):", f"    {total} += i * {by}"]
        parts = [i * by for i in range(first, last)]
        run.numbers[total] = sum(parts)
        run.told.append(f"{total} is {' + '.join(map(str, parts))} = {sum(parts)}")


def _branch(run: _Run) -> None:
    name, bound = run.one(list(run.numbers)), run.draw(3, 40)
    more, less = run.draw(1, 10), run.draw(2, 4)
    run.lines += [f"if {name} > {bound}:", f"    {name} -= {more}", "else:", f"    {name} *= {less}"]
    before = run.numbers[name]
    run.numbers[name] = before - more if before > bound else before * less
    compared = "is" if before > bound else "is not"
    run.told.append(f"{before} {compared} above {bound}, so {name} becomes {run.numbers[name]}")


def _while(run: _Run) -> None:
    name, bound, factor = run.one(list(run.numbers)), run.draw(30, 120), run.draw(2, 4)
    value, steps = run.numbers[name], [run.numbers[name]]
    if value < 1:
        run.lines.append(f"{name} = {value % 5 + 1}")
        value, steps = value % 5 + 1, [value % 5 + 1]
    run.lines += [f"while {name} < {bound}:", f"    {name} *= {factor}"]
    while value < bound:  # of the generator's own number, which at least doubles
        value *= factor
        steps.append(value)
    run.numbers[name] = value
    run.told.append(f"{name} goes {', '.join(map(str, steps))}")


def _change_list(run: _Run) -> None:
    name = run.one(list(run.lists))
    kind, value = run.draw(0, 3), run.draw(0, 30)
    if kind == 0:
        run.lines.append(f"{name}.append({value})")
        run.lists[name] = [*run.lists[name], value]
    elif kind == 1:
        run.lines.append(f"{name}.sort()")
        run.lists[name] = sorted(run.lists[name])
    else:
        run.lines.append(f"{name}.reverse()")
        run.lists[name] = run.lists[name][::-1]
    run.told.append(f"{name} is {run.lists[name]}")


def _print(run: _Run) -> None:
    kinds: list[Callable[[], tuple[str, str]]] = []
    if run.numbers:
        name = list(run.numbers)[-1] if run.draw(0, 3) else run.one(list(run.numbers))
        word = run.one([noun for noun in NOUNS if len(noun) < 7])
        kinds += [lambda: (f"print({name})", str(run.numbers[name]))] * 2
        kinds += [lambda: (f'print("{word}", {name})', f"{word} {run.numbers[name]}")]
    if run.lists:
        row = run.one(list(run.lists))
        at = run.draw(0, len(run.lists[row]))
        kinds += [
            lambda: (f"print({row}[{at}])", str(run.lists[row][at])),
            lambda: (f"print(sum({row}))", str(sum(run.lists[row]))),
            lambda: (f"print(max({row}), len({row}))", f"{max(run.lists[row])} {len(run.lists[row])}"),
        ]
    line, output = kinds[run.draw(0, len(kinds))]()
    run.lines.append(line)
    run.printed.append(output)


def write_program(random: np.random.Generator, level: int) -> tuple[str, str, str]:
    """A Python program, what it prints, and how that comes about. Level 0 computes, 1 branches and adds up in loops, 2
    changes lists and doubles in loops without a known end."""
    run = _Run(random)
    _assign(run)
    if level:
        _make_list(run)
    steps: list[Callable[[_Run], None]] = [_compute, _compute, _divide, _assign]
    if level >= 1:
        steps = [_compute, _divide, _loop, _branch, _loop]
    if level == 2:
        steps += [_while, _change_list, _change_list]
    for _ in range((2, 2, 4)[level]):
        steps[run.draw(0, len(steps))](run)
    for _ in range((1, 2, 2)[level]):
        _print(run)
    reasoning = f"{'; '.join(run.told)}." if run.told else ""
    return "\n".join(run.lines), "\n".join(run.printed), reasoning


def paint_code(code: str, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Code in a monospaced face, coloured by what its words are, with or without numbers of lines."""
    ground, ink, keyword, literal, faint = _THEMES[int(random.integers(len(_THEMES)))]
    size, numbered = float(random.integers(12, 15)), bool(random.random() < 0.5)
    lines = code.split("\n")
    wide, leading = text_width("m" * 10, size, "mono") / 10, size * 1.5
    left = 12 + (wide * 3.5 if numbered else 0)
    width = max(round(left + wide * max(map(len, lines)) + 16), 140)
    canvas = Canvas(max(round(leading * len(lines) + 20), 64), width, ground)
    for n, line in enumerate(lines):
        y = 10 + n * leading
        if numbered:
            canvas.text(left - wide * 1.5, y, str(n + 1), size, faint, "ra", "mono")
        x = left
        for word in _WORDS.findall(line):
            paint: Paint = keyword if word in _KEYWORDS else literal if word[0].isdigit() or word[0] == '"' else ink
            if word.strip():
                canvas.text(x, y, word, size, paint, "la", "mono")
            x += wide * len(word)
    return (grainy(canvas.pixels(), random),)


def _read(random: np.random.Generator, level: int) -> Idea | None:
    code, _, _ = write_program(random, level)
    question = "Write down this code exactly, with its indentation."
    return Idea(question, code, None, lambda looks: paint_code(code, looks))


def _output(random: np.random.Generator, level: int) -> Idea | None:
    code, output, reasoning = write_program(random, level)
    question = f"{code}\n\nWhat does this Python program print? Answer with the output alone."
    return Idea(question, output, None, reasoning=reasoning)


def _output_picture(random: np.random.Generator, level: int) -> Idea | None:
    code, output, reasoning = write_program(random, level)
    question = "What does this Python program print? Answer with the output alone."
    return Idea(question, output, code, lambda looks: paint_code(code, looks), reasoning=reasoning)
