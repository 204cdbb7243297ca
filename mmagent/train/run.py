"""A run: a folder, the parts whose state it keeps, and the step it has reached."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from mmagent import dist
from mmagent.config import to_yaml
from mmagent.dist import World
from mmagent.engine import checkpoint
from mmagent.engine.checkpoint import CheckpointError, Contents
from mmagent.files import write_text

logger = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """What a part of a run must offer. State holds tensors and plain values; it is each rank's own, unless the part
    says ``shared_state = True`` (as engines do). A part that can continue on another number of ranks offers
    ``load_state_dicts(states)``, all ranks' states in order."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


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
    engine and the stream. Random generators are always kept, per rank. ``config`` (a dataclass) lies beside every
    checkpoint; :meth:`resume` tells how it changed.
    """

    def __init__(
        self, directory: str | Path, world: World, parts: Mapping[str, Any], *, config: Any = None, keep: int = 2
    ):
        if "random" in parts:
            raise ValueError("a run keeps random generators itself; name the part otherwise")
        for name, part in parts.items():
            if not isinstance(part, Stateful):
                raise ValueError(f"part {name!r}: {type(part).__name__} has no state_dict and load_state_dict")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory, self.world, self.keep = Path(directory), world, keep
        self.parts = {**parts, "random": RandomState()}
        self.checkpoints = self.directory / "checkpoints"
        self.config_yaml = to_yaml(config) if config is not None else ""
        self.saved_step = 0
        if world.is_main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / "config.yaml", self.config_yaml)
        dist.barrier()

    def save(self, step: int) -> None:
        """Write a checkpoint of ``step``, unless the newest is of that step already. A collective."""
        if step == self.saved_step:
            return
        modules = {n: p for n, p in self.parts.items() if isinstance(p, nn.Module)}
        states = {n: dict(p.state_dict()) for n, p in self.parts.items() if n not in modules}
        shared = {n: s for n, s in states.items() if _is_shared(self.parts[n])}
        own = {n: s for n, s in states.items() if n not in shared}
        contents = Contents(modules, shared, own, {"config.yaml": self.config_yaml})
        checkpoint.save(self.checkpoints, step, contents, self.world, self.keep)
        self.saved_step = step

    def resume(self, steps: int | None = None) -> int:
        """Load the newest whole checkpoint and return its step, or 0 when there is none. A collective.

        ``steps``: where the run is to end; a checkpoint past it is a ``ValueError``, for its weights are not those
        that were asked for.

        A run that has loaded or saved one already stands there, and nothing is read again.
        Checkpoints that are torn or were changed are refused with a warning; when none is whole, that is an error.
        """
        if not self.saved_step:
            self._load_newest()
        if steps is not None and self.saved_step > steps:
            raise ValueError(
                f"{self.checkpoints} is at step {self.saved_step}, past the {steps} steps asked for: ask for at least "
                f"{self.saved_step}, name another output, or delete the checkpoints to train anew"
            )
        return self.saved_step

    def _load_newest(self) -> None:
        path, error = None, ""
        if self.world.is_main:
            checkpoint.clean(self.checkpoints)
            try:
                path, refused = checkpoint.latest(self.checkpoints)
                for torn, reason in refused.items():
                    logger.warning("refused a checkpoint, now in %s: %s", checkpoint.set_aside(torn).name, reason)
            except CheckpointError as problem:
                error = str(problem)
        name, error = self.world.gather_objects([path.name if path else "", error])[0]  # rank 0 decides for all
        if error:
            raise CheckpointError(error)
        if name:
            self.load(self.checkpoints / name)

    def load(self, path: Path) -> None:
        """Load one checkpoint into the parts. Raises :class:`CheckpointError` naming what does not fit."""
        manifest = checkpoint.read_manifest(path)
        writers = manifest["world_size"]
        shared = checkpoint.read_state(path / "shared.pt")
        ranks = [self.world.rank] if writers == self.world.size else range(writers)
        states = [checkpoint.read_state(path / f"rank-{rank:05d}.pt") for rank in ranks]
        modules = {Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")}
        kept = modules | set(shared) | set(states[0])
        if kept != set(self.parts):
            raise CheckpointError(f"{path} holds the parts {sorted(kept)}, this run {sorted(self.parts)}")
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                file = path / f"{name}.safetensors"
                checkpoint.load_weights(part, checkpoint.read_weights(file), str(file))
            elif _is_shared(part):
                part.load_state_dict(shared[name])
            elif writers == self.world.size:
                part.load_state_dict(states[0][name])
            elif hasattr(part, "load_state_dicts"):
                part.load_state_dicts([state[name] for state in states])
            else:
                raise CheckpointError(
                    f"{path} was written by {writers} ranks and this run has {self.world.size}: part {name!r} "
                    f"({type(part).__name__}) cannot be split anew, as it has no load_state_dicts"
                )
        self.saved_step = checkpoint.step_of(path)
        self._tell_config_changes((path / "config.yaml").read_text())

    def _tell_config_changes(self, before: str) -> None:
        lines = difflib.unified_diff(before.splitlines(), self.config_yaml.splitlines(), lineterm="", n=0)
        changed = [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
        if changed and self.world.is_main:
            logger.warning("the configuration changed since step %d:\n%s", self.saved_step, "\n".join(changed))


def _is_shared(part: Any) -> bool:
    return bool(getattr(part, "shared_state", False))
