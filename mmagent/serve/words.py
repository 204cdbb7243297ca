"""The words of a vocabulary as bytes: what a single token stands for, where it is no whole character."""

from __future__ import annotations

import json

from mmagent.vocab import Vocab


class Words:
    """``longest``: the most bytes that one token of text stands for."""

    def __init__(self, vocab: Vocab):
        self.vocab = vocab
        words: dict[str, int] = json.loads(vocab.definition)["model"]["vocab"]
        self._words = {index: word for word, index in words.items()}
        self._bytes = {letter: byte for byte, letter in byte_letters().items()}
        self.longest = max(map(len, words))  # a letter is a byte

    def bytes_of(self, index: int) -> bytes | None:
        """What a token stands for; the name of a control token; None where the vocabulary does not tell."""
        if self.vocab.is_control(index):
            return self.vocab.decode([index]).encode()
        word = self._words.get(index)
        if word is None or any(letter not in self._bytes for letter in word):
            return None
        return bytes(self._bytes[letter] for letter in word)


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where it can be seen, else one from 256
    on (Radford et al. 2019)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
