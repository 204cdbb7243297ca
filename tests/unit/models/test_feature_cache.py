"""What was seen comes back bit for bit or not at all, whoever wrote it, within a limited size."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmagent.models import feature_cache
from mmagent.models.feature_cache import CachedFeatures, FeatureCache, FeatureCacheConfig, content_key

CELLS, WIDTH, SUMMARY = 16, 32, 8
BYTES = 2 * (CELLS * WIDTH + SUMMARY)
"""Of a value in float16, beside which a file holds some 200 more."""


def cache_in(folder: Path, limit_gb: float = 1.0, dtype: str = "float16") -> FeatureCache:
    return FeatureCache(FeatureCacheConfig(str(folder), limit_gb, dtype))


def value(number: int, cache: FeatureCache) -> CachedFeatures:
    generator = torch.Generator().manual_seed(number)
    return cache.stored(torch.randn(CELLS, WIDTH, generator=generator), torch.randn(SUMMARY, generator=generator))


def key_of(number: int) -> str:
    return content_key(f"value {number}")


def get(cache: FeatureCache, number: int) -> CachedFeatures | None:
    return cache.get(key_of(number), CELLS, WIDTH, SUMMARY)


def same(one: CachedFeatures | None, other: CachedFeatures) -> bool:
    return one is not None and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_hit_is_what_was_stored_bit_for_bit(dtype, tmp_path):
    cache = cache_in(tmp_path, dtype=dtype)
    assert get(cache, 0) is None
    stored = value(0, cache)
    cache.put(key_of(0), stored)
    assert same(get(cache_in(tmp_path, dtype=dtype), 0), stored)
    assert stored.tokens.dtype == getattr(torch, dtype)
    assert same(get(cache, 0), stored)
    counters = cache.counters
    assert (counters.hits, counters.misses, counters.written, counters.evicted) == (1, 1, 1, 0)
    assert counters.bytes_written == counters.bytes_read > 0


def test_keys_tell_contents_dtypes_shapes_and_borders_apart():
    ones = torch.ones(4)
    keys = [
        content_key("a", ones),
        content_key("a", torch.ones(2, 2)),
        content_key("a", ones.half()),
        content_key("a", torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-20])),
        content_key("a", "b"),
        content_key("ab"),
        content_key("", "ab"),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key("a", torch.ones(4, 2)[:, 0]) == keys[0]  # of what a tensor holds, not how


@pytest.mark.parametrize("hurt", ["cut", "empty", "flipped", "other", "foreign", "folder"])
def test_a_hurt_file_is_a_counted_miss_and_mended(hurt, tmp_path):
    cache = cache_in(tmp_path)
    for number in (0, 1):
        cache.put(key_of(number), value(number, cache))
    path = cache.path(key_of(0))
    raw = path.read_bytes()
    if hurt == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "cut": raw[:-7],
                "empty": b"",
                "flipped": raw[:-1] + bytes([raw[-1] ^ 1]),
                "other": cache.path(key_of(1)).read_bytes(),  # whole, but of another key
                "foreign": b"x" * len(raw),
            }[hurt]
        )
    assert get(cache, 0) is None
    assert (cache.counters.misses, cache.counters.torn, cache.counters.hits) == (1, 1, 0)
    if hurt == "folder":
        with pytest.warns(UserWarning, match="uncached"):
            cache.put(key_of(0), value(0, cache))
    else:
        cache.put(key_of(0), value(0, cache))
        assert same(get(cache, 0), value(0, cache))


def test_a_value_of_other_sizes_is_no_hit(tmp_path):
    cache = cache_in(tmp_path)
    cache.put(key_of(0), value(0, cache))
    assert cache.get(key_of(0), CELLS, WIDTH, SUMMARY + 1) is None
    assert get(cache_in(tmp_path, dtype="bfloat16"), 0) is None


def test_values_that_do_not_fit_the_storage_are_an_error(tmp_path):
    cache = cache_in(tmp_path)
    with pytest.raises(ValueError, match=r"7e\+04.*float16"):
        cache.stored(torch.full((2, 2), 7e4), torch.zeros(2))
    assert cache.stored(torch.full((2, 2), torch.inf), torch.zeros(2)).tokens.isinf().all()  # that is what was seen


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_longest_unused_go_and_the_size_holds(tmp_path, monkeypatch):
    limit = 200 * (BYTES + 200)
    cache = cache_in(tmp_path, limit / 1e9)
    listings = []
    files = cache._files
    monkeypatch.setattr(cache, "_files", lambda: listings.append(1) or files())
    for number in range(600):
        cache.put(key_of(number), value(number, cache))
        stamp = 1e9 + number
        os.utime(cache.path(key_of(number)), (stamp, stamp))
        if number % 10 == 0:
            assert size_of(tmp_path) <= limit
        if get(cache, 0) is not None:  # used again and again: it stays
            os.utime(cache.path(key_of(0)), (stamp + 0.5, stamp + 0.5))
    assert same(get(cache, 0), value(0, cache))
    assert get(cache, 1) is None
    assert all(get(cache, number) is not None for number in range(450, 600))
    assert size_of(tmp_path) > 0.8 * limit
    assert cache.counters.evicted == 600 - len(list(tmp_path.glob("*/*")))
    # 600 values turn the folder over three times; at most one listing a sixty-fourth of the limit, three values
    assert len(listings) < 200


def test_a_process_that_finds_a_full_folder_makes_room(tmp_path):
    limit = 40 * (BYTES + 200)
    first = cache_in(tmp_path)
    for number in range(100):
        first.put(key_of(number), value(number, first))
    second = cache_in(tmp_path, limit / 1e9)
    second.put(key_of(100), value(100, second))
    assert size_of(tmp_path) <= limit
    assert get(second, 100) is not None


def test_a_value_larger_than_the_cache_is_refused(tmp_path):
    cache = cache_in(tmp_path, BYTES / 1e9)
    cache.put(key_of(0), value(0, cache))
    assert cache.counters.refused == 1
    assert size_of(tmp_path) == 0


def test_a_full_disk_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, recwarn):
    cache = cache_in(tmp_path)
    cache.put(key_of(0), value(0, cache))

    def full(path, raw):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = feature_cache._write
    monkeypatch.setattr(feature_cache, "_write", full)
    for number in range(1, 20):
        assert get(cache, number) is None
        cache.put(key_of(number), value(number, cache))
    said = [str(w.message) for w in recwarn if "feature cache" in str(w.message)]
    assert len(said) == 1
    assert "ENOSPC" in said[0]
    assert cache.counters.refused == 19
    assert same(get(cache, 0), value(0, cache))
    monkeypatch.setattr(feature_cache, "_write", write)
    for _ in range(1001):  # tried again after a while
        cache.put(key_of(1), value(1, cache))
    assert same(get(cache, 1), value(1, cache))


def test_a_half_written_file_of_a_full_disk_is_removed(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = cache_in(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="ENOSPC"):
        cache.put(key_of(0), value(0, cache))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_folder_is_no_cache_and_bad_values_are_named():
    assert FeatureCache.open(FeatureCacheConfig()) is None
    with pytest.raises(ValueError, match="dtype 'int8'"):
        FeatureCacheConfig(dtype="int8")
    with pytest.raises(ValueError, match="positive"):
        FeatureCacheConfig(limit_gb=0.0)
    with pytest.raises(ValueError, match="folder"):
        FeatureCache(FeatureCacheConfig())


# ---------------------------------------------------------------------------------------------- processes

PRELUDE = """
import os, signal, sys, json
from pathlib import Path
from tests.unit.models.test_feature_cache import cache_in, get, key_of, same, value
folder, limit = Path(sys.argv[1]), float(sys.argv[2])
cache = cache_in(folder, limit)
"""


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=-1, text=True)


def test_a_writer_killed_half_way_leaves_a_miss(tmp_path):
    """Its file beside is no value, and goes when nobody can be writing it any more."""
    script = "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\ncache.put(key_of(0), value(0, cache))"
    process = child(script, tmp_path, 1.0)
    assert process.wait(60) == -signal.SIGKILL
    (left,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left.name.startswith(".writing-")
    cache = cache_in(tmp_path)
    assert get(cache, 0) is None
    cache.put(key_of(0), value(0, cache))
    assert same(get(cache, 0), value(0, cache))
    assert left.exists()  # it is minutes old
    os.utime(left, (time.time() - 7200,) * 2)
    other = cache_in(tmp_path)
    other.put(key_of(1), value(1, other))
    assert not left.exists()
    assert same(get(other, 0), value(0, other))


def test_processes_share_a_folder(tmp_path):
    """Two write, read and evict the same values at once: nobody fails, whatever is found is right, the size holds."""
    limit = 60 * (BYTES + 200)
    script = """
import random
random.seed(int(sys.argv[3]))
wrong = 0
for turn in range(500):
    number = random.randrange(120)
    found = get(cache, number)
    if found is None:
        cache.put(key_of(number), value(number, cache))
    elif not same(found, value(number, cache)):
        wrong += 1
print(json.dumps({"wrong": wrong, **vars(cache.counters)}))
"""
    processes = [child(script, tmp_path, limit / 1e9, seed) for seed in (1, 2)]
    largest = 0
    while any(process.poll() is None for process in processes):
        found = []
        for path in tmp_path.rglob("*"):
            try:
                found.append(path.stat().st_size if path.is_file() else 0)
            except FileNotFoundError:
                continue
        largest = max(largest, sum(found))
        time.sleep(0.05)
    counts = [json.loads(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    for count in counts:
        assert (count["wrong"], count["torn"], count["refused"]) == (0, 0, 0)
        assert count["hits"] > 0
        assert count["evicted"] > 0
    # what is listed while files come and go may count one that was replaced meanwhile
    assert largest <= 1.05 * limit
    assert size_of(tmp_path) <= limit
