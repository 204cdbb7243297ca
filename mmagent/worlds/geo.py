"""Where is this? A street whose signs give its country away, and a chart to be read in degrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.canvas import Canvas, Paint, grounds
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.things import finished

EARTH = 6371.0
"""Radius in km."""
NEAR, FAR = 50.0, 1000.0
"""km: up to the first a place is right, from the second on it is wrong, and in straight lines between."""


@dataclass(frozen=True)
class Country:
    """What a street tells: ``words`` for pharmacy and exit, the sign of the money, which side cars keep to, the end of
    internet addresses and the number one dials first."""

    name: str
    words: tuple[str, str]
    money: str
    left: bool
    domain: str
    dial: str


COUNTRIES = (
    Country("France", ("PHARMACIE", "SORTIE"), "€", False, ".fr", "+33"),
    Country("Germany", ("APOTHEKE", "AUSFAHRT"), "€", False, ".de", "+49"),
    Country("Switzerland", ("APOTHEKE", "AUSFAHRT"), "CHF", False, ".ch", "+41"),
    Country("Italy", ("FARMACIA", "USCITA"), "€", False, ".it", "+39"),
    Country("Spain", ("FARMACIA", "SALIDA"), "€", False, ".es", "+34"),
    Country("Mexico", ("FARMACIA", "SALIDA"), "MXN", False, ".mx", "+52"),
    Country("Portugal", ("FARMÁCIA", "SAÍDA"), "€", False, ".pt", "+351"),
    Country("Brazil", ("FARMÁCIA", "SAÍDA"), "R$", False, ".br", "+55"),
    Country("United Kingdom", ("PHARMACY", "EXIT"), "£", True, ".uk", "+44"),
    Country("Ireland", ("PHARMACY", "EXIT"), "€", True, ".ie", "+353"),
    Country("Australia", ("PHARMACY", "EXIT"), "A$", True, ".au", "+61"),
    Country("United States", ("PHARMACY", "EXIT"), "US$", False, ".us", "+1"),
    Country("Sweden", ("APOTEK", "UTFART"), "SEK", False, ".se", "+46"),
    Country("Norway", ("APOTEK", "UTKJØRSEL"), "NOK", False, ".no", "+47"),
    Country("Denmark", ("APOTEK", "UDKØRSEL"), "DKK", False, ".dk", "+45"),
    Country("Poland", ("APTEKA", "WYJAZD"), "zł", False, ".pl", "+48"),
    Country("Netherlands", ("APOTHEEK", "UITRIT"), "€", False, ".nl", "+31"),
    Country("Turkey", ("ECZANE", "ÇIKIŞ"), "TL", False, ".tr", "+90"),
    Country("Finland", ("APTEEKKI", "ULOS"), "€", False, ".fi", "+358"),
    Country("Greece", ("ΦΑΡΜΑΚΕΙΟ", "ΕΞΟΔΟΣ"), "€", False, ".gr", "+30"),
    Country("Bulgaria", ("АПТЕКА", "ИЗХОД"), "BGN", False, ".bg", "+359"),
    Country("Ukraine", ("АПТЕКА", "ВИЇЗД"), "UAH", False, ".ua", "+380"),
)
CLUES: dict[str, Callable[[Country], object]] = {
    "pharmacy": lambda c: c.words[0],
    "exit": lambda c: c.words[1],
    "money": lambda c: c.money,
    "side": lambda c: c.left,
    "domain": lambda c: c.domain,
    "dial": lambda c: c.dial,
}
_ALIASES = {
    "uk": "united kingdom", "great britain": "united kingdom", "usa": "united states", "us": "united states",
    "the netherlands": "netherlands", "holland": "netherlands", "türkiye": "turkey",
    "united states of america": "united states", "the united states": "united states",
    "the united kingdom": "united kingdom",
}  # fmt: skip


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("geo/street", "geo-guess", 3, _street, judge_country),
        Seeded("geo/chart", "geo-guess", 3, _chart, judge_place),
    )


def left_open(country: Country, clues: Sequence[str]) -> list[Country]:
    """The countries that look like ``country`` in all ``clues``."""
    return [c for c in COUNTRIES if all(CLUES[clue](c) == CLUES[clue](country) for clue in clues)]


def _street(random: np.random.Generator, level: int) -> Idea | None:
    """0: an address or a number to dial among the clues; 1: words and money; 2: only clues that tell nothing alone."""
    country = COUNTRIES[int(random.integers(len(COUNTRIES)))]
    shown = (["domain", "pharmacy"], ["dial", "exit"])[int(random.integers(2))] if level == 0 else ["pharmacy", "exit"]
    shown = [*shown, *(("money", "side") if level else ("side",))]
    if level == 2:
        shown = [str(random.choice(("pharmacy", "exit"))), "money", "side"]
        if any(len(left_open(country, [clue])) == 1 for clue in shown):
            return None
    if left_open(country, shown) != [country]:
        return None
    price = f"{int(random.integers(1, 90))}.{int(random.integers(10)) * 10:02d}"
    number = "".join(str(int(d)) for d in random.integers(0, 10, size=7))
    question = "In which country is this street? Answer with the name of the country, in English."
    told = ", ".join(f"{clue} {CLUES[clue](country)}" for clue in shown if clue != "side")
    steps = f"{told}; cars keep to the {'left' if country.left else 'right'}: {country.name}."

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        return paint_street(country, shown, price, number, looks)

    return Idea(question, country.name, (country.name, shown, price, number), paint, reasoning=steps)


def judge_country(example: Example, answer: str) -> Score:
    """The name of the country, in one of its common forms."""
    said = grading.plain(answer).casefold()
    return grading.right(_ALIASES.get(said, said) == example.answer.casefold())


def paint_street(
    country: Country, shown: Sequence[str], price: str, number: str, random: np.random.Generator
) -> Sequence[np.ndarray]:
    """A road into the distance, a car that comes towards us on its side, houses with signs."""
    height, width = 224, 336
    canvas = Canvas(height, width, ((168, 204, 240), (204, 216, 228), (240, 214, 184))[int(random.integers(3))])
    canvas.rectangle((0, 110, width, height), (126, 150, 104))
    canvas.polygon([(110, 224), (160, 110), (176, 110), (226, 224)], (92, 92, 98))
    canvas.dashes([(168, 222), (168, 112)], 2.0, (240, 240, 240), 8.0)
    walls = [(204, 150, 120), (214, 204, 180), (150, 160, 180), (190, 180, 160)]
    for n, (x1, x2, top) in enumerate(((0, 104, 26), (232, 336, 40))):
        canvas.rectangle((x1, top, x2, 168), walls[(n + int(random.integers(4))) % 4], (70, 66, 62))
    x = 147 if not country.left else 189  # towards us: the side beyond the middle
    canvas.rectangle((x - 14, 160, x + 14, 184), ((190, 40, 40), (40, 70, 160), (60, 60, 64))[int(random.integers(3))])
    canvas.rectangle((x - 10, 150, x + 10, 162), (200, 224, 240), (40, 40, 40))
    for light in (x - 10, x + 10):
        canvas.disc(light, 176, 3, (255, 248, 200))
    text: Paint = (20, 20, 24)
    signs = {
        "pharmacy": (52, 50, (40, 140, 70), country.words[0]),
        "exit": (284, 64, (30, 80, 170), country.words[1]),
        "money": (52, 86, (250, 240, 170), f"{price} {country.money}"),
        "domain": (284, 100, (245, 245, 245), f"www.shop{country.domain}"),
        "dial": (284, 130, (245, 245, 245), f"{country.dial} {number}"),
    }
    for clue, (x, y, paint, words) in signs.items():
        if clue in shown:
            canvas.rectangle((x - 48, y - 11, x + 48, y + 11), paint, text)
            ink = (255, 255, 255) if sum(paint) < 420 else text
            canvas.text(x, y, words, 12, ink, "mm", "sans")
    return finished(canvas, random)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """km between two places ``(latitude, longitude)`` in degrees, along a great circle."""
    (a, b), (c, d) = ((math.radians(v) for v in place) for place in (one, other))
    half = math.sin((c - a) / 2) ** 2 + math.cos(a) * math.cos(c) * math.sin((d - b) / 2) ** 2
    return 2 * EARTH * math.asin(min(math.sqrt(half), 1.0))


def _chart(random: np.random.Generator, level: int) -> Idea | None:
    """A marker on a grid of meridians and parallels of 5 degrees; at level 0 on a crossing, at 1 in the middle between
    two, at 2 anywhere, on a grid of 10 degrees."""
    step = 10 if level == 2 else 5
    south, west = int(random.integers(-12, 8)) * 5, int(random.integers(-34, 26)) * 5
    cells = 5
    if level == 0:
        up, along = (int(v) * step for v in random.integers(1, cells, size=2))
    elif level == 1:
        up, along = (int(v) * step / 2 for v in random.integers(2, 2 * cells - 1, size=2))
    else:
        up, along = (int(v) for v in random.integers(4, cells * step - 3, size=2))
    latitude, longitude = south + up, west + along
    question = "At which latitude and longitude is the red marker? Answer with two numbers in degrees, latitude first, "
    question += "negative for south and west, like -12.5, 30."
    answer = f"{latitude:g}, {longitude:g}"
    steps = f"It stands {up:g} degrees above {south} and {along:g} to the right of {west}: {answer}."

    def paint(looks: np.random.Generator) -> Sequence[np.ndarray]:
        return paint_chart(south, west, step, cells, (latitude, longitude), looks)

    return Idea(question, answer, (south, west, step), paint, reasoning=steps)


def judge_place(example: Example, answer: str) -> Score:
    """By the distance on the globe: 1 up to :data:`NEAR`, 0 from :data:`FAR`."""
    truth, said = grading.read_decimals(example.answer, 2), grading.read_decimals(answer, 2)
    assert truth is not None, f"{example.key}: {example.answer!r} is no place"
    if said is None or abs(said[0]) > 90 or abs(said[1]) > 180:
        return grading.wrong("malformed")
    off = distance(truth, said)
    value = min(max((FAR - off) / (FAR - NEAR), 0.0), 1.0)
    return Score(value, {"right": float(off <= NEAR), "kilometres": off})


def paint_chart(
    south: int, west: int, step: int, cells: int, marker: tuple[float, float], random: np.random.Generator
) -> Sequence[np.ndarray]:
    """Some land, the grid with its degrees at the edges, and the marker."""
    _, ink = grounds(random, dark=0.0)
    side, edge = 252, 34.0
    canvas = Canvas(side, side, (196, 220, 240))
    cell = (side - 2 * edge) / cells
    for _ in range(3):
        x, y = (float(v) for v in random.uniform(edge + 30, side - edge - 30, size=2))
        turns = np.linspace(0, 2 * math.pi, 15)[:-1]
        reach = random.uniform(18, 46, size=14)
        land = [(x + r * math.cos(t), y + r * math.sin(t)) for t, r in zip(turns, reach, strict=True)]
        canvas.polygon(land, (222, 214, 178), (150, 140, 110))
    canvas.rectangle((0, 0, side, edge), (255, 255, 255))
    canvas.rectangle((0, side - edge, side, side), (255, 255, 255))
    canvas.rectangle((0, 0, edge, side), (255, 255, 255))
    canvas.rectangle((side - edge, 0, side, side), (255, 255, 255))
    for n in range(cells + 1):
        at = edge + n * cell
        canvas.line([(at, edge), (at, side - edge)], 1.0, ink)
        canvas.line([(edge, at), (side - edge, at)], 1.0, ink)
        canvas.text(at, side - edge + 4, f"{west + n * step}°", 10, ink, "ma", "sans")
        canvas.text(edge - 4, side - at, f"{south + n * step}°", 10, ink, "rm", "sans")
    x = edge + (marker[1] - west) / step * cell
    y = side - edge - (marker[0] - south) / step * cell
    canvas.disc(x, y, 5.0, (214, 44, 44), (255, 255, 255), 1.2)
    return finished(canvas, random)
