"""Check shard sets, of whoever wrote them, before a run finds out:

    python -m data_pipelines.validate LOCATION... [--decode] [--tokenizer PATH] [options]

A LOCATION is a folder of shards or of such folders, a glob or one tar. Of every shard: whether it is whole, and its
index fits it. Of every sample: its bytes against the index's checksum, the record and all its fields, the headers of
its images and that boxes and points lie in them, that no image is a ribbon or a dot and no answer empty; with --decode
every pixel; with --tokenizer, that it can be rendered for training, and its tokens, which are estimated without. Over
all LOCATIONs: that no key is there twice. Nothing is changed, but an index that is missing or damaged is made anew.

A sample whose key another one before it has is wrong and not sound; samples that a torn shard lost are counted where
its index knows of them. A location without a shard is one thing wrong.

Exit status: 0; 1 when what is wrong is more than --max-share (0 unless given) of all that is sound or wrong; 2 when no
location holds a sample.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from data_pipelines.costs import cost_lines, picture_tokens, text_tokens
from data_pipelines.ingest.report import Tally, kind_lines
from data_pipelines.ingest.work import Refused
from data_pipelines.plausible import check_said, picture_sizes
from data_pipelines.record_texts import texts_of
from data_pipelines.shards import ShardError, ShardIndex, ShardSet, find_shards, open_index, scan, shard_sets
from data_pipelines.workers import LimitsConfig, in_order
from mmagent.records import Record, RecordError, decode_image, from_sample, validate

if TYPE_CHECKING:
    from data_pipelines.documents import DocumentBuilder

_SAMPLES = 64  # in one task
_NAMED = 1000  # samples with a key that was there before are told apart, of more only the number


@dataclass(frozen=True)
class Samples:
    """Some samples of one tar."""

    path: str
    first: int
    rows: int


@dataclass(frozen=True)
class Sound:
    """What is counted of a sample that nothing is wrong with, and a digest of its key. ``sizes (height, width)`` of its
    images, UTF-8 bytes of its ``text``, and its ``tokens`` where a tokenizer counts them."""

    key: int
    name: str
    source: str
    talk: bool
    sizes: tuple[tuple[int, int], ...]
    regions: int
    text: int
    tokens: int


def check(task: Samples, start: int, *, decode: bool, tokenizer: str) -> Iterator[Sound | Refused]:
    """What is found of each sample."""
    shards = _opened(task.path)
    for n in range(task.first + start, task.first + task.rows):
        try:
            record = from_sample(shards.read(n))
            validate(record)
            sizes = picture_sizes(record)
            check_said(record)
            for number, image in enumerate(record.images if decode else ()):
                decode_image(image.data, record.key, f"images[{number}]")
            tokens = _tokens(record, tokenizer) if tokenizer else 0
        except RecordError as error:
            yield Refused(error.key, _where(task.path, n), error.field.partition("[")[0], error.problem)
        except (MemoryError, OSError) as error:
            yield Refused("", _where(task.path, n), "reading", str(error) or "takes more memory than is allowed")
        else:
            regions = len(record.boxes) + len(record.points)
            text = sum(len(text.encode()) for text in texts_of(record))
            key = record.key
            yield Sound(_digest(key), key, record.source, bool(record.messages), sizes, regions, text, tokens)


@cache
def _opened(path: str) -> ShardSet:
    return ShardSet(path)


def _where(path: str, sample: int) -> str:
    return f"{path}@{_opened(path).where(sample).rpartition('@')[2]}"


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


@cache
def _builder(tokenizer: str) -> DocumentBuilder:
    from data_pipelines.documents import DocumentBuilder  # brings torch along
    from mmagent.geometry import GeometryConfig
    from mmagent.vocab import Vocab

    return DocumentBuilder(Vocab.load(tokenizer), GeometryConfig())


def _tokens(record: Record, tokenizer: str) -> int:
    return _builder(tokenizer).draft(record).size.tokens


def lost(task: Samples, row: int, problem: str, rest: bool) -> Refused:
    """What is said of a sample that its process did not survive."""
    return Refused("", _where(task.path, task.first + row), "reading", problem)


class _Notes:
    """What was counted of every sample, in 25 bytes, so that it can be taken back; the digest of the key of one that is
    wrong is 0."""

    def __init__(self) -> None:
        self.keys = array("Q")
        self.images, self.regions, self.tokens = array("I"), array("I"), array("I")
        self.talks, self.sources = array("B"), array("I")
        self.names: dict[str, int] = {}  # of sources

    def add(self, sound: Sound | None) -> None:
        """The next sample."""
        self.keys.append(sound.key if sound else 0)
        self.images.append(len(sound.sizes) if sound else 0)
        self.regions.append(sound.regions if sound else 0)
        self.tokens.append(sound.tokens if sound else 0)
        self.talks.append(sound.talk if sound else 0)
        self.sources.append(self.names.setdefault(sound.source, len(self.names)) if sound else 0)


@dataclass
class Findings:
    """Of all samples: ``tally`` counts what is wrong, ``sources`` how many records each has; ``sound`` and ``bad`` are
    by shard set."""

    tally: Tally
    sources: Counter[str]
    sound: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    regions: int = 0
    tokens: int = 0

    @property
    def wrong(self) -> int:
        return self.tally.refused

    def refuse(self, refused: Refused, location: str) -> None:
        """Count what is wrong with a sample of the set at ``location``."""
        self.tally.refuse(refused)
        self.bad[location] += refused.rows


def examine(
    locations: Sequence[str],
    decode: bool = False,
    tokenizer: str = "",
    limits: LimitsConfig | None = None,
    progress: bool = False,
) -> Findings:
    """Check everything in ``locations``, which may be folders of shard sets. A location without a sample is a finding;
    raises :class:`~data_pipelines.shards.ShardError` where none has one."""
    _opened.cache_clear()  # shards may have changed since somebody asked before
    sets, found = _open_sets(locations)
    of = {str(path): shards.location for shards in sets for path in shards.paths}
    for shards in sets:
        for torn in shards.torn:
            where = f"{torn.shard}@{torn.offset}"
            found.refuse(Refused("", where, "torn shard", torn.problem, max(torn.lost, 1)), shards.location)
    notes = _Notes()
    places: list[tuple[Path, int]] = []  # of every tar with samples, and how many there are before it
    before = 0
    for path in map(Path, of):
        if count := len(open_index(path)[0].entries):
            places.append((path, before))
            before += count
    work = partial(check, decode=decode, tokenizer=tokenizer)
    answers = in_order(work, lost, _tasks(path for path, _ in places), limits or LimitsConfig())
    for job, _, answer in _shown(answers, before) if progress else answers:
        if isinstance(answer, Refused):
            found.refuse(answer, of[job.path])
            notes.add(None)
        else:
            _count(found, answer)
            found.sound[of[job.path]] += 1
            notes.add(answer)
    for path, samples, again in _repeated(np.array(notes.keys, np.uint64), places):
        _take_back(found, notes, samples, of[str(path)])
        found.refuse(again, of[str(path)])
    return found


def _open_sets(locations: Sequence[str]) -> tuple[list[ShardSet], Findings]:
    """The sets that hold samples, with findings of their indices and of every location that holds none. Raises the
    first one's :class:`~data_pipelines.shards.ShardError` where none does."""
    found, sets, errors = Findings(Tally(), Counter()), [], []
    for location in dict.fromkeys(chain.from_iterable(map(shard_sets, locations))):
        found.sound[location] = 0
        try:
            for problem in chain.from_iterable(map(_index, find_shards(location))):  # opening makes them anew
                found.refuse(problem, location)
            sets.append(ShardSet(location))
        except ShardError as error:
            errors.append(error)
            told = str(error).removeprefix(f"{location}: ")
            found.refuse(Refused("", location, "location", told), location)
    if errors and not sets:
        raise errors[0]
    return sets, found


T = TypeVar("T")


def _shown(answers: Iterator[T], total: int) -> Iterator[T]:
    """The same with a bar, whose time begins with the first answer: that processes start would count as samples' time,
    and the time left be told a hundred times too long."""
    for first in answers:
        with tqdm(total=total, desc="validate", unit="sample", file=sys.stderr, delay=2.0) as bar:
            for answer in chain([first], answers):
                yield answer
                bar.update()


def _count(found: Findings, sound: Sound) -> None:
    found.tally.records += 1
    found.tally.conversations += sound.talk
    found.tally.images += len(sound.sizes)
    found.sources[sound.source] += 1
    found.regions += sound.regions
    found.tokens += sound.tokens
    text = text_tokens(sound.text, len(sound.sizes))
    if sound.tokens:
        text = sound.tokens - sum(picture_tokens(*size) for size in sound.sizes)
    found.tally.costs.add(sound.name, sound.sizes, text)


def _take_back(found: Findings, notes: _Notes, samples: Sequence[int], location: str) -> None:
    """What was counted as sound and is not."""
    names = list(notes.names)
    for n in samples:
        found.tally.records -= 1
        found.tally.conversations -= notes.talks[n]
        found.tally.images -= notes.images[n]
        found.sources[names[notes.sources[n]]] -= 1
        found.regions -= notes.regions[n]
        found.tokens -= notes.tokens[n]
        found.sound[location] -= 1
    found.sources = +found.sources


def _tasks(paths: Iterable[Path]) -> Iterator[tuple[Samples, int]]:
    for path in paths:
        count = len(_opened(str(path)))
        for first in range(0, count, _SAMPLES):
            yield Samples(str(path), first, min(_SAMPLES, count - first)), 0


def _index(path: Path) -> Iterator[Refused]:
    """What is wrong with the index beside a tar. A reader makes one anew that is damaged, or of an older tar, but
    believes any other."""
    beside = path.with_suffix(".idx")
    index = ShardIndex.load(beside)
    if index is None and beside.is_file():
        yield Refused("", str(beside), "index", "is damaged")
    elif index is not None and index.tar_bytes == path.stat().st_size:
        scanned, _ = scan(path)
        if not all(np.array_equal(index.entries[name], scanned.entries[name]) for name in ("offset", "size")):
            yield Refused("", str(beside), "index", "does not say where the samples of its tar lie")


def _repeated(keys: np.ndarray, places: Sequence[tuple[Path, int]]) -> Iterator[tuple[Path, list[int], Refused]]:
    """Samples whose key another one before them has, with their tar. Digests of 64 bits find them, the keys themselves
    decide, of the first :data:`_NAMED` that are to be told apart."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    suspects = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
    suspects = suspects[keys[suspects] != 0]
    first: dict[str, str] = {}
    starts = [start for _, start in places]
    for sample in suspects[:_NAMED].tolist():
        tar = int(np.searchsorted(starts, sample, side="right")) - 1
        path, number = places[tar][0], sample - starts[tar]
        where, key = _where(str(path), number), str(_opened(str(path)).read(number)["__key__"])
        if key in first:
            yield path, [sample], Refused(key, where, "key", f"is that of {first[key]}, too")
        first.setdefault(key, where)
    _, places_of_first = np.unique(keys[suspects], return_index=True)
    again = np.setdiff1d(np.arange(_NAMED, len(suspects)), places_of_first)
    tars = np.searchsorted(starts, suspects[again], side="right") - 1
    for tar in np.unique(tars).tolist():
        samples, path = suspects[again][tars == tar].tolist(), places[tar][0]
        problem = f"{len(samples)} more samples have keys of others before them"
        yield path, samples, Refused("", str(path), "key", problem, len(samples))


def table(found: Findings, locations: Sequence[str]) -> str:
    """What was found, as lines for a terminal."""
    tally, several = found.tally, len(found.sound) > 1
    wrong = f"{tally.refused} things wrong" if tally.refused != 1 else "1 thing wrong"
    lines = [
        f"{', '.join(locations)}: {tally.records} sound records ({tally.conversations} conversations, "
        f"{tally.records - tally.conversations} documents, {tally.images} images, {found.regions} boxes and points"
        + (f", {found.tokens} tokens" if found.tokens else "")
        + f"), {wrong} ({tally.share:.2%})",
        "sources: " + ", ".join(f"{name} {count}" for name, count in found.sources.most_common(20)),
        *(f"  {name}: {sound} sound, {found.bad[name]} wrong" for name, sound in found.sound.items() if several),
        *cost_lines(tally.costs, counted=bool(found.tokens)),
        *kind_lines(tally),
    ]
    return "\n".join(lines)


def _as_json(found: Findings) -> dict[str, Any]:
    tally = found.tally
    return {
        "sets": {name: {"sound": sound, "wrong": found.bad[name]} for name, sound in found.sound.items()},
        "sources": dict(found.sources),
        "sound": tally.records,
        "wrong": tally.refused,
        "share": tally.share,
        "conversations": tally.conversations,
        "images": tally.images,
        "regions": found.regions,
        "tokens": found.tokens,
        "kinds": {name: asdict(kind) for name, kind in tally.kinds.items()},
        "costs": asdict(tally.costs),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m data_pipelines.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    processes = min(os.cpu_count() or 1, 8)
    parser.add_argument("locations", nargs="+", metavar="LOCATION", help="shards, or folders of shard sets")
    parser.add_argument("--decode", action="store_true", help="decode every image")
    parser.add_argument("--tokenizer", default="", metavar="PATH", help="render every record with this tokenizer.json")
    parser.add_argument("--max-share", type=float, default=0.0, metavar="SHARE", help="wrong of all (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    parser.add_argument(
        "--processes", type=int, default=processes, metavar="N", help="of reading (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="processor time for one (default: 120)")
    parser.add_argument("--megabytes", type=int, default=4096, metavar="MB", help="memory for one (default: 4096)")
    args = parser.parse_args(argv)
    try:
        limits = LimitsConfig(args.processes, args.seconds, args.megabytes)
        if args.tokenizer:
            _builder(args.tokenizer)
        found = examine(args.locations, args.decode, args.tokenizer, limits, progress=True)
    except (ShardError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found, args.locations))
    if args.json:
        body = _as_json(found)
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return int(found.tally.share > args.max_share)


if __name__ == "__main__":
    from data_pipelines import validate as module  # processes find what they run by its name, and not in a script

    sys.exit(module.main())
