"""What a sample must be to be worth training on: rules for its pictures and for its text, each a pure function.

A rule says why it refuses, or nothing. All are off until asked for: what is too small, blurred or repetitive depends on
what the data is for. Thresholds that were measured say on what.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from mmagent.signatures import normalise, words

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana and ideographs: no spaces part their words."""
_STRONG = 99.0  # per cent of the steps of a picture that are weaker than those its sharpness is read from
_REACH = 5  # pixels that a sharp edge, however it lies on the grid, is over in
_FAINT = 8.0  # grey levels: what rises less is noise
_SURE_LETTERS = 24  # of a text, for its language to be told; an ideograph says as much as four letters

GOPHER_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""Most of the characters that the commonest run of n words may make up (MassiveText, arXiv 2112.11446, table A1)."""
GOPHER_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Most of the characters that may lie in runs of n words which occur more than once (the same table)."""
GOPHER_LINES = {"lines": 0.30, "paragraphs": 0.30, "line_characters": 0.20, "paragraph_characters": 0.20}
"""Most lines and paragraphs that were there before, by number and by characters (the same table)."""


@dataclass
class PictureRules:
    """``least_side`` and ``most_side`` in pixels (the shorter and the longer), ``most_aspect`` of longer to shorter;
    0 asks for nothing. ``least_sharpness`` as in :func:`sharpness`: 0.3 keeps all sharp drawings and screens and
    9 in 10 sharp photographs, and leaves out 9 in 10 of what a Gaussian of 2 pixels blurred
    (``python tools/benchmarks/quality.py blur``)."""

    least_side: int = 0
    most_side: int = 0
    most_aspect: float = 0.0
    least_sharpness: float = 0.0

    def __post_init__(self) -> None:
        for name in ("least_side", "most_side", "most_aspect", "least_sharpness"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if 0 < self.most_aspect < 1:
            raise ValueError(f"most_aspect {self.most_aspect}: longer over shorter side is never below 1")


@dataclass
class TextRules:
    """Of all text of a sample. ``languages`` (ISO 639-1) it may be in; one that is too short, or of which the
    identifier is less than ``least_confidence`` sure, passes. ``least_characters`` to ``most_tokens`` bound its length,
    0 asks for nothing; tokens need ``tokenizer``, a ``tokenizer.json``. ``blocklists``: languages of the shipped lists
    (:func:`shipped`) or files of one word or phrase a line; more than ``most_blocked`` hits refuse. ``repetition``: the
    rules of MassiveText, for texts of at least ``repetition_words``: shorter ones repeat by nature.
    """

    languages: list[str] = field(default_factory=list)
    least_confidence: float = 0.5
    least_characters: int = 0
    most_characters: int = 0
    least_tokens: int = 0
    most_tokens: int = 0
    tokenizer: str = ""
    blocklists: list[str] = field(default_factory=list)
    most_blocked: int = 0
    repetition: bool = False
    repetition_words: int = 50

    def __post_init__(self) -> None:
        for name in ("least_characters", "most_characters", "least_tokens", "most_tokens", "most_blocked"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if (self.least_tokens or self.most_tokens) and not self.tokenizer:
            raise ValueError("least_tokens, most_tokens: counting tokens needs a tokenizer; name a tokenizer.json")


# ---------------------------------------------------------------------------------------------- pictures


def size_problem(height: int, width: int, rules: PictureRules) -> str:
    """Why a picture of this size is refused, "" where it is not."""
    short, long = min(height, width), max(height, width)
    if short < rules.least_side:
        return f"{width}x{height}: shorter side below {rules.least_side}"
    if rules.most_side and long > rules.most_side:
        return f"{width}x{height}: longer side above {rules.most_side}"
    if rules.most_aspect and long > rules.most_aspect * short:
        return f"{width}x{height}: sides as {long / short:.1f} to 1"
    return ""


def sharpness(pixels: np.ndarray) -> float | None:
    """How much of the rise of the strongest edges falls on one pixel: 1 for a step, about ``0.4 / s`` behind a Gaussian
    of ``s`` pixels. None where nothing in the ``(h, w, 3)`` uint8 picture rises by more than noise.

    The variance of the Laplacian, the usual measure, tells how much detail there is rather than how sharp it is: a
    blurred page has more of it than a sharp photograph. This one asks edges only, so one threshold serves both.
    """
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    shares = [_edge_share(lines) for lines in (grey[::2], grey.T[::2]) if lines.shape[1] > _REACH]
    found = [share for share in shares if share is not None]
    return float(np.mean(found)) if found else None


def _edge_share(lines: np.ndarray) -> float | None:
    """Along the rows of ``lines``: of the strongest rises over :data:`_REACH` pixels, the share of the steepest one."""
    steps = np.abs(lines[:, 1:] - lines[:, :-1])
    rises = np.abs(lines[:, _REACH:] - lines[:, :-_REACH])
    strong = rises >= max(np.percentile(rises[::2], _STRONG), _FAINT)
    if not strong.any():
        return None
    rows, columns = np.nonzero(strong)
    steepest = np.max([steps[rows, columns + n] for n in range(_REACH)], axis=0)
    return float(np.minimum(steepest / rises[strong], 1.0).mean())


def blur_problem(pixels: np.ndarray, rules: PictureRules) -> str:
    """Why a picture is refused as blurred, "" where it is not."""
    found = sharpness(pixels) if rules.least_sharpness else None
    if found is None or found >= rules.least_sharpness:
        return ""
    return f"sharpness {found:.2f} below {rules.least_sharpness}"


# ---------------------------------------------------------------------------------------------- text


def length_problem(text: str, rules: TextRules, count: Callable[[str], int] | None = None) -> str:
    """Why a text is refused for its length; ``count`` gives its tokens."""
    bounds = [("characters", len(text), rules.least_characters, rules.most_characters)]
    if count is not None and (rules.least_tokens or rules.most_tokens):
        bounds.append(("tokens", count(text), rules.least_tokens, rules.most_tokens))
    for what, have, least, most in bounds:
        if have < least:
            return f"{have} {what}, fewer than {least}"
        if most and have > most:
            return f"{have} {what}, more than {most}"
    return ""


@cache
def _identifier() -> Callable[[str], tuple[str, float]]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError("text.languages: telling languages needs py3langid; pip install 'mmagent[quality]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> tuple[str, float]:
    """ISO 639-1 code of the likeliest of 97 languages and its probability, by py3langid; ``("", 0)`` for a text that
    is too short to tell. Raises ``ValueError`` where the package is missing."""
    letters = "".join(c if c.isalpha() else " " for c in text)
    if sum(4 if ord(c) >= 0x2E80 else 1 for c in letters if c != " ") < _SURE_LETTERS:
        return "", 0.0
    code, sure = _identifier().classify(" ".join(letters.split()))
    return str(code), float(sure)


def check_languages(rules: TextRules) -> None:
    """Raise ``ValueError`` for a language that no text would ever be told to be in."""
    known = sorted(set(_identifier().labels)) if rules.languages else []
    if unknown := [code for code in rules.languages if code not in known]:
        raise ValueError(f"texts.languages: {unknown[0]!r} is not known; there are {', '.join(known)}")


def language_problem(text: str, rules: TextRules) -> str:
    """Why a text is refused for its language."""
    if not rules.languages:
        return ""
    code, sure = language(text)
    if not code or sure < rules.least_confidence or code in rules.languages:
        return ""
    return f"language {code} ({sure:.0%} sure), wanted {', '.join(rules.languages)}"


@dataclass(frozen=True)
class Blocklist:
    """Phrases to look for in a normalised text: single ``words``, which a set finds fast, and a ``pattern`` of all
    others, None where there are none."""

    words: frozenset[str]
    pattern: re.Pattern[str] | None

    def hits(self, text: str) -> int:
        """How often one of them stands there."""
        told = normalise(text)
        found = sum(word in self.words for word in _WORD.findall(told)) if self.words else 0
        return found + (sum(1 for _ in self.pattern.finditer(told)) if self.pattern is not None else 0)


@lru_cache(maxsize=16)
def blocklist(*names: str) -> Blocklist:
    """All phrases of these lists: codes of shipped ones or paths of files, one phrase a line, ``#`` before a remark.
    Raises ``ValueError`` naming a list that is not there or holds nothing."""
    phrases: set[str] = set()
    for name in names:
        path = shipped().get(name, Path(name))
        if not path.is_file():
            raise ValueError(f"blocklist {name!r} is no file, and of the shipped ones there are {', '.join(shipped())}")
        lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
        found = {normalise(line) for line in lines if line}
        if not found:
            raise ValueError(f"{path} holds no phrase")
        phrases |= found
    single = frozenset(phrase for phrase in phrases if phrase.isascii() and _WORD.fullmatch(phrase))
    rest = sorted(phrases - single, key=lambda phrase: (-len(phrase), phrase))
    anywhere = [re.escape(p) for p in rest if _UNSPACED.search(p)]
    whole = [rf"(?<!\w){re.escape(p)}(?!\w)" for p in rest if not _UNSPACED.search(p)]
    return Blocklist(single, re.compile("|".join([*whole, *anywhere])) if rest else None)


@cache
def shipped() -> dict[str, Path]:
    """The small lists of obscene words and slurs that come with the package, by language."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "blocklists").glob("*.txt"))}


def blocked_problem(text: str, rules: TextRules) -> str:
    """Why a text is refused for its words. The words themselves are not repeated."""
    hits = blocklist(*rules.blocklists).hits(text) if rules.blocklists else 0
    return f"{hits} words of a blocklist, more than {rules.most_blocked}" if hits > rules.most_blocked else ""


def repetition_problem(text: str, rules: TextRules) -> str:
    """Which rule of MassiveText a text breaks, if any."""
    if not rules.repetition:
        return ""
    found = words(text)
    if len(found) < rules.repetition_words:
        return ""
    for name, share in line_shares(text).items():
        if share > GOPHER_LINES[name]:
            return f"repeated {name.replace('_', ' ')} {share:.0%}, more than {GOPHER_LINES[name]:.0%}"
    for n, most in GOPHER_TOP.items():
        if (share := top_share(found, n)) > most:
            return f"commonest run of {n} words {share:.0%}, more than {most:.0%}"
    for n, most in GOPHER_REPEATED.items():
        if (share := repeated_share(found, n)) > most:
            return f"repeated runs of {n} words {share:.0%}, more than {most:.0%}"
    return ""


def line_shares(text: str) -> dict[str, float]:
    """Shares of lines and paragraphs that stood before in the text, by number and by characters."""
    shares: dict[str, float] = {}
    for name, pieces in (("line", text.split("\n")), ("paragraph", re.split(r"\n\s*\n", text))):
        whole = [piece.strip() for piece in pieces if piece.strip()]
        again = _again(whole)
        characters = sum(map(len, whole))
        shares[f"{name}s"] = len(again) / len(whole) if whole else 0.0
        shares[f"{name}_characters"] = sum(map(len, again)) / characters if characters else 0.0
    return shares


def _again(pieces: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [piece for piece in pieces if piece in seen or seen.add(piece)]  # type: ignore[func-returns-value]


def top_share(found: Sequence[str], n: int) -> float:
    """Share of the characters of words that the commonest run of ``n`` of them makes up; 0 where none is repeated."""
    runs = Counter(zip(*(found[place:] for place in range(n)), strict=False))
    if not runs or (count := max(runs.values())) < 2:
        return 0.0
    most = max(sum(map(len, run)) for run, times in runs.items() if times == count)
    return min(count * most / sum(map(len, found)), 1.0)


def repeated_share(found: Sequence[str], n: int) -> float:
    """Share of the characters of words that lie in runs of ``n`` which occur more than once; each counts once."""
    runs = list(zip(*(found[place:] for place in range(n)), strict=False))
    counts = Counter(runs)
    inside: Collection[int] = {place + k for place, run in enumerate(runs) if counts[run] > 1 for k in range(n)}
    return sum(len(found[place]) for place in inside) / sum(map(len, found))
