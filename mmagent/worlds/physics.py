"""Physics with numbers that come out even: motion in words, and circuits and levers to be read from a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, Paint, grounds
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.things import finished

RELATIVE = Fraction(1, 100_000)
"""How far a number may be off, as a share of the true one."""


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("physics/motion", "physics", 3, _motion, judge_quantity),
        Seeded("physics/circuit", "physics", 3, _circuit, judge_quantity),
        Seeded("physics/lever", "physics", 3, _lever, judge_quantity),
    )


def judge_quantity(example: Example, answer: str) -> Score:
    """A number, by itself or with the unit that was asked for (``example.state``), off by :data:`RELATIVE` at most."""
    assert isinstance(example.state, str), f"{example.key}: no unit"
    said = grading.read_number(grading.plain(answer[:80]).removesuffix(example.state) if len(answer) <= 80 else "")
    truth = grading.read_number(example.answer)
    assert truth is not None, f"{example.key}: {example.answer!r} is no number"
    if said is None:
        return grading.wrong("malformed")
    return grading.right(abs(said - truth) <= RELATIVE * abs(truth))


def decimal(value: Fraction) -> str | None:
    """A number in at most three decimals, None where it does not end there."""
    scaled = value * 1000
    if scaled.denominator != 1:
        return None
    text = f"{scaled.numerator / 1000:.3f}".rstrip("0").rstrip(".")
    return text


def quantity(question: str, value: Fraction, unit: str, steps: str, **more: object) -> Idea | None:
    """An idea that asks for a number in a unit, None where the number does not end."""
    answer = decimal(value)
    if answer is None:
        return None
    told = f"{question} Answer with a number, in {unit}."
    return Idea(told, answer, reasoning=f"{steps} = {answer} {unit}.", state=unit, **more)


def _motion(random: np.random.Generator, level: int) -> Idea | None:
    """0: one law; 1: a square in it, or two laws; 2: energy that turns into another."""

    def draw(low: int, high: int) -> Fraction:
        return Fraction(int(random.integers(low, high)))

    m, v, t, a, h = draw(2, 60), draw(2, 40), draw(2, 20), draw(1, 9), draw(2, 50)
    if level == 0:
        kinds = [
            (f"A train runs at {v} m/s for {t} s. How far does it get?", v * t, "m", f"{v} x {t}"),
            (f"A force of {m} N pushes a cart of {a} kg. How fast does it gain speed?", m / a, "m/s²", f"{m} / {a}"),
            (f"A block of {m} kg falls freely with g = 10 m/s². What is its weight?", m * 10, "N", f"{m} x 10"),
            (f"A motor lifts {m} N by {h} m. What work does it do?", m * h, "J", f"{m} x {h}"),
        ]
    elif level == 1:
        far = v * t + a * t * t / 2
        kinds = [
            (f"A car at {v} m/s gains {a} m/s² for {t} s. How far does it get?", far, "m", f"{v}x{t} + {a}x{t}²/2"),
            (f"A ball of {m} kg flies at {v} m/s. What is its kinetic energy?", m * v * v / 2, "J", f"{m}x{v}²/2"),
            (f"A car at {v} m/s brakes by {a} m/s². How far does it still go?", v * v / (2 * a), "m", f"{v}²/(2x{a})"),
        ]
    else:
        total = (m * v + a * h) / (m + a)
        up = v * v / 20
        power = m * 10 * h / t
        kinds = [
            (
                f"A cart of {m} kg at {v} m/s hits one of {a} kg that goes {h} m/s the same way; they stick together. "
                "How fast are they then?", total, "m/s", f"({m}x{v} + {a}x{h}) / ({m} + {a})",
            ),
            (f"A stone leaves a sling straight up at {v} m/s; g = 10 m/s². How high does it get?", up, "m", f"{v}²/20"),
            (f"A pump lifts {m} kg of water by {h} m in {t} s; g = 10 m/s². Its power?", power, "W", f"{m}x10x{h}/{t}"),
        ]  # fmt: skip
    question, value, unit, steps = kinds[int(random.integers(len(kinds)))]
    return quantity(question, value, unit, steps)


def _circuit(random: np.random.Generator, level: int) -> Idea | None:
    """A battery and resistors. 0: in a row; 1: beside each other; 2: one in a row with two beside each other. Asked for
    the whole resistance, or for the current."""
    first, second, third = (Fraction(int(n)) for n in random.integers(1, 25, size=3))
    if level == 0:
        total, steps, resistors = first + second + third, f"{first} + {second} + {third}", [first, second, third]
    elif level == 1:
        resistors = [first, second]
        total, steps = first * second / (first + second), f"{first} x {second} / ({first} + {second})"
    else:
        resistors = [first, second, third]
        total = first + second * third / (second + third)
        steps = f"{first} + {second} x {third} / ({second} + {third})"
    volts = Fraction(int(random.integers(2, 13)) * 6)

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        return paint_circuit([int(r) for r in resistors], int(volts), level, looks)

    facts = (resistors, volts)
    if random.random() < 0.5:
        question = "What is the resistance of the whole circuit?"
        return quantity(question, total, "Ω", f"R = {steps}", facts=facts, paint=paint)
    question = "How large is the current through the battery?"
    return quantity(question, volts / total, "A", f"{volts} V over {steps}", facts=facts, paint=paint)


def paint_circuit(
    resistors: Sequence[int], volts: int, level: int, random: np.random.Generator
) -> Sequence[np.ndarray]:
    """The battery on the left, resistors as boxes with their ohms written in."""
    ground, ink = grounds(random)
    canvas = Canvas(224, 280, ground)

    def resistor(x: float, y: float, ohms: int) -> None:
        canvas.rectangle((x - 26, y - 11, x + 26, y + 11), ground, ink, 1.5)
        canvas.text(x, y, f"{ohms} Ω", 12, ink, "mm", "sans")

    loop = [(40, 100), (40, 40), (240, 40), (240, 190), (40, 190), (40, 116)]
    canvas.line(loop, 1.5, ink)
    canvas.line([(22, 100), (58, 100)], 1.5, ink)  # the battery
    canvas.line([(31, 116), (49, 116)], 3.0, ink)
    canvas.text(64, 108, f"{volts} V", 13, ink, "lm", "sans")
    if level == 0:
        for x, y, ohms in zip((95, 185, 140), (40, 40, 190), resistors, strict=True):
            resistor(x, y, ohms)
        return finished(canvas, random)
    if level == 2:
        resistor(90, 40, resistors[0])
    beside = resistors[-2:]
    resistor(190, 40, beside[0])
    canvas.line([(150, 40), (150, 84), (230, 84), (230, 40)], 1.5, ink)
    resistor(190, 84, beside[1])
    for x in (150, 230):
        canvas.disc(x, 40, 2.5, ink)
    return finished(canvas, random)


def _lever(random: np.random.Generator, level: int) -> Idea | None:
    """A beam on a pivot in balance; one load or one distance is asked for. 0 and 1: a load on either side, the second
    with distances that are no whole numbers; 2: two loads on the left."""
    step = Fraction(1, 2) if level else Fraction(1)
    loads = [Fraction(int(n)) for n in random.integers(1, 30, size=2 if level == 2 else 1)]
    arms = sorted((int(n) * step for n in random.permutation(9)[: len(loads)] + 1), reverse=True)
    arm = int(random.integers(1, 10)) * step
    turning = sum(load * at for load, at in zip(loads, arms, strict=True))
    load = turning / arm
    if load.denominator != 1 or not 1 <= load <= 200:
        return None
    steps = f"({' + '.join(f'{w} x {decimal(at)}' for w, at in zip(loads, arms, strict=True))})"
    if random.random() < 0.5:
        asked, value, unit, steps = (
            "How heavy is the load that is not written?",
            load,
            "kg",
            f"{steps} / {decimal(arm)}",
        )
        known: tuple[Fraction | None, Fraction | None] = (None, arm)
    else:
        asked, value, unit, steps = "How long is the distance that is not written?", arm, "m", f"{steps} / {load}"
        known = (load, None)

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        return paint_lever(list(zip(loads, arms, strict=True)), (load, arm), known, looks)

    question = f"The beam is in balance and weighs nothing. {asked}"
    return quantity(question, value, unit, steps, facts=(loads, arms, known), paint=paint)


def paint_lever(
    left: Sequence[tuple[Fraction, Fraction]],
    right: tuple[Fraction, Fraction],
    known: tuple[Fraction | None, Fraction | None],
    random: np.random.Generator,
) -> Sequence[np.ndarray]:
    """Loads ``(kg, m from the pivot)`` on either side, those on the right as far as they are ``known``."""
    ground, ink = grounds(random)
    canvas = Canvas(168, 336, ground)
    middle, level, scale = 168.0, 84.0, 130.0 / float(max(*(at for _, at in left), right[1]))
    canvas.line([(20, level), (316, level)], 3.0, ink)
    canvas.polygon([(middle, level), (middle - 14, level + 28), (middle + 14, level + 28)], None, ink, 1.5)

    def written(value: Fraction | None, unit: str) -> str:
        return f"? {unit}" if value is None else f"{decimal(value)} {unit}"

    loads = [(-float(at), written(w, "kg"), written(at, "m")) for w, at in left]
    loads.append((float(right[1]), written(known[0], "kg"), written(known[1], "m")))
    paint: Paint = (90, 130, 200)
    for n, (at, weight, distance) in enumerate(loads):
        x, y = middle + at * scale, level + 40 + 22 * (n % 2 if len(loads) > 2 else 0)
        up = 36.0 * (n % 2) if len(loads) > 2 and n < 2 else 0.0
        canvas.line([(x, level), (x, level - 6 - up)], 1.0, ink)
        canvas.rectangle((x - 22, level - 26 - up, x + 22, level - 6 - up), paint, ink)
        canvas.text(x, level - 16 - up, weight, 11, (255, 255, 255), "mm", "sans")
        canvas.dashes([(middle, y), (x, y)], 1.0, ink, 4.0)
        canvas.text((x + middle) / 2, y + 3, distance, 11, ink, "ma", "sans")
    return finished(canvas, random)
