"""Episodes of a collection that is not over: kept on disk as they end, so that a run that is killed plays none twice.

``FOLDER/00000012/rank-00000-of-00002.episodes``: what rank 0 of 2 played as policy version 12. A file is a chain of
records, each its length, its sha256, and a safetensors of one trajectory; the first says what all were played under:
the policy's weights and settings, seeds and limits. A record is only ever appended, and written and synced, where
the disk takes it, before its episode gives up its place: a kill loses what is being written or waits for that. A torn
end is dropped; a file that was played under anything else is never taken from. All are kept until a checkpoint has
landed that holds what came of them, so those between it and a kill are not played again either.

What is bitwise. With a ``steady`` policy an episode is a function of the weights and its seed: a run that is killed
ends bit for bit where one that is not ends, in lockstep or freely, and on the same machine on another number of ranks
plays the same. Without one, a free run takes what had ended as it was; what was in flight is played again by the same
seeds in other company, and may differ by the rounding of the policy's numbers, which now and then decides a token. That
is one of the runs that an uninterrupted one might have been. An episode whose environment broke is not kept: that is no
outcome, and may come of a machine that is going down.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

from mmagent.agent.store import columns_of, describe, image_from, image_of, restore
from mmagent.dist import World
from mmagent.files import sync
from mmagent.models.feature_cache import content_key
from mmagent.ops.tensor_files import bytes_of, file_head
from mmagent.protocols import Identified
from mmagent.trajectories import Trajectory
from mmagent.types import PatchedImage

logger = logging.getLogger(__name__)

FORMAT = 1
_LENGTH, _SUM = struct.Struct("<Q"), hashlib.sha256().digest_size


class InFlight:
    """Keeps the ended trajectories of one rank under ``folder``, in which those of all ranks and of all collections
    since the last checkpoint take ``limit`` bytes at most.

    Every rank writes a file of its own. It also reads those that other numbers of ranks wrote, for prompts are dealt to
    them otherwise. Past the limit, or on a disk that refuses, nothing more is kept, with a warning: a restart plays it.
    """

    def __init__(self, folder: str | Path, world: World, policy: Identified, limit: float = 2e10):
        self.folder, self.world, self.policy, self.limit = Path(folder), world, policy, limit
        # all that is done while episodes are played is done here, one thing at a time: a screen takes tens of
        # milliseconds to hash and write, for which the event loop must not stand, and nothing is closed while in use
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmagent-episodes")
        self._about: Future[dict[str, Any]] | None = None
        self._file: FileIO | None = None
        self._most = 0.0  # bytes that it may grow to
        self._told = ""  # why nothing more is kept
        self._images: dict[str, PatchedImage] = {}
        self._written: dict[str, int] = {}  # images in this rank's file, by content

    def begin(self, version: int, about: Mapping[str, Any]) -> dict[str, Trajectory]:
        """Trajectories by key that were kept of a collection which was played by the same weights under the same
        ``about``; from here on its others are kept. Reads and waits: for before the first episode is opened."""
        self.end()
        folder = self.folder / f"{version:08d}"
        # all weights are read for it, seconds where there are billions: nobody waits unless there is something to take
        self._about = self._thread.submit(lambda: {"format": FORMAT, "policy": self.policy.identity(), **about})
        ranks = f"of-{self.world.size:05d}.episodes"
        mine = folder / f"rank-{self.world.rank:05d}-{ranks}"
        whole, found = 0, {}
        if mine.exists():
            whole, found, self._written = _read(mine, self._about.result(), self._images)
        for other in sorted(folder.glob("rank-*.episodes")):
            if not other.name.endswith(ranks):
                found = _read(other, self._about.result(), self._images).rows | found
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = mine.open("r+b" if whole else "wb", buffering=0)
            self._file.truncate(whole)
            self._file.seek(whole)
            self._most = whole + (self.limit - self._used()) / self.world.size
            for path in (folder, self.folder, self.folder.parent):  # each may have a new name in it
                sync(path)
        except OSError as error:
            self._refuse(str(error))
        return found

    async def keep(self, row: Trajectory) -> None:
        """Put ``row``, which has ended well, on disk. Its images become those that other rows have of equal content."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._keep, row)

    def _keep(self, row: Trajectory) -> None:
        keys = [self._key(image) for image in row.images]
        row.images = [self._images[key] for key in keys]
        if (file := self._file) is None:
            return
        assert self._about is not None
        new = [key for key in dict.fromkeys(keys) if key not in self._written]
        numbers = self._written | {key: len(self._written) + n for n, key in enumerate(new)}
        tensors = {**columns_of([row]), **{f"image/{key}": self._images[key].patches for key in new}}
        if row.routed_experts:
            tensors["experts"] = torch.stack(row.routed_experts)
        said = {"row": describe(row, [numbers[key] for key in keys])}
        said["images"] = {key: image_of(self._images[key]) for key in new}
        record = ([] if file.tell() else _record({}, self._about.result())) + _record(tensors, said)
        if file.tell() + sum(map(len, record)) > self._most:
            return self._refuse(f"those since the last checkpoint fill the {self.limit / 1e9:.3g} GB of kept_gb")
        try:
            self._append(record)
            self._written = numbers
            os.fsync(file.fileno())
        except OSError as error:
            self._refuse(str(error))

    def end(self) -> None:
        """The collection is over, or is left: what is being written is waited for."""
        if self._about is not None:
            self._about.cancel()  # else it is waited for as well: weights are about to change
        self._thread.submit(self._close).result()
        self._about, self._images, self._written = None, {}, {}

    def drop(self, before: int) -> None:
        """Remove what policies older than version ``before`` played: a checkpoint has landed that holds what came of
        it."""
        for folder in self.folder.glob("[0-9]" * 8):
            if int(folder.name) < before:
                self._remove(folder)

    def drop_after(self, version: int) -> None:
        """Remove what policies newer than ``version`` played: the run has gone back there, and will come to others."""
        for folder in self.folder.glob("[0-9]" * 8):
            if int(folder.name) > version:
                self._remove(folder)

    def make_room(self, tries: int) -> None:
        """A checkpoint could not be written, perhaps for want of room, and ``tries`` are left: remove the older half of
        what is kept, before the last try all of it. A run that is killed then plays that again."""
        folders = sorted(self.folder.glob("[0-9]" * 8))
        for folder in folders if tries <= 1 else folders[: -(-len(folders) // 2)]:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # other ranks do so at the same time
        self._told = ""

    def _used(self) -> int:
        """Bytes of all files there are."""
        total = 0
        for file in self.folder.glob("*/*.episodes"):
            with suppress(FileNotFoundError):  # another rank has dropped it
                total += file.stat().st_size
        return total

    def _key(self, image: PatchedImage) -> str:
        key = content_key(repr((image.grid, image.view)), image.patches)
        self._images.setdefault(key, image)
        return key

    def _append(self, record: Sequence[memoryview]) -> None:
        assert self._file is not None
        before = self._file.tell()
        try:
            for left in record:
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(before)
            raise

    def _refuse(self, why: str) -> None:
        if why != self._told:  # once until something is dropped
            told = "%s: finished episodes are no longer kept (%s): a restart would play them again"
            logger.warning(told, self.folder, why)
        self._told = why
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _record(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> list[memoryview]:
    """What to write, one behind another. The tensors' bytes are not copied: a copy would hold the interpreter's lock,
    and the event loop with it, for as long as it takes; hashing and writing do not."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    head = file_head(((name, tensor.dtype, tensor.shape) for name, tensor in ordered), {"said": json.dumps(said)})
    body = [memoryview(head), *(bytes_of(tensor) for _, tensor in ordered)]
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    return [memoryview(_LENGTH.pack(sum(map(len, body))) + digest.digest()), *body]


class _Kept(NamedTuple):
    """``length`` of a file's whole records, its ``rows`` by key, and the numbers of its ``images`` by content."""

    length: int
    rows: dict[str, Trajectory]
    images: dict[str, int]


def _read(path: Path, about: Mapping[str, Any], images: dict[str, PatchedImage]) -> _Kept:
    """What is in ``path``: nothing where it is about anything else. New ``images`` are added, by content."""
    rows: dict[str, Trajectory] = {}
    numbers: dict[str, int] = {}
    listed: list[PatchedImage] = []
    end = 0
    for said, tensors, end_of_record in _records(path):
        if end:
            for key, seen in said["images"].items():
                numbers[key] = len(listed)
                listed.append(images.setdefault(key, image_from(tensors[f"image/{key}"], seen)))
            row = restore(said["row"], tensors, listed, tensors.get("experts"))
            rows[row.key] = row
        elif said != json.loads(json.dumps(about)):
            logger.warning("%s was played by other weights, or under other settings: not taken", path)
            break
        end = end_of_record
    return _Kept(end, rows, numbers)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Tensor], int]]:
    """What was said, its tensors and where it ends, of every record up to the first that is torn."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while len(head := file.read(_LENGTH.size + _SUM)) == _LENGTH.size + _SUM:
            (length,) = _LENGTH.unpack_from(head)
            if length > path.stat().st_size - file.tell():  # of a torn length no memory is asked for
                return
            body = file.read(length)
            if hashlib.sha256(body).digest() != head[_LENGTH.size :]:
                return
            size = int.from_bytes(body[:8], "little")
            said = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["said"])
            yield said, load(body), file.tell()
