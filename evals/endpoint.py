"""Any OpenAI-compatible chat endpoint as the one who is judged: same screens, same words, same scoring.

The conversation is built from the environment's observations by `mmagent.prompts`, exactly as for a local model;
a model that was never trained on our format is told the rules once, as system message.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from evals.suite import Play, Played
from mmagent.chat import Image, Part, Text
from mmagent.geometry import GeometryConfig, fit, resize
from mmagent.prompts import turn
from mmagent.protocols import Task
from mmagent.records import encode_image
from mmagent.types import Item, Observation, Status, Trajectory

_THOUGHT = re.compile(r"^.*?</think>", re.DOTALL)
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
MAX_ANSWER = 16 << 20
"""Bytes of one response that are read; more is refused."""


class EndpointUnavailable(ConnectionError):
    """The endpoint did not answer, or said that it is busy: worth another try."""


class EndpointRefused(RuntimeError):
    """The endpoint answered that the request itself is wrong; trying again would not help."""


@dataclass
class EndpointConfig:
    """``url`` up to and including ``/v1``. The key is read from the environment variable ``key_variable``.

    Screens are resized by ``geometry`` before they are sent; points are thousandths, so no coordinate depends on it.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 300.0
    concurrency: int = 32
    geometry: GeometryConfig = field(default_factory=GeometryConfig)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, got {self.url!r}")
        if not self.model:
            raise ValueError("model: an endpoint needs the name of its model")


class EndpointAgent:
    """Plays episodes over ``POST {url}/chat/completions``; an :class:`evals.suite.Agent`."""

    def __init__(self, config: EndpointConfig):
        self.config = config
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="endpoint")
        key = os.environ.get(config.key_variable, "")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def pins(self) -> Mapping[str, str]:
        return {
            "policy.model": self.config.model,
            "policy.url": self.config.url,
            "image_geometry": describe_geometry(self.config.geometry),
            "chat": "openai chat completions",
        }

    async def play(self, task: Task, item: Item, play: Play) -> Played:
        """One episode. Raises :class:`EndpointUnavailable` or :class:`EndpointRefused`."""
        environment = task.environment(item)
        trajectory = Trajectory(item.key, task.name)
        messages: list[dict[str, Any]] = [{"role": "system", "content": play.rules}] if play.rules else []
        words: list[str] = []
        try:
            seen = await environment.reset()
            for _ in range(play.max_steps):
                messages.append({"role": "user", "content": self._content(seen)})
                answer = await self._ask(messages, play)
                # ids of a foreign vocabulary are unknown; the trajectory carries their count alone
                trajectory.extend([0] * max(answer.prompt_tokens - len(trajectory), 0), trainable=False)
                trajectory.extend([0] * answer.tokens, trainable=True, logprobs=[0.0] * answer.tokens)
                words.append(answer.text)
                if answer.cut:  # half a sentence is no action
                    break
                messages.append({"role": "assistant", "content": answer.text})
                seen = await environment.step(visible(answer.text))
                trajectory.reward = trajectory.reward if seen.reward is None else seen.reward
                trajectory.parts.update(seen.parts)
                if seen.done:
                    break
            trajectory.status = Status.FINISHED if seen.done else Status.TRUNCATED
            return Played(trajectory, words)
        finally:
            await environment.close()

    def _content(self, seen: Observation) -> list[dict[str, Any]]:
        images = iter(seen.images)
        return [self._part(part, images) for part in turn(seen.text, len(seen.images))]

    def _part(self, part: Part, images: Any) -> dict[str, Any]:
        match part:
            case Text(text):
                return {"type": "text", "text": text}
            case Image():
                pixels: np.ndarray = next(images)
                data = encode_image(resize(pixels, *fit(*pixels.shape[:2], self.config.geometry))).data
                return {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()},
                }
        raise ValueError(f"{type(part).__name__} cannot be sent to an endpoint")

    async def _ask(self, messages: Sequence[Mapping[str, Any]], play: Play) -> _Answer:
        body = {
            "model": self.config.model,
            "messages": messages,
            "max_tokens": play.max_tokens,
            "temperature": play.temperature,
            "top_p": play.top_p,
            "seed": play.seed,
        }
        data = json.dumps(body).encode()
        loop = asyncio.get_running_loop()
        return _parse(await loop.run_in_executor(self._threads, self._post, data))

    def _post(self, data: bytes) -> bytes:
        url = self.config.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                answer = response.read(MAX_ANSWER + 1)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            kind = EndpointUnavailable if error.code in _BUSY else EndpointRefused
            raise kind(f"{url} answered {error.code}: {said[:300]}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise EndpointUnavailable(f"{url}: {error}") from error
        if len(answer) > MAX_ANSWER:
            raise EndpointRefused(f"{url} answered more than {MAX_ANSWER >> 20} MiB")
        return answer


@dataclass(frozen=True)
class _Answer:
    text: str
    cut: bool
    prompt_tokens: int
    tokens: int


def _parse(data: bytes) -> _Answer:
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
    return _Answer(content or "", cut, *counts)  # content is null when all tokens went into thinking


def visible(text: str) -> str:
    """What follows the thinking, without the box marks of the GLM family."""
    text = _THOUGHT.sub("", text, count=1)
    return text.replace("<|begin_of_box|>", "").replace("<|end_of_box|>", "").strip()


def describe_geometry(geometry: GeometryConfig) -> str:
    """One line for the pins: how a screen becomes patches."""
    return ", ".join(f"{name} {value:g}" for name, value in asdict(geometry).items())
