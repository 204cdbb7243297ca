"""The types that cross a room's wall, with documented shapes.

One legend for the whole project; letters are logical dimensions, never shards:

====== ===============================================================
**T**  tokens of a packed stream
**P**  patches of a packed stream
**V**  visual tokens after merging (``P / merge_size**2``)
**I**  images (a still image or a clip of frames)
**N**  documents of a pack
**L**  tokens of one document
**D**  decoder width
**W**  encoder width
**C**  values of a patch (``channels * temporal * patch * patch``)
**E**  experts; **K** experts per token; **M** MoE layers
**B**  MTP depths
====== ===============================================================

Tensor names may carry the letters as a suffix (``hidden_TD``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mmagent.geometry import ImageView

IGNORE = -100
"""Label of a token that no loss may see (the value torch's cross-entropy ignores)."""


class Segments:
    """Where the documents (or frames) of one packed stream begin and end. ``lengths`` stay on the host, so that no
    kernel launch waits for the device; ``cu_seqlens`` is the same fact as an ``(N + 1,)`` int32 tensor on the device,
    for kernels that read it there."""

    __slots__ = ("cu_seqlens", "lengths")

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = tuple(int(n) for n in lengths)
        if any(n <= 0 for n in self.lengths):
            raise ValueError(f"segment lengths must be positive, got {self.lengths}")
        borders = torch.tensor((0, *self.lengths), dtype=torch.int32)
        self.cu_seqlens = borders.cumsum(0, dtype=torch.int32).to(device)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def offsets(self) -> tuple[int, ...]:
        """Start of every segment and, last, the total: ``cu_seqlens`` on the host."""
        out = [0]
        for n in self.lengths:
            out.append(out[-1] + n)
        return tuple(out)

    def ids(self) -> Tensor:
        """``(T,)`` int64: the segment every position belongs to, on the device of ``cu_seqlens``."""
        device = self.cu_seqlens.device
        return torch.repeat_interleave(
            torch.arange(len(self), device=device),
            torch.tensor(self.lengths, dtype=torch.int64, device=device),
            output_size=self.total,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        moved = object.__new__(Segments)
        moved.lengths = self.lengths
        moved.cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return moved


@dataclass(frozen=True)
class PatchedImage:
    """One image (or clip) as the encoder sees it.

    ``patches (p, C)`` float32, normalised, in merge-block-major order: ``merge_size**2`` consecutive rows form one
    visual token. ``grid (frames, rows, cols)`` in patches; ``view`` owns every coordinate conversion.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    view: ImageView

    def __post_init__(self) -> None:
        frames, rows, cols = self.grid
        if self.patches.ndim != 2 or self.patches.shape[0] != frames * rows * cols:
            raise ValueError(f"patches {tuple(self.patches.shape)} do not fill grid {self.grid}")


@dataclass(frozen=True)
class Document:
    """One training text with its images, before packing.

    ``input_ids (L,)`` int64 with the image id at every visual slot; ``trainable (L,)`` bool, true where a loss may
    supervise the token; ``images`` in order of appearance; ``key`` names the sample in every error; ``source``
    names the mixture component in every metric.
    """

    input_ids: Tensor
    trainable: Tensor
    images: tuple[PatchedImage, ...]
    key: str
    source: str

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.trainable.shape:
            raise ValueError(
                f"{self.key}: input_ids {tuple(self.input_ids.shape)} and trainable "
                f"{tuple(self.trainable.shape)} must be equal one-dimensional shapes"
            )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_patches(self) -> int:
        return sum(image.patches.shape[0] for image in self.images)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat``, without its copy where the parts lie one behind the other in memory, as a stream decodes them."""
    first, end = parts[0], parts[0].storage_offset()
    memory = first.untyped_storage().data_ptr()
    for part in parts:
        behind = part.untyped_storage().data_ptr() == memory and part.storage_offset() == end
        if not (behind and part.is_contiguous() and part.shape[1:] == first.shape[1:] and part.dtype == first.dtype):
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())


@dataclass(frozen=True)
class PackedVision:
    """All images of a pack in one stream: ``patches (P, C)`` and, on the host, ``grids (I, 3)`` int64."""

    patches: Tensor
    grids: Tensor

    def __post_init__(self) -> None:
        if self.grids.ndim != 2 or self.grids.shape[1] != 3 or self.grids.device.type != "cpu":
            raise ValueError(f"grids must be an (I, 3) tensor on the host, got {tuple(self.grids.shape)}")
        expected = int(self.grids.prod(dim=1).sum())
        if self.patches.ndim != 2 or self.patches.shape[0] != expected:
            raise ValueError(f"{self.patches.shape[0]} patches, but the grids hold {expected}")

    @staticmethod
    def pack(images: Sequence[PatchedImage]) -> PackedVision:
        if not images:
            raise ValueError("images: cannot pack an empty list; use None for a text-only pack")
        return PackedVision(
            _joined([image.patches for image in images]),
            torch.tensor([image.grid for image in images], dtype=torch.int64),
        )

    @cached_property
    def segments(self) -> Segments:
        """One segment a *frame*: attention never crosses frames."""
        return Segments([r * c for t, r, c in self.grids.tolist() for _ in range(t)], self.patches.device)

    @property
    def cu_seqlens(self) -> Tensor:
        return self.segments.cu_seqlens

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedVision:
        return PackedVision(self.patches.to(device, non_blocking=non_blocking), self.grids)

    def pin(self) -> PackedVision:
        return PackedVision(self.patches.pin_memory(), self.grids)


@dataclass(frozen=True)
class VisionFeatures:
    """What an encoder returns: ``tokens (P, W)``, chosen ``layers {i: (P, W)}``, ``pooled (I, W)``."""

    tokens: Tensor
    layers: Mapping[int, Tensor]
    pooled: Tensor


class Cost(NamedTuple):
    """A pack's cost: ``patches**2`` per frame, ``patches``, ``tokens**2`` per document, ``tokens``."""

    patches_squared: int
    patches: int
    tokens_squared: int
    tokens: int


@dataclass(frozen=True)
class PackedBatch:
    """Many documents in one stream, nothing padded but (where a kernel wants it) the tail.

    ``input_ids (T,)`` int64; ``labels (T,)`` int64, ``labels[t]`` belongs to the token *at* ``t`` and is
    :data:`IGNORE` where nothing is supervised; ``positions (3, T)`` int64 (time, row, column) or ``(T,)``;
    ``segments`` of N documents; ``visual_slots (V,)`` int64, the positions of visual tokens in the stream; ``vision``
    or None for text only; ``visual_index (V,)`` int64 or None: which merged visual token fills each slot, None
    meaning the identity. Documents that share an image (a group of rollouts) point at the same tokens, so the image
    is encoded once. ``sources``, ``keys`` of N names; ``tail`` counts padding tokens, which form the last segment and
    are no document.

    ``prefix_of``: for every segment the index of the segment whose tokens it sees as well, or -1; None for -1 all
    over. The rollouts of a group share their prompt so: it stands once, right before them, and each of them
    begins with the prompt's last token, so that its first target lies within itself.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Segments
    visual_slots: Tensor
    vision: PackedVision | None
    sources: tuple[str, ...]
    keys: tuple[str, ...]
    visual_index: Tensor | None = None
    tail: int = 0
    prefix_of: tuple[int, ...] | None = None

    @property
    def cu_seqlens(self) -> Tensor:
        return self.segments.cu_seqlens

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.shape[0] - self.tail

    @property
    def num_patches(self) -> int:
        return 0 if self.vision is None else self.vision.patches.shape[0]

    def validate(self, image_id: int, merge_size: int) -> PackedBatch:
        """Check every count against every other and return self.

        Raises ``ValueError`` naming the first document whose visual slots and image ids disagree.
        """
        total = self.input_ids.shape[0]
        if self.labels.shape != (total,) or self.positions.shape[-1] != total or self.segments.total != total:
            raise ValueError(
                f"pack of {self.keys[:3]}...: {total} ids, {self.labels.shape[0]} labels, "
                f"{self.positions.shape[-1]} positions, segments of {self.segments.total}"
            )
        documents = len(self.segments) - (1 if self.tail else 0)
        if len(self.sources) != documents or len(self.keys) != documents:
            raise ValueError(f"{documents} documents, {len(self.sources)} sources, {len(self.keys)} keys")
        is_image = self.input_ids == image_id
        slots = torch.zeros_like(is_image)
        slots[self.visual_slots] = True
        wrong = (is_image != slots).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            borders = self.segments.offsets()
            document = next(n for n in range(len(self.segments)) if borders[n + 1] > at)
            name = self.keys[document] if document < documents else "the padded tail"
            raise ValueError(
                f"document {name!r}: image ids and visual slots disagree at token {at} "
                f"({int(is_image.sum())} image ids, {self.visual_slots.numel()} visual slots in the pack)"
            )
        have = self.num_patches // merge_size**2
        if self.visual_index is None:
            if have != self.visual_slots.numel():
                raise ValueError(f"pack of {self.keys[:3]}...: {self.visual_slots.numel()} slots, {have} visual tokens")
        elif self.visual_index.shape != self.visual_slots.shape or (
            self.visual_index.numel() and int(self.visual_index.max()) >= have
        ):
            raise ValueError(f"visual_index does not fit {self.visual_slots.numel()} slots and {have} visual tokens")
        if bool((self.labels[self.visual_slots] != IGNORE).any()):
            raise ValueError(f"pack of {self.keys[:3]}...: a label stands on a visual slot")
        return self

    def cost(self) -> Cost:
        """A token that sees a shared prefix sees all of it, where of its own document it sees half on average."""
        frames = () if self.vision is None else self.vision.segments.lengths
        tokens = self.segments.lengths[:-1] if self.tail else self.segments.lengths
        squares = sum(n * n for n in tokens)
        for n, prefix in zip(tokens, self.prefix_of or (), strict=False):
            squares += 2 * n * tokens[prefix] if prefix >= 0 else 0
        return Cost(sum(n * n for n in frames), sum(frames), squares, sum(tokens))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            positions=move(self.positions),
            segments=self.segments.to(device, non_blocking),
            visual_slots=move(self.visual_slots),
            vision=None if self.vision is None else self.vision.to(device, non_blocking),
            visual_index=None if self.visual_index is None else move(self.visual_index),
        )

    def pin(self) -> PackedBatch:
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            positions=self.positions.pin_memory(),
            visual_slots=self.visual_slots.pin_memory(),
            vision=None if self.vision is None else self.vision.pin(),
            visual_index=None if self.visual_index is None else self.visual_index.pin_memory(),
        )


@dataclass(frozen=True)
class PairedBatch:
    """Images with their texts, for contrastive training: image ``i`` belongs to text segment ``i``.

    ``vision`` holds I images; ``text_ids (T,)`` int64 is their captions in one stream with I segments; ``classes (P,)``
    int64 says what is known of the patches, -1 for nothing; ``places (P, 2)`` float32 where the middle of the thing
    lies that a patch shows, as shares of the image's width and height, NaN for nothing.
    """

    vision: PackedVision
    text_ids: Tensor
    segments: Segments
    keys: tuple[str, ...]
    classes: Tensor | None = None
    places: Tensor | None = None

    def __post_init__(self) -> None:
        images = self.vision.grids.shape[0]
        if len(self.segments) != images or len(self.keys) != images or self.segments.total != self.text_ids.shape[0]:
            raise ValueError(f"{images} images, {len(self.segments)} texts, {len(self.keys)} keys")
        if self.classes is not None and len(self.classes) != self.vision.patches.shape[0]:
            raise ValueError(f"{len(self.classes)} classes for {self.vision.patches.shape[0]} patches")
        if self.places is not None and self.places.shape != (self.vision.patches.shape[0], 2):
            raise ValueError(f"places {tuple(self.places.shape)} for {self.vision.patches.shape[0]} patches")

    @property
    def num_tokens(self) -> int:
        return self.text_ids.shape[0]

    @property
    def num_patches(self) -> int:
        return self.vision.patches.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairedBatch:
        return PairedBatch(
            self.vision.to(device, non_blocking),
            self.text_ids.to(device, non_blocking=non_blocking),
            self.segments.to(device, non_blocking),
            self.keys,
            None if self.classes is None else self.classes.to(device, non_blocking=non_blocking),
            None if self.places is None else self.places.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class MaskedVision:
    """Images for distillation: ``vision``, ``masked (P,)`` bool (true where the student is blind), and the
    untouched RGB ``pixels`` (I of ``(3, height, width)`` float32 in [0, 1], of clips ``(frames, 3, height, width)``)
    that the teachers look at; ``classes (P,)`` int64 says what is known of the patches, -1 for nothing."""

    vision: PackedVision
    masked: Tensor
    pixels: tuple[Tensor, ...]
    keys: tuple[str, ...]
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        images = self.vision.grids.shape[0]
        if self.classes is not None and self.classes.shape != self.masked.shape:
            raise ValueError(f"classes {tuple(self.classes.shape)} for masked {tuple(self.masked.shape)}")
        if self.masked.shape != (self.vision.patches.shape[0],):
            raise ValueError(f"masked {tuple(self.masked.shape)} for {self.vision.patches.shape[0]} patches")
        if len(self.pixels) != images or len(self.keys) != images:
            raise ValueError(f"{images} images, {len(self.pixels)} pixel arrays, {len(self.keys)} keys")

    @property
    def num_patches(self) -> int:
        return self.vision.patches.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedVision:
        return MaskedVision(
            self.vision.to(device, non_blocking),
            self.masked.to(device, non_blocking=non_blocking),
            tuple(p.to(device, non_blocking=non_blocking) for p in self.pixels),
            self.keys,
            None if self.classes is None else self.classes.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class ModelOutput:
    """Of a pack, or of this rank's slice of it: ``hidden (T, D)`` after the final norm; ``mtp_hidden`` B of ``(T, D)``;
    ``router_load (M, E)`` float32 token counts without padding; ``balance ()`` the summed sequence-wise auxiliary loss;
    ``replayed (T, M, 2)`` float32: for each token and MoE layer of the decoder, replayed expert choices that its router
    would have made itself, and all replayed."""

    hidden: Tensor
    mtp_hidden: tuple[Tensor, ...]
    router_load: Tensor
    balance: Tensor
    replayed: Tensor

    @property
    def replay_agreement(self) -> Tensor:
        """``()``: the share of replayed choices that the routers would have made themselves; 1 without a replay."""
        agreed, recorded = self.replayed.sum((0, 1)).unbind()
        return torch.where(recorded > 0, agreed / recorded.clamp(min=1), 1.0)


class Ratio(NamedTuple):
    """A metric that reduces correctly over micro-batches and ranks: both halves are summed, then divided."""

    numerator: Tensor
    denominator: Tensor


@dataclass(frozen=True)
class StepOutput:
    """Local *sums* ``{term: ()}`` that carry gradient, and detached ``metrics {name: Ratio}``, none a view of a weight:
    sharded engines free what they gathered before anything here is read."""

    sums: Mapping[str, Tensor]
    metrics: Mapping[str, Ratio] = field(default_factory=dict)


class ParamRole(NamedTuple):
    """What the optimizer needs to know of one parameter, said by the model and never guessed from its name.

    ``role``: "encoder", "projector", "decoder", "mtp", "text", "head", ... (learning rates go by it).
    ``matrix``: a weight matrix that Muon may orthogonalise. ``splits``: sizes along the row dimension when
    several logical matrices are stacked in one (qkv, gate_up); a 3-D parameter is a batch of matrices, one of
    more dimensions a convolution's kernel. ``decay``: whether weight decay applies.
    """

    role: str
    matrix: bool
    splits: tuple[int, ...] = ()
    decay: bool = True
