"""The validator finds what is wrong with shards, and says nothing of sound ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_kit import VOCAB
from ingest_kit import INLINE, encoded, members
from shard_samples import record
from tqdm import tqdm

from data_pipelines import validate, workers
from data_pipelines.shards import ShardError, ShardIndex, ShardWriter
from data_pipelines.validate import Findings, examine, main
from mmagent.chat import assistant, user
from mmagent.records import EncodedImage, Region


def write(folder: Path, numbers: range, **limits: int) -> Path:
    with ShardWriter(folder, **limits) as writer:
        for n in numbers:
            writer.write(replace(record(n), boxes=(Region(0, (1, 1, 4, 4)),)))
    return folder


def wrong(*locations: Path, **options: object) -> dict[str, int]:
    return {name: kind.count for name, kind in look(*locations, **options).tally.kinds.items()}


def look(*locations: Path, **options: object) -> Findings:
    return examine([str(location) for location in locations], limits=INLINE, **options)


def test_sound_shards_are_counted_and_nothing_is_wrong(tmp_path):
    found = look(write(tmp_path, range(7), max_samples=3), decode=True)
    assert found.tally.kinds == {}
    assert (found.tally.records, found.tally.images, found.regions) == (7, 7, 7)
    assert found.sources == {"test": 7}


def test_bytes_that_changed_are_found(tmp_path):
    path = write(tmp_path, range(3)) / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert wrong(tmp_path) == {"sample: checksum differs: the bytes changed after writing": 1}


def test_pixels_are_looked_at_on_demand(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(replace(record(0), images=(EncodedImage(encoded()[:-40], "png"),)))
    assert wrong(tmp_path) == {}
    assert [name.partition(":")[0] for name in wrong(tmp_path, decode=True)] == ["images"]


def test_torn_tars_and_wrong_indices_are_found(tmp_path):
    path = write(tmp_path, range(3)) / "shard-00000.tar"
    index = path.with_suffix(".idx")
    sound = ShardIndex.load(index)
    entries = sound.entries.copy()
    entries["size"][0] += 512
    ShardIndex(entries, sound.tar_bytes, checksums=False).save(index)
    assert "index: does not say where the samples of its tar lie" in wrong(tmp_path)
    index.write_bytes(b"MMAIDX01 damaged")
    assert wrong(tmp_path) == {"index: is damaged": 1}
    assert wrong(tmp_path) == {}  # a reader made it anew
    os.truncate(path, 3000)
    assert [name.partition(":")[0] for name in wrong(tmp_path)] == ["torn shard"]


def test_keys_are_told_apart_over_all_shards(tmp_path):
    write(tmp_path / "a", range(4), max_samples=2)
    write(tmp_path / "b", range(3, 5))
    assert wrong(tmp_path / "a") == wrong(tmp_path / "b") == {}
    found = look(tmp_path / "a", tmp_path / "b")
    ((name, kind),) = found.tally.kinds.items()
    assert name.startswith("key: is that of")
    assert kind.count == 1
    assert kind.examples[0]["key"] == "sample-000003"
    body = json.dumps({"source": "s", "parts": [{"type": "text", "text": "x"}]}).encode()
    members(tmp_path / "c.tar", {"x.json": body, "y.json": body, "x.json~": body})
    assert sum(wrong(tmp_path / "c.tar").values()) == 1


def test_a_repeated_key_is_wrong_and_not_sound(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a", range(6))
    with ShardWriter(tmp_path / "b") as writer:
        for n in (4, 5, 6):
            writer.write(record(n, source="other" if n < 6 else "more"))
    report = tmp_path / "found.json"
    paths = [str(tmp_path / name) for name in "ab"]
    command = [*paths, "--processes", "0", "--json", str(report)]
    assert main([*command, "--max-share", "0.23"]) == 0  # of nine samples two are wrong, 22.2 %
    out = capsys.readouterr().out
    assert (
        "7 sound records (7 conversations, 0 documents, 7 images, 6 boxes and points), 2 things wrong (22.22%)" in out
    )
    assert f"{paths[1]}: 1 sound, 2 wrong" in out
    assert main([*command, "--max-share", "0.2"]) == 1  # 2 of 11, as once was counted, is less
    found = json.loads(report.read_text())
    assert (found["sound"], found["wrong"], found["share"]) == (7, 2, 2 / 9)
    assert found["sources"] == {"test": 6, "more": 1}
    assert not {"rows", "bytes", "refused", "log_bytes"} & set(found)
    monkeypatch.setattr("data_pipelines.validate._NAMED", 3)  # of four, the last is only counted
    assert main([*command, "--max-share", "0.23"]) == 0
    again = json.loads(report.read_text())
    assert {name: found[name] for name in ("sets", "sound", "wrong")} == {
        name: again[name] for name in ("sets", "sound", "wrong")
    }


def test_samples_that_a_torn_shard_lost_are_counted_where_its_index_knows_them(tmp_path):
    path = write(tmp_path, range(8)) / "shard-00000.tar"
    index = ShardIndex.load(path.with_suffix(".idx"))
    os.truncate(path, int(index.entries["offset"][4]) + 100)
    found = look(tmp_path)
    assert (found.tally.records, found.wrong, found.bad[str(tmp_path)]) == (4, 4, 4)
    path.with_suffix(".idx").unlink()
    assert look(tmp_path).wrong == 1


def test_a_location_without_a_shard_is_found_and_the_others_are_checked(tmp_path, capsys):
    write(tmp_path / "a", range(3))
    (tmp_path / "empty").mkdir()
    command = [str(tmp_path / name) for name in ("a", "empty")]
    assert main([*command, "--processes", "0"]) == 1
    out = capsys.readouterr().out
    assert "3 sound records" in out
    assert f"{tmp_path}/empty: no shard (*.tar) there" in out
    assert main([*command, "--processes", "0", "--max-share", "0.25"]) == 0
    assert main([command[1], "--processes", "0"]) == 2


def test_the_bar_begins_with_the_first_answer(tmp_path, monkeypatch):
    """Processes take seconds to start, and the time left was told from that."""
    began, shown = [], []

    def in_order(*arguments):
        for answer in workers.in_order(*arguments):
            began.append(len(shown))
            yield answer

    class Bar(tqdm):
        def __init__(self, *args, **options):
            shown.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(validate, "in_order", in_order)
    monkeypatch.setattr(validate, "tqdm", Bar)
    look(write(tmp_path, range(3)), progress=True)
    assert began == [0, 1, 1]
    assert (shown[0].n, shown[0].total) == (3, 3)


def test_equal_digests_of_different_keys_are_no_repetition(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.validate._digest", lambda key: 7)
    assert wrong(write(tmp_path, range(4))) == {}


def test_what_cannot_be_rendered_is_found_with_a_tokenizer(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write(replace(record(0)))
        writer.write(replace(record(1), messages=(user("q"), assistant("a"), assistant("b")), images=()))
    VOCAB.save(tmp_path)
    assert wrong(tmp_path / "shards") == {}
    found = look(tmp_path / "shards", tokenizer=str(tmp_path / "tokenizer.json"))
    assert list(found.tally.kinds) == ["messages: message 2: an assistant turn must follow a user or an observation"]
    assert found.tokens > 16


def test_foreign_shards_are_no_records(tmp_path):
    members(tmp_path / "x.tar", {"a.jpg": encoded(), "a.txt": b"x"})
    assert wrong(tmp_path / "x.tar") == {"json: is missing": 1}
    with pytest.raises(ShardError, match="no shard"):
        look(tmp_path / "none")


def test_the_command(tmp_path, capsys):
    write(tmp_path / "a", range(3))
    write(tmp_path / "b", range(2, 4))
    assert main([str(tmp_path / "a"), "--decode"]) == 0
    assert "3 sound records (3 conversations, 0 documents, 3 images, 3 boxes and points), 0 things wrong" in (
        capsys.readouterr().out
    )
    report = tmp_path / "found.json"
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(report), "--processes", "0"]) == 1
    assert json.loads(report.read_text())["wrong"] == 1
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--max-share", "0.5", "--processes", "0"]) == 0
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path / "a"), "--processes", "-1"]) == 2
    assert np.sum([path.suffix == ".tar" for path in (tmp_path / "a").iterdir()]) == 1


def test_a_tar_without_a_whole_sample_is_one_wrong_thing_of_its_set(tmp_path):
    write(tmp_path, range(5), max_samples=3)
    (tmp_path / "shard-00000a.tar").write_bytes(b"")
    found = look(tmp_path)
    assert found.tally.records == 5
    assert wrong(tmp_path) == {"torn shard: empty file": 1}
    (tmp_path / "shard-00003.tar").write_bytes((tmp_path / "shard-00001.tar").read_bytes())
    assert [kind.count for name, kind in look(tmp_path).tally.kinds.items() if name.startswith("key")] == [2]


def test_a_folder_of_sets_is_checked_set_by_set(tmp_path, capsys):
    write(tmp_path / "sets" / "a", range(3))
    path = write(tmp_path / "sets" / "b", range(3, 5)) / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert main([str(tmp_path / "sets"), "--processes", "0", "--json", str(tmp_path / "found.json")]) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path}/sets/a: 3 sound, 0 wrong" in out
    assert f"{tmp_path}/sets/b: 1 sound, 1 wrong" in out
    by_set = json.loads((tmp_path / "found.json").read_text())["sets"]
    assert {Path(name).name: counts for name, counts in by_set.items()} == {
        "a": {"sound": 3, "wrong": 0},
        "b": {"sound": 1, "wrong": 1},
    }
    assert main([str(tmp_path)]) == 2
    assert "no shard" in capsys.readouterr().err


def test_the_command_in_processes_as_it_is_typed(tmp_path):
    write(tmp_path / "a", range(3))
    command = [sys.executable, "-m", "data_pipelines.validate", str(tmp_path / "a"), "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 sound records" in done.stdout
