"""Questions in words alone: arithmetic, spelling, passages that hold their answers, and orders to be worked out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mmagent.worlds import grading
from mmagent.worlds.examples import Idea, Seeded
from mmagent.worlds.words import ADJECTIVES, CITIES, FIRST_NAMES, NOUNS

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NUMBER = "Answer with a number."
_TEXT = "Answer with the text alone."


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (
        Seeded("text/arithmetic", "math", 4, _arithmetic, grading.number),
        Seeded("text/strings", "text", 3, _strings, grading.verbatim),
        Seeded("text/facts", "text", 3, _facts, grading.word),
        Seeded("text/order", "logic-puzzle", 3, _order, grading.word),
    )


def pick(random: np.random.Generator, choices: Sequence[str], count: int) -> list[str]:
    """``count`` different ones, in any order."""
    return [choices[int(n)] for n in random.permutation(len(choices))[:count]]


def _arithmetic(random: np.random.Generator, level: int) -> Idea | None:
    """0: one operation on small numbers; 1: on larger ones; 2: three numbers; 3: brackets and exact division."""

    def draw(low: int, high: int) -> int:
        return int(random.integers(low, high))

    if level <= 1:
        most = (20, 1000)[level]
        a, b, sign = draw(2, most), draw(2, most), "+-x"[draw(0, 3)]
        if sign == "x":
            a, b = a % (12, 100)[level] + 2, b % 12 + 2
        value = {"+": a + b, "-": a - b, "x": a * b}[sign]
        return Idea(f"What is {a} {sign} {b}? {_NUMBER}", str(value), reasoning=f"{a} {sign} {b} = {value}.")
    a, b, c, d = draw(2, 60), draw(2, 13), draw(2, 60), draw(2, 13)
    if level == 2:
        sign = "+-"[draw(0, 2)]
        product, value = a * b, a * b + c if sign == "+" else a * b - c
        steps = f"{a} x {b} = {product}; {product} {sign} {c} = {value}."
        return Idea(f"What is {a} x {b} {sign} {c}? {_NUMBER}", str(value), reasoning=steps)
    whole = (a + c) * b  # made to divide: the dividend is a multiple of what it is divided by
    steps = f"{a} + {c} = {a + c}; {a + c} x {b * d} = {whole * d}; {whole * d} / {d} = {whole}."
    return Idea(f"What is ({a} + {c}) x {b * d} / {d}? {_NUMBER}", str(whole), reasoning=steps)


def _word(random: np.random.Generator, level: int) -> str:
    if random.random() < 0.5:
        return NOUNS[int(random.integers(len(NOUNS)))]
    letters = "abcdefghijklmnopqrstuvwxyz"
    length = int(random.integers(*((4, 6), (5, 9), (8, 13))[level]))
    return "".join(letters[int(n)] for n in random.integers(26, size=length))


def _strings(random: np.random.Generator, level: int) -> Idea | None:
    word = _word(random, level)
    letter, place = word[int(random.integers(len(word)))], int(random.integers(len(word)))
    spelled = "-".join(word)
    kinds = [
        (f'Write "{word}" backwards.', word[::-1], f"{spelled} backwards is {'-'.join(word[::-1])}."),
        (f'Write "{word}" in capitals.', word.upper(), ""),
        (f'How many letters has "{word}"?', str(len(word)), f"{spelled}: {len(word)} letters."),
    ]
    if level >= 1:
        kinds = [
            kinds[0],
            (f'How often does "{letter}" occur in "{word}"?', str(word.count(letter)), f"{spelled}."),
            (f'Which is letter number {place + 1} of "{word}"?', word[place], f"{spelled}."),
            (f'Write "{word}" without any "{letter}".', word.replace(letter, ""), f"{spelled}."),
        ]
    if level == 2:
        words = sorted({_word(random, 0) for _ in range(5)})
        mixed = pick(random, words, len(words))
        shift = int(random.integers(1, 4))
        moved = "".join(chr((ord(c) - 97 + shift) % 26 + 97) if "a" <= c <= "z" else c for c in word)
        kinds += [
            (f"Sort by the alphabet, with a space between: {' '.join(mixed)}.", " ".join(words), ""),
            (f"Join the first letters of: {' '.join(mixed)}.", "".join(w[0] for w in mixed), ""),
            (f'Move every letter of "{word}" {shift} further in the alphabet, from z on to a.', moved, f"{spelled}."),
        ]
    question, answer, reasoning = kinds[int(random.integers(len(kinds)))]
    return Idea(f"{question} {_TEXT}", answer, reasoning=reasoning) if answer else None


def _facts(random: np.random.Generator, level: int) -> Idea | None:
    """Sentences about people; level 1 asks back from the thing to the person, 2 over two sentences."""
    count = (3, 5, 7)[level]
    people, things, cities = pick(random, FIRST_NAMES, count), pick(random, NOUNS, count), pick(random, CITIES, count)
    days = [_DAYS[int(n)] for n in random.integers(len(_DAYS), size=count)]
    colours = pick(random, ADJECTIVES, count)
    sentences = [
        f"On {day} {who} took the {how} {what} to {where}."
        for day, who, how, what, where in zip(days, people, colours, things, cities, strict=True)
    ]
    n = int(random.integers(count))
    asked = [
        (f"Where did {people[n]} go?", cities[n]),
        (f"What did {people[n]} take along? One word.", things[n]),
        (f"On which day did {people[n]} travel?", days[n]),
    ]
    if level >= 1:
        asked = [(f"Who took the {things[n]} along?", people[n]), (f"Who went to {cities[n]}?", people[n])]
    reasoning = f'It says: "{sentences[n]}"'
    if level == 2:
        owners = pick(random, [p for p in FIRST_NAMES if p not in people], count)
        sentences += [f"The {what} is {owner}'s." for what, owner in zip(things, owners, strict=True)]
        asked = [
            (f"Whose was the thing that {people[n]} took along?", owners[n]),
            (f"To which city did {owners[n]}'s thing go?", cities[n]),
        ]
        reasoning += f' and "{sentences[count + n]}"'
    told = " ".join(pick(random, sentences, len(sentences)))
    question, answer = asked[int(random.integers(len(asked)))]
    return Idea(f"{told}\n{question} {_TEXT}", answer, reasoning=reasoning)


_SCALES = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"))


def _order(random: np.random.Generator, level: int) -> Idea | None:
    """People in a row, told by neighbours, in any order; level 2 turns some comparisons round."""
    people = pick(random, FIRST_NAMES, (3, 4, 6)[level])
    more, most, least = _SCALES[int(random.integers(len(_SCALES)))]
    less = {"taller": "shorter", "older": "younger", "faster": "slower"}[more]
    told = []
    for high, low in pairwise(people):
        turned = level == 2 and random.random() < 0.5
        told.append(f"{low} is {less} than {high}." if turned else f"{high} is {more} than {low}.")
    middle = int(random.integers(1, len(people) - 1))
    asked = [(f"Who is the {most}?", people[0]), (f"Who is the {least}?", people[-1])]
    if level >= 1:
        place = ("", "second", "third", "fourth", "fifth")[middle]
        asked.append((f"Who is the {place} {most}?", people[middle]))
    question, answer = asked[int(random.integers(len(asked)))]
    said = " ".join(pick(random, told, len(told)))
    reasoning = f"From the {most} to the {least}: {', '.join(people)}."
    return Idea(f"{said}\n{question} {_TEXT}", answer, reasoning=reasoning)
