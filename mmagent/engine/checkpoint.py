"""Checkpoints that are whole or refused: what a folder holds, how it is found, verified and read.

A checkpoint is a folder ``step-00000120``. Every part of a run that has tensors has ``<part>.safetensors``, or, where
ranks share them, ``<part>-00000.safetensors`` and so on, each rank's share (:mod:`mmagent.engine.pieces`).
``shared.pt`` holds what else all ranks share, ``rank-00000.pt`` what each rank owns, and ``manifest.json`` the size
and checksum of every file. Nothing is ever unpickled. What the manifest does not list is nobody's: a note or a sidecar
of the storage in the folder does no harm. :mod:`mmagent.engine.saving` writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmagent import dist
from mmagent.dist import World
from mmagent.engine.optim import few
from mmagent.engine.pieces import CheckpointError, Piece, PieceFiles, StoredTensor, aliases_of, shard_of, write_pieces
from mmagent.engine.sharding import gather_like, is_part, local_part, whole_shape
from mmagent.ops.state import WeightsError, check_weights
from mmagent.ops.tensor_files import Stored
from mmagent.retries import retried

FORMAT = 2
READS = (1, 2)  # in 1 all tensors of shared parts were in shared.pt, and weights were never in pieces
_STEP = re.compile(r"step-(\d{8,})")


# ---------------------------------------------------------------------------------------------- weights


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict in full tensors, ``{}`` on ranks other than 0. A collective where it is sharded."""
    state = module.state_dict(keep_vars=True)
    full = {name: gather_like(t, t) if is_part(t) else t.detach() for name, t in state.items()}
    return full if dist.is_main() else {}


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. A tensor of several names (tied weights) is stored once; the others are noted beside it."""
    aliases = aliases_of(tensors)
    host = {n: t.detach().cpu().contiguous() for n, t in tensors.items() if n not in aliases}
    pieces = {n: Piece(t, (0,) * t.ndim, tuple(t.shape)) for n, t in host.items()}
    write_pieces(path, pieces, aliases)


def read_weights(path: Path) -> dict[str, Tensor]:
    """What :func:`write_weights` wrote, or any safetensors file, on the host. ``path`` may also name the weights of a
    part, ``step-00000120/model.safetensors``, that lie there in pieces."""
    if not path.is_file() and (path.parent / "manifest.json").is_file():
        stored = tensors_of(path.parent, read_manifest(path.parent), path.stem)
        return {name: tensor.whole() for name, tensor in stored.items()}
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


@contextmanager
def open_weights(path: Path, module: str) -> Iterator[Mapping[str, Stored]]:
    """The tensors of ``module`` in the checkpoint ``path``, unread, tied ones under their first name; open within the
    block. Raises :class:`CheckpointError` where the files of the module are not whole, or there is no such module."""
    _require_module(path, read_manifest(path), module)
    manifest = verify(path, part=module)
    files = tensors_of(path, manifest, module)
    yield {name: tensor.streamed() for name, tensor in files.items() if name not in files.aliases}
    files.close()


@torch.no_grad()
def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor | StoredTensor], origin: str = "the checkpoint"
) -> None:
    """Copy full ``tensors`` into ``module`` (each rank its shard), all or nothing. Of those in files a rank reads what
    it holds, which is a collective.

    Raises :class:`CheckpointError` naming missing, unexpected and misshapen tensors before anything is written. As a
    second net the module is filled with NaN first, and whatever still is NaN afterwards is an error that names it.
    """
    state = module.state_dict(keep_vars=True)
    try:
        wanted = {name: whole_shape(tensor) for name, tensor in state.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_weights(wanted, found, f"{origin} does not fit {type(module).__name__}")
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    local = {name: local_part(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
    for tensor in local.values():
        tensor.fill_(float("nan"))
    for name, tensor in state.items():
        local_part(tensor).copy_(local_part(shard_of(tensors[name], tensor)))
    if unwritten := [name for name, tensor in local.items() if tensor.isnan().any()]:
        raise CheckpointError(f"{origin} left NaN in {few(unwritten)}")


# ---------------------------------------------------------------------------------------------- folders


def steps(root: Path) -> list[Path]:
    """Checkpoints under ``root``, whole or not, newest first."""
    found = [path for path in root.iterdir() if _STEP.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step a checkpoint folder is named for."""
    match = _STEP.fullmatch(path.name)
    if not match:
        raise CheckpointError(f"{path} is no checkpoint folder (step-00000000)")
    return int(match.group(1))


def verify(path: Path, rank: int = 0, ranks: int = 1, part: str = "") -> dict[str, Any]:
    """The manifest of ``path`` after every file it lists (of one ``part``, if named) was found with its size and
    checksum; of ``ranks`` that look together each reads its share of the files.

    Raises :class:`CheckpointError` that says what is torn or was changed.
    """
    manifest = read_manifest(path)
    files = {name: manifest["files"][name] for name in manifest["parts"].get(part, []) or manifest["files"]}
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::ranks]:
        retried(partial(_verify_file, path / name, files[name]), path / name)
    return manifest


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise CheckpointError(f"{path} is torn: {size} bytes, not {expected['bytes']}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path} was changed: its checksum does not match")


def write_manifest(path: Path, body: Mapping[str, Any]) -> None:
    """``path/manifest.json`` with its own checksum; see :func:`read_manifest`."""
    text = json.dumps({**body, "sha256": _digest_of(body)}, indent=1)
    (path / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """``{"format", "step", "world_size", "files": {name: {"bytes", "sha256"}}, "parts": {part: [names]}, "modules":
    [parts]}``, itself checked."""
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise CheckpointError(f"{path} is torn: it has no manifest.json")
    try:
        manifest = json.loads(retried(partial(manifest_path.read_text, "utf-8"), manifest_path))
        claimed = manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path} is torn or was changed: {error}") from error
    if claimed != _digest_of(manifest):
        raise CheckpointError(f"{manifest_path} was changed: its checksum does not match")
    if manifest["format"] not in READS:
        raise CheckpointError(f"{path} has format {manifest['format']}; this version reads up to {FORMAT}")
    if manifest["format"] == 1:
        modules = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
        manifest |= {"parts": {name: [f"{name}.safetensors"] for name in modules}, "modules": modules}
    if stray := [name for name in manifest["files"] if Path(name).name != name]:
        raise CheckpointError(f"{manifest_path} names a file outside of its folder: {stray[0]}")
    return manifest


def tensors_of(path: Path, manifest: Mapping[str, Any], part: str) -> PieceFiles:
    """The tensors of one part, not yet read."""
    names = manifest["parts"].get(part, [])
    if unlisted := [name for name in names if name not in manifest["files"]]:
        raise CheckpointError(f"{path}: no checksum of {few(unlisted)}")
    return PieceFiles([path / name for name in names], f"{path / part}.safetensors")


def latest(root: Path, world: World | None = None, step: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint under ``root``, not after ``step`` if given, and why each newer one was refused.

    With a ``world`` it is a collective: every file is read by one rank, all ranks read at the same time, and they
    share the verdict. Raises :class:`CheckpointError` when there are checkpoints but none is whole (starting over
    silently would be worse), and where not all ranks see the folder.
    """
    refused: dict[Path, str] = {}
    rank, size = (world.rank, world.size) if world else (0, 1)
    names = [path.name for path in steps(root) if step is None or step_of(path) <= step]
    if world:
        names = world.gather_objects(names if world.is_main else [])[0]
    for path in (root / name for name in names):
        problem, unseen = "", not path.is_dir()
        try:
            verify(path, rank, size)
        except CheckpointError as error:
            problem = str(error)
        found = world.gather_objects([problem, unseen]) if world else [[problem, unseen]]
        if blind := [n for n, (_, there) in enumerate(found) if there != found[0][1]]:
            raise CheckpointError(f"rank {blind[0]} does not see {path}: checkpoints lie where all ranks can read them")
        problems = [problem for problem, _ in found if problem]
        if not problems:
            return path, refused
        refused[path] = problems[0]
    if refused:
        raise CheckpointError("no checkpoint is whole:\n" + "\n".join(refused.values()))
    return None, refused


def set_aside(path: Path) -> Path:
    """Rename a refused checkpoint, so that it neither counts among those kept nor stands where the run will write."""
    aside = path.with_name(f"refused-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def _require_module(path: Path, manifest: Mapping[str, Any], module: str) -> None:
    if module not in manifest["modules"]:
        raise CheckpointError(f"{path} holds no module {module!r}, but {', '.join(manifest['modules'])}")


def clean(root: Path, but: str = "") -> None:
    """Remove what interrupted writers and removers left under ``root``, all ``but`` one name."""
    for left in (*root.glob(".writing-*"), *root.glob(".removing-*")):
        if left.name != but:
            shutil.rmtree(left)


def read_state(path: Path) -> dict[str, Any]:
    """A ``.pt`` file of a checkpoint: tensors and plain values; anything else in it is refused by torch."""
    return retried(lambda: torch.load(path, map_location="cpu", weights_only=True), path)


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


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
