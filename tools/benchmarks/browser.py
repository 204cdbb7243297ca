"""Browser environments: MiniWoB++ steps a second, against the benchmark's own gym environment.

A step is a reset to another seed, a look, a click on what was asked for, the reward, and the look after it. Both sides
play the same page one episode after the other in one browser each, of the same binary where only one is there. The peer
is the package's gymnasium environment over selenium; it wants a chromedriver (Debian: chromium-driver), on the path or
named with the browser by MINIWOB_CHROMEDRIVER and MINIWOB_CHROME_BINARY.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

from mmagent.actions import Click
from mmagent.browser import BrowserPool, Page, require_chromium, run_sync
from mmagent.browser.perform import perform
from mmagent.worlds import miniwob
from tools.benchmarks.row import Row, Settings, throughput

TASK = "click-test"


def rows(settings: Settings) -> Iterator[Row]:
    count = 5 if settings.quick else 60
    peer = Gym()
    pool = BrowserPool(1, 1, roots=[miniwob.html_folder()])
    run_sync(pool.start())
    try:
        ours = Ours(pool)
        yield throughput(
            f"miniwob {TASK}: reset, look, click, reward, look",
            lambda: ours.play(count),
            lambda: peer.play(count),
            "its own gym environment",
            count,
            "episodes/s",
            settings,
        )
        ours.close()
    finally:
        run_sync(pool.close())
        peer.close()


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


class Gym:
    """The package's environment. Raises ``ValueError`` where it or its driver is missing."""

    def __init__(self) -> None:
        driver = os.environ.get("MINIWOB_CHROMEDRIVER") or shutil.which("chromedriver")
        if driver is None:
            raise ValueError(
                "the peer wants a chromedriver: `apt-get install chromium-driver`, or MINIWOB_CHROMEDRIVER"
            )
        os.environ["MINIWOB_CHROMEDRIVER"] = driver
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
