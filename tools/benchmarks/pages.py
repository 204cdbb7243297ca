"""Synthetic pages: how many a second are rendered and read, and how many traces of experts are played.

Ours draws on demand, with eight pages in flight. The peer is the same browser as other tools drive it: it draws by
itself, pages come one after the other and each is loaded afresh. Both read the truth about every element.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from mmagent.browser import BrowserPool, Page, run_sync
from mmagent.worlds.languages import NAMES
from mmagent.worlds.pages import LEVELS, PageSource, Scene, generate, render
from mmagent.worlds.pages.app_kinds import generate_app
from mmagent.worlds.traces import play
from tools.benchmarks.row import Row, Settings, throughput

IN_FLIGHT = 8


def rows(settings: Settings) -> Iterator[Row]:
    pools = (BrowserPool(1, IN_FLIGHT), BrowserPool(1, 1, begin_frame=False))
    for pool in pools:
        run_sync(pool.start())
    try:
        yield from rendered_pages(*pools, settings)
        yield played_steps(*pools, settings)
    finally:
        for pool in pools:
            run_sync(pool.close())


def sources(count: int, width: int, height: int) -> list[PageSource]:
    """Pages of all kinds, levels and languages."""
    spoken = tuple(NAMES)
    return [generate(n, width, height, 1 + n % LEVELS, None, spoken[n % len(spoken)]) for n in range(count)]


def rendered_pages(ours: BrowserPool, peer: BrowserPool, settings: Settings) -> Iterator[Row]:
    count = 16 if settings.quick else 96
    for width, height in ((320, 240), (1280, 720)):
        pages = sources(count, width, height)
        yield throughput(
            f"rendered pages {width}x{height}",
            lambda pages=pages: run_sync(render_all(ours, pages, IN_FLIGHT, trusted=True)),
            lambda pages=pages: run_sync(render_all(peer, pages, 1, trusted=False)),
            "drawing by itself",
            count,
            "pages/s",
            settings,
        )


async def render_all(pool: BrowserPool, pages: list[PageSource], lanes: int, *, trusted: bool) -> None:
    """``pages`` over ``lanes`` open pages; ``trusted`` replaces a page's content in place."""

    async def lane(first: int) -> None:
        async with pool.page(pages[0].width, pages[0].height) as page:
            for source in pages[first::lanes]:
                await _render(page, source, trusted)

    await asyncio.gather(*(lane(first) for first in range(lanes)))


async def _render(page: Page, source: PageSource, trusted: bool) -> Scene:
    return await render(page, source.html, source.width, source.height, trusted=trusted)


def played_steps(ours: BrowserPool, peer: BrowserPool, settings: Settings) -> Row:
    apps = [generate_app(n, 320, 240, 1 + n % LEVELS) for n in range(4 if settings.quick else 24)]
    steps = sum(len(app.steps) for app in apps)

    async def run(pool: BrowserPool, lanes: int) -> None:
        async def lane(first: int) -> None:
            async with pool.page(320, 240) as page:
                for app in apps[first::lanes]:
                    await play(page, app, elements=False)

        await asyncio.gather(*(lane(first) for first in range(lanes)))

    name = "steps of experts with screens"
    return throughput(name, lambda: run_sync(run(ours, min(IN_FLIGHT, len(apps)))), lambda: run_sync(run(peer, 1)),
                      "drawing by itself", steps, "steps/s", settings)  # fmt: skip
