"""Who judges the answers to published questions: one function a published rule, from question and answer to [0, 1].

An answer is what was said behind any thinking. It is hostile: read up to a length, by patterns that take linear time,
and never evaluated. What cannot be read as an answer raises ``ValueError``, which counts as malformed; what can be read
and is wrong gives 0. Each rule names its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from evals.question_sets import Question

LONGEST = 2000
"""Characters of a short answer that are read."""
LEEWAY = 0.05
Judge = Callable[[Question, str], float]
_LEAD = re.compile(r"(?:the )?(?:correct |best |right )?(?:answer|option)(?: is)?[ ]?:?[ ]?", re.IGNORECASE)
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])\)?)[.:]?(?:\s+(\S.*))?", re.DOTALL)


def read(answer: str, longest: int = LONGEST) -> str:
    """An answer without space around it. Raises ``ValueError`` for one that is empty or too long."""
    if len(answer) > longest:
        raise ValueError(f"an answer of {len(answer)} characters, at most {longest} are read")
    if not answer.strip():
        raise ValueError("an empty answer")
    return answer.strip()


# ------------------------------------------------------------------------------------------ options


def choice(question: Question, answer: str) -> float:
    """Whether the option is right that an answer names (:func:`chosen`)."""
    return float(chosen(question.options, answer) == question.answers[0])


def chosen(options: Mapping[str, str], answer: str) -> str:
    """The letter that an answer names: a letter, alone or before the words of its option, or those words alone. Raises
    ``ValueError`` for anything else."""
    if len(answer) > LONGEST:
        raise ValueError(f"an answer of {len(answer)} characters, at most {LONGEST} are read")
    said = answer.strip().strip("*").strip()
    if lead := _LEAD.match(said):
        said = said[lead.end() :].strip("* ")
    by_words = {_plain(words): letter for letter, words in options.items()}
    if _plain(said) in by_words:
        return by_words[_plain(said)]
    found = _LETTER.fullmatch(said)
    letter = (found[1] or found[2]).upper() if found else ""
    if found is None or letter not in options or (found[3] and by_words.get(_plain(found[3])) != letter):
        raise ValueError(f"{answer[:60]!r} names none of the options {', '.join(options)}")
    return letter


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


# ------------------------------------------------------------------------------------------ short answers


def relaxed(question: Question, answer: str) -> float:
    """Relaxed accuracy (Methani et al. 2020; Masry et al. 2022, section 5.1; arXiv 2203.10244): within 5 % of a number
    that is not 0, else the same text but for capitals. A number is what Python's ``float`` reads; with ``%`` behind it,
    its hundredth."""
    said = read(answer)
    return float(any(_near(said, truth.strip()) for truth in question.answers))


def _near(said: str, truth: str) -> bool:
    number, wanted = _float(said), _float(truth)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= LEEWAY
    return said.lower() == truth.lower()


def _float(text: str) -> float | None:
    share = text.endswith("%")
    try:
        return float(text.rstrip("%")) / 100 if share else float(text)
    except ValueError:
        return None
