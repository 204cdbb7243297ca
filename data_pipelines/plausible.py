"""What a record needs beyond its format to be worth training on: pictures that show something, and something said.

The format takes a picture of one pixel and an answer of no word; training would take the one for a picture, and learn
from the other to say nothing.
"""

from __future__ import annotations

from mmagent.chat import Box, Message, Part, Text, Thinking
from mmagent.records import Record, RecordError, image_size

LEAST_SIDE = 8
"""Pixels on the shorter side of a picture: less is a tracking pixel or a rule, not a third of a visual token. The
smallest pictures that data sets are made of, digits of 8x8, pass."""
MOST_ASPECT = 200
"""Of the longer side to the shorter, as the processors of Qwen2-VL and GLM-4V refuse them, and our geometry does."""


def picture_sizes(record: Record) -> tuple[tuple[int, int], ...]:
    """``(height, width)`` of every picture, by its header. Raises :class:`~mmagent.records.RecordError` for one that is
    too small or too long."""
    sizes = []
    for n, image in enumerate(record.images):
        height, width = image_size(image, record.key, f"images[{n}]")
        short, long = min(height, width), max(height, width)
        if short < LEAST_SIDE:
            told = f"{width}x{height} pixels: a side of less than {LEAST_SIDE} shows nothing"
            raise RecordError(record.key, f"images[{n}]", told)
        if long > MOST_ASPECT * short:
            told = f"{width}x{height} pixels: its sides are as {long / short:.0f} to 1, more than {MOST_ASPECT} to 1"
            raise RecordError(record.key, f"images[{n}]", told)
        sizes.append((height, width))
    return tuple(sizes)


def check_said(record: Record) -> None:
    """Raise :class:`~mmagent.records.RecordError` for a turn to be learnt in which the assistant says nothing, or the
    last of them if it only thinks, and for a document of blanks."""
    if record.parts and not any(map(_says, record.parts)):
        raise RecordError(record.key, "parts", "nothing but blanks")
    for n, message in enumerate(record.messages):
        if _is_learnt(message) and not any(map(_says, message.parts)):
            raise RecordError(record.key, "messages", f"message {n}: the assistant says nothing")
    learnt = [n for n, message in enumerate(record.messages) if _is_learnt(message)]
    if learnt and not any(_says(part) for part in record.messages[learnt[-1]].parts if not isinstance(part, Thinking)):
        raise RecordError(record.key, "messages", f"message {learnt[-1]}: the assistant thinks, and says nothing")


def _is_learnt(message: Message) -> bool:
    return message.role == "assistant" and message.trainable


def _says(part: Part) -> bool:
    """Calls and pictures say something, too."""
    return bool(part.text.strip()) if isinstance(part, Text | Thinking | Box) else True
