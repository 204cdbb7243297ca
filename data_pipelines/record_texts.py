"""What a record says: all of it, turn by turn, or what is to be learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmagent.chat import Box, Part, Text, Thinking, ToolCall
from mmagent.records import Record


def texts_of(record: Record) -> Iterator[str]:
    """Everything in a record that is written as text."""
    yield from _texts(record.parts or [part for message in record.messages for part in message.parts])
    yield from (tool.declaration for tool in record.tools)


def turns_of(record: Record) -> list[str]:
    """The text of each message, or all text of a record of parts."""
    turns = [record.parts] if record.parts else [message.parts for message in record.messages]
    return [text for parts in turns if (text := "\n".join(_texts(parts)))]


def answer_of(record: Record) -> str:
    """What is said of the pictures: the words of the assistant, or all of a record of parts."""
    parts = record.parts or [part for m in record.messages if m.role == "assistant" for part in m.parts]
    return " ".join(part.text.strip() for part in parts if isinstance(part, Text | Box)).strip()


def _texts(parts: Sequence[Part]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Text | Thinking | Box):
            yield part.text
        elif isinstance(part, ToolCall):
            yield from (part.name, *part.arguments, *part.arguments.values())
