"""A run: a folder, the parts whose state it keeps, and the step it has reached."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from mmagent import dist
from mmagent.config import to_yaml
from mmagent.dist import World
from mmagent.engine import checkpoint
from mmagent.engine.merging import MergeConfig, merged_steps
from mmagent.engine.pieces import CheckpointError, StoredTensor, put_tensors
from mmagent.engine.saving import Contents, Saver, SavingConfig
from mmagent.files import discard_folder, write_text
from mmagent.interop.live_model import load_stored
from mmagent.ops.tensor_files import WeightsError
from mmagent.train.health import Guard, HealthConfig
from mmagent.train.segments import Segments

logger = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """What a part of a run must offer. State holds tensors and plain values; it is each rank's own, unless the part
    says ``shared_state = True`` (as engines do): then rank 0's counts, and every rank loads it. A part that can
    continue on another number of ranks although its state is each rank's own offers ``load_state_dicts(states)``, all
    ranks' states in order.

    Where ranks share the tensors of a shared state, the part offers ``sharded_state_dict()``: the same state with
    every rank's own shards (``DTensor``), from which ranks write a checkpoint together. Its ``load_state_dict`` then
    gets each tensor as it lies in files (:class:`~mmagent.engine.pieces.StoredTensor`), to read its shard by
    :func:`~mmagent.engine.pieces.shard_of`.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Cache(Protocol):
    """What is on disk only to save work after a kill. All ranks call it at the same places, with equal numbers."""

    def drop(self, before: int) -> None:
        """A write is over, and the newest checkpoint is of this step: what only an older one needs can go."""

    def drop_after(self, version: int) -> None:
        """The run has gone back to this step: what lies behind it will be another."""

    def make_room(self, tries: int) -> None:
        """A write has failed, and so many tries are left: no cache may be the reason that the last one fails."""


class RandomState:
    """The generators of python, numpy and torch (and this rank's accelerator) as one part."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        name, keys, *rest = np.random.get_state()
        state = {
            "python": random.getstate(),
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
        }
        return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the three sequences."""
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def load_state_dicts(self, states: list[Mapping[str, Any]]) -> None:
        """On another number of ranks no sequence can go on; the seeds of the start stand."""
        logger.warning("%d ranks wrote this checkpoint: random generators start anew", len(states))


class Run:
    """Keeps ``parts`` under ``directory/checkpoints``, the newest ``keep`` checkpoints of them.

    A part is an ``nn.Module`` (its weights become ``<name>.safetensors``), or anything :class:`Stateful`, such as the
    engine and the stream. Random generators are always kept, per rank, and what its ``guard`` knows, who acts by
    ``health`` on steps that must not be taken. ``config`` (a dataclass) lies beside every checkpoint; :meth:`resume`
    tells how it changed. Training waits for a copy in the host's memory only, the rest of a save goes on beside it
    (:mod:`mmagent.engine.saving`).
    """

    def __init__(
        self,
        directory: str | Path,
        world: World,
        parts: Mapping[str, Any],
        *,
        config: Any = None,
        keep: int = 2,
        saving: SavingConfig | None = None,
        health: HealthConfig | None = None,
    ):
        if taken := {"random", "health"} & set(parts):
            raise ValueError(f"a run keeps {' and '.join(sorted(taken))} itself; name the part otherwise")
        for name, part in parts.items():
            if not isinstance(part, Stateful):
                raise ValueError(f"part {name!r}: {type(part).__name__} has no state_dict and load_state_dict")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory, self.world, self.keep = Path(directory), world, keep
        self.guard = Guard(health or HealthConfig(), self)
        self.parts = {**parts, "random": RandomState(), "health": self.guard}
        self.checkpoints = self.directory / "checkpoints"
        self.config_yaml = to_yaml(config) if config is not None else ""
        self.saved_step = 0
        self.segments = Segments(world.device)
        self.before_save: list[Callable[[int], None]] = []
        """Called by all ranks with the step before it is saved: what it must not be ahead of, such as logs."""
        self.caches: list[Cache] = []
        """What other folders hold for as long as no checkpoint has it."""
        self._saver = Saver(self.checkpoints, world, keep, saving)
        if world.is_main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / "config.yaml", self.config_yaml)
        dist.barrier()

    def save(self, step: int) -> None:
        """Begin a checkpoint of ``step``, unless the newest is of that step already. A collective.

        Waits until the one before is written. Where that failed (a full disk) all ranks know now: training goes on
        with what was saved before, and this save tries again; after ``saving.failures`` failures in a row it is a
        :class:`CheckpointError`, on all ranks.
        """
        with self.segments("saving"):
            if self._settle() and step == self.saved_step:
                return
            for prepare in self.before_save:
                prepare(step)
            self._write(step)
        self.saved_step = step

    def _write(self, step: int) -> None:
        modules = {n: p for n, p in self.parts.items() if isinstance(p, nn.Module)}
        states = {n: _state_of(p) for n, p in self.parts.items() if n not in modules}
        shared = {n: s for n, s in states.items() if _is_shared(self.parts[n])}
        own = {n: s for n, s in states.items() if n not in shared}
        self._saver.save(step, Contents(modules, shared, own, {"config.yaml": self.config_yaml}))

    def finish(self, step: int) -> None:
        """:meth:`save`, and wait until it is written; one that fails is tried again at once. For the end of a run."""
        self.save(step)
        while not self.settle():
            self.save(step)

    def settle(self) -> bool:
        """Wait until nothing is being written; false if the last write failed, which the next :meth:`save` mends. A
        collective, also of errors: see :meth:`save`."""
        with self.segments("saving"):
            return self._settle()

    def _settle(self) -> bool:
        before, whole = self._saver.failed, self._saver.settle()
        there = checkpoint.steps(self.checkpoints) if self.caches else []
        for cache in self.caches:
            if there:
                cache.drop(checkpoint.step_of(there[0]))
            if self._saver.failed > before:
                cache.make_room(self._saver.config.failures - self._saver.failed)
        return whole

    def log(self, step: int, record: dict[str, float]) -> None:
        """A hook, before those that write: adds what saving has cost since the last step. ``time/checkpoint``: seconds
        that training waited for the copy; ``time/checkpoint_wait``: for the write before, which was not yet done;
        ``time/checkpoint_write``: what that write took beside it."""
        record.update(self._saver.timing)
        self._saver.timing = {}

    def resume(self, steps: int | None = None) -> int:
        """Load the newest whole checkpoint and return its step, or 0 when there is none. A collective.

        ``steps``: where the run is to end; a checkpoint past it is a ``ValueError``, for its weights are not those
        that were asked for.

        A run that has loaded or saved one already stands there, and nothing is read again.
        Checkpoints that are torn or were changed are refused with a warning; when none is whole, that is an error.
        """
        if not self.saved_step:
            if self.world.is_main:
                checkpoint.clean(self.checkpoints)
            if path := self._find():
                self.load(path)
            self.guard.take_up()
        if steps is not None and self.saved_step > steps:
            raise ValueError(
                f"{self.checkpoints} is at step {self.saved_step}, past the {steps} steps asked for: ask for at least "
                f"{self.saved_step}, name another output, or delete the checkpoints to train anew"
            )
        return self.saved_step

    def rollback(self, step: int | None = None, merged: Sequence[int] = ()) -> int:
        """Back, in the running process, to the newest whole checkpoint, or the newest that is not after ``step``;
        returns its step. ``merged``: see :meth:`load`. A collective. Later checkpoints are removed: the run will not
        have passed there. Raises :class:`CheckpointError` where there is none.
        """
        self.settle()
        path = self._find(step)
        if path is None:
            after = "" if step is None else f" that is not after step {step}"
            raise CheckpointError(f"{self.checkpoints} holds no checkpoint{after} to go back to")
        self.load(path, merged)
        if self.world.is_main:
            for later in checkpoint.steps(self.checkpoints):
                if checkpoint.step_of(later) > self.saved_step:
                    discard_folder(later)
        for cache in self.caches:
            cache.drop_after(self.saved_step)
        dist.barrier()
        return self.saved_step

    def _find(self, step: int | None = None) -> Path | None:
        """The newest whole checkpoint (not after ``step``); those refused on the way are set aside."""
        path, refused = checkpoint.latest(self.checkpoints, self.world, step)
        if self.world.is_main:
            for torn, reason in refused.items():
                logger.warning("refused a checkpoint, now in %s: %s", checkpoint.set_aside(torn).name, reason)
        return path

    def load(self, path: Path, merged: Sequence[int] = ()) -> None:
        """Load one checkpoint into the parts, at any time: the run then stands at its step. Where there are ``merged``
        the weights of modules are the average of the checkpoints of those steps. A collective: each rank reads what it
        holds. Raises :class:`CheckpointError` naming what does not fit."""
        self.settle()
        manifest = checkpoint.read_manifest(path)
        writers = manifest["world_size"]
        shared = checkpoint.read_state(path / "shared.pt")
        ranks = [self.world.rank] if writers == self.world.size else range(writers)
        states = [checkpoint.read_state(path / f"rank-{rank:05d}.pt") for rank in ranks]
        kept = set(manifest["modules"]) | set(shared) | set(states[0])
        parts = {name: part for name, part in self.parts.items() if name in kept or part is not self.guard}  # it is new
        if kept != set(parts):
            raise CheckpointError(f"{path} holds the parts {sorted(kept)}, this run {sorted(self.parts)}")
        for name, part in parts.items():
            if not isinstance(part, nn.Module) and not _is_shared(part):
                self._load_own(name, part, [state[name] for state in states], writers, path)
                continue
            tensors = checkpoint.tensors_of(path, manifest, name)
            if isinstance(part, nn.Module):
                self._load_weights(name, part, path, tensors, merged)
                continue
            state = shared[name] if name in shared else states[0][name]  # it may have become shared since
            stored = hasattr(part, "sharded_state_dict")
            part.load_state_dict(put_tensors(state, tensors if stored else {n: t.whole() for n, t in tensors.items()}))
        self.saved_step = checkpoint.step_of(path)
        self._tell_config_changes((path / "config.yaml").read_text(encoding="utf-8"))

    def _load_weights(
        self, name: str, part: nn.Module, path: Path, tensors: Mapping[str, StoredTensor], merged: Sequence[int]
    ) -> None:
        if not merged:
            checkpoint.load_weights(part, tensors, str(path / f"{name}.safetensors"))
            return
        problem = f"the mean of steps {', '.join(map(str, merged))} in {self.checkpoints} does not fit"
        try:
            with merged_steps(self.checkpoints, name, merged, MergeConfig("sma")) as mean:
                load_stored(part, mean, problem)
        except WeightsError as error:
            raise CheckpointError(str(error)) from error

    def _load_own(self, name: str, part: Any, states: list[Any], writers: int, path: Path) -> None:
        if writers == self.world.size:
            part.load_state_dict(states[0])
        elif hasattr(part, "load_state_dicts"):
            part.load_state_dicts(states)
        else:
            raise CheckpointError(
                f"{path} was written by {writers} ranks and this run has {self.world.size}: part {name!r} "
                f"({type(part).__name__}) cannot be split anew, as it has no load_state_dicts"
            )

    def _tell_config_changes(self, before: str) -> None:
        lines = difflib.unified_diff(before.splitlines(), self.config_yaml.splitlines(), lineterm="", n=0)
        changed = [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
        if changed and self.world.is_main:
            logger.warning("the configuration changed since step %d:\n%s", self.saved_step, "\n".join(changed))


def _is_shared(part: Any) -> bool:
    return bool(getattr(part, "shared_state", False))


def _state_of(part: Any) -> dict[str, Any]:
    return dict(part.sharded_state_dict() if hasattr(part, "sharded_state_dict") else part.state_dict())
