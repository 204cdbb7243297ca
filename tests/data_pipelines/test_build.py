"""Builds: the same bytes for the same seed, killed or not; nothing is mixed; what cannot be made is said."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from data_pipelines import build as build_module
from data_pipelines.build import BuildConfig, build, debug, main, table, texts_of
from data_pipelines.documents import DocumentBuilder
from data_pipelines.making import BuildError, build_source, is_finished, read_card, write_card
from data_pipelines.pictures import Captions, Interleaved, picture
from data_pipelines.shards import ShardSet
from data_pipelines.texts import KINDS, Texts
from mmagent.browser import BrowserError
from mmagent.chat import Image, Text, Thinking, ToolCall, assistant, user
from mmagent.geometry import GeometryConfig
from mmagent.records import Record, from_sample, to_sample
from mmagent.vocab import Vocab
from mmagent.worlds.questions import WEIGHTS


def shards_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".tar", ".idx")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def small(folder: Path, **counts: int) -> BuildConfig:
    counts = counts or {"text": 30, "captions": 6}
    return replace(debug(), folder=str(folder), pretrain=counts, sft={}, validation={}, browser="none")


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        build(small(tmp_path / name))
    build(replace(small(tmp_path / "c"), seed=1))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b") != shards_of(tmp_path / "c")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_held_out_samples_are_new_and_change_nothing_else(tmp_path):
    counts = {"text": 60, "captions": 40, "interleaved": 20}
    build(small(tmp_path / "without", **counts))
    cards = build(replace(small(tmp_path / "with", **counts), validation=counts))
    made = shards_of(tmp_path / "with")
    held_out = {name for name in made if name.startswith("validation/")}
    assert {name: made[name] for name in made if name not in held_out} == shards_of(tmp_path / "without")
    for file in ("tokenizer.json", "tokenizer.plan.json"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    assert {name for name in cards if name.startswith("validation/")} == {f"validation/{name}" for name in counts}
    for name, count in counts.items():
        trained, fresh = (ShardSet(tmp_path / "with" / stage / name) for stage in ("pretrain", "validation"))
        records = [[from_sample(shards.read(n)) for n in range(count)] for shards in (trained, fresh)]
        if name == "text":
            known, new = ({"".join(texts_of(record)) for record in part} for part in records)
        else:
            known, new = ({image.data for record in part for image in record.images} for part in records)
        assert len(new) >= count
        assert not known & new


def test_held_out_samples_alone_keep_the_vocabulary(tmp_path):
    alone = replace(small(tmp_path), pretrain={}, validation={"text": 20})
    with pytest.raises(BuildError, match=r"has no tokenizer\.json, and there is no pretrain or sft source"):
        build(alone)
    assert list(tmp_path.iterdir()) == []
    build(small(tmp_path))
    files = ("tokenizer.json", "tokenizer.plan.json")
    before = [(tmp_path / file).read_bytes() for file in files]
    assert list(build(alone)) == ["validation/text"]
    assert [(tmp_path / file).read_bytes() for file in files] == before


def test_a_finished_build_is_left_as_it_is(tmp_path):
    first = build(small(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert build(small(tmp_path)) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_cards_describe_what_is_there(tmp_path):
    cards = build(small(tmp_path))
    card = cards["pretrain/captions"]
    assert (card["samples"], card["images"], card["made"]["seed"]) == (6, 6, 0)
    assert 0 < card["tokens"]["trainable"] < card["tokens"]["total"]
    assert json.loads((tmp_path / "pretrain/captions/card.json").read_text()) == card
    assert "pretrain/captions" in table(cards)
    builder = DocumentBuilder(Vocab.load(tmp_path), GeometryConfig())
    assert read_card(tmp_path / "pretrain/captions", builder) == card
    other = DocumentBuilder(Vocab.train(["x"], 300), GeometryConfig())
    assert read_card(tmp_path / "pretrain/captions", other) is None
    assert write_card(tmp_path / "pretrain/captions", other)["tokens"] != card["tokens"]


def test_settings_are_never_mixed(tmp_path):
    build(small(tmp_path))
    with pytest.raises(BuildError, match=r"was begun with seed=0, now it is 7; delete the folder"):
        build(replace(small(tmp_path), seed=7))
    with pytest.raises(BuildError, match=r"was begun with samples=30, now it is 31"):
        build(small(tmp_path, text=31))
    (tmp_path / "pretrain/text/plan.json").unlink()
    with pytest.raises(BuildError, match="holds shards that were not built here"):
        build(small(tmp_path))


def test_the_command_line_refuses_and_prints(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"pretrain\.poems: no such source; there are .*text"):
        main(["--preset", "debug", f"folder={tmp_path}", "pretrain.poems=3"])
    main(["--preset", "debug", f"folder={tmp_path}", "browser=none", "pretrain.interleaved=0", "pretrain.captions=2"])
    printed = capsys.readouterr()
    assert "pretrain/text" in printed.out
    assert "pretrain/captions: 100%" in printed.err
    assert not (tmp_path / "pretrain/interleaved").exists()
    with pytest.raises(SystemExit):
        main(["--preset", "debug", "browser=perhaps"])


def test_kill_9_and_again_gives_identical_shards(tmp_path):
    settings = ["browser=none", "shard_samples=150", "pretrain.text=2000", "pretrain.captions=0", "vocab_texts=50"]
    settings += ["pretrain.interleaved=0", "validation.interleaved=0", f"folder={tmp_path / 'killed'}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "data_pipelines.build", "--preset", "debug", *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while len(list((tmp_path / "killed").rglob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not is_finished(tmp_path / "killed/pretrain/text", 2000)
    held_out = {name: debug().validation[name] for name in ("captions", "text")}
    for name in ("killed", "whole"):
        build(replace(small(tmp_path / name, text=2000), validation=held_out, shard_samples=150, vocab_texts=50))
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    assert is_finished(tmp_path / "killed/pretrain/text", 2000)


class Awkward:
    """A maker whose blocks finish out of order, and whose page breaks now and then."""

    name, block, screen = "awkward", 3, (10, 10)

    def __init__(self, breaks: int = 0, short: bool = False):
        self.settings = {"seed": 0}
        self.breaks, self.short, self.asked = breaks, short, []

    async def make(self, number: int, page: object) -> Sequence[Record]:
        self.asked.append(number)
        await asyncio.sleep(0.001 * (number * 7 % 5))
        if self.asked.count(number) <= self.breaks and number % 2:
            raise BrowserError("the page broke")
        records = [Record(f"k{number * 3 + n}", "s", (user("q"), assistant("a"))) for n in range(3)]
        return records[: 2 if self.short else 3]


class Pages:
    """Hands out nothing, as often as asked, and counts."""

    def __init__(self) -> None:
        self.open = self.most = 0

    def page(self, width: int, height: int) -> Pages:
        return self

    async def __aenter__(self) -> None:
        self.open += 1
        self.most = max(self.most, self.open)

    async def __aexit__(self, *_: object) -> None:
        self.open -= 1


@pytest.mark.parametrize("breaks", [0, 2])
def test_blocks_in_flight_are_written_in_order(tmp_path, breaks):
    pages, reports = Pages(), []
    asyncio.run(build_source(Awkward(breaks), tmp_path, 50, pages, in_flight=4, shard_samples=7, report=reports.append))
    shards = ShardSet(tmp_path)
    assert [shards.read(n)["__key__"] for n in range(len(shards))] == [f"k{n}" for n in range(50)]
    assert pages.most == 4
    assert reports[0] == 0
    assert reports[-1] == 50
    assert reports == sorted(reports)


def test_a_stopped_build_makes_only_the_missing_blocks(tmp_path):
    stopped = Awkward(breaks=3)
    stopped.asked = [n for n in range(8) for _ in range(3)]  # odd blocks from 9 on break for good
    with pytest.raises(BuildError, match="awkward: block 9 failed 3 times: the page broke"):
        asyncio.run(build_source(stopped, tmp_path, 50, Pages(), in_flight=2, shard_samples=7))
    again = Awkward()
    asyncio.run(build_source(again, tmp_path, 50, Pages(), in_flight=2, shard_samples=7))
    assert min(again.asked) == 21 // 3  # three shards of seven were whole
    assert len(ShardSet(tmp_path)) == 50


def test_makers_that_break_their_word_are_named(tmp_path):
    with pytest.raises(BuildError, match="awkward: block 0 has 2 records, not 3"):
        asyncio.run(build_source(Awkward(short=True), tmp_path, 5, Pages()))
    with pytest.raises(BuildError, match="awkward: needs a browser"):
        asyncio.run(build_source(Awkward(), tmp_path, 5, None))


def test_without_a_browser_screens_are_left_out_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_module, "makers", lambda config: {"pretrain": [Texts(0), Awkward()], "sft": []})
    monkeypatch.setattr(build_module, "find_chromium", lambda: None)
    config = replace(small(tmp_path, text=5, awkward=5), browser="auto")
    assert list(build(config)) == ["pretrain/text"]
    assert "no Chromium: pretrain/awkward cannot be made; building the other sources only" in capsys.readouterr().err
    with pytest.raises(BuildError, match="no Chromium: pretrain/awkward cannot be made; install"):
        build(replace(config, browser="required"))
    with pytest.raises(ValueError, match="'perhaps' is none of"):
        replace(config, browser="perhaps")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_seeded_and_varied(kind):
    assert kind(Random(5)) == kind(Random(5))
    assert len({kind(Random(n)) for n in range(50)}) == 50


def test_facts_in_texts_are_true():
    for n in range(200):
        for line in KINDS[1](Random(n)).splitlines():
            if " = " in line:
                left, right = line.split(" = ")
                assert eval(left.replace("x", "*")) == int(right)


def test_pictures_are_seeded_and_refer_rightly():
    (a, caption), (b, again) = picture(Random(3)), picture(Random(3))
    assert np.array_equal(a, b)
    assert caption == again
    for maker in (Captions(0, block=6), Interleaved(0, block=6)):
        records = asyncio.run(maker.make(2, None))
        assert [r.key for r in records] == [r.key for r in asyncio.run(maker.make(2, None))]
        for record in records:
            assert from_sample(to_sample(record)) == record
            shown = [text for text in texts_of(record) if text.startswith("\nIt shows")]
            asked = [text for text in texts_of(record) if text.startswith("Which picture shows")]
            for question in asked:
                caption, _, number = question.removeprefix("Which picture shows ").rpartition("? Picture ")
                assert caption in shown[int(number[:-1]) - 1]


def test_texts_of_a_record_are_all_it_says():
    turns = (user(Image(), "q"), assistant(Thinking("t"), "a", ToolCall("f", {"k": "v"})))
    assert list(texts_of(Record("k", "s", turns))) == ["q", "t", "a", "f", "k", "v"]
    assert list(texts_of(Record("k", "s", parts=(Text("x"), Image(), Text("y"))))) == ["x", "y"]


def test_counts_and_weights_of_0_are_told_as_such(tmp_path):
    """And not as a vocabulary that is missing, or by records that ask nothing."""
    with pytest.raises(BuildError, match=r"nothing to build: .* want 0 samples; set one: pretrain\.text=1000"):
        build(small(tmp_path, text=0, captions=0))
    with pytest.raises(ValueError, match="ask: no kind of question has a weight above 0; there are locate"):
        BuildConfig(ask=dict.fromkeys(WEIGHTS, 0.0))
