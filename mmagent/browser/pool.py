"""A pool of Chromium processes that hands out pages and replaces whatever breaks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmagent.browser.errors import BrowserClosed, BrowserCrashed, BrowserError
from mmagent.browser.find import require_chromium
from mmagent.browser.page import Page, PageOptions
from mmagent.browser.process import ORDINARY_LEAST, Chromium, sweep

PROBE_LIMIT = 5.0
OPEN_ATTEMPTS = 3


@dataclass
class PoolStats:
    """Counters since the pool was made: processes ``started``, found ``crashed`` or ``retired`` on purpose,
    ``pages`` opened, and pages that ended ``broken`` (timed out or crashed)."""

    started: int = 0
    crashed: int = 0
    retired: int = 0
    pages: int = 0
    broken: int = 0


class BrowserPool:
    """``async with BrowserPool() as pool: async with pool.page(320, 240) as page: ...``

    ``processes`` browsers with at most ``pages_per_process`` open pages each; a caller waits for a free
    place. ``roots``: folders whose files a page may load; nothing else of the disk and no network is in
    reach. ``time_limit``: seconds any call on a page may take. ``recycle``: a process that has served so
    many pages is replaced once its pages are closed. ``begin_frame``: None asks the binary whether it can
    draw on demand. A pool belongs to the event loop it was started on and to its process. Pages share nothing but
    the clipboard of their browser.
    """

    def __init__(
        self,
        processes: int = 1,
        pages_per_process: int = 16,
        *,
        roots: Sequence[str | Path] = (),
        time_limit: float = 10.0,
        start_limit: float = 60.0,
        recycle: int = 2000,
        binary: str | Path | None = None,
        begin_frame: bool | None = None,
    ):
        if processes < 1 or pages_per_process < 1 or recycle < 1:
            raise ValueError("BrowserPool: processes, pages_per_process and recycle must be at least 1")
        if time_limit <= 0 or start_limit <= 0:
            raise ValueError("BrowserPool: time limits must be positive")
        self.stats = PoolStats()
        self.begin_frame = begin_frame
        self._binary = None if binary is None else Path(binary)
        self._roots = tuple(Path(root).resolve() for root in roots)
        self._time_limit, self._start_limit, self._recycle = time_limit, start_limit, recycle
        self._slots: list[Chromium | None] = [None] * processes
        self._slot_locks = [asyncio.Lock() for _ in range(processes)]
        self._places = asyncio.Semaphore(processes * pages_per_process)
        self._load = [0] * processes
        self._served = [0] * processes
        self._draining: set[Chromium] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()

    async def __aenter__(self) -> BrowserPool:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the first process, so that a missing or unfit browser is an error here.

        Raises :class:`BrowserMissing` or :class:`BrowserError`.
        """
        self._loop = asyncio.get_running_loop()
        self._binary = self._binary or require_chromium()
        sweep()
        await self._process(0)

    async def close(self) -> None:
        """End every process. Pages that are still open raise :class:`BrowserCrashed` from now on, and who asks for one
        or waits for one that is being opened is told :class:`BrowserClosed`: no process is started any more."""
        browsers = [browser for browser in self._slots if browser is not None] + list(self._draining)
        self._slots = [None] * len(self._slots)
        self._draining.clear()
        self._loop = None
        await asyncio.gather(*(browser.close() for browser in browsers))

    @contextlib.asynccontextmanager
    async def page(
        self,
        width: int = 1280,
        height: int = 720,
        *,
        scripts: bool = True,
        hide_scrollbars: bool = False,
        time_limit: float | None = None,
    ) -> AsyncIterator[Page]:
        """A fresh page, closed at the end of the block whatever happened to it.

        ``scripts`` false switches off the page's own scripts; ``time_limit`` replaces the pool's.
        """
        self._check_owner()
        options = PageOptions(self._roots, time_limit or self._time_limit, scripts, hide_scrollbars)
        async with self._places:
            slot, browser, page = await self._open(width, height, options)
            try:
                yield page
            finally:
                await asyncio.shield(self._close_page(slot, browser, page))

    # ------------------------------------------------------------- internals

    def _check_owner(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("BrowserPool: made in another process; make one pool in each process")
        if self._loop is None:
            raise BrowserClosed("BrowserPool: not started, or closed; use `async with BrowserPool() as pool`")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("BrowserPool: belongs to another event loop; make one pool for each loop")

    async def _open(self, width: int, height: int, options: PageOptions) -> tuple[int, Chromium, Page]:
        """A page on the least busy slot; a process that dies meanwhile is replaced and the page tried again."""
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            slot = min(range(len(self._slots)), key=lambda n: (self._load[n], n))
            self._load[slot] += 1
            browser: Chromium | None = None
            try:
                browser = await self._process(slot)
                browser.pages += 1
                async with asyncio.timeout(self._start_limit):
                    page = await Page.open(browser, width, height, options)
            except BaseException as error:
                self._load[slot] -= 1
                if browser is not None:
                    browser.pages -= 1
                    if isinstance(error, TimeoutError):
                        self._retire(slot, browser)
                if self._loop is None and isinstance(error, Exception):
                    raise BrowserClosed("BrowserPool: closed while a page was opened") from error
                if attempt == OPEN_ATTEMPTS or not isinstance(error, (BrowserCrashed, TimeoutError)):
                    raise
                continue
            self.stats.pages += 1
            self._served[slot] += 1
            return slot, browser, page
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _close_page(self, slot: int, browser: Chromium, page: Page) -> None:
        if page.broken:  # asked before closing, which an ordinary Chrome reports like a crash
            self.stats.broken += 1
        closed = await page.close()
        browser.pages -= 1
        self._load[slot] -= 1
        if not closed or self._served[slot] >= self._recycle:
            self._retire(slot, browser)
        if browser in self._draining and browser.pages == 0:
            self._draining.discard(browser)
            await browser.close()

    def _retire(self, slot: int, browser: Chromium) -> None:
        """Give no new page to ``browser``; it ends with its last page."""
        if self._slots[slot] is browser:
            self._slots[slot] = None
            self._draining.add(browser)
            self.stats.retired += 1

    async def _process(self, slot: int) -> Chromium:
        async with self._slot_locks[slot]:
            browser = self._slots[slot]
            if browser is not None and browser.alive:
                return browser
            if browser is not None:
                self.stats.crashed += 1
                self._slots[slot] = None
                await browser.close()
            self._check_owner()  # while this one waited its turn the pool may have been closed
            browser = await self._launch()
            if self._loop is None:  # or while the process was started
                await browser.close()
                raise BrowserClosed("BrowserPool: closed while a process was started")
            self._slots[slot] = browser
            self._served[slot] = 0
            self.stats.started += 1
            return browser

    async def _launch(self) -> Chromium:
        assert self._binary is not None
        wanted = self.begin_frame is not False
        browser = await Chromium.launch(self._binary, begin_frame=wanted, start_limit=self._start_limit)
        if self.begin_frame is None:
            self.begin_frame = await self._draws_on_demand(browser)
            if not self.begin_frame:
                await browser.close()
                browser = await Chromium.launch(self._binary, begin_frame=False, start_limit=self._start_limit)
        return browser

    async def _draws_on_demand(self, browser: Chromium) -> bool:
        options = PageOptions((), PROBE_LIMIT, True, False)
        try:
            async with asyncio.timeout(PROBE_LIMIT):
                page = await Page.open(browser, ORDINARY_LEAST, ORDINARY_LEAST, options)
                try:
                    await page.screenshot()
                finally:
                    await page.close()
        except (BrowserError, TimeoutError):
            return False
        return True
