"""Clean shard sets: leave out what should not be trained on, and say why of every sample.

    python -m data_pipelines.curate [--preset safe] folders=[data/mine/pretrain] to=data/clean [key=value ...]

``folders`` are shard sets, or folders of them, and are compared with each other; every set NAME becomes ``TO/NAME``.
What is left out stands in ``TO/left_out.jsonl`` with its key and reason, and is counted in ``TO/curation.json``; each
new set has a card to look at. Shards that were cut short are named and counted, and end the command with status 1 where
they are more than the share ``max_torn`` of a set's. What is kept is kept unchanged. A run that was killed goes on
where it was and ends with the same bytes; the same settings and samples give the same bytes with any number of
processes.

Sets are compared with each other, so that one more is another curation: it wants another folder, or ``anew=true``,
which deletes what a curation left in ``to`` and begins anew. A folder that holds anything else is left alone.

Presets: ``safe`` leaves out copies and what cannot be read, ``pairs`` and ``text`` ask what is usual of captioned
pictures and of long texts. Signatures take 534 bytes a sample and its bands 168 at least, 608 a picture on disk, and 60
bytes a sample in memory, whatever the samples weigh.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.balancing import BalanceRules, balanced
from data_pipelines.cards import summarise, write_card_page
from data_pipelines.curated import LOG, REPORT, WORK, claim_target
from data_pipelines.documents import DocumentBuilder
from data_pipelines.filters import PictureRules, TextRules
from data_pipelines.image_shards import holds_shards
from data_pipelines.making import BuildError, claim, write_whole
from data_pipelines.mixture import digest
from data_pipelines.near_duplicates import CopySearch
from data_pipelines.scanning import REASONS, SIGNED, Scan, Scanner, ScanRules, Scorer, read_besides, scan
from data_pipelines.shards import ShardSet, ShardWriter
from data_pipelines.workers import LimitsConfig
from mmagent.chat import ChatConfig
from mmagent.config import ConfigError, parse_cli
from mmagent.files import new_file
from mmagent.geometry import GeometryConfig
from mmagent.records import from_sample
from mmagent.vocab import Vocab

_UNSCORED = "not scored"
_TOLD, _NAMED = 5, 20  # torn shards of a set that are named: on the terminal, and in the report
_DUPLICATE, _BALANCE = REASONS.index("duplicate"), REASONS.index("balance")


@dataclass
class CurateConfig:
    """``folders`` to ``to`` by ``rules``; ``balance`` what is left. ``tokenizer`` makes the cards count tokens.
    ``limits`` are those of looking at one sample, and the processes that do. ``max_torn``: the share of a set's shards
    that may be cut short; what is whole of them is taken in any case. ``anew``: what an earlier curation left in ``to``
    is deleted first."""

    folders: list[str] = field(default_factory=list)
    to: str = ""
    rules: ScanRules = field(default_factory=ScanRules)
    balance: BalanceRules = field(default_factory=BalanceRules)
    tokenizer: str = ""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    max_torn: float = 0.0
    shard_samples: int = 10_000
    shard_bytes: int = 1 << 28
    anew: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_torn <= 1:
            raise ValueError(f"max_torn {self.max_torn} must lie in [0, 1]")


def safe() -> CurateConfig:
    """What no set should hold: unreadable samples, and copies."""
    return CurateConfig()


def pairs() -> CurateConfig:
    """Pictures with their captions: neither tiny nor long as a ribbon, sharp, and captions that say something."""
    pictures = PictureRules(least_side=64, most_aspect=4.0, least_sharpness=0.25)
    texts = TextRules(least_characters=5, blocklists=["en", "zh"])
    return CurateConfig(rules=ScanRules(pictures, texts))


def text() -> CurateConfig:
    """Long texts, by the rules of MassiveText (arXiv 2112.11446)."""
    texts = TextRules(least_characters=200, blocklists=["en", "zh"], most_blocked=3, repetition=True)
    return CurateConfig(rules=ScanRules(texts=texts))


@dataclass(frozen=True)
class TornShards:
    """How many of a set's ``shards`` were cut short, and some of them with where and how."""

    count: int
    shards: int
    named: tuple[str, ...]


@dataclass(frozen=True)
class Curation:
    """What came of it: samples ``seen`` and ``kept``, counts of ``left_out`` by reason, and by set and reason; the
    samples that were ``split`` into finer groups when copies were looked for, and ``torn`` shards by set, where there
    are any: their lost samples are not among those seen; those ``unscored`` that are kept though a score was asked for
    (:class:`~data_pipelines.scanning.ScanRules`), which stand as "not scored" beside the reasons of a set."""

    seen: int
    kept: int
    left_out: dict[str, int]
    sets: dict[str, dict[str, int]]
    split: int
    torn: dict[str, TornShards]
    unscored: int = 0

    def problem(self, most: float) -> str:
        """What to end with where more than the share ``most`` of a set's shards is torn, "" where none is."""
        bad = {name: one for name, one in self.torn.items() if one.count > most * one.shards}
        told = ", ".join(f"{one.count} of {one.shards} shards of {name}" for name, one in bad.items())
        more = f"more than max_torn={most:g}: make them anew, or allow the share"
        return f"{told} were cut short, {more}" if bad else ""

    def table(self) -> str:
        """For people."""
        reasons = [reason for reason in REASONS[1:] if self.left_out.get(reason)]
        reasons += [_UNSCORED] if self.unscored else []
        width = max([len(name) for name in self.sets] + [8]) + 2
        head = f"{'set':<{width}}{'seen':>9}{'kept':>9}" + "".join(f"{reason:>12}" for reason in reasons)
        rows = [
            f"{name:<{width}}{counts['seen']:>9}{counts['kept']:>9}"
            + "".join(f"{counts.get(reason, 0):>12}" for reason in reasons)
            for name, counts in self.sets.items()
        ]
        for name, one in self.torn.items():
            rows.append(f"{name}: {one.count} of {one.shards} shards cut short, what they lost is not counted:")
            rows += [f"  {named}" for named in one.named[:_TOLD]]
            rows += [f"  and {one.count - _TOLD} more, in {LOG}"] if one.count > _TOLD else []
        return "\n".join([head, *rows])


def find_sets(folders: Sequence[str]) -> dict[str, Path]:
    """Shard sets by name: each folder that holds tars, and the sub-folders that do of one that does not.

    Raises :class:`~mmagent.config.ConfigError` for a folder without any, or two sets of one name.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        inside = [folder] if holds_shards(folder) else sorted(path for path in folder.glob("*/") if holds_shards(path))
        if not inside:
            raise ConfigError(f"folders: {folder} holds no shards, nor do its sub-folders")
        for path in inside:
            if path.resolve().name in found:
                raise ConfigError(f"folders: {found[path.resolve().name]} and {path} would both become {path.name}")
            found[path.resolve().name] = path
    if not found:
        raise ConfigError("folders: name the shard sets to clean, such as folders=[data/mine]")
    return found


def curate(config: CurateConfig, scorer: Scorer | None = None) -> Curation:
    """Do what is missing of it. Raises :class:`~data_pipelines.making.BuildError` where ``to`` holds something else,
    and :class:`~mmagent.config.ConfigError` or ``ValueError`` for what cannot be."""
    if not config.to:
        raise ConfigError("to: name the folder that the clean sets go to")
    sets = find_sets(config.folders)
    to = Path(config.to)
    if any(path.resolve() in (to.resolve(), (to / name).resolve()) for name, path in sets.items()):
        raise ConfigError(f"to: {to} holds what is to be cleaned; choose another folder")
    prints = {name: ShardSet(path).fingerprint() for name, path in sets.items()}
    settings: dict[str, Any] = {"rules": asdict(config.rules), "balance": asdict(config.balance)}
    if scorer is not None:
        settings["scored_by"] = scorer.fingerprint
    if besides := read_besides(config.rules):
        settings["read"] = besides
    shards = {"shard": config.shard_samples, "bytes": config.shard_bytes}
    claim_target(to, {"signed": SIGNED, "sets": prints, **settings, **shards}, config.anew)
    scanner = Scanner([str(path) for path in sets.values()], config.rules)
    found = Scan(to / WORK)
    with _bar("looking at samples", len(scanner)) as report:
        scan(found, scanner, config.limits, scorer, report)
    reasons, copy_of, split = _copies(found, scanner, config)
    weights = balanced(scanner, reasons == 0, config.balance)
    reasons[(reasons == 0) & ~weights.kept] = _BALANCE
    result = _result(scanner, sets, reasons, split, found.samples()["unscored"])
    _write_log(to / LOG, found, scanner, list(sets), reasons, copy_of)
    for at, (name, path) in enumerate(sets.items()):
        chosen = _of(scanner, at, reasons) == 0
        repeats = _of(scanner, at, weights.repeats)[chosen]
        made = {"source": name, "curated": str(path), "fingerprint": prints[name], **settings, **shards}
        _write_set(to / name, scanner, at, chosen, found, made, config)
        weights.save(to / name, repeats)
        if chosen.any():
            summary = summarise(ShardSet(to / name), _builder(config))
            left_out = {reason: n for reason, n in result.sets[name].items() if reason in REASONS}
            unscored = {"samples not scored": result.sets[name][_UNSCORED]} if scorer is not None else {}
            write_card_page(to / name, summary, made, left_out, _examples(to / LOG, name), unscored)
    weights.save_sources(to, list(sets))
    write_whole(to / REPORT, {**asdict(result), **settings, "sets_by_fingerprint": prints})
    return result


def _copies(found: Scan, scanner: Scanner, config: CurateConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """``(reasons, copy_of, split)``."""
    samples = found.samples()
    reasons = np.array(samples["reason"])
    if not config.rules.duplicates.remove:
        return reasons, np.full(len(scanner), -1, np.int64), 0
    search = CopySearch(samples, found.signatures(), config.rules.duplicates, found.folder)
    with _bar("looking for copies", 1, "band") as report:
        copy_of = search.run(reasons == 0, report)
    reasons[copy_of >= 0] = _DUPLICATE
    return reasons, copy_of, search.split


def _of(scanner: Scanner, at: int, values: np.ndarray) -> np.ndarray:
    return values[scanner.starts[at] : scanner.starts[at + 1]]


def _result(scanner: Scanner, sets: dict[str, Path], reasons: np.ndarray, split: int, unscored: np.ndarray) -> Curation:
    by_set = {}
    for at, name in enumerate(sets):
        counts = np.bincount(_of(scanner, at, reasons), minlength=len(REASONS))
        left_out = {reason: int(n) for reason, n in zip(REASONS[1:], counts[1:], strict=True) if n}
        by_set[name] = {"seen": int(counts.sum()), "kept": int(counts[0]), **left_out}
        if scanner.rules.least_score is not None:
            kept = _of(scanner, at, reasons) == 0
            by_set[name][_UNSCORED] = int(_of(scanner, at, unscored)[kept].sum())
    total = Counter({reason: int((reasons == n).sum()) for n, reason in enumerate(REASONS) if n})
    torn = {name: _torn(shards) for name, shards in zip(sets, scanner.sets, strict=True) if shards.torn}
    left_out = {reason: count for reason, count in total.items() if count}
    kept = reasons == 0
    return Curation(len(reasons), int(kept.sum()), left_out, by_set, split, torn, int(unscored[kept].sum()))


def _torn(shards: ShardSet) -> TornShards:
    named = tuple(f"{one.shard}@{one.offset}: {one.problem}" for one in shards.torn[:_NAMED])
    return TornShards(len(shards.torn), len(shards.paths), named)


def _write_log(
    path: Path, found: Scan, scanner: Scanner, names: Sequence[str], reasons: np.ndarray, copy_of: np.ndarray
) -> None:
    """Every sample that is left out, in order, whole or not at all; shards' torn tails last."""
    problems = found.problems()
    refused = next(problems, None)
    with new_file(path) as beside, beside.open("w", encoding="utf-8") as file:
        for number in np.flatnonzero(reasons):
            at, local = scanner.place(int(number))
            line = {"set": names[at], "shard": scanner.sets[at].where(local), "reason": REASONS[reasons[number]]}
            if refused is not None and refused[0] == number:
                line |= {"key": refused[1], "problem": refused[2]}
                refused = next(problems, None)
            elif copy_of[number] >= 0:
                line |= {
                    "key": scanner.key(int(number)),
                    "problem": f"copy of {_named(scanner, names, copy_of[number])}",
                }
            else:
                line |= {"key": scanner.key(int(number)), "problem": "its words are frequent enough without it"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for name, shards in zip(names, scanner.sets, strict=True):
            for torn in shards.torn:
                line = {"set": name, "shard": f"{torn.shard}@{torn.offset}", "reason": "unreadable"}
                file.write(json.dumps({**line, "key": "", "problem": f"torn shard: {torn.problem}"}) + "\n")


def _named(scanner: Scanner, names: Sequence[str], number: int) -> str:
    return f"{names[scanner.place(number)[0]]}/{scanner.key(number)}"


def _examples(log: Path, name: str, each: int = 3) -> list[dict[str, str]]:
    """The first lines of the log about a set, ``each`` of a reason."""
    met: Counter[str] = Counter()
    found = []
    with log.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            met[line["reason"]] += line["set"] == name
            if line["set"] == name and met[line["reason"]] <= each:
                found.append(line)
    return found


def _write_set(
    folder: Path, scanner: Scanner, at: int, chosen: np.ndarray, found: Scan, made: dict[str, Any], config: CurateConfig
) -> None:
    """The samples ``chosen`` of one set, in order. Of several with one key all but the first get a number behind it:
    in one shard they would become one sample."""
    numbers = np.flatnonzero(chosen)
    if not len(numbers):
        print(f"{folder.name}: nothing is left of it, so it is not written", file=sys.stderr)
        return
    claim(folder, {**made, "samples": len(numbers)})
    keys = _of(scanner, at, found.samples()["key"])[numbers]
    first = np.zeros(len(numbers), bool)
    taken, places = np.unique(keys, return_index=True)
    first[places] = True
    with (
        _bar(f"writing {folder.name}", len(numbers)) as report,
        ShardWriter(folder, max_bytes=config.shard_bytes, max_samples=config.shard_samples) as writer,
    ):
        for n in range(writer.samples, len(numbers)):
            record = from_sample(scanner.sets[at].read(int(numbers[n])))
            key = record.key if first[n] else _free(f"{record.key}~{numbers[n]}", taken)
            writer.write(replace(record, key=key))
            report(writer.samples)


def _free(key: str, taken: np.ndarray) -> str:
    """``key``, or what is nearest to it that no sample has; ``taken`` are the digests of theirs, ascending."""
    while taken[min(np.searchsorted(taken, np.uint64(digest(key))), len(taken) - 1)] == digest(key):
        key += "~"
    return key


def _builder(config: CurateConfig) -> DocumentBuilder | None:
    return DocumentBuilder(Vocab.load(config.tokenizer), GeometryConfig(), ChatConfig()) if config.tokenizer else None


class _bar:
    """``with _bar(...) as report``: progress on stderr with the time left, from the third second on."""

    def __init__(self, what: str, total: int, unit: str = "sample"):
        self._bar = tqdm(total=total, desc=what, unit=unit, delay=2.0, smoothing=0.05)

    def __enter__(self) -> _bar:
        return self

    def __call__(self, done: int, total: int | None = None) -> None:
        if total is not None:
            self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_cli({"safe": safe, "pairs": pairs, "text": text}, __doc__ or "", argv)
    started = time.perf_counter()
    try:
        result = curate(config)
    except (BuildError, ValueError) as error:  # ConfigError and ShardError are among them
        raise SystemExit(f"error: {error}") from error
    print(result.table())
    print(
        f"{config.to}: {result.kept} of {result.seen} samples kept, in {time.perf_counter() - started:.0f} s; "
        f"those left out: {Path(config.to) / LOG}"
    )
    if problem := result.problem(config.max_torn):
        raise SystemExit(f"error: {problem}")


if __name__ == "__main__":
    main()
