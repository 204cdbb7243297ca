"""Shards and checkpoints on storage whose calls fail now and then: read to the last bit, or refused with their name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from shard_samples import record

from data_pipelines.image_folder import _read
from data_pipelines.shards import ShardSet, ShardWriter, open_index
from mmagent import retries
from mmagent.engine import checkpoint
from mmagent.records import RecordError
from mmagent.train.loop import fit
from tests.engine_kit import toy_run


class Faults:
    """Wraps a call of the operating system: every ``n``-th raises ``number``, at most ``most`` times."""

    def __init__(self, call, number: int, n: int = 2, most: int = 10**6):
        self.call, self.number, self.n, self.most = call, number, n, most
        self.calls = self.raised = 0

    def __call__(self, *args, **how):
        self.calls += 1
        if self.calls % self.n == 0 and self.raised < self.most:
            self.raised += 1
            raise OSError(self.number, os.strerror(self.number))
        return self.call(*args, **how)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch):
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(retries.retried, "__defaults__", (retries.WAITS, lambda seconds: None))


@pytest.fixture
def shards(tmp_path) -> Path:
    with ShardWriter(tmp_path / "data", max_samples=4) as writer:
        for n in range(12):
            writer.write(record(n))
    return tmp_path / "data"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("call", ["pread", "open"])
def test_samples_come_whole_from_storage_that_fails_now_and_then(shards, monkeypatch, number, call):
    expected = [ShardSet(shards).read(n) for n in range(12)]
    faults, before = Faults(getattr(os, call), number), retries.total()
    monkeypatch.setattr(os, call, faults)
    some = ShardSet(shards, open_files=1)
    assert [some.read(n) for n in range(12)] == expected
    assert retries.total() - before == faults.raised > 0


def test_a_stale_handle_is_opened_anew(shards, monkeypatch):
    some, pread = ShardSet(shards), os.pread
    expected, stale = some.read(0), some._file(0).fd

    def failing(fd, size, offset):
        if fd == stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(fd, size, offset)

    held = some._file(0)  # so that the number is not given out again
    monkeypatch.setattr(os, "pread", failing)
    assert some.read(0) == expected
    assert held.fd == stale


def test_storage_that_is_gone_is_an_error_with_the_shards_name(shards, monkeypatch):
    some = ShardSet(shards)
    monkeypatch.setattr(os, "pread", Faults(os.pread, errno.EIO, n=1))
    with pytest.raises(OSError, match=r"7 times.*shard-00001.tar") as raised:
        some.read(5)
    assert not isinstance(raised.value, RecordError)  # which would be quarantined as a bad sample


def test_an_index_is_not_rebuilt_and_no_shard_called_torn_for_a_moment_of_no_answer(shards, monkeypatch):
    path = shards / "shard-00000.tar"
    (shards / "shard-00000.idx").unlink()
    monkeypatch.setattr("tarfile.open", Faults(__import__("tarfile").open, errno.EIO, n=1, most=3))
    index, torn = open_index(path)
    assert torn is None
    assert len(index.entries) == 4


def test_images_of_a_storage_that_is_gone_are_not_called_bad(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(b"image")
    read, numbers = Path.read_bytes, [errno.EIO, errno.ESTALE]

    def failing(self: Path) -> bytes:
        if numbers:
            raise OSError(numbers.pop(), "out of order")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert _read(path, "key") == b"image"
    with pytest.raises(RecordError):
        _read(tmp_path / "none.png", "key")
    numbers += [errno.EIO] * 99
    with pytest.raises(OSError, match=r"7 times.*image.png"):
        _read(path, "key")


def test_a_run_resumes_from_a_checkpoint_on_storage_that_fails_now_and_then(tmp_path, monkeypatch):
    toy = toy_run(tmp_path)
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=3)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", Faults(checkpoint.hashlib.file_digest, errno.EIO, n=2))
    monkeypatch.setattr(checkpoint.torch, "load", Faults(checkpoint.torch.load, errno.ESTALE, n=2))
    assert toy_run(tmp_path).run.resume() == 3


def test_a_checkpoint_that_cannot_be_read_is_no_torn_one(tmp_path, monkeypatch):
    """Taking it for torn would set a good checkpoint aside, and train from an older one."""
    toy = toy_run(tmp_path)
    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=3)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", Faults(checkpoint.hashlib.file_digest, errno.EIO, n=1))
    with pytest.raises(OSError, match=r"7 times.*step-00000003"):
        toy_run(tmp_path).run.resume()
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
