"""Who is served, who waits, and who is sent away; and what has been done so far."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from mmagent.serve.policy import Delta, Policy
from mmagent.serve.prompts import Choice
from mmagent.serve.refusals import Refused
from mmagent.trajectories import Completion

HISTORY = 900
"""Seconds of load that are remembered, one entry a second."""
_PUMPED = 64
"""Deltas of a choice that may wait for a slow reader."""


@dataclass(frozen=True)
class Moment:
    """One second of load: when, tokens sampled until then, and choices that run and that wait."""

    seconds: float
    tokens: int
    running: int
    waiting: int


@dataclass
class Ledger:
    """What was done since the start. ``first_token``: seconds from admission to the first token, of the last requests
    that streamed; ``whole``: to the end, of the last requests."""

    started: float = field(default_factory=time.monotonic)
    answers: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first_token: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    whole: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    moments: deque[Moment] = field(default_factory=lambda: deque(maxlen=HISTORY))

    @property
    def uptime(self) -> float:
        return time.monotonic() - self.started


class Desk:
    """Admits choices (completions to be sampled) to a policy: ``running`` at a time, ``waiting`` more in line, nobody
    beyond. ``patch_bytes`` bounds the memory of pictures in hand; one request alone always fits."""

    def __init__(self, policy: Policy, *, running: int, waiting: int, patch_bytes: int = 4 << 30):
        self.policy, self.most_running, self.most_waiting = policy, running, waiting
        self.ledger = Ledger()
        self.closing = False
        self._patch_bytes, self._patches = patch_bytes, 0
        self._seats = 0
        self._tasks: set[asyncio.Task] = set()
        self._requests = 0

    @property
    def running(self) -> int:
        return min(self._seats, self.most_running)

    @property
    def waiting(self) -> int:
        return self._seats - self.running

    @property
    def idle(self) -> bool:
        return self._seats == 0

    @contextmanager
    def seat(self, count: int) -> Iterator[None]:
        """Room for ``count`` choices. Raises :class:`Refused`: 503 where the server is closing, 429 where as many wait
        as may."""
        self.require_open()
        if self._seats and self._seats + count > self.most_running + self.most_waiting:
            raise Refused(
                429, f"{self.running} completions run and {self.waiting} wait, no more than "
                f"{self.most_running + self.most_waiting} are taken together: come again", code="busy", retry_after=1,
            )  # fmt: skip
        self._seats += count
        started = time.monotonic()
        try:
            yield
        finally:
            self._seats -= count
            self.ledger.whole.append(time.monotonic() - started)

    @contextmanager
    def pictures(self, size: int) -> Iterator[None]:
        """Memory for pictures and their patches. Raises :class:`Refused` (429) where others hold too much."""
        if self._patches and self._patches + size > self._patch_bytes:
            raise Refused(429, "pictures of others fill the memory: come again", code="busy", retry_after=1)
        self._patches += size
        try:
            yield
        finally:
            self._patches -= size

    def require_open(self) -> None:
        if self.closing:
            raise Refused(503, "the server is shutting down", code="closing", retry_after=5)

    @asynccontextmanager
    async def guard(self, seconds: float) -> AsyncIterator[None]:
        """What runs inside has so many seconds, else :class:`Refused` (504), and is cancelled by :meth:`cancel_all`:
        then it raises :class:`Refused` (503)."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise Refused(504, f"not done within {seconds:g} seconds", code="timeout") from error
        except asyncio.CancelledError:
            if task in self._tasks:
                raise
            task.uncancel()  # it was us
            raise Refused(503, "the server is shutting down", code="closing", retry_after=5) from None
        finally:
            self._tasks.discard(task)

    def cancel_all(self) -> None:
        """Ends what is still running."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()

    async def complete(self, choices: Sequence[Choice]) -> list[Completion]:
        """All completions, in the order of ``choices``."""
        trajectories = self._trajectories(choices)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.policy.complete(trajectory, choice.limits))
                    for trajectory, choice in zip(trajectories, choices, strict=True)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        done = [task.result() for task in tasks]
        self.ledger.tokens += sum(len(completion.ids) for completion in done)
        self._count(choices, done)
        return done

    async def stream(self, choices: Sequence[Choice]) -> AsyncIterator[tuple[int, Delta]]:
        """Deltas as they come, each with the number of its choice. Closing it cancels what is not done."""
        queue: asyncio.Queue[tuple[int, Delta] | BaseException] = asyncio.Queue(_PUMPED)
        trajectories = self._trajectories(choices)
        started, first = time.monotonic(), True
        done: list[Completion] = []

        async def pump(n: int) -> None:
            try:
                async with aclosing(self.policy.stream(trajectories[n], choices[n].limits)) as deltas:
                    async for delta in deltas:
                        await queue.put((n, delta))
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(pump(n)) for n in range(len(choices))]
        try:
            while len(done) < len(choices):
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                n, delta = item
                if first and delta.ids:
                    self.ledger.first_token.append(time.monotonic() - started)
                    first = False
                self.ledger.tokens += len(delta.ids)
                if delta.completion is not None:
                    done.append(delta.completion)
                yield n, delta
            self._count(choices, done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _trajectories(self, choices: Sequence[Choice]) -> list:
        self._requests += 1
        return [choice.trajectory(f"request-{self._requests}.{n}") for n, choice in enumerate(choices)]

    def _count(self, choices: Sequence[Choice], done: Sequence[Completion]) -> None:
        self.ledger.prompt_tokens += sum({id(choice.prompt): len(choice.prompt.ids) for choice in choices}.values())
        self.ledger.cached_tokens += sum(completion.cached_tokens for completion in done)

    def note(self) -> None:
        """Remember this second's load."""
        moment = Moment(self.ledger.uptime, self.ledger.tokens, self.running, self.waiting)
        self.ledger.moments.append(moment)
