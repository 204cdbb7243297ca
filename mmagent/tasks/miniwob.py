"""MiniWoB++ tasks: a screen of 160 x 210 pixels, an utterance, and the benchmark's own reward.

The environment is replayable: the same seed and the same actions give the same screen. So an episode needs a page
only while it acts, hundreds of episodes share a few pages, the rollouts of a group share their first screen, and a
page that breaks is made up for once by playing the episode again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

from mmagent.actions import Action, ActionError, Finished, format_action, parse_action
from mmagent.browser import BrowserPool
from mmagent.browser.perform import perform
from mmagent.browser.sync import run_sync
from mmagent.tasks.base import Screens, Seat, malformed, retried, score_of
from mmagent.types import Item, Observation, Score, Trajectory
from mmagent.worlds import miniwob

STRIDE = 1_000_000
"""Items of one ``seed``; the next seed's begin behind them."""
MAX_STEPS = 12
LONG = {
    "click-checkboxes-large": 20,
    "guess-number": 24,
    "number-checkboxes": 24,
    "sign-agreement": 24,
    "use-spinner": 20,
}
"""Actions after which an episode ends; more on pages where the expert itself takes up to 15."""
REMEMBERED = 256
EXPERT_STEPS = 40


class MiniWobTask:
    """``page`` is a MiniWoB++ id with an expert (:data:`mmagent.worlds.miniwob.TASKS`). An episode ends after
    ``max_steps`` actions at the latest, by default :data:`MAX_STEPS` or what :data:`LONG` says. Reward: the page's raw
    one, clipped to [0, 1]."""

    category = "gui"

    def __init__(self, page: str, screens: Screens, max_steps: int | None = None):
        if page not in miniwob.TASKS:
            raise ValueError(f"MiniWoB++ task {page!r} is not supported; see mmagent.worlds.miniwob.TASKS")
        self.name, self.page, self.screens = f"miniwob/{page}", page, screens
        self.max_steps = LONG.get(page, MAX_STEPS) if max_steps is None else max_steps
        self._first: OrderedDict[int, Observation] = OrderedDict()
        self._looking: dict[int, asyncio.Task[Observation]] = {}

    def items(self, split: str, seed: int) -> Iterator[Item]:
        """Endless. Splits never share a scene, whatever the seeds."""
        for n in count():
            scene = miniwob.seed_for(split, seed * STRIDE + n)
            yield Item(self.name, f"{split}-{scene}", scene)

    def environment(self, item: Item) -> MiniWobEnvironment:
        return MiniWobEnvironment(self, item)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        """The expert's actions, found in a browser of its own. Blocks; see :meth:`demonstrate` inside a loop."""
        yield from run_sync(_demonstrate_alone(self.page, item))

    async def demonstrate(self, item: Item) -> list[str]:
        """The expert's actions from the first screen to the end of the episode."""
        act = miniwob.expert(self.page)
        actions: list[str] = []
        owner = object()
        async with self.screens.borrow(owner, self.page) as seat:
            await self.start(seat, item, owner)
            while len(actions) < EXPERT_STEPS and not (await miniwob.state(seat.page))[0]:
                action = await act(seat.page)
                actions.append(format_action(action))
                if isinstance(action, Finished):
                    break
                await perform(seat.page, action, miniwob.VIEW)
        self.screens.release(owner)
        return actions

    async def start(self, seat: Seat, item: Item, owner: object) -> miniwob.Screen:
        """Begin ``item`` on a page, for ``owner``."""
        seat.kind, seat.owner = self.page, None  # nobody's while it is between two states
        screen = await miniwob.start(seat.page, self.page, item.seed, elements=False)
        seat.owner = owner
        return screen

    async def first_look(self, item: Item) -> Observation:
        """The first screen of ``item``, looked at once for all episodes that begin with it."""
        if item.seed in self._first:
            self._first.move_to_end(item.seed)
            return self._first[item.seed]
        looking = self._looking.get(item.seed)
        if looking is None:
            looking = self._looking[item.seed] = asyncio.create_task(self._look(item))
            looking.add_done_callback(lambda _: self._looking.pop(item.seed, None))
        return await asyncio.shield(looking)

    async def _look(self, item: Item) -> Observation:
        screen = await retried(lambda: self._start_alone(item))
        seen = self._first[item.seed] = Observation(screen.utterance, (screen.image,))
        if len(self._first) > REMEMBERED:
            self._first.popitem(last=False)
        return seen

    async def _start_alone(self, item: Item) -> miniwob.Screen:
        async with self.screens.borrow(None, self.page) as seat:
            return await self.start(seat, item, None)


class MiniWobEnvironment:
    """One episode. Raises what the browser raises, when it breaks twice over one step."""

    def __init__(self, task: MiniWobTask, item: Item):
        self.task, self.item = task, item
        self._done: list[Action] = []

    async def reset(self) -> Observation:
        return await self.task.first_look(self.item)

    async def step(self, action: str) -> Observation:
        try:
            parsed = parse_action(action)
        except ActionError as error:
            return malformed(str(error))
        if isinstance(parsed, Finished):
            return Observation("the policy ended the episode", done=True, reward=0.0)
        seen = await retried(lambda: self._act(parsed))
        self._done.append(parsed)
        if not seen.done and len(self._done) >= self.task.max_steps:
            return Observation(f"not done after {len(self._done)} actions", done=True, reward=0.0)
        return seen

    async def close(self) -> None:
        self.task.screens.release(self)

    async def _act(self, action: Action) -> Observation:
        async with self.task.screens.borrow(self, self.task.page) as seat:
            if seat.owner is not self:
                await self.task.start(seat, self.item, self)
                for before in self._done:
                    await perform(seat.page, before, miniwob.VIEW)
            await perform(seat.page, action, miniwob.VIEW)
            done, reward = await miniwob.state(seat.page)
            if done:
                return Observation("done", done=True, reward=min(max(reward, 0.0), 1.0), parts={"raw": reward})
            screen = await miniwob.observe(seat.page, elements=False)
            return Observation("", (screen.image,))


async def _demonstrate_alone(page: str, item: Item) -> list[str]:
    async with BrowserPool(roots=[miniwob.html_folder()]) as pool:
        screens = Screens(pool, miniwob.WIDTH, miniwob.HEIGHT, pages=1)
        try:
            return await MiniWobTask(page, screens).demonstrate(item)
        finally:
            await screens.close()
