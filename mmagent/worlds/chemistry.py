"""Chemistry: formulas weighed, equations balanced, molecules read from a drawing."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, grounds
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.physics import judge_quantity, quantity
from mmagent.worlds.things import finished

MASSES = {
    "H": "1", "C": "12", "N": "14", "O": "16", "F": "19", "Na": "23", "Mg": "24", "Al": "27", "P": "31", "S": "32",
    "Cl": "35.5", "K": "39", "Ca": "40", "Fe": "56", "Cu": "63.5", "Zn": "65.5", "Br": "80",
}  # fmt: skip
"""In g/mol, rounded as school books round them."""
_COMPOUNDS = (
    ("H2O", "CO2", "NaCl", "NH3", "CH4", "MgO", "KBr", "HCl", "CuO", "ZnO", "KF", "H2S"),
    ("CaCl2", "Al2O3", "H2SO4", "CaCO3", "Fe2O3", "KNO3", "C2H6O", "Na2CO3", "H3PO4", "CuSO4", "MgBr2", "C6H6"),
    ("Ca(OH)2", "Al2(SO4)3", "Mg(NO3)2", "C6H12O6", "Fe(OH)3", "Ca3(PO4)2", "Zn(NO3)2", "C12H22O11", "Al(OH)3"),
)
_REACTIONS = (
    ("H2 + O2 -> H2O", "N2 + H2 -> NH3", "Na + Cl2 -> NaCl", "Mg + O2 -> MgO", "K + Br2 -> KBr", "Zn + O2 -> ZnO",
     "H2 + Cl2 -> HCl", "Ca + O2 -> CaO", "C + O2 -> CO", "Cu + O2 -> CuO"),
    ("CH4 + O2 -> CO2 + H2O", "Al + O2 -> Al2O3", "Fe + O2 -> Fe2O3", "KClO3 -> KCl + O2", "H2O2 -> H2O + O2",
     "Na + H2O -> NaOH + H2", "Zn + HCl -> ZnCl2 + H2", "Al + Cl2 -> AlCl3", "N2 + O2 -> NO2", "P4 + O2 -> P4O10"),
    ("C2H6 + O2 -> CO2 + H2O", "C3H8 + O2 -> CO2 + H2O", "Fe2O3 + CO -> Fe + CO2", "NH3 + O2 -> NO + H2O",
     "Al + HCl -> AlCl3 + H2", "Ca(OH)2 + H3PO4 -> Ca3(PO4)2 + H2O", "Al(OH)3 + H2SO4 -> Al2(SO4)3 + H2O",
     "FeS2 + O2 -> Fe2O3 + SO2", "C6H12O6 + O2 -> CO2 + H2O", "Na2CO3 + HCl -> NaCl + H2O + CO2"),
)  # fmt: skip
_PART = re.compile(r"([A-Z][a-z]?)(\d*)|\(([^()]*)\)(\d*)")
_SPECIES = re.compile(r"(\d{0,3})\s*([A-Z][A-Za-z0-9()]{0,30})", re.ASCII)
VALENCES = {"C": 4, "N": 3, "O": 2, "H": 1, "F": 1, "Cl": 1, "Br": 1}
_PAINTS = {
    "C": (70, 70, 76), "N": (48, 84, 214), "O": (214, 44, 44), "H": (215, 215, 222), "F": (60, 170, 90),
    "Cl": (30, 130, 60), "Br": (142, 60, 40),
}  # fmt: skip


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("chemistry/mass", "chemistry", 3, _mass, judge_quantity),
        Seeded("chemistry/balance", "chemistry", 3, _balance, judge_balanced),
        Seeded("chemistry/molecule", "chemistry", 3, _molecule, judge_formula),
    )


def atoms(formula: str) -> Counter[str]:
    """How many of each element a formula holds. Raises ``ValueError`` for what is none."""
    found: Counter[str] = Counter()
    at = 0
    for part in _PART.finditer(formula):
        if part.start() != at or len(part[2] or part[4] or "") > 3:
            break
        at = part.end()
        if part[1]:
            found[part[1]] += int(part[2] or 1)
        else:
            for element, count in atoms(part[3]).items():
                found[element] += count * int(part[4] or 1)
    if not formula or at != len(formula):
        raise ValueError(f"{formula!r:.40} is no chemical formula")
    return found


def _mass(random: np.random.Generator, level: int) -> Idea | None:
    """The mass of one mole, or of some moles, or the moles of some grams."""
    formula = _COMPOUNDS[level][int(random.integers(len(_COMPOUNDS[level])))]
    parts = atoms(formula)
    molar = sum(Fraction(MASSES[element]) * count for element, count in parts.items())
    known = ", ".join(f"{element} {MASSES[element]}" for element in sorted(parts))
    steps = f"{formula} has {' + '.join(f'{count} x {MASSES[element]}' for element, count in parts.items())} g/mol"
    given = f"Molar masses in g/mol: {known}."
    amount = Fraction(int(random.integers(1, 40)), int(random.choice((1, 2, 4, 5))))
    told = f"{amount.numerator / amount.denominator:g}"
    if random.random() < 0.5:
        return quantity(f"{given} What is the mass of {told} mol of {formula}?", amount * molar, "g", steps)
    grams = f"{float(amount * molar):g}"
    if Fraction(grams) != amount * molar:
        return None
    return quantity(f"{given} How many moles are {grams} g of {formula}?", amount, "mol", steps)


def balance(reaction: str) -> tuple[int, ...]:
    """The smallest whole coefficients that balance ``A + B -> C``, by elimination in fractions. Raises ``ValueError``
    where there is not exactly one way."""
    left, right = (side.split(" + ") for side in reaction.split(" -> "))
    counts = [atoms(s) for s in left] + [Counter({e: -n for e, n in atoms(s).items()}) for s in right]
    rows = [[Fraction(c[e]) for c in counts] for e in sorted({e for c in counts for e in c})]
    pivots: list[int] = []
    for column in range(len(counts)):
        at = next((n for n in range(len(pivots), len(rows)) if rows[n][column]), None)
        if at is None:
            continue
        top = len(pivots)
        rows[top], rows[at] = rows[at], rows[top]
        rows[top] = [v / rows[top][column] for v in rows[top]]
        for n, row in enumerate(rows):
            if n != top and row[column]:
                rows[n] = [v - row[column] * w for v, w in zip(row, rows[top], strict=True)]
        pivots.append(column)
    if len(pivots) != len(counts) - 1:
        raise ValueError(f"{reaction}: not one way to balance it")
    free = next(n for n in range(len(counts)) if n not in pivots)
    found = [Fraction(1)] * len(counts)
    for row, column in zip(rows, pivots, strict=False):
        found[column] = -row[free]
    scale = math.lcm(*(f.denominator for f in found))
    whole = [int(f * scale) for f in found]
    return tuple(n // math.gcd(*whole) for n in whole)


def _balance(random: np.random.Generator, level: int) -> Idea | None:
    """An equation, its substances in any order."""
    left, right = (side.split(" + ") for side in random.choice(_REACTIONS[level]).split(" -> "))
    sides = [[side[int(n)] for n in random.permutation(len(side))] for side in (left, right)]
    said = " -> ".join(" + ".join(side) for side in sides)
    if random.random() < 0.5:  # most of what reacts falls apart again, on paper
        sides = sides[::-1]
        said = " -> ".join(" + ".join(side) for side in sides)
    found = balance(said)
    named = [f"{n if n > 1 else ''}{s}" for n, s in zip(found, [*sides[0], *sides[1]], strict=True)]
    answer = f"{' + '.join(named[: len(sides[0])])} -> {' + '.join(named[len(sides[0]) :])}"
    if all(n == 1 for n in found):
        return None
    steps = f"The coefficients are {', '.join(map(str, found))}."
    return Idea(
        f"Balance this equation with the smallest whole numbers: {said}. Answer with the equation.",
        answer, facts=said, reasoning=steps, state=(tuple(sides[0]), tuple(sides[1]), found),
    )  # fmt: skip


def judge_balanced(example: Example, answer: str) -> Score:
    """Every substance once on its side, in any order, with the smallest whole number before it."""
    assert isinstance(example.state, tuple)
    left, right, found = example.state
    if len(answer) > 300:
        return grading.wrong("malformed")
    text = grading.plain(answer).replace("→", "->").replace("=", "->").replace("-->", "->")
    sides = text.translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")).split("->")
    if len(sides) != 2:
        return grading.wrong("malformed")
    said: list[dict[str, int]] = []
    for side in sides:
        species = [_SPECIES.fullmatch(part.strip()) for part in side.split("+")]
        if any(one is None for one in species):
            return grading.wrong("malformed")
        pairs = [(one[2], int(one[1] or 1)) for one in species if one]
        if len(dict(pairs)) < len(pairs):
            return grading.wrong("a substance twice")
        said.append(dict(pairs))
    truth = [dict(zip(left, found, strict=False)), dict(zip(right, found[len(left) :], strict=True))]
    return grading.right(said == truth)


def _molecule(random: np.random.Generator, level: int) -> Idea | None:
    """A chain of heavy atoms (level 2: with a double bond), every free place taken by hydrogen or a halogen."""
    count = int(random.integers(*((1, 3), (2, 5), (4, 7))[level]))
    chain = ["C"] + [str(random.choice(("C", "C", "C", "N", "O"))) for _ in range(count - 1)]
    bonds = [1] * (count - 1)
    carbons = [n for n in range(count - 1) if chain[n] == chain[n + 1] == "C"]
    if level == 2 and carbons:
        bonds[int(random.choice(carbons))] = 2
    ends: list[list[str]] = []
    for n, element in enumerate(chain):
        free = VALENCES[element] - sum(bonds[max(n - 1, 0) : n + 1])
        halogens = ("H", "H", "H", "F", "Cl") if level == 0 else ("H", "H", "H", "H", "F", "Cl", "Br")
        ends.append([str(random.choice(halogens)) if element == "C" else "H" for _ in range(free)])
    found = Counter([*chain, *(end for some in ends for end in some)])
    answer = hill(found)
    steps = f"Counted: {', '.join(f'{n} {element}' for element, n in sorted(found.items()))}."
    question = (
        "What is the molecular formula of this molecule? Write it like C2H6O: carbon, hydrogen, then by alphabet."
    )
    facts = (chain, bonds, ends)
    return Idea(question, answer, facts, lambda looks: paint_molecule(chain, bonds, ends, looks), reasoning=steps)


def hill(found: Mapping[str, int]) -> str:
    """Carbon first, then hydrogen, then the others by alphabet."""
    order = [e for e in ("C", "H") if found.get(e)] + sorted(e for e in found if e not in ("C", "H"))
    return "".join(e + (str(found[e]) if found[e] > 1 else "") for e in order)


def judge_formula(example: Example, answer: str) -> Score:
    """The same atoms, each element once; how they are ordered does not matter."""
    said = grading.plain(answer[:60]).translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")) if len(answer) <= 60 else ""
    written = re.findall(r"[A-Z][a-z]?", said)
    if not re.fullmatch(r"(?:[A-Z][a-z]?\d{0,2}){1,8}", said, re.ASCII) or len(set(written)) < len(written):
        return grading.wrong("malformed")
    return grading.right(atoms(said) == atoms(example.answer))


def paint_molecule(
    chain: Sequence[str], bonds: Sequence[int], ends: Sequence[Sequence[str]], random: np.random.Generator
) -> Sequence[np.ndarray]:
    """Balls with letters: the chain from left to right, what hangs on it above, below and at both ends."""
    ground, ink = grounds(random)
    step, middle = 56.0, 84.0
    canvas = Canvas(168, max(round(step * (len(chain) + 1.2)), 140), ground)
    places = [(step * (n + 1.1) - 0.0, middle) for n in range(len(chain))]
    hung: list[tuple[float, float, str]] = []
    for n, ((x, y), some) in enumerate(zip(places, ends, strict=True)):
        free = [(0.0, -46.0), (0.0, 46.0)]
        if n == len(chain) - 1:
            free.append((40.0, 0.0))
        if n == 0:
            free.append((-40.0, 0.0))
        for (dx, dy), element in zip(free, some, strict=False):
            canvas.line([(x, y), (x + dx, y + dy)], 2.0, ink)
            hung.append((x + dx, y + dy, element))
        assert len(some) <= len(free), f"{chain}: {some} at {n} have no room"
    for n, bond in enumerate(bonds):
        for shift in (0.0,) if bond == 1 else (-3.5, 3.5):
            canvas.line([(places[n][0], middle + shift), (places[n + 1][0], middle + shift)], 2.0, ink)
    for x, y, element in [*((x, y, e) for (x, y), e in zip(places, chain, strict=True)), *hung]:
        canvas.disc(x, y, 15 if element in ("C", "N", "O") else 13, _PAINTS[element], ink)
        light = (20, 20, 20) if element == "H" else (255, 255, 255)
        canvas.text(x, y, element, 14, light, "mm", "bold")
    return finished(canvas, random)
