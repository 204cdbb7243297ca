"""Tasks by name, with the browser they need."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import AsyncIterator, Iterator, Sequence

from mmagent.browser import BrowserPool
from mmagent.config import ConfigError, locate
from mmagent.protocols import Task
from mmagent.sandbox import Sandbox
from mmagent.tasks.base import Screens
from mmagent.tasks.chart_to_code import PRELOAD, ChartToCodeTask, GeneratedCharts
from mmagent.tasks.design2code import SIZE, Design2CodeTask, GeneratedDesigns
from mmagent.tasks.grounding import GroundingTask
from mmagent.tasks.looking import CropTask
from mmagent.tasks.miniwob import MiniWobTask
from mmagent.tasks.screenshot_to_html import ScreenshotToHtmlTask
from mmagent.tasks.sites import SiteTask, site_names
from mmagent.tasks.svg_code import GeneratedDrawings, SvgCodeTask
from mmagent.tasks.ui_repair import UiRepairTask
from mmagent.tasks.worlds import WorldTask
from mmagent.worlds import miniwob, search, sites
from mmagent.worlds.catalogue import all_worlds

DOCUMENT_SIZE = (320, 240)
"""Width and height of the pages of grounding and screenshot-to-HTML."""
CHARTS = "chart-to-code"
CODING = ("design2code", "svg-code", "ui-polish", "ui-edit", CHARTS)
"""Tasks whose answers are code; the last runs in cells and needs no browser."""
MOST_DESIGNS = 4
"""Whole pages that are looked at at a time; three pictures of each are held."""
CELLS = 2
"""Programs that run at a time."""
SITES = "sites/"
"""Before the name of an errand at a local site: ``sites/shop/buy``."""
WORLDS = "worlds/"
"""Before the name of a world: a task that needs no browser."""
SEARCH = "search/"
"""Before the name of a search for small things: ``search/read``; ``search/read/crop`` with a tool to look closer."""
NO_BROWSER = (WORLDS, SEARCH, CHARTS)


def all_task_names() -> tuple[str, ...]:
    """Every name that :func:`open_tasks` knows."""
    pages = (f"miniwob/{page}" for page in miniwob.RUNNING)
    errands = (f"{SITES}{name}" for name in site_names())
    questions = (task.name for task in _world_tasks())
    return (*pages, *errands, "grounding", "screenshot-to-html", *CODING, *_search_tasks(), *questions)


def _world_tasks() -> Iterator[WorldTask]:
    """Every world as a task of all its levels in turn, and as one of each level: ``worlds/charts/value/level-2``."""
    for world in all_worlds().values():
        yield WorldTask(world)
        yield from (WorldTask(world, level) for level in range(world.levels))


def _search_tasks() -> dict[str, Task]:
    """Searches for small things by name, at full size and with a tool."""
    found: dict[str, Task] = {}
    for world in search.worlds():
        found |= {world.name: WorldTask(world, name=world.name), f"{world.name}/crop": CropTask(world)}
    return found


def easy_task_names() -> list[str]:
    """What a few thousand demonstrations bring a small model half of the way to: where reinforcement can begin."""
    return [f"miniwob/click-{name}" for name in ("button", "dialog", "link", "option", "tab", "test", "test-2")]


@contextlib.asynccontextmanager
async def open_tasks(
    names: Sequence[str],
    *,
    processes: int = 1,
    pages: int = 16,
    max_steps: int | None = None,
    pool: BrowserPool | None = None,
) -> AsyncIterator[list[Task]]:
    """The named tasks, in order, ready for use on the running event loop until the block ends.

    A name is one of :func:`all_task_names`, or the import path ``package.module:factory`` of a task of your own, called
    without arguments. Tasks that need a browser share ``pages`` pages of ``processes`` Chromium processes, or those of
    ``pool``; without such tasks none is started. ``max_steps`` is after how many actions the caller stops an episode:
    MiniWoB++ looks at nothing after the last one.

    Raises ``ConfigError`` for an unknown name, with the nearest one, and ``ValueError`` for ``max_steps`` below 1.
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    known = set(all_task_names())
    for name in names:
        if ":" not in name and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise ConfigError(f"unknown task {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    async with contextlib.AsyncExitStack() as stack:
        if pool is None and any(name in known and not name.startswith(NO_BROWSER) for name in names):
            per_process = -(-4 * pages // processes)  # of each size
            pool = BrowserPool(processes, per_process, roots=[miniwob.html_folder()])
            await stack.enter_async_context(pool)
        desk = Desk(pool, pages) if pool is not None else None
        if desk is not None:
            stack.push_async_callback(desk.close)
        sandbox = await stack.enter_async_context(Sandbox(CELLS, PRELOAD)) if CHARTS in names else None
        yield [
            ChartToCodeTask(sandbox, GeneratedCharts()) if sandbox and name == CHARTS else _make(name, desk, max_steps)
            for name in names
        ]


class Desk:
    """The pages that tasks share: MiniWoB++'s, those of local sites, and those of documents, small and whole, which run
    no scripts."""

    def __init__(self, pool: BrowserPool, pages: int):
        self.miniwob = Screens(pool, miniwob.WIDTH, miniwob.HEIGHT, pages)
        self.sites = Screens(pool, sites.WIDTH, sites.HEIGHT, pages)
        self.documents = Screens(pool, *DOCUMENT_SIZE, pages, scripts=False)
        self.designs = Screens(pool, *SIZE, min(pages, MOST_DESIGNS), scripts=False)

    async def close(self) -> None:
        await self.miniwob.close()
        await self.sites.close()
        await self.documents.close()
        await self.designs.close()


def _make(name: str, desk: Desk | None, max_steps: int | None) -> Task:
    if ":" in name:
        task = locate(name)()
        if not isinstance(task, Task):
            raise ConfigError(f"{name!r} gave a {type(task).__name__}, which is no task (mmagent.protocols.Task)")
        return task
    if name.startswith(WORLDS):
        return next(task for task in _world_tasks() if task.name == name)
    if name.startswith(SEARCH):
        return _search_tasks()[name]
    assert desk is not None
    if name.startswith(SITES):
        return SiteTask(name.removeprefix(SITES), desk.sites)
    if name == "grounding":
        return GroundingTask(desk.documents)
    if name == "screenshot-to-html":
        return ScreenshotToHtmlTask(desk.documents)
    if name == "design2code":
        return Design2CodeTask(desk.designs, GeneratedDesigns(desk.designs))
    if name == "svg-code":
        return SvgCodeTask(desk.documents, GeneratedDrawings())
    if name in ("ui-polish", "ui-edit"):
        return UiRepairTask(desk.documents, "polish" if name == "ui-polish" else "edit")
    return MiniWobTask(name.removeprefix("miniwob/"), desk.miniwob, max_steps)
