"""The browser as a tool: content, pixels, script, input, keys."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from mmagent.actions import KEYS, MODIFIERS
from mmagent.browser import BrowserError, BrowserMissing, BrowserPool, ScriptError, find_chromium, run_sync
from mmagent.browser.find import require_chromium
from mmagent.browser.keys import character, parse_keys

needs_browser = pytest.mark.browser

FORM = """<body style="margin:0;background:#fff"><input id=i style="position:absolute;left:10px;top:10px;width:200px">
<div id=box style="position:absolute;left:20px;top:60px;width:50px;height:40px;background:rgb(10,200,30)"></div>
<script>window.log=[]; for (const kind of ['mousedown','mouseup','click','dblclick','contextmenu','keydown','wheel'])
document.addEventListener(kind, e => log.push([kind, e.button ?? null, e.key ?? null, e.clientX ?? null, e.ctrlKey]));
document.addEventListener('mousemove', e => { if (e.buttons) log.push(['drag', e.clientX, e.clientY]); });
</script>"""


def on_page(pool, work, width=240, height=120, **options):
    async def run():
        async with pool.page(width, height, **options) as page:
            return await work(page)

    return run_sync(run())


def test_chromium_is_found_by_variable(monkeypatch, tmp_path):
    binary = tmp_path / "mine"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("MMAGENT_CHROMIUM", str(binary))
    assert find_chromium() == binary
    monkeypatch.setenv("MMAGENT_CHROMIUM", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="MMAGENT_CHROMIUM"):
        find_chromium()


def test_a_missing_chromium_says_how_to_install_one(monkeypatch):
    monkeypatch.delenv("MMAGENT_CHROMIUM", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_chromium() is None
    with pytest.raises(BrowserMissing, match="apt-get install"):
        require_chromium()


def test_a_binary_that_is_no_browser_is_one_clear_error(tmp_path):
    binary = tmp_path / "broken"
    binary.write_text("#!/bin/sh\necho cannot open display >&2\nexit 3\n")
    binary.chmod(0o755)

    async def start():
        async with BrowserPool(binary=binary, start_limit=5):
            pass

    with pytest.raises(BrowserError, match="cannot open display"):
        asyncio.run(start())


@needs_browser
def test_pixels_are_those_of_the_page(browser_pool):
    async def work(page):
        await page.set_content(FORM)
        return await page.screenshot()

    image = on_page(browser_pool, work)
    assert image.shape == (120, 240, 3)
    assert image.dtype == np.uint8
    assert (image[60:100, 20:70] == (10, 200, 30)).all()
    assert (image[59, 20:70] == 255).all()
    again = on_page(browser_pool, work)
    assert (image == again).all()


@needs_browser
def test_full_page_and_resize(browser_pool):
    async def work(page):
        with pytest.raises(ValueError, match="page of 0x9 pixels"):
            await page.resize(0, 9)
        await page.set_content("<body style='margin:0'><div style='height:700px'></div><p style='margin:0'>end")
        small, full = await page.screenshot(), await page.screenshot(full_page=True)
        clipped = await page.screenshot(full_page=True, max_height=300)
        await page.resize(100, 110)
        return small.shape, full.shape, clipped.shape, (await page.screenshot()).shape

    small, full, clipped, resized = on_page(browser_pool, work, hide_scrollbars=True)
    assert small == (120, 240, 3)
    assert full[1] == 240
    assert 700 < full[0] < 740
    assert clipped == (300, 240, 3)
    assert resized == (110, 100, 3)


@needs_browser
def test_a_page_is_drawn_at_the_density_that_it_is_given(browser_pool):
    async def work(page):
        with pytest.raises(ValueError, match=r"scale 0.5 is not in 1..4"):
            await page.resize(240, 120, 0.5)
        await page.set_content("<body style='margin:0'><div style='height:700px;background:#00f'></div>")
        shapes = []
        await page.resize(160, 80, 1.5)  # as many pixels of the image as before
        assert (await page.screenshot()).shape == (120, 240, 3)
        for scale in (2, 1.25, 1):
            await page.resize(240, 120, scale)
            seen = await page.evaluate("[innerWidth, innerHeight, devicePixelRatio]")
            full = await page.screenshot(full_page=True, max_height=300)
            shapes.append((seen, (await page.screenshot()).shape[:2], full.shape[:2]))
            await page.evaluate("addEventListener('mousedown', e => { globalThis.hit = [e.clientX, e.clientY]; })")
            await page.click(200, 100)  # input is in CSS pixels at any
            assert await page.evaluate("hit") == [200, 100]
            await page.scroll(200, 100, 0, 60)
            assert await page.evaluate("scrollY") == 60
            await page.scroll(200, 100, 0, -60)
        return shapes

    assert on_page(browser_pool, work, hide_scrollbars=True) == [
        ([240, 120, 2], (240, 480), (600, 480)),
        ([240, 120, 1.25], (150, 300), (375, 300)),
        ([240, 120, 1], (120, 240), (300, 240)),
    ]


@needs_browser
def test_evaluate_gives_json_values_and_names_errors(browser_pool):
    async def work(page):
        await page.set_content("<p id=p>text</p>")
        assert await page.evaluate("1 + 1") == 2
        assert await page.evaluate("(a, b) => ({sum: a + b.x, text: 'é'})", 1, {"x": 2}) == {"sum": 3, "text": "é"}
        assert await page.evaluate("undefined") is None
        assert await page.evaluate("1 / 0") == float("inf")
        assert await page.evaluate("Promise.resolve([1, null])") == [1, None]
        with pytest.raises(ScriptError, match="no such thing"):
            await page.evaluate("(() => { throw new Error('no such thing') })()")
        await page.evaluate("JSON.parse = Array.prototype.map = document.querySelector = null")
        assert await page.evaluate("[1].map(x => document.querySelector('p').textContent)", isolated=True) == ["text"]

    on_page(browser_pool, work)


@needs_browser
def test_fresh_content_shares_nothing_with_what_stood_there(browser_pool):
    async def work(page):
        await page.set_content("<script>window.mine = 1; setInterval(() => document.title = 'spoilt', 1)</script>")
        await page.set_content("<p>other</p>")
        await page.wait(0.05)
        return await page.evaluate("[window.mine ?? null, document.title]")

    assert on_page(browser_pool, work) == [None, ""]


@needs_browser
def test_content_waits_for_its_images_and_runs_its_scripts(browser_pool):
    svg = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='7'><rect width='9' height='7' fill='red'/></svg>"

    async def work(page):
        await page.set_content(f'<img src="data:image/svg+xml,{svg}"><script>document.title = "ran"</script>')
        return await page.evaluate("[document.images[0].naturalWidth, document.title]")

    assert on_page(browser_pool, work) == [9, "ran"]
    assert on_page(browser_pool, work, scripts=False) == [9, ""]


@needs_browser
def test_mouse_events_are_those_of_a_person(browser_pool):
    async def work(page):
        await page.set_content(FORM)
        await page.click(30, 70)
        await page.double_click(31, 70)
        await page.right_click(32, 70)
        await page.drag(30, 70, 110, 70, steps=4)
        await page.scroll(30, 70, 0, 40)
        return await page.evaluate("log")

    log = on_page(browser_pool, work)
    kinds = [entry[0] for entry in log]
    assert kinds[:3] == ["mousedown", "mouseup", "click"]
    assert log[2][3] == 30
    assert kinds.count("dblclick") == 1
    assert kinds.count("contextmenu") == 1
    assert [entry[1:] for entry in log if entry[0] == "drag"] == [[50, 70], [70, 70], [90, 70], [110, 70]]
    assert kinds[-1] == "wheel"


@needs_browser
def test_typing_and_keys(browser_pool):
    async def work(page):
        await page.set_content(FORM)
        await page.click(50, 20)
        await page.type_text('Hello, "Wörld" 你好 {1}!')
        typed = await page.evaluate("i.value")
        await page.press("ctrl+a")
        await page.press("ctrl+x")
        empty = await page.evaluate("i.value")
        await page.press("ctrl+v")
        await page.press("Backspace")
        await page.press("Home")
        await page.press("Delete")
        return typed, empty, await page.evaluate("i.value"), await page.evaluate("log.map(e => e[2]).filter(x => x)")

    typed, empty, edited, keys = on_page(browser_pool, work)
    assert typed == 'Hello, "Wörld" 你好 {1}!'
    assert empty == ""
    assert edited == 'ello, "Wörld" 你好 {1}'
    assert keys[:5] == list("Hello")
    assert keys[-3:] == ["Backspace", "Home", "Delete"]


@needs_browser
def test_many_pages_at_once_keep_their_own_content(browser_pool):
    async def one(number):
        async with browser_pool.page(120, 120) as page:
            for shade in range(number, number + 5):
                await page.set_content(f"<body style='background:rgb({shade},0,0)'>")
                assert (await page.screenshot() == (shade, 0, 0)).all()

    async def run():
        await asyncio.gather(*(one(20 * number) for number in range(8)))

    run_sync(run())


@needs_browser
def test_a_browser_that_draws_by_itself_gives_the_same_pixels(browser_pool):
    async def work(page):
        await page.set_content(FORM)
        await page.click(50, 20)
        await page.type_text("abc")
        await page.evaluate("i.blur()")
        assert await page.evaluate("i.value") == "abc"
        return await page.screenshot()

    async def ordinary():
        async with BrowserPool(begin_frame=False) as pool, pool.page(240, 120) as page:
            return await work(page)

    assert (asyncio.run(ordinary()) == on_page(browser_pool, work)).all()


@needs_browser
def test_a_pool_refuses_foreign_loops_and_use_before_start(browser_pool):
    async def use(pool):
        async with pool.page(120, 120):
            pass

    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(use(browser_pool))
    with pytest.raises(RuntimeError, match="not started"):
        asyncio.run(use(BrowserPool()))
    with pytest.raises(ValueError, match="at least 1"):
        BrowserPool(processes=0)


def test_the_keyboard_has_every_key_of_the_action_space():
    for key in (*KEYS, *(chr(code) for code in range(33, 127))):
        assert parse_keys(key).events()
        for modifier in MODIFIERS:
            assert parse_keys(f"{modifier}+{key}").modifiers


def test_key_names():
    assert parse_keys("Enter").text == "\r"
    assert parse_keys("return") == parse_keys("ENTER")
    assert parse_keys("ctrl+shift+Left").modifiers == 10
    assert parse_keys("ctrl++").key == "+"
    assert parse_keys("+").key == "+"
    assert character("A").modifiers == 8
    assert character("你") is None
    for wrong in ("", "ctrl", "hyper+a", "Enterr", "ctrl+", "ab"):
        with pytest.raises(ValueError):
            parse_keys(wrong)
