"""Sizes, patches and coordinates of images: the one place that decides how many tokens an image costs.

Data, packer, encoder, rollouts and evaluation all call :func:`fit` and :func:`patchify`, so an image has
one size everywhere. Coordinates of actions and boxes live in one frame, thousandths of the image
(integers 0..999), and :class:`ImageView` owns every conversion between it and pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mmagent.types import PatchedImage

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHITE_MEAN = (1.0, 1.0, 1.0)
"""Makes white, of which screens are mostly made, zero."""
FRAME = 1000
"""Coordinates of actions and boxes are integers in ``[0, FRAME)``, relative to the image."""


_LAST = FRAME - 0.001
"""The last exact point of the frame."""
FRAME_TOKENS = (640, 512, 384, 256, 160, 128)
"""Visual tokens that a frame of a video may have, as published for Seed1.5-VL (arXiv 2505.07062)."""


@dataclass
class GeometryConfig:
    """How images become patches. Defaults are those of the GLM-4.5V / GLM-OCR family.

    ``mean`` and ``std`` of a channel, in [0, 1]: a training from scratch learns soonest where what most patches show
    becomes zero, so :data:`WHITE_MEAN` suits screens.
    """

    patch_size: int = 14
    temporal_patch: int = 2
    merge_size: int = 2
    min_tokens: int = 16
    max_tokens: int = 8000
    max_aspect: float = 200.0
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if min(self.patch_size, self.temporal_patch, self.merge_size, self.min_tokens) < 1:
            raise ValueError(f"geometry: every size must be at least 1, got {self}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"geometry: mean and std are three values each, std positive; got {self.mean}, {self.std}")
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"geometry: max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")

    @property
    def unit(self) -> int:
        """Pixels on a side of one visual token."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """C, the values of one patch."""
        return 3 * self.temporal_patch * self.patch_size**2

    def within(self, patches: int) -> GeometryConfig:
        """The same, for images of at most ``patches`` patches (or one token, where even that is more)."""
        most = max(patches // self.merge_size**2, 1)
        return replace(self, max_tokens=most, min_tokens=min(self.min_tokens, most))


@dataclass(frozen=True)
class ImageView:
    """An image as it was (``original``) and as the model sees it (``seen``), both ``(height, width)`` pixels.

    Points are ``(x, y)``. A point of the model's frame is two integers in 0..999.
    """

    original: tuple[int, int]
    seen: tuple[int, int]

    def to_frame(self, x: float, y: float) -> tuple[int, int]:
        """Original pixels to thousandths, clamped to the image: the cell that holds the point."""
        height, width = self.original
        return _clamp(math.floor(x / width * FRAME)), _clamp(math.floor(y / height * FRAME))

    def from_frame(self, x: float, y: float) -> tuple[float, float]:
        """Thousandths to original pixels. Integers name a cell and give its centre, so that the round trip is exact;
        a float is the point itself."""
        if not (0 <= x < FRAME and 0 <= y < FRAME):
            raise ValueError(f"point ({x}, {y}) is outside the frame 0..{FRAME - 1}")
        height, width = self.original
        x, y = (value + 0.5 if isinstance(value, Integral) else value for value in (x, y))
        return x / FRAME * width, y / FRAME * height

    def box_to_frame(self, box: Sequence[float]) -> tuple[int, int, int, int]:
        """``(x1, y1, x2, y2)`` in original pixels to thousandths."""
        x1, y1, x2, y2 = box
        return (*self.to_frame(x1, y1), *self.to_frame(x2, y2))

    def to_seen(self, x: float, y: float) -> tuple[float, float]:
        """Original pixels to pixels of the resized image."""
        return x / self.original[1] * self.seen[1], y / self.original[0] * self.seen[0]

    def from_seen(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of the resized image to original pixels (for foreign models that answer in them)."""
        return x / self.seen[1] * self.original[1], y / self.seen[0] * self.original[0]

    def seen_to_frame(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of the resized image to an exact point of the frame, unrounded (for foreign models). The far edges
        belong to the image; ``ValueError`` for what lies beyond."""
        height, width = self.seen
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"point ({x:g}, {y:g}) is outside the image of {width}x{height} pixels")
        return min(x / width * FRAME, _LAST), min(y / height * FRAME, _LAST)


def _clamp(value: int) -> int:
    return min(max(value, 0), FRAME - 1)


def fit(height: int, width: int, config: GeometryConfig) -> tuple[int, int]:
    """The size an image is resized to: sides multiples of ``config.unit``, aspect kept, token count within
    ``[min_tokens, max_tokens]``, enlarged only to reach the minimum.

    Raises ``ValueError`` for an empty image or an aspect ratio above ``config.max_aspect``.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image of {width}x{height} pixels is empty")
    aspect = max(height, width) / min(height, width)
    if aspect > config.max_aspect:
        raise ValueError(f"image of {width}x{height} pixels: aspect ratio {aspect:.0f} exceeds {config.max_aspect:.0f}")
    unit = config.unit
    rows, cols = max(round(height / unit), 1), max(round(width / unit), 1)
    if rows * cols > config.max_tokens:
        shrink = math.sqrt(config.max_tokens * unit * unit / (height * width))
        rows, cols = max(math.floor(height * shrink / unit), 1), max(math.floor(width * shrink / unit), 1)
        rows, cols = min(rows, config.max_tokens), min(cols, config.max_tokens)  # a side was lifted to one token
    elif rows * cols < config.min_tokens:
        grow = math.sqrt(config.min_tokens * unit * unit / (height * width))
        rows, cols = max(math.ceil(height * grow / unit), 1), max(math.ceil(width * grow / unit), 1)
    while rows * cols > config.max_tokens:  # lifting one side to a token can leave the product too large
        rows, cols = (rows - 1, cols) if rows >= cols else (rows, cols - 1)
    return rows * unit, cols * unit


def image_grid(height: int, width: int, config: GeometryConfig, frames: int = 1) -> tuple[int, int, int]:
    """The ``(frames, rows, cols)`` of patches that :func:`patchify` makes of an image of this size, known from its
    header alone. ``frames`` counts the frames of a clip; a still image is one."""
    seen_height, seen_width = fit(height, width, config)
    return -(-frames // config.temporal_patch), seen_height // config.patch_size, seen_width // config.patch_size


def visual_tokens(grid: Sequence[int], merge_size: int) -> int:
    """Tokens that the language model sees for one image of ``grid (frames, rows, cols)`` patches."""
    frames, rows, cols = grid
    if rows % merge_size or cols % merge_size:
        raise ValueError(f"grid {tuple(grid)} is not a multiple of merge size {merge_size}")
    return frames * (rows // merge_size) * (cols // merge_size)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, antialiased resize of one ``(h, w, 3)`` uint8 image: what the processors of the released family do to
    the bit, and three to six times faster than the same filter in Pillow (which differs in rounding)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def frames_within(frames: int, budget: int) -> tuple[int, list[int]]:
    """How a video of ``frames`` sampled frames keeps within ``budget`` visual tokens: the most tokens a frame may have,
    and which frames are kept.

    The tokens are the largest of :data:`FRAME_TOKENS` with which all frames fit; where none does, the smallest, for as
    many frames as then fit, evenly spaced from the first to the last. Raises ``ValueError`` where not one frame fits.
    """
    if frames < 1 or budget < FRAME_TOKENS[-1]:
        raise ValueError(f"{frames} frames in {budget} visual tokens: a frame needs {FRAME_TOKENS[-1]}")
    for tokens in FRAME_TOKENS:
        if frames * tokens <= budget:
            return tokens, list(range(frames))
    kept = budget // FRAME_TOKENS[-1]
    if kept == 1:
        return FRAME_TOKENS[-1], [0]
    return FRAME_TOKENS[-1], [(n * (frames - 1) + (kept - 1) // 2) // (kept - 1) for n in range(kept)]


def patchify(
    image: np.ndarray | Sequence[np.ndarray], config: GeometryConfig, into: Tensor | None = None
) -> PatchedImage:
    """Resize, normalise and cut one image, or a clip of frames of equal size, into patches.

    ``image`` is ``(height, width, 3)`` uint8, or a sequence of such frames. A still image is repeated in
    time to fill ``temporal_patch``; so is the last frame of a clip whose length is no multiple of it.
    Values inside a patch are ordered (channel, time, row, column), rows of patches merge-block-major.
    ``into (p, C)``: where they are written, float32 and contiguous, on the host; else into new memory.
    """
    from mmagent.types import PatchedImage  # types.py names ImageView; importing it at the top would be a cycle

    frames = [image] if isinstance(image, np.ndarray) else list(image)
    if not frames:
        raise ValueError("image: a clip must have at least one frame")
    for frame in frames:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or frame.shape != frames[0].shape:
            raise ValueError(
                f"image must be (height, width, 3) uint8, all frames alike; got {frame.shape} {frame.dtype}"
            )
    original = (frames[0].shape[0], frames[0].shape[1])
    seen = fit(*original, config)
    seen_frames = [resize(frame, *seen) for frame in frames]
    groups = -(-len(frames) // config.temporal_patch)
    seen_frames += [seen_frames[-1]] * (groups * config.temporal_patch - len(frames))
    grid = (groups, seen[0] // config.patch_size, seen[1] // config.patch_size)
    into = torch.empty(math.prod(grid), config.patch_values) if into is None else into
    if into.shape != (math.prod(grid), config.patch_values):
        raise ValueError(f"into is {tuple(into.shape)}, the image has {math.prod(grid)} patches")
    _cut(seen_frames, config, into.numpy())
    return PatchedImage(into, grid, ImageView(original, seen))


def _cut(frames: Sequence[np.ndarray], config: GeometryConfig, into: np.ndarray) -> None:
    """Fills ``into (p, C)`` float32 from frames of one size: :func:`to_patches` of :func:`normalise`, bit for bit, but
    bytes are moved before they become floats, and the 256 values of a channel are normalised once (five times
    faster)."""
    t, p, m = config.temporal_patch, config.patch_size, config.merge_size
    height, width = frames[0].shape[:2]
    patches = into.view()
    patches.shape = (len(frames) // t, height // (p * m), width // (p * m), m, m, 3, t, p, p)  # never a copy
    before = None
    for n, frame in enumerate(frames):
        part = patches[n // t, ..., n % t, :, :]
        if frame is before and n % t:  # a still image, or the end of a clip: its last frame again
            part[...] = patches[n // t, ..., n % t - 1, :, :]
            continue
        blocks = frame.reshape(height // (p * m), m, p, width // (p * m), m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        blocks = np.ascontiguousarray(blocks)
        for channel, table in enumerate(_normalised(tuple(config.mean), tuple(config.std))):
            part[..., channel, :, :] = np.take(table, blocks[..., channel, :, :])
        before = frame


@cache
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """``(3, 256)`` float32: what :func:`normalise` makes of every value of every channel."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 3)
    return normalise(values, mean, std)[0, :, 0].numpy()


def normalise(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """``(F, height, width, 3)`` uint8 to ``(F, 3, height, width)`` float32."""
    scaled = pixels.permute(0, 3, 1, 2).float() / 255.0
    return (scaled - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def to_patches(pixels: Tensor, config: GeometryConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """``(F, 3, height, width)`` with F a multiple of ``temporal_patch`` to ``(p, C)`` and the grid."""
    count, channels, height, width = pixels.shape
    t, p, m = config.temporal_patch, config.patch_size, config.merge_size
    grid = (count // t, height // p, width // p)
    blocks = pixels.reshape(grid[0], t, channels, grid[1] // m, m, p, grid[2] // m, m, p)
    #        frames t c block-rows m p block-cols m p  ->  frames block-rows block-cols m m | c t p p
    blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(math.prod(grid), channels * t * p * p).contiguous(), grid


def from_patches(patches: Tensor, grid: tuple[int, int, int], config: GeometryConfig) -> Tensor:
    """Inverse of :func:`to_patches`: ``(p, C)`` back to ``(F, 3, height, width)``."""
    t, p, m = config.temporal_patch, config.patch_size, config.merge_size
    frames, rows, cols = grid
    blocks = patches.reshape(frames, rows // m, cols // m, m, m, 3, t, p, p).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return blocks.reshape(frames * t, 3, rows * p, cols * p)


def unpatchify(image: PatchedImage, config: GeometryConfig) -> np.ndarray:
    """The first frame of ``image`` as the encoder sees it, ``(height, width, 3)`` uint8: exact, but for the resize
    that came before."""
    frame = from_patches(image.patches.float().cpu(), image.grid, config)[0]
    pixels = frame * torch.tensor(config.std).view(3, 1, 1) + torch.tensor(config.mean).view(3, 1, 1)
    return (pixels * 255.0).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def patch_coordinates(grid: Sequence[int], merge_size: int) -> Tensor:
    """``(p, 2)`` int64: row and column of every patch of one image, in the stream's merge-block-major order."""
    frames, rows, cols = (int(n) for n in grid)
    m = merge_size
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    both = torch.stack([row, col], dim=-1).reshape(rows // m, m, cols // m, m, 2).permute(0, 2, 1, 3, 4)
    return both.reshape(-1, 2).repeat(frames, 1)


def patch_labels(mask: np.ndarray, grid: Sequence[int], merge_size: int) -> Tensor:
    """The commonest class of a ``(height, width)`` map of classes 0, 1, ... under every patch of a still image, the
    lowest of equals, in the stream's order: ``(p,)`` int64. Pixels below 0 are of no class; -1 where all are."""
    _, rows, cols = grid
    row = np.repeat(np.arange(rows), np.diff(np.linspace(0, mask.shape[0], rows + 1).round().astype(int)))
    col = np.repeat(np.arange(cols), np.diff(np.linspace(0, mask.shape[1], cols + 1).round().astype(int)))
    classes = max(int(mask.max()) + 1, 1)
    cell = (((row * cols)[:, None] + col) * classes + mask)[mask >= 0]
    counts = np.bincount(cell, minlength=rows * cols * classes).reshape(rows, cols, classes)
    commonest = np.where(counts.any(axis=2), counts.argmax(axis=2), -1)
    at = patch_coordinates(grid, merge_size)
    return torch.from_numpy(commonest)[at[:, 0], at[:, 1]]


def document_positions(is_image: Tensor, grids: Sequence[Sequence[int]], merge_size: int) -> Tensor:
    """``(3, L)`` int64 rotary positions (time, row, column) of one document, as the GLM-4.5V family counts them.

    Text advances all three by one; an image starts at the next position, spans ``(frame, row, col)``
    offsets of its merged grid, and text goes on after the largest of them.

    ``is_image (L,)`` bool marks visual slots; ``grids`` are the images' patch grids in order.
    """
    flags = is_image.cpu().numpy()
    total = len(flags)
    out = np.empty((3, total), np.int64)
    borders = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), total] if total else []
    position = image = 0
    for at, end in pairwise(borders):
        if not flags[at]:
            out[:, at:end] = np.arange(position, position + end - at)
            position += end - at
        while flags[at] and at < end:  # images without text between them share a run of slots
            if image >= len(grids):
                raise ValueError(f"visual slots for more images than the {len(grids)} given")
            frames, rows, cols = grids[image][0], grids[image][1] // merge_size, grids[image][2] // merge_size
            past = at + frames * rows * cols
            if past > end:
                raise ValueError(
                    f"image {image} needs {frames * rows * cols} visual slots from token {at}, found {end - at}"
                )
            out[0, at:past] = np.repeat(np.arange(position, position + frames), rows * cols)
            out[1, at:past] = np.tile(np.repeat(np.arange(position, position + rows), cols), frames)
            out[2, at:past] = np.tile(np.arange(position, position + cols), frames * rows)
            position += max(frames, rows, cols)
            image, at = image + 1, past
            if at == end:
                break
    if image != len(grids):
        raise ValueError(f"{len(grids)} images, but visual slots for {image}")
    return torch.from_numpy(out)
