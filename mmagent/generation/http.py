"""Any server that speaks OpenAI's chat completions, as a client and as a policy.

The client tries again only what may succeed when tried again: a connection that broke, a server that says it is
busy. The policy reads a trajectory back into the conversation it was rendered from, so the same rollouts serve a
local model and a server. What a server samples has ids of another vocabulary and no log-probs of ours: such
trajectories can be judged, not trained on (their log-probs are NaN, which the batch builder refuses).
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmagent.geometry import GeometryConfig, unpatchify, visual_tokens
from mmagent.records import encode_image
from mmagent.replies import final_answer
from mmagent.trajectories import Completion, Limits, Trajectory
from mmagent.vocab import Vocab

BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
MAX_ANSWER = 16 << 20
"""Bytes of one response that are read; more is refused."""
_THOUGHT = re.compile(r"^.*?</think>", re.DOTALL)


class EndpointUnavailable(ConnectionError):
    """The endpoint did not answer, or said that it is busy: worth another try."""


class EndpointRefused(RuntimeError):
    """The endpoint answered that the request itself is wrong; trying again would not help."""


@dataclass
class ServerConfig:
    """``url`` up to and including ``/v1``. The key is read from the environment variable ``key_variable``. At most
    ``concurrency`` requests are open; each is tried ``attempts`` times, ``backoff`` seconds apart at first and twice
    as long every time."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 300.0
    concurrency: int = 32
    attempts: int = 1
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {self.url!r}")
        if not self.model:
            raise ValueError("model: an endpoint needs the name of its model")
        if min(self.concurrency, self.attempts) < 1 or self.timeout <= 0 or self.backoff < 0:
            raise ValueError(f"endpoint: concurrency, attempts and timeout must be positive, got {self}")


@dataclass(frozen=True)
class Answer:
    """``text`` of the message, whether a limit ``cut`` it, and the server's own token counts (0 when untold)."""

    text: str
    cut: bool
    prompt_tokens: int
    tokens: int


class ChatClient:
    """``POST {url}/chat/completions`` from a coroutine."""

    def __init__(self, config: ServerConfig):
        self.config = config
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="endpoint")
        key = os.environ.get(config.key_variable, "")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    async def ask(self, messages: Sequence[Mapping[str, Any]], limits: Limits) -> Answer:
        """The answer to a conversation. Raises :class:`EndpointUnavailable` when every attempt failed, and
        :class:`EndpointRefused`."""
        body = {
            "model": self.config.model,
            "messages": messages,
            "max_tokens": limits.max_tokens,
            "temperature": limits.temperature,
            "top_p": limits.top_p,
            "seed": limits.seed & 0x7FFFFFFF,  # servers take 32 or 64 bits
        }
        data = json.dumps(body).encode()
        loop = asyncio.get_running_loop()
        for attempt in range(self.config.attempts):
            try:
                return parse_answer(await loop.run_in_executor(self._threads, self._post, data))
            except EndpointUnavailable:
                if attempt + 1 == self.config.attempts:
                    raise
                await asyncio.sleep(self.config.backoff * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _post(self, data: bytes) -> bytes:
        url = self.config.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                answer = response.read(MAX_ANSWER + 1)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            kind = EndpointUnavailable if error.code in BUSY else EndpointRefused
            raise kind(f"{url} answered {error.code}: {said[:300]}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise EndpointUnavailable(f"{url}: {error}") from error
        if len(answer) > MAX_ANSWER:
            raise EndpointRefused(f"{url} answered more than {MAX_ANSWER >> 20} MiB")
        return answer


def parse_answer(data: bytes) -> Answer:
    """Read a response body. Raises :class:`EndpointUnavailable` for half a one, :class:`EndpointRefused` for another
    kind."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise EndpointUnavailable(f"the answer is no JSON: {data[:200]!r}") from error
    try:
        choice = body["choices"][0]
        content, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        usage = body.get("usage") or {}
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EndpointRefused(f"the answer is no chat completion: {data[:200]!r}") from error
    return Answer(content or "", cut, *counts)  # content is null when all tokens went into thinking


def visible(text: str) -> str:
    """What follows the thinking; of that, what stands in the box marks of the GLM family, where there are some."""
    return final_answer(_THOUGHT.sub("", text, count=1))


def answered(text: str) -> bool:
    """Whether a text, perhaps a cut one, is more than a thought that has not ended."""
    return "</think>" in text or not text.lstrip().startswith("<think>")


def image_part(pixels: np.ndarray) -> dict[str, Any]:
    """``(height, width, 3)`` uint8 as a part of a message: a PNG in a data URL."""
    encoded = base64.b64encode(encode_image(pixels).data).decode()
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + encoded}}


class HttpPolicy:
    """A server as a :class:`~mmagent.protocols.Policy`. ``vocab`` and ``geometry`` are those the prompts were rendered
    with; any byte-level vocabulary will do, as only text and pictures travel."""

    version = 0

    def __init__(self, client: ChatClient, vocab: Vocab, geometry: GeometryConfig):
        self.client, self.vocab, self.geometry = client, vocab, geometry

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        """The visible answer as ids of ``vocab``, with the user's role token behind it unless it was cut.

        Where the prompt opens a thought, it is closed at once: what the server thought is not told.
        """
        answer = await self.client.ask(conversation(prompt, self.vocab, self.geometry), limits)
        said = self.vocab.encode(visible(answer.text))
        closes = said and prompt.input_ids[-1] == self.vocab.id("<think>") and answered(answer.text)
        ids = [self.vocab.id("</think>"), *said] if closes else said
        ids += [] if answer.cut else [self.vocab.id("<|user|>")]
        if not ids:
            raise EndpointRefused(f"{prompt.key}: the server said nothing within {limits.max_tokens} tokens")
        return Completion(tuple(ids), (math.nan,) * len(ids), stopped=not answer.cut)


def conversation(prompt: Trajectory, vocab: Vocab, geometry: GeometryConfig) -> list[dict[str, Any]]:
    """The messages that ``prompt`` was rendered from, with its images at the size the policy sees.

    Raises ``ValueError`` naming a trajectory that holds more than turns of text and still images.
    """
    roles = {vocab.id(f"<|{role}|>"): role for role in ("system", "user", "assistant")}
    silent = {vocab.id(token) for token in ("[gMASK]", "<sop>", "/nothink", "<think>", "</think>")}
    silent |= {vocab.id(token) for token in ("<|begin_of_image|>", "<|end_of_image|>")}
    known = roles.keys() | silent | {vocab.image_id}
    images = iter(prompt.images)
    messages: list[dict[str, Any]] = []
    run: list[int] = []
    at = 0

    def flush() -> None:
        text = vocab.decode(run).strip()
        run.clear()
        if text:
            messages[-1]["content"].append({"type": "text", "text": text})

    while at < len(prompt.input_ids):
        token = prompt.input_ids[at]
        if token in known and messages:
            flush()
        if token in roles:
            messages.append({"role": roles[token], "content": []})
        elif token == vocab.image_id:
            image = next(images)
            messages[-1]["content"].append(image_part(unpatchify(image, geometry)))
            at += visual_tokens(image.grid, geometry.merge_size) - 1
        elif token not in silent:
            if not messages or vocab.is_control(token):
                raise ValueError(f"{prompt.key}: {vocab.decode([token])!r} cannot be told to a chat endpoint")
            run.append(token)
        at += 1
    flush()
    if messages and messages[-1]["role"] == "assistant":
        if messages[-1]["content"]:
            raise ValueError(f"{prompt.key}: an endpoint cannot go on with an answer that has begun")
        messages.pop()  # the opening of the turn that is asked for
    return [_plain(message) for message in messages]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Assistant and system messages carry their text as a string, which every server understands."""
    if message["role"] == "user":
        return message
    return {"role": message["role"], "content": "\n".join(part["text"] for part in message["content"])}
