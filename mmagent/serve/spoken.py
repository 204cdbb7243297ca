"""A completion told while it is sampled: thoughts, text and calls, in pieces that add up to what the whole says.

Pieces end between characters, and before what may become a stop string. A call is told when it is whole. What follows
the chat format adds up to what :func:`mmagent.replies.parse_reply` reads in the whole; what does not stays text without
its marks, and :attr:`Answer.problem` says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmagent.chat import ChatConfig, ToolCall
from mmagent.replies import BOX_MARKS, parse_reply
from mmagent.vocab import STOP_TOKENS, Vocab

_INCOMPLETE = "\ufffd"
_ROOM = 8
"""Ids that may wait for the end of a character: a character has at most four bytes, an id at least one."""


@dataclass(frozen=True)
class Said:
    """One piece: more of the thought, more of the text, or a whole call."""

    thought: str = ""
    text: str = ""
    call: ToolCall | None = None


class Characters:
    """Ids of text to text, whole characters at a time."""

    def __init__(self, vocab: Vocab):
        self.vocab = vocab
        self._waiting: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        self._waiting += ids
        text = self.vocab.decode(self._waiting)
        if not text.endswith(_INCOMPLETE):
            self._waiting = []
            return text
        if len(self._waiting) <= _ROOM:
            return ""
        for kept in range(3, _ROOM + 1):  # bytes that are no text: all that cannot belong to what comes
            head, tail = self._waiting[:-kept], self._waiting[-kept:]
            said = self.vocab.decode(head)
            if said + self.vocab.decode(tail) == text:
                self._waiting = tail
                return said
        return ""

    def finish(self) -> str:
        text, self._waiting = self.vocab.decode(self._waiting), []
        return text


class Emitter:
    """Text as it may be told: nothing from the first of ``stops`` on, and no space around the whole (``strip``). None
    of them reaches across a :meth:`border`, where a control token stands."""

    def __init__(self, stops: Sequence[str] = (), *, strip: bool = True):
        self.stops, self.strip = tuple(stops), strip
        self.stopped = False
        self._held = ""
        self._border = 0  # what is held before it was looked through
        self._begun = not strip

    def border(self) -> None:
        self._border = len(self._held)

    def feed(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        self._held += text
        looked_at = self._held[self._border :]
        if (cut := _first(looked_at, self.stops)) is not None:
            self._held, self.stopped = self._held[: self._border + cut], True
            return self._tell(self._held)
        return self._tell(self._held[: len(self._held) - _may_become(looked_at, self.stops)])

    def finish(self) -> str:
        return self._tell(self._held)

    def _tell(self, text: str) -> str:
        """All of ``text``, the beginning of what is held, but for space at its end."""
        count = len(text.rstrip() if self.strip else text)
        said, self._held = self._held[:count], self._held[count:]
        self._border = max(self._border - count, 0)
        if not self._begun:
            said = said.lstrip()
            self._begun = bool(said)
        return said


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is whole first; of those that end together the longest."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _may_become(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` begin a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


class PlainAnswer:
    """A completion as nothing but text; control tokens are left out, or told by name (``marks``)."""

    def __init__(self, vocab: Vocab, stops: Sequence[str] = (), *, marks: bool = False):
        self.vocab, self._marks = vocab, marks
        self._characters, self._emitter = Characters(vocab), Emitter(stops, strip=False)
        self.problem, self.thought_tokens = "", 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._emitter.stopped

    def feed(self, ids: Sequence[int]) -> list[Said]:
        text = ""
        for index in ids:
            if self.vocab.is_control(index):
                text += self._emitter.feed(self._characters.finish())
                self._emitter.border()
                if self._marks:
                    text += self._emitter.feed(self.vocab.decode([index]))
                    self._emitter.border()
            else:
                text += self._emitter.feed(self._characters.feed([index]))
        return [Said(text=text)] if text else []

    def finish(self, *, cut: bool) -> list[Said]:
        """``cut``: by a limit, and not ended by the model."""
        said = self._emitter.feed(self._characters.finish()) + self._emitter.finish()
        return [Said(text=said)] if said else []


class Answer:
    """A completion that follows the opening of an assistant's turn. Feed it ids as they come, then :meth:`finish`.

    ``problem``: what does not follow the chat format, once it is finished; "" where all does, or where it was cut.
    ``thought_tokens``: ids of the thought, its closing mark included.
    """

    def __init__(self, vocab: Vocab, chat: ChatConfig, stops: Sequence[str] = ()):
        self.vocab, self.chat = vocab, chat
        self.problem, self.thought_tokens = "", 0
        self._ids: list[int] = []
        self._place = "thought" if chat.thinking else "text"  # or box, call, behind (a call)
        self._loose = False  # the format was left: calls are not looked for any more
        self._call: list[int] = []
        self._characters = Characters(vocab)
        self._thought, self._text = Emitter(stops), Emitter(stops)
        self._said: list[Said] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._thought.stopped or self._text.stopped

    def feed(self, ids: Sequence[int]) -> list[Said]:
        """What can be told now."""
        for index in ids:
            if self.stopped:
                break
            self._ids.append(index)
            self.thought_tokens += self._place == "thought"
            if not self.vocab.is_control(index):
                if self._place == "call":
                    self._call.append(index)
                else:
                    self._tell(self._characters.feed([index]))
            else:
                if self._place != "call":
                    self._tell(self._characters.finish())
                    self._thought.border()
                    self._text.border()
                self._control(index, self.vocab.decode([index]))
        return self._taken()

    def finish(self, *, cut: bool) -> list[Said]:
        """The rest. ``cut``: by a limit or a stop string, and not ended by the model."""
        if self._place == "call":
            self._break_call()
        self._tell(self._characters.finish())
        self._add(Said(thought=self._thought.finish()))
        self._add(Said(text=self._text.finish()))
        if not cut:
            self.problem = parse_reply(self._ids, self.vocab, self.chat).problem
        return self._taken()

    def _taken(self) -> list[Said]:
        said, self._said = self._said, []
        return said

    def _add(self, said: Said) -> None:
        last = self._said[-1] if self._said else Said()
        if said.text and last.text:
            self._said[-1] = Said(text=last.text + said.text)
        elif said.thought and last.thought:
            self._said[-1] = Said(thought=last.thought + said.thought)
        elif said != Said():
            self._said.append(said)

    def _tell(self, text: str) -> None:
        if self._place == "thought":
            self._add(Said(thought=self._thought.feed(text)))
            return
        if self._place == "behind":
            if not text.strip():
                return
            self._place, self._loose = "text", True
        self._add(Said(text=self._text.feed(text)))

    def _control(self, index: int, name: str) -> None:
        match self._place, name:
            case "thought", "</think>":
                self._add(Said(thought=self._thought.finish()))
                self._place = "text"
            case "call", "</tool_call>":
                self._call.append(index)
                self._end_call()
            case "call", _ if name in STOP_TOKENS:
                self._break_call()
            case "call", _:
                self._call.append(index)
            case (("text" | "behind"), "<tool_call>") if not self._loose:
                self._place, self._call = "call", [index]
            case "text", mark if mark == BOX_MARKS[0]:
                self._place = "box"
            case "box", mark if mark == BOX_MARKS[1]:
                self._place = "text"
            case _:
                self._loose = self._loose or name not in STOP_TOKENS

    def _end_call(self) -> None:
        reply = parse_reply(self._call, self.vocab)
        if reply.problem:
            self._break_call()
            return
        self._add(Said(call=reply.calls[0]))
        self._place, self._call = "behind", []

    def _break_call(self) -> None:
        """A broken call is no call, but text."""
        self._place, self._loose = "text", True
        call, self._call = self._call, []
        for index in call:
            if self.vocab.is_control(index):
                self._tell(self._characters.finish())
                self._text.border()
            else:
                self._tell(self._characters.feed([index]))
        self._tell(self._characters.finish())
