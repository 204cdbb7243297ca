"""What is asked of somebody at a site: what its data are, what they must become, and how an expert does it."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmagent.worlds.pages.apps import Step
from mmagent.worlds.words import Words

LEVELS = 4
"""Of errands, 0 the shortest."""
BOUNDS = (3, 6, 10)
"""Steps of the expert at which levels 1, 2 and 3 begin."""
Data = dict[str, Any]
"""A site's database, as JSON has it."""
ANSWER = " Answer with nothing but that."


@dataclass(frozen=True)
class Errand:
    """One thing to do at ``site``. It is done when the database equals ``wanted``, to the letter: what was changed
    beside it was not asked for. Reading leaves no trace there.

    ``answer`` is what must be told at the end, None where nothing is asked; ``others`` are what the same question could
    be answered with: an answer that names one of them, too, is none. Where not ``possible``, the right end is to say
    so.
    """

    kind: str
    goal: str
    db: Data
    wanted: Data
    steps: tuple[Step, ...]
    answer: str | None = None
    others: tuple[str, ...] = ()
    possible: bool = True

    @property
    def level(self) -> int:
        """How long it is, by the steps that the expert takes: clicks, things typed, things dragged."""
        return sum(len(self.steps) >= bound for bound in BOUNDS)


class Draw:
    """The seeded source of an errand's words and numbers."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)
        self.words = Words(self.rng)

    def pick(self, rows: Iterable[Any]) -> Any:
        return self.rng.choice(list(rows))

    def things(self, count: int) -> list[str]:
        """Names of things, none of which stands within another."""
        found: list[str] = []
        while len(found) < count:
            name = self.words.fresh(self.words.thing)
            if not any(name.lower() in other.lower() or other.lower() in name.lower() for other in found):
                found.append(name)
        return found

    def people(self, count: int) -> list[str]:
        """Full names, no two with a word in common."""
        found: list[str] = []
        while len(found) < count:
            name = self.words.fresh(self.words.name)
            if not any(set(name.split()) & set(other.split()) for other in found):
                found.append(name)
        return found


def changed(db: Data, change: Callable[[Data], None]) -> Data:
    """A copy of ``db`` after ``change``."""
    after = copy.deepcopy(db)
    change(after)
    return after


def row(rows: Iterable[Data], **fields: Any) -> Data:
    """The row with these fields."""
    return next(one for one in rows if all(one[name] == value for name, value in fields.items()))


def click(deed: str) -> Step:
    """The button or link that does ``deed``."""
    return Step("click", f'[data-do="{deed}"]')


def fill(**fields: str) -> list[Step]:
    """Write into fields of the form, in place of what stands there."""
    steps = []
    for name, text in fields.items():
        steps += [Step("click", f'#main [name="{name}"]'), Step("hotkey", text="ctrl+a"), Step("type", text=text)]
    return steps


def choose(**fields: str | int) -> list[Step]:
    """Choose options of the form."""
    return [Step("click", f'#main input[name="{name}"][value="{value}"]') for name, value in fields.items()]


SUBMIT = Step("click", "#main form button.main")


def search(text: str) -> list[Step]:
    return [*fill(q=text), Step("click", "form.inline button")]


def told(said: str, errand: Errand) -> bool:
    """Whether ``said`` answers the question: the answer stands in it as words of its own, and no other candidate."""
    if errand.answer is None:
        return True
    plain = _plain(said)

    def named(candidate: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(_plain(candidate))}(?!\w)", plain) is not None

    rest = plain.replace(_plain(errand.answer), " ")
    others = [other for other in errand.others if _plain(other) != _plain(errand.answer)]
    return named(errand.answer) and not any(
        re.search(rf"(?<!\w){re.escape(_plain(other))}(?!\w)", rest) for other in others
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace(",", "").split())


Maker = Callable[[Draw], Errand]
Kinds = Mapping[str, Maker]
