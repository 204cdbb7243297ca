"""The Chrome DevTools Protocol over a pair of pipes: NUL-delimited JSON, commands answered by id."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

from mmagent.browser.errors import BrowserCrashed, BrowserError

EventHandler = Callable[[str, dict[str, Any]], None]
READ_SIZE = 1 << 18


class Connection:
    """Sends commands and hands events to the session they belong to.

    ``post`` writes at once and returns a future, so that several commands can be under way before the
    first is awaited; a browser that goes away fails every open future with :class:`BrowserCrashed`.
    """

    def __init__(self, write_fd: int, read_fd: int):
        self._loop = asyncio.get_running_loop()
        self._write_fd, self._read_fd = write_fd, read_fd
        self._next_id = 0
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._sessions: dict[str, tuple[EventHandler, set[int]]] = {}
        self._incoming: list[bytes] = []
        self._outgoing = bytearray()
        self.closed = False
        self.on_browser_event: EventHandler = lambda method, params: None
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self._loop.add_reader(read_fd, self._read)

    def post(self, method: str, params: dict[str, Any], session: str | None = None) -> asyncio.Future[dict[str, Any]]:
        """Write one command; the future is its result, or :class:`BrowserError` with the browser's message."""
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        # a caller whose time is up drops its futures; what they would have raised is then of no interest
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self.closed:
            future.set_exception(BrowserCrashed(f"{method}: the browser is gone"))
            return future
        self._next_id += 1
        command: dict[str, Any] = {"id": self._next_id, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
            if session not in self._sessions:
                future.set_exception(BrowserCrashed(f"{method}: the page is gone"))
                return future
            self._sessions[session][1].add(self._next_id)
        self._pending[self._next_id] = future
        self._write(json.dumps(command).encode() + b"\0")
        return future

    async def send(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict:
        return await self.post(method, params or {}, session)

    def attach(self, session: str, handler: EventHandler) -> None:
        """Hand the events of ``session`` to ``handler`` from now on."""
        self._sessions[session] = (handler, set())

    def detach(self, session: str, reason: str = "the page is gone") -> None:
        """Forget ``session`` and fail what it still waits for."""
        _, waiting = self._sessions.pop(session, (None, set()))
        for identifier in waiting:
            future = self._pending.pop(identifier, None)
            if future is not None and not future.done():
                future.set_exception(BrowserCrashed(reason))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._read_fd)
        self._loop.remove_writer(self._write_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)
        pending, self._pending, self._sessions = self._pending, {}, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(BrowserCrashed("the browser process is gone"))

    def _write(self, data: bytes) -> None:
        idle = not self._outgoing
        self._outgoing += data
        if idle:
            self._flush()
            if self._outgoing and not self.closed:
                self._loop.add_writer(self._write_fd, self._flush)

    def _flush(self) -> None:
        try:
            del self._outgoing[: os.write(self._write_fd, self._outgoing)]
        except BlockingIOError:
            return
        except OSError:  # broken pipe: the reader will see the end of the other one as well
            self.close()
            return
        if not self._outgoing:
            self._loop.remove_writer(self._write_fd)

    def _read(self) -> None:
        try:
            data = os.read(self._read_fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        *complete, rest = data.split(b"\0")
        if complete:
            complete[0] = b"".join((*self._incoming, complete[0]))
            self._incoming.clear()
            for message in complete:
                self._dispatch(json.loads(message))
        if rest:
            self._incoming.append(rest)

    def _dispatch(self, message: dict[str, Any]) -> None:
        session = self._sessions.get(message.get("sessionId", ""))
        if "id" not in message:
            if session is not None:
                session[0](message["method"], message["params"])
            elif "sessionId" not in message:
                self.on_browser_event(message["method"], message["params"])
            return
        if session is not None:
            session[1].discard(message["id"])
        future = self._pending.pop(message["id"], None)
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(BrowserError(message["error"].get("message", "unknown error")))
        else:
            future.set_result(message["result"])
