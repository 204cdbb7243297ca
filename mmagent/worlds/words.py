"""Text for synthetic pages: names, labels, numbers and plain sentences, drawn from a seeded generator."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path


def _load() -> dict[str, tuple[str, ...]]:
    """``words.txt``: sections in brackets, entries with commas between them."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    _, *parts = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)
    sections = zip(parts[::2], parts[1::2], strict=True)
    return {
        name: tuple(" ".join(word.split()) for word in words.split(",") if word.strip()) for name, words in sections
    }


_LISTS = _load()
FIRST_NAMES = _LISTS["first_names"]
LAST_NAMES = _LISTS["last_names"]
CITIES = _LISTS["cities"]
NOUNS = _LISTS["nouns"]
ADJECTIVES = _LISTS["adjectives"]
VERBS = _LISTS["verbs"]
ACTIONS = _LISTS["actions"]
FIELDS = _LISTS["fields"]
SECTIONS = _LISTS["sections"]
OPTIONS = _LISTS["options"]
COLUMNS = _LISTS["columns"]
STATES = _LISTS["states"]
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Words:
    """Draws text from ``rng``; ``fresh`` does not repeat itself, so that a page's labels tell its elements apart."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self._used: set[str] = set()

    def fresh(self, source: Sequence[str] | Callable[[], str]) -> str:
        """A text that this page does not hold yet (one that it holds where the source has run out)."""
        text = ""
        for _ in range(30):
            text = source() if callable(source) else self.rng.choice(source)
            if text.casefold() not in self._used:
                break
        self._used.add(text.casefold())
        return text

    def several(self, source: Sequence[str] | Callable[[], str], count: int) -> list[str]:
        return [self.fresh(source) for _ in range(count)]

    def name(self) -> str:
        return f"{self.rng.choice(FIRST_NAMES)} {self.rng.choice(LAST_NAMES)}"

    def email(self) -> str:
        first, noun = self.rng.choice(FIRST_NAMES[:20]).lower(), self.rng.choice(NOUNS)
        return f"{first}{self.rng.choice(('', '.', '_'))}{self.rng.choice(LAST_NAMES[:12]).lower()}@{noun}.example"

    def date(self) -> str:
        day, month, year = self.rng.randint(1, 28), self.rng.randint(1, 12), self.rng.randint(1990, 2030)
        forms = (f"{day} {MONTHS[month - 1]} {year}", f"{year}-{month:02}-{day:02}", f"{MONTHS[month - 1]} {day}")
        return self.rng.choice(forms)

    def time(self) -> str:
        return f"{self.rng.randint(0, 23)}:{self.rng.randint(0, 59):02}"

    def number(self) -> str:
        return f"{self.rng.randint(1, 10 ** self.rng.randint(1, 4)):,}"

    def price(self) -> str:
        return f"{self.rng.choice('$€£')}{self.rng.randint(1, 999)}.{self.rng.choice(('00', '50', '95', '99'))}"

    def percent(self) -> str:
        return f"{self.rng.choice(('', '+', '-'))}{self.rng.randint(0, 99)}%"

    def thing(self) -> str:
        """Two words, capitalised: "Quiet harbour"."""
        return f"{self.rng.choice(ADJECTIVES)} {self.rng.choice(NOUNS)}".capitalize()

    def title(self) -> str:
        """A heading of two to four words."""
        noun, other = self.rng.choice(NOUNS), self.rng.choice(NOUNS)
        forms = (
            f"{self.rng.choice(ADJECTIVES)} {noun}",
            f"The {noun} and the {other}",
            f"Your {noun}",
            f"{noun} {other}",
            f"One {self.rng.choice(ADJECTIVES)} {noun}",
            f"{noun} of {self.rng.choice(CITIES)}",
        )
        text = self.rng.choice(forms)
        return text[0].upper() + text[1:]

    def sentence(self) -> str:
        first, second = self.rng.choice(NOUNS), self.rng.choice(NOUNS)
        forms = (
            f"the {self.rng.choice(ADJECTIVES)} {first} {self.rng.choice(VERBS)} the {second}",
            f"{self.rng.choice(FIRST_NAMES)} {self.rng.choice(VERBS)} one {self.rng.choice(ADJECTIVES)} {first}",
            f"every {first} {self.rng.choice(VERBS)} {self.rng.randint(2, 90)} {self.rng.choice(ADJECTIVES)} things",
            f"in {self.rng.choice(CITIES)} the {first} {self.rng.choice(VERBS)} its {second}",
        )
        text = self.rng.choice(forms)
        return text[0].upper() + text[1:] + self.rng.choice("...!")

    def paragraph(self, sentences: int) -> str:
        return " ".join(self.sentence() for _ in range(sentences))
