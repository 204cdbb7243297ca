"""Stopping: no browser is started for a pool that is closed, and no thread is waited for that nobody wants any more."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from mmagent.browser import BrowserClosed, BrowserPool, in_thread, run_sync
from mmagent.browser.process import Chromium


def test_a_pool_that_closes_while_a_process_starts_leaves_none(monkeypatch):
    made: list[Chromium] = []
    launch = Chromium.launch

    async def slow(*args: object, **named: object) -> Chromium:
        browser = await launch(*args, **named)
        made.append(browser)
        await asyncio.sleep(0.1 * (len(made) - 1))
        return browser

    async def stopped() -> int:
        pool = BrowserPool(2, 1, begin_frame=False)
        await pool.start()
        monkeypatch.setattr(Chromium, "launch", slow)

        async def show() -> None:
            async with pool.page(200, 200):
                raise AssertionError("opened")

        made.append(pool._slots[0])  # the first was not made slowly
        pool._load[0] = 1  # so that the other slot is asked
        work = asyncio.create_task(show())
        while len(made) < 2:
            await asyncio.sleep(0.005)
        await pool.close()
        with pytest.raises(BrowserClosed, match=r"closed while"):
            await work
        with pytest.raises(BrowserClosed, match="not started, or closed"):
            await show()
        return pool.stats.started

    assert asyncio.run(stopped()) == 1
    assert len(made) == 2
    assert [browser.supervisor.poll() for browser in made] == [0, 0]


def test_work_of_another_thread_ends_with_who_waits_for_it():
    begun, left = threading.Event(), []

    async def long() -> None:
        begun.set()
        try:
            await asyncio.sleep(30)
        finally:
            left.append("closed")  # as a browser would be

    def work() -> None:
        try:
            run_sync(long())
        except BaseException as error:
            left.append(type(error).__name__)
            with pytest.raises(BaseException, match=r"^$"):
                run_sync(long())  # no more is begun
            raise

    async def stopped() -> None:
        doing = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(begun.wait, 10)
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing

    started = time.monotonic()
    asyncio.run(stopped())  # waits for its threads
    assert time.monotonic() - started < 10
    run_sync(asyncio.sleep(0))  # others go on
    assert sorted(left) == ["CancelledError", "closed"]


def test_a_thread_hands_back_what_it_made_or_raised():
    async def answer() -> int:
        return 7

    assert asyncio.run(in_thread(lambda: run_sync(answer()) + 1)) == 8
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(lambda: 1 // 0))
