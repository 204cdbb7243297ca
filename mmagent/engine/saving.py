"""Saving in two stages: training waits for a copy in the host's memory; a thread writes that to storage.

The folder appears whole under its final name or not at all. While it is written it is ``.writing-<step>-<token>``;
every rank's thread puts its files there, then a small description of them, and rank 0's thread waits for all of
these, writes the manifest and renames the folder. Ranks meet in the file system and not in a collective: threads must
not share the process groups of training, a group of their own would hang with a lost rank for as long as its timeout,
and the storage is what all of them need anyway. The token is new with every save, so that what a killed or slower
attempt left is never taken for this one's. A rank that fails says so in its description; of one that was killed
rank 0 hears nothing, and gives up after ``patience`` seconds.

A write that failed (a full disk, a lost folder) leaves the checkpoints before it as they are and nothing of itself. All
ranks learn of it at the next save, which writes anew.
"""

from __future__ import annotations

import io
import json
import logging
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from mmagent import dist
from mmagent.dist import World
from mmagent.engine.checkpoint import FORMAT, clean, require_plain, steps, write_manifest
from mmagent.engine.pieces import (
    CheckpointError,
    HashingFile,
    Piece,
    aliases_of,
    lift_tensors,
    owned_piece,
    write_pieces,
)
from mmagent.engine.sharding import cut_of
from mmagent.files import discard_folder, put_folder, sync, write_text
from mmagent.ops.tensor_files import DTYPES

logger = logging.getLogger(__name__)
_ROUND = 5.0  # seconds at most between two looks of all ranks at a write under way
_LAST_PATIENCE = 60.0  # seconds that a process which has nothing else to do still waits for the other ranks' files


@dataclass
class SavingConfig:
    """``background`` false waits for every write. The run stops when ``failures`` writes in a row have failed: three,
    as the first may be a hiccup of storage, the second leaves time to free a disk, and beyond that a run would go on
    for hours without a net. ``patience``: seconds that rank 0 waits for the other ranks' files."""

    background: bool = True
    failures: int = 3
    patience: float = 1800.0

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise ValueError(f"saving.failures must be at least 1, got {self.failures}")
        if self.patience <= 0:
            raise ValueError(f"saving.patience must be positive, got {self.patience}")


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint. ``modules`` and ``shared`` states may hold sharded tensors; what is not sharded must
    be the same for all ranks, and rank 0's is kept. ``own`` is this rank's. States hold tensors and plain Python values
    only. ``files`` are extra texts."""

    modules: Mapping[str, nn.Module]
    shared: Mapping[str, Any]
    own: Mapping[str, Any]
    files: Mapping[str, str]


@dataclass
class _Copy:
    """This rank's contribution, on the host, where training does not touch it: per part the file, the pieces that go
    there and the aliases, and the plain rest."""

    files: dict[str, tuple[str, dict[str, Piece], dict[str, str]]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


class HostBuffers:
    """Memory of the host that tensors are copied to, used again from save to save; pinned for those of a device."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, contiguous; complete after :meth:`finish`."""
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        self._used.add(key)
        return kept.copy_(tensor, non_blocking=True)

    def copy_all(self, state: Any, key: str) -> Any:
        """``state`` with copies of all its tensors, dicts, lists and tuples."""
        if isinstance(state, Tensor):
            return self.copy(key, state.detach())
        if isinstance(state, Mapping):
            return {name: self.copy_all(value, f"{key}/{name}") for name, value in state.items()}
        if type(state) in (list, tuple):
            return type(state)(self.copy_all(value, f"{key}/{n}") for n, value in enumerate(state))
        return state

    def finish(self) -> None:
        """Wait for the device, and let go of what was not used since the last time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._kept = {key: tensor for key, tensor in self._kept.items() if key in self._used}
        self._used.clear()


class Saver:
    """Writes checkpoints under ``root`` and keeps the newest ``keep``; at most one write is under way.

    :meth:`save` and :meth:`settle` are collectives. ``timing`` holds the seconds of the last save.
    """

    def __init__(self, root: Path, world: World, keep: int = 2, config: SavingConfig | None = None):
        self.root, self.world, self.keep, self.config = root, world, keep, config or SavingConfig()
        self.failed = 0
        self.timing: dict[str, float] = {}
        self._buffers = HostBuffers()
        self._writing: tuple[int, Future[str]] | None = None
        self._seconds = 0.0

    def save(self, step: int, contents: Contents) -> None:
        """Copy ``contents`` to the host and begin to write them as the checkpoint of ``step``; no write is under way,
        for the one before has been settled."""
        assert self._writing is None, "settle the write before"
        started = time.perf_counter()
        copy = self._copy(contents)
        token = self.world.gather_objects(secrets.token_hex(4) if self.world.is_main else "")[0]
        aside = self.root / f".writing-{step:08d}-{token}"
        future: Future[str] = Future()
        # no daemon: a process that ends, for whatever error, completes the checkpoint under way
        thread = threading.Thread(target=self._write, args=(step, aside, copy, future), name="mmagent-checkpoint")
        self._writing = step, future
        thread.start()
        self.timing["time/checkpoint"] = time.perf_counter() - started
        if not self.config.background:
            self._writing[1].exception()

    def settle(self) -> bool:
        """Wait for the write under way; whether the last one went well. After a failure all ranks know, and one warns.
        Raises :class:`CheckpointError` on all of them after ``failures`` in a row."""
        if self._writing is None:
            return not self.failed
        started = time.perf_counter()
        step, future = self._writing
        problem = self._verdict(future)  # interrupted: it is still under way
        self._writing = None
        self.timing["time/checkpoint_wait"] = time.perf_counter() - started
        self.timing["time/checkpoint_write"] = self._seconds
        if not problem:
            self.failed = 0
            return True
        self.failed += 1
        kept = steps(self.root)
        before = f"the newest is that of step {int(kept[0].name.split('-')[1])}" if kept else "there is none before it"
        told = f"the checkpoint of step {step} could not be written ({problem}); {before}"
        if self.failed >= self.config.failures:
            raise CheckpointError(
                f"{told}; that was failure {self.failed} in a row, and saving.failures allows no more"
            )
        if self.world.is_main:
            logger.warning("%s; training goes on and the next save tries again", told)
        return False

    def _verdict(self, future: Future[str]) -> str:
        """What rank 0, which hears from all, says of the write, once it is over on every rank. Ranks look together
        every few seconds: a write may take longer than a collective may wait for."""
        pause = 0.02 if self.world.size > 1 else None
        while True:
            over = bool(wait([future], timeout=pause).done)
            everyone = self.world.gather_objects([over, future.result() if over else ""])
            if all(there for there, _ in everyone):
                return everyone[0][1]
            pause = min(2 * (pause or _ROUND), _ROUND)

    def _copy(self, contents: Contents) -> _Copy:
        copy = _Copy(modules=list(contents.modules))
        rest: dict[str, Any] = {}
        parts: dict[str, Mapping[str, Tensor]] = {
            name: m.state_dict(keep_vars=True) for name, m in contents.modules.items()
        }
        for name, state in contents.shared.items():
            tensors: dict[str, Tensor] = {}
            rest[name] = lift_tensors(state, "", tensors)
            parts[name] = tensors
        for name, named in parts.items():
            self._copy_part(copy, name, named)
        own = f"rank-{self.world.rank:05d}"
        require_plain(dict(contents.own), own)
        copy.states[f"{own}.pt"] = self._buffers.copy_all(dict(contents.own), own)
        if self.world.is_main:
            require_plain(rest, "shared")
            copy.states["shared.pt"] = rest
            copy.texts = dict(contents.files)
        self._buffers.finish()
        return copy

    def _copy_part(self, copy: _Copy, name: str, tensors: Mapping[str, Tensor]) -> None:
        aliases = aliases_of(tensors)
        pieces = {}
        for key, tensor in tensors.items():
            piece = None if key in aliases else owned_piece(tensor, self.world.is_main)
            if piece is None:
                continue
            if piece.tensor.dtype not in DTYPES.values():
                raise ValueError(f"{name}: {key} is {piece.tensor.dtype}, which no safetensors file can hold")
            pieces[key] = Piece(self._buffers.copy(f"{name}/{key}", piece.tensor), piece.offsets, piece.whole)
        shared = any(_is_split(tensor) for tensor in tensors.values())
        if pieces:
            file = f"{name}-{self.world.rank:05d}.safetensors" if shared else f"{name}.safetensors"
            copy.files[name] = file, pieces, aliases

    # ------------------------------------------------------------------------------------------ the thread

    def _write(self, step: int, aside: Path, copy: _Copy, future: Future[str]) -> None:
        """``future`` gets what went wrong, or an empty text."""
        started, problem = time.perf_counter(), ""
        try:
            if self.world.is_main:
                clean(self.root, aside.name)  # all ranks have given up what was written before
            described = self._write_own(aside, copy)
            if self.world.is_main:
                self._complete(step, aside, described, copy)
        except Exception as error:  # what stops a thread would be lost; settle() tells and raises it
            problem = f"{type(error).__name__}: {error}"
            if self.world.size > 1:
                problem = problem if "rank " in problem else f"rank {self.world.rank}: {problem}"
            logger.debug("writing the checkpoint of step %d", step, exc_info=True)
            self._withdraw(aside, copy, problem)
        self._seconds = time.perf_counter() - started
        future.set_result(problem)

    def _write_own(self, aside: Path, copy: _Copy) -> dict[str, Any]:
        """Write this rank's files, and tell rank 0 of them."""
        aside.mkdir(exist_ok=True)
        files: dict[str, Any] = {}
        for name, pieces, aliases in copy.files.values():
            files[name] = write_pieces(aside / name, pieces, aliases)
        for name, state in copy.states.items():
            serialised = io.BytesIO()
            torch.save(state, serialised)
            files[name] = _write_bytes(aside / name, serialised.getbuffer())
        for name, text in copy.texts.items():
            files[name] = _write_bytes(aside / name, text.encode())
        described = {"files": files, "parts": {part: file for part, (file, *_) in copy.files.items()}}
        if not self.world.is_main:
            write_text(aside / _described(self.world.rank), json.dumps(described))
        return described

    def _complete(self, step: int, aside: Path, own: dict[str, Any], copy: _Copy) -> None:
        """Rank 0: wait for the others, describe the whole, give it its name and drop what is too old."""
        described = [own, *(self._await(aside / _described(rank), rank) for rank in range(1, self.world.size))]
        body: dict[str, Any] = {"format": FORMAT, "step": step, "world_size": self.world.size}
        body |= {"files": {}, "parts": {}, "modules": copy.modules}
        for one in described:
            body["files"] |= one["files"]
            for part, file in one["parts"].items():
                body["parts"].setdefault(part, []).append(file)
        write_manifest(aside, body)
        sync(aside / "manifest.json")
        for rank in range(1, self.world.size):
            (aside / _described(rank)).unlink()
        put_folder(aside, self.root / f"step-{step:08d}")
        for old in steps(self.root)[self.keep :]:
            discard_folder(old)

    def _await(self, path: Path, rank: int) -> dict[str, Any]:
        began, pause, patience, ending = time.monotonic(), 0.005, self.config.patience, False
        while not path.exists():
            if not path.parent.is_dir():
                raise CheckpointError(f"{path.parent} is gone")
            if not ending and not threading.main_thread().is_alive():  # for an error, or as another rank was lost
                ending, patience = True, min(patience, time.monotonic() - began + _LAST_PATIENCE)
            if time.monotonic() > began + patience:
                raise CheckpointError(f"rank {rank} has not written its part after {patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        described = json.loads(path.read_text(encoding="utf-8"))
        if "problem" in described:
            raise CheckpointError(described["problem"])
        return described

    def _withdraw(self, aside: Path, copy: _Copy, problem: str) -> None:
        """Free what was taken; what is left of it by a failing disk goes with the next resume."""
        if self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            return
        try:
            for name in (*(file for file, *_ in copy.files.values()), *copy.states):
                (aside / name).unlink(missing_ok=True)
            write_text(aside / _described(self.world.rank), json.dumps({"problem": problem}))
        except OSError as error:
            print(f"rank {self.world.rank}: {problem}, and rank 0 cannot be told: {error}", file=sys.stderr, flush=True)


def _described(rank: int) -> str:
    return f"described-{rank:05d}.json"


def _write_bytes(path: Path, data: Any) -> dict[str, Any]:
    with HashingFile(path) as file:
        file.write(data)
    return file.describe()


def _is_split(tensor: Tensor) -> bool:
    if cut_of(tensor) is not None:
        return dist.size() > 1
    if not isinstance(tensor, DTensor):
        return False
    mesh = tensor.device_mesh
    return any(mesh.size(n) > 1 and not isinstance(p, Replicate) for n, p in enumerate(tensor.placements))
