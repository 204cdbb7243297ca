"""Who judges the answers to published questions: one function a published rule, from question and answer to [0, 1].

An answer is what was said behind any thinking. It is hostile: read up to a length, by patterns that take linear time,
and never evaluated. What cannot be read as an answer raises ``ValueError``, which counts as malformed; what can be read
and is wrong gives 0. Each rule names its source.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping

from evals.question_sets import Question
from evals.results import (
    LONGEST,
    REASONED,
    alike,
    list_in,
    pieces,
    read,
    result,
    same_value,
    small,
    stated,
    unset,
    value_in,
    words,
)
from mmagent.worlds.grading import edit_distance

LEEWAY = 0.05
Judge = Callable[[Question, str], float]
_LEAD = re.compile(r"(?:the )?(?:correct |best |right )?(?:answer|option)(?: is)?[ ]?:?[ ]?", re.IGNORECASE)
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?:\)|(?!\w)))[.:,]?\s*(\S.*)?", re.DOTALL)


# ------------------------------------------------------------------------------------------ options


def choice(question: Question, answer: str) -> float:
    """Whether the option is right that an answer names (:func:`chosen`). The rule is ours: the authors of V* take the
    option whose words are the likeliest, which needs the model's probabilities."""
    return _right(question, chosen(question.options, answer))


def chosen(options: Mapping[str, str], answer: str, *, values: bool = False) -> str:
    """The letter that an answer names: a letter, alone or before the words of its option; else the words of an option
    alone, capitals counting where they make a difference. With ``values`` an option may be named by its value, too,
    where no other has it. Of options with the same words the first. Raises ``ValueError`` for anything else."""
    if len(answer) > LONGEST:
        raise ValueError(f"an answer of {len(answer)} characters, at most {LONGEST} are read")
    said = " ".join(unset(answer).split()).strip("* ")
    if lead := _LEAD.match(said):
        said = said[lead.end() :].strip("* ")
    found = _LETTER.fullmatch(said) or _LETTER.fullmatch(words(said))
    letter = (found[1] or found[2]).upper() if found else ""
    behind = words(found[3] or "") if found else ""
    if letter in options and not behind:
        return letter
    named = _named(options, said, values)
    if named is None and letter in options:
        again = _named(options, behind, values)
        named = letter if again and words(options[again]) == words(options[letter]) else None
    if named is None:
        raise ValueError(f"{answer[:60]!r} names none of the options {', '.join(options)}")
    return named


def _named(options: Mapping[str, str], said: str, values: bool) -> str | None:
    """The option of these words, else of these words but for capitals, else of this value; None where there is none,
    or several that differ."""
    value = value_in(said) if values else None
    worth = {letter: value_in(text) for letter, text in options.items()} if value else {}
    for found in (
        [letter for letter, text in options.items() if words(said) and words(text) == words(said)],
        [letter for letter, text in options.items() if words(said) and small(text) == small(said)],
        [letter for letter, one in worth.items() if value and one and same_value(value, one)],
    ):
        if found:
            return found[0] if len({words(options[letter]) for letter in found}) == 1 else None
    return None


def _right(question: Question, letter: str) -> float:
    """Whether an option is the right one or has its words: published scripts compare texts."""
    return float(words(question.options[letter]) == words(question.options[question.answers[0]]))


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


# ------------------------------------------------------------------------------------------ read text

CONTAINED = 1000
"""Characters of an answer of which a part may be the right one."""
FORMULAS = "HME100k"
"""The kind of OCRBench's questions whose answers are formulas."""


def contained(question: Question, answer: str) -> float:
    """OCRBench's rule (Liu et al. 2023, arXiv 2305.07895, and its authors' script): one of the answers stands somewhere
    in what was said, line breaks as spaces and capitals as small letters; for handwritten formulas capitals count and
    spaces do not. So a list of guesses passes where one of them is right."""
    if question.kind == FORMULAS:
        said = "".join(read(answer, CONTAINED).replace("\n", " ").split(" "))
        truths = ["".join(truth.strip().replace("\n", " ").split(" ")) for truth in question.answers]
    else:
        said = read(answer, CONTAINED).lower().strip().replace("\n", " ")
        truths = [truth.lower().strip().replace("\n", " ") for truth in question.answers]
    return float(any(truth and truth in said for truth in truths))


def anls(question: Question, answer: str) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648; DocVQA takes it): 1 - distance /
    the longer length for the nearest answer, 0 where that is below a half. Capitals and runs of space are nothing to
    the distance of edits; lengths are those of the texts as they stand."""
    said = read(answer)
    return max(_similar(said, truth) for truth in question.answers)


def _similar(said: str, truth: str) -> float:
    one, other = (" ".join(text.strip().lower().split()) for text in (said, truth))
    longest = max(len(said.upper()), len(truth.upper()))
    if abs(len(one) - len(other)) * 2 > longest:  # so many letters are too many already
        return 0.0
    alike = 1 - edit_distance(one, other) / longest
    return alike if alike >= 0.5 else 0.0


def consensus(question: Question, answer: str) -> float:
    """VQA accuracy over ten people's answers (Antol et al. 2015, arXiv 1505.00468; TextVQA takes it): the mean, over
    all choices of nine of them, of the share of three that said the same, at most 1; both sides as :func:`spoken`."""
    said = spoken(read(answer))
    truths = [spoken(truth) for truth in question.answers]
    others = (truths[:n] + truths[n + 1 :] for n in range(len(truths)))
    return sum(min(1.0, rest.count(said) / 3) for rest in others) / len(truths)


def spoken(text: str) -> str:
    """An answer as the VQA evaluation compares them: small letters, no punctuation, no articles, words for small
    numbers as digits, contractions with their apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = " ".join(text.split("\n")).replace("\t", " ").strip()
    plain = text
    for sign in _SIGNS:  # beside a space it goes, between letters it becomes one
        plain = plain.replace(sign, "" if sign + " " in text or " " + sign in text else " ")
    words = [_DIGITS.get(word, word) for word in _STOP.sub("", plain).split()]
    return " ".join(_SHORTENED.get(word, word) for word in words if word not in ("a", "an", "the"))


_STOP = re.compile(r"\.(?!\d)")
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(n) for n, word in enumerate(_WORDS)}
_DIGITS["none"] = "0"
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've "
)


def _shortened() -> dict[str, str]:
    """What is written without one of its apostrophes, and what it stands for."""
    known = {}
    for whole in _CONTRACTIONS.split():
        for place, sign in enumerate(whole):
            if sign == "'":
                known[whole[:place] + whole[place + 1 :]] = whole
    return known | {"somebody'd": "somebodyd"}  # the published table has it the wrong way round


_SHORTENED = _shortened()


# ------------------------------------------------------------------------------------------ numbers

SENTENCE = 200
"""Characters of an answer that is to be a count."""
_TEENS = ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NAMES = {word: n for n, word in enumerate((*_WORDS, *_TEENS))}
_NAMES |= {f"{ten}{one}": 20 + 10 * t + n for t, ten in enumerate(_TENS) for n, one in
           enumerate(("", *(f"-{word}" for word in _WORDS[1:10])))}  # fmt: skip


_COUNT = re.compile(
    r"(?:(?<![\w)])-)?(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    rf"|\b(?:{'|'.join(_TENS)})[ -](?:{'|'.join(_WORDS[1:10])})\b|[a-z]+(?:-[a-z]+)?",
    re.ASCII,
)


def count(question: Question, answer: str) -> float:
    """Whether the only number in a sentence, in digits or as a word up to ninety-nine, is the right one. The rule is
    ours, as CountBenchQA is published without one: "5 of them, one is red" names two numbers and is malformed."""
    said = read(answer, SENTENCE).lower()
    found = {_counted(word) for word in _COUNT.findall(said)} - {None}
    if len(found) != 1:
        raise ValueError(f"{answer[:60]!r} names {len(found)} numbers, not one")
    return float(found == {question.answers[0]})


def _counted(word: str) -> str | None:
    if word.replace(" ", "-") in _NAMES:
        return str(_NAMES[word.replace(" ", "-")])
    if word[-1].isdigit():
        whole, _, rest = word.replace(",", "").partition(".")
        return str(int(whole)) + (f".{rest}" if rest.strip("0") else "")
    return None


# ------------------------------------------------------------------------------------------ worked answers

_PICKED = re.compile(r"\(([A-Z])\)")


def picked(question: Question, answer: str) -> float:
    """Whether the option is right that all of an answer names, or its first line, or its result
    (:func:`~evals.results.stated`), which must not name different ones. Video-MME's script (Fu et al. 2024,
    arXiv 2405.21075) takes the first letter that it finds, in whatever sentence it stands."""
    said = read(answer, REASONED)
    found: dict[str, str] = {}
    for piece in dict.fromkeys((said, said.split("\n")[0], stated(said)[0])):
        with contextlib.suppress(ValueError):  # it may name none as long as another does
            letter = _option(question.options, piece)
            found[words(question.options[letter])] = letter
    if len(found) != 1:
        named = ", ".join(sorted(found.values())) or "none"
        raise ValueError(f"{answer[:60]!r} names {named} of {', '.join(question.options)}")
    return _right(question, *found.values())


def mathvista(question: Question, answer: str) -> float:
    """MathVista's comparison (Lu et al. 2023, arXiv 2310.02255) without the language model that its script asks to find
    the answer: what :func:`~evals.results.stated` finds is read by rule (:func:`~evals.results.result`). ``kind`` is
    "multi_choice", "integer", "list" or "float N", N the decimals that both sides are rounded to; of whole numbers the
    decimals are cut. Nor is the most similar option taken for one that was not named."""
    said, sure = stated(answer)
    if question.kind == "multi_choice":
        return _right(question, _option(question.options, said, values=True))
    if question.kind == "list":
        found, wanted = list_in(said), list_in(question.answers[0])
        if None in found:
            raise ValueError(f"{said[:60]!r} holds a list of what are no numbers")
        pairs = zip(found, wanted, strict=False)
        return float(len(found) == len(wanted) and all(a and b and same_value(a, b) for a, b in pairs))
    number, truth = result(said, sure).number, float(question.answers[0])
    if abs(number.imag) > 1e-9:
        raise ValueError(f"{said[:60]!r} is no real number")
    if question.kind == "integer":
        return float(int(round(number.real, 9)) == int(truth))
    places = int(question.kind.removeprefix("float "))
    return float(round(number.real, places) == round(truth, places))


def mathvision(question: Question, answer: str) -> float:
    """MATH-Vision's comparison (Wang et al. 2024, arXiv 2402.14804): the letter or the words of the right option; else
    the same text or, to two decimals, the same value, of tuples and lists element by element. Formulas are read by our
    own grammar, not by latex2sympy, and what is stated must be a value as a whole; mixed numbers, units and percent
    are read, a ratio is a text, and so is a single letter."""
    said, sure = stated(answer)
    if question.options:
        return _right(question, _option(question.options, said, values=True))
    truth = question.answers[0]
    if any(alike(piece, truth) for piece in pieces(said, sure)):
        return 1.0
    wanted = value_in(truth)
    if wanted is None:
        return 0.0  # a text, and another one
    return float(same_value(result(said, sure), wanted, places=2))


def _option(options: Mapping[str, str], said: str, *, values: bool = False) -> str:
    """The letter that a result names (:func:`chosen`), or the only letter in brackets in it."""
    try:
        return chosen(options, said, values=values)
    except ValueError:
        letters = set(_PICKED.findall(said)) & set(options)
        if len(letters) != 1:
            raise
        return letters.pop()
