"""Frames of a video, a file or its bytes, sampled by the clock and held within a budget of visual tokens.

Nothing that the file says of its length is believed. All packets are read once without decoding, which tells the time
of every frame and from where it can be decoded; then only what is needed for the chosen frames is.
"""

from __future__ import annotations

import io
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as PILImage

from data_pipelines.ingest.files import RefusedError
from mmagent.records import MAX_PIXELS, EncodedImage

EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "ogv")
MAX_FRAMES = 10_000_000
"""A file of more is refused: days of video, or a lie."""
_FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,flv,ogg"  # no playlists: they name other files
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
    av = _library()
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        _believe(file)
        try:
            options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
            with av.open(file, options=options, metadata_errors="replace") as container:
                if not container.streams.video:
                    raise RefusedError("video", "there is no picture in it")
                return _sample(av, container, config)
        except av.FFmpegError as error:
            raise RefusedError("video", f"cannot be decoded: {error.strerror}") from error


_HOLDS_OTHERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_BOXES = 10_000  # of an MP4 that are looked at


def _believe(file: BinaryIO) -> None:
    """Refuse an MP4 whose table of samples, told by one size for all, has more bytes than the file: an index of them
    would be made in memory, of gigabytes from a header of a kilobyte (ISO 14496-12, 8.7.3)."""
    whole = file.seek(0, os.SEEK_END)
    at = 0
    for _ in range(_BOXES):
        file.seek(at)
        head = file.read(20)
        if len(head) < 8:
            break
        size, kind = struct.unpack(">I4s", head[:8])
        if kind in _HOLDS_OTHERS:
            at += 8
            continue
        if kind == b"stsz" and len(head) == 20:
            each, count = struct.unpack(">II", head[12:])
            if each * count > whole:
                raise RefusedError("video", f"tells of {count} samples of {each} bytes, and has {whole} bytes itself")
        if size == 1 and len(head) >= 16:  # a long box has its size behind its kind
            size = struct.unpack(">Q", head[8:16])[0]
        if size < 8:
            break
        at += size
    file.seek(0)


def _library() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise RefusedError("video", "needs the library av: pip install 'mmagent[ingest]'") from error
    av.logging.set_level(av.logging.PANIC)  # what is wrong comes as an exception
    return av


def _sample(av: ModuleType, container: Any, config: VideoConfig) -> Clip:
    from mmagent.geometry import frames_within  # brings torch along, which most rows need not

    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # the processes are many already
    width, height = stream.codec_context.width, stream.codec_context.height
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise RefusedError("video", f"frames of {width}x{height} pixels, the limit is {MAX_PIXELS}")
    shown, keys = _times(container, stream)
    seconds = (shown - shown[0]) * float(stream.time_base)
    if not np.isfinite(seconds[-1]):
        raise RefusedError("video", "its frames have no times")
    chosen = _chosen(seconds, config.rate)
    tokens, kept = frames_within(len(chosen), config.tokens)
    wanted = [int(shown[chosen[n]]) for n in kept]
    frames = [_encode(frame, tokens) for frame in _decode(container, stream, wanted, keys)]
    if len(frames) != len(wanted):
        raise RefusedError("video", f"{len(frames)} of {len(wanted)} frames can be decoded")
    return Clip(tuple(round(float(seconds[chosen[n]]), 3) for n in kept), tuple(frames))


def _times(container: Any, stream: Any) -> tuple[np.ndarray, list[int]]:
    """When every frame is shown, in units of the stream, and the times of those that decoding can begin with."""
    times: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        at = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or at is None:
            continue
        if len(times) >= MAX_FRAMES:
            raise RefusedError("video", f"more than {MAX_FRAMES} frames")
        times.append(at)
        if packet.is_keyframe:
            keys.append(at)
    if not times:
        raise RefusedError("video", "there is no frame in it")
    return np.unique(np.array(times, np.int64)), sorted(keys)


def _chosen(seconds: np.ndarray, rate: float) -> list[int]:
    """Which frames are on screen at 0, 1/rate, 2/rate, ... seconds, each once, however long it is."""
    first_tick = np.ceil(seconds * rate - 1e-6)
    gone = np.append(seconds[1:] * rate - 1e-6, seconds[-1] * rate + 1e-6)
    return [int(n) for n in np.flatnonzero(first_tick <= gone)]


def _decode(container: Any, stream: Any, wanted: list[int], keys: list[int]) -> Iterator[Any]:
    """The frames shown at the times ``wanted``, in their order; where it is shorter, those in between are skipped."""
    container.seek(keys[0] if keys else wanted[0], stream=stream)
    decoded = container.decode(stream)
    last = None
    for before, target in pairwise([None, *wanted]):
        key = keys[max(bisect_right(keys, target) - 1, 0)] if keys else None
        if key is not None and before is not None and key > before:
            container.seek(key, stream=stream)
            decoded = container.decode(stream)
            last = None
        while last is None or last.pts is None or last.pts < target:
            last = next(decoded, None)
            if last is None:
                return
        yield last


def _encode(frame: Any, tokens: int) -> EncodedImage:
    from mmagent.geometry import GeometryConfig, fit

    image = frame.to_image()
    turned = getattr(frame, "rotation", 0) % 360
    if turned in (90, 180, 270):
        image = image.rotate(turned, expand=True)
    geometry = GeometryConfig()
    try:
        height, width = fit(image.height, image.width, replace(geometry, max_tokens=tokens))
    except ValueError as error:
        raise RefusedError("video", str(error)) from error
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), PILImage.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return EncodedImage(buffer.getvalue(), "jpg")
