"""Records to documents in two strides, and the quarantine for those that cannot be used.

A :class:`Draft` is a document whose pixels are still encoded: ids, mask and both sizes are known from the text
and the image headers, so that mixing, packing and balancing cost no decoding and a waiting document little
memory. :meth:`DocumentBuilder.finish` decodes.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.splitting import split
from mmagent.chat import ChatConfig, render, render_parts
from mmagent.geometry import GeometryConfig, image_grid, patchify, visual_tokens
from mmagent.packing import Size
from mmagent.records import Record, RecordError, decode_image, image_size
from mmagent.types import Document
from mmagent.vocab import Vocab

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A document before its pixels are decoded.

    ``input_ids (L,)`` int64, ``trainable (L,)`` bool, ``grids`` of its images, ``size`` in tokens and patches.
    """

    record: Record
    input_ids: Tensor
    trainable: Tensor
    grids: tuple[tuple[int, int, int], ...]
    size: Size


class TooLargeError(RecordError):
    """A document that no pack can hold. With ``geometry.max_tokens=max_tokens`` one could; 0: with no size of its
    pictures."""

    def __init__(self, key: str, field: str, problem: str, max_tokens: int):
        super().__init__(key, field, problem)
        self.max_tokens = max_tokens

    def __reduce__(self) -> tuple[type[RecordError], tuple[str | int, ...]]:
        return type(self), (self.key, self.field, self.problem, self.max_tokens)


class DocumentBuilder:
    """How records become documents: one vocabulary, one geometry, one chat format, one size limit."""

    def __init__(
        self,
        vocab: Vocab,
        geometry: GeometryConfig,
        chat: ChatConfig | None = None,
        limit: Size | None = None,
        *,
        split_long: bool = False,
    ):
        """``limit``: the tokens and patches no document may exceed; None for no limit. ``split_long``: records that
        do become several documents, else they are refused whole."""
        self.vocab, self.geometry = vocab, geometry
        self.chat = chat or ChatConfig()
        self.limit, self.split_long = limit, split_long

    def drafts(self, record: Record) -> list[Draft]:
        """Render text and masks; read image headers only. One document, or the pieces of a long one
        (:mod:`data_pipelines.splitting`), those left out in which there is nothing to train on. Of a text that was cut
        the last piece alone says that it ends.

        What does not fit is refused whole, for cutting it would cut an image or a tool call. Raises
        :class:`~mmagent.records.RecordError` naming key and field.
        """
        draft = self._rendered(record)
        if not draft.trainable.any():
            field = "messages" if record.messages else "parts"
            raise RecordError(record.key, field, "nothing to train on: no assistant turn, or none that is trainable")
        problem = self._exceeds(draft)
        if problem and not self.split_long:
            raise TooLargeError(record.key, *problem, self._most_visual(draft))
        if not problem:
            return [draft]
        pieces = split(record, lambda piece: not self._exceeds(self._rendered(piece)))
        found = [self._rendered(piece, ended=piece is pieces[-1]) for piece in pieces]
        drafts = [draft for draft in found if draft.trainable.any()]
        for draft in drafts:
            if problem := self._exceeds(draft):
                told = f"{problem[1]}, by {draft.record.key} alone"
                raise TooLargeError(record.key, problem[0], told, self._most_visual(draft))
        if not drafts:
            raise RecordError(record.key, "messages", "nothing to train on in any of its pieces")
        return drafts

    def draft(self, record: Record) -> Draft:
        """:meth:`drafts` of a builder that does not split."""
        (draft,) = self.drafts(record)
        return draft

    def _rendered(self, record: Record, ended: bool = True) -> Draft:
        grids = tuple(self._grid(record, n) for n in range(len(record.images)))
        counts = [visual_tokens(grid, self.geometry.merge_size) for grid in grids]
        try:
            if record.messages:
                chat = self.chat.mode_of(record.messages)
                rendered = render(record.messages, self.vocab, counts, chat, tools=record.tools)
            else:
                rendered = render_parts(record.parts, self.vocab, counts, ended=ended)
        except ValueError as error:
            raise RecordError(record.key, "messages" if record.messages else "parts", str(error)) from error
        size = Size(len(rendered.ids), sum(frames * rows * cols for frames, rows, cols in grids))
        ids = torch.from_numpy(np.array(rendered.ids, np.int64))  # three times faster than torch reads a list
        return Draft(record, ids, torch.from_numpy(np.array(rendered.trainable, np.bool_)), grids, size)

    def _exceeds(self, draft: Draft) -> tuple[str, str] | None:
        """Which limit, and by how much."""
        for name, need, have in zip(draft.size._fields, draft.size, self.limit or draft.size, strict=True):
            if need > have:
                return name, f"{need} exceed the limit of {have}"
        return None

    def _most_visual(self, draft: Draft) -> int:
        """The largest ``max_tokens`` of the geometry with which the document fits, 0 where none does."""
        assert self.limit is not None
        counts = [visual_tokens(grid, self.geometry.merge_size) for grid in draft.grids]
        text, patches = draft.size.tokens - sum(counts), self.limit.patches
        room = min(self.limit.tokens - text, patches // self.geometry.merge_size**2)
        for place, count in enumerate(ordered := sorted(counts)):  # the smaller ones stay as they are
            most = (room - sum(ordered[:place])) // (len(ordered) - place)
            if most < count:
                return most if most >= self.geometry.min_tokens else 0
        return 0

    def finish(self, draft: Draft, into: Tensor | None = None) -> Document:
        """Decode the images, their patches one behind the other ``into (p, C)`` where that is given. Raises
        :class:`~mmagent.records.RecordError` naming key and image."""
        record = draft.record
        counts = [frames * rows * cols for frames, rows, cols in draft.grids]
        places = [None] * len(counts) if into is None else into.split(counts)
        images = []
        for n, (image, grid, place) in enumerate(zip(record.images, draft.grids, places, strict=True)):
            pixels = decode_image(image.data, record.key, f"images[{n}]")
            found = image_grid(*pixels.shape[:2], self.geometry)
            if found != grid:
                raise RecordError(record.key, f"images[{n}]", f"decodes to grid {found}, its header said {grid}")
            images.append(patchify(pixels, self.geometry, place))
        return Document(draft.input_ids, draft.trainable, tuple(images), record.key, record.source)

    def document(self, record: Record) -> Document:
        """Both strides at once."""
        return self.finish(self.draft(record))

    def _grid(self, record: Record, n: int) -> tuple[int, int, int]:
        """Frames of a video are still images here: each is named by a timestamp of its own."""
        field = f"images[{n}]"
        try:
            return image_grid(*image_size(record.images[n], record.key, field), self.geometry)
        except RecordError:
            raise
        except ValueError as error:
            raise RecordError(record.key, field, str(error)) from error


class QuarantineError(ValueError):
    """Too large a share of a source is unusable to go on."""


@dataclass
class QuarantineConfig:
    """``folder`` of the log ("" keeps none). The run stops when more than ``max_share`` of the samples of one source
    are bad, judged once ``min_seen`` were read."""

    folder: str = ""
    max_share: float = 0.01
    min_seen: int = 200

    def within(self, output: str) -> QuarantineConfig:
        """This, with ``output/quarantine`` for a folder where none is given: a run's bad samples lie in its folder."""
        return self if self.folder else replace(self, folder=str(Path(output) / "quarantine"))


class Quarantine:
    """Counts samples that cannot be used, warns of each once and writes it once to ``quarantine-RANK.jsonl``.

    A line holds ``source``, ``shard`` (with offset), ``key``, ``reason`` (the field) and ``problem``. Samples met
    again, in a later epoch or by a resumed run, are counted but not written again. All ranks meet a shard that was cut
    short and count it in ``tails``; the first tells of it.
    """

    def __init__(self, config: QuarantineConfig, rank: int = 0, tell: bool = True):
        """``tell`` false: another one warns of the same samples."""
        if not 0 <= config.max_share <= 1:
            raise ValueError(f"max_share {config.max_share} must lie in [0, 1]")
        self.config, self.rank, self.tell = config, rank, tell
        self.tails = 0
        self.seen: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._known: set[tuple[str, str]] = set()
        self._smaller: dict[str, int] = {}  # by source: with pictures of at most so many tokens more would fit
        self._path: Path | None = None
        if config.folder:
            self._path = Path(config.folder) / f"quarantine-{rank}.jsonl"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self._path)
            for path in self._path.parent.glob("quarantine-*.jsonl"):
                self._known |= {(line["source"], line["shard"]) for line in read_quarantine(path)}

    @property
    def total(self) -> int:
        """Bad samples of all sources."""
        return self.bad.total()

    def good(self, source: str) -> None:
        """Count a sample that could be used."""
        self.seen[source] += 1

    def add(self, source: str, shard: str, error: RecordError, *, counted: bool = False) -> None:
        """Count and log a sample that could not. ``counted``: it passed for good until its pixels were decoded.

        Raises :class:`QuarantineError` past the share.
        """
        reason = re.sub(r"\[\d+\]", "", error.field)
        self.seen[source] += not counted
        self.bad[source] += 1
        self._log(source, shard, error.key, reason, error.problem)
        if isinstance(error, TooLargeError) and error.max_tokens:
            self._smaller[source] = min(error.max_tokens, self._smaller.get(source, error.max_tokens))
        seen, bad, allowed = self.seen[source], self.bad[source], self.config.max_share
        if seen >= self.config.min_seen and bad > allowed * seen:
            different = sum(known == source for known, _ in self._known)
            hint = self._hint(source) if reason in Size._fields else ""
            log = f"; see {self._path}" if self._path else ""
            reasons = ", ".join(f"{name}: {count}" for name, count in self.reasons.most_common())
            raise QuarantineError(
                f"source {source!r}: {bad} of {seen} samples are unusable, {different} different ones, more than the "
                f"allowed {allowed:.2%} ({reasons}); the last is {error}{hint}{log}"
            )

    def _hint(self, source: str) -> str:
        """What to do about documents that no pack can hold."""
        smaller = ""
        if most := self._smaller.get(source):
            smaller = f"see pictures smaller by geometry.max_tokens={most} (or draw pages with a lower --dpi), "
        return f"; {smaller}raise the budget of a pack, or leave the source out"

    def torn(self, source: str, shard: str, offset: int, problem: str) -> None:
        """Count and log the tail of a shard that was cut short."""
        self.tails += 1
        if self.rank == 0:
            self._log(source, f"{shard}@{offset}", "", "torn shard", problem)

    def _log(self, source: str, shard: str, key: str, reason: str, problem: str) -> None:
        self.reasons[reason] += 1
        if (source, shard) in self._known:
            return
        self._known.add((source, shard))
        if self.tell:
            logger.warning("source %r, %s: %s left out (%s: %s)", source, shard, key or "the rest", reason, problem)
        if self._path is not None:
            line = {"source": source, "shard": shard, "key": key, "reason": reason, "problem": problem}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _drop_torn_line(path: Path) -> None:
    """A run killed while writing leaves half a line; the next line must not be appended to it."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        with path.open("r+b") as file:
            file.truncate(len(whole[0]) + len(whole[1]))


def read_quarantine(path: Path) -> list[dict[str, str]]:
    """The lines of a log; a last line torn by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]
