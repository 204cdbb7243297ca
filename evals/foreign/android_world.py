"""AndroidWorld (Rawles et al. 2024) through the server of its own container: one emulator, one episode at a time.

The protocol is that of ``server/android_server.py`` of google-research/android_world, read and rebuilt as a double for
the tests; no emulator was ever at the other end. What the server cannot be told is not made up:

- a scroll or a swipe goes through the middle of the screen in one of four directions, whatever its point and length;
- of all keys it has Enter alone, and presses it by itself behind every text that is typed or put in another's place;
- a task's budget of steps (ten times its complexity) is not told: it is read from a file, or the same for all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np

from mmagent.actions import (
    PHONE_ACTIONS,
    Action,
    ActionError,
    Click,
    DoubleClick,
    Drag,
    Fail,
    Finished,
    GoBack,
    GoHome,
    Key,
    LongPress,
    OpenApp,
    Replace,
    Scroll,
    Type,
    Wait,
    parse_action,
)
from mmagent.generation.http_transport import EndpointUnavailable, ServerConfig, Transport, read_object
from mmagent.geometry import ImageView
from mmagent.tasks.base import malformed, score_of
from mmagent.trajectories import Item, Observation, Score, Trajectory

FAMILY = "android_world"
MOST_BYTES = 512 << 20
"""Of one answer: a screen comes as a list of numbers, 30 MB for 1080 x 2400 pixels."""
_TAPS = {Click: "click", DoubleClick: "double_tap", LongPress: "long_press"}
IMPATIENT = 10.0
"""Seconds to wait for a server that did not come back before: a run's other items must not wait for it in full."""
_OPENING = b'{"pixels":[[['
_WORD = re.compile(r"[A-Z][a-z0-9]*")
logger = logging.getLogger(__name__)


class DeviceError(RuntimeError):
    """The server's own code failed, or answered what cannot be right: nothing was judged, and trying the same again
    would not help."""


@dataclass(frozen=True)
class Seconds:
    """How long the server may take for each kind of request before it counts as lost (an emulator that hangs never
    answers), and to ``start``."""

    ask: float = 30.0
    screen: float = 60.0
    act: float = 120.0
    prepare: float = 300.0
    start: float = 600.0


@dataclass(frozen=True)
class Instance:
    """A task with its parameters drawn: number ``index`` of those that the suite's seed gives ``task``."""

    task: str
    index: int

    def query(self) -> dict[str, str | int]:
        return {"task_type": self.task, "task_idx": self.index}


class AndroidServer:
    """One server at ``url``, ``http://host:5000``. Every request is tried once, for what has been done to a device
    cannot be done again: :class:`EndpointUnavailable` (a ``ConnectionError``) says that the way broke, the episode must
    start anew; :class:`DeviceError` that the server failed; ``EndpointRefused`` that it does not know the request."""

    def __init__(self, url: str, seconds: Seconds | None = None):
        self.url, self.seconds = url.rstrip("/"), seconds or Seconds()
        self.transport = Transport(ServerConfig(url, FAMILY, key_variable=""), url, MOST_BYTES)
        self.owed: Instance | None = None  # what was set up and not torn down
        self._drawn: tuple[int, int] | None = None
        self._patient = True  # until it was waited for in vain
        self._lost = False  # the way broke: whoever answers next may have been started anew, with other instances

    async def tasks(self) -> list[str]:
        """Names of all tasks of the server's suite."""
        found = (await self._get("/suite/task_list", {"max_index": -1})).get("task_list")
        if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
            raise DeviceError(f"{self.url}/suite/task_list: no list of names")
        return found

    async def draw(self, combinations: int, seed: int) -> None:
        """Wait until the server is up, and draw the parameters of ``combinations`` instances of every task. None of
        them counts as set up then, whatever clients before did."""
        patience = self.seconds.start if self._patient else min(self.seconds.start, IMPATIENT)
        self._patient = False
        await self.transport.ready("/health", patience)
        self._patient = True
        query = {"n_task_combinations": combinations, "seed": seed, "task_family": FAMILY}
        await self._get("/suite/reinitialize", query, self.seconds.prepare)
        self._drawn, self._lost, self.owed = (combinations, seed), False, None

    async def begin(self, instance: Instance) -> str:
        """Bring the device to the start of ``instance``; returns its goal in words. What an episode before left set
        up is torn down first; where that fails, or the server was lost meanwhile, the instances are drawn again."""
        try:
            await self.end()
        except DeviceError as error:
            logger.warning("%s; its tasks are made anew", error)
            self._lost = True
        if self._lost and self._drawn is not None:
            await self.draw(*self._drawn)
        await self._post("/reset", {"go_home": "true"}, timeout=self.seconds.prepare)
        goal = (await self._get("/task/goal", instance.query())).get("goal")
        if not isinstance(goal, str) or not goal:
            raise DeviceError(f"{self.url}/task/goal: {instance} has no goal in words")
        self.owed = instance
        await self._post("/task/initialize", instance.query(), timeout=self.seconds.prepare)
        return goal

    async def end(self) -> None:
        """Tear down what was set up, if anything was and the server is still the one that did it."""
        if self.owed is not None and not self._lost:
            await self._post("/task/tear_down", self.owed.query(), timeout=self.seconds.prepare)
            self.owed = None

    async def screen(self) -> np.ndarray:
        """The screen when it has come to rest, ``(height, width, 3)`` uint8."""
        path = "/screenshot?" + urlencode({"wait_to_stabilize": "true"})
        body = await self._told(self.transport.get(path, self.seconds.screen))
        return await asyncio.to_thread(_pixels, body, self.url + path)

    async def act(self, command: Mapping[str, Any]) -> None:
        """Carry out one action in the server's own form. Raises :class:`DeviceError` where it cannot be done."""
        await self._post("/execute_action", {}, command, self.seconds.act)

    async def score(self, instance: Instance) -> float:
        """What the task says of the device as it is now, in [0, 1]."""
        value = (await self._get("/task/score", instance.query(), self.seconds.act)).get("score")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DeviceError(f"{self.url}/task/score: {value!r} for {instance} is no number in [0, 1]")
        return float(value)

    async def _get(self, path: str, query: Mapping[str, str | int], timeout: float | None = None) -> dict[str, Any]:
        path = f"{path}?{urlencode(query)}"
        body = await self._told(self.transport.get(path, timeout or self.seconds.ask))
        return read_object(body, f"{self.url}{path}: the answer")

    async def _post(
        self, path: str, query: Mapping[str, str | int], body: Mapping[str, Any] | None = None, timeout: float = 30.0
    ) -> None:
        path = f"{path}?{urlencode(query)}" if query else path
        said = read_object(await self._told(self.transport.tell(path, body, timeout)), f"{self.url}{path}: the answer")
        if said.get("status") != "success":
            raise DeviceError(f"{self.url}{path}: no success but {str(said)[:200]}")

    async def _told(self, request: Any) -> bytes:
        """A 500 is an exception in the server's code (what it serves gives no reason), not a break on the way."""
        try:
            return await request
        except EndpointUnavailable as error:
            if error.status == 500:
                raise DeviceError(str(error)) from error
            self._lost = True
            raise


def _pixels(body: bytes, what: str) -> np.ndarray:
    quick = _quick(body)
    if quick is not None:
        return quick
    said = read_object(body, what).get("pixels")
    try:
        values = np.array(said, dtype=np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DeviceError(f"{what}: no pixels ({error})") from error
    if values.ndim != 3 or values.shape[2] != 3 or not values.size or values.min() < 0 or values.max() > 255:
        raise DeviceError(f"{what}: pixels of shape {values.shape} are no picture of three channels in 0..255")
    return values.astype(np.uint8)


def _quick(body: bytes) -> np.ndarray | None:
    """The pixels of an answer that is written as servers write it, and None for any other: a parser of JSON makes
    eight million numbers of a screen, and takes 2.7 s of the one thread that all episodes share, six times as long."""
    text = body.replace(b", ", b",").replace(b": ", b":")
    bones = text.translate(None, b"0123456789")
    if not (bones.startswith(_OPENING) and bones.endswith(b"]]]}")):
        return None
    frame = bones[len(_OPENING) - 3 : -1]
    width, height = frame[: frame.index(b"]]") + 1].count(b"]"), frame.count(b"]]")
    row = b"[" + b",".join([b"[,,]"] * width) + b"]"
    flat = text[len(_OPENING) : -4].translate(None, b"[]")
    if frame != b"[" + b",".join([row] * height) + b"]" or b",," in flat or not (flat[:1] + flat[-1:]).isdigit():
        return None
    values = np.fromstring(flat, np.int64, sep=",")  # a number too large for it is the largest
    if values.size != height * width * 3 or values.max() > 255:
        return None
    return values.astype(np.uint8).reshape(height, width, 3)


def command(action: Action, view: ImageView) -> dict[str, Any] | None:
    """``action`` as the server's JSONAction, its points in whole pixels of the screen; None for what it has no word
    for."""
    match action:
        case Click(x, y):  # with DoubleClick and LongPress, its subclasses
            across, down = view.from_frame(x, y)
            return {"action_type": _TAPS[type(action)], "x": int(across), "y": int(down)}
        case Scroll(_, _, dx, dy):
            return None if dx == dy == 0 else {"action_type": "scroll", "direction": _direction(dx, dy)}
        case Drag(x1, y1, x2, y2):
            height, width = view.original
            dx, dy = (x2 - x1) * width, (y2 - y1) * height
            # the server names a sideways swipe by where it starts: "left" moves the finger to the right
            return None if dx == dy == 0 else {"action_type": "swipe", "direction": _direction(-dx, dy)}
        case Type("\n"):
            return {"action_type": "keyboard_enter"}
        case Type(text):  # the Enter that submits it is pressed anyway
            return {"action_type": "input_text", "text": text.removesuffix("\n")}
        case Replace(text) if text != "\n":  # without a text the server clears nothing
            return {"action_type": "input_text", "text": text.removesuffix("\n"), "clear_text": True}
        case Key("Enter"):
            return {"action_type": "keyboard_enter"}
        case OpenApp(app):
            return {"action_type": "open_app", "app_name": app}
        case GoBack():
            return {"action_type": "navigate_back"}
        case GoHome():
            return {"action_type": "navigate_home"}
        case Wait():
            return {"action_type": "wait"}
    return None


def _direction(dx: float, dy: float) -> str:
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


class Devices:
    """Servers that episodes borrow, one each."""

    def __init__(self, servers: Sequence[AndroidServer]):
        self._free: asyncio.Queue[AndroidServer] = asyncio.Queue()
        for server in servers:
            self._free.put_nowait(server)

    async def take(self) -> AndroidServer:
        return await self._free.get()

    def give_back(self, server: AndroidServer) -> None:
        self._free.put_nowait(server)


@asynccontextmanager
async def devices(
    urls: Sequence[str], combinations: int, seed: int, seconds: Seconds | None = None
) -> AsyncIterator[Devices]:
    """The servers at ``urls``, once they answer (an emulator takes minutes to start), with the same instances drawn.
    Raises :class:`DeviceError` where their tasks differ."""
    servers = [AndroidServer(url, seconds) for url in urls]
    for server in servers:
        await server.draw(combinations, seed)
    names = [await server.tasks() for server in servers]
    for url, found in zip(urls, names, strict=True):
        if found != names[0]:
            raise DeviceError(f"{url} has other tasks than {urls[0]}: their versions differ")
    yield Devices(servers)


class AndroidTask:
    """One kind of task of AndroidWorld; its items are instances with other parameters. The score is the server's, and 0
    where the agent did not end the episode itself. There is no gold: nobody but a person knows what to do."""

    category = "gui-trajectory"

    def __init__(self, name: str, pool: Devices, combinations: int, max_steps: int):
        self.name, self.pool, self.combinations, self.max_steps = name, pool, combinations, max_steps
        self.kind = name.rpartition("/")[2]

    @property
    def family(self) -> str:
        """The app, mostly: the first word of the task's name."""
        found = _WORD.match(self.kind)
        return found[0] if found else self.kind

    def items(self, split: str, seed: int) -> Iterator[Item]:
        """Those of the split "test"; what they are was settled when the servers drew them."""
        for index in range(self.combinations if split == "test" else 0):
            yield Item(self.name, str(index), index, Instance(self.kind, index))

    def environment(self, item: Item) -> AndroidEnvironment:
        return AndroidEnvironment(self.pool, item.payload, self.max_steps)

    async def score(self, item: Item, trajectory: Trajectory) -> Score:
        return score_of(trajectory)

    def gold(self, item: Item) -> Iterator[str]:
        raise ValueError(f"{self.name}: AndroidWorld tells no gold answers")


class AndroidEnvironment:
    """One episode on a borrowed device."""

    def __init__(self, pool: Devices, instance: Instance, max_steps: int):
        self.pool, self.instance, self.left = pool, instance, max_steps
        self._server: AndroidServer | None = None
        self._view: ImageView | None = None

    async def reset(self) -> Observation:
        self._server = await self.pool.take()
        goal = await self._server.begin(self.instance)
        return await self._seen(goal)

    async def step(self, action: str) -> Observation:
        try:
            parsed = parse_action(action, PHONE_ACTIONS)
        except ActionError as error:
            return malformed(str(error))
        assert self._server is not None
        assert self._view is not None
        if isinstance(parsed, Finished | Fail):
            if isinstance(parsed, Finished) and parsed.answer:
                await self._server.act({"action_type": "answer", "text": parsed.answer})
            value = await self._server.score(self.instance)
            return Observation("ended by the agent", done=True, reward=value, parts={"task": value})
        self.left -= 1
        told = command(parsed, self._view)
        if told is None:
            return await self._seen(f"this phone cannot {json.dumps(action)}; nothing was done")
        try:
            await self._server.act(told)
        except DeviceError as error:  # as in AndroidWorld's own loop: the agent is told, and goes on
            logger.info("%s", error)
            return await self._seen("that could not be done")
        return await self._seen("")

    async def _seen(self, text: str) -> Observation:
        """The screen, and the end of the episode where its actions are used up: 0, for the agent did not end it."""
        assert self._server is not None
        screen = await self._server.screen()
        self._view = ImageView(screen.shape[:2], screen.shape[:2])  # anew each time: it may have been turned
        if self.left > 0:
            return Observation(text, (screen,))
        return Observation("not ended when its actions were used up", (screen,), done=True, reward=0.0)

    async def close(self) -> None:
        """Tears the task down. Where that fails the server owes it, and whoever borrows it next begins with it."""
        server, self._server = self._server, None
        if server is None:
            return
        try:
            await server.end()
        except (ConnectionError, RuntimeError) as error:
            logger.warning("not torn down, which the next episode must do first: %s", error)
        finally:
            self.pool.give_back(server)
