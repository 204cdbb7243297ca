"""Pictures as SVG, and pages that are mended: gold scores 1, what was given and what is hostile 0."""

from __future__ import annotations

import asyncio
from itertools import islice

import numpy as np
import pytest

from mmagent.browser import BrowserPool, find_chromium
from mmagent.sandbox import SandboxUnavailable
from mmagent.tasks import open_tasks
from mmagent.tasks.base import Screens
from mmagent.tasks.svg_code import SIDE, GeneratedDrawings, PublishedDrawings, SvgCodeTask, extract_svg, judge
from mmagent.tasks.ui_repair import UiRepairTask
from mmagent.testing import check_task

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")]
HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">'
RED = f'{HEAD}<rect width="5" height="10" fill="red"/></svg>'


def with_screens(work):
    async def inside():
        async with BrowserPool(time_limit=4.0) as pool:
            screens = Screens(pool, 320, 240, 2, scripts=False)
            try:
                return await work(screens, pool)
            finally:
                await screens.close()

    return asyncio.run(inside())


def test_svg_keeps_the_contract():
    async def work(screens, pool):
        task = SvgCodeTask(screens, GeneratedDrawings())
        await check_task(task, count=4, null=(f"{HEAD}</svg>",), null_below=0.01)
        one, other = islice(task.items("test", 0), 2)
        return (await task.compare(one, task.drawings.svg(other))).value

    assert with_screens(work) < 0.6


HOSTILE_SVG = {
    "script": f"{HEAD}<script>while(true);</script></svg>",
    "event": f'{HEAD}<rect onload="while(true);" width="0" height="0"/></svg>',
    "foreign": f'{HEAD}<foreignObject width="9" height="9"><iframe src="file:///etc/passwd"/></foreignObject></svg>',
    "file": f'{HEAD}<image href="file:///etc/passwd" width="9" height="9"/></svg>',
    "network": f'{HEAD}<image href="http://127.0.0.1/x.png" width="9" height="9"/></svg>',
    "entities": '<!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>' + f"{HEAD}&b;</svg>",
    "itself": f'{HEAD}<g id="a"><use href="#a"/></g><use href="#a"/></svg>',
    "many uses": HEAD
    + '<g id="n0"><rect width="1" height="1" fill="none"/></g>'
    + "".join(f'<g id="n{n + 1}">' + f'<use href="#n{n}"/>' * 12 + "</g>" for n in range(12))
    + "</svg>",
    "filters": HEAD
    + '<filter id="f">'
    + '<feGaussianBlur stdDeviation="900"/>' * 60
    + '</filter><rect width="10" height="10" fill="none" filter="url(#f)"/></svg>',
    "size": '<svg xmlns="http://www.w3.org/2000/svg" width="1e9" height="1e9"></svg>',
    "depth": HEAD + "<g>" * 20_000 + "</svg>",
    "not closed": f"{HEAD}<rect></svg>",
}


@pytest.mark.slow
def test_hostile_svg_scores_nothing_and_the_pool_lives_on(tmp_path):
    (tmp_path / "red.svg").write_text(RED)

    async def work(screens, pool):
        task = SvgCodeTask(screens, PublishedDrawings(tmp_path))
        (item,) = task.items("test", 0)
        values = {}
        for name, svg in HOSTILE_SVG.items():
            environment = task.environment(item)
            await environment.reset()
            async with asyncio.timeout(30):
                values[name] = (await environment.step(svg)).reward
        return values, (await task.compare(item, RED)).value

    values, good = with_screens(work)
    assert values == dict.fromkeys(HOSTILE_SVG, 0.0)
    assert good == 1.0


def test_svg_is_found_in_an_answer():
    assert extract_svg(f"Here it is:\n```svg\n{RED}\n```") == RED
    assert extract_svg('<svg viewBox="0 0 1 1"><g/></svg>').startswith(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox'
    )
    assert extract_svg("<svg>") is None
    assert extract_svg("</svg><svg>") is None


def test_a_picture_that_many_ask_for_at_once_is_drawn_once():
    async def work(screens, pool):
        task = SvgCodeTask(screens, GeneratedDrawings())
        item = next(task.items("test", 0))
        return await asyncio.gather(task.reference(item), task.reference(item))

    one, other = with_screens(work)
    assert one is other


def test_drawings_by_hand():
    white, half = np.full((SIDE, SIDE, 3), 255, np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8)
    half[:, : SIDE // 4] = 0
    assert judge(half, half).value == 1.0
    assert judge(half, white).value == 0.0
    assert judge(half, white).parts["pixels"] == pytest.approx(0.75)


def test_what_is_no_folder_of_drawings_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.svg there"):
        PublishedDrawings(tmp_path)


def test_drawings_that_datasets_saved_or_loads(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    whole = datasets.DatasetDict({
        split: datasets.Dataset.from_dict({"Filename": ["a.svg"], "Svg": [f"<svg>{split}</svg>"]})
        for split in ("train", "test")
    })  # fmt: skip
    whole.save_to_disk(tmp_path / "whole")  # as load_dataset gives it, with its splits
    whole["train"].save_to_disk(tmp_path / "one")
    known = {("starvector/svg-emoji", None): whole}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: known[name, config])
    for source, split in ((tmp_path / "whole", "test"), (tmp_path / "one", "train"),
                          ("datasets:starvector/svg-emoji", "test")):  # fmt: skip
        drawings = PublishedDrawings(source)
        (item,) = drawings.items("t", "test", 0)
        assert drawings.svg(item) == f"<svg>{split}</svg>"
    datasets.DatasetDict({"train": whole["train"], "val": whole["test"]}).save_to_disk(tmp_path / "which")
    with pytest.raises(ValueError, match=r"which of its splits is judged, train, val\?"):
        PublishedDrawings(tmp_path / "which")
    whole["train"].remove_columns("Svg").save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="no column Svg or svg, but Filename"):
        PublishedDrawings(tmp_path / "none")


@pytest.mark.parametrize("kind", ["polish", pytest.param("edit", marks=pytest.mark.slow)])
def test_repair_keeps_the_contract_and_what_was_given_scores_nothing(kind):
    async def work(screens, pool):
        task = UiRepairTask(screens, kind)
        await check_task(task, count=1)
        values = []
        for item in islice(task.items("test", 1), 4):
            broken = await task.broken(item)
            seen = await task.environment(item).reset()
            assert len(seen.images) == (2 if kind == "edit" else 1)
            assert broken.html in seen.text
            assert (broken.source.html in seen.text) == (broken.html == broken.source.html)
            given = await task.compare(item, broken.html)
            gone = await task.compare(item, "<p>hello</p>")
            looped = await task.compare(item, f"{broken.source.html}<script>while(true);</script>")
            values.append((given.value, gone.value, looped.value))
        return values

    for given, gone, looped in with_screens(work):
        assert (given, gone, looped) == (0.0, 0.0, 1.0)


def test_a_kind_is_one_of_two():
    with pytest.raises(ValueError, match="none of polish, edit"):
        UiRepairTask(None, "break")


CODING = ("design2code", "svg-code", "ui-polish", "ui-edit", "chart-to-code")


def test_the_catalogue_opens_them_all_together():
    async def inside():
        async with open_tasks(CODING, pages=2) as tasks:
            seen = [await task.environment(next(iter(task.items("train", 0)))).reset() for task in tasks]
            return [task.name for task in tasks], [len(one.images) for one in seen]

    try:
        assert asyncio.run(inside()) == (list(CODING), [1, 1, 1, 2, 1])
    except SandboxUnavailable as error:
        pytest.skip(str(error))
