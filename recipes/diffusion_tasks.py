"""Small pages and functions to write and to edit, with one right answer each, to compare discrete diffusion on."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmagent.chat import render, user
from mmagent.dist import stable_seed
from mmagent.packing import pack
from mmagent.trajectories import Completion, Trajectory
from mmagent.types import Document, PackedBatch
from mmagent.vocab import Vocab

KINDS = ("page", "page edit", "function", "function edit")
WORDS = ("red", "blue", "green", "stone", "river", "cloud", "lamp", "apple", "train", "paper", "glass", "table")
NAMES = ("a", "b", "n", "x", "y", "left", "size", "total")
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
HELD_OUT = 8
"""One question of so many is never trained on, by what it says."""


class Asked(NamedTuple):
    """``answer`` is the one right text."""

    key: str
    kind: str
    question: str
    answer: str


def _page(title: str, items: Sequence[str], button: str) -> str:
    rows = "\n".join(f"<li>{item}</li>" for item in items)
    return f"<h1>{title}</h1>\n<ul>\n{rows}\n</ul>\n<button>{button}</button>"


def _function(name: str, first: str, second: str, sign: str) -> str:
    return f"def {name}({first}, {second}):\n    return {first} {SIGNS[sign]} {second}"


def _drawn(kind: str, rng: np.random.Generator) -> tuple[str, str]:
    title, button, name, new, *items = (str(word) for word in rng.permutation(WORDS)[:8])
    items = items[: int(rng.integers(2, 5))]
    first, second, third = (str(word) for word in rng.permutation(NAMES)[:3])
    sign, other = (str(word) for word in rng.permutation(list(SIGNS))[:2])
    if kind == "page":
        return f"page {title}: {', '.join(items)}; button {button}", _page(title, items, button)
    if kind == "function":
        return f"function {name}: {first} {sign} {second}", _function(name, first, second, sign)
    at, way = int(rng.integers(len(items))), int(rng.integers(3))
    if kind == "page edit":
        told = (f"item {items[at]} becomes {new}", f"remove {items[at]}", f"button {new}")[way]
        after = ([*items[:at], new, *items[at + 1 :]], [*items[:at], *items[at + 1 :]], items)[way]
        return f"{_page(title, items, button)}\n{told}", _page(title, after, new if way == 2 else button)
    told = (f"call it {new}", f"{first} becomes {third}", f"{other} instead")[way]
    after = ((new, first, second, sign), (name, third, second, sign), (name, first, second, other))[way]
    return f"{_function(name, first, second, sign)}\n{told}", _function(*after)


def questions(split: str, seed: int) -> Iterator[Asked]:
    """Without end, kinds in turn; the splits "train" and "test" never share a question."""
    rng, number = np.random.default_rng(stable_seed("diffusion tasks", split, seed)), 0
    while True:
        kind = KINDS[number % len(KINDS)]
        question, answer = _drawn(kind, rng)
        if (stable_seed(question) % HELD_OUT == 0) == (split == "test"):
            yield Asked(f"{split}-{seed}-{number}", kind, question, answer)
            number += 1


def vocabulary() -> Vocab:
    """Trained on questions and answers of the training split."""
    texts = [f"{asked.question}\n{asked.answer}" for asked, _ in zip(questions("train", 0), range(400), strict=False)]
    return Vocab.train(texts, 420)


def prompt(asked: Asked, vocab: Vocab) -> Trajectory:
    out = Trajectory(asked.key, asked.kind, asked.key)
    out.extend(render([user(asked.question)], vocab, generate=True).ids, trainable=False)
    return out


def told(asked: Asked, vocab: Vocab) -> list[int]:
    """The ids of the right answer, and the end of the turn."""
    return [*vocab.encode(asked.answer), vocab.stop_ids[1]]


def document(asked: Asked, vocab: Vocab) -> Document:
    before, answer = prompt(asked, vocab).input_ids, told(asked, vocab)
    flags = torch.tensor([False] * len(before) + [True] * len(answer))
    return Document(torch.tensor(before + answer), flags, (), asked.key, asked.kind)


def packs(split: str, seed: int, vocab: Vocab, tokens: int) -> Iterator[PackedBatch]:
    """Without end, each of as many documents as ``tokens`` hold."""
    held: list[Document] = []
    for asked in questions(split, seed):
        new = document(asked, vocab)
        if held and sum(map(len, held)) + len(new) > tokens:
            yield pack(held, image_id=vocab.image_id, merge_size=2, pad_id=vocab.pad_id)
            held = []
        held.append(new)


def text_of(completion: Completion, vocab: Vocab) -> str:
    return vocab.decode(completion.ids, control=False)


def exact(asked: Asked, completion: Completion, vocab: Vocab) -> float:
    """Whether the answer is the right one, and ended."""
    return float(completion.stopped and text_of(completion, vocab) == asked.answer)


def alike(asked: Asked, completion: Completion, vocab: Vocab) -> float:
    """How much of the right text stands in the answer, in [0, 1]."""
    return difflib.SequenceMatcher(None, asked.answer, text_of(completion, vocab), autojunk=False).ratio()
