"""The card of a shard set, for people: what is in it, in figures and in pictures, on one page that needs nothing else.

Figures are counted in one reading, in memory that does not grow with the set; samples are drawn evenly from all of it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from data_pipelines.documents import DocumentBuilder, Draft
from data_pipelines.filters import language
from data_pipelines.record_texts import texts_of
from data_pipelines.record_view import inline_shots, record_view
from data_pipelines.shards import ShardSet
from mmagent.chat import Box, Text
from mmagent.files import write_text
from mmagent.html.charts import bar_chart
from mmagent.html.pieces import Section, code, details, facts, grid, join, page, paragraph, table, tiles
from mmagent.records import Record, RecordError, from_sample, image_size

PAGE = "card.html"
SHOWN = 24
"""Samples on the page."""
_TOLD = 1000  # samples whose language is told, drawn evenly
_ROWS = 60  # of a table
_SCRIPTS = (  # first code point, last, name
    (0x41, 0x24F, "Latin"), (0x370, 0x3FF, "Greek"), (0x400, 0x52F, "Cyrillic"), (0x590, 0x5FF, "Hebrew"),
    (0x600, 0x6FF, "Arabic"), (0x900, 0x97F, "Devanagari"), (0xE00, 0xE7F, "Thai"), (0x3040, 0x30FF, "kana"),
    (0x3400, 0x9FFF, "Han"), (0xAC00, 0xD7A3, "Hangul"),
)  # fmt: skip


@dataclass
class Summary:
    """Counts over the samples of a set. Sizes are counted by powers of two, each under its lower end."""

    samples: int = 0
    images: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    aspects: Counter[str] = field(default_factory=Counter)
    shown: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    total: int = 0
    visual: int = 0
    trainable: int = 0
    patches: int = 0
    longest: int = 0

    def add(self, record: Record, draft: Draft | None, image_id: int, tell: bool) -> None:
        """Count a sample; ``draft`` where tokens are known. ``tell`` its language as well."""
        self.samples += 1
        self.images += len(record.images)
        self.sources[record.source] += 1
        self.tasks[record.task or "(none)"] += 1
        self.shown[_power(len(record.images))] += 1
        for n, image in enumerate(record.images):
            height, width = image_size(image, record.key, f"images[{n}]")
            self.sides[_power(max(height, width))] += 1
            self.aspects[_aspect(height, width)] += 1
            self.formats[image.extension] += 1
        text = "\n".join(texts_of(record))
        self.characters[_power(len(text))] += 1
        for message in record.messages:
            if message.role == "assistant":
                said = sum(len(part.text) for part in message.parts if isinstance(part, Text | Box))
                self.answers[_power(said)] += 1
        if tell:
            self._tell(text)
        if draft is not None:
            self.tokens[_power(draft.size.tokens)] += 1
            self.total += draft.size.tokens
            self.visual += int((draft.input_ids == image_id).sum())
            self.trainable += int(draft.trainable.sum())
            self.patches += draft.size.patches
            self.longest = max(self.longest, draft.size.tokens)

    def _tell(self, text: str) -> None:
        self.scripts.update({script_of(text): 1})
        try:
            code, sure = language(text)
        except ValueError:  # the package that tells languages is an extra
            return
        self.languages[code if sure >= 0.5 else "(cannot be told)"] += 1


def script_of(text: str) -> str:
    """The writing that most letters of a text are of; "(none)" without letters. It tells no language."""
    found: Counter[str] = Counter()
    for letter, count in Counter(c for c in text[:20_000] if c.isalpha()).items():
        names = (name for first, last, name in _SCRIPTS if first <= ord(letter) <= last)
        found[next(names, "other")] += count
    return max(sorted(found), key=lambda name: found[name]) if found else "(none)"


def summarise(shards: ShardSet, builder: DocumentBuilder | None = None, most: int = 0) -> Summary:
    """Read all samples once, or ``most`` of them, drawn evenly. Raises :class:`~mmagent.records.RecordError` for one
    that is unusable."""
    summary = Summary()
    chosen = _even(len(shards), most or len(shards))
    told = {chosen[n] for n in _even(len(chosen), _TOLD)}
    for n in chosen:
        record = from_sample(shards.read(n))
        draft = builder.draft(record) if builder is not None else None
        summary.add(record, draft, builder.vocab.image_id if builder else -1, n in told)
    return summary


def write_card_page(
    folder: Path,
    summary: Summary,
    made: Mapping[str, Any],
    left_out: Mapping[str, int] | None = None,
    examples: Iterable[Mapping[str, str]] = (),
    counts: Mapping[str, int] | None = None,
) -> Path:
    """``FOLDER/card.html`` of a finished set. ``made``: its "source" and the settings it came from; ``left_out``:
    samples that are not in it, by reason, and ``examples`` of them (``key``, ``reason``, ``problem``);
    ``counts``: what else of its samples is worth a figure."""
    shards = ShardSet(folder)
    sections = [
        Section("At a glance", _glance(shards, summary, counts or {}) + _facts(shards, made)),
        Section("What it holds", _tables(summary)),
        Section("How large things are", _histograms(summary), "Samples in each class; sizes by powers of two."),
    ]
    if left_out is not None:
        sections.append(Section("What was left out", _left_out(left_out, examples)))
    shown = _even(len(shards), SHOWN)
    intro = f"{len(shown)} of {len(shards):,} samples, drawn evenly. Turns with a coloured edge are trained on."
    sections.append(Section("Samples", _samples(shards, shown), intro))
    path = folder / PAGE
    write_text(path, page(f"Data card: {made['source']}", sections, subtitle=f"{len(shards):,} samples"))
    return path


def _glance(shards: ShardSet, summary: Summary, counts: Mapping[str, int]) -> Markup:
    figures = {"samples": f"{len(shards):,}"}
    if summary.samples < len(shards):
        figures["of them counted, drawn evenly"] = f"{summary.samples:,}"
    figures["pictures"] = f"{summary.images:,}"
    figures |= {name: f"{count:,}" for name, count in counts.items()}
    figures |= {"shards": f"{len(shards.paths):,}", "on disk": _bytes(shards.bytes)}
    if summary.total:
        figures |= {
            "tokens": f"{summary.total:,}",
            "of them visual": f"{summary.visual / summary.total:.0%}",
            "of them trained on": f"{summary.trainable / summary.total:.0%}",
            "longest, in tokens": f"{summary.longest:,}",
        }
    return tiles(figures)


def _facts(shards: ShardSet, made: Mapping[str, Any]) -> Markup:
    settings = code(json.dumps(made, indent=1, ensure_ascii=False))
    return facts({"fingerprint": shards.fingerprint()}) + details("Settings it was made with", settings)


def _tables(summary: Summary) -> Markup:
    parts = []
    for title, counts in (("source", summary.sources), ("task", summary.tasks), ("picture format", summary.formats)):
        rows = [
            {title: name, "samples": count, "share, %": round(100 * count / max(counts.total(), 1), 1)}
            for name, count in counts.most_common(_ROWS)
        ]
        rest = len(counts) - len(rows)
        more = paragraph(f"and {rest:,} more", quiet=True) if rest > 0 else Markup("")
        if rows:
            parts.append(table(rows, even=True) + more)
    return join(parts)


def _histograms(summary: Summary) -> Markup:
    charts = [
        ("Tokens of a sample", _ranges(summary.tokens)),
        ("Characters of a sample", _ranges(summary.characters)),
        ("Characters of an answer", _ranges(summary.answers)),
        ("Pictures of a sample", _ranges(summary.shown)),
        ("Longer side of a picture, pixels", _ranges(summary.sides)),
        ("Sides of a picture", {name: summary.aspects[name] for name in _ASPECTS if summary.aspects[name]}),
        (f"Language, of at most {_TOLD:,} samples", dict(summary.languages.most_common(12))),
        (f"Writing, of at most {_TOLD:,} samples", dict(summary.scripts.most_common(12))),
    ]
    return grid(
        bar_chart(
            {name: {"samples": count} for name, count in counts.items()},
            title,
            maximum=None,
            show=lambda value: f"{value:,.0f}",
        )
        for title, counts in charts
        if counts
    )


def _left_out(left_out: Mapping[str, int], examples: Iterable[Mapping[str, str]]) -> Markup:
    if not left_out:
        return paragraph("Nothing was left out.")
    counts = table([{"reason": reason, "samples": count} for reason, count in left_out.items()])
    rows = [{name: one.get(name, "") for name in ("reason", "key", "problem")} for one in examples]
    return counts + (details(f"{len(rows)} of them", table(rows)) if rows else Markup(""))


def _samples(shards: ShardSet, numbers: list[int]) -> Markup:
    cards = []
    for n in numbers:
        record = from_sample(shards.read(n))
        try:
            cards.append(record_view(record, inline_shots(record), shards.where(n)))
        except RecordError as error:  # pixels that nobody decoded before
            cards.append(paragraph(f"{shards.where(n)}: {error}"))
    return Markup('<div class="samples">{}</div>').format(join(cards, "\n"))


def _even(total: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``total``, evenly."""
    return sorted({int(n) for n in np.linspace(0, total - 1, min(most, total))}) if total else []


def _power(value: int) -> int:
    return 1 << (value.bit_length() - 1) if value else 0


_ASPECTS = (
    "taller than 3:1",
    "2:1 to 3:1, upright",
    "upright",
    "about square",
    "lying",
    "2:1 to 3:1, lying",
    "wider than 3:1",
)


def _aspect(height: int, width: int) -> str:
    place = math.log(width / height)
    return _ASPECTS[sum(place > math.log(edge) for edge in (1 / 3, 1 / 2, 1 / 1.1, 1.1, 2, 3))]


def _ranges(counts: Mapping[int, int]) -> dict[str, int]:
    """Powers of two in order, those between them that nothing fell in as well."""
    if not any(counts.values()):
        return {}
    least, most = min(counts), max(counts)
    powers = [0] if least == 0 else []
    power = max(min((n for n in counts if n), default=1), 1)
    while power <= most:
        powers.append(power)
        power *= 2
    return {str(n) if n < 2 else f"{n:,} – {2 * n - 1:,}": counts.get(n, 0) for n in powers}


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
