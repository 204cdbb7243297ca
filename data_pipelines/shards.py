"""Shards: webdataset tar files with an index beside each, written atomically and read at random.

``NAME.tar`` is a plain webdataset shard. ``NAME.idx`` says where its samples lie: a header, one
:data:`ENTRY` a sample, and a checksum over both. A shard appears under its name only when it is whole, so a
killed writer leaves nothing torn and goes on after the last whole shard. A reader needs 16 bytes of memory a
sample, rebuilds an index that is missing, and of a tar that was cut short uses the whole samples and reports
the torn tail.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import os
import re
import struct
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from mmagent.files import sync
from mmagent.records import Record, RecordError, to_sample
from mmagent.retries import TRANSIENT, retried

ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
"""Of one sample: first byte, byte count and CRC-32 of its members, headers included."""
_MAGIC = b"MMAIDX01"
_HEADER = struct.Struct("<8sQQI")  # magic, bytes of the tar, samples, whether the checksums are known
_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER = 1 << 20  # bytes of names and attributes of one member
_UNKNOWN = "--------"
MAX_SAMPLE = 1 << 30
"""Bytes that a sample may have to be read: it is held in memory whole."""
_OCTAL = re.compile(rb"[0-7]+")
_MEMBER = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")  # the key, and everything after the first dot of the file's name


class ShardError(ValueError):
    """A shard, or a set of them, that cannot be used at all. The message names it."""


@dataclass(frozen=True)
class TornTail:
    """What is left of a shard that was cut short: everything from ``offset`` on is unusable. ``lost`` samples, where an
    index knows of them, else 0."""

    shard: str
    offset: int
    problem: str
    lost: int = 0


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one tar lie. ``tar_bytes`` is its size when the index was made."""

    entries: np.ndarray
    tar_bytes: int
    checksums: bool

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        body = _HEADER.pack(_MAGIC, self.tar_bytes, len(self.entries), self.checksums) + self.entries.tobytes()
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with temporary.open("wb") as file:
            file.write(body + struct.pack("<I", zlib.crc32(body)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> ShardIndex | None:
        """None when there is no index, or what is there is damaged: it can be rebuilt."""
        try:
            data = retried(path.read_bytes, path)
        except FileNotFoundError:
            return None
        if len(data) < _HEADER.size + 4 or struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
            return None
        magic, tar_bytes, samples, checksums = _HEADER.unpack_from(data)
        if magic != _MAGIC or len(data) != _HEADER.size + samples * ENTRY.itemsize + 4:
            return None
        return ShardIndex(np.frombuffer(data, ENTRY, samples, _HEADER.size), tar_bytes, bool(checksums))


def split_name(name: str) -> tuple[str, str] | None:
    """``(key, extension)`` of a member as webdataset reads it, or None for a file that belongs to no sample."""
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def scan(path: Path, keys: list[str] | None = None) -> tuple[ShardIndex, TornTail | None]:
    """Index a tar by walking its headers. Checksums stay unknown, as the data is not read. ``keys`` is given the key of
    every sample, in their order."""
    size = path.stat().st_size
    entries: list[tuple[int, int, int]] = []
    found: list[str] = [] if keys is None else keys
    key, end, problem = None, 0, ""
    try:
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _walk(tar):
                tar.members.clear()  # or the archive would be remembered whole
                name = split_name(member.name) if member.isfile() else None
                if tar.offset > size:
                    problem = f"{member.name} is cut short"
                    if name is not None and name[0] == key:
                        end = entries.pop()[0]
                        found.pop()
                    break
                end = tar.offset
                if name is not None and name[0] == key:
                    entries[-1] = (entries[-1][0], end - entries[-1][0], 0)
                elif name is not None:
                    entries.append((member.offset, end - member.offset, 0))
                    key = name[0]
                    found.append(key)
            else:
                with path.open("rb") as file:
                    file.seek(end)
                    if file.read(_BLOCK) != bytes(_BLOCK):
                        problem = "no end-of-archive mark"
    except _NO_TAR as error:
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            raise  # storage that fails for a moment must not look like a shard cut short
        problem = _told(error)
    if problem and not entries and _looks_compressed(path):
        raise ShardError(f"{path}: a compressed tar cannot be read at random; unpack it first")
    for offset, length, _ in entries:
        if length >= 1 << 32:
            raise ShardError(f"{path}: the sample at {offset} has {length} bytes, the limit is 4 GiB")
    index = ShardIndex(np.array(entries, ENTRY), size, checksums=False)
    return index, TornTail(path.name, end, problem) if problem else None


_NO_TAR = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)
"""What the standard library raises for headers that are none, or were made to break it."""


def _told(error: Exception) -> str:
    return "headers stand too deep in one another" if isinstance(error, RecursionError) else str(error)


def _walk(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. One of a negative size would lead back, and round and round."""
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= member.offset:
            raise tarfile.ReadError(f"{member.name}: a size of {member.size} bytes")
        yield member


class _Headers(io.BufferedReader):
    """A tar of which only headers are read: one that claims to be long would be read into memory whole."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _looks_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def open_index(path: Path) -> tuple[ShardIndex, TornTail | None]:
    """The index of the tar at ``path``: the one beside it where that is sound and fits, else rebuilt.

    A rebuilt index of a whole tar is kept for the next time where the folder can be written.
    """
    size = retried(path.stat, path).st_size
    index = ShardIndex.load(path.with_suffix(".idx"))
    if index is not None and index.tar_bytes == size:
        return index, None
    if index is not None and index.tar_bytes > size:
        ends = index.entries["offset"] + index.entries["size"]
        whole = int(np.searchsorted(ends, size, side="right"))
        problem = f"{size} of {index.tar_bytes} bytes, {len(ends) - whole} of {len(ends)} samples lost"
        kept = ShardIndex(index.entries[:whole], size, index.checksums)
        return kept, TornTail(path.name, int(ends[whole - 1]) if whole else 0, problem, len(ends) - whole)
    index, torn = retried(lambda: scan(path), path)
    if torn is None and os.access(path.parent, os.W_OK):
        index.save(path.with_suffix(".idx"))
    return index, torn


class _File:
    """An open file that closes when nobody reads from it any more."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardSet:
    """All samples of a folder, a glob (``{000..127}`` as well) or one tar, read at random, in the order of the shards'
    names.

    Reading is safe from several threads; at most ``open_files`` tars stay open.
    """

    def __init__(self, location: str | Path, open_files: int = 64):
        """Raises :class:`ShardError` when there is no sample at ``location``."""
        self.location = str(location)
        self.paths = find_shards(self.location)
        opened = [open_index(path) for path in self.paths]
        self._indices = [index for index, _ in opened]
        self.torn = tuple(torn for _, torn in opened if torn is not None)
        self._starts = np.cumsum([0, *(len(index.entries) for index in self._indices)])
        self._contents: dict[str, str] = {}
        self._open_files = open_files
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        if not len(self):
            problems = "".join(f"; {torn.shard}: {torn.problem}" for torn in self.torn[:3])
            raise ShardError(f"{self.location}: {len(self.paths)} shards, but not one whole sample{problems}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def bytes(self) -> int:
        """Size of all tars on disk."""
        return sum(index.tar_bytes for index in self._indices)

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [len(index.entries) for index in self._indices]

    def fingerprint(self) -> str:
        """A digest of the shards' names, sizes and sample counts: what an exact resume has to find again."""
        digest = hashlib.blake2b(digest_size=8)
        for path, index in zip(self.paths, self._indices, strict=True):
            digest.update(f"{path.name}:{index.tar_bytes}:{len(index.entries)}\n".encode())
        return digest.hexdigest()

    def contents(self) -> dict[str, str]:
        """What tells another content of the same :meth:`fingerprint`, eight digits a shard in their order: "layout",
        of where its samples lie, and "checksums", of theirs; dashes where those are not known, as nobody but our writer
        notes them. From the indices, so nothing is read."""
        if not self._contents:
            layouts, sums = [], []
            for index in self._indices:
                places = zlib.crc32(index.entries["size"].tobytes(), zlib.crc32(index.entries["offset"].tobytes()))
                layouts.append(f"{places:08x}")
                sums.append(f"{zlib.crc32(index.entries['crc'].tobytes()):08x}" if index.checksums else _UNKNOWN)
            self._contents = {"layout": "".join(layouts), "checksums": "".join(sums)}
        return self._contents

    def changed(self, contents: Mapping[str, str]) -> list[str]:
        """Names of the shards that held something else when their ``contents`` were these, of a set with this
        :meth:`fingerprint`. A checksum that is not known now, or was not then, is equal to any."""
        mine, found = self.contents(), []
        for n, path in enumerate(self.paths):
            place = slice(8 * n, 8 * n + 8)
            sums = {mine["checksums"][place], contents["checksums"][place]} - {_UNKNOWN}
            if mine["layout"][place] != contents["layout"][place] or len(sums) > 1:
                found.append(path.name)
        return found

    def where(self, index: int) -> str:
        """``shard@offset`` of sample ``index``, for messages."""
        shard, local = self._split(index)
        return f"{self.paths[shard].name}@{self._indices[shard].entries['offset'][local]}"

    def read(self, index: int) -> dict[str, Any]:
        """Sample ``index`` as webdataset would give it: ``__key__`` and bytes by extension.

        Raises :class:`~mmagent.records.RecordError` naming shard and offset when the bytes are not what they were, and
        ``OSError`` naming the shard when its storage does not answer (:mod:`mmagent.retries`).
        """
        shard, local = self._split(index)
        entry = self._indices[shard].entries[local]
        if entry["size"] > MAX_SAMPLE:
            raise RecordError(self.where(index), "sample", f"{entry['size']} bytes exceed the limit of {MAX_SAMPLE}")
        data = retried(lambda: self._bytes(shard, int(entry["size"]), int(entry["offset"])), self.paths[shard])
        if len(data) != entry["size"]:
            raise RecordError(self.where(index), "sample", f"{len(data)} of {entry['size']} bytes can be read")
        if self._indices[shard].checksums and zlib.crc32(data) != entry["crc"]:
            raise RecordError(self.where(index), "sample", "checksum differs: the bytes changed after writing")
        return parse_sample(data, self.where(index))

    def _bytes(self, shard: int, size: int, offset: int) -> bytes:
        file = self._file(shard)  # held while reading, or another thread's eviction would close it
        try:
            return os.pread(file.fd, size, offset)
        except OSError:
            with self._lock:  # a stale handle stays stale: the next try opens the file anew
                if self._files.get(shard) is file:
                    del self._files[shard]
            raise

    def _split(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.location}: sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _file(self, shard: int) -> _File:
        with self._lock:
            file = self._files.pop(shard, None) or _File(self.paths[shard])
            self._files[shard] = file
            if len(self._files) > self._open_files:
                self._files.popitem(last=False)
            return file


def find_shards(location: str) -> list[Path]:
    """The tars of a folder, a glob or one path, in order. Raises :class:`ShardError` where there is none."""
    path = Path(location)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.is_file():
        found = [path]
    else:
        patterns = braceexpand(location) if "{" in location else [location]
        matches = {pattern: glob.glob(pattern) for pattern in patterns}
        found = sorted(Path(name) for names in matches.values() for name in names)
        if found and (lacking := [pattern for pattern, names in matches.items() if not names]):
            raise ShardError(f"{location}: {lacking[0]} is not there ({len(lacking)} of {len(matches)} are missing)")
    if not found:
        below = path.is_dir() and any(path.glob("*/*.tar"))
        hint = "; its sub-folders hold some: give it as the stream's folder, and each is a source" if below else ""
        raise ShardError(f"{location}: no shard (*.tar) there{hint}")
    return found


def shard_sets(location: str) -> list[str]:
    """The shard sets of a location: of a folder without shards its sub-folders that hold some, by name; else itself."""
    path = Path(location)
    if not path.is_dir() or any(path.glob("*.tar")):
        return [location]
    return sorted({str(tar.parent) for tar in path.glob("*/*.tar")}) or [location]


def parse_sample(data: bytes, where: str) -> dict[str, Any]:
    """``__key__`` and the members of one sample by extension, from their bytes in the tar. Raises
    :class:`~mmagent.records.RecordError`; ``where`` names the sample as long as its key is not known."""
    sample: dict[str, Any] = {}
    for path, start, size in _plain_members(data) or _members(data, where):
        name = split_name(path)
        if name is None:
            continue
        key, extension = name
        if sample.setdefault("__key__", key) != key:
            raise RecordError(where, "sample", f"holds two keys, {sample['__key__']!r} and {key!r}")
        if extension in sample:
            raise RecordError(key, extension, "appears twice")
        if start + size > len(data):
            raise RecordError(key, extension, f"{len(data) - start} of {size} bytes are there")
        sample[extension] = data[start : start + size]
    if not sample:
        raise RecordError(where, "sample", "holds no file")
    return sample


def _plain_members(data: bytes) -> list[tuple[str, int, int]] | None:
    """``(path, first byte, size)`` of every file, or None where a header is not of the simplest kind or damaged.

    The standard library's reader knows every kind, at three times the cost.
    """
    found = []
    at = 0
    while at < len(data):
        header = data[at : at + _BLOCK]
        size, checksum = header[124:136].rstrip(b"\0 "), header[148:156].rstrip(b"\0 ")
        plain = header[156:157] in b"0" and not header[345] if len(header) == _BLOCK else False
        if not (plain and _OCTAL.fullmatch(size) and _OCTAL.fullmatch(checksum) and header[0]):
            return None
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(checksum, 8):
            return None
        path = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        found.append((path, at + _BLOCK, int(size, 8)))
        at += _BLOCK + -(-int(size, 8) // _BLOCK) * _BLOCK
    return found


def _members(data: bytes, where: str) -> list[tuple[str, int, int]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = [member for member in _walk(tar) if member.isfile()]
    except _NO_TAR as error:
        raise RecordError(where, "sample", f"is no tar: {_told(error)}") from error
    if sparse := [member.name for member in members if member.issparse()]:
        raise RecordError(where, "sample", f"{sparse[0]!r} is a sparse file, which a tar of samples cannot hold")
    return [(member.name, member.offset_data, member.size) for member in members]


@dataclass(frozen=True)
class EncodedSample:
    """A record as it lies in a tar: ``data`` are its members, headers included."""

    key: str
    data: bytes


def encode_sample(record: Record, *, headers: bool = True) -> EncodedSample:
    """Validate and encode; ``headers`` as in :func:`~mmagent.records.to_sample`. Raises
    :class:`~mmagent.records.RecordError`."""
    return EncodedSample(record.key, _tar_bytes(to_sample(record, headers=headers)))


class ShardWriter:
    """Records to ``FOLDER/PREFIX-00000.tar`` and on, each with its index; whole or not there at all.

    A shard ends before it would exceed ``max_bytes`` or ``max_samples``, so the same records give the same
    bytes, interrupted or not. After a kill make the writer anew: :attr:`samples` says how many are safe, and
    writing goes on with the next one::

        with ShardWriter(folder) as writer:
            for n in range(writer.samples, total):
                writer.write(make_record(n))

    An exception inside the block drops the unfinished shard and keeps the finished ones.
    """

    def __init__(
        self,
        folder: Path | str,
        prefix: str = "shard",
        max_bytes: int = 1 << 28,
        max_samples: int = 10_000,
        before_shard: Callable[[int], None] = lambda number: None,
    ):
        """``before_shard(number)`` is called when all of a shard's samples were given and before the shard appears:
        whoever notes there how far its input is used up finds the note of every shard that a kill left.

        Raises :class:`ShardError` when another process writes there, or a finished shard is damaged."""
        if max_bytes < 1 or max_samples < 1:
            raise ValueError(f"max_bytes {max_bytes} and max_samples {max_samples} must be positive")
        self.folder, self.prefix = Path(folder), prefix
        self.max_bytes, self.max_samples, self._before_shard = max_bytes, max_samples, before_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / f".{prefix}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(f"{self.folder}: another process is writing {prefix!r} there") from error
        for stale in self.folder.glob(f"{glob.escape(prefix)}-{'[0-9]' * 5}.*.partial"):
            stale.unlink()
        self.shards = 0
        self.samples = 0
        while (path := self._path()).is_file():
            index, torn = open_index(path)
            if torn is not None:
                raise ShardError(f"{path}: damaged at byte {torn.offset} ({torn.problem}); delete it to write it anew")
            self.samples += len(index.entries)
            self.shards += 1
        self._file: io.BufferedWriter | None = None
        self._entries: list[tuple[int, int, int]] = []
        self._keys: set[str] = set()
        self._bytes = 0

    def _path(self) -> Path:
        return self.folder / f"{self.prefix}-{self.shards:05d}.tar"

    def write(self, record: Record) -> None:
        """Validate and append. Raises :class:`~mmagent.records.RecordError`, or ``ValueError`` for a key used twice."""
        self.append(encode_sample(record))

    def append(self, sample: EncodedSample) -> None:
        """:meth:`write` for what another process encoded."""
        data = sample.data
        if self._entries and (len(self._entries) >= self.max_samples or self._bytes + len(data) > self.max_bytes):
            self._finish()
        if sample.key in self._keys:
            raise ValueError(f"{sample.key}: key used twice in one shard; webdataset would merge the samples")
        if self._file is None:
            self._file = self._path().with_suffix(".tar.partial").open("wb")
        self._file.write(data)
        self._entries.append((self._bytes, len(data), zlib.crc32(data)))
        self._keys.add(sample.key)
        self._bytes += len(data)
        self.samples += 1

    def _finish(self) -> None:
        assert self._file is not None
        self._before_shard(self.shards)
        end = bytes(2 * _BLOCK)
        self._file.write(end + bytes(-(self._bytes + len(end)) % tarfile.RECORDSIZE))
        total = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._path()
        ShardIndex(np.array(self._entries, ENTRY), total, checksums=True).save(path.with_suffix(".idx"))
        path.with_suffix(".tar.partial").replace(path)  # last, so that a tar under its name always has its index
        sync(self.folder)
        self.shards += 1
        self._file, self._entries, self._bytes = None, [], 0
        self._keys.clear()

    def close(self) -> None:
        """Finish the shard at hand."""
        if self._file is not None:
            self._finish()
        self._lock.close()

    def abandon(self) -> None:
        """Drop the shard at hand and keep the finished ones."""
        if self._file is not None:
            self._file.close()
            self._path().with_suffix(".tar.partial").unlink()
            self.samples -= len(self._entries)
            self._file = None
        self._lock.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _tar_bytes(sample: dict[str, Any]) -> bytes:
    """Members of one sample as they lie in the tar, without times or owners, so that equal records give equal bytes."""
    out = []
    for extension, data in sample.items():
        if extension == "__key__":
            continue
        out += [_header(f"{sample['__key__']}.{extension}", len(data)), data, bytes(-len(data) % _BLOCK)]
    return b"".join(out)


_AFTER_NAME = b"0000644\0" + 2 * b"0000000\0"  # mode, owner, group


def _header(name: str, size: int) -> bytes:
    """``TarInfo(name).tobuf(GNU_FORMAT)`` of a file of ``size`` bytes, at a fifth of the cost where both are short."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or size >= 1 << 33:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)
    before = encoded.ljust(100, b"\0") + _AFTER_NAME + b"%011o\0%011o\0" % (size, 0)
    after = b" 0".ljust(102, b"\0") + tarfile.GNU_MAGIC
    checksum = sum(before) + sum(after) + 7 * ord(" ")  # counted as if its own eight bytes were spaces
    return (before + b"%06o\0" % checksum + after).ljust(_BLOCK, b"\0")
