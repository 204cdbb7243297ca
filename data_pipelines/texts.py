"""Plain text from seeds: small facts in sentences, pages' source, and how screens are talked about.

Not literature: it teaches a small model to spell, copy, count, compare and close its brackets, which is what acting
on screens asks of it, and needs no download. A run on real text names its own shards instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from data_pipelines.mixture import digest
from mmagent.actions import Click, Key, Type, format_action
from mmagent.chat import Text
from mmagent.geometry import FRAME
from mmagent.records import Record


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
Ada Alan Barbara Carla Chen Dana David Elena Emil Fatima Grace Hans Ines Ivan Jamal Jana Kofi Lena Linus Maria Mei
Nadia Noah Olga Omar Paul Priya Rosa Sam Sofia Tariq Uma Vera Wei Yuki Zoe
""")
THINGS = _words("""
account address album archive article basket bill book button calendar camera card chart city cloud contact coupon
document email event file flight folder form game garden group hotel house image invoice key lamp letter list map
message meeting menu movie music note order page parcel password phone photo plan price profile project recipe
report result river road school search song station store street table tab task team ticket title train tree video
visit voucher weather window word
""")
QUALITIES = _words("""
active big blue bright busy calm cheap clean clear closed cold dark deep early easy empty fast final first free
fresh full good green hidden high hot last late light local long low main new next noisy old open orange plain
private public quick quiet red rich round safe sharp short simple slow small soft strong tall warm wide yellow
""")
DOINGS = _words("""
adds answers asks books brings buys calls changes checks closes copies counts deletes draws finds gets gives keeps
likes loads makes moves names needs opens orders paints picks plans prints reads removes saves sees selects sells
sends shows sorts starts stops stores takes tests uses visits wants watches writes
""")
DAYS = _words("""
Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")


def word(random: Random) -> str:
    """A made-up word, as fields and passwords hold."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(random.choice(letters) for _ in range(random.randint(3, 8)))


def story(random: Random) -> str:
    """Sentences about who does what, then questions that the text answers."""
    facts = []
    for _ in range(random.randint(3, 6)):
        facts.append((random.choice(NAMES), random.choice(DOINGS), random.choice(QUALITIES), random.choice(THINGS)))
    lines = [f"{n} {v} the {q} {t} on {random.choice(DAYS)}." for n, v, q, t in facts]
    name, doing, quality, thing = random.choice(facts)
    if sum(fact[:2] == (name, doing) for fact in facts) == 1:
        lines.append(f"What is it that {name} {doing}? The {quality} {thing}.")
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
        w = random.choice((word(random), random.choice(THINGS), random.choice(NAMES)))
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


def markup(random: Random) -> str:
    """The source of a small page."""
    color = random.choice(("navy", "teal", "maroon", "#333333", "#0055aa"))
    style = f"color: {color}; margin: {random.randint(2, 24)}px"
    rows = [f'<li><a href="#{t}">{random.choice(QUALITIES)} {t}</a></li>' for t in random.sample(THINGS, 3)]
    fields = [f'<label>{t} <input name="{t}" value="{word(random)}"></label>' for t in random.sample(THINGS, 2)]
    parts = [
        f"<h1>{random.choice(QUALITIES).capitalize()} {random.choice(THINGS)}</h1>",
        f'<p style="{style}">{story(random)}</p>',
        "<ul>\n" + "\n".join(rows) + "\n</ul>",
        "<form>\n" + "\n".join(fields) + f"\n<button>{random.choice(THINGS).capitalize()}</button>\n</form>",
    ]
    return "<body>\n" + "\n".join(random.sample(parts, random.randint(2, 4))) + "\n</body>"


def doing(random: Random) -> str:
    """What is asked for on screens, and the action it comes to."""
    lines = []
    for _ in range(random.randint(3, 6)):
        x, y = random.randrange(FRAME), random.randrange(FRAME)
        where = f'the button "{random.choice(THINGS).capitalize()}" is at {x},{y}'
        value = random.choice((word(random), random.choice(NAMES), str(random.randint(0, 9999))))
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

    def __init__(self, seed: int, block: int = 100):
        self.seed, self.block = seed, block
        self.settings: dict[str, Any] = {"seed": seed, "block": block}

    async def make(self, number: int, page: object) -> Sequence[Record]:
        return [self._record(number * self.block + n) for n in range(self.block)]

    def _record(self, index: int) -> Record:
        random = Random(digest(self.seed, self.name, index))
        kind = KINDS[index % len(KINDS)]
        text = "\n\n".join(kind(random) for _ in range(random.randint(1, 3)))
        return Record(f"{kind.__name__}-{index:06d}", self.name, parts=(Text(text),))
