"""Conversations as the chat API writes them, read into messages, and messages written back.

A message is a dictionary with ``role`` and ``content``, a text or a list of parts, as OpenAI's API and transformers'
templates take them; an assistant may have ``reasoning_content`` and ``tool_calls``. What is malformed is refused with
the number of the message and the field, never mended. The ids of what is read are those that the exported chat
template writes for the same dictionaries, answers of tools in the order of their calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmagent.chat import (
    Box,
    Image,
    Message,
    Part,
    Text,
    Thinking,
    Tool,
    ToolCall,
    Video,
    argument_text,
    require_text,
)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "observation",
    "observation": "observation",
}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_COMMON = ("role", "content", "name", "id")
_FIELDS = {
    "system": _COMMON,
    "user": _COMMON,
    "assistant": (*_COMMON, *_THOUGHTS, "tool_calls", "trainable"),
    "observation": (*_COMMON, "tool_call_id"),
}
_IMAGES, _VIDEOS = ("image", "image_url"), ("video", "video_url")
_PICTURES = (*_IMAGES, *_VIDEOS, "url", "path", "base64")


@dataclass(frozen=True)
class Conversation:
    """``pictures`` has one entry for every image and every frame, in order of appearance: whatever the part carried
    (pixels, a path, an address), or None where it carried nothing."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    pictures: tuple[Any, ...] = ()


def read_conversation(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    open_thoughts: bool = True,
) -> Conversation:
    """Messages, tools and pictures of a conversation of the chat API.

    Roles are system (or developer), user, assistant and tool (or observation). Parts are texts (``{"type": "text"}``,
    or a bare string), an assistant's final answer (``box``, with ``text``), images (``image``, ``image_url``) and
    videos (``video``, ``video_url``), which need the ``timestamps`` of their frames in seconds, and may bring a list
    with a picture for each. Arguments of calls are an object or its JSON. A thought left in the assistant's text, where
    no field holds one, is told from it (:func:`told_apart`); a text that may as well only name the mark ``</think>`` is
    read as if its thought had been open before it, as servers send one, or refused without ``open_thoughts``. An
    assistant's ``trainable`` false keeps its turn out of the loss. The chat format has no ids of calls, so answers of
    tools that name theirs (``tool_call_id``) are put into the order of the calls, and all calls with an id must then be
    answered before someone else speaks.

    Raises ``ValueError`` naming message and field.
    """
    reader = _Reader(open_thoughts)
    for n, message in enumerate(messages):
        reader.read(n, message)
    if not reader.turns:
        raise ValueError("messages: a conversation needs at least one")
    reader.sort_answers()
    pictures = tuple(picture for turn in reader.turns for picture in turn.pictures)
    return Conversation(tuple(turn.message for turn in reader.turns), read_tools(tools), pictures)


def told_apart(text: str, open_thoughts: bool = True) -> tuple[str, str] | None:
    """The thought and the answer of an assistant's text; None where all of it is the answer.

    A thought begins with the text, by ``<think>`` (after blanks), and ends with the first ``</think>``. Without
    ``<think>`` anywhere it may have been open before the text, as the newer template begins an answer and servers send
    it: then ``</think>`` stands once, or first. With more of it before, the marks are only talked about, and stay.
    Raises ``ValueError`` for the open one without ``open_thoughts``.
    """
    begun = text.lstrip()
    if begun.startswith("<think>"):
        thought, end, answer = begun.removeprefix("<think>").partition("</think>")
        return (thought, answer) if end else None
    if "<think>" in text or not (text.count("</think>") == 1 or begun.startswith("</think>")):
        return None
    if not open_thoughts:
        raise ValueError(
            "</think> without <think>: what is before it may be a thought, or talk of the mark; begin a thought with "
            "<think>, or put it into reasoning_content (empty: there is none, and the mark is text)"
        )
    thought, _, answer = text.partition("</think>")
    return thought, answer


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Declarations as the chat API takes them. Raises ``ValueError`` naming the one that is none."""
    read = []
    for n, tool in enumerate(tools or ()):
        try:
            read.append(Tool(argument_text(tool)))
        except ValueError as error:
            raise ValueError(f"tools[{n}]: {error}") from error
        if read[-1].name in [other.name for other in read[:-1]]:
            raise ValueError(f"tools[{n}]: {read[-1].name!r} is declared already")
    return tuple(read)


def write_message(message: Message) -> dict[str, Any]:
    """A message as the chat API takes it: the opposite of :func:`read_conversation`, but for the pictures.

    Argument values stay the texts they are.
    """
    content = [_write_part(part) for part in message.parts if not isinstance(part, Thinking | ToolCall)]
    out: dict[str, Any] = {"role": "tool" if message.role == "observation" else message.role, "content": content}
    if message.role == "assistant":
        text = "\n".join(part["text"] for part in content)
        if all(part["type"] == "text" for part in content):
            out["content"] = text if content or len(message.parts) == 0 else None
        thoughts = [part.text for part in message.parts if isinstance(part, Thinking)]
        if thoughts or "</think>" in text:  # which would be taken for the end of one
            out["reasoning_content"] = "\n".join(thoughts)
        if calls := [part for part in message.parts if isinstance(part, ToolCall)]:
            out["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in calls
            ]
        if not message.trainable:
            out["trainable"] = False
    return out


def _write_part(part: Part) -> dict[str, Any]:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Box(text):
            return {"type": "box", "text": text}
        case Video(timestamps):
            return {"type": "video", "timestamps": list(timestamps)}
        case _:
            return {"type": "image"}


@dataclass(frozen=True)
class _Turn:
    message: Message
    pictures: tuple[Any, ...]


class _Reader:
    """Reads messages one after the other: answers of tools must follow calls, pictures are collected."""

    def __init__(self, open_thoughts: bool) -> None:
        self._open_thoughts = open_thoughts
        self.turns: list[_Turn] = []
        self.pictures: list[Any] = []  # of the message that is read
        self._called = False  # whether the turn before is a call, or an answer to one
        self._ids: list[str] = []  # of its calls
        self._answers: list[str] = []  # what the answers so far, the last turns, name of these

    def read(self, n: int, message: Mapping[str, Any]) -> None:
        self.pictures = []
        read = self.message(n, message)
        self.turns.append(_Turn(read, tuple(self.pictures)))

    def sort_answers(self) -> None:
        """Answers that name their calls into the order of the calls."""
        if any(self._answers):
            count = len(self._answers)
            order = sorted(range(count), key=lambda n: self._ids.index(self._answers[n]))
            self.turns[-count:] = [self.turns[n - count] for n in order]
        self._answers = []

    def _end_answers(self, where: str) -> None:
        open_ids = [name for name in self._ids if name not in self._answers]
        if self._called and (not self._answers or (open_ids and any(self._answers))):
            told = f": {', '.join(open_ids)}" if open_ids else ""
            raise ValueError(f"{where}: role: a tool must first answer the calls before it{told}")
        self.sort_answers()
        self._called, self._ids = False, []

    def _answer(self, where: str, name: Any) -> None:
        if not self._called:
            raise ValueError(f"{where}: role: an answer of a tool must follow a call")
        if not isinstance(name, str):
            raise ValueError(f"{where}: tool_call_id: must be text, got {type(name).__name__}")
        name = name if self._ids else ""  # where calls have no ids, those of answers say nothing
        if name and name not in self._ids:
            raise ValueError(f"{where}: tool_call_id: {name!r} is the id of no call it follows")
        if self._ids.count(name) > 1:
            raise ValueError(f"{where}: tool_call_id: {name!r} is the id of two calls")
        if name and name in self._answers:
            raise ValueError(f"{where}: tool_call_id: {name!r} has been answered already")
        if self._answers and bool(name) != bool(self._answers[-1]):
            raise ValueError(f"{where}: tool_call_id: some answers to these calls have one, some have none")
        self._answers.append(name)

    def message(self, n: int, message: Mapping[str, Any]) -> Message:
        where = f"message {n}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: must be an object, got {type(message).__name__}")
        if not isinstance(message.get("role"), str) or message["role"] not in _ROLES:
            raise ValueError(f"{where}: role {message.get('role')!r} is none of {', '.join(_ROLES)}")
        role = _ROLES[message["role"]]
        said = {name: value for name, value in message.items() if value is not None}
        if strange := [name for name, value in said.items() if name not in _FIELDS[role] and value not in ("", [], {})]:
            raise ValueError(f"{where}: {strange[0]}: is no field of a message of role {message['role']}")
        if role == "observation":
            self._answer(where, said.get("tool_call_id", ""))
        else:
            self._end_answers(where)
        if role == "assistant":
            return self._assistant(where, said)
        if "content" not in said:
            raise ValueError(f"{where}: content: is missing")
        parts = self._parts(where, said["content"], role)
        if not parts:
            raise ValueError(f"{where}: content: is empty")
        return Message(role, parts)

    def _assistant(self, where: str, said: Mapping[str, Any]) -> Message:
        thoughts = [said[name] for name in _THOUGHTS if name in said]
        calls = said.get("tool_calls", [])
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise ValueError(f"{where}: tool_calls: must be a list, got {type(calls).__name__}")
        parts = list(self._parts(where, said.get("content", []), "assistant"))
        if not (thoughts or calls) and said.get("content") in (None, []):
            raise ValueError(f"{where}: content: is missing, and nothing is called or thought")
        if thoughts and not isinstance(thoughts[0], str):
            raise ValueError(f"{where}: reasoning_content: must be text, got {type(thoughts[0]).__name__}")
        if not isinstance(said.get("trainable", True), bool):
            raise ValueError(f"{where}: trainable: must be true or false, got {said['trainable']!r}")
        thought = thoughts[0] if thoughts else ""
        if not thoughts and (told := self._told_apart(where, parts)):
            thought, parts = told[0], [Text(told[1])]
        require_text(f"{where}: reasoning_content", thought)
        self._called = bool(calls)
        spoken: list[Part] = [Thinking(thought)] if thought else []
        spoken += parts
        spoken += [self._call(f"{where}: tool_calls[{n}]", call) for n, call in enumerate(calls)]
        return Message("assistant", tuple(spoken), said.get("trainable", True))

    def _told_apart(self, where: str, parts: Sequence[Any]) -> tuple[str, str] | None:
        try:
            told = told_apart("\n".join(part.text for part in parts), self._open_thoughts)
        except ValueError as error:
            raise ValueError(f"{where}: content: {error}") from error
        if told and any(isinstance(part, Box) for part in parts):
            raise ValueError(f"{where}: content: a box beside a thought in the text; name reasoning_content")
        return told

    def _call(self, where: str, call: Any) -> ToolCall:
        if not isinstance(call, Mapping):
            raise ValueError(f"{where}: must be an object, got {type(call).__name__}")
        if call.get("type", "function") != "function":
            raise ValueError(f"{where}: type: {call['type']!r} is not function")
        name = call.get("id") or ""
        if not isinstance(name, str):
            raise ValueError(f"{where}: id: must be text, got {type(name).__name__}")
        self._ids += [name] if name else []
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: function: must be an object with a name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments, object_pairs_hook=_object)
                json.dumps(arguments)  # also goes as deep
            except RecursionError as error:
                raise ValueError(f"{where}: arguments: lists and objects stand too deep in one another") from error
            except ValueError as error:
                raise ValueError(f"{where}: arguments: are no JSON: {error}") from error
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{where}: arguments: must be an object, got {type(arguments).__name__}")
        require_text(f"{where}: name", function["name"])
        try:
            return ToolCall(function["name"], {key: argument_text(value) for key, value in arguments.items()})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _parts(self, where: str, content: Any, role: str) -> tuple[Part, ...]:
        if isinstance(content, str):
            return (Text(require_text(f"{where}: content", content)),)
        if not isinstance(content, Sequence):
            raise ValueError(f"{where}: content: must be text or a list of parts, got {type(content).__name__}")
        return tuple(self._part(f"{where}: content[{n}]", part, role) for n, part in enumerate(content))

    def _part(self, where: str, part: Any, role: str) -> Part:
        if isinstance(part, str):
            return Text(require_text(where, part))
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: must be text or an object, got {type(part).__name__}")
        kind = part.get("type")
        if kind not in ("text", "box", *_IMAGES, *_VIDEOS):
            raise ValueError(f"{where}: type: {kind!r} is none of text, box, {', '.join((*_IMAGES, *_VIDEOS))}")
        if kind in ("text", "box") and not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: text: must be text, got {type(part.get('text')).__name__}")
        if kind in ("text", "box"):
            require_text(f"{where}: text", part["text"])
        if kind == "text":
            return Text(part["text"])
        if (kind == "box") != (role == "assistant") or role == "system":
            raise ValueError(f"{where}: {kind} in a message of role {role}")
        if kind == "box":
            return Box(part["text"])
        picture = next((part[name] for name in _PICTURES if part.get(name) is not None), None)
        if kind in _IMAGES:
            self.pictures.append(picture.get("url") if isinstance(picture, Mapping) else picture)
            return Image()
        return self._video(where, part.get("timestamps"), picture)

    def _video(self, where: str, timestamps: Any, frames: Any) -> Video:
        seconds = list(timestamps) if isinstance(timestamps, Sequence) and not isinstance(timestamps, str) else []
        if not seconds or any(isinstance(t, bool) or not isinstance(t, int | float) for t in seconds):
            raise ValueError(f"{where}: timestamps: a video needs the seconds of its frames, got {timestamps!r}")
        if not all(math.isfinite(t) and t >= 0 for t in seconds):
            raise ValueError(f"{where}: timestamps: seconds are finite and not below 0, got {timestamps!r}")
        if frames is not None and (not isinstance(frames, Sequence) or len(frames) != len(seconds)):
            raise ValueError(f"{where}: a video must be a list of {len(seconds)} pictures, one for each timestamp")
        self.pictures += [None] * len(seconds) if frames is None else list(frames)
        return Video(tuple(float(t) for t in seconds))


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that says everything once."""
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is said twice")
    return read
