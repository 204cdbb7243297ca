"""The record on disk: one webdataset sample, its validator, and the guard that decodes its images.

A sample is ``KEY.json`` with images ``KEY.0.png``, ``KEY.1.jpg``, ... in order of appearance; a key may have
folders, as webdataset allows. The JSON holds

``source``   the mixture component (required)
``messages`` a conversation, ``[{"role": ..., "content": [part, ...]}, ...]``, or
``parts``    an interleaved document, ``[part, ...]`` (exactly one of the two)
``tools``    what the assistant of a conversation may call: declarations as the chat API takes them (optional)
``task``, ``answer``   what was asked, and the answer a verifier needs (optional)
``boxes``    ``[{"image": 0, "box": [x1, y1, x2, y2], "label": "..."}]`` in pixels of the image (optional); a label
             is what stands there and, in quotes, what is written on it: ``button "OK"``
``points``   ``[{"image": 0, "point": [x, y], "label": "..."}]`` (optional)

A part is ``{"type": "text", "text": ...}``, ``{"type": "image"}``, ``{"type": "video", "timestamps": [...]}``,
``{"type": "thinking", "text": ...}``, ``{"type": "box", "text": ...}`` (a final answer) or ``{"type": "tool_call",
"name": ..., "arguments": {...}}``.
"""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from mmagent.chat import Box, Image, Message, Part, Text, Thinking, Tool, ToolCall, Video, argument_text
from mmagent.messages import read_tools

MAX_PIXELS = 64_000_000
"""Images above this are refused before they are decoded (a decompression bomb costs memory, not disk)."""
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif")
MAX_SCANS = 100
"""A JPEG of more scans is refused: a progressive one has about ten, and decoding takes time for each of them over the
whole image, however few bytes it has."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What is decoded, and nothing else, whatever the bytes look like: some formats run programs."""
_MOVING = ("PNG", "WEBP", "GIF")  # may hold animations; a second picture in a JPEG is a preview or a depth map
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NUMBER = re.compile(r"[0-9]{1,18}")  # of an image; a name may have more digits than can be read
warnings.simplefilter("ignore", PILImage.DecompressionBombWarning, append=True)  # _open refuses what it warns of
_KEY = re.compile(r"(?:[^/\\\0\n]+/)*[^./\\\0\n]+")
_UNREADABLE = (  # what Pillow raises for bytes that are no image, or no longer one
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    PILImage.DecompressionBombError,
    PILImage.DecompressionBombWarning,  # where warnings are errors
)


class RecordError(ValueError):
    """A sample that cannot be used. The message starts with its key and names the field."""

    def __init__(self, key: str, field: str, problem: str):
        super().__init__(f"{key}: {field}: {problem}")
        self.key, self.field, self.problem = key, field, problem

    def __reduce__(self) -> tuple[type[RecordError], tuple[str | int, ...]]:
        return type(self), (self.key, self.field, self.problem)


@dataclass(frozen=True)
class EncodedImage:
    """An image as it lies on disk: ``data`` and its file ``extension``."""

    data: bytes
    extension: str


@dataclass(frozen=True)
class Region:
    """A labelled box ``(x1, y1, x2, y2)`` or point ``(x, y)`` in pixels of image number ``image``."""

    image: int
    coordinates: tuple[float, ...]
    label: str = ""


@dataclass(frozen=True)
class Record:
    """One training sample. Exactly one of ``messages`` and ``parts`` is filled."""

    key: str
    source: str
    messages: tuple[Message, ...] = ()
    parts: tuple[Part, ...] = ()
    images: tuple[EncodedImage, ...] = ()
    task: str = ""
    answer: str = ""
    boxes: tuple[Region, ...] = ()
    points: tuple[Region, ...] = ()
    tools: tuple[Tool, ...] = ()


def decode_image(data: bytes, key: str, field: str = "image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """``(height, width, 3)`` uint8 from encoded bytes: EXIF rotation applied, alpha laid over white.

    Raises :class:`RecordError` for what is no image, is truncated, moves, or has more than ``max_pixels``.
    """
    try:
        image = _open(data, key, field, max_pixels)
        image.load()
        if _orientation(image, data) != 1:  # it copies what it does not turn
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white instead of scaling them
            image = PILImage.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except RecordError:
        raise
    except _UNREADABLE as error:
        raise RecordError(key, field, _why(data, error)) from error


def check_image(data: bytes, key: str, field: str = "image", *, decode: bool = True) -> EncodedImage:
    """Encoded bytes that :func:`decode_image` takes, with the extension that their content has, whatever the file was
    called; ``decode`` false looks at the header only. Raises :class:`RecordError` as :func:`decode_image` does."""
    try:
        image = _open(data, key, field)
        if decode:
            image.load()
        _orientation(image, data)  # whoever reads the image asks for it
    except RecordError:
        raise
    except _UNREADABLE as error:
        raise RecordError(key, field, _why(data, error)) from error
    kind = "jpeg" if image.format == "MPO" else str(image.format).lower()
    return EncodedImage(data, "jpg" if kind == "jpeg" else kind)


def decode_map(data: bytes, key: str, field: str = "map", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """``(height, width)`` uint8 or uint16: the values of a grey image, or the numbers of the colours of one with a
    palette, which is how maps of classes and of distances are kept.

    Raises :class:`RecordError` for what is no such image, is truncated, or has more than ``max_pixels``.
    """
    try:
        image = _open(data, key, field, max_pixels)
        values = np.asarray(image)
    except RecordError:
        raise
    except _UNREADABLE as error:
        raise RecordError(key, field, _why(data, error)) from error
    if image.mode in ("1", "L", "P"):
        return values.astype(np.uint8)
    if image.mode.startswith("I") and 0 <= int(values.min()) <= int(values.max()) <= np.iinfo(np.uint16).max:
        return values.astype(np.uint16)
    raise RecordError(key, field, f"a map is a grey image of 8 or 16 bits or one with a palette, got {image.mode}")


def _open(data: bytes, key: str, field: str, max_pixels: int = MAX_PIXELS) -> PILImage.Image:
    """The image by its header, refused where its pixels would be too many, or too slow to decode, or too much for one
    picture: the first frame of an animation is not what was shown, so that no frame is taken silently."""
    image = PILImage.open(io.BytesIO(data), formats=FORMATS)  # what it warns of max_pixels refuses
    if image.width * image.height > max_pixels:
        raise RecordError(key, field, f"{image.width}x{image.height} pixels exceed the limit of {max_pixels}")
    if image.format in _MOVING and getattr(image, "is_animated", False):
        raise RecordError(key, field, "is an animation; an image is one picture, and frames are those of a video")
    if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise RecordError(key, field, f"a JPEG of {scans} scans exceeds the limit of {MAX_SCANS}")
    return image


def _why(data: bytes, error: Exception) -> str:
    """What is wrong with an image, in words that do not change from run to run."""
    if not data:
        return "cannot decode image: it has no bytes"
    if isinstance(error, PILImage.DecompressionBombError):  # Pillow's own limit, some times ours
        return f"too many pixels to be opened exceed the limit of {MAX_PIXELS}"
    if not isinstance(error, UnidentifiedImageError):
        return f"cannot decode image: {error}"
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    marks = {b"<svg": "SVG", b"<?xml": "SVG or XML", b"<": "HTML", b"%pdf": "PDF", b"ii*\0": "TIFF", b"mm\0*": "TIFF"}
    found = next((name for mark, name in marks.items() if start.startswith(mark)), "")
    found = found or ("HEIF or AVIF" if start[4:8] == b"ftyp" else "")
    hint = f"; it looks like {found}" if found else ""
    return f"cannot decode image: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}{hint}"


def encode_image(pixels: np.ndarray) -> EncodedImage:
    """``(height, width, 3)`` uint8 to PNG, compressed lightly: shards are written once and read often."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return EncodedImage(buffer.getvalue(), "png")


def image_size(image: EncodedImage, key: str, field: str = "image", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """``(height, width)`` after EXIF rotation, from the header alone. Raises :class:`RecordError` for what its header
    shows to be unusable (:func:`decode_image`)."""
    if (size := _size_of_plain_png(image.data)) is not None and size[0] * size[1] <= max_pixels:
        return size
    try:
        opened = _open(image.data, key, field, max_pixels)
        sideways = _orientation(opened, image.data) in (5, 6, 7, 8)
    except RecordError:
        raise
    except _UNREADABLE as error:
        raise RecordError(key, field, _why(image.data, error)) from error
    return (opened.width, opened.height) if sideways else (opened.height, opened.width)


def _orientation(image: PILImage.Image, data: bytes) -> int:
    """By its EXIF. Of a PNG Pillow would decode all pixels to find one that may follow them: only where one can be."""
    if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type" not in data:
        return 1
    found = image.getexif().get(0x0112)
    return found if isinstance(found, int) and found in range(2, 9) else 1  # what is no orientation turns nothing


def _size_of_plain_png(data: bytes) -> tuple[int, int] | None:
    """``(height, width)`` of a PNG that has nothing to be looked into, in a tenth of Pillow's time; None for the rest:
    what is animated, turned, too large or damaged."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or any(mark in data for mark in (b"acTL", b"eXIf", b"Raw profile type")):
        return None
    length, kind, width, height, _, checksum = struct.unpack(">I4sII5sI", data[8:33].ljust(25, b"\0"))
    whole = (length, kind) == (13, b"IHDR") and zlib.crc32(data[12:29]) == checksum
    return (height, width) if whole and 0 < width * height <= MAX_PIXELS else None


def validate(record: Record, *, headers: bool = True) -> Record:
    """Check everything that can be known without decoding pixels, and return the record.

    ``headers`` false looks at image headers only where boxes or points need them: a reader that is about to use the
    images finds out anyway. Raises :class:`RecordError` naming key and field.
    """
    key = record.key
    if not _KEY.fullmatch(key) or ".." in key.split("/"):
        raise RecordError(key or "<no key>", "key", "must be a name without dots and newlines, at most below folders")
    if not key.isascii():
        _check_unicode(key)
    if not record.source:
        raise RecordError(key, "source", "is empty")
    if bool(record.messages) == bool(record.parts):
        raise RecordError(key, "messages", "exactly one of messages and parts must be filled")
    if record.tools and record.parts:
        raise RecordError(key, "tools", "belong to messages")
    parts = record.parts or tuple(part for message in record.messages for part in message.parts)
    if record.parts and (odd := [type(p).__name__ for p in parts if isinstance(p, Thinking | Box | ToolCall)]):
        raise RecordError(key, "parts", f"{odd[0]} belongs in messages")
    clips = [part.timestamps for part in parts if isinstance(part, Video)]
    if any(not clip or not all(np.isfinite(clip)) for clip in clips):
        raise RecordError(key, "timestamps", "a video needs at least one, and all finite")
    wanted = sum(1 for part in parts if isinstance(part, Image | Video))
    wanted += sum(len(part.timestamps) - 1 for part in parts if isinstance(part, Video))
    if wanted != len(record.images):
        raise RecordError(key, "images", f"{wanted} places for images, {len(record.images)} images")
    headers = headers or bool(record.boxes or record.points)
    sizes = [image_size(image, key, f"images[{n}]") for n, image in enumerate(record.images) if headers]
    for name, regions, numbers in (("boxes", record.boxes, 4), ("points", record.points, 2)):
        for n, region in enumerate(regions):
            _check_region(key, f"{name}[{n}]", region, numbers, sizes)
    return record


def _check_unicode(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise RecordError(ascii(key)[1:-1], "key", "is no UTF-8") from error


def _check_region(key: str, field: str, region: Region, numbers: int, sizes: list[tuple[int, int]]) -> None:
    if not 0 <= region.image < len(sizes):
        raise RecordError(key, field, f"image {region.image} of {len(sizes)}")
    if len(region.coordinates) != numbers or not all(np.isfinite(region.coordinates)):
        raise RecordError(key, field, f"needs {numbers} finite numbers, got {region.coordinates}")
    height, width = sizes[region.image]
    xs, ys = region.coordinates[0::2], region.coordinates[1::2]
    if min(xs) < 0 or min(ys) < 0 or max(xs) > width or max(ys) > height:
        raise RecordError(key, field, f"{region.coordinates} lies outside the {width}x{height} image")
    if numbers == 4 and (xs[0] >= xs[1] or ys[0] >= ys[1]):
        raise RecordError(key, field, f"{region.coordinates} is empty or inverted")


def to_sample(record: Record, *, headers: bool = True) -> dict[str, Any]:
    """A webdataset sample: ``__key__``, ``json`` and ``N.extension`` entries. Validates first; ``headers`` false trusts
    images that were looked at already, where no box needs their size."""
    validate(record, headers=headers)
    body: dict[str, Any] = {"source": record.source}
    if record.messages:
        body["messages"] = [
            {"role": m.role, "content": [_part_to_json(p) for p in m.parts]}
            | ({} if m.trainable else {"trainable": False})
            for m in record.messages
        ]
    else:
        body["parts"] = [_part_to_json(p) for p in record.parts]
    if record.tools:
        body["tools"] = [json.loads(tool.declaration) for tool in record.tools]
    for name in ("task", "answer"):
        if getattr(record, name):
            body[name] = getattr(record, name)
    for name, noun in (("boxes", "box"), ("points", "point")):
        if getattr(record, name):
            body[name] = [
                {"image": r.image, noun: list(r.coordinates), "label": r.label} for r in getattr(record, name)
            ]
    sample: dict[str, Any] = {"__key__": record.key, "json": _encode_json(body, record.key)}
    for n, image in enumerate(record.images):
        sample[f"{n}.{image.extension}"] = image.data
    return sample


def from_sample(sample: Mapping[str, Any]) -> Record:
    """Parse and validate one webdataset sample, image headers only where boxes or points need them.

    Raises :class:`RecordError`.
    """
    key = str(sample.get("__key__", ""))
    if "json" not in sample:
        raise RecordError(key, "json", "is missing")
    try:
        body = json.loads(sample["json"])
    except RecursionError as error:
        raise RecordError(key, "json", "does not parse: lists and objects stand too deep in one another") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise RecordError(key, "json", f"does not parse: {error}") from error
    if not isinstance(body, dict):
        raise RecordError(key, "json", f"must be an object, got {type(body).__name__}")
    if _ESCAPED_SURROGATE.search(sample["json"]):
        _encode_json(body, key)
    unknown = set(body) - {"source", "messages", "parts", "tools", "task", "answer", "boxes", "points"}
    if unknown:
        raise RecordError(key, sorted(unknown)[0], "is no field of a record")
    try:
        messages = tuple(
            Message(m["role"], tuple(_part_from_json(p) for p in _content(m["content"])), _flag(m, "trainable"))
            for m in body.get("messages", ())
        )
        parts = tuple(_part_from_json(p) for p in body.get("parts", ()))
        boxes = tuple(
            Region(_integer(r["image"]), _numbers(r["box"]), _written(r, "label")) for r in body.get("boxes", ())
        )
        points = tuple(
            Region(_integer(r["image"]), _numbers(r["point"]), _written(r, "label")) for r in body.get("points", ())
        )
        tools = read_tools(body.get("tools"))
        source, task, answer = (_written(body, name) for name in ("source", "task", "answer"))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:  # a float of a number too long
        raise RecordError(key, "json", f"{type(error).__name__}: {error}") from error
    images = _images(sample, key)
    return validate(
        Record(key, source, messages, parts, images, task, answer, boxes, points, tools),
        headers=False,
    )


def _images(sample: Mapping[str, Any], key: str) -> tuple[EncodedImage, ...]:
    found: dict[int, EncodedImage] = {}
    for name, data in sample.items():
        number, _, extension = name.partition(".")
        if _NUMBER.fullmatch(number) and extension.lower() in IMAGE_EXTENSIONS:
            if int(number) in found:
                raise RecordError(key, "images", f"two images have the number {int(number)}")
            found[int(number)] = EncodedImage(data, extension.lower())
    if sorted(found) != list(range(len(found))):
        raise RecordError(key, "images", f"numbered {sorted(found)}, expected 0..{len(found) - 1}")
    return tuple(found[n] for n in range(len(found)))


def _encode_json(body: Any, key: str) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(key, "json", f"holds half of a surrogate pair: {error}") from error


def _flag(message: Mapping[str, Any], name: str) -> bool:
    if not isinstance(message.get(name, True), bool):
        raise ValueError(f"{name} must be true or false, got {message[name]!r}")
    return message.get(name, True)


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"image must be an integer, got {value!r}")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    if isinstance(values, str):  # whose digits would be numbers
        raise ValueError(f"must be a list of numbers, got {values[:100]!r}")
    return tuple(map(float, values))


def _written(body: Mapping[str, Any], name: str) -> str:
    """A text, or a number as text; "" where it is missing or null, which as text would be "None"."""
    value = body.get(name)
    if not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    return "" if value is None else str(value)


def _content(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part_to_json(part: Part) -> dict[str, Any]:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Image():
            return {"type": "image"}
        case Video(timestamps):
            return {"type": "video", "timestamps": list(timestamps)}
        case Thinking(text):
            return {"type": "thinking", "text": text}
        case Box(text):
            return {"type": "box", "text": text}
        case ToolCall(name, arguments):
            return {"type": "tool_call", "name": name, "arguments": dict(arguments)}


def _part_from_json(part: Any) -> Part:
    if not isinstance(part, dict):
        raise ValueError(f"a part must be an object, got {type(part).__name__}")
    match part.get("type"):
        case "text":
            return Text(_text(part, "text"))
        case "image":
            return Image()
        case "video":
            return Video(_numbers(part["timestamps"]))
        case "thinking":
            return Thinking(_text(part, "text"))
        case "box":
            return Box(_text(part, "text"))
        case "tool_call":
            return ToolCall(_text(part, "name"), {k: argument_text(v) for k, v in part["arguments"].items()})
    raise ValueError(f"part type {part.get('type')!r} is none of text, image, video, thinking, box, tool_call")


def _text(part: Mapping[str, Any], name: str) -> str:
    if not isinstance(part.get(name), str):
        raise ValueError(f"part {part.get('type')!r}: {name} must be text, got {type(part.get(name)).__name__}")
    return part[name]
