"""What frozen teachers saw, kept on disk by content: one file an image and teacher, of a limited size in all.

``FOLDER/ab/cdef...``   sha256 of key and content, then a safetensors of ``tokens`` and ``summary``

Several processes, on several machines too, may share a folder: files appear whole (written beside, then renamed) and
are read whole, and what a file holds follows from its name, so it does not matter who wrote it. Nothing is synced to
disk: after a power cut a file may be torn, which its checksum tells, and then it is computed again.

Values always pass through the storage dtype, on the miss as well: a run that finds nothing cached returns the same
bits as one that finds everything.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SUM = hashlib.sha256().digest_size
_WRITING = ".writing-"
_STALE = 3600.0  # seconds after which a file that is being written has lost its writer
_SHARDS = 256
_HIGH, _LOW, _STEP = 15 / 16, 7 / 8, 1 / 64
"""Shares of the limit: above the first, the oldest files go until the second is left; the third is what a process may
always write before it looks at the folder again."""
_PAUSE = 1000  # values that are not written after the disk refused one


@dataclass
class FeatureCacheConfig:
    """``folder``: empty for no cache. ``limit_gb``: 10^9 bytes that the files may hold in all; the ones used longest
    ago go first. ``dtype``: what values are stored, and on a miss returned, in.

    ``batch``: images that a teacher sees at once where it must compute them. The last bits of a feature depend on the
    shape of its batch, so with a cache every batch has this size, whatever was found: 1 is exact by construction. A
    larger one keeps an accelerator busy, fills its last batch with copies, and is exact where a row's place in a batch
    does not change its bits; without a cache all images of one grid run together.

    Only pixels that were seen before are found: a fresh random crop never is. What hits is the same stream again: a
    second run of the same seed, a resumed one, ablations of student or loss over the same images, calibration, and
    epochs of a stream that neither crops nor resizes at random.
    """

    folder: str = ""
    limit_gb: float = 20.0
    dtype: str = "float16"
    batch: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"cache: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.limit_gb <= 0 or self.batch < 1:
            raise ValueError(f"cache: limit_gb {self.limit_gb} and batch {self.batch} must be positive")


class CachedFeatures(NamedTuple):
    """``tokens (cells, W)`` and ``summary (S,)`` of one image, in the storage dtype, on the host."""

    tokens: Tensor
    summary: Tensor


@dataclass
class CacheCounters:
    """What this process did: files found, not found, found but ``torn`` or foreign (counted as misses too), written
    and ``evicted`` by it, values that the disk ``refused``; bytes read and written."""

    hits: int = 0
    misses: int = 0
    torn: int = 0
    written: int = 0
    evicted: int = 0
    refused: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class FeatureCache:
    """Look up with :meth:`get`, store with :meth:`put`; ``counters`` say how it went.

    The size is kept by looking at the folder now and then, never at a look-up: a process lists it (256 shards, one
    ``stat`` a file) before it would write more than the room it believes to have. That is half of what was left at its
    last listing, times its own share of what was written before; a sixty-fourth of the limit at first, and at least.
    So four processes that write steadily stay within the limit, each one more may exceed it by a sixty-fourth, and a
    folder that is filled anew costs some 70 listings a process.
    """

    def __init__(self, config: FeatureCacheConfig):
        if not config.folder:
            raise ValueError("cache: give a folder")
        self.folder, self.batch = Path(config.folder), config.batch
        self.dtype = DTYPES[config.dtype]
        self.limit = int(config.limit_gb * 1e9)
        self.counters = CacheCounters()
        self._total: int | None = None  # bytes at the last listing
        self._written = 0  # bytes by this process since then
        self._room = 0
        self._pause = 0

    @classmethod
    def open(cls, config: FeatureCacheConfig) -> FeatureCache | None:
        """None for a config without a folder."""
        return cls(config) if config.folder else None

    def stored(self, tokens: Tensor, summary: Tensor) -> CachedFeatures:
        """Values as they are kept: what a later :meth:`get` returns, bit for bit.

        Raises ``ValueError`` if finite values leave the range of the storage dtype.
        """
        kept = CachedFeatures(*(t.detach().to("cpu", self.dtype).contiguous() for t in (tokens, summary)))
        for before, after in zip((tokens, summary), kept, strict=True):
            if not torch.isfinite(after).all() and torch.isfinite(before).all():
                raise ValueError(f"features of up to {float(before.abs().max()):.3g} do not fit {self.dtype}")
        return kept

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]

    def get(self, key: str, cells: int, width: int, summary: int) -> CachedFeatures | None:
        """The value of ``key``, of these sizes, or None. Whatever is wrong with the file, it is a miss."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                raw = file.read()
        except FileNotFoundError:
            self.counters.misses += 1
            return None
        except OSError:  # unreadable: whose fault that is does not matter here
            return self._torn()
        found = _decode(key, raw, self.dtype)
        if found is None or found.tokens.shape != (cells, width) or found.summary.shape != (summary,):
            return self._torn()
        with contextlib.suppress(OSError):  # evicted meanwhile, or a folder that may only be read
            os.utime(path)  # used just now
        self.counters.hits += 1
        self.counters.bytes_read += len(raw)
        return found

    def _torn(self) -> None:
        self.counters.misses += 1
        self.counters.torn += 1

    def put(self, key: str, value: CachedFeatures) -> None:
        """Store ``value``, made by :meth:`stored`. Where the disk refuses it (full, read-only), one warning says so,
        and the run goes on without."""
        if self._pause:
            self._pause -= 1
            self.counters.refused += 1
            return
        raw = _encode(key, value)
        if len(raw) > self.limit * _LOW:
            self.counters.refused += 1
            return
        try:
            if self._total is None or self._written + len(raw) > self._room:
                self._sweep(len(raw))
            _write(self.path(key), raw)
        except OSError as error:
            self._refuse(error)
            return
        self._written += len(raw)
        self.counters.written += 1
        self.counters.bytes_written += len(raw)

    def _refuse(self, error: OSError) -> None:
        if not self.counters.refused:
            reason = errno.errorcode.get(error.errno or 0, type(error).__name__)
            warnings.warn(f"feature cache {self.folder}: {reason}: {error}; going on uncached", stacklevel=3)
        self.counters.refused += 1
        self._pause = _PAUSE

    def _sweep(self, wanted: int) -> None:
        """List the folder, remove what was used longest ago if ``wanted`` bytes more come too near to the limit, and
        reckon how much may be written until the next time."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        share = 0.0 if self._total is None else self._written / max(total - self._total, self._written, 1)
        if total + wanted > self.limit * _HIGH:
            goal = max(self.limit * _LOW - wanted, 0)
            for _, size, path in files:
                if total <= goal:
                    break
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    path.unlink()
                    self.counters.evicted += 1
                total -= size
        self._total, self._written = total, 0
        self._room = max(int((self.limit * _HIGH - total) * share / 2), int(self.limit * _STEP), wanted)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When every file was last used, its bytes and its path; what writers left behind is removed."""
        for shard in range(_SHARDS):
            folder = self.folder / f"{shard:02x}"
            try:
                entries = list(os.scandir(folder))
            except FileNotFoundError:
                continue
            for entry in entries:
                try:
                    known = entry.stat(follow_symlinks=False)
                    if entry.name.startswith(_WRITING):
                        if time.time() - known.st_mtime > _STALE:
                            os.unlink(entry.path)
                        continue
                except FileNotFoundError:
                    continue
                yield known.st_mtime, known.st_size, Path(entry.path)


def content_key(*parts: bytes | str | Tensor) -> str:
    """sha256, in hexadecimal, of texts, bytes and tensors (dtype, shape and content); no two lists of parts run into
    each other."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)};".encode())
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(flat.numpy()))
        else:
            raw = part.encode() if isinstance(part, str) else part
            digest.update(f"{len(raw)};".encode())
            digest.update(raw)
    return digest.hexdigest()


def _encode(key: str, value: CachedFeatures) -> bytes:
    body = save({"tokens": value.tokens, "summary": value.summary})
    return hashlib.sha256(key.encode() + body).digest() + body


def _decode(key: str, raw: bytes, dtype: torch.dtype) -> CachedFeatures | None:
    """None for anything but what :func:`_encode` wrote for this key."""
    digest = hashlib.sha256(key.encode())
    digest.update(memoryview(raw)[_SUM:])
    if raw[:_SUM] != digest.digest():
        return None
    try:
        tensors = load(raw[_SUM:])
    except SafetensorError:
        return None
    if set(tensors) != {"tokens", "summary"} or any(t.dtype != dtype for t in tensors.values()):
        return None
    return CachedFeatures(tensors["tokens"], tensors["summary"])


def _write(path: Path, raw: bytes) -> None:
    """Whole or not at all; who writes the same file at once has another name beside it (:func:`mmagent.files.new_file`
    has one for all, and waits for the disk)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{_WRITING}{os.getpid()}-{secrets.token_hex(4)}-{path.name[:8]}")
    try:
        with beside.open("wb") as file:
            file.write(raw)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
