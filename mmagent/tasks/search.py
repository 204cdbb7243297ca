"""Multimodal search: a local index of passages and pictures, and questions that no single one of them answers.

The world it tells of is drawn from a seed, so that nobody knows it beforehand, and nothing outside is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmagent.tasks.index import Entry, Index, IndexSession, index_tools
from mmagent.tasks.tools import ToolTask, write_call
from mmagent.trajectories import Observation, Score
from mmagent.worlds.canvas import SHAPES, Canvas, draw_shape, grounds, palette
from mmagent.worlds.drawing import COLOURS, generator
from mmagent.worlds.grading import plain
from mmagent.worlds.passages import pick
from mmagent.worlds.words import FIRST_NAMES, LAST_NAMES


@dataclass(frozen=True)
class City:
    """``emblem``: a shape, its colour, and how many of it there are."""

    name: str
    founded: int
    river: str
    emblem: tuple[str, str, int]


@dataclass(frozen=True)
class Land:
    """Cities and who was born there; a ``question``, its ``answer``, and the titles that an expert opens for it."""

    cities: tuple[City, ...]
    people: tuple[tuple[str, str, str], ...]
    question: str
    answer: str
    path: tuple[str, ...]

    def told(self) -> str:
        return repr(self)

    def entries(self) -> list[Entry]:
        """In an order that says nothing."""
        out = []
        for city in self.cities:
            told = f"{city.name} was founded in {city.founded}. It lies on the river {city.river}."
            out.append(Entry(city.name, told))
            out.append(Entry(f"Emblem of {city.name}", f"A picture of the emblem of {city.name}.", _emblem(city)))
        for name, born, trade in self.people:
            out.append(Entry(name, f"{name} is a {trade} and was born in {born}."))
        return sorted(out, key=lambda entry: (entry.text[::-1], entry.title))


def _emblem(city: City) -> np.ndarray:
    """The same picture for the same city."""
    looks = generator(f"emblem/{city.name}", 0, "train")
    shape, colour, count = city.emblem
    ground, ink = grounds(looks, dark=0.0)
    canvas = Canvas(140, 140, ground)
    canvas.rectangle((6, 6, 134, 134), None, ink, 2.0)
    for n in range(count):
        angle = 2 * math.pi * n / count
        reach = 0 if count == 1 else 36
        draw_shape(canvas, shape, 70 + reach * math.sin(angle), 70 - reach * math.cos(angle), 17, COLOURS[colour], ink)
    return canvas.pixels()


class SearchSession(IndexSession):
    """The index of one land."""

    def __init__(self, land: Land):
        super().__init__(Index(land.entries()))
        self.land = land

    def judge(self, answer: str) -> Score:
        right = plain(answer).casefold() == self.land.answer.casefold()
        return Score(float(right), {"right": float(right)})


class SearchTask(ToolTask[Land]):
    """0: one passage; 1: from one passage to another; 2: from a passage to a picture; 3: over two passages to a
    picture."""

    name, category, levels = "index-search", "multimodal-search", 4
    tools = index_tools()

    def draw(self, random: np.random.Generator, level: int) -> Land | None:
        cities = self._cities(random, 6 + 2 * level)
        people = [
            (f"{first} {last}", cities[int(random.integers(len(cities)))], trade)
            for first, last, trade in zip(
                pick(random, FIRST_NAMES, 8), pick(random, LAST_NAMES, 8), ("painter", "pilot", "baker", "judge") * 2,
                strict=True,
            )
        ]  # fmt: skip
        who, born, _ = people[int(random.integers(len(people)))]
        known = tuple((name, city.name, what) for name, city, what in people)
        what, answer = (
            ("shape", born.emblem[0]), ("colour", born.emblem[1]), ("number of shapes", str(born.emblem[2])),
        )[int(random.integers(3))]  # fmt: skip
        picture = f"Emblem of {born.name}"
        if level == 0:
            asked = ("In which year was {} founded?", "On which river does {} lie?")[int(random.integers(2))]
            answer = str(born.founded) if "year" in asked else born.river
            return Land(cities, known, f"{asked.format(born.name)} One word.", answer, (born.name,))
        if level == 1:
            asked = ("In which year was the city founded where {} was born?", "On which river lies {}'s birthplace?")
            n = int(random.integers(2))
            answer = (str(born.founded), born.river)[n]
            return Land(cities, known, f"{asked[n].format(who)} One word.", answer, (who, born.name))
        ask = f"What is the {what} on the emblem of the city"
        choice = f"Answer with a number or with one of: {', '.join((*SHAPES, *sorted(COLOURS)))}."
        if level == 2:
            return Land(cities, known, f"{ask} where {who} was born? {choice}", answer, (who, picture))
        if sum(city.river == born.river for city in cities) > 1:
            return None
        question = f"{ask} on the river {born.river}? {choice}"
        return Land(cities, known, question, answer, (born.name, picture))

    def _cities(self, random: np.random.Generator, count: int) -> tuple[City, ...]:
        names = _names(random, 2 * count)
        emblems = zip(random.choice(SHAPES, count), [palette(random, 1)[0] for _ in range(count)], strict=True)
        return tuple(
            City(name, int(random.integers(900, 1950)), river, (str(shape), colour, int(random.integers(1, 7))))
            for name, river, (shape, colour) in zip(names[:count], names[count:], emblems, strict=True)
        )

    def session(self, scene: Land) -> SearchSession:
        return SearchSession(scene)

    def opening(self, scene: Land) -> Observation:
        return Observation(f"{scene.question} Search for what you need, then answer with the answer alone.")

    def solve(self, scene: Land) -> Iterator[str]:
        entries = scene.entries()
        for title in scene.path:
            yield write_call("search", query=title)
            yield write_call("open", number=next(n for n, entry in enumerate(entries) if entry.title == title))
        yield scene.answer


def _names(random: np.random.Generator, count: int) -> list[str]:
    """Names that no map knows."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = [str(random.choice(list(some))) for some in ("bdfgklmnprstvz", "aeiou") * 2]
        found["".join(letters).capitalize() + str(random.choice(("rn", "lth", "sk", "mor", "vik", "dal")))] = None
    return list(found)
