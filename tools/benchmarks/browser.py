"""Browser environments: MiniWoB++ steps a second, against the benchmark's own gym environment and against Playwright.

A step is a reset to another seed, a look, a click on what was asked for, the reward, and the look after it. All sides
play the same page one episode after the other in one browser each, of the same binary where only one is there. The
peers are the package's gymnasium environment over selenium, which wants a chromedriver, and the page driven through
Playwright, as one would who leaves the package's environment away. ``bash tools/bench_peers.sh`` gets both; one that is
not here has a row that says so.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mmagent.actions import Click
from mmagent.browser import BrowserPool, Page, require_chromium, run_sync
from mmagent.browser.perform import perform
from mmagent.worlds import miniwob
from tools.benchmarks.row import Row, Settings, not_run, throughputs

TASK = "click-test"
DRIVERS = (
    "chromedriver", "chromium.chromedriver", "/usr/lib/chromium/chromedriver", "/usr/lib/chromium-browser/chromedriver",
    "/snap/bin/chromium.chromedriver", "/usr/local/bin/chromedriver", "/opt/homebrew/bin/chromedriver",
)  # fmt: skip
"""On the path, and where Debian, Ubuntu, snap and Homebrew put it."""


class Peer(Protocol):
    def play(self, count: int) -> None:
        """So many episodes, each of them won."""

    def close(self) -> None: ...


class PeerMissing(Exception):
    """A peer is not here; the message says in a line how to get it."""


def rows(settings: Settings) -> Iterator[Row]:
    count = 5 if settings.quick else 60
    name, unit = f"miniwob {TASK}: reset, look, click, reward, look", "episodes/s"
    makers: dict[str, Callable[[], Peer]] = {"its own gym environment": Gym, "Playwright": Playwright}
    peers: dict[str, Peer] = {}
    pool = BrowserPool(1, 1, roots=[miniwob.html_folder()])
    try:
        missing = []
        for peer, maker in makers.items():
            try:
                peers[peer] = maker()
            except PeerMissing as error:
                missing.append(not_run(name, peer, unit, str(error)))
        if peers:
            run_sync(pool.start())
            ours = Ours(pool)
            calls = {peer: lambda side=side: side.play(count) for peer, side in peers.items()}
            yield from throughputs(name, lambda: ours.play(count), calls, count, unit, settings)
            ours.close()
        yield from missing
    finally:
        run_sync(pool.close())
        for side in peers.values():
            side.close()


class Ours:
    """One page of the pool, kept open, as tasks keep theirs."""

    def __init__(self, pool: BrowserPool):
        self._context = pool.page(miniwob.WIDTH, miniwob.HEIGHT)
        self._page: Page = run_sync(self._context.__aenter__())
        self._seed = 0

    def play(self, count: int) -> None:
        """So many episodes, each of them won."""
        run_sync(self._play(count))

    async def _play(self, count: int) -> None:
        act = miniwob.expert(TASK)
        for _ in range(count):
            self._seed += 1
            await miniwob.start(self._page, TASK, self._seed, elements=False)
            action = await act(self._page)
            assert isinstance(action, Click), action
            await perform(self._page, action, miniwob.VIEW)
            done, reward = await miniwob.state(self._page)
            assert done, "the click ended nothing"
            assert reward > 0, reward
            assert (await self._page.screenshot()).shape == (miniwob.HEIGHT, miniwob.WIDTH, 3)

    def close(self) -> None:
        run_sync(self._context.__aexit__(None, None, None))


def find_driver() -> str:
    """The chromedriver. Raises :class:`PeerMissing` where there is none, or not where ``MINIWOB_CHROMEDRIVER`` says."""
    named = os.environ.get("MINIWOB_CHROMEDRIVER")
    if named:
        if shutil.which(named) is None:
            raise PeerMissing(f"MINIWOB_CHROMEDRIVER={named} is no program")
        return named
    for place in DRIVERS:
        if found := shutil.which(place):
            return found
    raise PeerMissing("no chromedriver: `apt-get install -y chromium-driver`, or name one by MINIWOB_CHROMEDRIVER")


class Gym:
    """The package's environment. Raises :class:`PeerMissing` without its driver."""

    def __init__(self) -> None:
        os.environ["MINIWOB_CHROMEDRIVER"] = find_driver()
        os.environ.setdefault("MINIWOB_CHROME_BINARY", str(require_chromium()))
        import gymnasium
        import miniwob as package
        from miniwob.action import ActionTypes

        gymnasium.register_envs(package)
        self._kind = ActionTypes.CLICK_COORDS
        self._env: Any = gymnasium.make(f"miniwob/{TASK}-v1")
        self._seed = 0

    def play(self, count: int) -> None:
        """So many episodes, each of them won."""
        for _ in range(count):
            self._seed += 1
            seen, _ = self._env.reset(seed=self._seed)
            button = next(one for one in seen["dom_elements"] if one["tag"] == "button")
            middle = [
                float((button[side] + button[size] / 2).item()) for side, size in (("left", "width"), ("top", "height"))
            ]
            action = self._env.unwrapped.create_action(self._kind, coords=middle)
            seen, reward, done, _, _ = self._env.step(action)
            assert done, "the click ended nothing"
            assert reward > 0, reward
            assert seen["screenshot"].shape == (miniwob.HEIGHT, miniwob.WIDTH, 3)

    def close(self) -> None:
        self._env.close()


class Playwright:
    """The page in a browser that Playwright drives: one page, loaded once, a new episode by the page's own script, as
    ours. Raises :class:`PeerMissing` without the package."""

    STYLE = "#sync-task-cover, #reward-display, #click-canvas { display: none !important }"
    BEGIN = "seed => { Math.seedrandom(seed); core.startEpisodeReal(); return core.getUtterance(); }"
    MIDDLE = """() => { const box = document.querySelector('#area button').getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]; }"""
    STATE = "[WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]"

    def __init__(self) -> None:
        try:
            from playwright.sync_api import sync_playwright
        except ImportError as error:
            raise PeerMissing("no playwright: `pip install -e '.[bench]'`; it needs no browser of its own") from error
        self._playwright = sync_playwright().start()
        flags = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        binary = str(require_chromium())
        self._browser = self._playwright.chromium.launch(executable_path=binary, args=flags)
        size = {"width": miniwob.WIDTH, "height": miniwob.HEIGHT}
        self._page = self._browser.new_page(viewport=size, device_scale_factor=1)
        self._page.goto((miniwob.html_folder() / "miniwob" / f"{TASK}.html").as_uri())
        self._page.add_style_tag(
            content="#sync-task-cover, #reward-display, #click-canvas { display: none !important }"
        )
        self._page.evaluate("core.EPISODE_MAX_TIME = 2e9")
        self._seed = 0

    def look(self) -> np.ndarray:
        """``(height, width, 3)`` uint8."""
        with Image.open(io.BytesIO(self._page.screenshot())) as picture:
            return np.asarray(picture.convert("RGB"))

    def play(self, count: int) -> None:
        """So many episodes, each of them won."""
        for _ in range(count):
            self._seed += 1
            assert self._page.evaluate(self.BEGIN, self._seed)
            assert self.look().shape == (miniwob.HEIGHT, miniwob.WIDTH, 3)
            self._page.mouse.click(*self._page.evaluate(self.MIDDLE))
            done, reward = self._page.evaluate(self.STATE)
            assert done, "the click ended nothing"
            assert reward > 0, reward
            assert self.look().shape == (miniwob.HEIGHT, miniwob.WIDTH, 3)

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()
