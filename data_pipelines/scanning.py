"""One look at every sample: which rule it breaks, and its signatures for what needs all of them at once.

A scan is a function of the shards and the rules. It is written block by block beside the result, so that one that was
killed goes on where it was, and its samples need no room in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipelines.filters import (
    PictureRules,
    TextRules,
    blocked_problem,
    blur_problem,
    check_languages,
    language_problem,
    length_problem,
    repetition_problem,
    shipped,
    size_problem,
)
from data_pipelines.mixture import digest
from data_pipelines.near_duplicates import PICTURE, SAMPLE, DuplicateRules, sign_text, signed_rows
from data_pipelines.record_texts import answer_of, texts_of, turns_of
from data_pipelines.shards import ShardSet
from data_pipelines.workers import LimitsConfig, in_order
from mmagent.contamination import Fingerprint, Judged, Signed
from mmagent.records import Record, RecordError, decode_image, from_sample, image_size
from mmagent.vocab import Vocab

BLOCK = 64
"""Samples noted, and scored, together; a scan that is killed repeats at most one block a process."""
SIGNED = 2
"""Raised with what scans note of a sample: one that was begun before is not gone on with."""
REASONS = (
    "", "unreadable", "resolution", "length", "words", "repetition", "language", "blur", "evaluation", "score",
    "duplicate", "balance",
)  # fmt: skip
"""Why a sample is left out, in the order in which the rules are asked; "" keeps it."""


class Scorer(Protocol):
    """How well texts say what pictures show; greater is better, and only the order matters to us. ``fingerprint``
    tells it from every scorer that would give other scores."""

    fingerprint: str

    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> Sequence[float]:
        """``images``: ``(h, w, 3)`` uint8 of any sizes, as many as ``texts``."""
        ...


@dataclass
class ScanRules:
    """What a sample is asked. ``evaluations`` are files of ``python -m evals fingerprint`` and folders of held-out
    shards: what is in them must not be trained on. ``least_score``: what a scorer must give to a picture and its
    text, of samples with one picture; it needs a scorer.

    Samples with several pictures, or of which nothing is said, have no score; they stay, and are counted as not scored.
    A whole conversation about pictures is no caption of any of them, and its cosine says little beside those of pairs:
    interleaved documents want each picture compared with every sentence, and a line of their own (as MMC4 did, arXiv
    2304.06939).
    """

    pictures: PictureRules = field(default_factory=PictureRules)
    texts: TextRules = field(default_factory=TextRules)
    duplicates: DuplicateRules = field(default_factory=DuplicateRules)
    evaluations: list[str] = field(default_factory=list)
    least_score: float | None = None

    @property
    def decodes(self) -> bool:
        """Whether pixels are needed."""
        rules = self.pictures.least_sharpness, self.duplicates.remove, self.evaluations, self.least_score is not None
        return any(rules)


@dataclass(frozen=True)
class Look:
    """What one sample looks like: its ``row`` of :data:`SAMPLE` with the ``reason`` it is left out for, the ``problem``
    in words, its ``pictures`` (rows of :data:`PICTURE`), and the pair that a scorer is to judge."""

    row: np.ndarray
    key: str
    reason: str = ""
    problem: str = ""
    pictures: np.ndarray = field(default_factory=lambda: np.empty(0, PICTURE))
    pair: tuple[np.ndarray, str] | None = None


@dataclass(frozen=True)
class Span:
    """Consecutive samples, up to ``last``, which is not among them."""

    last: int
    rows: int


class Scanner:
    """Asks the rules. One a process; what it needs is read once."""

    def __init__(self, folders: Sequence[str], rules: ScanRules):
        """Raises ``ValueError`` for a rule that lacks what it needs."""
        self.sets = [ShardSet(folder) for folder in folders]
        self.starts = np.cumsum([0, *(len(shards) for shards in self.sets)])
        self.rules = rules
        self.fingerprint = read_evaluations(rules.evaluations)
        self._count = self._counter()
        self._ask_once()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, number: int) -> tuple[int, int]:
        """Which set a sample is in, and its number there."""
        at = int(np.searchsorted(self.starts, number, side="right")) - 1
        return at, number - int(self.starts[at])

    def read(self, number: int) -> Record:
        """Sample ``number`` of all sets. Raises :class:`~mmagent.records.RecordError`."""
        at, local = self.place(number)
        return from_sample(self.sets[at].read(local))

    def key(self, number: int) -> str:
        """Of a sample that can be read."""
        at, local = self.place(number)
        return str(self.sets[at].read(local)["__key__"])

    def look(self, number: int) -> Look:
        """Ask all rules about a sample."""
        row, key = np.zeros((), SAMPLE), ""
        try:
            record = self.read(number)
            key = record.key
            row["key"] = digest(key)
            return self._judge(record, row)
        except RecordError as error:
            problem = f"{error.field}: {error.problem}"
            return Look(row, _printable(error.key), "unreadable", _printable(problem))
        except MemoryError:
            return Look(row, key, "unreadable", "looking at it takes more memory than is allowed")

    def _judge(self, record: Record, row: np.ndarray) -> Look:
        """The cheapest rules are asked first."""
        rules, key = self.rules, record.key
        for n, image in enumerate(record.images):
            height, width = image_size(image, key, f"images[{n}]")
            if problem := size_problem(height, width, rules.pictures):
                return Look(row, key, "resolution", f"images[{n}]: {problem}")
        text = "\n\n".join(texts_of(record))
        for reason, ask in (
            ("length", lambda: length_problem(text, rules.texts, self._count)),
            ("words", lambda: blocked_problem(text, rules.texts)),
            ("repetition", lambda: repetition_problem(text, rules.texts)),
            ("language", lambda: language_problem(text, rules.texts)),
        ):
            if problem := ask():
                return Look(row, key, reason, problem)
        images = enumerate(record.images if rules.decodes else ())
        pixels = [decode_image(image.data, key, f"images[{n}]") for n, image in images]
        for n, picture in enumerate(pixels):
            if problem := blur_problem(picture, rules.pictures):
                return Look(row, key, "blur", f"images[{n}]: {problem}")
        signs = rules.duplicates.remove or self.fingerprint is not None
        signed = [Signed.of(picture) for picture in pixels] if signs else []
        if self.fingerprint is not None and (match := self.fingerprint.find(turns_of(record), signed)):
            told = match.item if match.by == "both" else f"{match.item}, by its {match.by}"
            return Look(row, key, "evaluation", told)
        if rules.duplicates.remove:
            sign_text(row, text, rules.duplicates)
            row["pictures"] = len(signed)
        said = answer_of(record)
        scored = rules.least_score is not None and len(pixels) == 1 and said
        row["unscored"] = rules.least_score is not None and bool(pixels) and not scored
        return Look(row, key, pictures=signed_rows(signed), pair=(pixels[0], said) if scored else None)

    def _counter(self) -> Callable[[str], int] | None:
        if not self.rules.texts.tokenizer:
            return None
        vocab = Vocab.load(self.rules.texts.tokenizer)
        return lambda text: len(vocab.encode(text))

    def _ask_once(self) -> None:
        """Find now, and not at some sample, what a rule lacks."""
        check_languages(self.rules.texts)
        blocked_problem("", self.rules.texts)


def _printable(text: str) -> str:
    """What stands in a member's name may be no UTF-8, and could not be written."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_besides(rules: ScanRules) -> dict[str, str]:
    """A digest of everything that rules name by its place: with another content they are other rules."""
    texts = rules.texts
    files = [path for name in texts.blocklists if (path := shipped().get(name, Path(name))).is_file()]
    files += [Path(texts.tokenizer)] if Path(texts.tokenizer).is_file() else []
    told = {}
    for place in rules.evaluations:
        if _is_signed(place):
            files.append(Path(place))
        else:
            told[place] = ShardSet(place).fingerprint()
    for path in files:
        with path.open("rb") as file:
            told[str(path)] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return told


def _is_signed(place: str) -> bool:
    return Path(place).is_file() and not place.endswith(".tar")


def read_evaluations(places: Sequence[str]) -> Fingerprint | None:
    """What must not be trained on: files of signatures, and folders of shards, which are signed here."""
    prints = []
    for place in places:
        if _is_signed(place):
            prints.append(Fingerprint.load(Path(place)))
        else:
            shards = ShardSet(place)
            prints.append(Fingerprint(_held_out(shards, str(place))))
    return Fingerprint.joined(prints) if prints else None


def _held_out(shards: ShardSet, place: str) -> Iterator[Judged]:
    for n in range(len(shards)):
        record = from_sample(shards.read(n))
        pictures = (decode_image(image.data, record.key) for image in record.images)
        yield Judged(f"{place}/{record.key}", "\n".join(texts_of(record)), tuple(map(Signed.of, pictures)))


# ---------------------------------------------------------------------------------------------- on disk


class Scan:
    """A scan in ``folder``, of as many samples as are done: ``scan.bin``, ``pictures.bin`` and ``problems.jsonl``.

    Blocks are appended to all three, the first last: what it does not know of is cut off when the scan goes on.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._paths = {name: folder / name for name in ("pictures.bin", "problems.jsonl", "scan.bin")}
        for path in self._paths.values():
            path.touch()
        rows = self._paths["scan.bin"].stat().st_size // SAMPLE.itemsize
        self.done, self.pictures = rows - rows % BLOCK, 0
        os.truncate(self._paths["scan.bin"], self.done * SAMPLE.itemsize)
        if self.done:
            last = self.samples()[-1]
            self.pictures = int(last["first"] + last["pictures"])
        os.truncate(self._paths["pictures.bin"], self.pictures * PICTURE.itemsize)
        self._cut_problems()

    def _cut_problems(self) -> None:
        """Drop what was noted of samples that are not done, and a line that a kill tore."""
        path, kept = self._paths["problems.jsonl"], 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)[0] >= self.done:
                    break
                kept += len(line)
        os.truncate(path, kept)

    def append(self, looks: Sequence[Look]) -> None:
        """The next samples."""
        rows = np.array([look.row for look in looks], SAMPLE)
        rows["reason"] = [REASONS.index(look.reason) for look in looks]
        counts = [len(look.pictures) for look in looks]
        rows["pictures"] = counts
        rows["first"] = self.pictures + np.cumsum([0, *counts[:-1]])
        lines = [json.dumps([self.done + n, one.key, one.problem]) for n, one in enumerate(looks) if one.reason]
        for name, data in (
            ("pictures.bin", b"".join(look.pictures.tobytes() for look in looks)),
            ("problems.jsonl", "".join(f"{line}\n" for line in lines).encode()),
            ("scan.bin", rows.tobytes()),
        ):
            with self._paths[name].open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self.done += len(rows)
        self.pictures += sum(counts)

    def samples(self) -> np.ndarray:
        """All rows, mapped."""
        return np.memmap(self._paths["scan.bin"], SAMPLE, "r")

    def signatures(self) -> np.ndarray:
        """All rows of pictures, mapped."""
        return np.memmap(self._paths["pictures.bin"], PICTURE, "r") if self.pictures else np.empty(0, PICTURE)

    def problems(self) -> Iterator[tuple[int, str, str]]:
        """``(sample, key, problem)`` of what the rules refused, in order."""
        with self._paths["problems.jsonl"].open(encoding="utf-8") as file:
            for line in file:
                number, key, problem = json.loads(line)
                yield number, key, problem


def scan(
    out: Scan,
    scanner: Scanner,
    limits: LimitsConfig,
    scorer: Scorer | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Look at all samples that ``out`` does not know yet, in processes under ``limits``; ``scorer`` works in this one.

    The result does not depend on how many processes there are. A sample that one of them does not survive is
    unreadable. Raises ``ValueError`` where a scorer or what it is asked for is missing.
    """
    least = scanner.rules.least_score
    if (least is None) != (scorer is None):
        raise ValueError("rules.least_score and a scorer need each other; recipes.curate has one")
    spans = ((Span(last, last - first), 0) for first, last in _spans(out.done, len(scanner)))
    _opened.clear()  # shards may have changed since, and what is judged by
    work = partial(_looks, tuple(shards.location for shards in scanner.sets), scanner.rules)
    waiting: list[Look] = []
    report(out.done)
    for span, row, look in in_order(work, _lost, spans, limits):
        waiting.append(look)
        if row == span.rows - 1:
            out.append(_scored(waiting, scorer, least))
            waiting = []
            report(out.done)


def _spans(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, BLOCK):
        yield start, min(start + BLOCK, last)


def _looks(folders: tuple[str, ...], rules: ScanRules, span: Span, start: int) -> Iterator[Look]:
    """In a process of its own, or in the one that asks."""
    scanner = _scanner(folders, json.dumps(asdict(rules)), rules)
    for number in range(span.last - span.rows + start, span.last):
        yield scanner.look(number)


_opened: dict[tuple[tuple[str, ...], str], Scanner] = {}  # the one that this process works with


def _scanner(folders: tuple[str, ...], settings: str, rules: ScanRules) -> Scanner:
    if (folders, settings) not in _opened:
        _opened.clear()
        _opened[folders, settings] = Scanner(folders, rules)
    return _opened[folders, settings]


def _lost(span: Span, row: int, problem: str, rest: bool) -> Look:
    assert not rest, "the rows of a span are known"
    return Look(np.zeros((), SAMPLE), "", "unreadable", problem)


def _scored(looks: Sequence[Look], scorer: Scorer | None, least: float | None) -> list[Look]:
    out = list(looks)
    pairs = [(n, look.pair) for n, look in enumerate(looks) if look.pair is not None]
    if scorer is None or least is None or not pairs:
        return out
    scores = scorer.score([pixels for _, (pixels, _) in pairs], [said for _, (_, said) in pairs])
    for (n, _), score in zip(pairs, scores, strict=True):
        if not score >= least:
            out[n] = Look(out[n].row, out[n].key, "score", f"score {score:.3f} below {least}")
    return out
