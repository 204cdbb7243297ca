"""The makers that need a browser: records that validate, are seeded, and whose actions earned their reward."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from data_pipelines import gui_pages, texts, web_pages
from data_pipelines.build import BuildConfig, build, debug, makers, texts_of
from data_pipelines.making import Maker
from data_pipelines.screens import ExpertEpisodes, ScreenQuestions
from data_pipelines.stream import PackStream, StreamConfig
from data_pipelines.web_pages import PageQuestions, PageSources, Tiles
from mmagent.actions import Click, parse_action
from mmagent.browser import BrowserPool, perform, run_sync
from mmagent.chat import Text
from mmagent.geometry import GeometryConfig
from mmagent.prompts import HTML_REQUEST
from mmagent.records import Record, decode_image, from_sample, to_sample
from mmagent.vocab import Vocab
from mmagent.worlds import images, miniwob
from mmagent.worlds.pages import Scene, render
from mmagent.worlds.pages.tiles import cut, tile_sheet
from mmagent.worlds.seeds import SPLITS

pytestmark = pytest.mark.browser
TASKS = ("click-button", "enter-text", "focus-text")


def make(pool: BrowserPool, maker: Maker, number: int) -> Sequence[Record]:
    async def run() -> Sequence[Record]:
        async with pool.page(*maker.screen) as page:
            return await maker.make(number, page)

    return run_sync(run())


@pytest.mark.parametrize(
    "maker",
    [
        ScreenQuestions(TASKS, seed=1, block=3),
        ExpertEpisodes(TASKS, seed=1, block=3),
        PageQuestions(seed=1, block=3),
        PageQuestions(seed=1, name="clicks", weights={"locate": 1.0}, block=3),
        PageSources(seed=1, block=3),
        Tiles(seed=1),
    ],
    ids=lambda maker: maker.name,
)
def test_blocks_are_seeded_valid_and_teach(browser_pool, maker):
    records = make(browser_pool, maker, 4)
    assert records == make(browser_pool, maker, 4)
    assert [r.key for r in records] != [r.key for r in make(browser_pool, maker, 5)]
    assert len({r.key for r in records}) == maker.block
    for record in records:
        assert from_sample(to_sample(record)) == record
        assert record.source == maker.name
        assert record.messages[0].role == "user"
        assert record.messages[-1].role == "assistant"
        for n, image in enumerate(record.images):
            assert decode_image(image.data, record.key, f"images[{n}]").shape[2] == 3


def test_tiles_are_screens_of_their_own(browser_pool):
    """Boxes lie within their tile and on ink, clicks within their boxes."""
    records = make(browser_pool, Tiles(seed=2, questions=9, weights={"locate": 1.0}), 0)
    clicked = 0
    for record in records:
        image = decode_image(record.images[0].data, record.key)
        assert image.shape == (210, 160, 3)
        assert record.boxes
        for region in record.boxes:
            x1, y1, x2, y2 = map(int, region.coordinates)
            assert 0 <= x1 < x2 <= 160
            assert 0 <= y1 < y2 <= 210
            assert np.ptp(image[y1:y2, x1:x2].astype(int), axis=(0, 1)).max() > 30, (record.key, region)
        for message in record.messages[1::2]:
            action = parse_action(message.parts[0].text)
            assert isinstance(action, Click)
            x, y = action.x * 0.16, action.y * 0.21
            inside = [r for r in record.boxes if r.coordinates[0] - 1 <= x <= r.coordinates[2] + 1]
            assert any(r.coordinates[1] - 1 <= y <= r.coordinates[3] + 1 for r in inside), (record.key, action)
            clicked += 1
    assert clicked >= len(records)
    asked = {message.parts[-1].text for record in records for message in record.messages[::2]}
    assert any(text.count('"') == 0 for text in asked), "a control that is alone needs no name"


def test_no_control_of_a_sheet_is_lost_when_it_is_cut(browser_pool):
    """What is drawn in a tile belongs to its truth: a button that is not told of would be taught as ground."""
    columns, rows, width, height = 4, 4, 160, 210

    async def sheet(seed: int) -> Scene:
        async with browser_pool.page(columns * width, rows * height) as page:
            html = tile_sheet(seed, columns, rows, width, height)
            return await render(page, html, columns * width, rows * height, trusted=True)

    for seed in range(12):
        scene = run_sync(sheet(seed))
        drawn = Counter()
        for tag, role in (("<button", "button"), ("<a ", "link"), ("<select", "combobox"), ("<span", "text")):
            drawn[role] = scene.html.count(tag)
        drawn["checkbox"], drawn["radio"] = scene.html.count('type="checkbox"'), scene.html.count('type="radio"')
        drawn["textbox"] = scene.html.count("<input aria-label")
        found = Counter(e.role for tile in cut(scene, columns, rows) for e in tile.elements)
        assert {role: found[role] for role in drawn} == drawn


def test_an_image_is_stored_once_for_all_its_questions(browser_pool):
    for record in make(browser_pool, ScreenQuestions(TASKS, seed=2, questions=6, block=4), 0):
        assert len(record.images) == 1
        assert 4 <= len(record.messages) <= 12


def test_episodes_show_a_screen_for_every_action_and_replay_to_their_reward(browser_pool):
    records = make(browser_pool, ExpertEpisodes(TASKS, seed=1, block=2), 1)

    async def replay(record: Record, index: int) -> tuple[bool, float]:
        async with browser_pool.page(miniwob.WIDTH, miniwob.HEIGHT) as page:
            screen = await miniwob.start(page, record.task, miniwob.seed_for("train", index * 10))
            assert record.messages[0].parts[-1] == Text(screen.utterance)
            for message in record.messages[1::2]:
                await perform(page, parse_action(message.parts[0].text), miniwob.VIEW)
            return await miniwob.state(page)

    for index, record in enumerate(records):
        assert record.task == "enter-text"
        assert len(record.images) == len(record.messages) // 2
        assert run_sync(replay(record, index)) == (True, 1.0)


def test_clicks_are_actions_and_html_is_asked_for_as_in_evaluation(browser_pool):
    for record in make(browser_pool, PageQuestions(0, "clicks", weights={"locate": 1.0}, block=2), 0):
        assert all(isinstance(parse_action(m.parts[0].text), Click) for m in record.messages[1::2])
    for record in make(browser_pool, PageSources(0, longest=900, block=2), 0):
        request, html = texts_of(record)
        assert request == HTML_REQUEST
        assert html.startswith("<!DOCTYPE html>")
        assert len(html) <= 900


def test_the_two_stages_do_not_share_pages(browser_pool):
    config = BuildConfig()
    first, second = (next(m for m in makers(config)[stage] if m.name == "html") for stage in ("pretrain", "sft"))
    shown = [record.images[0].data for maker in (first, second) for record in make(browser_pool, maker, 0)]
    assert len(set(shown)) == len(shown)


def test_held_out_seeds_are_nobody_elses(browser_pool, monkeypatch):
    """Neither a training stage nor an evaluation asks a world for what validation shows."""
    asked: dict[str, set[tuple[object, ...]]] = {}  # the last is of the stage at hand

    def spy(module: object, name: str, key: Callable[..., tuple[object, ...]]) -> None:
        real = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            next(reversed(asked.values())).add((name, *key(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    spy(miniwob, "start", lambda page, task, seed: (task, seed))
    for module in (web_pages, texts):
        spy(module, "generate", lambda seed, *size: (seed,))
    spy(gui_pages, "generate", lambda seed, *size: (seed,))
    spy(gui_pages, "generate_app", lambda seed, *size: (seed,))
    spy(web_pages, "tile_sheet", lambda seed, *size: (seed,))
    spy(images, "draw_scene", lambda seed, split: (split, seed))
    spy(images, "draw_panel", lambda seed, split: (split, seed))
    spy(images, "crop_photo", lambda seed, kind, split: (split, kind, seed))
    config = BuildConfig(tasks=list(TASKS), validation={"captions": 20, "interleaved": 20})
    for stage, known in makers(config).items():
        asked[stage] = set()
        for maker in known:
            if maker.screen is None:
                asyncio.run(maker.make(0, None))
            else:
                maker.block = maker.block if maker.name == "tiles" else 2  # a few will do
                make(browser_pool, maker, 0)
    held_out = asked["validation"]
    worlds = {"start", "generate", "generate_app", "tile_sheet", "draw_scene", "draw_panel", "crop_photo"}
    assert {name for name, *_ in held_out} == worlds
    assert not held_out & (asked["pretrain"] | asked["sft"])
    for name, *rest in held_out:
        if name in ("start", "generate", "generate_app"):
            assert rest[-1] % len(SPLITS) == SPLITS.index("validation")
        elif name == "tile_sheet":
            assert rest[0] >= 1 << 40
        else:
            assert rest[0] == "validation"
    for name, *rest in asked["pretrain"] | asked["sft"]:
        assert name not in ("start", "generate", "generate_app") or rest[-1] % len(SPLITS) == SPLITS.index("train")
        assert name != "tile_sheet" or rest[0] < 1 << 40
        assert not name.startswith(("draw", "crop")) or rest[0] == "train"


def test_few_held_out_screens_show_every_task(browser_pool):
    config = BuildConfig(tasks=list(TASKS), validation={"screens": 6})
    screens = next(maker for maker in makers(config)["validation"] if maker.name == "screens")
    shown = Counter(record.task for number in range(3) for record in make(browser_pool, screens, number))
    assert shown == dict.fromkeys(TASKS, 2)
    blocks = {f"{stage}/{maker.name}": maker.block for stage, known in makers(config).items() for maker in known}
    assert {blocks[f"pretrain/{name}"] for name in ("screens", "pages", "html", "captions", "interleaved")} == {20}
    assert {blocks[f"sft/{name}"] for name in ("episodes", "clicks", "html")} == {20}


@pytest.mark.slow
def test_a_whole_build_with_screens(browser_pool, tmp_path):
    """``browser_pool`` skips where there is no Chromium; the build brings its own."""
    config = debug()
    config.folder = str(tmp_path)
    for stage in (config.pretrain, config.sft, config.validation):
        stage.update({name: 2 if name in gui_pages.NAMES else 8 for name in stage})
    cards = build(config)
    assert len(cards) == len(config.pretrain) + len(config.sft) + len(config.validation)
    assert all(card["samples"] == (2 if name.split("/")[1] in gui_pages.NAMES else 8) for name, card in cards.items())
    assert cards["sft/episodes"]["images"] >= 8
    for stage in ("pretrain", "sft"):
        fills = []
        data = StreamConfig(folder=str(tmp_path / stage), prefetch=0)  # the default budgets
        with closing(PackStream(data, Vocab.load(tmp_path), GeometryConfig())) as packs:
            for _ in range(6):
                next(packs)
                fills.append(packs.metrics["data/fill"])
        assert sum(fills) / len(fills) >= 0.99


def test_experts_act_where_they_are_to_be_imitated():
    """All pages are shown, those without a demonstration too."""
    both = BuildConfig(tasks=["click-test", "click-tab"], demonstrated=["click-tab"])
    screens, episodes = makers(both)["pretrain"][0], makers(both)["sft"][0]
    assert screens.settings["tasks"] == ("click-test", "click-tab")
    assert episodes.settings["tasks"] == ("click-tab",)
    assert makers(BuildConfig(tasks=["click-test"]))["sft"][0].settings["tasks"] == ("click-test",)
    with pytest.raises(ValueError, match="demonstrated: 'click-link' is not among the tasks"):
        BuildConfig(tasks=["click-test"], demonstrated=["click-link"])


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="there is no expert for 'win-everything'"):
        BuildConfig(tasks=["click-test", "win-everything"])
