"""Tensors in pieces: what each rank holds of them goes to files of its own, and any rank reads the part it needs.

A file is plain safetensors. Where its tensors are only parts, its metadata say of each one where it stands in the
whole and how large that is, so a file explains itself. Every element is written once: replicas do not write.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from mmagent import dist
from mmagent.engine.sharding import cut_of, local_part, shard_like, whole_shape
from mmagent.files import sync
from mmagent.ops.tensor_files import DTYPES, Stored, bytes_of, file_head
from mmagent.retries import retried

_SHARED = 1 << 20
"""Bytes from which on replicas do not all read a tensor: one does and hands it to the others. Below, a collective costs
more than a read of what the first reader has left in the machine's cache."""
_BLOCK = 1 << 24  # bytes that are hashed and written at a time
_LEAF = "__tensor__"  # key of what stands in a state for a tensor that lies in a file


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the message names the file or tensor and what is wrong with it."""


@dataclass(frozen=True)
class Piece:
    """``tensor``, which stands at ``offsets`` of a tensor of the shape ``whole``; where that has several dimensions, a
    single offset is one of the flattened tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]
    whole: tuple[int, ...]


def place_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of this rank's shard in the whole tensor."""
    (chunk,) = tensor.__create_chunk_list__()  # torch's own protocol for checkpoints
    shape = tuple(tensor.to_local().shape)
    assert not math.prod(shape) or tuple(chunk.sizes) == shape, (tensor.placements, chunk, shape)
    return tuple(chunk.offsets), shape


def owned_piece(tensor: Tensor, main: bool) -> Piece | None:
    """What this rank is to write of ``tensor``; of replicas, also of those outside a sharded tensor's mesh, the first
    one writes, and the ``main`` rank what is not sharded."""
    if (cut := cut_of(tensor)) is not None:
        piece = local_part(tensor).detach().view(-1)
        if piece.numel() == math.prod(cut.shape):
            return Piece(piece.view(cut.shape), (0,) * len(cut.shape), cut.shape) if piece.numel() or main else None
        return Piece(piece, (cut.bounds[dist.rank()],), cut.shape) if piece.numel() else None
    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        return Piece(tensor.detach(), (0,) * len(shape), shape) if main else None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds a sharded tensor"
    replicas = [at for at, placed in zip(coordinate, tensor.placements, strict=True) if isinstance(placed, Replicate)]
    offsets, shape = place_of(tensor)
    if math.prod(tensor.shape) and not math.prod(shape):
        return None
    if any(replicas) or not (mesh.mesh == 0).any():  # groups of ranks that share experts repeat one another
        return None
    return Piece(tensor.to_local().detach(), offsets, tuple(tensor.shape))


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Later names of tensors that are one (tied weights), with the name that stands for them all."""
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        local = local_part(tensor)
        key = (local.data_ptr(), whole_shape(tensor), local.shape, local.stride(), local.dtype)
        if local.numel() and first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


# ---------------------------------------------------------------------------------------------- states


def lift_tensors(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``state`` with a note in place of every tensor in its dicts, lists and tuples, which goes to ``tensors``."""
    if isinstance(state, Tensor):
        if path in tensors:
            raise ValueError(f"two tensors of a state would both be called {path!r}: name its keys otherwise")
        tensors[path] = state
        return {_LEAF: path}
    if isinstance(state, Mapping):
        assert list(state) != [_LEAF], path
        return {
            key: lift_tensors(value, f"{path}/{key}" if path else str(key), tensors) for key, value in state.items()
        }
    if type(state) in (list, tuple):
        return type(state)(lift_tensors(value, f"{path}/{n}", tensors) for n, value in enumerate(state))
    return state


def put_tensors(state: Any, tensors: Mapping[str, Any]) -> Any:
    """The way back: ``tensors`` in place of the notes about them."""
    if isinstance(state, Mapping):
        if list(state) == [_LEAF]:
            return tensors[state[_LEAF]]
        return {key: put_tensors(value, tensors) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(put_tensors(value, tensors) for value in state)
    return state


# ---------------------------------------------------------------------------------------------- writing


class HashingFile:
    """A new file whose checksum is that of what was meant to be written: reading it back would hash what the disk made
    of it. ``describe()`` after :meth:`close`, which waits for the disk."""

    def __init__(self, path: Path):
        self.path, self.bytes, self._digest = path, 0, hashlib.sha256()
        self._file: BinaryIO = path.open("wb", buffering=0)

    def write(self, data: Any) -> int:
        """Bytes, or a memoryview of bytes."""
        view = memoryview(data)
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._digest.update(block)
            done = 0
            while done < len(block):
                done += self._file.write(block[done:])
        self.bytes += len(view)
        return len(view)

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def describe(self) -> dict[str, Any]:
        """``{"bytes", "sha256"}``, once it is on disk."""
        sync(self.path)
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


def write_pieces(path: Path, pieces: Mapping[str, Piece], aliases: Mapping[str, str]) -> dict[str, Any]:
    """One safetensors file of tensors on the host; returns its size and checksum. Equal pieces give equal files."""
    ordered = sorted(pieces.items(), key=lambda item: -item[1].tensor.dtype.itemsize)  # so that all are aligned
    metadata = {"format": "pt"}
    if aliases:
        metadata["aliases"] = json.dumps(aliases)
    parts = {n: [p.offsets, p.whole] for n, p in ordered if tuple(p.tensor.shape) != p.whole}
    if parts:
        metadata["pieces"] = json.dumps(parts)
    with HashingFile(path) as file:
        file.write(file_head(((name, piece.tensor.dtype, piece.tensor.shape) for name, piece in ordered), metadata))
        for _, piece in ordered:
            file.write(bytes_of(piece.tensor))
    return file.describe()


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Lying:
    """Where a piece lies: under which name in which file, at which offsets of the whole, and how large it is."""

    file: Path
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the files of a checkpoint, of which any box can be read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lying: tuple[_Lying, ...]
    files: PieceFiles

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """``shape`` elements from ``offsets`` on, on the host. Raises :class:`CheckpointError` where some of them are
        in no file."""
        if self.is_flat:
            row = math.prod(self.shape[1:])
            rows = self.flat(offsets[0] * row, (offsets[0] + shape[0]) * row).view(shape[0], *self.shape[1:])
            return rows[tuple(slice(a, a + n) for a, n in zip((0, *offsets[1:]), shape, strict=True))].clone()
        out = torch.empty(tuple(shape), dtype=self.dtype)
        found = 0
        for piece in self.lying:
            low = [max(a, b) for a, b in zip(offsets, piece.offsets, strict=True)]
            ends = zip(offsets, shape, piece.offsets, piece.shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.offsets, strict=True))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))
            part = self.files.read(piece.file, piece.name, source)
            out[target] = part
            found += part.numel()
        if found != out.numel():
            raise CheckpointError(f"{self.name}: {found} of {out.numel()} elements are in {self.files.place}")
        return out

    @property
    def is_flat(self) -> bool:
        """Whether its pieces are of the flattened tensor."""
        return self.ndim > 1 and any(len(piece.offsets) == 1 for piece in self.lying)

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor, on the host. Raises as :meth:`read` does."""
        if not self.shape:
            return self.whole().view(-1)[start:stop]
        row = max(math.prod(self.shape[1:]), 1)
        if not self.is_flat:  # whole rows around them
            first, last = start // row, -(-stop // row)
            rows = self.read((first, *(0,) * (self.ndim - 1)), (last - first, *self.shape[1:]))
            return rows.view(-1)[start - first * row : stop - first * row]
        out, found = torch.empty(stop - start, dtype=self.dtype), 0
        for piece in self.lying:
            low, high = max(start, piece.offsets[0]), min(stop, piece.offsets[0] + piece.shape[0])
            if low < high:
                source = slice(low - piece.offsets[0], high - piece.offsets[0])
                out[low - start : high - start] = self.files.read(piece.file, piece.name, (source,))
                found += high - low
        if found != out.numel():
            raise CheckpointError(f"{self.name}: {found} of {out.numel()} elements are in {self.files.place}")
        return out

    def whole(self) -> Tensor:
        """All of it, on the host."""
        return self.read((0,) * self.ndim, self.shape)

    def streamed(self) -> Stored:
        """As something that is read range by range of the flattened tensor: whole rows are read around a range."""
        return Stored(self.name, self.shape, self.dtype, self.files.place, self.flat)


class PieceFiles(Mapping[str, StoredTensor]):
    """The tensors of some files, one part of a checkpoint, by name. Opening reads the headers only.

    Raises :class:`CheckpointError` for a file that is torn, and for pieces that disagree.
    """

    def __init__(self, files: Sequence[Path], place: str = ""):
        self.place = place or ", ".join(str(file) for file in files)
        self._open: dict[Path, Any] = {}
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        pieces: dict[str, list[_Lying]] = {}
        self.aliases: dict[str, str] = {}
        for file in files:
            try:
                handle = self._open[file] = retried(partial(safe_open, file, framework="pt"), file)
                metadata = handle.metadata() or {}
                self.aliases |= json.loads(metadata.get("aliases", "{}"))
                parts = json.loads(metadata.get("pieces", "{}"))
                for name in handle.keys():  # noqa: SIM118 (it is no dict)
                    view = handle.get_slice(name)
                    shape, dtype = tuple(view.get_shape()), DTYPES[view.get_dtype()]
                    offsets, whole = (tuple(n) for n in parts.get(name, ((0,) * len(shape), shape)))
                    if shapes.setdefault(name, (whole, dtype)) != (whole, dtype):
                        raise CheckpointError(f"{name} is {shapes[name]} in one file, but {(whole, dtype)} in {file}")
                    pieces.setdefault(name, []).append(_Lying(file, name, offsets, shape))
            except CheckpointError:
                raise
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"{file} is torn, or no file of a checkpoint: {error}") from error
        self._tensors = {n: StoredTensor(n, *shapes[n], tuple(pieces[n]), self) for n in pieces}
        for alias, name in self.aliases.items():
            if name not in self._tensors:
                raise CheckpointError(f"{self.place} has no {name}, which {alias} is another name of")
            self._tensors[alias] = self._tensors[name]

    def read(self, file: Path, name: str, box: tuple[slice, ...]) -> Tensor:
        """A part of one file's tensor ``name``."""
        return self._open[file].get_slice(name)[box] if box else self._open[file].get_tensor(name)

    def close(self) -> None:
        """Let go of the files; nothing can be read any more."""
        self._open.clear()

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def shard_of(source: Any, like: Tensor) -> Any:
    """This rank's part of ``source`` (a full tensor, the same on every rank, or one in files) distributed as ``like``
    is and on its device; values that are no tensors as they are. Of a tensor in files a rank reads what it holds;
    where several hold the same one of them reads it, so this is a collective."""
    if not isinstance(source, StoredTensor):
        return shard_like(source, like)
    if source.ndim and (cut := cut_of(like)) is not None:
        return source.flat(cut.bounds[dist.rank()], cut.bounds[dist.rank() + 1]).to(like.device)
    if not isinstance(like, DTensor) or not source.ndim:
        return _read_by_one(source, like.device)
    return DTensor.from_local(
        _read_shard(source, like), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def _read_by_one(source: StoredTensor, device: torch.device) -> Tensor:
    if dist.size() == 1 or source.nbytes < _SHARED:
        return source.whole().to(device)
    reader = zlib.crc32(source.name.encode()) % dist.size()  # so that all read at the same time
    out = source.whole().to(device) if dist.rank() == reader else _empty(source, source.shape, device)
    dist.broadcast(_bytes(out), reader)
    return out


def _read_shard(source: StoredTensor, like: DTensor) -> Tensor:
    offsets, shape = place_of(like)
    mesh, device = like.device_mesh, like.to_local().device
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    copies = [dim for dim, placed in enumerate(like.placements) if isinstance(placed, Replicate) and mesh.size(dim) > 1]
    shared = math.prod(shape) * source.dtype.itemsize >= _SHARED
    if not math.prod(shape):
        return _empty(source, shape, device)
    if not shared or not any(coordinate[dim] for dim in copies):
        out = source.read(offsets, shape).to(device)
    else:
        out = _empty(source, shape, device)
    for dim in copies if shared else ():
        dist.broadcast(_bytes(out), dist.first_of(mesh.get_group(dim)), mesh.get_group(dim))
    return out


def _empty(source: StoredTensor, shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=source.dtype, device=device)


def _bytes(tensor: Tensor) -> Tensor:
    """A view for collectives: gloo knows no bfloat16."""
    return tensor.view(-1).view(torch.uint8)
