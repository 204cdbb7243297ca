"""What a sampled completion says: its thoughts, its text and its calls, read from ids and not from a text.

Marks are recognised by their ids, so a mark that is merely spelled in an answer is a part of the answer. A completion
that does not follow the format is never mended: what is wrong with it is said, and a broken call is no call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmagent.chat import (
    JSON,
    Box,
    ChatConfig,
    Message,
    Part,
    Text,
    Thinking,
    Tool,
    ToolCall,
    json_text,
    parse_json,
    require_text,
    spoken_parts,
)
from mmagent.vocab import STOP_TOKENS, Vocab

BOX_MARKS = ("<|begin_of_box|>", "<|end_of_box|>")


@dataclass(frozen=True)
class Reply:
    """One completion, read. ``thinking`` is "" where there was none; ``said`` is what follows it; ``stop`` is the token
    that ended it, "" when a limit did; ``problem`` says what is malformed, "" when nothing is. ``calls`` are those
    before the problem."""

    thinking: str
    said: tuple[Text | Box, ...]
    calls: tuple[ToolCall, ...]
    stop: str
    problem: str = ""

    @property
    def text(self) -> str:
        """What is said, without the frames of boxes."""
        return "".join(part.text for part in self.said).strip()

    @property
    def box(self) -> str | None:
        """The final answer: what the last box holds; None where there is none."""
        return next((part.text for part in reversed(self.said) if isinstance(part, Box)), None)

    @property
    def message(self) -> Message:
        """The turn it makes. Raises ``ValueError`` with the problem, where there is one."""
        if self.problem:
            raise ValueError(f"a malformed reply: {self.problem}")
        parts: list[Part] = [Thinking(self.thinking)] if self.thinking else []
        return Message("assistant", (*parts, *self.said, *self.calls))


def final_answer(text: str) -> str:
    """The final answer in what somebody wrote who has no ids to show: what the last pair of box marks holds; the whole
    text where there is none. Space around it is no part of it."""
    before, closed, _ = text.rpartition(BOX_MARKS[1])
    _, opened, inside = before.rpartition(BOX_MARKS[0])
    said = inside if closed and opened else text.replace(BOX_MARKS[0], "").replace(BOX_MARKS[1], "")
    return said.strip()


class _Malformed(Exception):
    """What is wrong, in words."""


class _Ids:
    """Reads ids from the left: runs of text, and control tokens by name."""

    def __init__(self, ids: Sequence[int], vocab: Vocab):
        self.ids, self.vocab, self.at = list(ids), vocab, 0

    def text(self) -> str:
        """What stands before the next control token."""
        start = self.at
        while self.at < len(self.ids) and not self.vocab.is_control(self.ids[self.at]):
            self.at += 1
        return self.vocab.decode(self.ids[start : self.at])

    def control(self) -> str:
        """The name of the control token that is next, "" at the end."""
        return self.vocab.decode(self.ids[self.at : self.at + 1])

    def take(self, name: str, what: str) -> None:
        if self.control() != name:
            raise _Malformed(f"{what} is followed by {self.control() or 'nothing'} where {name} should stand")
        self.at += 1


def parse_reply(ids: Sequence[int], vocab: Vocab, config: ChatConfig | None = None) -> Reply:
    """Read a completion that followed the opening of an assistant turn (:func:`~mmagent.chat.turn_opening`), with or
    without the stop token at its end.

    Texts are stripped as the renderer strips them; arguments are exact, and texts still (:func:`arguments_of`).
    """
    config = config or ChatConfig()
    stops = {vocab.id(token): token for token in STOP_TOKENS}
    ids = list(ids)
    stop = stops.get(ids[-1], "") if ids else ""
    reader = _Ids(ids[:-1] if stop else ids, vocab)
    thinking = ""
    said: list[Text | Box] = []
    calls: list[ToolCall] = []
    try:
        if config.thinking:
            thinking = reader.text().strip()
            reader.take("</think>", "the thinking")
        said.append(Text(reader.text()))
        while reader.control() == BOX_MARKS[0]:
            reader.take(BOX_MARKS[0], "the text")
            said.append(Box(reader.text()))
            reader.take(BOX_MARKS[1], "a box")
            said.append(Text(reader.text()))
        while reader.control():
            reader.take("<tool_call>", "the text" if not calls else "a tool call")
            calls.append(_call(reader))
            if behind := reader.text().strip():
                raise _Malformed(f"text behind a tool call: {behind!r:.80}")
        if stop == "<|user|>" and calls:
            raise _Malformed("the turn goes to the user behind a tool call")
        if stop == "<|observation|>" and not calls:
            raise _Malformed("the turn waits for a tool that was not called")
    except _Malformed as problem:
        return Reply(thinking, spoken_parts(said), tuple(calls), stop, str(problem))
    return Reply(thinking, spoken_parts(said), tuple(calls), stop)


def _call(reader: _Ids) -> ToolCall:
    name = reader.text().strip()
    arguments: dict[str, str] = {}
    while reader.control() == "<arg_key>":
        reader.take("<arg_key>", "a name")
        key = reader.text()
        reader.take("</arg_key>", f"the argument {key!r} of the call of {name!r}")
        _nothing(reader, name)
        reader.take("<arg_value>", f"the argument {key!r} of the call of {name!r}")
        if key in arguments:
            raise _Malformed(f"the call of {name!r} names the argument {key!r} twice")
        arguments[key] = reader.text()
        reader.take("</arg_value>", f"the value of {key!r} in the call of {name!r}")
        _nothing(reader, name)
    reader.take("</tool_call>", f"the call of {name!r}")
    try:
        return ToolCall(name, arguments)
    except ValueError as error:
        raise _Malformed(str(error)) from error


def _nothing(reader: _Ids, name: str) -> None:
    if between := reader.text().strip():
        raise _Malformed(f"text between the arguments of the call of {name!r}: {between!r:.80}")


def arguments_of(call: ToolCall, tools: Sequence[Tool]) -> dict[str, JSON]:
    """The arguments of a call as the values that the tool's declaration asks for.

    An argument whose schema is of type ``string`` is the text as it stands, and so is one of the strings of an
    ``enum``; any other must be JSON of one of the types that the schema names, ``anyOf`` and ``oneOf`` included. Where
    several types are possible, a string among them (or none is named), the text is JSON if it reads as one of the
    others. Nothing else of a schema is checked: that is the tool's. Raises ``ValueError`` naming call and argument: a
    tool that is not declared, an argument that is not declared or is missing, a value of another type.
    """
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        raise ValueError(f"{call.name!r} is none of the tools {', '.join(tool.name for tool in tools)}")
    declared = json.loads(tool.declaration)
    schema = declared.get("function", declared).get("parameters") or {}
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    named = isinstance(required, list) and all(isinstance(key, str) for key in required)
    if not isinstance(properties, dict) or not named:
        raise ValueError(
            f"{call.name}: its declaration is no schema: properties are an object, required is a list of names"
        )
    open_ended = schema.get("additionalProperties", False) is not False
    values: dict[str, JSON] = {}
    for key, text in call.arguments.items():
        if key not in properties and not open_ended:
            raise ValueError(f"{call.name}: {key!r} is none of its arguments {', '.join(properties) or '(none)'}")
        own = properties.get(key)
        values[key] = _typed(f"{call.name}: {key}", text, own if isinstance(own, dict) else {})
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{call.name}: {missing[0]!r} is missing")
    return values


def _typed(where: str, text: str, schema: Mapping[str, JSON]) -> JSON:
    types = _types(schema)
    if types == ["string"] or text in _listed(schema, "enum"):
        return text
    try:
        value = parse_json(text)
        require_text(where, json_text(value))  # JSON can spell half a character
    except ValueError as error:
        if "string" in types or not types:
            return text
        raise ValueError(f"{where}: must be JSON, got {text!r:.80}") from error
    if types and not any(_is(value, name) for name in types if name != "string"):
        if "string" in types:
            return text
        raise ValueError(f"{where}: must be {' or '.join(map(str, types))}, got {text!r:.80}")
    return value


def _types(schema: Mapping[str, JSON]) -> list[JSON]:
    """Every type that the schema allows; none, where it allows all."""
    own = schema.get("type") or []
    types = list(own) if isinstance(own, list) else [own]
    for branch in (*_listed(schema, "anyOf"), *_listed(schema, "oneOf")):
        inner = _types(branch) if isinstance(branch, Mapping) else []
        if not inner:
            return []
        types += [name for name in inner if name not in types]
    return types


def _listed(schema: Mapping[str, JSON], name: str) -> list[JSON]:
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _is(value: JSON, name: JSON) -> bool:
    """Whether a value is of a type of JSON Schema."""
    match name:
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
    return False
