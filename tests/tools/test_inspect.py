"""The inspection page: everything is shown, chosen and paged in a real browser, and nothing that a sample says runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from data_pipelines.shards import ShardWriter
from mmagent.browser import run_sync
from mmagent.chat import Image, Text, assistant, user
from mmagent.records import EncodedImage, Record, Region, encode_image
from mmagent.vocab import Vocab
from tests.data_pipelines.test_cards import HOSTILE, hostile
from tools.inspect import main
from tools.inspector import site as site_module
from tools.inspector.tokens import token_view

ROOT = Path(__file__).parents[2]


def page(n: int) -> Record:
    pixels = np.full((56, 84, 3), n % 200, np.uint8)
    talk = (user(Image(), f"Where is thing {n}?"), assistant(f"{n}, 你好"))
    boxes = (Region(0, (1.0, 1.0, 9.0, 9.0), "thing"),) if n % 2 else ()
    return Record(f"page-{n:04d}", "pages", talk, (), (encode_image(pixels),), f"task{n % 3}", boxes=boxes)


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.train(["Where is thing 3? click the button"] * 3, 320)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    vocab.save(root / "tokenizer.json")
    with ShardWriter(root / "set") as writer:
        for n in range(120):
            writer.write(page(n))
        writer.write(hostile(7))
        torn = encode_image(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).data[:5000]
        writer.write(Record("torn", "pages", (user(Image()), assistant("x")), (), (EncodedImage(torn, "png"),)))
        writer.write(Record("wide", "pages", (user(Image()), assistant("x")), (), (_wide(),)))
    options = ["--tokenizer", str(root), "--packs", "2", "--tokens-per-pack", "600", "--patches-per-pack", "2000"]
    assert main([str(root / "set"), "--to", str(root / "out"), *options]) == 0
    return root / "out"


def _wide() -> EncodedImage:
    return encode_image(np.zeros((30, 3000, 3), np.uint8))


@pytest.mark.browser
def test_samples_are_browsed_in_a_browser(site, browser_pool):
    async def look() -> dict[str, object]:
        async with browser_pool.page(1200, 900) as opened:
            await opened.goto(site / "index.html")

            async def ready(turn: int) -> None:
                for _ in range(100):
                    if await opened.evaluate("document.body.dataset.ready") == str(turn):
                        return
                    await opened.wait(0.05)
                raise AssertionError(f"turn {turn} is not shown")

            async def keys() -> list[str]:
                return await opened.evaluate("[...document.querySelectorAll('article.sample b:first-child')]"
                                             ".map(b => b.textContent)")  # fmt: skip

            out: dict[str, object] = {}
            await ready(1)
            out["first"] = await keys()
            out["blocks"] = await opened.evaluate("document.querySelectorAll('head script').length")
            await opened.evaluate("document.querySelector('[name=next]').click()")
            await ready(2)
            await opened.evaluate("document.querySelector('[name=next]').click()")
            await ready(3)
            out["last"] = await keys()
            out["place"] = await opened.evaluate("document.getElementById('place').textContent")
            out["said"] = await opened.evaluate(
                "[...document.querySelectorAll('article.sample')].at(-3).querySelector('.said').textContent"
            )
            choose = "(n, v) => { const f = document.forms[0]; f[n].value = v; f[n].dispatchEvent(new Event('EVENT')) }"
            await opened.evaluate(choose.replace("EVENT", "change"), "task", "task1")
            await ready(4)
            out["task"] = await keys()
            await opened.evaluate(choose.replace("EVENT", "input"), "key", "E-001")
            await ready(5)
            out["both"] = await keys()
            await opened.evaluate("document.querySelector('[name=marked]').click()")
            await ready(6)
            out["marked"] = await keys()
            await opened.evaluate("document.querySelector('details.of').open = true")
            out["tokens"] = await opened.evaluate("document.querySelector('div.tokens').textContent")
            out["trained"] = await opened.evaluate(
                "[...document.querySelector('div.tokens').querySelectorAll('i.yes')].map(i => i.textContent).join('')"
            )
            await opened.wait(0.2)
            out["pictures"] = await opened.evaluate("[...document.images].filter(i => i.naturalWidth === 84).length")
            out["title"] = await opened.evaluate("document.title")
            out["wide"] = await opened.evaluate("document.documentElement.scrollWidth")
            return out

    seen = run_sync(look())
    assert seen["first"] == [f"page-{n:04d}" for n in range(50)]
    assert seen["blocks"] == 1  # the others are loaded when they are looked at
    assert seen["place"] == "101 – 123 of 123"
    assert seen["last"][:2] == ["page-0100", "page-0101"]
    assert seen["last"][-3:] == [hostile(7).key, "torn", "wide"]
    assert seen["said"] == HOSTILE
    assert seen["task"] == [f"page-{n:04d}" for n in range(120) if n % 3 == 1][:50]
    assert seen["both"] == ["page-0010", "page-0013", "page-0016", "page-0019"]
    assert seen["marked"] == ["page-0013", "page-0019"]
    assert "[image 4 x 5]" in seen["tokens"]
    assert "<|user|>" in seen["tokens"]
    assert seen["trained"].startswith("13, 你好") or seen["trained"].endswith("13, 你好<|user|>"), seen["trained"]
    assert seen["pictures"] == 2
    assert seen["title"] == "Inspection: set"
    assert seen["wide"] <= 1200


def test_files_are_small_and_nothing_points_elsewhere(site):
    assert len(list((site / "blocks").iterdir())) == 3
    told = (site / "index.html").read_text(encoding="utf-8")
    assert "<script>document" not in told
    assert "src=" not in told.partition("<script")[0]
    assert "cannot decode image" in (site / "blocks/00002.js").read_text(encoding="utf-8")
    wide = next((site / "images").glob("0000122-*"))
    assert wide.suffix == ".jpg"  # larger than is shown
    for block in (site / "blocks").iterdir():
        assert "</script" not in block.read_text(encoding="utf-8").lower()


def test_packs_show_documents_with_their_borders(site):
    told = (site / "packs.html").read_text(encoding="utf-8")
    assert told.count('<div class="pack">') == 2
    assert "t 0–" in told
    assert "[image 4 x 5]" in told


def test_tokens_that_share_a_character_are_one_mark(vocab):
    ids = vocab.encode("a你b")
    view = token_view(ids, [False] * len(ids), [], vocab, 2)
    assert ">你<" in view
    assert "\ufffd" not in view
    half = ids[1:2]  # a character that is cut is shown as it is, and ends
    assert token_view(half, [True], [], vocab, 2).count("<i") == 1


def test_only_some_samples_and_what_cannot_be(site, tmp_path, capsys):
    shards = str(site.parent / "set")
    assert main([shards, "--to", str(tmp_path / "few"), "--samples", "3"]) == 0
    assert "3 of 123 samples" in (tmp_path / "few/index.html").read_text(encoding="utf-8")
    for bad, told in (
        ([str(tmp_path / "none")], "none"),
        ([shards, "--packs", "1"], "name a --tokenizer"),
        ([shards, "--to", str(site.parent)], "holds something else"),
    ):
        with pytest.raises(SystemExit):
            main([*bad] if "--to" in bad else [*bad, "--to", str(tmp_path / "x")])
        assert told in capsys.readouterr().err


def test_the_name_of_the_script_hides_no_module_of_the_library():
    """Scripts of tools/ start with their folder in Python's path, and half of the library imports ``inspect``."""
    command = [sys.executable, str(ROOT / "tools" / "inspect.py"), "--help"]
    assert "usage" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    code = "import sys; sys.path.insert(0, 'tools'); import inspect, dataclasses; print(inspect.signature(len))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "(obj, /)\n"


def test_plain_text_has_no_pictures(tmp_path):
    with ShardWriter(tmp_path / "text") as writer:
        writer.write(Record("t", "text", parts=(Text("one"),)))
    assert main([str(tmp_path / "text"), "--to", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out/images").iterdir())


def test_a_folder_of_sets_has_pages_for_each_by_its_name(tmp_path, capsys):
    for name, count in (("words", 2), ("a b&c", 3)):
        with ShardWriter(tmp_path / "sets" / name) as writer:
            for n in range(count):
                writer.write(Record(f"{name}-{n}", name, parts=(Text("one"),)))
    for _ in range(2):  # the second takes the place of the first
        assert main([str(tmp_path / "sets"), "--to", str(tmp_path / "out")]) == 0
    first = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert '<a href="a%20b%26c/index.html">a b&amp;c</a>' in first
    assert "3 samples" in (tmp_path / "out/a b&c/index.html").read_text(encoding="utf-8")
    assert "2 samples" in (tmp_path / "out/words/index.html").read_text(encoding="utf-8")
    (tmp_path / "out/thesis.txt").touch()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "sets"), "--to", str(tmp_path / "out")])
    assert "holds something else" in capsys.readouterr().err


def test_one_bar_counts_the_samples_and_packs_of_all_sets(tmp_path, vocab, monkeypatch, capsys):
    """Many short sets take long together, and none of them alone."""
    vocab.save(tmp_path / "tokenizer.json")
    for name in ("a", "b"):
        with ShardWriter(tmp_path / "sets" / name) as writer:
            for n in range(5):
                writer.write(page(n))
    bars = []

    def bar(**options):
        bars.append(tqdm(**options))
        return bars[-1]

    monkeypatch.setattr(site_module, "tqdm", bar)
    packs = ["--packs", "2", "--tokens-per-pack", "600", "--patches-per-pack", "2000"]
    options = ["--tokenizer", str(tmp_path), "--samples", "4", *packs]
    assert main([str(tmp_path / "sets"), "--to", str(tmp_path / "out"), *options]) == 0
    assert [(one.n, one.total) for one in bars] == [(12, 12)]
    assert f"reading {tmp_path}/sets" in capsys.readouterr().err
