"""A policy that says what it is told to, and a real server around it in a thread."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from mmagent.chat import ChatConfig
from mmagent.records import encode_image
from mmagent.serve.app import Service, create_app
from mmagent.serve.desk import Desk
from mmagent.serve.pictures import Pictures
from mmagent.serve.prompts import Prompts
from mmagent.serve.status import Served
from mmagent.serve.updating import Updates
from mmagent.serve.wire import Bodies, Connection, Server
from mmagent.trajectories import Completion, Limits, Trajectory
from tests.agent_kit import GEOMETRY, tiny_vocab

VOCAB = tiny_vocab()
END = VOCAB.id("<|user|>")


@dataclass(frozen=True)
class Piece:
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    completion: Completion | None = None


@dataclass
class ScriptedPolicy:
    """Says ``script`` (ids, or a function of prompt and limits), ``step`` ids at a time with ``pause`` seconds between.
    ``prompts`` are those it was given; ``open`` requests are being answered, ``cancelled`` were given up."""

    script: Sequence[int] | Callable[[Trajectory, Limits], Sequence[int]]
    step: int = 3
    pause: float = 0.0
    reason: str = ""
    version: int = 7
    cached: int = 0
    prompts: list[Trajectory] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    open: int = 0
    cancelled: int = 0

    async def complete(self, prompt: Trajectory, limits: Limits) -> Completion:
        pieces = [piece async for piece in self.stream(prompt, limits)]
        return pieces[-1].completion

    async def stream(self, prompt: Trajectory, limits: Limits) -> AsyncIterator[Piece]:
        self.prompts.append(prompt)
        self.limits.append(limits)
        said = list(self.script(prompt, limits) if callable(self.script) else self.script)
        ids, reason = _ended(said, limits)
        self.open += 1
        done = False
        try:
            logprobs = tuple(-0.25 * (n + 1) for n in range(len(ids)))
            for at in range(0, len(ids), self.step):
                await asyncio.sleep(self.pause)
                yield Piece(ids[at : at + self.step], logprobs[at : at + self.step])
            whole = Completion(ids, logprobs, reason == "stop", (), self.reason or reason, (self.version,), self.cached)
            yield Piece((), (), whole)
            done = True
        finally:
            self.open -= 1
            self.cancelled += not done


def _ended(said: list[int], limits: Limits) -> tuple[tuple[int, ...], str]:
    for n in range(1, min(len(said), limits.max_tokens) + 1):
        text = VOCAB.decode(said[:n]) if limits.stop_strings else ""
        if said[n - 1] in limits.stop_ids or any(stop in text for stop in limits.stop_strings):
            return tuple(said[:n]), "stop"
    return tuple(said[: limits.max_tokens]), "length"


def ids_of(*parts: str) -> list[int]:
    """Control tokens by name, everything else as text."""
    made: list[int] = []
    for part in parts:
        made += [VOCAB.id(part)] if part in VOCAB.control_tokens else VOCAB.encode(part)
    return made


@dataclass
class Running:
    """A server on ``port``."""

    port: int
    desk: Desk
    server: Server
    policy: Any
    thread: threading.Thread
    updates: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any]:
        """Status and body, read as JSON where it is."""
        status, _, data = self.raw(path, body, method, **headers)
        return status, json.loads(data) if data[:1] in (b"{", b"[") else data.decode()

    def raw(self, path: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def chat(self, **body: Any) -> tuple[int, Any]:
        return self.ask("/v1/chat/completions", {"model": "tiny", "messages": said("Hello")} | body)


def said(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    """One message."""
    return [{"role": role, "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}]


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def png_url(seed: int = 0, height: int = 84, width: int = 112) -> str:
    return "data:image/png;base64," + base64.b64encode(png(seed, height, width)).decode()


def png(seed: int = 0, height: int = 84, width: int = 112) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode_image(pixels).data


def prompts_of(chat: ChatConfig | None = None, context: int = 512, **pictures: Any) -> Prompts:
    return Prompts(VOCAB, chat or ChatConfig(), Pictures(GEOMETRY, **pictures), context)


@contextlib.contextmanager
def serving(
    policy: Any,
    *,
    chat: ChatConfig | None = None,
    context: int = 512,
    running: int = 4,
    waiting: int = 4,
    most: int = 1 << 20,
    seconds: float = 30.0,
    key: str = "",
    grace: float = 5.0,
    buffer: int = 0,
    updates: Path | None = None,
    **pictures: Any,
) -> Iterator[Running]:
    """The real application behind a real uvicorn, in a thread of this process. ``buffer``: bytes that the system keeps
    of what is sent (0: as usual)."""
    desk = Desk(policy, running=running, waiting=waiting)
    config = uvicorn.Config(
        "", "127.0.0.1", 0, http=Connection, ws="none", lifespan="on", log_level="critical", timeout_graceful_shutdown=2
    )
    served = Served("tiny", {"weights": "none"}, "curl")
    takes = Updates(updates, policy) if updates else None
    bodies = Bodies(most, 4 * most)
    service = Service(served, prompts_of(chat, context, **pictures), desk, bodies, seconds, key, takes)
    config.app = create_app(service)
    listener = config.bind_socket()
    if buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    ready = threading.Event()
    server = Server(config, desk, grace, ready.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert ready.wait(20), "the server did not start"
    try:
        yield Running(listener.getsockname()[1], desk, server, policy, thread, updates)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(what: Callable[[], bool], seconds: float = 5.0) -> None:
    """Until ``what`` holds; fails when it does not in time."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
