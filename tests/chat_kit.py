"""Conversations as clients of the chat API write them, in all their spellings."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mmagent.chat import ChatConfig, Generation, Image, Message, Video
from mmagent.vocab import SPECIAL_TOKENS, Vocab

VOCAB = Vocab.train(["click the button type hello"], 320)
CONTROL = {VOCAB.id(token): token for token in SPECIAL_TOKENS}

RELEASED = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>"),
    *("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
    *("<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>"),
)
"""The added tokens of the released tokenizers, in their order; those of the first 18 are special in its sense too."""


@lru_cache(maxsize=1)
def released_tokenizer() -> str:
    """A ``tokenizer.json`` laid out as the released ones: byte-level words split by a pattern, 36 added tokens behind
    them, ids by their order and not by ours. Small, and trained on nothing of value."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    spaces = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words + spaces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        ["the button\n\n<tools>\n", "ab c b\n\n {}"] * 4,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False),
    )
    parsed = json.loads(made.to_str())
    first = made.get_vocab_size()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parsed["added_tokens"] = [
        {"id": first + n, "content": token, "special": n < 18, **flags} for n, token in enumerate(RELEASED)
    ]
    return json.dumps(parsed)


plain = st.text(st.sampled_from("ab c\nü{}\"'"), max_size=8)
spiced = st.lists(st.one_of(plain, st.sampled_from([*SPECIAL_TOKENS, "<|ima", "ge|>", "<th", "ink>"]))).map("".join)
configs = st.builds(ChatConfig, st.sampled_from(Generation), st.booleans(), st.booleans())


def values(text: st.SearchStrategy[str], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Whatever an argument may be."""
    flat = st.one_of(text, st.integers(-9, 9), st.booleans(), st.none(), st.just(0.5))
    return st.one_of(flat, st.lists(flat, max_size=2), st.dictionaries(keys, flat, max_size=2))


def names(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return text.map(lambda name: name.replace("\n", "").strip()).filter(len)


@st.composite
def tools(
    draw: st.DrawFn, text: st.SearchStrategy[str] = plain, keys: st.SearchStrategy[str] | None = None
) -> list[dict[str, Any]]:
    """None, or a few declarations, wrapped and bare. ``keys`` of their dictionaries, where they are other texts."""
    keys = text if keys is None else keys
    made = []
    for name in draw(st.lists(names(text), max_size=2, unique=True)):
        function = {
            "name": name,
            "description": draw(text),
            "parameters": {"type": "object", "properties": {draw(keys): {"type": "string", "default": draw(text)}}},
        }
        made.append({"type": "function", "function": function} if draw(st.booleans()) else function)
    return made


@st.composite
def contents(draw: st.DrawFn, text: st.SearchStrategy[str], *, sees: bool, boxes: bool = False) -> Any:
    """A text, or a list of parts with pictures where the role ``sees`` them."""
    if draw(st.booleans()):
        return draw(text)
    parts: list[st.SearchStrategy[Any]] = [text, text.map(lambda t: {"type": "text", "text": t})]
    if sees:
        parts += [
            st.sampled_from([{"type": "image"}, {"type": "image_url", "image_url": {"url": "http://x/1.png"}}]),
            st.just({"type": "video", "timestamps": [0.0]}),
        ]
    if boxes:
        parts.append(text.map(lambda t: {"type": "box", "text": t}))
    return draw(st.lists(st.one_of(parts), min_size=1, max_size=4))


@st.composite
def answers(
    draw: st.DrawFn, text: st.SearchStrategy[str], keys: st.SearchStrategy[str], *, calls: bool
) -> dict[str, Any]:
    """An assistant's turn, with or without calls."""
    said: dict[str, Any] = {"role": "assistant", "content": draw(contents(text, sees=False))}
    if draw(st.booleans()):
        said[draw(st.sampled_from(["reasoning_content", "reasoning"]))] = draw(text)
        said["content"] = draw(contents(text, sees=False, boxes=True))
    if calls:
        made = st.fixed_dictionaries(
            {"name": names(text), "arguments": st.dictionaries(keys, values(text, keys), max_size=2)}
        )
        wrapped = made.map(lambda function: {"type": "function", "id": "1", "function": function})
        said["tool_calls"] = draw(st.lists(st.one_of(made, wrapped), min_size=1, max_size=2))
        if draw(st.booleans()):
            said["content"] = None
    return said


@st.composite
def conversations(
    draw: st.DrawFn, text: st.SearchStrategy[str] = plain, keys: st.SearchStrategy[str] | None = None
) -> list[dict[str, Any]]:
    """Turns in an order that the renderer accepts, ending anywhere behind the first turn of a user."""
    keys = text if keys is None else keys
    system = {"role": draw(st.sampled_from(["system", "developer"])), "content": draw(contents(text, sees=False))}
    turns = [system] if draw(st.booleans()) else []
    first = len(turns) + 1
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(contents(text, sees=True))})
        for _ in range(draw(st.integers(0, 2))):
            turns.append(draw(answers(text, keys, calls=True)))
            for _ in range(draw(st.integers(1, 2))):
                role = draw(st.sampled_from(["tool", "observation"]))
                turns.append({"role": role, "content": draw(contents(text, sees=True))})
        turns.append(draw(answers(text, keys, calls=False)))
    return turns[: draw(st.integers(first, len(turns)))]


def places(messages: tuple[Message, ...] | list[Message]) -> int:
    """How many images and frames a conversation has."""
    parts = [part for message in messages for part in message.parts]
    return sum(len(part.timestamps) if isinstance(part, Video) else isinstance(part, Image) for part in parts)
