"""Stop strings: a completion ends with the token by which its text comes to hold one.

Tokens cut text anywhere, within characters too, so strings are looked for in bytes: an automaton (Aho and Corasick
1975) takes every byte once, whatever the strings and however long the text. UTF-8 lets no string begin or end within a
character, so what is found in bytes is what a search in the text finds. Control tokens are no text: they end what was
before, and no string reaches across them.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from mmagent.vocab import Vocab

_REMEMBERED = 1 << 14
"""Moves of whole tokens that are remembered; text is made of few tokens, most of which leave the automaton's start."""


class StopStrings:
    """What is looked for, for any number of requests: each has a :meth:`matcher` of its own.

    Of several strings the one that ends first counts, and of those that end there the longest. So what is found depends
    on the text alone and not on how tokens cut it.
    """

    def __init__(self, vocab: Vocab, strings: Iterable[str]):
        """Raises ``ValueError`` naming a string that is empty, or no text (half of a surrogate pair)."""
        self.vocab = vocab
        self.strings = tuple(dict.fromkeys(strings))
        self._next: list[dict[int, int]] = [{}]  # trie: a node is the bytes that lead to it, 0 none
        self._depth = [0]
        self._found = [0]  # bytes of the longest string that ends at a node, 0 for none
        for string in self.strings:
            try:
                needle = string.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"stop string {string!r} is no text: {error.reason}") from error
            if not needle:
                raise ValueError("a stop string is empty: every text holds it")
            self._add(needle)
        self._back = self._fallbacks()
        self._moves: dict[tuple[int, int], tuple[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self.strings)

    def matcher(self) -> Matcher:
        """For one request, before its first sampled token. A string that begins in the prompt is none of its text."""
        return Matcher(self)

    def trimmed(self, ids: Sequence[int], *, control: bool = True) -> str:
        """The text before the first stop string; all of it if it holds none. ``control`` as in ``Vocab.decode``."""
        node, run = 0, 0  # where the ids since the last control token begin
        for place, index in enumerate(ids):
            if self.vocab.is_control(index):
                node, run = 0, place + 1
                continue
            text = self.vocab.bytes_of(index)
            node, length = self._walk(node, text)
            if length:
                # length is that of the string together with what of this token follows it
                whole = b"".join(map(self.vocab.bytes_of, ids[run : place + 1]))
                return self.vocab.decode(ids[:run], control=control) + whole[:-length].decode(errors="replace")
        return self.vocab.decode(ids, control=control)

    # ------------------------------------------------------------ the automaton

    def _add(self, needle: bytes) -> None:
        node = 0
        for byte in needle:
            following = self._next[node].get(byte)
            if following is None:
                following = self._next[node][byte] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._found.append(0)
            node = following
        self._found[node] = len(needle)

    def _fallbacks(self) -> list[int]:
        """For each node the longest other one that its bytes end with."""
        back = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            self._found[node] = self._found[node] or self._found[back[node]]
            for byte, following in self._next[node].items():
                other = back[node]
                while other and byte not in self._next[other]:
                    other = back[other]
                back[following] = self._next[other].get(byte, 0)
                queue.append(following)
        return back

    def _walk(self, node: int, text: bytes) -> tuple[int, int]:
        """The node after ``text``. Where a string ends within: how many bytes of what was read, counted from the end
        of ``text``, begin with it; 0 elsewhere."""
        for place, byte in enumerate(text):
            while node and byte not in self._next[node]:
                node = self._back[node]
            node = self._next[node].get(byte, 0)
            if self._found[node]:
                return node, self._found[node] + len(text) - place - 1
        return node, 0

    def _move(self, node: int, index: int) -> tuple[int, int]:
        """:meth:`_walk` by a token's bytes, remembered."""
        move = self._moves.get((node, index))
        if move is None:
            text = self.vocab.bytes_of(index)
            move = (0, 0) if self.vocab.is_control(index) else self._walk(node, text)
            if len(self._moves) < _REMEMBERED:
                self._moves[node, index] = move
        return move


class Matcher:
    """Follows one request. ``found``: its text holds a stop string, ``held`` bytes of its end may become one."""

    def __init__(self, strings: StopStrings):
        self._strings, self._node = strings, 0
        self.found = False

    @property
    def held(self) -> int:
        """Bytes at the end of the text that a stop string begins with; 0 once one was found."""
        return 0 if self.found else self._strings._depth[self._node]

    def anew(self) -> Matcher:
        """For the same request from its beginning."""
        return Matcher(self._strings)

    def feed(self, ids: Iterable[int]) -> int | None:
        """Take in the tokens that come next. How many of them the completion has, the one that completes a stop string
        included, or None if none is completed. The rest is not read, and neither is what comes later."""
        if self.found:
            return 0
        for place, index in enumerate(ids):
            self._node, length = self._strings._move(self._node, index)
            if length:
                self.found = True
                return place + 1
        return None


class TextStream:
    """The text of one request piece by piece, for who shows it while it comes. Pieces are whole characters, hold no
    stop string and nothing that may become one, and are together :meth:`StopStrings.trimmed`."""

    def __init__(self, strings: StopStrings, *, control: bool = True):
        self._strings, self._control = strings, control
        self._matcher = strings.matcher()
        self._pending = b""  # bytes that a stop string may begin in
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def found(self) -> bool:
        """Whether a stop string was met: nothing more comes."""
        return self._matcher.found

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is certain with these tokens."""
        vocab, out = self._strings.vocab, []
        for index in ids:
            if self.found:
                break
            if vocab.is_control(index):
                out.append(self._flush())
                out.append(vocab.decode([index], control=self._control))
                self._matcher.feed([index])
                continue
            self._pending += vocab.bytes_of(index)
            if self._matcher.feed([index]) is not None:
                _, length = self._strings._walk(0, self._pending)
                self._pending = self._pending[:-length]
                out.append(self._flush())
                break
            certain = len(self._pending) - self._matcher.held
            out.append(self._decoder.decode(self._pending[:certain]))
            self._pending = self._pending[certain:]
        return "".join(out)

    def finish(self) -> str:
        """What was held back, when no token comes any more."""
        return "" if self.found else self._flush()

    def _flush(self) -> str:
        text = self._decoder.decode(self._pending, final=True)
        self._pending = b""
        return text
