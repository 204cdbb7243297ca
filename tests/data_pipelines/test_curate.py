"""Curation: nothing silent, the same bytes killed or not and with any number of processes, each stage where it acts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ingest_kit import members
from tqdm import tqdm

from data_pipelines import curate as curate_module
from data_pipelines.balancing import BalanceRules, factors
from data_pipelines.curate import CurateConfig, curate, find_sets, main
from data_pipelines.filters import PictureRules, TextRules
from data_pipelines.making import BuildError
from data_pipelines.mixture import Source, SourceConfig, open_sources, read_repeats
from data_pipelines.near_duplicates import DuplicateRules
from data_pipelines.scanning import ScanRules, read_evaluations
from data_pipelines.shards import ShardSet, ShardWriter
from data_pipelines.workers import LimitsConfig
from mmagent.chat import Image, Text, assistant, user
from mmagent.config import ConfigError
from mmagent.contamination import Fingerprint, Judged, Signed
from mmagent.records import EncodedImage, Record, encode_image, from_sample, to_sample
from tests.unit.test_signatures import copied, screen


def story(n: int, words: int = 40) -> str:
    return " ".join(f"w{k}" for k in np.random.default_rng(n).integers(0, 5000, words))


def page(n: int, said: str = "", pixels: np.ndarray | None = None, task: str = "", key: str = "") -> Record:
    image = encode_image(screen(n, side=(160, 120)) if pixels is None else pixels)
    talk = (user(Image(), said or f"Where is thing {n}?"), assistant(f"{n},{n}"))
    return Record(key or f"page-{n:04d}", "pages", talk, images=(image,), task=task)


def text(n: int, said: str = "", key: str = "") -> Record:
    return Record(key or f"text-{n:04d}", "text", parts=(Text(said or story(n)),))


def write(folder: Path, records: Sequence[Record], **options: int) -> Path:
    with ShardWriter(folder, **options) as writer:
        for record in records:
            writer.write(record)
    return folder


def config(to: Path, *folders: Path, **changes: object) -> CurateConfig:
    here = LimitsConfig(processes=0)
    return replace(CurateConfig(folders=[str(f) for f in folders], to=str(to), limits=here), **changes)


def keys(folder: Path) -> list[str]:
    shards = ShardSet(folder)
    return [from_sample(shards.read(n)).key for n in range(len(shards))]


def log(to: Path) -> dict[str, tuple[str, str]]:
    lines = [json.loads(line) for line in (to / "left_out.jsonl").read_text(encoding="utf-8").splitlines()]
    return {f"{line['set']}/{line['key']}": (line["reason"], line["problem"]) for line in lines}


def files(folder: Path) -> dict[str, bytes]:
    found = [p for p in sorted(folder.rglob("*")) if p.suffix in (".tar", ".idx", ".jsonl", ".npy", ".yaml")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if ".curation" not in p.parts}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two sets with one of everything that is to be left out."""
    root = tmp_path / "raw"
    broken = Record("broken", "pages", page(1).messages, images=(EncodedImage(page(1).images[0].data[:60], "png"),))
    write(
        root / "pages",
        [
            page(1),
            page(2),
            page(3, "Where is thing 2?", key="other-page"),
            page(2, "Where is  THING 2?", copied(screen(2, side=(160, 120)), 1.5, "JPEG", 70), key="copy"),
            page(2, "What colour is thing 2?", key="other-question"),
            page(5, pixels=np.full((300, 20, 3), 9, np.uint8), key="ribbon"),
            page(6, pixels=copied(screen(6, side=(160, 120)), 0.2, "PNG", 0).repeat(5, 0).repeat(5, 1), key="coarse"),
            broken,
        ],
    )
    write(
        root / "text",
        [
            text(1),
            text(2),
            text(1, story(1).upper() + " end", key="again"),
            text(3, "short"),
            text(4, "fuck " + story(4)),
        ],
        max_samples=3,
    )
    return root


def test_every_reason_is_logged_with_its_key_and_counted(mixed, tmp_path):
    rules = ScanRules(PictureRules(most_aspect=4.0), TextRules(least_characters=12, blocklists=["en"]))
    result = curate(config(tmp_path / "to", mixed, rules=rules))
    assert log(tmp_path / "to") == {
        "pages/copy": ("duplicate", "copy of pages/page-0002"),
        "pages/ribbon": ("resolution", "images[0]: 20x300: sides as 15.0 to 1"),
        "pages/broken": ("unreadable", log(tmp_path / "to")["pages/broken"][1]),
        "text/again": ("duplicate", "copy of text/text-0001"),
        "text/text-0003": ("length", "5 characters, fewer than 12"),
        "text/text-0004": ("words", "1 words of a blocklist, more than 0"),
    }
    assert "images[0]: cannot decode image" in log(tmp_path / "to")["pages/broken"][1]
    assert keys(tmp_path / "to/pages") == ["page-0001", "page-0002", "other-page", "other-question", "coarse"]
    assert keys(tmp_path / "to/text") == ["text-0001", "text-0002"]
    assert (result.seen, result.kept) == (13, 7)
    assert result.left_out == {"unreadable": 1, "resolution": 1, "length": 1, "words": 1, "duplicate": 2}
    assert sum(result.left_out.values()) == result.seen - result.kept == len(log(tmp_path / "to"))
    told = json.loads((tmp_path / "to/curation.json").read_text(encoding="utf-8"))
    assert told["sets"]["text"] == {"seen": 5, "kept": 2, "length": 1, "words": 1, "duplicate": 1}
    assert "duplicate" in result.table()
    card = (tmp_path / "to/text/card.html").read_text(encoding="utf-8")
    assert "copy of text/text-0001" in card
    assert "fewer than 12" in card
    kept = ShardSet(tmp_path / "to/pages")
    assert from_sample(kept.read(0)) == page(1)  # what is kept is kept as it was


@pytest.mark.slow
def test_the_same_bytes_again_with_processes_and_after_any_kill(mixed, tmp_path):
    """Killed by real signals at moments that a clock draws, the run ends with the bytes of one that was not."""
    write(mixed / "more", [page(100 + n) for n in range(150)])
    curate(config(tmp_path / "whole", mixed))
    curate(config(tmp_path / "many", mixed, limits=LimitsConfig(processes=2)))
    whole = files(tmp_path / "whole")
    assert files(tmp_path / "many") == whole
    command = [sys.executable, "-m", "data_pipelines.curate", f"folders=[{mixed}]", f"to={tmp_path / 'killed'}"]
    random = np.random.default_rng(0)
    kills = 0
    for attempt in range(40):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        started = time.monotonic()
        while child.poll() is None and not (tmp_path / "killed/.curation/scan.bin").exists():
            time.sleep(0.01)  # imports are not what is to be killed
        if attempt < 3:
            time.sleep(float(random.uniform(0.0, 0.6)))
            child.send_signal(signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
            continue
        assert child.wait(timeout=120) == 0, time.monotonic() - started
        break
    assert kills >= 1
    assert files(tmp_path / "killed") == whole
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "whole").rglob("*.tar")}
    curate(config(tmp_path / "whole", mixed))  # a finished one is left as it is
    assert files(tmp_path / "whole") == whole
    assert before == {path: os.stat(path).st_mtime_ns for path in before}


def test_a_scan_that_was_cut_anywhere_goes_on(mixed, tmp_path, monkeypatch):
    """Every file of the scan cut at every kind of place: within a row, between blocks, half a line of the log."""
    monkeypatch.setattr("data_pipelines.scanning.BLOCK", 2)
    curate(config(tmp_path / "whole", mixed))
    whole, work = files(tmp_path / "whole"), tmp_path / "whole/.curation"
    sizes = {name: (work / name).stat().st_size for name in ("scan.bin", "pictures.bin", "problems.jsonl")}
    random = np.random.default_rng(1)
    for _ in range(8):
        rows = int(random.integers(0, sizes["scan.bin"]))
        os.truncate(work / "scan.bin", rows)  # what is appended before it may be there, or half of what follows
        with (work / "problems.jsonl").open("ab") as file:
            file.write(b'[99, "k", "half a li')
        with (work / "pictures.bin").open("ab") as file:
            file.write(bytes(int(random.integers(0, 900))))
        curate(config(tmp_path / "whole", mixed))
        assert files(tmp_path / "whole") == whole


def test_what_is_judged_is_not_trained_on(mixed, tmp_path):
    """Planted copies are found through their disguises: scaled, encoded anew, in capitals; by files and by shards."""
    held_out = write(tmp_path / "held", [text(50), page(60)])
    prints = tmp_path / "evals.npz"
    Fingerprint([Judged("suite/a", story(51)), Judged("suite/b", "Click it.", (Signed.of(screen(61)),))]).save(prints)
    planted = [
        text(1),
        text(2, "As said: " + story(50).upper().replace(" ", "\n")),
        text(3, story(51)),
        page(61, "Something else?", copied(screen(61), 0.5, "JPEG", 60)),
        page(60, pixels=copied(screen(60, side=(160, 120)), 2.0, "WEBP", 70)),
        page(62),
    ]
    write(tmp_path / "raw2" / "all", planted)
    rules = ScanRules(evaluations=[str(prints), str(held_out)])
    curate(config(tmp_path / "to", tmp_path / "raw2", rules=rules))
    assert {key: problem for key, (_, problem) in log(tmp_path / "to").items()} == {
        "all/text-0002": f"{held_out}/text-0050, by its text",
        "all/text-0003": "suite/a, by its text",
        "all/page-0061": "suite/b, by its picture",
        "all/page-0060": f"{held_out}/page-0060",
    }
    assert keys(tmp_path / "to/all") == ["text-0001", "page-0062"]
    assert len(read_evaluations([str(prints)])) == 2


class Scores:
    """Gives each text the number it ends with, and ``more``."""

    def __init__(self, more: float = 0.0):
        self.more, self.fingerprint = more, f"scores {more}"

    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        assert len(images) == len(texts)
        return [float(said.split(",")[-1]) + self.more for said in texts]


def test_pairs_below_a_score_are_left_out(tmp_path):
    write(tmp_path / "raw", [*(page(n) for n in range(6)), text(1)])
    rules = ScanRules(least_score=3.0)
    result = curate(config(tmp_path / "to", tmp_path / "raw", rules=rules), Scores())
    assert keys(tmp_path / "to/raw") == ["page-0003", "page-0004", "page-0005", "text-0001"]
    assert log(tmp_path / "to")["raw/page-0002"] == ("score", "score 2.000 below 3.0")
    assert result.left_out == {"score": 3}
    with pytest.raises(ValueError, match="need each other"):
        curate(config(tmp_path / "x", tmp_path / "raw", rules=rules))


def test_what_has_no_score_is_counted(tmp_path):
    """Several pictures, or nothing said of one, pass by the scorer: not in silence. Texts show nothing to be scored."""
    pictures = tuple(encode_image(screen(n, side=(160, 120))) for n in (11, 12))
    several = Record("several", "pages", (user(Image(), Image(), "Which?"), assistant("1,1")), images=pictures)
    mute = Record("mute", "pages", (user(Image(), "Look."), assistant("")), images=pictures[:1])
    write(tmp_path / "raw", [page(1), page(5), several, mute, text(1), replace(several, key="again")])
    write(tmp_path / "other", [page(7), text(2)])
    rules = ScanRules(least_score=3.0)
    result = curate(config(tmp_path / "to", tmp_path / "raw", tmp_path / "other", rules=rules), Scores())
    assert keys(tmp_path / "to/raw") == ["page-0005", "several", "mute", "text-0001"]
    assert result.unscored == 2
    assert result.left_out == {"score": 1, "duplicate": 1}
    assert {name: counts["not scored"] for name, counts in result.sets.items()} == {"raw": 2, "other": 0}
    assert "not scored" in result.table()
    assert json.loads((tmp_path / "to/curation.json").read_text(encoding="utf-8"))["unscored"] == 2
    assert "samples not scored" in (tmp_path / "to/raw/card.html").read_text(encoding="utf-8")


def test_another_scorer_is_another_curation(tmp_path):
    write(tmp_path / "raw", [page(n) for n in range(4)])
    wanted = config(tmp_path / "to", tmp_path / "raw", rules=ScanRules(least_score=3.0))
    result = curate(wanted, Scores())
    assert curate(wanted, Scores()) == result
    with pytest.raises(BuildError, match="scored_by"):
        curate(wanted, Scores(1.0))


def test_rare_tasks_are_met_more_often_and_nothing_is_written_twice(tmp_path):
    counts = {"common": 40, "usual": 30, "rare": 4}
    records = [page(100 * k + n, task=t) for k, (t, many) in enumerate(counts.items()) for n in range(many)]
    write(tmp_path / "raw", records)
    curate(config(tmp_path / "to", tmp_path / "raw", balance=BalanceRules("task")))
    source = open_sources({"raw": SourceConfig(str(tmp_path / "to/raw"))}, seed=0)[0]
    assert len(source.shards) == 74
    repeats = read_repeats(source.shards)
    half = 74 / 3 / 2
    assert repeats[:70].tolist() == [1] * 70
    assert repeats[70:].sum() == pytest.approx(half, abs=2.0)  # of four draws, each one over or under
    assert set(repeats[70:].tolist()) <= {3, 4}
    for epoch in range(2):
        met = np.bincount([source.sample(epoch * len(source) + n) for n in range(len(source))], minlength=74)
        assert met.tolist() == repeats.tolist()
    plain = Source("raw", source.shards, SourceConfig(), 0)
    assert (len(plain), len(source)) == (74, int(repeats.sum()))
    assert plain.fingerprint() != source.fingerprint()
    np.save(tmp_path / "to/raw/repeats.npy", repeats[:-1])
    with pytest.raises(ValueError, match="curate them anew"):
        read_repeats(source.shards)


def test_repeats_are_followed_however_the_shards_are_named(tmp_path):
    """A glob or one tar of a balanced set is balanced as well, and the stream's fingerprint says so."""
    write(tmp_path / "a", [page(n) for n in range(5)], max_samples=2)
    write(tmp_path / "b", [page(n) for n in range(3)])
    np.save(tmp_path / "a/repeats.npy", np.array([1, 2, 3, 4, 5], np.uint8))

    def opened(path: str) -> Source:
        return open_sources({"raw": SourceConfig(str(tmp_path / path))}, seed=0)[0]

    for path, wanted in {
        "a": [1, 2, 3, 4, 5],
        "a/*.tar": [1, 2, 3, 4, 5],
        "a/shard-0000{0,2}.tar": [1, 2, 5],
        "a/shard-00001.tar": [3, 4],
        "?/*.tar": [1, 2, 3, 4, 5, 1, 1, 1],
    }.items():
        source = opened(path)
        assert read_repeats(source.shards).tolist() == wanted
        assert len(source) == sum(wanted)
    assert read_repeats(ShardSet(tmp_path / "b/*.tar")) is None
    assert opened("a").fingerprint() == opened("a/*.tar").fingerprint()
    before = opened("a/shard-00001.tar").fingerprint()
    np.save(tmp_path / "a/repeats.npy", np.array([1, 2, 3, 5, 4], np.uint8))
    assert opened("a/shard-00001.tar").fingerprint() != before
    np.save(tmp_path / "a/repeats.npy", np.array([3, 4], np.uint8))
    with pytest.raises(ValueError, match="is about 2 samples and the shards hold 5"):
        opened("a/shard-00001.tar")


def test_factors_fill_up_to_half_the_mean():
    assert factors([100, 100, 10, 40], 10).tolist() == [1.0, 1.0, 3.125, 1.0]
    assert factors([100, 1, 0], 5)[1] == 5.0  # at most so often
    assert factors([], 5).tolist() == []


def test_small_sets_get_weights_that_recipes_read(tmp_path):
    for name, many in {"big": 60, "small": 3}.items():
        write(tmp_path / "raw" / name, [page(n if name == "big" else 500 + n) for n in range(many)])
    curate(config(tmp_path / "to", tmp_path / "raw", balance=BalanceRules("set")))
    told = (tmp_path / "to/sources.yaml").read_text(encoding="utf-8")
    assert told == "data:\n  sources:\n    big: {weight: 60}\n    small: {weight: 15.75}\n"


def test_captions_that_say_what_all_say_become_fewer(tmp_path):
    """MetaCLIP's rule: of a word that n captions have, about t stay; a word of its own saves its caption."""
    said = ["a red square"] * 300 + [f"a red square beside thing{n}" for n in range(10)]
    write(tmp_path / "raw", [Record(f"c-{n:03d}", "c", parts=(Text(t),), images=()) for n, t in enumerate(said)])
    rules = ScanRules(duplicates=DuplicateRules(remove=False))
    result = curate(config(tmp_path / "to", tmp_path / "raw", rules=rules, balance=BalanceRules(caption_words=20)))
    kept = keys(tmp_path / "to/raw")
    assert {f"c-{n:03d}" for n in range(300, 310)} <= set(kept)
    common = len(kept) - 10
    chance = 1 - (1 - 20 / 310) ** 3  # three words, each drawn
    assert abs(common - 300 * chance) < 4 * (300 * chance * (1 - chance)) ** 0.5
    assert result.left_out == {"balance": 300 - common}


def test_keys_that_would_merge_in_one_shard_are_told_apart(tmp_path):
    write(tmp_path / "raw", [text(1, key="same"), text(2, key="same"), text(3)], max_samples=1)
    curate(config(tmp_path / "to", tmp_path / "raw"))
    assert keys(tmp_path / "to/raw") == ["same", "same~1", "text-0003"]
    records = [text(1, key="same"), text(2, key="same"), text(3, key="same~1"), text(4, key="same~1")]
    write(tmp_path / "more", records, max_samples=1)
    curate(config(tmp_path / "to2", tmp_path / "more"))
    assert keys(tmp_path / "to2/more") == ["same", "same~1~", "same~1", "same~1~3"]  # the new ones hit no other


def test_what_cannot_be_is_said(mixed, tmp_path):
    with pytest.raises(ConfigError, match="would both become pages"):
        find_sets([str(mixed), str(mixed / "pages")])
    with pytest.raises(ConfigError, match="holds no shards"):
        find_sets([str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="holds what is to be cleaned"):
        curate(config(mixed, mixed))
    curate(config(tmp_path / "to", mixed))
    with pytest.raises(BuildError, match="was begun with"):
        curate(config(tmp_path / "to", mixed, rules=ScanRules(duplicates=DuplicateRules(remove=False))))
    with pytest.raises(SystemExit, match="'xx' is no file"):
        main([f"folders=[{mixed}]", f"to={tmp_path / 'y'}", "rules.texts.blocklists=[xx]"])


def test_a_folder_of_somebody_is_left_alone(tmp_path):
    write(tmp_path / "raw", [text(1)])
    (tmp_path / "to").mkdir()
    for name in ("thesis.txt", "zoo.jpg"):
        (tmp_path / "to" / name).touch()
    for anew in (False, True):
        with pytest.raises(BuildError, match=r"holds what was not written by this command \(thesis.txt and 1 more\)"):
            curate(config(tmp_path / "to", tmp_path / "raw", anew=anew))
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["thesis.txt", "zoo.jpg"]


def test_one_more_set_is_told_by_name_and_begins_anew_when_asked(tmp_path):
    for n, name in enumerate(("a", "b")):
        write(tmp_path / "raw" / name, [text(10 * n + k) for k in range(4)], max_samples=2)
    to = tmp_path / "to"
    curate(config(to, tmp_path / "raw"))
    write(tmp_path / "raw" / "c", [text(1), text(30)])
    (tmp_path / "raw/b").rename(tmp_path / "b")
    rules = ScanRules(duplicates=DuplicateRules(remove=False))
    changes = "set b is gone, set c is new, rules.duplicates.remove was true, now it is false; anew=true deletes what"
    with pytest.raises(BuildError, match=f"to was begun with other sets or settings: {changes}"):
        curate(config(to, tmp_path / "raw", rules=rules))
    (to / "notes.txt").touch()
    (to / "b/notes.txt").touch()
    anew = curate(config(to, tmp_path / "raw", rules=rules, anew=True))
    assert {name: counts["kept"] for name, counts in anew.sets.items()} == {"a": 4, "c": 2}
    assert [path.name for path in (to / "b").iterdir()] == ["notes.txt"]  # which no curation wrote
    assert (to / "notes.txt").is_file()
    curate(config(tmp_path / "fresh", tmp_path / "raw", rules=rules))
    for name in ("a", "c"):
        assert [p.read_bytes() for p in sorted((to / name).glob("*.tar"))] == [
            p.read_bytes() for p in sorted((tmp_path / "fresh" / name).glob("*.tar"))
        ]
    assert curate(config(to, tmp_path / "raw", rules=rules)) == anew


def test_a_single_folder_without_brackets_is_told_how_it_is_written(capsys):
    with pytest.raises(SystemExit):
        main(["folders=data/mine", "to=x"])
    assert "folders: wants a list; write folders=[data/mine] (in the command line)" in capsys.readouterr().err


def test_a_set_of_which_nothing_is_left_is_not_written(tmp_path, capsys):
    write(tmp_path / "raw" / "a", [text(1)])
    write(tmp_path / "raw" / "b", [text(1)])
    result = curate(config(tmp_path / "to", tmp_path / "raw"))
    assert result.sets == {"a": {"seen": 1, "kept": 1}, "b": {"seen": 1, "kept": 0, "duplicate": 1}}
    assert not (tmp_path / "to/b").exists()
    assert "b: nothing is left of it" in capsys.readouterr().err


def test_keys_that_differ_in_case_only_stay_what_they_are(tmp_path):
    write(tmp_path / "raw", [text(1, key="Same"), text(2, key="same")])
    curate(config(tmp_path / "to", tmp_path / "raw"))
    assert keys(tmp_path / "to/raw") == ["Same", "same"]


def test_a_key_that_is_no_unicode_is_logged_like_any_other(tmp_path):
    good = to_sample(text(1))["json"]
    (tmp_path / "raw").mkdir()
    members(tmp_path / "raw/a.tar", {"good.json": good, "bad\udcff.json": b"{", "odd.\udcff": b"", "odd.\udcff~": b""})
    result = curate(config(tmp_path / "to", tmp_path / "raw"))
    assert (result.kept, result.left_out) == (1, {"unreadable": 2})
    assert log(tmp_path / "to")["raw/bad\\udcff"][0] == "unreadable"


def test_what_is_judged_by_has_changed_is_said(tmp_path):
    """The file is called as before: what was left out by the old one would stand for what the new one says."""
    write(tmp_path / "raw", [text(1), text(2)])
    prints, banned = tmp_path / "evals.npz", tmp_path / "banned.txt"
    banned.write_text("zzz\n", encoding="utf-8")
    held_out = write(tmp_path / "held", [text(9)])
    rules = ScanRules(texts=TextRules(blocklists=[str(banned)]), evaluations=[str(prints), str(held_out)])
    Fingerprint([Judged("suite/a", story(5))]).save(prints)
    assert curate(config(tmp_path / "to", tmp_path / "raw", rules=rules)).kept == 2
    Fingerprint([Judged("suite/a", story(5)), Judged("suite/b", story(2))]).save(prints)
    with pytest.raises(BuildError, match=r"other sets or settings: read\..*evals\.npz was"):
        curate(config(tmp_path / "to", tmp_path / "raw", rules=rules))
    assert curate(config(tmp_path / "anew", tmp_path / "raw", rules=rules)).left_out == {"evaluation": 1}
    write(held_out, [text(9), text(1)], max_samples=1)
    assert curate(config(tmp_path / "anew2", tmp_path / "raw", rules=rules)).left_out == {"evaluation": 2}
    banned.write_text("yyy\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"other sets or settings: read\..*banned\.txt was"):
        curate(config(tmp_path / "anew2", tmp_path / "raw", rules=rules))


def test_want_of_memory_costs_a_sample_and_not_the_run(mixed, tmp_path, monkeypatch):
    def hungry(pixels: np.ndarray) -> None:
        raise MemoryError

    monkeypatch.setattr("data_pipelines.filters.sharpness", hungry)
    rules = ScanRules(PictureRules(least_sharpness=0.1))
    result = curate(config(tmp_path / "to", mixed / "pages", rules=rules))
    assert result.left_out == {"unreadable": 8}
    assert log(tmp_path / "to")["pages/page-0001"] == (
        "unreadable", "looking at it takes more memory than is allowed",
    )  # fmt: skip


def test_a_card_tells_of_pixels_that_nobody_decoded(mixed, tmp_path):
    rules = ScanRules(duplicates=DuplicateRules(remove=False))
    assert curate(config(tmp_path / "to", mixed / "pages", rules=rules)).kept == 8
    assert "broken: images[0]: cannot decode image" in (tmp_path / "to/pages/card.html").read_text(encoding="utf-8")


def test_a_bar_that_was_shown_ends_with_its_line(capsys, monkeypatch):
    """What is printed next would stand behind it."""
    monkeypatch.setattr(curate_module, "tqdm", _at_once)
    with curate_module._bar("looking at samples", 2) as report:
        report(2)
    assert capsys.readouterr().err.endswith("\n")


def _at_once(**options):
    return tqdm(**{**options, "delay": 0.0})


def test_torn_shards_are_named_counted_and_end_the_command(tmp_path, capsys):
    """With an index, which knows how many samples are lost, and without; what is whole is curated."""
    write(tmp_path / "raw" / "a", [text(n) for n in range(9)], max_samples=3)
    write(tmp_path / "raw" / "b", [text(n) for n in range(20, 23)])
    os.truncate(tmp_path / "raw/a/shard-00001.tar", 3000)
    os.truncate(tmp_path / "raw/a/shard-00002.tar", 3000)
    (tmp_path / "raw/a/shard-00002.idx").unlink()
    arguments = [f"folders=[{tmp_path / 'raw'}]", f"to={tmp_path / 'to'}", "limits.processes=0"]
    with pytest.raises(SystemExit, match=r"2 of 3 shards of a were cut short, more than max_torn=0: make them anew"):
        main(arguments)
    out = capsys.readouterr().out
    assert "a: 2 of 3 shards cut short, what they lost is not counted:\n  shard-00001.tar@" in out
    assert "shard-00002.tar@" in out
    assert "b: " not in out
    assert keys(tmp_path / "to/a")[:3] == ["text-0000", "text-0001", "text-0002"]
    told = json.loads((tmp_path / "to/curation.json").read_text(encoding="utf-8"))["torn"]
    assert (told["a"]["count"], told["a"]["shards"], len(told["a"]["named"])) == (2, 3, 2)
    assert "b" not in told
    main([*arguments, "max_torn=0.7"])
    with pytest.raises(SystemExit, match=r"more than max_torn=0\.5"):
        main([*arguments, "max_torn=0.5"])
    with pytest.raises(SystemExit):
        main([*arguments, "max_torn=2"])
    assert "max_torn 2.0 must lie in [0, 1]" in capsys.readouterr().err


def test_many_torn_shards_are_named_in_part(tmp_path):
    write(tmp_path / "raw" / "a", [text(n) for n in range(62)], max_samples=2)
    for path in sorted((tmp_path / "raw/a").glob("*.tar"))[1:]:
        os.truncate(path, path.stat().st_size // 8)
    result = curate(config(tmp_path / "to", tmp_path / "raw"))
    assert (result.torn["a"].count, len(result.torn["a"].named)) == (30, 20)
    assert "  and 25 more, in left_out.jsonl" in result.table()
    assert result.problem(0.99) == ""


def test_signatures_of_an_older_kind_are_not_gone_on_with(tmp_path, monkeypatch):
    write(tmp_path / "raw", [text(n) for n in range(3)])
    monkeypatch.setattr("data_pipelines.curate.SIGNED", 1)
    curate(config(tmp_path / "to", tmp_path / "raw"))
    monkeypatch.undo()
    with pytest.raises(BuildError, match="signed"):
        curate(config(tmp_path / "to", tmp_path / "raw"))
