"""A pack of documents with noised copies of their responses: one stream, one forward.

By blocks, the copies of a document's response stand behind the document, in its segment, and see its clean past (see
:mod:`mmagent.ops.block_attention`); pictures of the prompt stand once. Where whole documents are denoised at once,
every copy is a document of its own, with what its response was filled up by behind it, and copies share its pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmagent.models.decoder import Attend, BlockAttention, PackedAttention
from mmagent.objectives.noise import Copy, Response
from mmagent.ops.block_attention import block_ids
from mmagent.types import IGNORE, PackedBatch, Segments

Corrupt = Callable[[Response], Sequence[Copy]]
"""Copies of a response, of which every one gets its own noise."""


@dataclass(frozen=True)
class Noised:
    """``stream`` of T' tokens, whose ``labels`` are targets of their own places; ``weights {term: (T',)}`` fp32 of what
    each term sums, ``rows (T',)`` the places of the pack that they stand for, and ``attend`` who sees whom."""

    stream: PackedBatch
    weights: dict[str, Tensor]
    rows: Tensor
    attend: Attend


def responses(
    batch: PackedBatch, block: int, fill: bool, fill_id: int, span: int = 0, ends: Sequence[int] = ()
) -> list[Response]:
    """Of every document, the labels it has. Counted from the labels alone, so ranks and micro-batches agree. ``block``,
    ``fill`` and ``span`` as in :class:`~mmagent.objectives.noise.NoiseConfig`; where ``ends`` are given, what ends with
    none of these ids is not filled."""
    labels = batch.labels.cpu()
    out, borders = [], batch.segments.offsets()
    for n, key in enumerate(batch.keys):
        own = labels[borders[n] : borders[n + 1]]
        out.append(_response(key, own, borders[n], block, (block or span) if fill else 0, fill_id, ends))
    return out


def _response(
    key: str, labels_L: Tensor, start: int, block: int, whole: int, fill_id: int, ends: Sequence[int]
) -> Response:
    """Filled up to a multiple of ``whole`` places: every run by blocks, else the one that ends the document. Not one
    that goes on elsewhere: no end would be true there."""
    said = labels_L != IGNORE
    at = said.nonzero().squeeze(1).numpy()
    ids, real = labels_L[said].numpy(), np.ones(len(at), dtype=bool)
    run = np.cumsum(np.diff(at, prepend=-2) > 1) - 1 if len(at) else at
    unit = block_ids(said, block)[said].numpy() if block else np.zeros(len(at), dtype=np.int64)
    if not whole:
        return Response(key, ids, unit, run, real, at + start)
    parts: list[list[np.ndarray]] = [[], [], [], [], []]
    for number in range(int(run.max(initial=-1)) + 1):
        inside = run == number
        last = np.flatnonzero(inside)[-1]
        told = (block or at[last] == len(labels_L) - 1) and (not len(ends) or ids[last] in ends)
        missing = -int(inside.sum()) % whole if told else 0
        values = (ids, unit, run, real, at)
        behind = (fill_id, unit[last], number, False, at[last])
        for part, value, more in zip(parts, values, behind, strict=True):
            part += [value[inside], np.full(missing, more, dtype=value.dtype)]
    ids, unit, run, real, at = (np.concatenate(part) if part else np.zeros(0, dtype=np.int64) for part in parts)
    return Response(key, ids, unit, run, real.astype(bool), at + start)


def noised(batch: PackedBatch, said: Sequence[Response], corrupt: Corrupt, terms: Sequence[str], block: int) -> Noised:
    """``batch`` with the copies that ``corrupt`` makes of what is ``said`` in its documents."""
    if batch.prefix_of is not None:
        raise ValueError(f"pack of {batch.keys[:3]}...: noise needs every document whole, without shared prefixes")
    copies = [corrupt(response) for response in said]
    return (_by_blocks if block else _at_once)(batch, said, copies, terms, block)


def _by_blocks(
    batch: PackedBatch, said: Sequence[Response], copies: Sequence[Sequence[Copy]], terms: Sequence[str], block: int
) -> Noised:
    borders = batch.segments.offsets()
    labels = batch.labels.cpu()
    rows, ids, later, blocks, copied, targets, lengths = [], [], [], [], [], [], []
    weights: dict[str, list[np.ndarray]] = {term: [] for term in terms}
    for n, length in enumerate(batch.segments.lengths):
        clean = np.arange(borders[n], borders[n + 1])
        own = copies[n] if n < len(copies) else ()
        rows.append(clean)
        ids.append(np.full(length, -1))  # as they are
        later.append(np.zeros(length, dtype=np.int64))
        blocks.append(block_ids(labels[clean] != IGNORE, block).numpy())
        copied.append(np.zeros(length, dtype=np.int64))
        targets.append(np.full(length, IGNORE))
        for term in terms:
            weights[term].append(np.zeros(length))
        for number, copy in enumerate(own, start=1):
            response = said[n]
            rows.append(response.at)
            ids.append(copy.ids)
            later.append(_behind(response))
            blocks.append(response.unit)
            copied.append(np.full(len(response.ids), number))
            targets.append(np.where(copy.weights != 0, response.ids, IGNORE))
            for term in terms:
                weights[term].append(copy.weights if copy.term == term else np.zeros(len(copy.weights)))
        lengths.append(length + sum(len(copy.ids) for copy in own))
    device = batch.input_ids.device
    at, new, behind, blocks_T, copies_T, labels_T = (
        torch.from_numpy(np.concatenate(part).astype(np.int64)).to(device)
        for part in (rows, ids, later, blocks, copied, targets)
    )
    segments = Segments(lengths, device)
    clean_rows = (copies_T == 0).nonzero().squeeze(1)  # in the order of the pack
    stream = replace(
        batch,
        input_ids=torch.where(new >= 0, new, batch.input_ids[at]),
        labels=labels_T,
        positions=batch.positions[..., at] + behind,
        segments=segments,
        visual_slots=clean_rows[batch.visual_slots],
    )
    return Noised(stream, _weights(weights, device), at, BlockAttention(segments, blocks_T, copies_T))


def _behind(response: Response) -> np.ndarray:
    """How many places behind the last token of its run a place without one is."""
    count, out = 0, np.zeros(len(response.ids), dtype=np.int64)
    for place, real in enumerate(response.real.tolist()):
        count = 0 if real else count + 1
        out[place] = count
    return out


def _at_once(
    batch: PackedBatch, said: Sequence[Response], copies: Sequence[Sequence[Copy]], terms: Sequence[str], block: int
) -> Noised:
    borders, names = batch.segments.offsets(), len(batch.keys)
    order = [n for n in range(names) for _ in (copies[n] or (None,))] + list(range(names, len(batch.segments)))
    rows, later, lengths = [], [], []
    for n in order:
        clean = np.arange(borders[n], borders[n + 1])
        behind = said[n].at[~said[n].real] if n < names and copies[n] else clean[:0]
        rows += [clean, behind]
        later += [np.zeros(len(clean), dtype=np.int64), np.arange(1, len(behind) + 1)]
        lengths.append(len(clean) + len(behind))
    total = sum(lengths)
    new, targets = np.full(total, -1), np.full(total, IGNORE)
    weights = {term: np.zeros(total) for term in terms}
    number = start = 0
    for n in range(names):
        for copy in copies[n] or (None,):
            if copy is not None:
                size = borders[n + 1] - borders[n]
                inside = np.where(said[n].real, said[n].at - borders[n], size - 1 + _behind(said[n])) + start
                new[inside] = copy.ids
                targets[inside] = np.where(copy.weights != 0, said[n].ids, IGNORE)
                weights[copy.term][inside] = copy.weights
            start, number = start + lengths[number], number + 1
    device = batch.input_ids.device
    at, ids, labels, behind_T = (
        torch.from_numpy(x).to(device) for x in (np.concatenate(rows), new, targets, np.concatenate(later))
    )
    slot = torch.full((batch.segments.total,), -1, device=device)
    slot[batch.visual_slots] = torch.arange(len(batch.visual_slots), device=device)
    shown = slot[at]
    index = shown[shown >= 0] if batch.visual_index is None else batch.visual_index[shown[shown >= 0]]
    segments = Segments(lengths, device)
    stream = replace(
        batch,
        input_ids=torch.where(ids >= 0, ids, batch.input_ids[at]),
        labels=labels,
        positions=batch.positions[..., at] + behind_T,
        segments=segments,
        visual_slots=(shown >= 0).nonzero().squeeze(1),
        visual_index=None if batch.vision is None else index,
        sources=tuple(batch.sources[n] for n in order if n < names),
        keys=tuple(batch.keys[n] for n in order if n < names),
    )
    return Noised(stream, _weights({t: [w] for t, w in weights.items()}, device), at, PackedAttention(segments, False))


def _weights(parts: dict[str, list[np.ndarray]], device: torch.device) -> dict[str, Tensor]:
    return {term: torch.from_numpy(np.concatenate(part)).float().to(device) for term, part in parts.items()}
