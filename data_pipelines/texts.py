"""Plain text from seeds: small facts in sentences, pages' source, and how screens are talked about.

Not literature: it teaches a small model to spell, copy, count, compare and close its brackets, which is what acting
on screens asks of it, and needs no download. A run on real text names its own shards instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

from data_pipelines.making import draws, settings_of
from mmagent.actions import Click, Key, Type, format_action
from mmagent.chat import Text
from mmagent.geometry import FRAME
from mmagent.records import Record
from mmagent.worlds.pages import generate
from mmagent.worlds.seeds import seed_for
from mmagent.worlds.words import ACTIONS, ADJECTIVES, FIRST_NAMES, NOUNS, VERBS

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def word(random: Random) -> str:
    """A made-up word, as fields and passwords hold."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(random.choice(letters) for _ in range(random.randint(3, 8)))


def story(random: Random) -> str:
    """Sentences about who does what, then a question that the text answers."""
    facts = []
    for _ in range(random.randint(3, 6)):
        thing = f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}"
        facts.append((random.choice(FIRST_NAMES), random.choice(VERBS), thing))
    lines = [f"{name} {verb} the {thing} on {random.choice(DAYS)}." for name, verb, thing in facts]
    name, verb, thing = random.choice(facts)
    if sum(fact[:2] == (name, verb) for fact in facts) == 1:
        lines.append(f"What is it that {name} {verb}? The {thing}.")
    return " ".join(lines)


def numbers(random: Random) -> str:
    """Sums, comparisons and orders of small numbers."""
    lines = []
    for _ in range(random.randint(4, 8)):
        a, b = random.randint(0, 99), random.randint(0, 99)
        lines.append(
            random.choice(
                (
                    f"{a} + {b} = {a + b}",
                    f"{max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}",
                    f"{a % 13} x {b % 13} = {(a % 13) * (b % 13)}",
                    f"the greater of {a} and {b} is {max(a, b)}",
                    f"{a} is {'even' if a % 2 == 0 else 'odd'}",
                    "sorted: " + " ".join(map(str, sorted(random.sample(range(100), 5)))),
                )
            )
        )
    return "\n".join(lines)


def spelling(random: Random) -> str:
    """Words taken apart, turned round and put in capitals."""
    lines = []
    for _ in range(random.randint(3, 6)):
        w = random.choice((word(random), random.choice(NOUNS), random.choice(FIRST_NAMES)))
        lines.append(
            random.choice(
                (
                    f'"{w}" is spelled {" ".join(w)}',
                    f'"{w}" has {len(w)} letters',
                    f'"{w}" in capitals is "{w.upper()}"',
                    f'"{w}" in small letters is "{w.lower()}"',
                    f'"{w}" backwards is "{w[::-1]}"',
                    f'"{w}" begins with "{w[0]}" and ends with "{w[-1]}"',
                )
            )
        )
    return "\n".join(lines)


def markup(random: Random, split: str = "train") -> str:
    """The source of a small page."""
    return generate(seed_for(split, random.getrandbits(40)), 320, 240, difficulty=random.randint(1, 3)).html


def doing(random: Random) -> str:
    """What is asked for on screens, and the action it comes to."""
    lines = []
    for _ in range(random.randint(3, 6)):
        x, y = random.randrange(FRAME), random.randrange(FRAME)
        where = f'the button "{random.choice(ACTIONS)}" is at {x},{y}'
        value = random.choice((word(random), random.choice(FIRST_NAMES), str(random.randint(0, 9999))))
        lines.append(
            random.choice(
                (
                    f"{where}; click it: {format_action(Click(x, y))}",
                    f'enter "{value}": {format_action(Type(value))}',
                    f"press enter: {format_action(Key('Enter'))}",
                )
            )
        )
    return "\n".join(lines)


KINDS: tuple[Callable[[Random], str], ...] = (story, numbers, spelling, markup, doing)


class Texts:
    """Records of one plain text each, the kinds in turn."""

    name = "text"
    screen = None

    def __init__(self, seed: int, block: int = 100, split: str = "train"):
        self.seed, self.block, self.split = seed, block, split
        self.settings: dict[str, Any] = settings_of(split, seed=seed, block=block)

    async def make(self, number: int, page: object) -> Sequence[Record]:
        return [self._record(number * self.block + n) for n in range(self.block)]

    def _record(self, index: int) -> Record:
        random = draws(self.split, self.seed, self.name, index)
        kind = KINDS[index % len(KINDS)]
        write = partial(markup, split=self.split) if kind is markup else kind
        text = "\n\n".join(write(random) for _ in range(random.randint(1, 3)))
        return Record(f"{kind.__name__}-{index:06d}", self.name, parts=(Text(text),))
