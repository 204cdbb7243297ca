"""The languages of synthetic pages: small lexicons, and how each writes names, dates and prices.

A lexicon is a file of ``lexicons/``: sections in brackets, entries with commas between them; titles, sentences, formats
and phrases have a line each. Patterns name what stands in them: ``{a}`` an adjective, ``{n}`` a noun, ``{v}`` a verb.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("lexicons")
NAMES = {"en": "English", "zh": "Chinese", "de": "German", "es": "Spanish", "fr": "French", "ja": "Japanese",
         "ru": "Russian"}  # fmt: skip
"""Codes of all languages there are, the first is the one that needs nothing."""
_BY_LINES = ("titles", "sentences", "formats", "phrases")


@dataclass(frozen=True)
class Language:
    """``lists``: words by section; ``phrases``: what English phrases of the templates are in this language;
    ``formats``: how things, persons, dates, numbers and prices are written. ``spaces`` stand between its words."""

    code: str
    lists: Mapping[str, tuple[str, ...]]
    formats: Mapping[str, str]
    phrases: Mapping[str, str]

    @property
    def spaces(self) -> bool:
        return self.formats["space"] == "yes"

    def say(self, phrase: str) -> str:
        """``phrase`` of the templates, given in English, in this language. ``KeyError`` for one that it lacks."""
        return phrase if self.code == "en" else self.phrases[phrase]

    def glyphs(self) -> str:
        """Every character that its pages can hold, beyond ASCII."""
        texts = [*self.lists.values(), tuple(self.phrases.values()), tuple(self.formats.values())]
        return "".join(sorted({c for words in texts for word in words for c in word if c > "\x7f"}))


@functools.cache
def language(code: str) -> Language:
    """The language of ``code``; ``ValueError`` when there is none."""
    if code not in NAMES:
        raise ValueError(f"language {code!r} is none of {', '.join(NAMES)}")
    text = (FOLDER / f"{code}.txt").read_text(encoding="utf-8")
    _, *parts = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)
    lists: dict[str, tuple[str, ...]] = {}
    pairs: dict[str, dict[str, str]] = {"formats": {}, "phrases": {}}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if name in pairs:
            rows = (line.split(" = ", 1) for line in body.strip().splitlines())
            pairs[name] = {key.strip(): value for key, value in rows}
        elif name in _BY_LINES:
            lists[name] = tuple(body.strip().splitlines())
        else:
            lists[name] = tuple(" ".join(word.split()) for word in body.split(",") if word.strip())
    return Language(code, lists, pairs["formats"], pairs["phrases"])
