"""Checkpoints that are whole or not there: written aside, described by a manifest of sizes and checksums, renamed.

A checkpoint is a folder ``step-00000120`` with one ``<module>.safetensors`` for every module, ``shared.pt`` for what
all ranks share, ``rank-00000.pt`` for what each rank owns, and ``manifest.json``. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmagent import dist
from mmagent.dist import World
from mmagent.engine.optim import few
from mmagent.engine.sharding import gather_like, shard_like
from mmagent.files import discard_folder, put_folder, sync
from mmagent.ops.state import WeightsError, check_weights, shapes_of

FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the message names the file or tensor and what is wrong with it."""


# ---------------------------------------------------------------------------------------------- weights


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict in full tensors, ``{}`` on ranks other than 0. A collective where it is sharded."""
    state = module.state_dict()
    full = {name: gather_like(t, t) if isinstance(t, DTensor) else t.detach() for name, t in state.items()}
    return full if dist.is_main() else {}


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. A tensor of several names (tied weights) is stored once; the others are noted beside it."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    stored = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items() if n not in aliases
    }
    # one entry at most: the library writes several in random order, and equal weights should be equal files
    save_file(stored, path, metadata={"aliases": json.dumps(aliases)} if aliases else {"format": "pt"})


def read_weights(path: Path) -> dict[str, Tensor]:
    """What :func:`write_weights` wrote, or any safetensors file, on the host."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


@torch.no_grad()
def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], origin: str = "the checkpoint") -> None:
    """Copy full ``tensors`` into ``module`` (each rank its shard), all or nothing.

    Raises :class:`CheckpointError` naming missing, unexpected and misshapen tensors before anything is written. As a
    second net the module is filled with NaN first, and whatever still is NaN afterwards is an error that names it.
    """
    state = module.state_dict()
    try:
        check_weights(shapes_of(state), shapes_of(tensors), f"{origin} does not fit {type(module).__name__}")
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    for name, tensor in state.items():
        tensor.copy_(shard_like(tensors[name].to(tensor.dtype), tensor))
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in state.items() if t.is_floating_point()}
    if unwritten := [name for name, tensor in local.items() if tensor.isnan().any()]:
        raise CheckpointError(f"{origin} left NaN in {few(unwritten)}")


# ---------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint. ``modules`` are gathered here, ``shared`` must be the same for all ranks (rank 0's
    is kept), ``own`` is this rank's; both hold tensors and plain Python values only. ``files`` are extra texts."""

    modules: Mapping[str, nn.Module]
    shared: Mapping[str, Any]
    own: Mapping[str, Any]
    files: Mapping[str, str]


def save(root: Path, step: int, contents: Contents, world: World, keep: int = 2) -> Path:
    """Write the checkpoint of ``step`` under ``root`` and drop all but the newest ``keep``. A collective.

    Either the folder appears whole under its final name, or it does not appear: killing the process at any moment,
    or losing power, leaves the previous checkpoint as the newest.
    """
    final, aside = root / f"step-{step:08d}", root / f".writing-{step:08d}"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    written: list[str] = []
    for name, module in contents.modules.items():
        weights = gather_weights(module)
        if world.is_main:
            write_weights(aside / f"{name}.safetensors", weights)
            written.append(f"{name}.safetensors")
    if world.is_main:
        _write_state(aside / "shared.pt", contents.shared)
        for name, text in contents.files.items():
            (aside / name).write_text(text)
        written += ["shared.pt", *contents.files]
    own = f"rank-{world.rank:05d}.pt"
    _write_state(aside / own, contents.own)
    written.append(own)
    described = world.gather_objects({name: _describe(aside / name, written=True) for name in written})
    if world.is_main:
        body = {"format": FORMAT, "step": step, "world_size": world.size, "files": {}}
        for files in described:
            body["files"] |= files
        (aside / "manifest.json").write_text(json.dumps(body | {"sha256": _digest_of(body)}, indent=1))
        sync(aside / "manifest.json")
        put_folder(aside, final)
        for old in steps(root)[keep:]:
            discard_folder(old)
    dist.barrier()
    return final


def steps(root: Path) -> list[Path]:
    """Checkpoints under ``root``, whole or not, newest first."""
    found = [path for path in root.iterdir() if _STEP.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step a checkpoint folder is named for."""
    match = _STEP.fullmatch(path.name)
    if not match:
        raise CheckpointError(f"{path} is no checkpoint folder (step-00000000)")
    return int(match.group(1))


def verify(path: Path) -> dict[str, Any]:
    """The manifest of ``path`` after every file it lists was found with its size and checksum.

    Raises :class:`CheckpointError` that says what is torn or was changed.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        if (size := (path / name).stat().st_size) != expected["bytes"]:
            raise CheckpointError(f"{path / name} is torn: {size} bytes, not {expected['bytes']}")
        if _describe(path / name) != expected:
            raise CheckpointError(f"{path / name} was changed: its checksum does not match")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """``{"format", "step", "world_size", "files": {name: {"bytes", "sha256"}}}``, itself checked."""
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise CheckpointError(f"{path} is torn: it has no manifest.json")
    try:
        manifest = json.loads(manifest_path.read_text())
        claimed = manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path} is torn or was changed: {error}") from error
    if claimed != _digest_of(manifest):
        raise CheckpointError(f"{manifest_path} was changed: its checksum does not match")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest


def latest(root: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint under ``root`` and why each newer one was refused.

    Raises :class:`CheckpointError` when there are checkpoints but none is whole: starting over silently would be worse.
    """
    refused: dict[Path, str] = {}
    for path in steps(root):
        try:
            verify(path)
        except CheckpointError as error:
            refused[path] = str(error)
        else:
            return path, refused
    if refused:
        raise CheckpointError("no checkpoint is whole:\n" + "\n".join(refused.values()))
    return None, refused


def set_aside(path: Path) -> Path:
    """Rename a refused checkpoint, so that it neither counts among those kept nor stands where the run will write."""
    aside = path.with_name(f"refused-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def newest_weights(root: Path, module: str) -> Path:
    """The weights of ``module`` in the newest whole checkpoint under ``root``: what the next stage starts from."""
    path, _ = latest(root)
    if path is None:
        raise CheckpointError(f"{root} holds no checkpoint yet")
    if not (file := path / f"{module}.safetensors").is_file():
        others = ", ".join(p.stem for p in path.glob("*.safetensors"))
        raise CheckpointError(f"{path} holds no module {module!r}, but {others}")
    return file


def clean(root: Path) -> None:
    """Remove what interrupted writers and removers left under ``root``."""
    for left in (*root.glob(".writing-*"), *root.glob(".removing-*")):
        shutil.rmtree(left)


def read_state(path: Path) -> dict[str, Any]:
    """A ``.pt`` file of a checkpoint: tensors and plain values; anything else in it is refused by torch."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    require_plain(dict(state), path.stem)
    torch.save(dict(state), path)


def require_plain(value: Any, where: str) -> None:
    """Raise ``ValueError`` naming the first value that could not be read back without unpickling code."""
    if isinstance(value, dict):
        for key, entry in value.items():
            require_plain(key, f"{where} (a key)")
            require_plain(entry, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for i, entry in enumerate(value):
            require_plain(entry, f"{where}[{i}]")
    elif not (value is None or type(value) in (bool, int, float, str, bytes, Tensor)):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(f"state at {where} is a {kind}: use tensors, numbers, strings, lists, tuples and dicts only")


def _describe(path: Path, written: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if written:
        sync(path)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
