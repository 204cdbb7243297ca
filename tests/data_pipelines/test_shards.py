"""Shards: written whole or not at all, read at random, and usable when cut short."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_samples import record

from data_pipelines.shards import (
    ShardError,
    ShardIndex,
    ShardSet,
    ShardWriter,
    TornTail,
    _header,
    encode_sample,
    scan,
    split_name,
)
from mmagent.chat import Text, user
from mmagent.records import Record, RecordError, from_sample


def write(folder: Path, count: int, **limits: int) -> list[Path]:
    with ShardWriter(folder, **limits) as writer:
        for n in range(writer.samples, count):
            writer.write(record(n))
    return sorted(folder.glob("*.tar"))


def write_and_fail(folder: Path, after: int) -> None:
    with ShardWriter(folder, max_samples=5) as writer:
        for n in range(after):
            writer.write(record(n))
        raise RuntimeError("interrupted")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


@given(
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=120),
    st.integers(0, 1 << 35) | st.sampled_from((0, 511, 512, (1 << 33) - 1, 1 << 33)),
)
@settings(deadline=None)
def test_headers_are_those_of_the_standard_library(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        wanted = info.tobuf(tarfile.GNU_FORMAT)
    except UnicodeEncodeError:
        with pytest.raises(UnicodeEncodeError):
            _header(name, size)
    else:
        assert _header(name, size) == wanted


def test_what_is_written_is_read_at_random(tmp_path):
    assert len(write(tmp_path, 23, max_samples=10)) == 3
    shards = ShardSet(tmp_path)
    assert len(shards) == 23
    assert shards.torn == ()
    for n in (22, 0, 9, 10, 11, 5):
        assert from_sample(shards.read(n)) == record(n)
    assert shards.where(10) == "shard-00001.tar@0"
    with pytest.raises(IndexError, match="23 of 23"):
        shards.read(23)


def test_plain_webdataset_reads_them(tmp_path):
    paths = write(tmp_path, 7, max_samples=4)
    dataset = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    seen = [
        from_sample({k: v for k, v in sample.items() if not k.startswith("__") or k == "__key__"}) for sample in dataset
    ]
    assert seen == [record(n) for n in range(7)]


@pytest.mark.parametrize("folder", ["", "train/v1.2/"])
def test_what_plain_webdataset_wrote_is_read(tmp_path, folder):
    long_name = folder + "x" * 120  # beyond the 100 bytes of a classic tar header
    with webdataset.TarWriter(str(tmp_path / "foreign.tar")) as writer:
        for key in (f"{folder}a", f"{folder}b", long_name):
            writer.write(
                {"__key__": key, "json": {"source": "w", "parts": [{"type": "text", "text": key}]}, "x.txt": "hi"}
            )
    shards = ShardSet(tmp_path)
    assert [from_sample(shards.read(n)).key for n in range(3)] == [f"{folder}a", f"{folder}b", long_name]
    assert shards.read(1)["x.txt"] == b"hi"


def test_members_that_belong_to_no_sample_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        for name, kind in (("dir", tarfile.DIRTYPE), ("a.json", tarfile.REGTYPE), ("README", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 2 * (kind == tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("b.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    shards = ShardSet(tmp_path)
    assert [shards.read(n) for n in range(len(shards))] == [{"__key__": "a", "json": b"{}"}]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.json", ("a", "json")),
        ("d.1/a.0.PNG", ("d.1/a", "0.png")),
        ("noext", None),
        ("._a.json", None),
        ("d.1/noext", None),
    ],
)
def test_split_name_is_that_of_webdataset(name, expected):
    assert split_name(name) == expected
    base, extension = webdataset.tariterators.base_plus_ext(name)
    assert (None if base is None else (base, extension.lower())) == expected


def test_a_hidden_file_belongs_to_no_sample():
    assert split_name("d/.hidden.json") is None  # webdataset would make a sample named "d/" of it


def test_a_missing_or_damaged_index_is_rebuilt(tmp_path):
    (path,) = write(tmp_path, 5)
    index = path.with_suffix(".idx")
    good = ShardIndex.load(index)
    for damage in (None, b"", index.read_bytes()[:-3], index.read_bytes()[:40] + b"?" + index.read_bytes()[41:]):
        index.unlink()
        if damage is not None:
            index.write_bytes(damage)
        assert [from_sample(ShardSet(tmp_path).read(n)) for n in range(5)] == [record(n) for n in range(5)]
        rebuilt = ShardIndex.load(index)
        assert rebuilt.entries[["offset", "size"]].tolist() == good.entries[["offset", "size"]].tolist()


def test_changed_bytes_are_noticed(tmp_path):
    (path,) = write(tmp_path, 3)
    data = bytearray(path.read_bytes())
    data[int(ShardIndex.load(path.with_suffix(".idx")).entries["offset"][1]) + 600] ^= 1
    path.write_bytes(data)
    shards = ShardSet(tmp_path)
    assert from_sample(shards.read(2)) == record(2)
    with pytest.raises(RecordError, match=r"shard-00000\.tar@\d+: sample: checksum"):
        shards.read(1)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_tar_cut_anywhere_gives_its_whole_samples(tmp_path, with_index):
    (path,) = write(tmp_path, 4)
    whole, entries = path.read_bytes(), ShardIndex.load(path.with_suffix(".idx")).entries
    if not with_index:
        path.with_suffix(".idx").unlink()
    ends = (entries["offset"] + entries["size"]).tolist()
    cuts = {*range(ends[0], ends[3] + 600, 397), *(end + n for end in ends for n in (-1, 0, 1))}
    for cut in sorted(cut for cut in cuts if cut >= ends[0]):
        path.write_bytes(whole[:cut])
        shards = ShardSet(tmp_path)
        (torn,) = shards.torn
        assert torn.shard == "shard-00000.tar"
        assert torn.problem
        assert torn.offset <= cut
        good = []
        for n in range(len(shards)):
            try:
                good.append(from_sample(shards.read(n)))
            except RecordError:
                assert n == len(shards) - 1, "only the sample at the cut can be incomplete"
        assert good == [record(n) for n in range(sum(end <= cut for end in ends))]


def test_a_cut_shard_is_reported_each_time(tmp_path):
    (path,) = write(tmp_path, 4)
    path.with_suffix(".idx").unlink()
    path.write_bytes(path.read_bytes()[:3000])
    assert [len(ShardSet(tmp_path).torn) for _ in range(2)] == [1, 1]
    assert not path.with_suffix(".idx").exists()


def test_the_torn_tail_names_shard_and_offset(tmp_path):
    (path,) = write(tmp_path, 4)
    ends = ShardIndex.load(path.with_suffix(".idx")).entries
    path.write_bytes(path.read_bytes()[: int(ends["offset"][2]) + 10])
    (torn,) = ShardSet(tmp_path).torn
    assert torn == TornTail(path.name, int(ends["offset"][2]), torn.problem, lost=2)
    assert "2 of 4 samples lost" in torn.problem


def test_what_cannot_be_used_is_refused_by_name(tmp_path):
    with pytest.raises(ShardError, match="nothing: no shard"):
        ShardSet(tmp_path / "nothing")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ShardError, match="not one whole sample"):
        ShardSet(tmp_path / "empty.tar")
    write(tmp_path / "mix" / "packed", 2)
    with pytest.raises(ShardError, match=r"mix: no shard .*; its sub-folders hold some"):
        ShardSet(tmp_path / "mix")
    plain = (tmp_path / "mix" / "packed" / "shard-00000.tar").read_bytes()
    with tarfile.open(tmp_path / "squeezed.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(ShardError, match=r"squeezed\.tar: a compressed tar"):
        ShardSet(tmp_path / "squeezed.tar")
    (tmp_path / "noise.tar").write_bytes(os.urandom(2000))
    with pytest.raises(ShardError, match=r"noise\.tar"):
        ShardSet(tmp_path / "noise.tar")
    (tmp_path / "glob-1.tar").write_bytes(plain)
    assert len(ShardSet(str(tmp_path / "glob-*.tar"))) == 2


def test_writer_splits_by_samples_and_by_bytes(tmp_path):
    paths = write(tmp_path / "count", 9, max_samples=4)
    assert [len(scan(path)[0].entries) for path in paths] == [4, 4, 1]
    paths = write(tmp_path / "size", 9, max_bytes=8000)
    assert len(paths) > 2
    ends = [scan(path)[0].entries for path in paths]
    assert all(int(e["offset"][-1] + e["size"][-1]) <= 8000 for e in ends)
    assert len(write(tmp_path / "tiny", 3, max_bytes=1)) == 3  # a sample above the limit gets a shard of its own


def test_writer_goes_on_after_the_last_whole_shard(tmp_path):
    write(tmp_path / "once", 23, max_samples=5)
    for stop in range(0, 23, 3):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(RuntimeError, match="interrupted"):
            write_and_fail(folder, stop)
        assert not list(folder.glob("*.partial"))
        again = ShardWriter(folder, max_samples=5)
        assert again.samples == (max(stop - 1, 0) // 5) * 5
        again.abandon()
        write(folder, 23, max_samples=5)
        assert contents(folder) == contents(tmp_path / "once")


KILLED = """
import sys
sys.path[:0] = [{tests!r}]
from data_pipelines.shards import ShardWriter
from shard_samples import record
with ShardWriter({folder!r}, max_samples=5) as writer:
    for n in range(writer.samples, 5000):
        writer.write(record(n))
        print(n, flush=True)
"""


def test_kill_9_leaves_no_torn_shard(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        for _ in range(17):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    stale = tmp_path / "killed" / "shard-00001.idx.99.partial"
    stale.write_bytes(b"left over")
    writer = ShardWriter(tmp_path / "killed", max_samples=5)
    assert writer.samples >= 30
    assert not stale.exists()
    for n in range(writer.samples, 203):
        writer.write(record(n))
    writer.close()
    write(tmp_path / "once", writer.samples, max_samples=5)
    assert contents(tmp_path / "killed") == contents(tmp_path / "once")


def test_two_writers_at_once_are_refused(tmp_path):
    with ShardWriter(tmp_path), pytest.raises(ShardError, match="another process"):
        ShardWriter(tmp_path)
    with ShardWriter(tmp_path), ShardWriter(tmp_path, prefix="shard-2"):
        pass


def test_writer_refuses_bad_records_and_damaged_shards(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(record(0))
        with pytest.raises(ValueError, match="sample-000000: key used twice"):
            writer.write(record(0))
        with pytest.raises(RecordError, match="bad: source"):
            writer.write(Record("bad", "", (user("q"),)))
    (path,) = tmp_path.glob("*.tar")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ShardError, match="damaged at byte 0"):
        ShardWriter(tmp_path)
    with pytest.raises(ValueError, match="positive"):
        ShardWriter(tmp_path, max_samples=0)


def test_reading_is_safe_from_threads_with_few_open_files(tmp_path):
    write(tmp_path, 40, max_samples=2)
    shards, failures = ShardSet(tmp_path, open_files=2), []

    def reads(seed: int) -> None:
        try:
            for n in np.random.default_rng(seed).integers(0, 40, 200).tolist():
                assert shards.read(n)["__key__"] == f"sample-{n:06d}"
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    held = [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link)]
    assert len(held) <= 2


def test_contents_tell_shards_of_equal_size_apart(tmp_path):
    """One letter in one sample, or samples in another order; an index that was lost and made anew says less."""

    def said(*texts: str) -> list[Record]:
        return [Record(text, "text", parts=(Text(text),)) for text in texts]

    of = {"a": said("one", "two"), "again": said("one", "two"), "b": said("ore", "tvo"), "turned": said("two", "one")}
    for name, records in of.items():
        with ShardWriter(tmp_path / name, max_samples=1) as writer:
            for one in records:
                writer.write(one)
    a, again, b, turned = (ShardSet(tmp_path / name) for name in ("a", "again", "b", "turned"))
    assert a.fingerprint() == b.fingerprint() == turned.fingerprint()
    assert a.changed(again.contents()) == []
    assert a.changed(b.contents()) == ["shard-00000.tar", "shard-00001.tar"]
    assert a.changed(turned.contents()) == ["shard-00000.tar", "shard-00001.tar"]
    assert len(a.contents()["layout"]) == len(a.contents()["checksums"]) == 16
    (tmp_path / "again/shard-00000.idx").unlink()
    indexed = ShardSet(tmp_path / "again")
    assert indexed.contents()["checksums"].startswith("--------")
    assert a.changed(indexed.contents()) == indexed.changed(a.contents()) == []
    assert indexed.changed(b.contents()) == ["shard-00001.tar"]


def test_fingerprint_knows_its_shards(tmp_path):
    write(tmp_path / "a", 6, max_samples=3)
    write(tmp_path / "b", 6, max_samples=3)
    write(tmp_path / "c", 7, max_samples=3)
    a, b, c = (ShardSet(tmp_path / name).fingerprint() for name in "abc")
    assert a == b != c


def test_random_reading_is_fast(tmp_path):
    write(tmp_path, 300)
    shards = ShardSet(tmp_path)
    started = time.perf_counter()
    for n in range(300):
        shards.read(299 - n)
    assert time.perf_counter() - started < 3  # some 10,000 a second when the machine is idle


def test_a_sample_too_large_for_memory_is_named_and_not_read(tmp_path, monkeypatch):
    with ShardWriter(tmp_path) as writer:
        writer.write(record(0))
    monkeypatch.setattr("data_pipelines.shards.MAX_SAMPLE", 100)
    with pytest.raises(RecordError, match=r"shard-00000.tar@0: sample: \d+ bytes exceed the limit of 100"):
        ShardSet(tmp_path).read(0)


def test_a_sparse_member_is_refused_where_its_bytes_would_be_others(tmp_path):
    (tmp_path / "a.json").write_bytes(b"")
    os.truncate(tmp_path / "a.json", 1 << 20)
    made = subprocess.run(
        ["tar", "-C", tmp_path, "-S", "--format=gnu", "-cf", tmp_path / "s.tar", "a.json"], check=False
    )
    if made.returncode:
        pytest.skip("tar here makes no sparse members")
    with pytest.raises(RecordError, match=r"'a\.json' is a sparse file"):
        ShardSet(tmp_path / "s.tar").read(0)


def test_what_is_noted_before_a_shard_is_there_when_the_shard_is(tmp_path):
    """A kill may leave a note without its shard, never a shard without its note."""
    noted = []

    def note(number: int) -> None:
        assert not (tmp_path / f"shard-{number:05d}.tar").exists()
        noted.append((number, writer.samples))

    with ShardWriter(tmp_path, max_samples=2, before_shard=note) as writer:
        for n in range(5):
            writer.append(encode_sample(record(n)))
    assert noted == [(0, 2), (1, 4), (2, 5)]
    assert len(ShardSet(tmp_path)) == 5


def test_a_scan_names_the_keys_of_what_it_indexes(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for n in range(3):
            writer.write(record(n))
    path = tmp_path / "shard-00000.tar"
    for cut in (path.stat().st_size, 5000, 2500):
        os.truncate(path, cut)
        keys: list[str] = []
        index, _ = scan(path, keys)
        assert keys == [f"sample-{n:06d}" for n in range(len(index.entries))]
