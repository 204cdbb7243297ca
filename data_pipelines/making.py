"""Making shard sets: many blocks of records in flight, written in order, resumable after a kill.

A :class:`Maker` is a pure function from block numbers to records. What is finished is on disk in whole shards, so a
build that was killed makes the missing blocks and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

from data_pipelines.cards import PAGE, summarise, write_card_page
from data_pipelines.documents import DocumentBuilder
from data_pipelines.mixture import digest
from data_pipelines.shards import ShardSet, ShardWriter
from mmagent.browser import BrowserError, BrowserPool, Page
from mmagent.files import write_text
from mmagent.records import Record

PLAN, CARD, PASSED_OVER = "plan.json", "card.json", "passed_over.json"
_ATTEMPTS = 3  # a block is tried on this many pages


class BuildError(RuntimeError):
    """A shard set cannot be made; the message names it and says why."""


class Maker(Protocol):
    """One source of records.

    ``name`` is the source; ``block`` records come at once; ``screen (width, height)`` is the page it needs, None
    where it needs no browser; ``settings`` are what its records depend on, so that two builds are never mixed.
    """

    name: str
    block: int
    screen: tuple[int, int] | None
    settings: Mapping[str, Any]

    async def make(self, number: int, page: Page | None) -> Sequence[Record]:
        """Block ``number``: always the same ``block`` records."""
        ...


@runtime_checkable
class PassesOver(Protocol):
    """A maker that leaves out what did not come about, and counts the reasons."""

    passed_over: Counter[str]


def settings_of(split: str, **settings: Any) -> dict[str, Any]:
    """A maker's settings. The split is named only where it is not "train": older plans know no other."""
    return settings if split == "train" else {"split": split, **settings}


def draws(split: str, *parts: object) -> Random:
    """Random numbers that are a function of ``parts``, and other ones for every split."""
    return Random(digest(*parts) if split == "train" else digest(split, *parts))


async def build_source(
    maker: Maker,
    folder: Path,
    samples: int,
    pool: BrowserPool | None = None,
    *,
    in_flight: int = 8,
    shard_samples: int = 1000,
    report: Callable[[int], None] = lambda written: None,
) -> None:
    """Write ``samples`` records to ``folder``, going on where an earlier call stopped.

    ``report`` is told how many samples are written, first of all those of earlier calls. Raises
    :class:`BuildError` when the folder holds records of other settings, or a block fails again and again.
    """
    claim(folder, {"source": maker.name, "samples": samples, "shard": shard_samples, **maker.settings})
    free = asyncio.Semaphore(in_flight)
    with ShardWriter(folder, max_samples=shard_samples) as writer:
        report(writer.samples)
        blocks = range(writer.samples // maker.block, -(-samples // maker.block))
        ahead: deque[asyncio.Task[Sequence[Record]]] = deque()
        try:
            for number in blocks:
                ahead.append(asyncio.create_task(_make(maker, number, pool, free)))
                if len(ahead) >= 2 * in_flight:  # enough that one slow block does not idle the others' pages
                    _write(writer, await ahead.popleft(), samples, maker.block)
                    report(writer.samples)
            while ahead:
                _write(writer, await ahead.popleft(), samples, maker.block)
                report(writer.samples)
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)
            if isinstance(maker, PassesOver):
                _note(folder, maker.passed_over)


def _note(folder: Path, passed_over: Counter[str]) -> None:
    """Add what was passed over to what earlier calls have noted, and begin to count anew."""
    if passed_over:
        write_whole(folder / PASSED_OVER, dict(sorted((Counter(read_passed_over(folder)) + passed_over).items())))
        passed_over.clear()


def read_passed_over(folder: Path) -> dict[str, int]:
    """How often what was left out of a set, by reason; without what a process had counted that was killed."""
    path = folder / PASSED_OVER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(writer: ShardWriter, records: Sequence[Record], samples: int, block: int) -> None:
    for record in records[writer.samples % block :]:
        if writer.samples < samples:
            writer.write(record)


async def _make(maker: Maker, number: int, pool: BrowserPool | None, free: asyncio.Semaphore) -> Sequence[Record]:
    problem: BrowserError | None = None
    for _ in range(_ATTEMPTS):
        try:
            async with free, _page(maker, pool) as page:
                records = await maker.make(number, page)
        except BrowserError as error:
            problem = error
            continue
        if len(records) != maker.block:
            raise BuildError(f"{maker.name}: block {number} has {len(records)} records, not {maker.block}")
        return records
    raise BuildError(f"{maker.name}: block {number} failed {_ATTEMPTS} times: {problem}") from problem


def _page(maker: Maker, pool: BrowserPool | None) -> AbstractAsyncContextManager[Page | None]:
    if maker.screen is None:
        return nullcontext(None)
    if pool is None:
        raise BuildError(f"{maker.name}: needs a browser")
    return pool.page(*maker.screen)


def claim(folder: Path, plan: Mapping[str, Any]) -> None:
    """Note what the folder is for, or see that it is for the same. Raises :class:`BuildError` naming what differs."""
    path = folder / PLAN
    wanted = json.loads(json.dumps(plan))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                raise BuildError(
                    f"{folder} was begun with {name}={found.get(name)!r}, now it is {wanted.get(name)!r}; "
                    f"delete the folder or build into another"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    if list(folder.glob("*.tar")):
        raise BuildError(f"{folder} holds shards that were not built here; choose another folder")
    write_whole(path, wanted)


def write_card(folder: Path, builder: DocumentBuilder) -> dict[str, Any]:
    """Read a finished shard set and describe it: in ``card.json`` its counts, its size and what its documents weigh, in
    ``card.html`` the same for people, with charts and samples.

    Raises :class:`~mmagent.records.RecordError` if a record is unusable: a build must not be.
    """
    shards = ShardSet(folder)
    summary = summarise(shards, builder)
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    write_card_page(folder, summary, plan)
    card = {
        "made": plan,
        "samples": len(shards),
        "passed_over": read_passed_over(folder),
        "shards": len(shards.paths),
        "bytes": shards.bytes,
        "fingerprint": shards.fingerprint(),
        "vocabulary": _digest(builder),
        "images": summary.images,
        "patches": summary.patches,
        "tokens": {
            "total": summary.total,
            "visual": summary.visual,
            "trainable": summary.trainable,
            "longest": summary.longest,
        },
    }
    write_whole(folder / CARD, card)
    return card


def read_card(folder: Path, builder: DocumentBuilder) -> dict[str, Any] | None:
    """The card of a finished set; None where there is none, or it describes other shards or another vocabulary."""
    path = folder / CARD
    if not path.is_file() or not (folder / PAGE).is_file():
        return None
    card = json.loads(path.read_text(encoding="utf-8"))
    same = card["fingerprint"] == ShardSet(folder).fingerprint() and card["vocabulary"] == _digest(builder)
    return card if same else None


def _digest(builder: DocumentBuilder) -> str:
    return hashlib.blake2b(builder.vocab.definition.encode(), digest_size=8).hexdigest()


def is_finished(folder: Path, samples: int) -> bool:
    """Whether all samples of a source are on disk."""
    return bool(list(folder.glob("*.tar"))) and len(ShardSet(folder)) == samples


def write_whole(path: Path, content: Any) -> None:
    """JSON that is there whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
