"""From what was asked to what the policy is given: ids and patches, with every limit checked before a pixel is decoded.

Text becomes ids of text alone, whatever it spells; only the renderer writes control tokens. At the doors that take
token ids, whoever asks writes them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from mmagent.chat import Box, ChatConfig, Text, Thinking, ToolCall, render
from mmagent.geometry import visual_tokens
from mmagent.messages import Conversation
from mmagent.serve.pictures import Pictures
from mmagent.serve.refusals import bad
from mmagent.serve.requests import ChatAsk, TextAsk, TokenAsk, Wish
from mmagent.trajectories import Limits, Trajectory
from mmagent.types import PatchedImage
from mmagent.vocab import Vocab

T = TypeVar("T")
Hold = Callable[[int], object]
"""Takes so many bytes of memory for a request, or refuses it: asked before there is anything in them."""
PREPARING = 2
"""Threads that tokenize and decode; so many pictures are decoded at a time."""


@dataclass(frozen=True)
class Prompt:
    """``ids`` with a run of image ids for each of ``images``; ``most`` tokens may follow."""

    ids: tuple[int, ...]
    images: tuple[PatchedImage, ...]
    most: int


@dataclass(frozen=True)
class Choice:
    """One completion to be sampled."""

    prompt: Prompt
    limits: Limits

    def trajectory(self, key: str) -> Trajectory:
        made = Trajectory(key, "serve")
        made.extend(self.prompt.ids, trainable=False, images=self.prompt.images)
        return made


class Prompts:
    """Prepares prompts of one model. ``context``: the most tokens of a prompt and its answer together.

    ``patch_bytes``: the most memory that the pictures of one request may take as patches.
    """

    def __init__(self, vocab: Vocab, chat: ChatConfig, pictures: Pictures, context: int, patch_bytes: int = 1 << 30):
        self.vocab, self.chat, self.pictures, self.context = vocab, chat, pictures, context
        self.patch_bytes = patch_bytes
        self._prefix = (vocab.id("[gMASK]"), vocab.id("<sop>"))
        self._longest = max(len(vocab.bytes_of(index)) for index in range(vocab.size))
        self._threads = ThreadPoolExecutor(PREPARING, thread_name_prefix="mmagent-serve")

    async def chat_prompt(self, ask: ChatAsk, hold: Hold) -> Prompt:
        """The conversation, ready for an answer. Raises :class:`~mmagent.serve.refusals.Refused` (400)."""
        chat = self.chat_of(ask)
        self._require_short(_texts(ask.conversation, chat), "messages", len(ask.conversation.pictures))
        data = await self.pictures.read(ask.conversation.pictures, hold)
        counts = await self._in_thread(lambda: self._counts(data))
        try:
            ids = await self._in_thread(
                lambda: (
                    render(
                        ask.conversation.messages, self.vocab, counts, chat, tools=ask.conversation.tools, generate=True
                    ).ids
                )
            )
        except ValueError as error:
            raise bad(f"messages: {error}", "messages") from error
        return await self._prompt(tuple(ids), data, ask.wish, "messages", hold)

    def chat_of(self, ask: ChatAsk) -> ChatConfig:
        """How the answer to ``ask`` is to be read."""
        return self.chat if ask.thinking is None else replace(self.chat, thinking=ask.thinking)

    async def text_prompts(self, ask: TextAsk, hold: Hold) -> list[Prompt]:
        """Texts as beginnings of documents; ids as they are. Raises :class:`~mmagent.serve.refusals.Refused` (400)."""
        prompts = []
        for n, asked in enumerate(ask.prompts):
            where = "prompt" if len(ask.prompts) == 1 else f"prompt[{n}]"
            prompts.append(await self._prompt(await self._ids(asked, where), [], ask.wish, where, hold))
        return prompts

    async def token_prompt(self, ask: TokenAsk, hold: Hold) -> Prompt:
        """Ids with the pictures they name: one image id for each, or all of its places. Raises
        :class:`~mmagent.serve.refusals.Refused` (400)."""
        where = "text" if isinstance(ask.prompt, str) else "input_ids"
        self._require_short((), where, len(ask.pictures))
        ids = await self._ids(ask.prompt, where)
        data = await self.pictures.read(ask.pictures, hold)
        counts = await self._in_thread(lambda: self._counts(data))
        image = self.vocab.image_id
        places = ids.count(image)
        if places == len(counts) != sum(counts):
            remaining = iter(counts)
            ids = tuple(other for index in ids for other in ([image] * next(remaining) if index == image else [index]))
        elif places != sum(counts):
            raise bad(f"{where}: {places} image ids for {len(counts)} pictures of {sum(counts)} visual tokens", where)
        return await self._prompt(ids, data, ask.wish, where, hold)

    def choices(self, prompts: Sequence[Prompt], wish: Wish) -> list[Choice]:
        """All completions that are asked for, those of a prompt next to each other."""
        first = secrets.randbits(62) if wish.seed is None else wish.seed
        stop_ids = () if wish.ignore_end else self.vocab.stop_ids
        choices = []
        for prompt in prompts:
            for n in range(wish.choices):
                limits = Limits(
                    max_tokens=prompt.most,
                    temperature=wish.temperature,
                    top_p=wish.top_p,
                    stop_ids=tuple(dict.fromkeys((*stop_ids, *wish.stop_ids))),
                    seed=(first + n + (1 << 63)) % (1 << 64) - (1 << 63),
                    top_k=wish.top_k,
                    min_p=wish.min_p,
                    stop_strings=wish.stop,
                )
                choices.append(Choice(prompt, limits))
        return choices

    # ------------------------------------------------------------ internals

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _ids(self, asked: str | tuple[int, ...], where: str) -> tuple[int, ...]:
        if not isinstance(asked, str):
            return asked
        self._require_short([asked], where)
        return (*self._prefix, *await self._in_thread(lambda: self.vocab.encode(asked)))

    def _require_short(self, texts: Sequence[str], where: str, pictures: int = 0) -> None:
        """Tokenizing costs time, as does a look at a picture: not of what cannot fit, however it is cut into tokens."""
        fewest = sum(len(text) for text in texts) // self._longest + pictures
        if fewest > self.context:
            raise self._too_long(f"at least {fewest}", where)

    def _too_long(self, count: int | str, where: str) -> Exception:
        return bad(
            f"{where}: the prompt has {count} tokens, the context of this server {self.context}, answer included",
            where, "context_length_exceeded",
        )  # fmt: skip

    def _counts(self, data: Sequence[bytes]) -> list[int]:
        return [visual_tokens(grid, self.pictures.geometry.merge_size) for grid in self.pictures.grids(data)]

    async def _prompt(self, ids: tuple[int, ...], data: Sequence[bytes], wish: Wish, where: str, hold: Hold) -> Prompt:
        left = self.context - len(ids)
        if left < 1:
            raise self._too_long(len(ids), where)
        if wish.most is not None and wish.most > left:
            raise bad(
                f"{where}: the prompt has {len(ids)} tokens and asks for {wish.most}, the context of this server has "
                f"{self.context}", where, "context_length_exceeded",
            )  # fmt: skip
        if self.vocab.image_id in ids and not data:
            raise bad(f"{where}: has image ids and no picture", where)
        size = ids.count(self.vocab.image_id) * self._bytes_a_token
        if size > self.patch_bytes:
            raise bad(f"the pictures take {size} bytes as patches, more than {self.patch_bytes}", where)
        hold(size)
        images = [
            await self._in_thread(lambda n=n, picture=picture: self.pictures.patches(picture, f"picture {n}"))
            for n, picture in enumerate(data)
        ]
        return Prompt(ids, tuple(images), left if wish.most is None else wish.most)

    @property
    def _bytes_a_token(self) -> int:
        geometry = self.pictures.geometry
        return 4 * geometry.merge_size**2 * geometry.patch_values


def _texts(conversation: Conversation, chat: ChatConfig) -> list[str]:
    """What the renderer is sure to write."""
    texts = [tool.declaration for tool in conversation.tools]
    last_user = max((n for n, message in enumerate(conversation.messages) if message.role == "user"), default=-1)
    for n, message in enumerate(conversation.messages):
        keeps = chat.thinking and (chat.preserve_thinking or n > last_user)
        for part in message.parts:
            if isinstance(part, Text | Box) or (isinstance(part, Thinking) and keeps):
                texts.append(part.text.strip() if message.role == "assistant" else part.text)
            elif isinstance(part, ToolCall):
                texts += [part.name, *part.arguments, *part.arguments.values()]
    return texts
