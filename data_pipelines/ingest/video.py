"""Frames of a video, a file or its bytes, sampled by the clock and held within a budget of visual tokens
(:mod:`mmagent.videos` decodes them)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from data_pipelines.ingest.files import RefusedError
from mmagent.records import EncodedImage
from mmagent.videos import VideoError, read_frames, shrunk

EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "ogv")
_QUALITY = 92  # of the JPEGs that frames are kept as


@dataclass
class VideoConfig:
    """``rate`` frames a second are sampled: 1 by default, 2 where the order of events matters, 5 for motion; ``tokens``
    is the budget of a whole video (:func:`~mmagent.geometry.frames_within`)."""

    rate: float = 1.0
    tokens: int = 16384

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 100:
            raise ValueError(f"video rate {self.rate} must lie in (0, 100] frames a second")
        if self.tokens < 128:
            raise ValueError(f"{self.tokens} visual tokens hold not one frame, which has 128 at least")


@dataclass(frozen=True)
class Clip:
    """``frames`` and the second at which each was shown."""

    timestamps: tuple[float, ...]
    frames: tuple[EncodedImage, ...]


def sample_video(source: int | bytes, config: VideoConfig) -> Clip:
    """The clip of a video: of an open file, which is closed, or of its bytes, which are not copied. Raises
    :class:`RefusedError`."""
    tokens = 0

    def choose(seconds: np.ndarray) -> Sequence[int]:
        nonlocal tokens
        from mmagent.geometry import frames_within  # brings torch along, which most rows need not

        chosen = _chosen(seconds, config.rate)
        tokens, kept = frames_within(len(chosen), config.tokens)
        return [chosen[n] for n in kept]

    try:
        read = [(round(second, 3), _encode(image, tokens)) for second, image in read_frames(source, choose)]
    except VideoError as error:
        raise RefusedError("video", str(error)) from error
    return Clip(tuple(second for second, _ in read), tuple(frame for _, frame in read))


def _chosen(seconds: np.ndarray, rate: float) -> list[int]:
    """Which frames are on screen at 0, 1/rate, 2/rate, ... seconds, each once, however long it is."""
    first_tick = np.ceil(seconds * rate - 1e-6)
    gone = np.append(seconds[1:] * rate - 1e-6, seconds[-1] * rate + 1e-6)
    return [int(n) for n in np.flatnonzero(first_tick <= gone)]


def _encode(image: PILImage.Image, tokens: int) -> EncodedImage:
    try:
        image = shrunk(image, tokens)
    except ValueError as error:
        raise RefusedError("video", str(error)) from error
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return EncodedImage(buffer.getvalue(), "jpg")
