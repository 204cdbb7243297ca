"""Text for synthetic pages: names, labels, numbers and plain sentences of a language, drawn from a seeded generator."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from mmagent.worlds.languages import Language, language

ENGLISH = language("en")
FIRST_NAMES = ENGLISH.lists["first_names"]
LAST_NAMES = ENGLISH.lists["last_names"]
CITIES = ENGLISH.lists["cities"]
NOUNS = ENGLISH.lists["nouns"]
ADJECTIVES = ENGLISH.lists["adjectives"]
VERBS = ENGLISH.lists["verbs"]
ACTIONS = ENGLISH.lists["actions"]
FIELDS = ENGLISH.lists["fields"]
SECTIONS = ENGLISH.lists["sections"]
OPTIONS = ENGLISH.lists["options"]
COLUMNS = ENGLISH.lists["columns"]
STATES = ENGLISH.lists["states"]
MONTHS = tuple(month[:3] for month in ENGLISH.lists["months"])
_PLACE = re.compile(r"\{(\w+)\}")


class Words:
    """Draws text of ``spoken`` from ``rng``; ``fresh`` does not repeat itself, so that a page's labels tell its
    elements apart."""

    def __init__(self, rng: random.Random, spoken: Language = ENGLISH):
        self.rng, self.language = rng, spoken
        self._used: set[str] = set()

    def fresh(self, source: Sequence[str] | Callable[[], str]) -> str:
        """A text that this page does not hold yet (one that it holds where the source has run out)."""
        text = ""
        for _ in range(30):
            text = source() if callable(source) else self.rng.choice(source)
            if text.casefold() not in self._used:
                break
        else:
            left = [] if callable(source) else [word for word in source if word.casefold() not in self._used]
            text = self.rng.choice(left) if left else text
        self._used.add(text.casefold())
        return text

    def keep(self, text: str) -> str:
        """``text``, which this page holds: nothing fresh is the same."""
        self._used.add(text.casefold())
        return text

    def several(self, source: Sequence[str] | Callable[[], str], count: int) -> list[str]:
        return [self.fresh(source) for _ in range(count)]

    def of(self, section: str) -> tuple[str, ...]:
        """All entries of a section of the lexicon: actions, fields, sections, options, columns, states, ..."""
        return self.language.lists[section]

    def new(self, section: str) -> str:
        """A fresh entry of a section."""
        return self.fresh(self.of(section))

    def say(self, phrase: str) -> str:
        """A phrase of the templates, and no other text of the page is the same."""
        return self.keep(self.language.say(phrase))

    def _fill(self, pattern: str) -> str:
        kinds = {"a": "adjectives", "n": "nouns", "v": "verbs", "city": "cities", "first": "first_names",
                 "last": "last_names"}  # fmt: skip

        def word(place: re.Match[str]) -> str:
            return str(self.rng.randint(2, 90)) if place[1] == "number" else self.rng.choice(self.of(kinds[place[1]]))

        text = _PLACE.sub(word, pattern)
        return text[0].upper() + text[1:]

    def name(self) -> str:
        return self._fill(self.language.formats["person"])

    def email(self) -> str:
        first, noun = self.rng.choice(FIRST_NAMES[:20]).lower(), self.rng.choice(NOUNS)
        return f"{first}{self.rng.choice(('', '.', '_'))}{self.rng.choice(LAST_NAMES[:12]).lower()}@{noun}.example"

    def date(self) -> str:
        day, month, year = self.rng.randint(1, 28), self.rng.randint(1, 12), self.rng.randint(1990, 2030)
        name = self.of("months")[month - 1]
        short = name[:3] if self.language.spaces else name
        form = self.rng.choice(self.language.formats["dates"].split(" | "))
        return form.format(d=day, m=month, y=year, month=name, mon=short)

    def time(self) -> str:
        return f"{self.rng.randint(0, 23)}:{self.rng.randint(0, 59):02}"

    def number(self) -> str:
        grouped = f"{self.rng.randint(1, 10 ** self.rng.randint(1, 4)):,}"
        return grouped.replace(",", self.language.formats["thousands"])

    def price(self) -> str:
        formats = self.language.formats
        amount = f"{self.rng.randint(1, 999)}{formats['decimal']}{self.rng.choice(('00', '50', '95', '99'))}"
        return formats["price"].format(symbol=self.rng.choice(formats["currencies"]), amount=amount)

    def percent(self) -> str:
        return f"{self.rng.choice(('', '+', '-'))}{self.rng.randint(0, 99)}%"

    def thing(self) -> str:
        """Two words, capitalised: "Quiet harbour"."""
        text = self._fill(self.language.formats["thing"])
        return text.capitalize() if self.language.code == "en" else text

    def title(self) -> str:
        """A heading of two to four words."""
        return self._fill(self.rng.choice(self.of("titles")))

    def sentence(self) -> str:
        return self._fill(self.rng.choice(self.of("sentences"))) + self.rng.choice(self.language.formats["marks"])

    def paragraph(self, sentences: int) -> str:
        return (" " if self.language.spaces else "").join(self.sentence() for _ in range(sentences))
