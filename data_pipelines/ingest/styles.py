"""How a row is read as a record: the styles in which data sets come, recognised by their columns.

``messages``      ``messages`` of OpenAI's chat API, with ``tools``; images inside, or in a column ``images``
``llava``         ``conversations`` of ``from`` and ``value``, ``<image>`` or ``<video>`` in the text, ``image`` beside
``sharegpt``      the same without images; ``system`` and ``tools`` beside
``qwen``          either of the two with the marks of Qwen-VL: ``<img>``, places in ``<ref>`` and ``<box>``, ``bbox_2d``
``captions``      an image or a video, and a text about it
``pairs``         a question and its answer, with or without images
``interleaved``   lists ``texts`` and ``images`` of one length, None in one where the other has something
``text``          a text
``record``        the library's own samples (:mod:`mmagent.records`)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipelines.ingest.files import MAX_RECORD, Pictures, RefusedError
from data_pipelines.ingest.inputs import RECORD, Row, parse_json
from data_pipelines.ingest.video import EXTENSIONS as VIDEO_EXTENSIONS
from data_pipelines.ingest.video import Clip, VideoConfig, sample_video
from mmagent.chat import Image, Message, Part, Text, Video, assistant, check_order, require_text, user
from mmagent.messages import read_conversation
from mmagent.records import EncodedImage, Record, Region, from_sample, image_size

STYLES = ("messages", "llava", "sharegpt", "qwen", "captions", "pairs", "interleaved", "text", "record")
_IMAGE = ("image", "images", "file_name", "img", "picture", "image_path", "img_path", "file")
_VIDEO = ("video", "videos", "video_path", *VIDEO_EXTENSIONS)
_TEXT = ("texts", "captions", "text", "caption", "content", "alt_text")
_QUESTION = ("question", "prompt", "instruction", "query", "problem")
_ANSWER = ("answer", "answers", "response", "completion", "output", "solution")
_TURNS = ("messages", "conversations", "conversation")
OPTIONAL = ("id", "input", "system", "system_prompt", "tools", "functions", "boxes")
"""Names of columns that a row may do without."""
NAMES = (*_TURNS, *_QUESTION, *_ANSWER, *_IMAGE, *_VIDEO, *_TEXT, *OPTIONAL)
"""What columns are called, and other ones can be (:attr:`StyleConfig.columns`)."""
_TAG = re.compile(r"(\n?<(?:image|video)>\n?)")
_IMG = re.compile(r"<img>(.*?)</img>", re.S)
_MARKS = re.compile(r"<(?:ref|box|quad|img)>|<\|(?:object_ref|box|quad)_start\|>")
_JSON = re.compile(r'"(?:bbox|point)_2d"\s*:')
_SIZES = {"resized_height": None, "resized_width": None, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
"""What a part may say of how large its image is to be, and what the published code takes where nothing is said."""
_MOST = 10_000  # turns, parts or texts of a row
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bard", "bing"), "assistant"),
    "system": "system",
    "function_call": "call",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


@dataclass
class StyleConfig:
    """``style``: one of :data:`STYLES`. ``source`` is the mixture component. ``prompt``: what is asked of captioned
    images, videos and pages; without one they become documents, the image and then the text. ``columns`` calls columns
    by other names: ``{"text": "alt"}`` reads ``alt`` as ``text``. ``rename`` gives the library's own samples the new
    ``source``, too; else they keep theirs. ``decode`` looks at every image's pixels, not only at
    its header. ``coordinates``: what ``bbox_2d`` is in, of :data:`~data_pipelines.ingest.grounding.COORDINATES`."""

    style: str
    source: str
    prompt: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    decode: bool = True
    rename: bool = False
    coordinates: str = ""
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass(frozen=True)
class Read:
    """The records of a row, and its columns that none of them holds."""

    records: tuple[Record, ...]
    aside: tuple[str, ...]


def recognise(row: Row, columns: Mapping[str, str]) -> str:
    """The style of a row by its columns, or "" for none."""
    cells = _renamed(row.cells, columns)
    if RECORD in cells:
        return "record"
    turns = next((_list(cells[name]) for name in _TURNS if cells.get(name) is not None), None)
    if turns and isinstance(turns[0], Mapping):
        marked = any(
            _MARKS.search(text) or _JSON.search(text)
            for turn in turns[:20]
            if isinstance(turn, Mapping)
            for text in _said(turn)
        )
        if marked:
            return "qwen"
        if "role" in turns[0]:
            return "messages"
        pictures = any(_has(cells, names) for names in (_IMAGE, _VIDEO))
        return ("llava" if pictures else "sharegpt") if "from" in turns[0] else ""
    texts, images = cells.get("texts"), cells.get("images")
    if isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images) and None in texts + images:
        return "interleaved"
    if _has(cells, _QUESTION) and _has(cells, _ANSWER):
        return "pairs"
    if _has(cells, _IMAGE) or _has(cells, _VIDEO):
        return "captions"
    return "text" if _has(cells, _TEXT) else ""


def _said(turn: Mapping[str, Any]) -> Iterator[str]:
    said = turn.get("value", turn.get("content"))
    for part in said if isinstance(said, list) else [said]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            yield text


def read_row(row: Row, config: StyleConfig) -> Read:
    """Raises :class:`RefusedError`, :class:`~mmagent.records.RecordError` or ``ValueError`` that names a field."""
    reader = _Reader(row, config, _renamed(row.cells, config.columns))
    records = reader.records()
    return Read(records, tuple(name for name in row.cells if reader.is_aside(name)))


def _renamed(cells: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    return (
        cells
        if not columns
        else {**cells, **{to: cells[name] for to, name in columns.items() if cells.get(name) is not None}}
    )


def _has(cells: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(cells.get(name) not in (None, "", []) for name in names)


def _list(value: Any) -> list[Any]:
    """A list, also where a column holds it as JSON, or one thing instead of it."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = parse_json(value)
    out = list(value) if isinstance(value, list | tuple) else [value]
    if len(out) > _MOST:
        raise RefusedError("row", f"a list of {len(out)}, the limit is {_MOST}")
    return out


class _Reader:
    """Reads one row; notes which of its columns were used."""

    def __init__(self, row: Row, config: StyleConfig, cells: Mapping[str, Any]):
        self.row, self.config, self.cells = row, config, cells
        self.pictures = Pictures(row.key, row.root, config.decode)
        self._used: set[str] = set()
        self._sized = False  # an image by the row itself

    def is_aside(self, name: str) -> bool:
        return not name.startswith("\0") and name not in self._used and self.row.cells[name] is not None

    def take(self, *names: str, reason: str = "") -> Any:
        """The first of these columns that has something in it; None, or a refusal for ``reason``, without."""
        for name in names:
            if self.cells.get(name) not in (None, "", []):
                self._used |= {name, self.config.columns.get(name, name)}
                return self.cells[name]
        if reason:
            raise RefusedError(reason, f"none of the columns {', '.join(names)} has anything in it")
        return None

    def records(self) -> tuple[Record, ...]:
        read = {
            "record": self._own,
            "captions": self._captions,
            "pairs": self._pairs,
            "interleaved": self._interleaved,
            "text": self._text,
        }.get(self.config.style, self._conversation)
        return read()

    # ------------------------------------------------------------------------------------------ single texts

    def _own(self) -> tuple[Record, ...]:
        record = from_sample({**self.take(RECORD, reason="json"), "__key__": self.row.key})
        images = tuple(self.pictures(image.data, n) for n, image in enumerate(record.images))
        source = self.config.source if self.config.rename else record.source
        return (replace(record, images=images, source=source),)

    def _text(self) -> tuple[Record, ...]:
        return (self._record(parts=(Text(self._string(self.take(*_TEXT, reason="text"), "text")),)),)

    def _captions(self) -> tuple[Record, ...]:
        """A record for each text about the image."""
        parts, images = self._seen()
        if not _has(self.cells, _TEXT):
            raise RefusedError("text", self._uncaptioned())
        texts = [self._string(text, "text").strip() for text in _plain_list(self.take(*_TEXT, reason="text"))]
        if not any(texts):
            raise RefusedError("text", "is empty")
        boxes = tuple(self.take("boxes") or ()) if isinstance(self.cells.get("image"), EncodedImage) else ()
        said = [text for text in texts if text]
        return tuple(
            self._about(parts, images, text, f"#{n}" if len(said) > 1 else "", boxes) for n, text in enumerate(said, 1)
        )

    def _uncaptioned(self) -> str:
        """What to do about an image without a text, which ``--prompt`` cannot replace."""
        if isinstance(self.cells.get("image"), EncodedImage):
            return "the page has no text layer (a scan?): run OCR first, as ocrmypdf; --prompt only adds a question"
        if self.row.where in [ascii(file)[1:-1] for file in self.cells.values()]:  # of a folder, nothing beside it
            return "no caption: put one into NAME.txt or NAME.json beside it, or a table; --prompt only adds a question"
        if {*_TEXT, self.config.columns.get("text")} & self.row.cells.keys():
            return "is empty"
        return f"no caption in {', '.join(_TEXT)}: call its column text with --column text=COLUMN"

    def _about(
        self, parts: list[Part], images: list[EncodedImage], text: str, number: str, boxes: tuple[Region, ...]
    ) -> Record:
        if not self.config.prompt:
            return self._record(number, parts=(*parts, Text(text)), images=tuple(images), boxes=boxes)
        talk = (user(*parts, self.config.prompt), assistant(text))
        return self._record(number, messages=talk, images=tuple(images), boxes=boxes)

    def _pairs(self) -> tuple[Record, ...]:
        question = self._string(self.take(*_QUESTION, reason="question"), "question")
        if more := self.take("input"):
            question += "\n" + self._string(more, "input")
        answer = self._string(_plain_list(self.take(*_ANSWER, reason="answer"))[0], "answer")
        parts, images = self._seen() if _has(self.cells, (*_IMAGE, *_VIDEO)) else ([], [])
        question = _TAG.sub("", question) if parts else question
        told = [Message("system", (Text(self._string(s, "system")),)) for s in [self.take("system")] if s]
        talk = (*told, user(*parts, question), assistant(answer))
        return (self._record(messages=talk, images=tuple(images)),)

    def _interleaved(self) -> tuple[Record, ...]:
        texts, images = self.take("texts", reason="texts"), self.take("images", reason="images")
        if not (isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images)):
            raise RefusedError("texts", "texts and images must be lists of one length")
        parts: list[Part] = []
        found: list[EncodedImage] = []
        for text, image in zip(_list(texts), images, strict=True):
            if (text is None) == (image is None):
                raise RefusedError("texts", "either a text or an image must stand at every place")
            if image is not None:
                found.append(self.pictures(image, len(found)))
            parts.append(Image() if text is None else Text(self._string(text, "texts")))
        return (self._record(parts=tuple(parts), images=tuple(found)),)

    def _seen(self) -> tuple[list[Part], list[EncodedImage]]:
        """The images and videos that a row has columns for."""
        parts: list[Part] = []
        images: list[EncodedImage] = []
        for value in _plain_list(self.take(*_IMAGE)):
            images.append(self.pictures(value, len(images)))
            parts.append(Image())
        for value in _plain_list(self.take(*_VIDEO)):
            clip = self._clip(value)
            images += clip.frames
            parts.append(Video(clip.timestamps))
        if not parts:
            raise RefusedError("images", "there is neither an image nor a video")
        return parts, images

    def _clip(self, value: Any, rate: float | None = None) -> Clip:
        if isinstance(value, Mapping):
            value = next((value[name] for name in ("bytes", "path", "url") if value.get(name)), None)
        if not isinstance(value, str | bytes):
            raise RefusedError("video", f"a video must be the path of a file or its bytes, got {type(value).__name__}")
        if isinstance(value, bytes) and len(value) > MAX_RECORD:
            raise RefusedError(
                "video", f"{len(value)} bytes within a row, the limit is {MAX_RECORD}; name it as a file"
            )
        video = self.config.video if rate is None else replace(self.config.video, rate=rate)
        return sample_video(value if isinstance(value, bytes) else self.row.root.open(value), video)

    # ------------------------------------------------------------------------------------------ conversations

    def _conversation(self) -> tuple[Record, ...]:
        turns = _list(self.take(*_TURNS, reason="messages"))
        seen = _plain_list(self.take(*_IMAGE))
        clips = _plain_list(self.take(*_VIDEO))
        tags = self.config.style == "llava" or bool(seen or clips)
        messages = [self._turn(n, turn, tags, clips) for n, turn in enumerate(turns)]
        if told := self.take("system", "system_prompt"):
            if any(message.get("role") == "system" for message in messages):
                raise RefusedError("system", "stands in a column and in a message")
            messages.insert(0, {"role": "system", "content": self._string(told, "system")})
        if clips:
            raise RefusedError("video", f"{len(clips)} more videos than places for them")
        tools = self.take("tools", "functions")
        declared = parse_json(tools) if isinstance(tools, str) else tools
        if declared is not None and not isinstance(declared, list):
            raise RefusedError("tools", f"must be a list, got {type(declared).__name__}")
        read = read_conversation(messages, declared, open_thoughts=False)
        places = sum(picture is None for picture in read.pictures)
        if places != len(seen):
            raise RefusedError("images", f"{len(seen)} images for {places} places")
        rest = iter(seen)
        values = [next(rest) if picture is None else picture for picture in read.pictures]
        images = [self.pictures(value, n) for n, value in enumerate(values)]
        talk, boxes, points = read.messages, (), ()
        if self.config.style == "qwen":
            talk, boxes, points = self._grounded(talk, images)
        check_order(talk)
        if not any(message.role == "assistant" and message.trainable for message in talk):
            raise RefusedError("messages", "nothing to train on: no assistant turn, or none that is trainable")
        return (self._record(messages=talk, images=tuple(images), tools=read.tools, boxes=boxes, points=points),)

    def _turn(self, n: int, turn: Any, tags: bool, clips: list[Any]) -> dict[str, Any]:
        """A turn as :func:`~mmagent.messages.read_conversation` takes it, with its videos decoded."""
        if not isinstance(turn, Mapping):
            raise RefusedError("messages", f"message {n}: must be an object, got {type(turn).__name__}")
        message = dict(turn) if "role" in turn else self._spoken(n, turn)
        if message.pop("weight", 1) == 0:
            message["trainable"] = False
        if "function_call" in message:
            message["tool_calls"] = [{"function": message.pop("function_call")}]
        if message.get("role") == "function":
            message["role"] = "tool"
        content = message.get("content")
        if isinstance(content, str) and message.get("role") in ("user", "tool", "observation"):
            message["content"] = self._pieces(content, tags)
        if isinstance(message.get("content"), list):
            message["content"] = [self._part(part, clips) for part in _list(message["content"])]
        return message

    def _spoken(self, n: int, turn: Mapping[str, Any]) -> dict[str, Any]:
        who, said = _SPEAKERS.get(str(turn.get("from")).lower()), turn.get("value")
        if who is None:
            raise RefusedError("messages", f"message {n}: from {turn.get('from')!r} is none of {', '.join(_SPEAKERS)}")
        if not isinstance(said, str):
            raise RefusedError("messages", f"message {n}: value must be text, got {type(said).__name__}")
        more = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        if who != "call":
            return {"role": who, "content": said, **more}
        calls = parse_json(said)
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **more}

    def _pieces(self, text: str, tags: bool) -> str | list[dict[str, Any]]:
        """A text with its places for images and videos as parts of their own; the line they stand on goes with them."""
        pieces = _TAG.split(text) if tags else [text]
        out: list[dict[str, Any]] = []
        for piece in pieces:
            if tags and _TAG.fullmatch(piece):
                out.append({"type": piece.strip("\n<>")})
            elif self.config.style == "qwen":
                for n, inner in enumerate(_IMG.split(piece)):
                    out += [{"type": "image", "image": inner.strip()}] if n % 2 else _text_part(inner)
            else:
                out += _text_part(piece)
        return out if len(out) != 1 or "text" not in out[0] else text

    def _part(self, part: Any, clips: list[Any]) -> Any:
        if not isinstance(part, Mapping) or part.get("type", "text") not in ("video", "video_url"):
            inner = part.get("image") if isinstance(part, Mapping) else None
            if isinstance(part, Mapping):
                self._sized |= any(part.get(name, usual) != usual for name, usual in _SIZES.items())
            if isinstance(inner, Mapping) and not inner.get("url"):  # as tables keep images
                return {**part, "image": inner.get("bytes") or inner.get("path")}
            return part
        value = part.get("video", part.get("video_url"))
        if isinstance(value, list | tuple):  # frames, as a list of pictures
            rate = _number(part.get("sample_fps", part.get("fps")), self.config.video.rate)
            times = part.get("timestamps") or [round(n / rate, 3) for n in range(len(value))]
            return {"type": "video", "video": value, "timestamps": times}
        if value is None and not clips:
            raise RefusedError("video", "a place for a video, and no video")
        rate = part.get("fps")
        clip = self._clip(clips.pop(0) if value is None else value, None if rate is None else _number(rate, 1.0))
        return {"type": "video", "video": list(clip.frames), "timestamps": list(clip.timestamps)}

    def _grounded(
        self, messages: Sequence[Message], images: Sequence[EncodedImage]
    ) -> tuple[tuple[Message, ...], tuple[Region, ...], tuple[Region, ...]]:
        """Places read: each is about the image before it."""
        from data_pipelines.ingest.grounding import read_json, read_marks  # brings torch along

        shown, size = 0, None
        boxes: list[Region] = []
        points: list[Region] = []
        out = []
        for message in messages:
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, Image):
                    shown, size = shown + 1, image_size(images[shown], self.row.key, f"images[{shown}]")
                elif isinstance(part, Video):
                    shown, size = shown + len(part.timestamps), None
                elif isinstance(part, Text) and _MARKS.search(part.text):
                    read = read_marks(part.text, shown - 1, size)
                    if not shown:
                        raise RefusedError("boxes", "a place before the first image")
                    boxes += read.boxes
                    part = Text(read.text)
                if isinstance(part, Text) and _JSON.search(part.text):
                    if self._sized and self.config.coordinates == "pixels":
                        raise RefusedError("boxes", "pixels of an image whose size the row sets: not the published one")
                    read = read_json(part.text, shown - 1, size, self.config.coordinates, message.role == "assistant")
                    if not shown and read.text != part.text:
                        raise RefusedError("boxes", "a place before the first image")
                    boxes += read.boxes
                    points += read.points
                    part = Text(read.text)
                parts.append(part)
            out.append(replace(message, parts=tuple(parts)))
        return tuple(out), tuple(boxes), tuple(points)

    # ------------------------------------------------------------------------------------------ records

    def _record(self, number: str = "", **content: Any) -> Record:
        return Record(self.row.key + number, self.config.source, **content)

    def _string(self, value: Any, name: str) -> str:
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise RefusedError(name, f"is no UTF-8 (byte {error.start})") from error
        if not isinstance(value, str):
            raise RefusedError(name, f"must be text, got {type(value).__name__}")
        return require_text(name, value)


def _plain_list(value: Any) -> list[Any]:
    """A value, or those of a list; none for None. Text is one value, whatever it looks like."""
    if value is None:
        return []
    return _list(value) if isinstance(value, list | tuple) else [value]


def _text_part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _number(value: Any, otherwise: float) -> float:
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 100:
        raise RefusedError("video", f"fps must be a number in (0, 100], got {value!r}")
    return float(value)
