"""One page of a headless Chromium: content, pixels, script and input, every call with a time limit.

In begin-frame mode the browser draws only when told to: an input and the frame that shows its effect are
sent together and awaited together, which makes a step several times faster than waiting for a timer, and
the pixels repeatable.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import urllib.parse
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmagent.browser.errors import BrowserCrashed, BrowserError, BrowserTimeout, ScriptError
from mmagent.browser.keys import character, parse_keys
from mmagent.browser.process import Chromium

Button = Literal["left", "middle", "right"]
_BUTTON_BITS = {"left": 1, "right": 2, "middle": 4}
FRAME_ATTEMPTS = 20
"""A frame may come back without pixels (nothing was ready to draw): it is asked for again."""
INPUT_PATIENCE = (0.002, 0.05)
"""Seconds between further frames while an input is not yet acknowledged: at first, and at most."""
STUCK_FRAME = 1.0
DRAG_STEPS = 8
ISOLATED_ATTEMPTS = 4
MAX_PIXELS = 64_000_000
_PNG = {"format": "png", "optimizeForSpeed": True}
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf, "-0": -0.0}
_NO_FULL_SCREEN = """Element.prototype.requestFullscreen = Element.prototype.webkitRequestFullscreen =
    () => Promise.reject(new TypeError('no full screen here'))"""  # it would change the size of every screenshot
_LOADED = """document.readyState === 'complete' ||
    new Promise(done => addEventListener('load', () => done(true), {once: true}))"""


@dataclass(frozen=True)
class PageOptions:
    """``roots``: resolved folders that ``file://`` may reach; ``time_limit`` in seconds for every call."""

    roots: tuple[Path, ...]
    time_limit: float
    scripts: bool
    hide_scrollbars: bool


class Page:
    """Made by :meth:`BrowserPool.page`. ``width, height``: the viewport in CSS pixels, which are image pixels unless
    :meth:`resize` was given another ``scale``; input is in CSS pixels at any.

    Every method raises :class:`BrowserTimeout` when the page does not answer within ``time_limit`` seconds
    and :class:`BrowserCrashed` when its process dies; the page is then of no further use. ``dialogs`` holds
    the latest (kind, message) of alert, confirm and prompt boxes, which are answered at once (confirm and
    prompt with "cancel").
    """

    def __init__(
        self, browser: Chromium, context: str, target: str, session: str, size: tuple[int, int], options: PageOptions
    ):
        self.width, self.height = size
        self.scale = 1.0
        self.time_limit = options.time_limit
        self.dialogs: deque[tuple[str, str]] = deque(maxlen=100)
        self.refused: deque[str] = deque(maxlen=100)
        self.broken = False
        self._browser, self._target, self._session, self._context = browser, target, session, context
        self._roots = options.roots
        self._world: int | None = None
        self._inked = False
        self._drawn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._drawn.set_result(None)
        self._awaited_loads: dict[str, asyncio.Future[None]] = {}
        self._loads: deque[str] = deque(maxlen=16)

    # ------------------------------------------------------------------ life

    @classmethod
    async def open(cls, browser: Chromium, width: int, height: int, options: PageOptions) -> Page:
        """A fresh page in a browser context of its own: it shares no cookie, storage or cache with another."""
        _check_size(browser, width, height)
        context = (await browser.send("Target.createBrowserContext", disposeOnDetach=True))["browserContextId"]
        try:
            return await cls._open_in(context, browser, width, height, options)
        except BaseException:  # nothing may stay open that nobody holds
            browser.connection.post("Target.disposeBrowserContext", {"browserContextId": context})
            raise

    @classmethod
    async def _open_in(cls, context: str, browser: Chromium, width: int, height: int, options: PageOptions) -> Page:
        control = {"enableBeginFrameControl": True} if browser.begin_frame else {}
        created = await browser.send(
            "Target.createTarget", url="about:blank", width=width, height=height, browserContextId=context, **control
        )
        target = created["targetId"]
        attached = await browser.send("Target.attachToTarget", targetId=target, flatten=True)
        page = cls(browser, context, target, attached["sessionId"], (width, height), options)
        browser.connection.attach(page._session, page._on_event)
        calm = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        setup = [
            page._post("Page.enable"),
            page._post("Inspector.enable"),
            page._post("Page.setLifecycleEventsEnabled", enabled=True),
            page._post("Fetch.enable", patterns=[{"urlPattern": "file://*"}]),
            page._post("Emulation.setFocusEmulationEnabled", enabled=True),
            page._post("Emulation.setScrollbarsHidden", hidden=options.hide_scrollbars),
            page._post("Emulation.setEmulatedMedia", features=calm),
            page._post("Page.addScriptToEvaluateOnNewDocument", source=_NO_FULL_SCREEN),
        ]
        if not browser.begin_frame:  # a window has a least size; an emulated screen has none
            setup.append(page._resize(width, height))
        if not options.scripts:
            setup.append(page._post("Emulation.setScriptExecutionDisabled", value=True))
        await asyncio.gather(*setup)
        return page

    async def close(self, patience: float = 2.0) -> bool:
        """Close the page and its context. False if the browser did not manage within ``patience`` seconds."""
        if not self._browser.alive:
            return True
        try:
            async with asyncio.timeout(patience):
                await self._browser.send("Target.disposeBrowserContext", browserContextId=self._context)
        except TimeoutError:
            return False
        except BrowserError:
            return not self._browser.alive
        finally:
            self._browser.connection.detach(self._session)
        return True

    # --------------------------------------------------------------- content

    async def goto(self, location: str | Path) -> None:
        """Load a local file (path or ``file://`` URL under an allowed root), ``data:`` or ``about:`` and wait for it.

        Raises ``ValueError`` for any other location, :class:`BrowserError` if it cannot be loaded.
        """
        url = location.resolve().as_uri() if isinstance(location, Path) else location
        if "://" not in url and not url.startswith(("data:", "about:", "blob:")):
            url = Path(url).resolve().as_uri()
        if not self._allowed(url):
            raise ValueError(
                f"{url[:200]}: only data:, about: and files under {[str(r) for r in self._roots]} are open"
            )
        async with self._limited(f"loading {url[:100]}"):
            await self._navigate(url)

    async def set_content(self, html: str, *, fresh: bool = True) -> None:
        """Show ``html`` and wait until it has loaded, with images that are given as ``data:``.

        ``fresh`` gives it a script world of its own. Without it the document is replaced in place, which is
        faster, but timers and globals of earlier content live on: only for content that is trusted.
        """
        async with self._limited("setting content"):
            if fresh:
                await self._navigate("about:blank")
            self._inked = False
            await self._send("Page.setDocumentContent", frameId=self._target, html=html)
            await self._evaluate_isolated(_LOADED)

    async def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Change the viewport; ``scale``: pixels of the image to one of CSS, 1 to 4."""
        if not 1 <= scale <= 4:
            raise ValueError(f"scale {scale} is not in 1..4 pixels to one of CSS")
        _check_size(self._browser, width, height, scale)
        async with self._limited("resizing"):
            await self._resize(width, height, scale)
            if self._browser.begin_frame and (scale, self.scale) != (1, 1):
                await self._enlarge(round(width * scale), round(height * scale))
        self.width, self.height, self.scale = width, height, scale

    # ---------------------------------------------------------------- pixels

    async def screenshot(self, *, full_page: bool = False, max_height: int = 16384) -> np.ndarray:
        """``(height, width, 3)`` uint8, ``scale`` times the viewport or, at ``full_page``, the whole document down to
        ``max_height`` pixels of CSS."""
        async with self._limited("a screenshot"):
            if not full_page:
                return await self._capture()
            metrics = await self._send("Page.getLayoutMetrics")
            height = min(max(math.ceil(metrics["cssContentSize"]["height"]), self.height), max_height)
            if height == self.height:
                return await self._capture()
            width, before, scale = self.width, self.height, self.scale
            await self.resize(width, height, scale)
            try:
                return await self._capture()
            finally:
                await self.resize(width, before, scale)

    async def whole(self, *, max_width: int = 4096, max_height: int = 16384) -> np.ndarray:
        """``(height, width, 3)`` uint8: the whole document as it lies in its viewport, down and right to these pixels.

        Unlike a :meth:`screenshot` of the full page it does not enlarge the viewport for it, so that what is a share of
        the window's height stays that, and what is fixed to the window shows once: as Playwright takes full pages.
        """
        async with self._limited("a picture of the whole page"):
            await self._answers()
            size = (await self._send("Page.getLayoutMetrics"))["cssContentSize"]
            width = min(max(math.ceil(size["width"]), self.width), max_width)
            height = min(max(math.ceil(size["height"]), self.height), max_height)
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            taken = self._post("Page.captureScreenshot", **_PNG, captureBeyondViewport=True, clip=clip)
            while not taken.done() and self._browser.begin_frame:  # it waits for frames, which come when asked for
                await self._frame()
                await asyncio.wait([taken], timeout=INPUT_PATIENCE[0])
            encoded = base64.b64decode((await taken)["data"])
            return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))

    async def frame(self) -> None:
        """Let the page draw once: animation callbacks run, scheduled input arrives."""
        async with self._limited("a frame"):
            await self._answers()
            await self._frame()

    async def wait(self, seconds: float, frame_every: float = 0.05) -> None:
        """Let ``seconds`` pass for the page, drawing every now and then so that animations advance."""
        for _ in range(max(1, round(seconds / frame_every))):
            await asyncio.sleep(min(frame_every, seconds))
            await self.frame()

    # ---------------------------------------------------------------- script

    async def evaluate(self, js: str, *args: Any, isolated: bool = False) -> Any:
        """The JSON value of an expression or, with ``args``, of a JavaScript function called with them.

        A promise is awaited. ``isolated`` runs in a script world that the page's own scripts cannot tamper
        with (same DOM, own globals). Raises :class:`ScriptError` with the page's message.
        """
        expression = f"({js})({', '.join(json.dumps(argument) for argument in args)})" if args else js
        async with self._limited("evaluating script"):
            return await (self._evaluate_isolated(expression) if isolated else self._evaluate(expression))

    # ----------------------------------------------------------------- input

    async def move(self, x: float, y: float) -> None:
        """Move the mouse to ``(x, y)`` in viewport pixels."""
        await self._input("moving the mouse", [self._mouse("mouseMoved", x, y)])

    async def click(self, x: float, y: float, button: Button = "left", count: int = 1) -> None:
        """Move to ``(x, y)``, press and release ``count`` times."""
        events = [self._mouse("mouseMoved", x, y)]
        for n in range(1, count + 1):
            events += [self._mouse("mousePressed", x, y, button, n), self._mouse("mouseReleased", x, y, button, n)]
        await self._input(f"a click at ({x:.0f}, {y:.0f})", events)

    async def double_click(self, x: float, y: float) -> None:
        await self.click(x, y, count=2)

    async def right_click(self, x: float, y: float) -> None:
        await self.click(x, y, button="right")

    async def drag(self, x1: float, y1: float, x2: float, y2: float, steps: int = DRAG_STEPS) -> None:
        """Press at the first point, move to the second in ``steps`` drawn moves, release."""
        what = f"a drag to ({x2:.0f}, {y2:.0f})"
        await self._input(what, [self._mouse("mouseMoved", x1, y1), self._mouse("mousePressed", x1, y1, "left", 1)])
        for n in range(1, steps + 1):
            x, y = x1 + (x2 - x1) * n / steps, y1 + (y2 - y1) * n / steps
            await self._input(what, [self._mouse("mouseMoved", x, y, "left")])
        await self._input(what, [self._mouse("mouseReleased", x2, y2, "left", 1)])

    async def scroll(self, x: float, y: float, dx: float, dy: float) -> None:
        """Turn the wheel over ``(x, y)``: positive ``dy`` shows what is below, ``dx`` what is to the right."""
        wheel = {"type": "mouseWheel", **self._place(x, y), "deltaX": dx, "deltaY": dy}
        await self._input("scrolling", [("Input.dispatchMouseEvent", wheel)])
        await self.frame()

    async def type_text(self, text: str) -> None:
        """Type into whatever has the focus, key by key; characters on no key are inserted as they are."""
        events: list[tuple[str, dict[str, Any]]] = []
        for char in text:
            stroke = character(char)
            if stroke is None:
                events.append(("Input.insertText", {"text": char}))
            else:  # a typist's shift key changes the character; its own events matter to no page
                parameters = {"key": stroke.key, "code": stroke.code, "windowsVirtualKeyCode": stroke.key_code,
                              "modifiers": stroke.modifiers}  # fmt: skip
                events.append(("Input.dispatchKeyEvent", {**parameters, "type": "keyDown", "text": stroke.text}))
                events.append(("Input.dispatchKeyEvent", {**parameters, "type": "keyUp"}))
        await self._input("typing", events)

    async def press(self, combination: str) -> None:
        """Press and release a key or combination: ``"Enter"``, ``"ctrl+a"``, ``"shift+ArrowLeft"``.

        Raises ``ValueError`` for what is no key.
        """
        events = parse_keys(combination).events()
        await self._input(f"pressing {combination}", [("Input.dispatchKeyEvent", event) for event in events])

    # ------------------------------------------------------------- internals

    @contextlib.asynccontextmanager
    async def _limited(self, what: str) -> AsyncIterator[None]:
        if self.broken:
            raise BrowserCrashed(f"{what}: this page has broken before")
        try:
            async with asyncio.timeout(self.time_limit):
                yield
        except TimeoutError:
            self.broken = True
            self._stop_script()
            raise BrowserTimeout(f"{what} took longer than {self.time_limit:g} s") from None
        except BrowserCrashed:
            self.broken = True
            raise

    def _post(self, method: str, **params: Any) -> asyncio.Future[dict[str, Any]]:
        return self._browser.connection.post(method, params, self._session)

    async def _send(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._post(method, **params)

    def _resize(self, width: int, height: int, scale: float = 1.0) -> asyncio.Future[dict[str, Any]]:
        drawn = {"scale": scale} if self._browser.begin_frame else {}  # such frames know no density of their own
        return self._post(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
            **drawn,
        )

    async def _enlarge(self, width: int, height: int) -> None:
        """Give the window so many pixels: a frame that is asked for shows what fits into it, at any scale."""
        window = await self._browser.send("Browser.getWindowForTarget", targetId=self._target)
        for more in (1, 0):  # a window that has this size already would stay as the emulated screen left it
            bounds = {"width": width + more, "height": height + more}
            await self._browser.send("Browser.setWindowBounds", windowId=window["windowId"], bounds=bounds)

    async def _navigate(self, url: str) -> None:
        answer = await self._send("Page.navigate", url=url)
        if answer.get("errorText"):
            raise BrowserError(f"{url[:200]}: {answer['errorText']}")
        loader = answer.get("loaderId")
        if loader is not None and loader not in self._loads:
            future = self._awaited_loads[loader] = asyncio.get_running_loop().create_future()
            try:
                await future
            finally:
                del self._awaited_loads[loader]

    async def _evaluate_isolated(self, expression: str) -> Any:
        """In a script world of our own; again where the document was replaced between the two commands."""
        for attempt in range(1, ISOLATED_ATTEMPTS + 1):
            try:
                if self._world is None:
                    made = await self._send("Page.createIsolatedWorld", frameId=self._target, worldName="mmagent")
                    self._world = made["executionContextId"]
                return await self._evaluate(expression, self._world)
            except (BrowserCrashed, ScriptError):
                raise
            except BrowserError:
                self._world = None
                if attempt == ISOLATED_ATTEMPTS:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _evaluate(self, expression: str, world: int | None = None) -> Any:
        where = {} if world is None else {"contextId": world}
        answer = await self._send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True, **where
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise ScriptError(details.get("exception", {}).get("description") or details.get("text", "unknown error"))
        result = answer["result"]
        if "unserializableValue" in result:
            return _NUMBERS.get(result["unserializableValue"], result["unserializableValue"])
        return result.get("value")

    async def _frame(self, **params: Any) -> dict[str, Any]:
        """Draw one frame, with the pixels asked for in ``params``.

        A browser crashes when frames of two of its pages overlap, so one lock serves them all. It is held until
        the browser answers, even where the caller's time is up before.
        """
        if not self._browser.begin_frame:
            self._inked = True
            return await self._send(  # two animation callbacks: what precedes the first is drawn by the second
                "Runtime.evaluate",
                expression="new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))",
                awaitPromise=True,
                returnByValue=True,
            )
        lock = self._browser.drawing
        await lock.acquire()
        self._inked = True
        self._drawn = self._post("HeadlessExperimental.beginFrame", **params)
        self._drawn.add_done_callback(lambda _: lock.release())
        return await asyncio.shield(self._drawn)

    def _stop_script(self) -> None:
        """Interrupt whatever the page is stuck in; a browser whose frame stays stuck for all that is ended."""
        self._post("Runtime.terminateExecution")
        if not self._drawn.done():
            loop = asyncio.get_running_loop()
            loop.call_later(STUCK_FRAME, lambda: self._drawn.done() or self._browser.abandon())

    async def _answers(self) -> None:
        """Wait until the page's own thread is free: the compositor draws an old frame for a page that hangs."""
        await self._send("Runtime.evaluate", expression="1", returnByValue=True)

    async def _capture(self) -> np.ndarray:
        await self._answers()
        problem: BrowserError | None = None
        for _ in range(FRAME_ATTEMPTS):
            try:
                if self._browser.begin_frame:
                    answer = await self._frame(screenshot=_PNG)
                    encoded = answer.get("screenshotData")
                else:
                    encoded = (await self._send("Page.captureScreenshot", **_PNG))["data"]
            except (BrowserCrashed, BrowserTimeout):
                raise
            except BrowserError as error:  # under load a capture can fail and the next one succeed
                problem, encoded = error, None
            if encoded:
                return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
            await asyncio.sleep(0.002)
        raise BrowserError(f"no pixels after {FRAME_ATTEMPTS} frames") from problem

    def _mouse(
        self, kind: str, x: float, y: float, button: Button | None = None, count: int = 0
    ) -> tuple[str, dict[str, Any]]:
        held = _BUTTON_BITS[button] if button and kind != "mouseReleased" else 0
        event = {"type": kind, **self._place(x, y), "button": button or "none", "buttons": held, "clickCount": count}
        return "Input.dispatchMouseEvent", event

    def _place(self, x: float, y: float) -> dict[str, float]:
        """A point of the viewport as the browser takes it: where frames are asked for, in pixels of the image."""
        scale = self.scale if self._browser.begin_frame else 1
        return {"x": x * scale, "y": y * scale}

    async def _input(self, what: str, events: Sequence[tuple[str, dict[str, Any]]]) -> None:
        async with self._limited(what):
            if not self._inked:  # a document that was never drawn drops its input
                await self._frame()
            sent = [self._post(method, **params) for method, params in events]
            await self._frame()
            patience, most = INPUT_PATIENCE
            while not all(future.done() for future in sent):  # a wheel or a moved mouse can need a second frame
                await asyncio.wait(sent, timeout=patience)
                await self._frame()
                patience = min(2 * patience, most)
            for future in sent:
                future.result()

    def _settle_loads(self, loaders: set[str]) -> None:
        """Wake who waits for these documents: they have loaded, or another one has taken their place."""
        for loader in loaders & self._awaited_loads.keys():
            future = self._awaited_loads[loader]
            if not future.done():
                future.set_result(None)

    def _allowed(self, url: str) -> bool:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("data", "about", "blob"):
            return True
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            return False
        try:
            path = Path(urllib.parse.unquote(parts.path)).resolve()
        except (OSError, ValueError):
            return False
        return any(path.is_relative_to(root) for root in self._roots)

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.lifecycleEvent":
            if params["name"] == "load" and params["frameId"] == self._target:
                self._loads.append(params["loaderId"])
                self._settle_loads({params["loaderId"]})
        elif method == "Page.frameNavigated":
            if params["frame"]["id"] == self._target:
                self._inked, self._world = False, None
                self._settle_loads(self._awaited_loads.keys() - {params["frame"]["loaderId"]})
        elif method == "Fetch.requestPaused":
            url = params["request"]["url"]
            if self._allowed(url):
                self._post("Fetch.continueRequest", requestId=params["requestId"])
            else:
                self.refused.append(url)
                self._post("Fetch.failRequest", requestId=params["requestId"], errorReason="AccessDenied")
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append((params["type"], params["message"]))
            accept = params["type"] in ("alert", "beforeunload")
            self._post("Page.handleJavaScriptDialog", accept=accept)
        elif method in ("Inspector.targetCrashed", "Inspector.detached"):
            self.broken = True
            self._browser.connection.detach(self._session, "the page's renderer is gone")


def _check_size(browser: Chromium, width: int, height: int, scale: float = 1.0) -> None:
    if min(width, height) < browser.least or width * height * scale**2 > MAX_PIXELS:
        raise ValueError(
            f"page of {width}x{height} pixels: this browser draws sides from {browser.least} pixels and up to "
            f"{MAX_PIXELS} pixels in all"
        )
