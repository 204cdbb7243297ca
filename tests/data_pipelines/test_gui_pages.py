"""The makers of pages and apps: seeded, valid, balanced; what did not come about is counted, too much is fatal."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from data_pipelines import build as build_module
from data_pipelines import gui_pages
from data_pipelines.build import build, debug
from data_pipelines.documents import DocumentBuilder
from data_pipelines.gui_pages import (
    ACTING,
    APP_SIDES,
    LARGE,
    READING,
    SCALES,
    AppChanges,
    AppSteps,
    AppTraces,
    Factory,
    PageClaims,
    PageCode,
    PageFlaws,
    PageLessons,
)
from data_pipelines.making import PASSED_OVER, BuildError, build_source, read_passed_over, write_card
from data_pipelines.record_texts import texts_of
from data_pipelines.web_pages import SIDES
from mmagent.actions import Finished, parse_action
from mmagent.browser import BrowserPool, perform, run_sync
from mmagent.geometry import GeometryConfig, ImageView
from mmagent.records import Record, from_sample, image_size, to_sample
from mmagent.vocab import Vocab
from mmagent.worlds import traces
from mmagent.worlds.critic import RIGHT
from mmagent.worlds.pages import generate, render
from mmagent.worlds.pages.app_kinds import generate_app
from mmagent.worlds.pages.broken import FLAWS, break_page

pytestmark = pytest.mark.browser
LANGUAGES = ("en", "de", "ru")


def make(pool: BrowserPool, maker: Factory, number: int) -> Sequence[Record]:
    async def run() -> Sequence[Record]:
        async with pool.page(*maker.screen) as page:
            return await maker.make(number, page)

    return run_sync(run())


QUICK = (PageLessons, PageFlaws, AppTraces)
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in (*READING, *ACTING)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_seeded_valid_and_teach(browser_pool, kind):
    records = make(browser_pool, kind(1, languages=LANGUAGES, block=2), 4)
    assert records == make(browser_pool, kind(1, languages=LANGUAGES, block=2), 4)
    held_out = make(browser_pool, kind(1, languages=LANGUAGES, block=2, split="validation"), 4)
    assert not {r.images for r in records} & {r.images for r in held_out}
    assert len({r.key for r in records}) == 2
    for record in records:
        assert from_sample(to_sample(record)) == record
        assert record.source == kind.name
        assert record.messages[0].role == "user"
        assert record.messages[-1].role == "assistant"


@pytest.mark.slow
def test_lessons_are_asked_on_large_screens_too(browser_pool):
    records = make(browser_pool, PageLessons(3, large=True, block=14), 0)
    sizes = {image_size(image, record.key) for record in records for image in record.images}
    assert sizes & {(height, width) for width, height in LARGE}
    assert PageLessons(3).settings["sides"] != PageLessons(3, large=True).settings["sides"]


def test_dense_screens_are_as_large_and_show_larger_things(browser_pool, monkeypatch):
    shown: list[tuple[float, tuple[int, int]]] = []

    async def noted(page, html, width, height, *, scale, trusted):
        scene = await render(page, html, width, height, scale=scale, trusted=trusted)
        shown.append((scale, scene.size))
        return scene

    monkeypatch.setattr(gui_pages, "DENSE", 1.0)
    monkeypatch.setattr(gui_pages, "render", noted)
    records = make(browser_pool, PageLessons(3, block=16), 0)
    assert {1.0, 1.25} < {scale for scale, _ in shown} <= {1.0, *SCALES}  # the smallest have no room for it
    for _, (height, width) in shown:
        assert any(abs(width - a) <= 1 and abs(height - b) <= 1 for a, b in SIDES)
    assert all(0 <= r.coordinates[0] < r.coordinates[2] <= 392 for record in records for r in record.boxes)


def test_half_of_all_claims_are_right(browser_pool):
    said = [m.parts[0].text for r in make(browser_pool, PageClaims(2, block=24), 0) for m in r.messages[1::2]]
    right = sum(answer == RIGHT for answer in said)
    assert len(said) > 70
    assert 0.4 < right / len(said) < 0.6
    assert all(answer == RIGHT or answer.startswith("Wrong: ") for answer in said)


@pytest.mark.slow
def test_flaws_are_named_paired_and_repaired(browser_pool):
    records = make(browser_pool, PageFlaws(5, block=12), 0)
    shapes = Counter((len(record.images), len(record.messages)) for record in records)
    assert shapes[2, 2] == 4  # pairs
    assert shapes[1, 4] == 3  # named, and where
    for record in records:
        first, answer = list(texts_of(record))[:2]
        if "Its HTML:" in first:
            broken = first.split("Its HTML:\n")[1].rsplit("\nWrite", 1)[0]
            assert len(answer) < len(broken)
            assert re.sub(r' style="[^"]*"', "", answer) == re.sub(r' style="[^"]*"', "", broken)
        elif len(record.images) == 2:
            assert re.match(r"The (first|second)\. .+\.", answer)
    sound = [record for record in records if list(texts_of(record))[1] == gui_pages.SOUND]
    assert len(sound) == 1


@pytest.mark.slow
def test_flaws_of_all_kinds_come_equally_often_and_only_sound_pages_are_used(browser_pool, monkeypatch):
    kinds: list[str] = []

    async def noted(*args):
        broken = await break_page(*args)
        kinds.extend([] if broken is None else [broken.flaw])
        return broken

    async def unsound(page, scene):
        return ["contrast"]

    monkeypatch.setattr(gui_pages, "break_page", noted)
    maker = PageFlaws(5, block=3 * len(FLAWS))
    make(browser_pool, maker, 0)
    dealt = Counter(FLAWS[n // 3] for n in range(3 * len(FLAWS)) if n % 3 or n % 4)
    assert Counter(kinds) == dealt
    monkeypatch.setattr(gui_pages, "own_flaws", unsound)
    with pytest.raises(BuildError, match="page with a flaw of its own: contrast': 20"):
        make(browser_pool, PageFlaws(5, block=1), 0)


@pytest.mark.slow
def test_traces_replay_to_their_goals(browser_pool, monkeypatch):
    """Nothing but what a record says is used to work the app again."""
    apps = []

    def noted(*args, **kwargs):
        apps.append(generate_app(*args, **kwargs))
        return apps[-1]

    monkeypatch.setattr(gui_pages, "generate_app", noted)
    records = make(browser_pool, AppTraces(4, languages=LANGUAGES, block=5), 0)

    async def replay(record: Record, app) -> list[bool]:
        view = ImageView((app.height, app.width), (app.height, app.width))
        async with browser_pool.page(app.width, app.height) as page:
            await page.set_content(app.html)
            held = []
            for message in record.messages[1::2]:
                held.append(await traces.reached(page, app))
                await perform(page, parse_action(message.parts[0].text), view)
            return held

    assert len(apps) == len(records) == 5
    for record, app in zip(records, apps, strict=True):
        assert record.task == f"apps/{app.kind}"
        assert record.messages[0].parts[-1].text == app.goal
        assert (app.width, app.height) in APP_SIDES
        assert parse_action(record.messages[-1].parts[0].text) == Finished()
        assert len(record.images) == len(record.messages) // 2
        held = run_sync(replay(record, app))
        assert held == [False] * (len(held) - 1) + [True]


@pytest.mark.slow
def test_steps_ask_for_one_action_and_judge_others(browser_pool):
    records = make(browser_pool, AppSteps(6, block=12), 0)
    judged = [record for record in records if "Is that right?" in next(texts_of(record))]
    assert len(judged) == 4
    assert sum(list(texts_of(record))[1] == RIGHT for record in judged) == 2
    for record in records:
        request, answer = texts_of(record)
        if record not in judged:
            parse_action(answer)
            assert request.endswith("What is the next action?")
        elif answer != RIGHT:
            proposed = re.search(r"The next action is (.*)\. Is that right\?$", request)[1]
            parse_action(proposed)
            assert not answer.endswith(f"it is {proposed}.")


@pytest.mark.slow
def test_changes_tell_what_the_action_did(browser_pool):
    for record in make(browser_pool, AppChanges(7, block=6), 0):
        assert len(record.images) == 2
        assert record.images[0] != record.images[1]
        said = record.messages[1].parts[0].text.split("\n")
        assert 1 <= len(said) <= AppChanges.most
        typed = [parse_action(m.parts[0].text) for m in record.messages[3::2]]
        assert len(typed) <= 1


class NoTrace:
    """Stands for the player: a share of the traces does not reach its goal, the others are all the same one."""

    def __init__(self, fails: float):
        self.random, self.fails, self.trace = Random(0), fails, None

    async def __call__(self, page, app, *, elements):
        if self.random.random() < self.fails:
            raise traces.TraceError(f"{app.kind}: the goal is not reached")
        self.trace = self.trace or await traces.play(page, app, elements=elements)
        return self.trace


def test_traces_that_fail_are_counted_and_too_many_are_fatal(browser_pool, monkeypatch, tmp_path):
    monkeypatch.setattr(gui_pages, "play", NoTrace(0.3))

    async def run(maker: Factory, folder) -> None:
        await build_source(maker, folder, 8, browser_pool)

    run_sync(run(AppTraces(1, block=4), tmp_path / "some"))
    noted = read_passed_over(tmp_path / "some")
    assert sum(noted.values()) >= 1
    assert all(reason.startswith("trace of ") and reason.endswith("not reached") for reason in noted)
    builder = DocumentBuilder(Vocab.train(["a"], 300), GeometryConfig())
    assert write_card(tmp_path / "some", builder)["passed_over"] == noted
    monkeypatch.setattr(gui_pages, "play", NoTrace(1.0))
    with pytest.raises(BuildError, match=r"traces: (1\d) of \1 traces failed: .*not reached"):
        run_sync(run(AppTraces(2, block=4), tmp_path / "none"))
    assert (tmp_path / "none" / PASSED_OVER).is_file()


def test_languages_without_a_font_are_left_out_aloud_or_refused(tmp_path, monkeypatch, capsys):
    async def lacking(page, codes):
        return {"zh": "Chinese: no font draws '中'; install the Debian package fonts-wqy-zenhei"}

    monkeypatch.setattr("data_pipelines.build.fonts.lacking", lacking)
    plain = {"pretrain": {"page-code": 2, "text": 20}, "sft": {}, "validation": {}}
    config = replace(debug(), folder=str(tmp_path), languages=["en", "zh"], **plain)
    with pytest.raises(BuildError, match=r"no font: Chinese: .*fonts-wqy-zenhei, or set languages=\[en\]"):
        build(replace(config, browser="required"))
    assert build_module._drawable(config).languages == ["en"]
    assert "building without" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"languages: \['xx'\] is not some of en, zh"):
        replace(config, languages=["xx"])


def test_code_is_of_any_template_and_short(browser_pool):
    records = make(browser_pool, PageCode(8, longest=900, block=4), 0)
    assert all(len(list(texts_of(record))[1]) <= 900 for record in records)
    assert generate(1, 320, 240).html.startswith("<!DOCTYPE html>")
    with pytest.raises(BuildError, match="page-code: 20 seeds gave no record at index 0"):
        make(browser_pool, PageCode(8, longest=10, block=1), 0)


def test_a_block_needs_a_page():
    with pytest.raises(AssertionError):
        asyncio.run(PageCode(1).make(0, None))
