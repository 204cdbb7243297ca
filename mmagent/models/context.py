"""Context parallelism: the ranks of a group share every pack, and each computes a slice of its tokens.

Every rank holds the whole pack, for ids, positions, borders and pixels are small beside activations. So whatever
follows from ids needs no communication: targets, counts, and the tokens ahead that MTP is fed. Three things do need it:

- attention (:class:`ContextAttention`): slices of tokens are traded for shares of the heads, and back (Ulysses, arXiv
  2309.14509). Each rank attends over whole documents, so documents may lie across the borders of slices;
- images (:func:`plan_vision`): one rank encodes an image, and its visual tokens go to where they stand. In MTP's
  ``fused`` mode some go to the slice before, too, whose last tokens are fed what comes next;
- statistics per document (:meth:`Context.sum`).

Sums of losses and gradients over all ranks are then those of one rank that computes whole packs.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmagent import dist
from mmagent.models.decoder import Attend
from mmagent.models.mtp import MTPConfig
from mmagent.types import PackedBatch, PackedVision, Segments


def slices(total: int, ranks: int) -> tuple[slice, ...]:
    """Every rank's rows of a stream of ``total`` tokens: as even as can be, empty where tokens are too few."""
    return tuple(slice(a, b) for a, b in pairwise(total * rank // ranks for rank in range(ranks + 1)))


@dataclass(frozen=True)
class Context:
    """The ranks that share every pack: those of ``group``, or this one alone."""

    group: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def rows(self, total: int) -> slice:
        """This rank's slice of a stream of ``total`` tokens."""
        return slices(total, self.ranks)[self.rank]

    def within(self, places: Tensor, rows: slice) -> Tensor:
        """Those of ``places`` in the stream that lie in ``rows``, counted from the first of these."""
        if self.group is None:
            return places
        return places[(places >= rows.start) & (places < rows.stop)] - rows.start

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the group, without gradient. A collective."""
        return tensor if self.group is None else dist.all_reduce(tensor.detach().clone(), self.group)

    def whole(self, values: Tensor, total: int) -> Tensor:
        """``(T,)`` from every rank's slice, without gradient. A collective."""
        if self.group is None:
            return values
        stream = values.new_zeros(total)
        stream[self.rows(total)] = values
        return dist.all_reduce(stream, self.group)

    def require_same(self, batch: PackedBatch) -> None:
        """Raise ``ValueError`` on every rank if their packs differ, before a forward waits for ever. A collective."""
        if self.group is None:
            return
        names = "\n".join((*batch.keys, *map(str, batch.segments.lengths))).encode()
        seen = zlib.crc32(names)
        for part in (batch.input_ids, batch.labels):
            seen = zlib.crc32(part.cpu().numpy().tobytes(), seen)
        checks = torch.zeros(self.ranks, dtype=torch.int64, device=batch.input_ids.device)
        checks[self.rank] = seen
        found = dist.all_reduce(checks, self.group).tolist()
        if len(set(found)) > 1:
            raise ValueError(
                f"the {self.ranks} ranks of a context group must read the same packs, but have different ones; rank "
                f"{self.rank} of the group has {batch.keys[:3]}...: give the stream the ranks of the data alone"
            )


def check_heads(heads: int, kv_heads: int, ranks: int) -> None:
    """Raise ``ValueError`` where ``ranks`` cannot share the heads of attention evenly."""
    if heads % ranks:
        raise ValueError(
            f"context_parallel: {heads} heads cannot be shared evenly by {ranks} ranks; set it to a divisor of "
            f"model.decoder.heads"
        )
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"context_parallel: {kv_heads} key-value heads and {ranks} ranks: one must be a multiple of the other"
        )


@dataclass(frozen=True)
class ContextAttention:
    """``inner`` over the whole stream of ``total`` tokens, where each rank has a slice of the tokens.

    One exchange gives every rank all tokens of its share of the heads (of keys and values, too; where there are fewer
    of these than ranks, they are repeated), a second one gives it all heads of its tokens. Per token and layer a
    rank sends ``(2 H + 2 G) d (R - 1) / R`` values over R ranks (R for G where that is less), and the same again in the
    backward.
    """

    inner: Attend
    context: Context
    total: int

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        ranks, group = self.context.ranks, self.context.group
        lengths = [rows.stop - rows.start for rows in slices(self.total, ranks)]
        own = lengths[self.context.rank]
        if k_TGd.shape[1] < ranks:
            k_TGd, v_TGd = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (k_TGd, v_TGd))
        shares = [x.unflatten(1, (ranks, -1)) for x in (q_THd, k_TGd, v_TGd)]
        sizes = [x.shape[2] for x in shares]
        by_rank = torch.cat(shares, dim=2).transpose(0, 1).flatten(0, 1)  # (R * own, share of all heads, d)
        q, k, v = dist.all_to_all(by_rank, [own] * ranks, lengths, group).split(sizes, dim=1)
        out = dist.all_to_all(self.inner(layer, q, k, v), lengths, [own] * ranks, group)
        return out.unflatten(0, (ranks, own)).transpose(0, 1).flatten(1, 2)


class Window(NamedTuple):
    """``rows`` of the stream that this rank computes; ``near``: these and the tokens ahead that MTP reads there."""

    rows: slice
    near: slice

    @staticmethod
    def over(segments: Segments, rows: slice, depths: int) -> Window:
        """``near`` ends where the document of the last row does: MTP reads nothing of another."""
        if rows.start == rows.stop:
            return Window(rows, rows)
        borders = segments.offsets()
        end = borders[bisect_right(borders, rows.stop - 1)]
        return Window(rows, slice(rows.start, min(rows.stop + depths, end)))


def needs(segments: Segments, ranks: int, ahead: int) -> tuple[slice, ...]:
    """Every rank's slice, and ``ahead`` tokens behind it (at most to the end of its last document)."""
    return tuple(Window.over(segments, rows, ahead).near for rows in slices(segments.total, ranks))


class VisionPlan(NamedTuple):
    """What one rank does about the images of a pack.

    ``images``: those it encodes. ``send (n,)``: which of their visual tokens go out, in order of
    the receivers, ``sends[r]`` to rank r; ``receives[r]`` come from rank r. ``order (v,)`` picks from what came, for
    the places ``slots (v,)`` in the rank's window.
    """

    images: tuple[int, ...]
    send: Tensor
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    order: Tensor
    slots: Tensor


def deal_images(patches: Sequence[int], ranks: int) -> list[int]:
    """The rank that encodes each image of so many patches: largest image first, each to the rank with the fewest so
    far. An image or clip stays whole, so a group is as slow as the rank with the largest one."""
    owners, loads = [0] * len(patches), [0] * ranks
    for image in sorted(range(len(patches)), key=lambda n: -patches[n]):
        owners[image] = loads.index(min(loads))
        loads[owners[image]] += patches[image]
    return owners


class Route(NamedTuple):
    """How visual tokens travel: those ``send (n,)`` of a rank's own go out, ``sends[r]`` to rank r; ``receives[r]``
    come from rank r, and ``order (v,)`` picks from what came."""

    send: Tensor
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    order: Tensor


def route(owner_V: Tensor, wanted: Sequence[Tensor], rank: int) -> Route:
    """``owner_V``: the rank that has each visual token, in the order of its own; ``wanted[r]``: those that rank r must
    have, in the order in which it wants them. On the host."""
    place_V = torch.empty_like(owner_V)  # among the visual tokens of its rank
    for r in range(len(wanted)):
        place_V[owner_V == r] = torch.arange(int((owner_V == r).sum()))
    send = [place_V[tokens][owner_V[tokens] == rank] for tokens in wanted]
    sources = owner_V[wanted[rank]]
    return Route(
        torch.cat(send),
        tuple(len(part) for part in send),
        tuple(int((sources == r).sum()) for r in range(len(wanted))),
        torch.argsort(torch.argsort(sources, stable=True)),
    )


def plan_vision(batch: PackedBatch, merge_size: int, needs: tuple[slice, ...], rank: int) -> VisionPlan:
    """``needs[r]``: the rows of the stream whose visual embeddings rank r must have. All ranks make the same plan of
    who encodes what (:func:`deal_images`)."""
    assert batch.vision is not None
    grids, device = batch.vision.grids, batch.input_ids.device
    patches = grids.prod(1)
    owners = deal_images(patches.tolist(), len(needs))
    owner_V = torch.repeat_interleave(torch.tensor(owners), patches // merge_size**2)
    slots = batch.visual_slots.cpu()
    if batch.visual_index is None and len(slots) != len(owner_V):
        raise ValueError(f"pack of {batch.keys[:3]}...: {len(owner_V)} visual tokens for {len(slots)} slots")
    token_of_slot = torch.arange(len(slots)) if batch.visual_index is None else batch.visual_index.cpu()
    wanted = [(slots >= rows.start) & (slots < rows.stop) for rows in needs]
    found = route(owner_V, [token_of_slot[want] for want in wanted], rank)
    return VisionPlan(
        tuple(n for n, owner in enumerate(owners) if owner == rank),
        found.send.to(device),
        found.sends,
        found.receives,
        found.order.to(device),
        (slots[wanted[rank]] - needs[rank].start).to(device),
    )


def encode_shared(
    encode: Callable[[PackedVision | None], Tensor], batch: PackedBatch, merge_size: int, context: Context, ahead: int
) -> tuple[Tensor, Tensor]:
    """``(v, D)`` visual embeddings of this rank's slice and of ``ahead`` tokens behind it (of its last document),
    and ``(v,)`` their places in it. ``encode(None)`` encodes a blank: a rank without images takes part all the same,
    with weight zero, for its parameters may be sharded and its peers send it tokens."""
    assert batch.vision is not None
    plan = plan_vision(batch, merge_size, needs(batch.segments, context.ranks, ahead), context.rank)
    visual = encode(_some_images(batch.vision, plan.images)).index_select(0, plan.send)
    came = dist.all_to_all(visual, plan.sends, plan.receives, context.group)
    return came.index_select(0, plan.order), plan.slots


def _some_images(vision: PackedVision, images: Sequence[int]) -> PackedVision | None:
    if not images:
        return None
    parts = vision.patches.split(vision.grids.prod(1).tolist())
    return PackedVision(torch.cat([parts[n] for n in images]), vision.grids[list(images)])


class MTPTraffic(NamedTuple):
    """Bytes of visual embeddings that multi-token prediction needs from elsewhere in one forward (where nothing is
    detached their gradients are as many): ``stage``, at the pipeline stage where it runs, the last one; ``context``,
    between the ranks of a context group, beyond what their slices need anyway."""

    stage: int
    context: int


def mtp_traffic(
    batch: PackedBatch, mtp: MTPConfig, merge_size: int, width: int, itemsize: int, ranks: int = 1
) -> MTPTraffic:
    """For one pack, a decoder of ``width`` and visual embeddings of ``itemsize`` bytes a value.

    In ``shared`` and ``masked`` mode nothing: the head is fed ids, which every stage and rank has. In ``fused`` mode a
    stage needs every visual token but those that begin a document, and a rank those among the next ``depths`` tokens
    behind its slice which another has encoded.
    """
    if mtp.mode != "fused" or not mtp.depths or batch.vision is None:
        return MTPTraffic(0, 0)
    first = torch.tensor(batch.segments.offsets()[:-1])
    ahead = int((~torch.isin(batch.visual_slots.cpu(), first)).sum())
    received = []
    for depths in (mtp.depths, 0):
        near = needs(batch.segments, ranks, depths)
        plans = [plan_vision(batch, merge_size, near, rank) for rank in range(ranks)]
        received.append(sum(sum(plan.receives) - plan.receives[rank] for rank, plan in enumerate(plans)))
    return MTPTraffic(ahead * width * itemsize, (received[0] - received[1]) * width * itemsize)
