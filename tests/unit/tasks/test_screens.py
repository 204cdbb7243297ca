"""Pages that many episodes share: how long one is kept. The pool is a double; real pages are in tests of the tasks."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from mmagent.browser import BrowserClosed, BrowserCrashed
from mmagent.tasks import base
from mmagent.tasks.base import Screens, retried


class Pool:
    """Hands out numbers for pages."""

    def __init__(self) -> None:
        self.opened, self.open = 0, set()

    @contextlib.asynccontextmanager
    async def page(self, width, height, *, scripts):
        number = self.opened = self.opened + 1
        self.open.add(number)
        assert len(self.open) <= 2, "more pages than the screens may have"
        yield number
        self.open.remove(number)


def test_a_page_that_has_shown_much_gives_place_to_another_one(monkeypatch):
    monkeypatch.setattr(base, "LOANS", 5)

    async def many() -> tuple[Pool, int]:
        pool = Pool()
        screens = Screens(pool, 80, 60, 2)

        async def show(n: int) -> int:
            async with screens.borrow("drawings") as seat:
                await asyncio.sleep(0)
                return seat.page

        pages = await asyncio.gather(*(show(n) for n in range(100)))
        most = max(pages.count(page) for page in pages)
        await screens.close()
        return pool, most

    pool, most = asyncio.run(many())
    assert (pool.open, most) == (set(), 5)
    assert 20 <= pool.opened <= 22


def test_a_page_that_somebody_would_like_to_find_again_stays_until_it_is_released(monkeypatch):
    monkeypatch.setattr(base, "LOANS", 3)

    async def episode() -> list[int]:
        screens, owner, pages = Screens(Pool(), 80, 60, 1), object(), []
        for _ in range(6):
            async with screens.borrow("a page", owner) as seat:
                pages.append(seat.page)
        screens.release(owner)
        async with screens.borrow("a page", object()) as seat:
            pages.append(seat.page)
            assert (seat.state, seat.loans) == (None, 1)
        await screens.close()
        return pages

    assert asyncio.run(episode()) == [1] * 6 + [2]


def test_a_page_that_closing_broke_is_not_tried_again_and_nobody_waits_for_one(caplog):
    async def stopped() -> tuple[Pool, list[object], int]:
        pool, tries = Pool(), 0
        screens = Screens(pool, 80, 60, 1)
        closed = asyncio.Event()

        async def look() -> None:
            nonlocal tries
            tries += 1
            async with screens.borrow("drawings"):
                await closed.wait()
                raise BrowserCrashed("the page is gone")

        works = [asyncio.create_task(retried(look)) for _ in range(3)]  # one has the page, two wait for it
        await asyncio.sleep(0.01)
        await screens.close()
        closed.set()
        async with asyncio.timeout(5):
            ends = await asyncio.gather(*works, return_exceptions=True)
        with pytest.raises(BrowserClosed):
            async with screens.borrow("drawings"):
                pass
        return pool, ends, tries

    pool, ends, tries = asyncio.run(stopped())
    assert [type(end) for end in ends] == [BrowserClosed] * 3
    assert (pool.opened, pool.open, tries) == (1, set(), 3)
    assert "trying again" not in caplog.text


def test_a_page_that_comes_when_the_screens_are_closed_is_closed_too():
    class Slow(Pool):
        @contextlib.asynccontextmanager
        async def page(self, width, height, *, scripts):
            await asyncio.sleep(0.02)
            async with super().page(width, height, scripts=scripts) as number:
                yield number

    async def stopped() -> Pool:
        pool = Slow()
        screens = Screens(pool, 80, 60, 1)

        async def look() -> None:
            async with screens.borrow("drawings"):
                raise AssertionError("lent")

        work = asyncio.create_task(look())
        await asyncio.sleep(0)
        await screens.close()
        with pytest.raises(BrowserClosed):
            await work
        return pool

    pool = asyncio.run(stopped())
    assert (pool.opened, pool.open) == (1, set())
