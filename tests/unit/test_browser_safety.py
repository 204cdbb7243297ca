"""What a page may not do: reach a network or the disk, hang its caller, or outlive it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from mmagent.browser import BrowserCrashed, BrowserError, BrowserPool, BrowserTimeout, run_sync
from mmagent.browser.process import sweep

pytestmark = pytest.mark.browser


@contextlib.contextmanager
def listener():
    """A local server that accepts every connection and only counts them: ``yield port, connections``."""
    server = socket.create_server(("127.0.0.1", 0))
    seen: list[str] = []

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            seen.append(connection.recv(200).decode(errors="replace"))
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1], seen
    finally:
        server.close()


REACHING = {
    "img": "<img src='http://127.0.0.1:PORT/img'>",
    "localhost": "<img src='http://localhost:PORT/img'>",
    "stylesheet": "<link rel=stylesheet href='http://127.0.0.1:PORT/css'><style>@import 'http://127.0.0.1:PORT/i';</style>",
    "font": "<style>@font-face{font-family:x;src:url(http://127.0.0.1:PORT/f)} p{font-family:x}</style><p>text",
    "script": "<script src='http://127.0.0.1:PORT/js'></script>",
    "fetch": "<script>fetch('http://127.0.0.1:PORT/fetch', {mode: 'no-cors'}).catch(() => 0)</script>",
    "beacon": "<script>navigator.sendBeacon('http://127.0.0.1:PORT/beacon', 'x')</script>",
    "websocket": "<script>new WebSocket('ws://127.0.0.1:PORT/ws')</script>",
    "eventsource": "<script>new EventSource('http://127.0.0.1:PORT/es')</script>",
    "iframe": "<iframe src='http://127.0.0.1:PORT/frame'></iframe>",
    "object": "<object data='http://127.0.0.1:PORT/object'></object><embed src='http://127.0.0.1:PORT/embed'>",
    "refresh": "<meta http-equiv=refresh content='0;url=http://127.0.0.1:PORT/refresh'>",
    "open": "<script>window.open('http://127.0.0.1:PORT/open')</script>",
    "location": "<script>setTimeout(() => location = 'http://127.0.0.1:PORT/location', 1)</script>",
    "form": "<form action='http://127.0.0.1:PORT/form' method=post></form><script>document.forms[0].submit()</script>",
    "worker": """<script>new Worker(URL.createObjectURL(new Blob(["fetch('http://127.0.0.1:PORT/worker')"])))</script>""",
    "hints": "<link rel=preconnect href='http://127.0.0.1:PORT'><link rel=prefetch href='http://127.0.0.1:PORT/pre'>",
    "rtc": """<script>const c = new RTCPeerConnection({iceServers: [{urls: 'turn:127.0.0.1:PORT?transport=tcp',
        username: 'u', credential: 'c'}]}); c.createDataChannel('x');
        c.createOffer().then(o => c.setLocalDescription(o))
        </script>""",
}


@pytest.mark.parametrize("by", ["content", "file"])
def test_no_page_reaches_the_network(browser_pool, tmp_path, by):
    async def visit(name, html):
        async with browser_pool.page(120, 120) as page:
            if by == "content":
                await page.set_content(html)
            else:
                file = tmp_path / f"{name}.html"
                file.write_text(html)
                await page.goto(file)
            await page.wait(0.15)

    async def run(port):
        await asyncio.gather(*(visit(name, html.replace("PORT", str(port))) for name, html in REACHING.items()))

    with listener() as (port, seen):
        run_sync(run(port))
        assert seen == []
        socket.create_connection(("127.0.0.1", port)).close()  # the server would have noticed
        for _ in range(100):
            if seen:
                break
            time.sleep(0.01)
        assert len(seen) == 1


def test_files_outside_the_roots_stay_closed(browser_pool, tmp_path):
    outside = Path(tempfile.mkdtemp()) / "secret.html"
    outside.write_text("<body style='background:red'>secret")
    (tmp_path / "link.html").symlink_to(outside)
    (tmp_path / "inside.html").write_text("<body style='background:lime'>inside")
    frames = [outside.as_uri(), "link.html", f"../{'../' * 12}{outside}", f"file://localhost{outside}", "/etc/passwd"]
    holder = tmp_path / "holder.html"
    holder.write_text("".join(f"<iframe src='{src}' width=20 height=20></iframe>" for src in frames))
    jump = tmp_path / "jump.html"
    jump.write_text(f"<script>location = '{outside.as_uri()}'</script>")

    async def run():
        async with browser_pool.page(200, 200) as page:
            for place in (
                outside,
                tmp_path / "link.html",
                outside.as_uri(),
                "/etc/passwd",
                "http://example.org/",
                "x:y",
            ):
                with pytest.raises(ValueError, match="only data:, about: and files under"):
                    await page.goto(place)
            with pytest.raises(BrowserError, match="ERR_FILE_NOT_FOUND"):
                await page.goto(tmp_path / "absent.html")
            await page.goto(holder)
            await page.wait(0.1)
            image = await page.screenshot()
            assert not ((image[..., 0] > 200) & (image[..., 1] < 50)).any()
            assert len(page.refused) == len(frames)
            await page.goto(jump)
            await page.wait(0.1)
            assert not (await page.screenshot() == (255, 0, 0)).all(axis=-1).any()
            await page.set_content(f"<iframe src='{(tmp_path / 'inside.html').as_uri()}'></iframe>")
            await page.wait(0.05)
            image = await page.screenshot()  # content that was handed in may not even read the roots
            assert not (image == (0, 255, 0)).all(axis=-1).any()
            await page.goto(tmp_path / "inside.html")
            assert (await page.screenshot() == (0, 255, 0)).all(axis=-1).mean() > 0.9

    run_sync(run())


HANGING = {
    "script": "<script>while (true);</script>",
    "frame": "<script>requestAnimationFrame(() => { while (true); })</script>",
    "timer": "<script>setTimeout(() => { while (true); }, 0)</script>",
    "dialogs": "<script>while (true) alert('again')</script>",
    "regexp": "<script>/(a+)+$/.test('a'.repeat(60) + 'b')</script>",
    "click": "<body onclick='while (true);'>",
}


@pytest.mark.parametrize("name", HANGING)
def test_a_page_that_hangs_costs_its_caller_only_the_time_limit(browser_pool, name):
    async def bystander(stop):
        async with browser_pool.page(120, 120) as page:
            while not stop.is_set():
                await page.set_content("<p>calm</p>")
                await page.screenshot()

    async def provoke(page):
        await page.set_content(HANGING[name])
        await page.wait(0.1)
        await page.click(10, 10)

    async def run():
        stop = asyncio.Event()
        calm = asyncio.create_task(bystander(stop))
        before = browser_pool.stats.broken
        start = time.monotonic()
        async with browser_pool.page(120, 120, time_limit=0.5) as page:
            with pytest.raises(BrowserTimeout, match=r"took longer than 0\.5 s"):
                await provoke(page)
            with pytest.raises(BrowserCrashed, match="broken before"):
                await page.screenshot()
        assert time.monotonic() - start < 5
        assert browser_pool.stats.broken == before + 1
        stop.set()
        await calm
        async with browser_pool.page(120, 120) as page:
            assert await page.evaluate("6 * 7") == 42

    run_sync(run())


def test_dialogs_are_answered_and_kept(browser_pool):
    async def run():
        async with browser_pool.page(120, 120) as page:
            await page.set_content("<script>alert('a'); window.answers = [confirm('b'), prompt('c')]</script>")
            return list(page.dialogs), await page.evaluate("answers")

    assert run_sync(run()) == ([("alert", "a"), ("confirm", "b"), ("prompt", "c")], [False, None])


def test_a_huge_document_is_cut_off_or_rendered_but_never_hangs(browser_pool):
    async def run():
        async with browser_pool.page(200, 200, time_limit=2) as page:
            with contextlib.suppress(BrowserTimeout):
                await page.set_content("<div>" * 200_000 + "<p>deep")
                await page.screenshot()
        async with browser_pool.page(120, 120) as page:
            assert await page.evaluate("1") == 1

    start = time.monotonic()
    run_sync(run())
    assert time.monotonic() - start < 15


def descendants(pid: int) -> set[int]:
    out, found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout, {pid}
    pairs = [tuple(map(int, line.split())) for line in out.splitlines()[1:]]
    for _ in range(10):
        found |= {child for child, parent in pairs if parent in found}
    return found - {pid}


def gone(pids: set[int], patience: float = 10.0) -> bool:
    """True once none of ``pids`` exists, not even as a zombie."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


async def use_for_ever(page):
    while True:
        await page.screenshot()


def browser_of(supervisor: int) -> int:
    """The main process of the browser under ``supervisor``."""
    return int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")
def test_a_killed_browser_is_replaced_and_counted_and_nothing_is_left():
    async def run():
        before = set(Path(tempfile.gettempdir()).glob("mmagent-browser-*"))
        async with BrowserPool() as pool:
            supervisor = pool._slots[0].supervisor.pid
            everyone = descendants(supervisor) | {supervisor}
            assert len(everyone) > 2
            async with pool.page(120, 120) as page:
                os.kill(browser_of(supervisor), signal.SIGKILL)
                with pytest.raises(BrowserCrashed):
                    await use_for_ever(page)
            async with pool.page(120, 120) as page:
                assert await page.evaluate("2") == 2
            assert (pool.stats.started, pool.stats.crashed, pool.stats.broken) == (2, 1, 1)
            assert gone(everyone)
            supervisor = pool._slots[0].supervisor.pid
            directory = pool._slots[0].directory
            everyone = descendants(supervisor) | {supervisor}
            assert directory.exists()
            assert directory not in before
        assert gone(everyone)
        assert not directory.exists()

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_frozen_browser_is_replaced():
    async def run():
        async with BrowserPool(time_limit=0.5) as pool:
            supervisor = pool._slots[0].supervisor.pid
            async with pool.page(120, 120) as page:
                os.kill(browser_of(supervisor), signal.SIGSTOP)
                with pytest.raises(BrowserTimeout):
                    await use_for_ever(page)
            async with pool.page(120, 120) as page:
                assert await page.evaluate("2") == 2
            assert (pool.stats.started, pool.stats.retired, pool.stats.broken) == (2, 1, 1)
            assert gone({supervisor})

    asyncio.run(run())


def test_cancelled_work_gives_its_page_back(browser_pool):
    async def work():
        async with browser_pool.page(120, 120) as page:
            await page.wait(30)

    async def run():
        before = [browser.pages for browser in browser_pool._slots if browser]
        for patience in (0.0, 0.001, 0.01, 0.03, 0.1):
            task = asyncio.create_task(work())
            await asyncio.sleep(patience)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.sleep(0.5)
        assert [browser.pages for browser in browser_pool._slots if browser] == before
        targets = (await browser_pool._slots[0].send("Target.getTargets"))["targetInfos"]
        assert len([target for target in targets if target["type"] == "page"]) <= 1 + sum(before)

    run_sync(run())


def test_a_crashed_renderer_breaks_its_page_only(browser_pool):
    async def run():
        async with browser_pool.page(120, 120) as calm:
            await calm.set_content("<p>calm")
            async with browser_pool.page(120, 120) as page:
                await page.set_content("<p>x")
                page._post("Page.crash")
                with pytest.raises(BrowserCrashed):
                    await use_for_ever(page)
            assert (await calm.screenshot()).shape == (120, 120, 3)

    run_sync(run())


ORPHAN = """
import asyncio, sys
from mmagent.browser import BrowserPool
async def run():
    pool = BrowserPool()
    await pool.start()
    print(pool._slots[0].supervisor.pid, pool._slots[0].directory, flush=True)
    await asyncio.sleep(60)
asyncio.run(run())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")
@pytest.mark.parametrize("kill", ["owner", "supervisor"])
def test_nothing_survives_a_kill(kill):
    owner = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    supervisor, directory = owner.stdout.readline().split()
    everyone = descendants(int(supervisor))
    assert len(everyone) > 1
    assert Path(directory) not in sweep(least_age=0)
    if kill == "owner":
        owner.kill()
        assert gone(everyone | {int(supervisor)})
        assert not Path(directory).exists()
    else:
        os.kill(int(supervisor), signal.SIGKILL)
        assert owner.poll() is None
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(is_running(pid) for pid in everyone):
            time.sleep(0.02)
        assert not any(is_running(pid) for pid in everyone)
        owner.kill()
        assert Path(directory) in sweep(least_age=0)
        assert not Path(directory).exists()
    owner.wait()


def is_running(pid: int) -> bool:
    """Exists and is no zombie: orphans of a killed supervisor wait for init, which a container may lack."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_processes_are_recycled_when_idle():
    async def run():
        async with BrowserPool(recycle=3) as pool:
            for _ in range(7):
                async with pool.page(120, 120) as page:
                    await page.set_content("<p>")
            return pool.stats

    stats = asyncio.run(run())
    assert (stats.pages, stats.started, stats.retired, stats.crashed) == (7, 3, 2, 0)
