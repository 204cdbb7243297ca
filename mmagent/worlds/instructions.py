"""Instructions that can be checked: how many words and lines, which words, which signs, how it begins and ends.

An answer is right when it keeps all of them, as half an instruction kept is one not kept; the parts tell which. Each
item asks for an exact number of something, so nothing that keeps on talking is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmagent.trajectories import Score
from mmagent.worlds import grading
from mmagent.worlds.examples import Example, Idea, Seeded
from mmagent.worlds.passages import pick
from mmagent.worlds.words import ADJECTIVES, NOUNS, VERBS

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Rule:
    """One instruction: its ``kind``, of :data:`CHECKS`, and what it names."""

    kind: str
    text: str = ""
    number: int = 0

    @property
    def words(self) -> str:
        """As it is told."""
        return WORDING[self.kind].format(text=self.text, number=self.number)

    def kept(self, answer: str) -> bool:
        return CHECKS[self.kind](answer, self)


WORDING = {
    "words": "Use exactly {number} words.",
    "lines": "Write exactly {number} lines, none of them empty.",
    "each": "Each line has exactly {number} words.",
    "holds": 'The word "{text}" occurs.',
    "often": 'The word "{text}" occurs exactly {number} times.',
    "without": 'The letter "{text}" does not occur, small or capital.',
    "lower": "Use no capital letters.",
    "upper": "Use capital letters only.",
    "comma": "Use no commas.",
    "ends": 'The last word is "{text}".',
    "begins": 'The first word is "{text}".',
    "bullets": 'Every line begins with "- ".',
    "full stop": "The last sign is a full stop.",
    "quoted": "The whole answer stands in double quotes.",
}
CHECKS: dict[str, Callable[[str, Rule], bool]] = {
    "words": lambda a, r: len(_words(a)) == r.number,
    "lines": lambda a, r: len(a.split("\n")) == r.number and all(line.strip() for line in a.split("\n")),
    "each": lambda a, r: all(len(_words(line)) == r.number for line in a.split("\n")),
    "holds": lambda a, r: r.text in _lower(a),
    "often": lambda a, r: _lower(a).count(r.text) == r.number,
    "without": lambda a, r: r.text not in a.casefold(),
    "lower": lambda a, r: a == a.lower(),
    "upper": lambda a, r: a == a.upper(),
    "comma": lambda a, r: "," not in grading.narrow(a),
    "ends": lambda a, r: _lower(a)[-1:] == [r.text],
    "begins": lambda a, r: _lower(a)[:1] == [r.text],
    "bullets": lambda a, r: all(line.startswith("- ") for line in a.split("\n")),
    "full stop": lambda a, r: a.endswith("."),
    "quoted": lambda a, r: len(a) > 2 and a[0] == a[-1] == '"' and '"' not in a[1:-1],
}


def worlds() -> tuple[Seeded, ...]:
    """All of this family."""
    return (Seeded("instructions/rules", "instruction-following", 4, _rules, judge_rules),)


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _lower(text: str) -> list[str]:
    return [word.casefold() for word in _words(text)]


def judge_rules(example: Example, answer: str) -> Score:
    """1 where all rules are kept. Parts: the share of them, and each kind that was broken. A text of a few words said
    over and over keeps no rule."""
    assert isinstance(example.state, tuple)
    kept = [rule.kept(answer) for rule in example.state]
    said = _lower(answer)
    varied = len(set(said)) >= min(len(said), 24) // 3
    broken = {f"broken {rule.kind}": 1.0 for rule, good in zip(example.state, kept, strict=True) if not good}
    return Score(float(all(kept) and varied), {"rules": sum(kept) / len(kept), **broken})


def _rules(random: np.random.Generator, level: int) -> Idea | None:
    """Level 0 has two rules, each more has one or two more; the answer is made to keep them, word by word."""
    spoken = [w for w in {*NOUNS, *ADJECTIVES, *VERBS} if _WORD.fullmatch(w) and w == w.lower() and w.isascii()]
    banned = str(random.choice(list("aeiost"))) if level >= 2 else ""
    left = sorted(w for w in spoken if not banned or banned not in w)
    lines, each = int(random.integers(*((1, 2), (2, 4), (2, 5), (3, 6))[level])), int(random.integers(4, 9))
    chosen = pick(random, left, lines * each)
    if len(chosen) < lines * each:
        return None
    rules = [Rule("words", number=each)] if lines == 1 else [Rule("lines", number=lines), Rule("each", number=each)]
    middle = chosen[1 + int(random.integers(len(chosen) - 2))]
    named = [Rule("begins", chosen[0]), Rule("ends", chosen[-1]), Rule("holds", middle)]
    if level == 3:
        chosen = [middle if n in (2, each + 1) else w for n, w in enumerate(chosen)]
        named = [Rule("often", middle, chosen.count(middle))]
    more = [Rule("comma"), Rule(str(random.choice(("lower", "upper", "full stop"))))]
    if lines > 1:
        more.append(Rule("bullets"))
    # one names a word, or what somebody says of something else would keep them all
    taken = [named[int(random.integers(len(named)))]]
    taken += [more[int(n)] for n in random.permutation(len(more))[: (0, 1, 1, 2)[level]]]
    rules += taken + ([Rule("without", banned)] if banned else [])
    answer = _written(chosen, lines, each, rules)
    if not all(rule.kept(answer) for rule in rules):
        return None
    topic = pick(random, sorted(spoken), 1)[0]
    told = " ".join(rules[int(n)].words for n in random.permutation(len(rules)))
    question = f'Write something, on "{topic}" or anything else. {told}'
    return Idea(question, answer, reasoning=f"There are {len(rules)} rules to keep.", state=tuple(rules))


def _written(chosen: Sequence[str], lines: int, each: int, rules: Sequence[Rule]) -> str:
    kinds = {rule.kind for rule in rules}
    rows = [" ".join(chosen[n * each : (n + 1) * each]) for n in range(lines)]
    text = "\n".join(f"- {row}" if "bullets" in kinds else row for row in rows)
    text = text.upper() if "upper" in kinds else text
    return f"{text}." if "full stop" in kinds else text
