"""Frames of a video, a file or its bytes, chosen by the times that they are shown at.

Nothing that the file says of its length is believed. All packets are read once without decoding, which tells the time
of every frame and from where it can be decoded; then only what is needed for the chosen frames is.
"""

from __future__ import annotations

import io
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as PILImage

from mmagent.records import MAX_PIXELS

MAX_FRAMES = 10_000_000
"""A file of more is refused: days of video, or a lie."""
_FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,flv,ogg"  # no playlists: they name other files


class VideoError(ValueError):
    """What is no video, or cannot be decoded."""


def read_frames(
    source: int | bytes | Path, choose: Callable[[np.ndarray], Sequence[int]]
) -> Iterator[tuple[float, PILImage.Image]]:
    """Second and picture of the frames that ``choose`` picks, in ascending order, from the seconds ``(F,)`` at which
    all are shown, the first at 0; turned as the video says. Of an open file, which is closed, of bytes, which are not
    copied, or of a path. Raises :class:`VideoError`, at the first frame or later."""
    av = video_library()
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        _believe(file)
        try:
            options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
            with av.open(file, options=options, metadata_errors="replace") as container:
                if not container.streams.video:
                    raise VideoError("there is no picture in it")
                yield from _read(container, choose)
        except av.FFmpegError as error:
            raise VideoError(f"cannot be decoded: {error.strerror}") from error


def shrunk(image: PILImage.Image, tokens: int) -> PILImage.Image:
    """A frame at the size in which it has at most so many visual tokens. Raises ``ValueError`` where none is."""
    from mmagent.geometry import GeometryConfig, fit  # brings torch along, which most rows of a table need not

    height, width = fit(image.height, image.width, GeometryConfig(max_tokens=tokens))
    if (height, width) == (image.height, image.width):
        return image
    return image.resize((width, height), PILImage.Resampling.BICUBIC, reducing_gap=3.0)


_HOLDS_OTHERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_BOXES = 10_000  # of an MP4 that are looked at


def _believe(file: BinaryIO) -> None:
    """Refuse an MP4 whose table of samples, told by one size for all, has more bytes than the file: an index of them
    would be made in memory, of gigabytes from a header of a kilobyte (ISO 14496-12, 8.7.3)."""
    whole = file.seek(0, os.SEEK_END)
    if whole == 0:
        raise VideoError("there is nothing in it")
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
                raise VideoError(f"tells of {count} samples of {each} bytes, and has {whole} bytes itself")
        if size == 1 and len(head) >= 16:  # a long box has its size behind its kind
            size = struct.unpack(">Q", head[8:16])[0]
        if size < 8:
            break
        at += size
    file.seek(0)


def video_library() -> ModuleType:
    """PyAV. Raises :class:`VideoError` where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise VideoError("needs the library av: pip install av") from error
    av.logging.set_level(av.logging.PANIC)  # what is wrong comes as an exception
    return av


def _read(container: Any, choose: Callable[[np.ndarray], Sequence[int]]) -> Iterator[tuple[float, PILImage.Image]]:
    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # the processes are many already
    width, height = stream.codec_context.width, stream.codec_context.height
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise VideoError(f"frames of {width}x{height} pixels, the limit is {MAX_PIXELS}")
    shown, keys = _times(container, stream)
    seconds = (shown - shown[0]) * float(stream.time_base)
    if not np.isfinite(seconds[-1]):
        raise VideoError("its frames have no times")
    chosen = choose(seconds)
    found = 0
    for found, frame in enumerate(_decode(container, stream, [int(shown[n]) for n in chosen], keys), 1):
        image = frame.to_image()
        turned = getattr(frame, "rotation", 0) % 360
        if turned in (90, 180, 270):
            image = image.rotate(turned, expand=True)
        yield float(seconds[chosen[found - 1]]), image
    if found != len(chosen):
        raise VideoError(f"{found} of {len(chosen)} frames can be decoded")


def _times(container: Any, stream: Any) -> tuple[np.ndarray, list[int]]:
    """When every frame is shown, in units of the stream, and the times of those that decoding can begin with."""
    times: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        at = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or at is None:
            continue
        if len(times) >= MAX_FRAMES:
            raise VideoError(f"more than {MAX_FRAMES} frames")
        times.append(at)
        if packet.is_keyframe:
            keys.append(at)
    if not times:
        raise VideoError("there is no frame in it")
    return np.unique(np.array(times, np.int64)), sorted(keys)


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
