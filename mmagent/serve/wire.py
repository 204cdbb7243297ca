"""Bytes in and out: bodies within limits, streams of events, clients that are slow or gone, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, contextmanager
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmagent.serve.desk import Desk
from mmagent.serve.refusals import Refused, bad

T = TypeVar("T")
LOGGER = logging.getLogger("mmagent.serve")
HEADER_SECONDS = 10
"""For the line and headers of a request, from its first byte or the connection's start."""
BODY_SECONDS, BODY_RATE = 10, 64 << 10
"""A body has so long, and a second more for every so many bytes that have come."""
LINGER_SECONDS = 2
"""A client that sends too much is listened to for so long, to no purpose but that it hears why."""
STALL_SECONDS = 30
"""A client that takes nothing of its answer for so long is cut off."""
SILENCE_SECONDS = 15
"""A stream without news sends a comment, so that nobody between takes it for dead."""


# ---------------------------------------------------------------------------------------------- bodies


class Bodies:
    """Reads bodies of at most ``most`` bytes, and of all requests at once at most ``together``."""

    def __init__(self, most: int, together: int):
        self.most, self.together = most, together
        self._held = 0

    @contextmanager
    def held(self) -> Iterator[_Holding]:
        """Within it a body is read and counts."""
        holding = _Holding(self)
        try:
            yield holding
        finally:
            self._held -= holding.size

    def take(self, size: int) -> None:
        if self._held and self._held + size > self.together:
            raise Refused(429, "bodies of others fill the memory: come again", code="busy", retry_after=1)
        self._held += size


class _Holding:
    def __init__(self, bodies: Bodies):
        self.bodies, self.size = bodies, 0

    async def read(self, request: Request) -> bytes:
        """The body of a request. Raises :class:`Refused`: 415 for another kind than JSON, 413 for too much (what is
        left is not read), 408 for a client that sends too slowly; ``ClientDisconnect`` where it left."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what pages of others can send without asking a browser's leave is not taken
            raise Refused(415, f"the body must be application/json, got {kind[:80] or 'no content-type'}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "the body must not be compressed")
        try:
            length = int(request.headers.get("content-length", "0")[:20])
        except ValueError as error:
            raise bad("content-length is no number") from error
        if length > self.bodies.most:
            await _linger(request)
            raise self._too_large()
        data = bytearray()
        started = time.monotonic()
        try:
            while True:
                async with asyncio.timeout(started + BODY_SECONDS + len(data) / BODY_RATE - time.monotonic()):
                    message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                if len(data) + len(chunk) > self.bodies.most:
                    await _linger(request)
                    raise self._too_large()
                self.bodies.take(len(chunk))
                self.size += len(chunk)
                data += chunk
                if not message.get("more_body", False):
                    return bytes(data)
        except TimeoutError as error:
            raise Refused(408, f"the body came too slowly: {len(data)} bytes so far") from error

    def _too_large(self) -> Refused:
        return Refused(413, f"the body has more than {self.bodies.most} bytes")


async def _linger(request: Request) -> None:
    """Answered at once, a client that is still sending would see a broken connection and not the answer."""
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while (message := await request.receive())["type"] != "http.disconnect" and message.get("more_body", False):
                pass
    except TimeoutError:
        LOGGER.debug("a client went on sending a body that is too large")


# ---------------------------------------------------------------------------------------------- answers


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; cancelled, with ``ClientDisconnect``, when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for left in (task, gone):
            left.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events, one for each object of ``events``, and ``[DONE]``. An error after the start is an event too.

    ``within`` is closed at the end, however it ends; ``guard`` is what events are made in; ``done`` is called when
    all were sent, or ``refuse``, which makes of any exception what is told of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        within: ExitStack,
        guard: Callable[[], AbstractAsyncContextManager[None]],
        done: Callable[[], None],
        refuse: Callable[[Exception], Refused],
    ):
        super().__init__()
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # proxies that would collect the stream
        del self.headers["content-length"]
        self._events, self._within, self._guard, self._done, self._refuse = events, within, guard, done, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._within:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await until_gone(receive, self._send(send))
            except ClientDisconnect as error:
                self._refuse(error)

    async def _send(self, send: Send) -> None:
        try:
            async with self._guard(), aclosing(_lively(self._events)) as events:
                async for event in events:
                    await send(_body(b": waiting\n\n" if event is None else _event(event)))
            await send(_body(b"data: [DONE]\n\n"))
            self._done()
        except Exception as error:
            await send(_body(_event(self._refuse(error).body)))
        await send(_body(b"", more=False))


async def _lively(events: AsyncIterator[T]) -> AsyncIterator[T | None]:
    """``events``, and None where none came for a while."""
    async with aclosing(events) as source:
        while True:
            task = asyncio.ensure_future(anext(source, _END))
            try:
                while not (await asyncio.wait({task}, timeout=SILENCE_SECONDS))[0]:
                    yield None
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            event = task.result()
            if event is _END:
                return
            yield event


_END: Any = object()


def _event(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


# ---------------------------------------------------------------------------------------------- the server


class Connection(H11Protocol):
    """uvicorn waits for ever for the headers of a request, and for a client that does not read; this one closes."""

    _hurry: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._calm()
        elif self._hurry is None:
            self._hurry = self.loop.call_later(HEADER_SECONDS, self._close)

    def _close(self) -> None:
        self._hurry = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def _calm(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None


class Server(uvicorn.Server):
    """At SIGTERM or SIGINT the desk closes, what runs has ``grace`` seconds to end, and is cancelled then; a second
    signal ends at once. ``ready`` is called when requests are taken."""

    def __init__(self, config: uvicorn.Config, desk: Desk, grace: float, ready: Callable[[], None]):
        super().__init__(config)
        self.desk, self.grace, self._ready = desk, grace, ready
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled or not self.started:
            super().handle_exit(signal.SIGINT, frame)
            return
        self._signalled = True
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Take nothing more, and leave when what runs has ended."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        self.desk.closing = True
        until = time.monotonic() + self.grace
        while not self.desk.idle and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.desk.cancel_all()
        while not self.desk.idle and time.monotonic() < until + 5:
            await asyncio.sleep(0.05)
        self.should_exit = True
