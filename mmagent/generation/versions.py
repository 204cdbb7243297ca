"""A folder of versions of the weights: full ones, and deltas that say what has changed since the one before.

A full version is a folder of :func:`~mmagent.generation.updates.write_version`. A delta holds, bucket by bucket, the
bits that differ from its base, deflated, and nothing of buckets that are the same; with the base it makes the very bits
of the version, which its checksums prove. Every link is checked as it is read, so a damaged one is found before any of
it is used, and is named. Who writes and finds its base damaged writes a full version instead; who reads can go back to
the newest version that is sound, in the end the full one.

Versions are whole or not there (:mod:`mmagent.files`), whenever their writer is killed. One writer at a time.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmagent import dist
from mmagent.files import new_folder
from mmagent.generation.updates import (
    VERSION,
    Bucket,
    FileBuckets,
    Manifest,
    Source,
    buckets_of_files,
    digest,
    write_version,
)
from mmagent.ops.tensor_files import WeightsError

logger = logging.getLogger(__name__)

DELTA = "delta.bin"
_SAME, _DEFLATED, _WHOLE = 0, 1, 2  # how a bucket stands in a delta


class Damaged(WeightsError):
    """A link of a chain that is not what its writer wrote; the message names it."""


@dataclass
class VersionsConfig:
    """``keep`` the newest so many versions, and what they are made of. ``deltas``: so many in a row, then a full one
    (0: all are full). They are worth it where much stays as it was: bfloat16 weights at small learning rates, frozen
    parts; of float32 weights that are all trained nearly every bit of the mantissa changes."""

    keep: int = 2
    deltas: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1 or self.deltas < 0:
            raise ValueError(f"versions: keep must be positive and deltas not negative, got {self}")


@dataclass(frozen=True)
class Link:
    """What a version's folder says of it. ``base``: the version it is told from, with the seal of that; None of a full
    one. ``digests``: checksums of its buckets; ``parts``: how each stands in a delta, and in how many bytes."""

    folder: Path
    version: int
    bucket_bytes: int
    seal: bytes
    digests: tuple[bytes, ...]
    base: int | None = None
    base_seal: bytes = b""
    manifest: Manifest | None = None
    parts: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(folder: Path) -> Link:
        """Raises :class:`Damaged`."""
        try:
            body = json.loads((folder / VERSION).read_text(encoding="utf-8"))
            digests = tuple(bytes.fromhex(text) for text in body.get("digests", ()))
            common = (folder, int(body["version"]), int(body["bucket_bytes"]), bytes.fromhex(body["seal"]), digests)
            if "base" not in body:
                return Link(*common)
            parts = tuple((int(kind), int(size)) for kind, size in body["parts"])
            manifest = Manifest.from_json(body["manifest"])
            link = Link(*common, int(body["base"]), bytes.fromhex(body["base_seal"]), manifest, parts)
            if manifest.seal(digests) != link.seal or not len(parts) == len(digests) == len(manifest.buckets):
                raise Damaged(f"{folder / VERSION} is damaged: its checksums are not those of its seal")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, Damaged):
                raise
            raise Damaged(f"{folder / VERSION} is not to be read: {error}") from error
        return link


class Layer(Protocol):
    """The bytes of a version by its buckets."""

    manifest: Manifest

    def data(self, index: int) -> Tensor: ...


class FullLayer:
    """A full version whose buckets are checked one by one."""

    def __init__(self, link: Link):
        self.link = link
        try:
            self.files: FileBuckets = buckets_of_files(link.folder, link.version)
        except (WeightsError, OSError) as error:
            raise Damaged(f"version {link.version} in {link.folder}: {error}") from error
        self.manifest = self.files.manifest
        if self.manifest.seal(link.digests) != link.seal:
            raise Damaged(f"version {link.version} in {link.folder} is damaged, or tells no checksums of its buckets")

    def data(self, index: int) -> Tensor:
        try:
            data = self.files.data(index)
        except (WeightsError, OSError) as error:
            raise Damaged(f"version {self.link.version} in {self.link.folder}: {error}") from error
        return _checked(self.link, index, data)


class DeltaLayer:
    """A delta on ``base``; where ``held`` (the weights that a generator has, with the base's seal) are at hand, on
    these: a bucket that they do not make is read from the base."""

    def __init__(self, link: Link, base: Layer, held: Layer | None = None):
        assert link.manifest is not None
        self.link, self.base, self.manifest = link, base, link.manifest
        if not _alike(base.manifest, self.manifest):
            raise Damaged(f"version {link.version} in {link.folder} is not laid out as its base")
        self.held = held if held is not None and _alike(held.manifest, self.manifest) else None

    @cached_property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *(size for _, size in self.link.parts)]).tolist()

    def data(self, index: int) -> Tensor:
        change = self._change(index)
        if self.held is not None:
            made = _applied(self.held.data(index), change)
            if digest(made) == self.link.digests[index]:
                return made
        return _checked(self.link, index, _applied(self.base.data(index), change))

    def _change(self, index: int) -> tuple[int, bytes]:
        (kind, size), where = self.link.parts[index], self.link.folder / DELTA
        try:
            with open(where, "rb") as file:
                file.seek(self._starts[index])
                stored = file.read(size)
            if len(stored) != size or kind not in (_SAME, _DEFLATED, _WHOLE):
                raise ValueError(f"bucket {index} has {len(stored)} of {size} bytes")
            whole = self.manifest.size(index)
            said = zlib.decompressobj().decompress(stored, whole) if kind == _DEFLATED else stored
            if kind != _SAME and len(said) != whole:
                raise ValueError(f"bucket {index} says {len(said)} of {whole} bytes")
        except (OSError, ValueError, zlib.error) as error:
            raise Damaged(f"{where} is damaged: {error}") from error
        return kind, said


class ChainBuckets:
    """A version out of its chain, as a :class:`~mmagent.generation.updates.Source`."""

    def __init__(self, link: Link, top: Layer):
        self.link, self.top, self.manifest, self.seal = link, top, top.manifest, link.seal

    def __iter__(self) -> Iterator[Bucket]:
        count = len(self.manifest.buckets)
        for index in range(count):
            seal = self.seal if index == count - 1 else b""
            told = self.link.digests[index]
            yield Bucket(self.manifest.version, index, count, self.top.data(index), told, seal)

    def check(self) -> None:
        """Read all of it. Raises :class:`Damaged`."""
        for index in range(len(self.manifest.buckets)):
            self.top.data(index)


class Versions:
    """The versions in ``root``."""

    def __init__(self, root: Path | str, config: VersionsConfig | None = None):
        self.root, self.config = Path(root), config or VersionsConfig()

    def folder(self, version: int) -> Path:
        return self.root / f"{version:06d}"

    def there(self) -> list[int]:
        """Versions that lie there, oldest first; nothing is said of their soundness."""
        found = self.root.glob(f"*/{VERSION}") if self.root.is_dir() else ()
        return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())

    def chain(self, version: int) -> list[Link]:
        """The links of a version, itself first, the full one last. Raises :class:`Damaged`."""
        links = [Link.of(self.folder(version))]
        while (base := links[-1].base) is not None:
            link = Link.of(self.folder(base))
            if link.seal != links[-1].base_seal or link.version >= links[-1].version:
                raise Damaged(f"version {base} in {link.folder} is not the one that {links[-1].version} is told from")
            links.append(link)
        return links

    def read(self, version: int, held: tuple[bytes, Layer] | None = None) -> ChainBuckets:
        """A version to be gone through. ``held``: weights at hand, and the seal of the version they are. Raises
        :class:`Damaged`, here or on the way, naming the link."""
        links = self.chain(version)
        layer: Layer = FullLayer(links[-1])
        for link in links[-2::-1]:
            at_hand = held[1] if held is not None and link is links[0] and held[0] == link.base_seal else None
            layer = DeltaLayer(link, layer, at_hand)
        return ChainBuckets(links[0], layer)

    def newest_sound(self) -> ChainBuckets | None:
        """The newest version of which every bit is right, in the end a full one; None where there is none."""
        for version in reversed(self.there()):
            try:
                found = self.read(version)
                found.check()
            except Damaged as error:
                logger.warning("version %d is passed over: %s", version, error)
            else:
                return found
        return None

    def write(self, source: Source, full: bool = False) -> Path:
        """Write a version, ``full`` or as its turn is, and drop what is needed no more. Newer ones, of a run that was
        killed and has begun again before them, go first."""
        version = source.manifest.version
        self._sweep(version)
        base = None if full else self._base(source.manifest)
        folder = self.folder(version)
        if base is None:
            write_version(folder, source)
        else:
            try:
                _write_delta(folder, source, base)
            except Damaged as error:
                logger.warning("version %d is written in full: %s", version, error)
                write_version(folder, source)
        self._prune()
        return folder

    def publish(self, source: Source, full: bool = False) -> str:
        """Write it on the main rank, of a model that ranks hold whole; what servers are told of it, on all."""
        if dist.is_main():
            self.write(source, full)
        return str(self.folder(source.manifest.version).resolve())

    def _base(self, manifest: Manifest) -> ChainBuckets | None:
        """The newest version, where a delta may follow it."""
        there = self.there()
        if not there or not self.config.deltas:
            return None
        try:
            base = self.read(there[-1])
            follows = len(self.chain(there[-1])) <= self.config.deltas and _alike(base.manifest, manifest)
        except Damaged as error:
            logger.warning("version %d is written in full: %s", manifest.version, error)
            return None
        return base if follows else None

    def _sweep(self, version: int) -> None:
        for kind in (".writing-*", ".removing-*"):
            for left in self.root.glob(kind):
                shutil.rmtree(left)
        for newer in reversed([other for other in self.there() if other >= version]):
            shutil.rmtree(self.folder(newer))

    def _prune(self) -> None:
        there, needed = self.there(), set()
        for version in there[-self.config.keep :]:
            try:
                needed |= {link.version for link in self.chain(version)}
            except Damaged:  # what it is told from helps nobody
                needed.add(version)
        for version in reversed(there):  # a delta goes before what it is told from
            if version not in needed:
                shutil.rmtree(self.folder(version))


def _write_delta(folder: Path, source: Source, base: ChainBuckets) -> None:
    manifest, digests, parts, seal = source.manifest, [], [], b""
    with new_folder(folder) as beside:
        with open(beside / DELTA, "wb") as file:
            for bucket in source:
                if bucket.index != len(digests):
                    raise WeightsError(f"{bucket} came instead of {len(digests)}: a delta is written in order")
                kind, stored = _change_of(bucket.data, base.top.data(bucket.index))
                file.write(stored)
                parts.append((kind, len(stored)))
                digests.append(bucket.digest.hex())
                seal = bucket.seal
        if len(digests) != len(manifest.buckets) or not seal:
            raise WeightsError(f"{folder}: {len(digests)} of {len(manifest.buckets)} buckets of {manifest.version}")
        body = {
            "version": manifest.version, "bucket_bytes": manifest.bucket_bytes, "seal": seal.hex(), "digests": digests,
            "base": base.manifest.version, "base_seal": base.seal.hex(), "manifest": manifest.to_json(), "parts": parts,
        }  # fmt: skip
        (beside / VERSION).write_text(json.dumps(body), encoding="utf-8")


def _change_of(data: Tensor, before: Tensor) -> tuple[int, bytes]:
    """How a bucket differs from its base's."""
    change = np.bitwise_xor(data.cpu().numpy(), before.numpy())
    if not change.any():
        return _SAME, b""
    stored = zlib.compress(change, 1)
    return (_DEFLATED, stored) if len(stored) < len(change) else (_WHOLE, data.cpu().numpy().tobytes())


def _applied(before: Tensor, change: tuple[int, bytes]) -> Tensor:
    kind, said = change
    if kind == _SAME:
        return before
    told = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    return told if kind == _WHOLE else torch.bitwise_xor(before, told)


def _checked(link: Link, index: int, data: Tensor) -> Tensor:
    if digest(data) != link.digests[index]:
        raise Damaged(f"version {link.version} in {link.folder} is damaged: bucket {index} of {len(link.digests)}")
    return data


def _alike(one: Manifest, other: Manifest) -> bool:
    """Whether both are cut the same way."""
    same = one.bucket_bytes == other.bucket_bytes
    return same and list(one.tensors.items()) == list(other.tensors.items())
