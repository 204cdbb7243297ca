"""What tasks have in common: how an episode ends badly, and pages that many episodes share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from mmagent.browser import BrowserCrashed, BrowserPool, BrowserTimeout, Page
from mmagent.types import Observation, Score, Status, Trajectory

T = TypeVar("T")
logger = logging.getLogger(__name__)


def malformed(reason: str) -> Observation:
    """The end of an episode whose policy said something that is no action: reward 0, and why."""
    return Observation(reason, done=True, reward=0.0, parts={"malformed": 1.0})


def score_of(trajectory: Trajectory) -> Score:
    """The score of a task whose environment judges: what the episode earned; a broken environment is an error."""
    if trajectory.status is Status.FAILED:
        return Score(0.0, trajectory.parts, error=trajectory.note or "the environment failed")
    return Score(min(max(trajectory.reward, 0.0), 1.0), dict(trajectory.parts))


async def retried(call: Callable[[], Awaitable[T]]) -> T:
    """Call once more when a page or its process broke; what breaks twice is the caller's to know."""
    try:
        return await call()
    except (BrowserCrashed, BrowserTimeout) as error:
        logger.warning("a page broke (%s: %s); trying again on another", type(error).__name__, error)
        return await call()


@dataclass(eq=False)
class Seat:
    """One open page. ``kind`` names what is loaded in it, ``owner`` whose episode it shows."""

    page: Page
    context: contextlib.AbstractAsyncContextManager[Page]
    kind: str = ""
    owner: object | None = None
    busy: bool = False


class Screens:
    """At most ``pages`` pages of one size for any number of episodes.

    An episode borrows a page for as long as one call takes. It finds its page as it left it, unless another needed
    the place meanwhile; then ``seat.owner`` is someone else, and it must bring the page to its state again.
    """

    def __init__(self, pool: BrowserPool, width: int, height: int, pages: int = 16, *, scripts: bool = True):
        if pages < 1:
            raise ValueError(f"screens: at least one page is needed, got {pages}")
        self.pool, self.width, self.height, self.pages, self.scripts = pool, width, height, pages, scripts
        self._seats: list[Seat] = []  # least recently used first
        self._opening = 0
        self._freed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def borrow(self, owner: object, kind: str) -> AsyncIterator[Seat]:
        """A page for ``owner``, preferably its own, else one that shows ``kind``. One that breaks is replaced."""
        seat = await self._take(owner, kind)
        try:
            yield seat
        except BaseException:
            await self._drop(seat)
            raise
        finally:
            seat.busy = False
            async with self._freed:
                self._freed.notify()

    def release(self, owner: object) -> None:
        """``owner`` is done: its page may go to anyone."""
        for seat in self._seats:
            if seat.owner is owner:
                seat.owner = None

    async def close(self) -> None:
        """Close every page."""
        seats, self._seats = self._seats, []
        for seat in seats:
            await seat.context.__aexit__(None, None, None)

    async def _take(self, owner: object, kind: str) -> Seat:
        async with self._freed:
            while (seat := self._choose(owner, kind)) is None and len(self._seats) + self._opening >= self.pages:
                await self._freed.wait()
            if seat is not None:
                seat.busy = True
                self._seats.remove(seat)
                self._seats.append(seat)
                return seat
            self._opening += 1
        try:
            context = self.pool.page(self.width, self.height, scripts=self.scripts)
            seat = Seat(await context.__aenter__(), context, busy=True)
        finally:
            self._opening -= 1
        self._seats.append(seat)
        return seat

    def _choose(self, owner: object, kind: str) -> Seat | None:
        """The best free seat. One that belongs to another episode is taken only when no page can be added."""
        free = [seat for seat in self._seats if not seat.busy]
        full = len(self._seats) + self._opening >= self.pages
        wishes = (
            [seat for seat in free if seat.owner is owner],
            [seat for seat in free if seat.owner is None and seat.kind == kind],
            [seat for seat in free if seat.owner is None],
            [seat for seat in free if full],
        )
        return next((seats[0] for seats in wishes if seats), None)

    async def _drop(self, seat: Seat) -> None:
        if seat in self._seats:
            self._seats.remove(seat)
            await seat.context.__aexit__(None, None, None)
