"""Data cards: what they count, and that nothing a sample says can run, or reach out of the page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.cards import script_of, summarise, write_card_page
from data_pipelines.record_view import figure, inline, inline_shots, record_view
from data_pipelines.shards import ShardSet, ShardWriter
from mmagent.browser import run_sync
from mmagent.chat import Box, Image, Text, Thinking, ToolCall, Video, assistant, observation, user
from mmagent.records import Record, Region, encode_image
from tests.unit.test_signatures import screen

RUN = "document.title='owned'"
HOSTILE = f'<script>{RUN}</script>"\'><img src=x onerror="{RUN}">{{0}}{{}}</svg>&amp;\u202e'


def hostile(n: int) -> Record:
    """A record whose every field is an attack."""
    image = encode_image(screen(n, side=(120, 90)))
    talk = (
        user(Image(), Video((0.0, 1.5)), Text(HOSTILE)),
        assistant(Thinking(HOSTILE), HOSTILE, Box(HOSTILE), ToolCall("f" + HOSTILE, {HOSTILE: HOSTILE})),
        observation(HOSTILE),
        assistant(HOSTILE, trainable=False),
    )
    boxes = (Region(0, (10.0, 10.0, 60.0, 40.0), HOSTILE), Region(2, (1.0, 1.0, 5.0, 5.0)))
    points = (Region(0, (50.0, 50.0), HOSTILE),)
    name = f"k{n}-<script>alert(1)<#script>"
    return Record(name, HOSTILE, talk, (), (image,) * 3, HOSTILE, HOSTILE, boxes, points)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "set"
    with ShardWriter(folder) as writer:
        for n in range(3):
            writer.write(hostile(n))
        writer.write(Record("plain", "text", parts=(Text("点击提交按钮，然后输入你的姓名。"),)))
    return folder


def test_a_summary_counts(shards):
    summary = summarise(ShardSet(shards))
    assert (summary.samples, summary.images, summary.total) == (4, 9, 0)
    assert summary.sources == {HOSTILE: 3, "text": 1}
    assert summary.shown == {2: 3, 0: 1}
    assert summary.sides == {64: 9}
    assert summary.aspects == {"lying": 9}
    assert sum(summary.answers.values()) == 6
    assert summary.scripts["Han"] == 1


def test_writing_is_told_by_its_letters():
    assert script_of("click 点击提交按钮") == "Han"
    assert script_of("3 + 4") == "(none)"
    assert script_of("Привет, OK") == "Cyrillic"


def test_figures_keep_their_pixels_and_regions():
    shot = inline(np.zeros((600, 1200, 3), np.uint8), longest=300)
    assert (shot.width, shot.height) == (1200, 600)
    drawn = figure(shot, [Region(0, (10.0, 20.0, 30.0, 50.0), "a & b"), Region(0, (7.0, 8.0))])
    assert 'viewBox="0 0 1200 600"' in drawn
    assert 'x="10.0" y="20.0" width="20.0" height="30.0"' in drawn
    assert 'cx="7.0" cy="8.0"' in drawn
    assert "<title>a &amp; b</title>" in drawn


def test_labels_do_not_cover_a_small_picture():
    """It is enlarged, numbers stand on it, and the labels below; on a large one they stand themselves."""
    labels = 'button "Submit form"', "a & b, and more of it"
    boxes = [Region(0, (2.0, 10.0 * n, 20.0, 10.0 * n + 8), label) for n, label in enumerate(labels)]
    small = figure(inline(np.zeros((32, 32, 3), np.uint8)), boxes)
    assert "--wide: 192px" in small
    assert re.findall(r'<text class="label"[^>]*>(.*?)</text>', small) == ["1", "2"]
    assert "<ol><li>button &#34;Submit form&#34;</li><li>a &amp; b, and more of it</li></ol>" in small
    large = figure(inline(np.zeros((600, 600, 3), np.uint8)), boxes)
    assert re.findall(r'<text class="label"[^>]*>(.*?)</text>', large) == [
        "button &#34;Submit form&#34;",
        "a &amp; b, and more of it",
    ]
    assert "<ol>" not in large


def test_a_label_at_the_upper_edge_does_not_cover_its_box():
    shot = inline(np.zeros((600, 600, 3), np.uint8))
    drawn = figure(shot, [Region(0, (2.0, 2.0, 90.0, 12.0), "top"), Region(0, (2.0, 300.0, 90.0, 320.0), "low")])
    top, low = (float(y) for y in re.findall(r'<text class="label" x="[^"]*" y="([^"]*)"', drawn))
    assert top > 12 + 0.8 * float(re.search(r"font-size:([\d.]+)px", drawn)[1])
    assert low < 300


def test_a_tall_picture_fits_a_window():
    assert "--wide: 284px" in figure(inline(np.zeros((900, 400, 3), np.uint8)))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "columns"), [(1280, 3), (600, 1)])
def test_samples_stand_close_in_columns(tmp_path, browser_pool, width, columns):
    """One below another with the usual gap, however tall those beside them are."""
    with ShardWriter(tmp_path) as writer:
        for n in range(9):
            writer.write(Record(f"n{n}", "text", parts=(Text("words " * (1 + 60 * (n % 2) + 5 * n)),)))
    path = write_card_page(tmp_path, summarise(ShardSet(tmp_path)), {"source": "text"})

    async def look() -> list[list[float]]:
        async with browser_pool.page(width, 900) as page:
            await page.goto(path)
            await page.wait(0.3)
            return await page.evaluate(
                "[...document.querySelectorAll('article.sample')].map(a => a.getBoundingClientRect())"
                ".map(r => [r.left, r.top, r.bottom])"
            )

    boxes = run_sync(look())
    assert len({left for left, _, _ in boxes}) == columns
    assert [left for left, _, _ in boxes[:columns]] == sorted(left for left, _, _ in boxes[:columns])
    for above, below in zip(boxes, boxes[columns:], strict=False):
        assert above[0] == below[0]
        assert 15 <= below[1] - above[2] <= 21  # the gap of 16, up to the next row of 4


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_numbers_of_the_tables_stand_in_line(tmp_path, browser_pool, width):
    """Those of sources, tasks and formats, however long the names beside them are."""
    with ShardWriter(tmp_path) as writer:
        for n in range(3):
            image = encode_image(screen(n, side=(120, 90)))
            talk = (user(Image(), Text("What?")), assistant("That."))
            writer.write(Record(f"n{n}", "a source with a long name " * 4, talk, (), (image,), "t"))
    path = write_card_page(tmp_path, summarise(ShardSet(tmp_path)), {"source": "text"})

    async def look() -> list[list[float]]:
        async with browser_pool.page(width, 900) as page:
            await page.goto(path)
            await page.wait(0.2)
            return await page.evaluate(
                "[...document.querySelectorAll('#what-it-holds table')].map(t => [...t.tBodies[0].rows[0].cells]"
                ".slice(1).map(c => Math.round(c.getBoundingClientRect().right)))"
            )

    edges = run_sync(look())
    assert len(edges) == 3
    assert edges[0] == edges[1] == edges[2]
    assert max(edges[0]) <= width


def test_a_record_shows_what_is_trained(shards):
    view = record_view(hostile(0), inline_shots(hostile(0)), "here")
    assert view.count('<div class="turn trained">') == 1
    assert view.count("<img") == 3 == view.count('loading="lazy"')
    assert "<figcaption>1.5 s</figcaption>" in view


@pytest.mark.browser
def test_a_hostile_card_in_a_browser(shards, browser_pool):
    """It shows everything, runs nothing, loads nothing from elsewhere, and is not wider than the window."""
    path = write_card_page(
        shards, summarise(ShardSet(shards)), {"source": HOSTILE}, {HOSTILE: 2},
        [{"reason": HOSTILE, "key": HOSTILE, "problem": HOSTILE}],
    )  # fmt: skip
    told = path.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", told)
    assert path.stat().st_size < 2_000_000

    async def look() -> dict[str, object]:
        async with browser_pool.page(900, 700) as page:
            await page.goto(path)
            await page.wait(0.2)
            return {
                "title": await page.evaluate("document.title"),
                "loaded": await page.evaluate("performance.getEntriesByType('resource').map(e => e.name)"),
                "wide": await page.evaluate("document.documentElement.scrollWidth"),
                "samples": await page.evaluate("document.querySelectorAll('article.sample').length"),
                "scripts": await page.evaluate("document.scripts.length"),
                "said": await page.evaluate("document.querySelector('.said').textContent"),
                "pictures": await page.evaluate("[...document.images].filter(i => i.naturalWidth).length"),
            }

    seen = run_sync(look())
    assert seen["title"] == f"Data card: {HOSTILE}"
    assert (seen["loaded"], seen["scripts"], seen["samples"]) == ([], 1, 4)
    assert seen["said"] == HOSTILE
    assert seen["wide"] <= 900
    assert seen["pictures"] >= 3
