"""Packs as training makes them: where documents end, which positions they have, and how full the packs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup

from data_pipelines.mixture import SourceConfig
from data_pipelines.record_view import figure, inline
from data_pipelines.stream import PackStream, StreamConfig
from mmagent.geometry import GeometryConfig, ImageView, unpatchify
from mmagent.html.pieces import Section, details, join, page, table, tiles
from mmagent.packing import Size
from mmagent.types import IGNORE, PackedBatch, PatchedImage
from mmagent.vocab import Vocab
from tools.inspector.tokens import LEGEND, token_view


def pack_page(
    shards: str, packs: int, budget: Size, vocab: Vocab, geometry: GeometryConfig, done: Callable[[], object]
) -> str:
    """The page of the first ``packs`` packs of a run that trains on ``shards`` alone; ``done`` is called after each.

    Raises ``ValueError`` where there is nothing to pack."""
    stream = PackStream(
        StreamConfig(
            sources={Path(shards).name: SourceConfig(shards)},
            tokens_per_step=budget.tokens,
            tokens_per_microbatch=budget.tokens,
            patches_per_microbatch=budget.patches,
            prefetch=0,
            threads=0,
        ),
        vocab,
        geometry,
    )
    batches = [batch for _ in range(packs) for batch in next(stream)]
    fills = [(b.num_tokens - b.tail) / budget.tokens for b in batches]
    sections = [
        Section(
            "All packs",
            tiles(
                {
                    "packs": str(len(batches)),
                    "documents": str(sum(len(_documents(b)) for b in batches)),
                    "fill, tokens": f"{np.mean(fills):.2%}",
                    "fill, patches": f"{np.mean([b.num_patches for b in batches]) / budget.patches:.1%}",
                }
            )
            + LEGEND,
            f"{budget.tokens:,} tokens and {budget.patches:,} patches at most.",
        )
    ]
    for n, batch in enumerate(batches, 1):
        sections.append(Section(f"Pack {n}", _pack(batch, budget, vocab, geometry)))
        done()
    return page(f"Packs of {Path(shards).name}", sections, subtitle="As a run meets them, in order")


def _documents(batch: PackedBatch) -> list[tuple[int, int]]:
    """``(first, last)`` token of each document, the tail excepted."""
    spans = list(pairwise(batch.segments.offsets()))
    return spans[:-1] if batch.tail else spans


def _pack(batch: PackedBatch, budget: Size, vocab: Vocab, geometry: GeometryConfig) -> Markup:
    spans = _documents(batch)
    pictures = _pictures(batch, geometry)
    bar = join(
        Markup('<span class="part p{}" style="flex-grow: {}" title="{}: {} tokens"></span>').format(
            n % 6, last - first, batch.keys[n], last - first
        )
        for n, (first, last) in enumerate(spans)
    )
    empty = budget.tokens - (batch.num_tokens - batch.tail)
    rest = Markup('<span class="part" style="flex-grow: {}" title="{} tokens empty"></span>').format(empty, empty)
    rows, documents, seen = [], [], 0
    for n, (first, last) in enumerate(spans):
        ids = batch.input_ids[first:last].tolist()
        trained = (batch.labels[first:last] != IGNORE).tolist()
        grids = _grids_of(ids, batch, seen, vocab, geometry)
        own = pictures[seen : seen + len(grids)]
        seen += len(grids)
        rows.append(
            {
                "document": batch.keys[n],
                "source": batch.sources[n],
                "from": first,
                "to": last - 1,
                "tokens": last - first,
                "trained on": sum(trained),
                "pictures": len(grids),
                "positions": _positions(batch, first, last),
            }
        )
        title = Markup('<b class="part p{}"></b> {} <span class="quiet">tokens {} to {}</span>').format(
            n % 6, batch.keys[n], first, last - 1
        )
        views = token_view(ids, trained, grids, vocab, geometry.merge_size)
        documents.append(details(title, Markup('<div class="frames">{}</div>').format(join(own)) + views))
    return Markup('<div class="pack">{}{}</div>').format(bar, rest) + table(rows) + join(documents)


def _grids_of(
    ids: Sequence[int], batch: PackedBatch, seen: int, vocab: Vocab, geometry: GeometryConfig
) -> list[list[int]]:
    """Grids of the pictures in a document: as many as its slots need."""
    slots, grids = sum(index == vocab.image_id for index in ids), []
    while slots > 0:
        assert batch.vision is not None
        grids.append(batch.vision.grids[seen + len(grids)].tolist())
        frames, rows, cols = grids[-1]
        slots -= frames * rows * cols // geometry.merge_size**2
    assert slots == 0, "a document's slots are those of whole pictures"
    return grids


def _positions(batch: PackedBatch, first: int, last: int) -> str:
    own = batch.positions[..., first:last].reshape(-1, last - first)
    spans = [f"{int(axis.min())}–{int(axis.max())}" for axis in own]
    return spans[0] if len(spans) == 1 else ", ".join(f"{n} {s}" for n, s in zip("trc", spans, strict=True))


def _pictures(batch: PackedBatch, geometry: GeometryConfig) -> list[Markup]:
    """Every picture as the encoder sees it."""
    if batch.vision is None:
        return []
    out, start = [], 0
    for grid in batch.vision.grids.tolist():
        count = grid[0] * grid[1] * grid[2]
        out.append(figure(inline(_seen(batch, start, count, tuple(grid), geometry), 240)))
        start += count
    return out


def _seen(
    batch: PackedBatch, start: int, count: int, grid: tuple[int, int, int], geometry: GeometryConfig
) -> np.ndarray:
    assert batch.vision is not None
    size = grid[1] * geometry.patch_size, grid[2] * geometry.patch_size
    return unpatchify(PatchedImage(batch.vision.patches[start : start + count], grid, ImageView(size, size)), geometry)
