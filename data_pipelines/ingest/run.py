"""An ingestion from its sources to whole shards and a report; killed at any moment, it goes on and ends with the same
bytes.

Before a shard appears, ``.progress-NNNNN.json`` notes which row it ends with and what was counted by then, so that the
last whole shard always has its note, and the log of refusals is cut to where it stood.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines.cards import summarise, write_card_page
from data_pipelines.hub_images import PREFIX
from data_pipelines.ingest.claim import PLAN, claim
from data_pipelines.ingest.files import key_of
from data_pipelines.ingest.recognition import recognised
from data_pipelines.ingest.report import NAMED, REFUSED, REPORT, Lines, Log, Tally, counted, write_report
from data_pipelines.ingest.sources import Aside, Input, SourceError, find_inputs
from data_pipelines.ingest.styles import NAMES, STYLES, StyleConfig
from data_pipelines.ingest.video import VideoConfig
from data_pipelines.ingest.work import Answer, Job, Made, Refused, convert, lost
from data_pipelines.shards import ShardSet, ShardWriter
from data_pipelines.workers import LimitsConfig, in_order
from mmagent.files import write_text

_COUNTED = 10_000  # samples that the card tells of


@dataclass
class IngestConfig:
    """``style`` "auto" recognises it for each file by its first rows. ``source`` is the mixture component of the
    records, by default the name of SOURCE; several that differ need one. ``images`` is the folder that paths in rows
    are relative to; ``outside`` lets them lead out of it. ``coordinates``: "thousandths" or "pixels", which ``bbox_2d``
    is in. Pages of PDFs are drawn at ``dpi``. ``limits`` are those of one row. ``anew`` deletes what an ingestion left
    in ``to``, whatever its settings were."""

    sources: list[str]
    to: str
    style: str = "auto"
    source: str = ""
    prompt: str = ""
    images: str = ""
    outside: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    coordinates: str = ""
    decode: bool = True
    dpi: int = 144
    video: VideoConfig = field(default_factory=VideoConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    shard_samples: int = 10_000
    shard_bytes: int = 1 << 28
    anew: bool = False

    def __post_init__(self) -> None:
        if self.style != "auto" and self.style not in STYLES:
            raise ValueError(f"style {self.style!r} is none of auto, {', '.join(STYLES)}")
        if self.coordinates not in ("", "thousandths", "pixels"):
            raise ValueError(f"coordinates {self.coordinates!r} are neither thousandths nor pixels")
        if strange := [name for name in self.columns if name not in NAMES]:
            raise ValueError(f"--column {strange[0]}={self.columns[strange[0]]}: NAME is one of {', '.join(NAMES)}")
        if not 36 <= self.dpi <= 600:
            raise ValueError(f"dpi {self.dpi} must lie in [36, 600]")

    @cached_property
    def component(self) -> str:
        """The ``source`` of the records."""
        return self.source or _component(self.sources[0])

    def style_config(self, style: str) -> StyleConfig:
        return StyleConfig(
            style,
            self.component,
            self.prompt,
            self.columns,
            self.decode,
            bool(self.source),
            self.coordinates,
            self.video,
        )


@dataclass(frozen=True)
class Cursor:
    """Where an ingestion stands: the task, the row of it, and how many outcomes of that row are used up."""

    task: int = 0
    row: int = 0
    outcomes: int = 0


def ingest(config: IngestConfig, say: Callable[[str], None] = print, progress: bool = True) -> dict[str, Any]:
    """Do it, or what is left of it, and return the report. Raises :class:`SourceError` for a source that cannot be read
    at all, or a folder that holds something else."""
    folder = Path(config.to)
    _one_name(config)
    _apart(config)
    inputs, aside = _inputs(config)
    for one in aside:
        say(one.told())
    settings = {name: value for name, value in asdict(config).items() if name not in ("to", "limits", "anew")}
    told = [{"name": i.place.name, "kind": i.kind, "size": i.size} for i in inputs]
    plan = {**settings, "inputs": told}
    stamped = [{**one, "stamp": i.stamp} for one, i in zip(told, inputs, strict=True)]
    claim(folder, {**settings, "inputs": stamped}, config.anew, say)
    if (folder / REPORT).is_file():
        say(f"{config.to}: finished already, of files that have not changed since (--anew makes it again)")
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    styles = _styles(config, inputs, say)
    body = {
        "source": config.component,
        "dpi": config.dpi if any(found.kind == "pdf" for found in inputs) else 0,
        "inputs": [{**p, "style": s} for p, s in zip(plan["inputs"], styles, strict=True)],
        "left_aside": [kind for one in aside for kind in one.kinds()],
    }
    run = _Run(config, inputs, [config.style_config(style) for style in styles], say)
    with tqdm(
        total=sum(found.size for found in inputs), desc="ingest", unit="B", unit_scale=True, smoothing=0.05,
        file=sys.stderr, disable=not progress, delay=2.0, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        tally = run.write(bar)
    if tally.records:
        left_out = {name: kind.count for name, kind in tally.kinds.items()}
        write_card_page(
            folder, summarise(ShardSet(folder), most=_COUNTED), {**plan, "source": config.component}, left_out
        )
    write_report(folder, body, tally)
    for note in folder.glob(".progress-*.json"):
        note.unlink()
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def _styles(config: IngestConfig, inputs: list[Input], say: Callable[[str], None]) -> list[str]:
    """How every input is read."""
    given = [config.style] * len(inputs)
    if config.style != "auto" and not config.columns:
        return given
    try:
        found = recognised(inputs, config.columns, replace(config.limits), config.style == "auto", say)
    except SourceError:
        if not (Path(config.to) / REFUSED).exists():  # nothing is written yet: with other settings it may go
            (Path(config.to) / PLAN).unlink()
        raise
    return found if config.style == "auto" else given


def _one_name(config: IngestConfig) -> None:
    """Refuse sources that would all be called by the first one's name."""
    names = list(dict.fromkeys(_component(source) for source in config.sources))
    if len(names) > 1 and not config.source:
        told = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
        raise SourceError(
            f"{len(config.sources)} sources ({told}) would become one component of a mixture: ingest each in a "
            f"command of its own, --to {Path(config.to) / names[0]} and so on, or give all of them one name with "
            "--source NAME"
        )


def _apart(config: IngestConfig) -> None:
    """Refuse a FOLDER that is no folder, or that shares files with a SOURCE: what is written would be read."""
    to = Path(config.to).resolve()
    there = next(path for path in (to, *to.parents) if path.exists())
    if not there.is_dir():
        raise SourceError(f"{config.to}: {there} is a file; --to wants a folder, which is new or empty")
    for source in config.sources:
        path = Path(source.removeprefix(PREFIX)).resolve()
        if not path.exists():  # of the hub; or find_inputs says that there is none
            continue
        if to == path or path in to.parents:
            told = f"--to {config.to} lies in the source {source}: the next run would read the shards as input"
        elif to in path.parents:
            told = f"the source {source} lies in --to {config.to}, which --anew may clear"
        else:
            continue
        raise SourceError(f"{told}; name a folder beside it")


def _component(source: str) -> str:
    return key_of(Path(source.rstrip("/")).name, extension=False).partition("%2E")[0]


def _inputs(config: IngestConfig) -> tuple[list[Input], list[Aside]]:
    """All inputs, and what is left aside of folders."""
    inputs: list[Input] = []
    aside: list[Aside] = []
    names = [key_of(Path(source.rstrip("/")).name, extension=False) for source in config.sources]
    for n, source in enumerate(config.sources):
        again = f"-{n + 1}" if names.count(names[n]) > 1 else ""
        prefix = f"{names[n]}{again}/" if len(names) > 1 else ""
        try:
            found, left = find_inputs(source, prefix, config.images, config.outside, config.dpi)
        except OSError as error:
            raise SourceError(f"{source}: {error.strerror}: {error.filename}") from error
        inputs += found
        aside += [left] if left else []
    return inputs, aside


class _Run:
    """Writes what its jobs give, and knows where it stands."""

    def __init__(
        self, config: IngestConfig, inputs: list[Input], styles: list[StyleConfig], say: Callable[[str], None]
    ):
        self._config, self._inputs, self._styles, self._say = config, inputs, styles, say
        self._folder = Path(config.to)
        self._tally, self._cursor = Tally(), Cursor()

    def write(self, bar: tqdm) -> Tally:
        config = self._config
        with ShardWriter(
            self._folder, max_bytes=config.shard_bytes, max_samples=config.shard_samples, before_shard=self._note
        ) as writer:
            if writer.shards:
                self._go_on_after(writer.shards - 1)
            self._log = Log(self._folder / REFUSED, config.component, self._tally.log_bytes)
            self._named = Lines(self._folder / NAMED, self._tally.named_bytes)
            for job, row, answer in in_order(convert, lost, self._jobs(bar), config.limits):
                self._use(writer, job, row, answer)
            self._log.sync()
            self._named.sync()
        self._log.close()
        self._named.close()
        return self._tally

    def _jobs(self, bar: tqdm) -> Iterator[tuple[Job, int]]:
        """All tasks in order; those that are done are found again and passed over."""
        number = 0
        for place, found in enumerate(self._inputs):
            for task in found.tasks():
                if number >= self._cursor.task:
                    start = self._cursor.row if number == self._cursor.task else 0
                    yield Job(number, place, task, self._styles[place]), start
                bar.set_postfix(records=self._tally.records, refused=self._tally.refused, refresh=False)
                bar.update(task.size)
                number += 1

    def _use(self, writer: ShardWriter, job: Job, row: int, answer: Answer) -> None:
        """Write and count the outcomes of a row, those that an earlier run had counted excepted."""
        begun = (self._cursor.task, self._cursor.row) == (job.number, row)
        done = self._cursor.outcomes if begun else 0
        for n, outcome in enumerate(answer.outcomes):
            if n < done:
                continue
            if isinstance(outcome, Made):
                outcome = self._append(writer, outcome, job, row)
            if isinstance(outcome, Refused):
                self._tally.log_bytes = self._log.write(outcome)
                self._tally.refuse(outcome)
            self._cursor = Cursor(job.number, row, n + 1)
        for line in answer.named:
            self._tally.named_bytes = self._named.append(line)
        self._tally.row(answer)
        self._cursor = Cursor(job.number, row + answer.rows)

    def _append(self, writer: ShardWriter, made: Made, job: Job, row: int) -> Made | Refused:
        try:
            writer.append(made.sample)
        except ValueError as error:
            return Refused(made.sample.key, job.task.name(row)[1], "key", str(error).partition(": ")[2])
        self._tally.made(made)
        return made

    def _note(self, shard: int) -> None:
        """What is used up when a shard is full; the writer is about to let it appear."""
        self._log.sync()
        self._named.sync()
        note = {"cursor": asdict(self._cursor), "tally": self._tally.state()}
        write_text(self._folder / f".progress-{shard:05d}.json", json.dumps(note))
        (self._folder / f".progress-{shard - 2:05d}.json").unlink(missing_ok=True)

    def _go_on_after(self, shard: int) -> None:
        path = self._folder / f".progress-{shard:05d}.json"
        if not path.is_file():
            raise SourceError(f"{self._folder}: shard {shard} has no note of how far it goes; delete the folder")
        note = json.loads(path.read_text(encoding="utf-8"))
        self._cursor, self._tally = Cursor(**note["cursor"]), Tally.of(note["tally"])
        done = f"{counted(self._tally.rows, 'row')} read, {counted(self._tally.records, 'record')} written"
        self._say(f"{self._folder}: goes on after shard {shard}, with {done} before")
