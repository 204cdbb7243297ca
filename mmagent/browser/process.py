"""One Chromium process: how it is started, what it may reach, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mmagent.browser.connection import Connection
from mmagent.browser.errors import BrowserError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
PREFIX, LOCK = "mmagent-browser-", "mmagent.lock"
SMALL_SHARED_MEMORY = 512 << 20

DISABLED_FEATURES = (
    "AcceptCHFrame,AutofillServerCommunication,BackForwardCache,DialMediaRouteProvider,MediaRouter,OptimizationHints,"
    "PaintHolding,ProactivelySwapBrowsingInstance,RasterInducingScroll,RenderDocument,SpareRendererForSitePerProcess,"
    "Translate"
)
"""Background services; the swaps of renderer at every navigation, which double its cost; and RasterInducingScroll,
with which a frame drawn on demand after a scroll can stay unfinished for ever."""

FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--block-new-web-contents",  # window.open and target=_blank open nothing
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-breakpad",
    "--disable-client-side-phishing-detection",
    "--disable-component-update",
    "--disable-crash-reporter",
    "--disable-default-apps",
    "--disable-extensions",
    f"--disable-features={DISABLED_FEATURES}",
    "--disable-gpu",
    "--disable-hang-monitor",
    "--disable-prompt-on-repost",
    "--disable-quic",
    "--disable-renderer-backgrounding",
    "--disable-smooth-scrolling",
    "--disable-sync",
    "--font-render-hinting=none",
    "--force-color-profile=srgb",
    "--force-device-scale-factor=1",
    "--js-flags=--max-old-space-size=1024",  # MiB that a page's scripts may take before the page is ended
    "--log-level=3",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-pings",
    "--password-store=basic",
    "--use-mock-keychain",
)
NO_NETWORK = (
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=http://127.0.0.1:9",  # discard: even a literal address leads nowhere
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--dns-prefetch-disable",
)
BEGIN_FRAME = (
    "--enable-begin-frame-control",
    "--run-all-compositor-stages-before-draw",
    "--disable-checker-imaging",
    "--disable-new-content-rendering-timeout",
    "--disable-partial-raster",  # round corners would depend on what was drawn before
    "--disable-threaded-animation",
    "--disable-threaded-scrolling",
)
FREE_RUNNING = ("--disable-backgrounding-occluded-windows", "--disable-frame-rate-limit", "--disable-gpu-vsync")

ORDINARY_LEAST = 100
"""An ordinary Chrome, unlike the headless shell, takes no screenshot of an emulated screen much smaller than this."""


@dataclass(eq=False)
class Chromium:
    """A running browser under its supervisor. ``drawing`` lets one page draw at a time.
    ``least``: pixels on a side of the smallest page it can draw."""

    connection: Connection
    supervisor: subprocess.Popen[bytes]
    directory: Path
    lifeline: int
    log: IO[bytes]
    begin_frame: bool
    least: int = 1
    pages: int = 0
    drawing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def alive(self) -> bool:
        return not self.connection.closed

    @classmethod
    async def launch(cls, binary: Path, *, begin_frame: bool, start_limit: float) -> Chromium:
        """Start ``binary`` and wait until it answers.

        Raises :class:`BrowserError` with the end of the browser's own error output if it does not within
        ``start_limit`` seconds.
        """
        directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the supervisor inherits it: a directory without it belongs to nobody
        command_read, command_write = os.pipe()
        event_read, event_write = os.pipe()
        lifeline_read, lifeline_write = os.pipe()
        theirs = (command_read, event_write, lifeline_read)
        log = tempfile.TemporaryFile(prefix="mmagent-browser-")  # noqa: SIM115 (the browser's, for as long as it runs)
        arguments = [str(binary), *flags(begin_frame), f"--user-data-dir={directory}", "about:blank"]
        try:
            supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), *map(str, theirs), str(directory), *arguments],
                pass_fds=(*theirs, lock),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        except OSError:
            for descriptor in (command_write, event_read, lifeline_write):
                os.close(descriptor)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            for descriptor in (*theirs, lock):
                os.close(descriptor)
        browser = cls(Connection(command_write, event_read), supervisor, directory, lifeline_write, log, begin_frame)
        try:
            async with asyncio.timeout(start_limit):
                version = await browser.connection.send("Browser.getVersion")
                if not version["product"].startswith("HeadlessChrome"):
                    browser.least = ORDINARY_LEAST
                await browser.connection.send("Browser.setDownloadBehavior", {"behavior": "deny"})
        except (BrowserError, TimeoutError) as error:
            said = browser.said()
            await browser.close()
            raise BrowserError(f"{binary} did not start within {start_limit:.0f} s: {said or error!r}") from error
        except BaseException:
            await browser.close()
            raise
        return browser

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        return await self.connection.send(method, params)

    def abandon(self) -> None:
        """Let go of a browser that hangs: every call on it fails, its supervisor ends it."""
        self.connection.close()
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

    async def close(self, patience: float = 10.0) -> None:
        """End the browser and all its processes, remove its directory. Safe to call again."""
        self.abandon()
        waited = 0.0
        while self.supervisor.poll() is None:
            if waited > patience:  # the supervisor itself is stuck; its death takes the browser along
                self.supervisor.kill()
            await asyncio.sleep(0.005)
            waited += 0.005
        self.log.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def said(self, lines: int = 5) -> str:
        """The end of what the browser wrote to its standard error."""
        written = os.pread(self.log.fileno(), 1 << 16, 0)  # seeking would move the browser's own position
        return " | ".join(written.decode(errors="replace").splitlines()[-lines:])


def sweep(least_age: float = 60.0) -> list[Path]:
    """Remove directories whose supervisor was killed before it could (out of memory, a job's end), and name them.

    ``least_age`` in seconds spares what is just being made.
    """
    removed = []
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, held by its supervisor, or just gone
            if time.time() - directory.stat().st_mtime < least_age:
                continue
            lock = os.open(directory / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
                removed.append(directory)
            finally:
                os.close(lock)
    return removed


def flags(begin_frame: bool) -> list[str]:
    """Command line of a browser that draws on demand (``begin_frame``) or by itself, and reaches no network."""
    chosen = [*FLAGS, *NO_NETWORK, *(BEGIN_FRAME if begin_frame else FREE_RUNNING)]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        chosen.append("--no-sandbox")  # Chromium refuses to build its sandbox for root
    with contextlib.suppress(OSError):
        shared = os.statvfs("/dev/shm")
        if shared.f_bavail * shared.f_frsize < SMALL_SHARED_MEMORY:  # containers often have 64 MiB: pages would crash
            chosen.append("--disable-dev-shm-usage")
    return chosen
