"""Algebra, science, places and instructions: answers against what can be found without the worlds' own code, and judges
that take every right answer and no wrong one."""

from __future__ import annotations

import re
import time
from collections import Counter
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagent.worlds.biology import CODE
from mmagent.worlds.catalogue import all_worlds
from mmagent.worlds.chemistry import _REACTIONS, VALENCES, atoms, balance, hill
from mmagent.worlds.examples import Example
from mmagent.worlds.expressions import Unreadable, same, value_of
from mmagent.worlds.geo import COUNTRIES, distance, left_open
from mmagent.worlds.instructions import Rule

X = sympy.Symbol("x")


def examples(name: str, count: int = 6) -> list[Example]:
    world = all_worlds()[name]
    return [world.example("train", index, level) for level in range(world.levels) for index in range(count)]


def judged(name: str, answer: str, said: str, state: object = None) -> float:
    return all_worlds()[name].grade(Example("key", (), (), answer, 0, state=state), said).value


def read(formula: str) -> sympy.Expr:
    """By sympy's own parser, of what the generator wrote."""
    rules = sympy.parsing.sympy_parser
    transformations = (*rules.standard_transformations, rules.implicit_multiplication, rules.convert_xor)
    return rules.parse_expr(formula, {"x": X}, transformations)


def test_derivatives_are_those_of_sympy():
    for one in examples("algebra/derivative"):
        asked = re.search(r"f\(x\) = (.*)\. Answer", one.question)[1]
        assert sympy.simplify(sympy.diff(read(asked), X) - read(one.answer)) == 0, asked


def test_products_are_those_of_sympy():
    for one in examples("algebra/expand"):
        asked = re.search(r"like terms: (.*)\.", one.question)[1]
        assert sympy.expand(read(asked)) == read(one.answer)
        assert all_worlds()["algebra/expand"].grade(one, asked).value == 0.0, "the question is no answer"


def test_roots_are_those_of_sympy():
    for one in examples("algebra/roots"):
        asked = read(re.search(r"Solve (.*) = 0\. Answer", one.question)[1])
        roots = {sympy.nsimplify(read(part)) for part in one.answer.split(", ")}
        assert roots == set(sympy.solve(asked, X))
        turned = " or ".join(f"x = {part}" for part in reversed(one.answer.split(", ")))
        assert all_worlds()["algebra/roots"].grade(one, turned).value == 1.0


LEAVES = st.sampled_from(["x", "2", "3", "x^2", "sin(x)", "7"])
FORMULAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds("({}){}({})".format, inner, st.sampled_from("+-*"), inner) | st.builds("exp(cos({}))".format, LEAVES)
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(FORMULAS, FORMULAS)
def test_formulas_are_equal_where_sympy_says_so(one, other):
    try:
        found = same(one, other)
    except Unreadable:  # too long or too large to be read: never right
        return
    assert found == (sympy.simplify(read(one) - read(other)) == 0)


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (r"\frac{1}{2}", 0.5), ("2^-1", 0.5), ("-2^2", -4), ("2^3^2", 512), (r"3\cdot\sqrt{4}", 6), ("2(3)", 6),
        (r"\left( 1 + 2 \right) \times 2", 6), ("2x", 10), ("xx", 25), ("sin^2 x + cos(x)^2", 1), ("2pi", 6.283185307),
        ("1/2/2", 0.25), ("−3", -3), ("ln(e)", 1), ("sqrt 9", 3), ("2 sqrt(9)", 6),
    ],
)  # fmt: skip
def test_formulas_are_read_as_people_write_them(said, value):
    assert value_of(said, {"x": 5}) == pytest.approx(value)


@pytest.mark.parametrize(
    "said",
    ["", "2 3", "2,5", "x y", "()", "1/0", "9^9^9^9^9", "(" * 200 + "x" + ")" * 200, "-" * 250 + "x", "x" * 400,
     "__import__('os')", "x if x else x", "sqrt", "2**", r"\frac{1}", "1e999", "inf", "nan", "x; x", "[x]", "lambda"],
)  # fmt: skip
def test_what_is_no_formula_is_refused_in_no_time(said):
    started = time.perf_counter()
    with pytest.raises(Unreadable):
        value_of(said, {"x": 2})
    assert time.perf_counter() - started < 0.2


def test_a_derivative_may_be_written_otherwise():
    for said in ("f'(x) = 2(3x+1)", "6x + 2", r"$2 \left(3x + 1\right)$", "y' = 2 + 6*x", "(12x+4)/2"):
        assert judged("algebra/derivative", "6x + 2", said) == 1.0
    for said in ("6x + 3", "6x", "6x + 2 or 6x + 3", "6x + 2, 6x + 3", "d/dx (3x^2 + 2x)"):
        assert judged("algebra/derivative", "6x + 2", said) == 0.0


def test_roots_are_all_said_and_each_once():
    answer = "3 + sqrt(2), 3 - sqrt(2)"
    for said in ("3-sqrt(2); 3+sqrt(2)", "x = 4.4142136 or x = 1.5857864", r"3+\sqrt{2}, 3-\sqrt{2}"):
        assert judged("algebra/roots", answer, said) == 1.0
    for said in ("3+sqrt(2)", "3+sqrt(2), 3+sqrt(2)", "3+sqrt(2), 3-sqrt(2), 1", "4.414, 1.586", "3±sqrt(2)"):
        assert judged("algebra/roots", answer, said) == 0.0


@pytest.mark.parametrize("said", ["12.5", "12.5 m/s", "12.50m/s", "25/2", "**12.5**"])
def test_quantities_may_bring_their_unit(said):
    assert judged("physics/motion", "12.5", said, "m/s") == 1.0


@pytest.mark.parametrize("said", ["12.6", "12.5 km/h", "12.5 or 13", "1.25e1", "12,5", ""])
def test_other_quantities_are_wrong(said):
    assert judged("physics/motion", "12.5", said, "m/s") == 0.0


def test_resistors_by_kirchhoff():
    """The whole resistance from the nodes' equations instead of the formulas."""
    seen = 0
    for one in examples("physics/circuit", 12):
        world = all_worlds()["physics/circuit"]
        idea = next(i for i in _ideas(world, one) if i.answer == one.answer and i.question in one.question)
        resistors, volts = idea.facts
        g = [1 / float(r) for r in resistors]
        if one.level == 0:
            ends = [(0, 1, g[0]), (1, 2, g[1]), (2, 3, g[2])]
        elif one.level == 1:
            ends = [(0, 3, g[0]), (0, 3, g[1])]
        else:
            ends = [(0, 1, g[0]), (1, 3, g[1]), (1, 3, g[2])]
        nodes = sorted({n for a, b, _ in ends for n in (a, b)} - {3})
        matrix = np.zeros((len(nodes), len(nodes)))
        for a, b, conductance in ends:
            for n in {a, b} & set(nodes):
                matrix[nodes.index(n), nodes.index(n)] += conductance
            if a in nodes and b in nodes:
                matrix[nodes.index(a), nodes.index(b)] -= conductance
                matrix[nodes.index(b), nodes.index(a)] -= conductance
        drive = np.zeros(len(nodes))
        drive[0] = 1.0  # one ampere into the first node: its voltage is the resistance
        total = np.linalg.solve(matrix, drive)[0]
        expected = float(volts) / total if "current" in one.question else total
        assert float(one.answer) == pytest.approx(expected, rel=1e-9)
        seen += 1
    assert seen == 36


def _ideas(world, one):
    from mmagent.worlds.drawing import generator

    split, level, index = one.key.split("-")
    for attempt in range(200):
        idea = world.think(generator(f"{world.name}/{level}/{attempt}", int(index), split), int(level))
        if idea is not None and idea.split == split:
            yield idea


def test_equations_balance_and_their_numbers_are_the_smallest():
    for reaction in (r for some in _REACTIONS for r in some):
        found = balance(reaction)
        left, right = (side.split(" + ") for side in reaction.split(" -> "))
        for element in atoms("".join(left)):
            before = sum(n * atoms(s)[element] for n, s in zip(found, left, strict=False))
            assert before == sum(n * atoms(s)[element] for n, s in zip(found[len(left) :], right, strict=True))
        assert np.gcd.reduce(found) == 1


def test_an_equation_is_judged_by_its_numbers_not_by_its_order():
    state = (("H2", "O2"), ("H2O",), (2, 1, 2))
    for said in ("2H2 + O2 -> 2H2O", "O2 + 2 H2 → 2 H2O", "2H₂ + O₂ = 2H₂O"):
        assert judged("chemistry/balance", "2H2 + O2 -> 2H2O", said, state) == 1.0
    for said in ("4H2 + 2O2 -> 4H2O", "H2 + O2 -> H2O", "2H2 + O2 -> 2H2O2", "2H2O -> 2H2 + O2",
                 "2H2 + O2 + O2 -> 2H2O", "2H2 + O2", "2H2 + O2 -> 2H2O -> 2H2O",
                 "2H2 + O2 -> 2H2O or H2 + O2 -> H2O"):  # fmt: skip
        assert judged("chemistry/balance", "2H2 + O2 -> 2H2O", said, state) == 0.0


def test_molecules_use_up_every_bond():
    for one in examples("chemistry/molecule"):
        found = atoms(one.answer)
        double = 1 if one.level == 2 else 0
        bonds = sum(VALENCES[e] * n for e, n in found.items())
        whole = sum(found.values())  # a tree of n atoms has n - 1 bonds, two ends each
        assert bonds in {2 * (whole - 1), 2 * (whole - 1 + double)}
        assert hill(found) == one.answer
    assert judged("chemistry/molecule", "C2H6O", "OC2H6") == 1.0
    assert judged("chemistry/molecule", "C2H6O", "C₂H₆O") == 1.0
    for said in ("C2H6", "CH3CH2OH", "C2H6O C2H4O", "C99H99", "c2h6o", ""):
        assert judged("chemistry/molecule", "C2H6O", said) == 0.0


def test_the_genetic_code_is_the_standard_one():
    assert len(CODE) == 64
    assert Counter(CODE.values())["*"] == 3
    known = {"AUG": "M", "UGG": "W", "UUU": "F", "AAA": "K", "GGG": "G", "UAA": "*", "CAU": "H", "GAA": "E", "AGU": "S"}
    assert {codon: CODE[codon] for codon in known} == known


def test_shares_of_children_are_counted_anew():
    for one in examples("biology/cross", 10):
        parents = re.search(r"Parents (\w+) and (\w+)", one.question).groups()
        pairs = [parent[n : n + 2] for parent in parents for n in range(0, len(parent), 2)]
        half = len(pairs) // 2
        gametes = [list(product(*pairs[:half])), list(product(*pairs[half:]))]
        dominant = {m[1]: m[2] for m in re.finditer(r"(\w) \(((\w+) \w+)\) is dominant", one.question)}
        wanted = re.search(r"the children (.*)\? Answer", one.question)[1].split(" and ")
        good = 0
        for one_half, other_half in product(*gametes):
            genes = ["".join(sorted(pair)) for pair in zip(one_half, other_half, strict=True)]
            shown = []
            for n, what in enumerate(wanted):
                if what.startswith("have the genes "):
                    shown.append(genes[n] == what.removeprefix("have the genes "))
                else:
                    strong = what.removeprefix("have ") == dominant["AB"[n]]
                    shown.append(genes[n][0].isupper() == strong)
            good += all(shown)
        assert Fraction(one.answer) == Fraction(good, len(gametes[0]) * len(gametes[1]))
    assert judged("biology/cross", "3/4", "75 %") == judged("biology/cross", "3/4", "0.75") == 1.0
    assert judged("biology/cross", "3/4", "75") == 0.0


def test_a_street_leaves_one_country_open():
    for one in examples("geo/street", 10):
        assert one.answer in {country.name for country in COUNTRIES}
    uk = next(c for c in COUNTRIES if c.name == "United Kingdom")
    assert len(left_open(uk, ["exit", "side"])) == 3
    assert left_open(uk, ["exit", "money"]) == [uk]
    assert judged("geo/street", "United Kingdom", "the UK") == 0.0
    assert judged("geo/street", "United Kingdom", "UK") == 1.0
    assert judged("geo/street", "France", "France or Germany") == 0.0


def test_places_are_judged_by_their_distance():
    assert distance((52.52, 13.405), (48.857, 2.352)) == pytest.approx(878, abs=3)  # Berlin to Paris
    assert distance((0, 179.9), (0, -179.9)) == pytest.approx(22.2, abs=0.1)
    near, far = judged("geo/chart", "10, 20", "12, 20"), judged("geo/chart", "10, 20", "15, 20")
    assert 1.0 > near > far > 0.0
    for said in ("10, 40", "-10, -20", "20, 10", "10", "100, 20", "10, 20, 30", "10N 20E or 40, 40"):
        assert judged("geo/chart", "10, 20", said) == 0.0


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (Rule("words", number=3), "one two-part three", "one two"),
        (Rule("lines", number=2), "a\nb", "a\n\nb"),
        (Rule("each", number=2), "a b\nc d", "a b\nc"),
        (Rule("holds", "cat"), "The Cat.", "The cats"),
        (Rule("often", "cat", 2), "cat, cat", "cat cats cat cat"),
        (Rule("without", "e"), "any", "An Epic"),
        (Rule("lower"), "abc.", "Abc"),
        (Rule("upper"), "ABC.", "ABc"),
        (Rule("comma"), "a; b", "a，b"),
        (Rule("ends", "end"), "the End.", "end it"),
        (Rule("begins", "so"), "So it is", "also"),
        (Rule("bullets"), "- a\n- b", "- a\nb"),
        (Rule("full stop"), "a.", "a"),
        (Rule("quoted"), '"a b"', '"a" b"'),
    ],
)
def test_rules_are_kept_or_broken(rule, good, bad):
    assert rule.kept(good)
    assert not rule.kept(bad)
    assert str(rule.number or rule.text) in rule.words


def test_a_broken_rule_is_named_and_a_text_of_one_word_keeps_none():
    state = (Rule("words", number=30), Rule("lower"))
    world = all_worlds()["instructions/rules"]
    one = Example("key", (), (), "", 0, state=state)
    assert world.grade(one, "A few words").parts == {"rules": 0.0, "broken words": 1.0, "broken lower": 1.0}
    assert world.grade(one, " ".join(["word"] * 30)).value == 0.0
    assert world.grade(one, " ".join(f"word{n}" for n in range(30))).value == 1.0
