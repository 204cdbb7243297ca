"""Documents to packs: which documents share a micro-batch, and how they become one stream.

Pure functions under two budgets at once, tokens of the stream and patches of the encoder. A pack holds whole
documents only: no image and no text is ever split, and nothing is padded but, where a kernel wants it, the tail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmagent.geometry import document_positions, visual_tokens
from mmagent.types import IGNORE, Document, PackedBatch, PackedVision, PatchedImage, Segments


class Size(NamedTuple):
    """What a document costs, and what a pack may: ``tokens`` of the stream and ``patches`` of the encoder."""

    tokens: int
    patches: int

    def fits(self, room: Size) -> bool:
        """Whether neither budget is exceeded."""
        return self.tokens <= room.tokens and self.patches <= room.patches

    def less(self, other: Size) -> Size:
        """What is left when ``other`` is taken away."""
        return Size(self.tokens - other.tokens, self.patches - other.patches)


def size_of(document: Document) -> Size:
    """What ``document`` costs a pack."""
    return Size(len(document), document.num_patches)


def check_fits(key: str, size: Size, budget: Size) -> None:
    """Raise ``ValueError`` naming the document that no pack can hold: it is refused, never cut."""
    for name, need, have in zip(("tokens", "patches"), size, budget, strict=True):
        if need > have:
            raise ValueError(f"{key}: {need} {name} exceed the {have} {name} of a micro-batch")


def fill_gap(sizes: Sequence[Size], room: Size) -> list[int]:
    """Indices of the subset with the most tokens that fits ``room``, exactly; fewest patches among equals.

    A 0/1 knapsack over tokens that keeps, per reachable token count, the least number of patches:
    ``O(len(sizes) * room.tokens)`` in vectorised steps. It stops at the first perfect fill, so earlier
    entries are preferred.
    """
    unreachable = np.iinfo(np.int64).max // 2
    least = np.full(room.tokens + 1, unreachable, dtype=np.int64)
    least[0] = 0
    took: dict[int, np.ndarray] = {}
    for n, (tokens, patches) in enumerate(sizes):
        if tokens > room.tokens or patches > room.patches:
            continue
        candidate = least[: room.tokens + 1 - tokens] + patches
        better = candidate < least[tokens:]
        least[tokens:][better] = candidate[better]
        took[n] = better
        if least[room.tokens] <= room.patches:
            break
    at = int(np.flatnonzero(least <= room.patches)[-1])
    chosen = []
    for n in reversed(took):
        tokens = sizes[n].tokens
        if at >= tokens and took[n][at - tokens]:
            chosen.append(n)
            at -= tokens
    assert at == 0, "the knapsack's choices do not add up"
    return chosen[::-1]


def select(waiting: Sequence[Size], budget: Size) -> list[int]:
    """Indices of the documents, oldest first in ``waiting``, that form the next pack.

    The oldest always goes (so none starves: one that has ``n`` documents before it leaves within ``n + 1``
    packs). The queue is then followed in order until what is left of the budget is about one long document,
    and that gap is filled exactly from everything that waits.

    Raises ``ValueError`` if the oldest exceeds the budget alone.
    """
    if not waiting:
        return []
    if not waiting[0].fits(budget):
        raise ValueError(f"document of {waiting[0]} exceeds the budget {budget} alone")
    longest = max(size.tokens for size in waiting)
    room, taken = budget.less(waiting[0]), 1
    while taken < len(waiting) and waiting[taken].fits(room):
        after = room.less(waiting[taken])
        if after.tokens < longest:
            break
        room, taken = after, taken + 1
    return [*range(taken), *(taken + n for n in fill_gap(waiting[taken:], room))]


def plan_packs(documents: Sequence[Document], budget: Size, *, share_images: bool = False) -> list[list[int]]:
    """Partition a finite set of documents into packs; indices within a pack ascend.

    With ``share_images`` an image that several documents of a pack hold counts once, and documents go in the
    order given into the first pack with room, so that neighbours (the rollouts of one group) stay together.

    Raises ``ValueError`` naming a document that exceeds either budget alone.
    """
    sizes = [size_of(document) for document in documents]
    for document, size in zip(documents, sizes, strict=True):
        check_fits(document.key, size, budget)
    if share_images:
        return _first_fit_sharing(documents, budget)
    packs, waiting = [], list(range(len(documents)))
    while waiting:
        chosen = select([sizes[n] for n in waiting], budget)
        packs.append(sorted(waiting[n] for n in chosen))
        for n in sorted(chosen, reverse=True):
            del waiting[n]
    return packs


def _first_fit_sharing(documents: Sequence[Document], budget: Size) -> list[list[int]]:
    identify = _ImageIds()
    packs: list[list[int]] = []
    rooms: list[Size] = []
    held: list[set[int]] = []
    for n, document in enumerate(documents):
        images = {identify(image): image.patches.shape[0] for image in document.images}
        for pack in range(len(packs) + 1):
            if pack == len(packs):
                packs.append([])
                rooms.append(budget)
                held.append(set())
            need = Size(len(document), sum(p for image, p in images.items() if image not in held[pack]))
            if need.fits(rooms[pack]):
                packs[pack].append(n)
                rooms[pack] = rooms[pack].less(need)
                held[pack] |= images.keys()
                break
    return packs


class _ImageIds:
    """Numbers for images, equal for equal patches: by object identity first, then by content."""

    def __init__(self) -> None:
        self._by_object: dict[int, int] = {}
        self._by_content: dict[bytes, int] = {}
        self._alive: list[PatchedImage] = []  # an id() is only unique among living objects

    def __call__(self, image: PatchedImage) -> int:
        if id(image) not in self._by_object:
            digest = hashlib.blake2b(repr(image.grid).encode(), digest_size=16)
            digest.update(image.patches.detach().cpu().contiguous().numpy())
            number = self._by_content.setdefault(digest.digest(), len(self._by_content))
            self._by_object[id(image)] = number
            self._alive.append(image)
        return self._by_object[id(image)]


def pack(
    documents: Sequence[Document],
    *,
    image_id: int,
    merge_size: int,
    share_images: bool = False,
    multiple: int = 1,
    pad_id: int = 0,
) -> PackedBatch:
    """Concatenate documents into one validated stream, in the order given.

    Positions restart in every document (:func:`~mmagent.geometry.document_positions`); labels are the ids where
    ``trainable``, :data:`~mmagent.types.IGNORE` elsewhere. ``share_images`` stores equal images once and lets
    ``visual_index`` point every slot at its token. ``multiple`` pads the tail with ``pad_id`` up to a multiple
    of that many tokens.

    Raises ``ValueError`` naming the document whose visual slots and images disagree.
    """
    if not documents:
        raise ValueError("documents: cannot pack an empty list")
    input_ids = torch.cat([document.input_ids for document in documents])
    trainable = torch.cat([document.trainable for document in documents])
    positions = torch.cat([_positions(document, image_id, merge_size) for document in documents], dim=1)
    lengths = [len(document) for document in documents]
    images = [image for document in documents for image in document.images]
    visual_index = None
    if share_images and images:
        images, visual_index = _share(images, merge_size)
    labels = torch.where(trainable, input_ids, IGNORE)
    slots = (input_ids == image_id).nonzero().squeeze(1)
    tail = -input_ids.shape[0] % multiple
    if tail:
        lengths.append(tail)
        input_ids = torch.cat([input_ids, input_ids.new_full((tail,), pad_id)])
        labels = torch.cat([labels, labels.new_full((tail,), IGNORE)])
        positions = torch.cat([positions, torch.arange(tail).expand(3, tail)], dim=1)
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        positions=positions,
        segments=Segments(lengths),
        visual_slots=slots,
        vision=PackedVision.pack(images) if images else None,
        sources=tuple(document.source for document in documents),
        keys=tuple(document.key for document in documents),
        visual_index=visual_index,
        tail=tail,
    ).validate(image_id, merge_size)


def empty_pack(pad_id: int, tokens: int = 1) -> PackedBatch:
    """A pack of no documents, all tail: what a rank runs when every document of its pack proved unreadable."""
    return PackedBatch(
        input_ids=torch.full((tokens,), pad_id),
        labels=torch.full((tokens,), IGNORE),
        positions=torch.arange(tokens).repeat(3, 1),
        segments=Segments([tokens]),
        visual_slots=torch.empty(0, dtype=torch.int64),
        vision=None,
        sources=(),
        keys=(),
        tail=tokens,
    )


def _positions(document: Document, image_id: int, merge_size: int) -> Tensor:
    grids = [image.grid for image in document.images]
    try:
        return document_positions(document.input_ids == image_id, grids, merge_size)
    except ValueError as error:
        raise ValueError(f"{document.key}: {error}") from error


def _share(images: Sequence[PatchedImage], merge_size: int) -> tuple[list[PatchedImage], Tensor]:
    """Distinct images in order of appearance, and for every visual slot the merged token that fills it."""
    identify = _ImageIds()
    starts: dict[int, int] = {}
    kept: list[PatchedImage] = []
    index: list[Tensor] = []
    total = 0
    for image in images:
        number, tokens = identify(image), visual_tokens(image.grid, merge_size)
        if number not in starts:
            starts[number] = total
            kept.append(image)
            total += tokens
        index.append(torch.arange(starts[number], starts[number] + tokens))
    return kept, torch.cat(index)
