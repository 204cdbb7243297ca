"""Tensors in safetensors files, one file or many with an index, read and written piece by piece.

Nothing here holds more than :data:`CHUNK` elements, whatever the size of a tensor or of a file: files are read at
offsets, not mapped, so that memory in use is what the code asks for. A folder holds ``model.safetensors``, or
``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json``, as released checkpoints do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 1 << 22
"""Elements that are read, checked and written at a time."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


Vanished = dict[tuple[str, int, int], int]
"""How many values a cast made zero, by tensor and range: a range that is read twice counts once."""


class WeightsError(ValueError):
    """Weights that do not fit a model, or files that are not whole; the message names file and tensors."""


@dataclass(frozen=True)
class Stored:
    """A tensor that lies elsewhere. ``read(start, stop)`` gives its elements in that range of the flattened tensor,
    ``place`` says where it lies (for people)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: str
    read: Callable[[int, int], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def whole(self) -> Tensor:
        return self.read(0, self.numel).view(self.shape)

    def chunks(self, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Flat pieces of at most ``size`` elements with where they begin."""
        size = size or CHUNK
        for start in range(0, self.numel, size):
            yield start, self.read(start, min(start + size, self.numel))

    def cast(self, dtype: torch.dtype, vanished: Vanished | None = None) -> Stored:
        """The same values in ``dtype``; which became zero, though they were none, is counted in ``vanished``. Reading
        raises :class:`WeightsError` for a value that is not finite, or too large for ``dtype``."""
        if dtype == self.dtype:
            return self

        def read(start: int, stop: int) -> Tensor:
            piece = self.read(start, stop)
            self.require_finite(piece)
            narrow = piece.to(dtype)
            if piece.is_floating_point() and dtype.is_floating_point and piece.numel():
                largest = piece.abs().max().item()
                if not narrow.isfinite().all():
                    raise WeightsError(
                        f"{self.name} in {self.place} holds {largest:.4g}, which is too large for {dtype}: the cast "
                        f"from {self.dtype} would make it infinite"
                    )
                lost = int(piece.count_nonzero()) - int(narrow.count_nonzero())
                if lost and vanished is not None:
                    vanished[self.name, start, stop] = lost
            return narrow

        return replace(self, dtype=dtype, read=read)

    def require_finite(self, piece: Tensor) -> None:
        """Raises :class:`WeightsError` naming this tensor where ``piece`` of it holds a NaN or an infinity."""
        if piece.numel() and piece.is_floating_point():
            low, high = torch.aminmax(piece if piece.itemsize > 1 else piece.float())  # NaN passes through both
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise WeightsError(f"{self.name} in {self.place} is not finite: a NaN or an infinity")


def stored(name: str, tensor: Tensor, place: str = "memory") -> Stored:
    """A tensor in memory as :class:`Stored`."""
    flat = tensor.detach().contiguous().view(-1)
    return Stored(name, tuple(tensor.shape), tensor.dtype, place, lambda start, stop: flat[start:stop].cpu())


# ---------------------------------------------------------------------------------------------- reading


class TensorFiles(Mapping[str, Stored]):
    """Every tensor of a file or folder by name; nothing is read before it is asked for. Close it, or use ``with``.

    Opening compares the index with what the files hold. Raises :class:`WeightsError` for a file that is missing or
    torn, a tensor in two files, in another file than the index says or in no index, and for pickled weights.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.files = weight_files(self.path)
        self._open: dict[Path, int] = {}
        self._tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, entry in _header(file).items():
                if name in self._tensors:
                    raise WeightsError(f"{name} is in two files: {self._tensors[name].place} and {file}")
                self._tensors[name] = self._entry(file, name, entry)
        if (self.path / INDEX).is_file():
            _compare_index(self.path / INDEX, self._tensors)

    def _entry(self, file: Path, name: str, entry: Mapping[str, Any]) -> Stored:
        if entry["dtype"] not in DTYPES:
            raise WeightsError(f"{name} in {file} is {entry['dtype']}: no dtype that is read here")
        dtype, begin = DTYPES[entry["dtype"]], entry["at"]

        def read(start: int, stop: int) -> Tensor:
            out = torch.empty(stop - start, dtype=dtype)
            if out.numel():
                _fill(self._descriptor(file), out, begin + start * dtype.itemsize, file)
            return out

        return Stored(name, tuple(entry["shape"]), dtype, str(file), read)

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of ``path``, a file or a folder, in the order of their names.

    Raises :class:`WeightsError` where there are none, a file of the index is not there, or both one file and an index
    are.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise WeightsError(f"no weights at {path}")
    single, index = path / WEIGHTS, path / INDEX
    if single.is_file() and index.is_file() and set(read_index(index).values()) != {WEIGHTS}:
        raise WeightsError(f"{path} holds both {WEIGHTS} and {INDEX}: which counts? Remove one")
    if index.is_file():
        names = sorted(set(read_index(index).values()))
        if missing := [name for name in names if not (path / name).is_file()]:
            raise WeightsError(f"{index} names files that are not there: {', '.join(missing[:4])}")
        shards = {file.name for file in path.glob("*.safetensors")}
        if extra := sorted(name for name in shards - set(names) if name.startswith("model-")):
            raise WeightsError(f"{', '.join(extra[:4])} in {path}: {INDEX} does not name it")
        return [path / name for name in names]
    if single.is_file():
        return [single]
    if shards := sorted(file.name for file in path.glob("*.safetensors")):
        raise WeightsError(f"{path} holds {shards[0]} but no {INDEX}")
    if pickled := sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED):
        raise WeightsError(
            f"{path} holds pickled weights ({pickled[0]}), which run code when read: where you trust their origin, "
            f"load them with their own library and save them as safetensors"
        )
    raise WeightsError(f"no weights at {path}: neither {WEIGHTS} nor {INDEX}")


def read_index(index: Path) -> dict[str, str]:
    """Names of tensors and of their files, all beside ``index``. Raises :class:`WeightsError` for anything else."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not names or any(Path(file).name != file for file in names.values()):
            raise ValueError("weight_map must name files of its own folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of safetensors files: {error}") from error
    return names


def _compare_index(index: Path, tensors: Mapping[str, Stored]) -> None:
    told = read_index(index)
    for name, file in told.items():
        if name not in tensors:
            raise WeightsError(f"{name} is not in {index.parent / file}, nor in any other file, as {INDEX} says")
        if Path(tensors[name].place).name != file:
            raise WeightsError(f"{name} is in {tensors[name].place}, but {INDEX} says {file}")
    if extra := [name for name in tensors if name not in told]:
        raise WeightsError(f"{extra[0]} in {tensors[extra[0]].place} is not in {INDEX} ({len(extra)} in all)")


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype code, shape and offset in the file, as the format's own library finds them sound."""
    try:
        with safe_open(file, framework="pt"):  # refuses what is cut short, overlaps or has holes
            pass
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{file} is torn, or no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"], "at": 8 + size + entry["data_offsets"][0]}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def _fill(descriptor: int, out: Tensor, at: int, file: Path) -> None:
    view, done = memoryview(out.view(torch.uint8).numpy()), 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], at + done)
        if got == 0:
            raise WeightsError(f"{file} became shorter while it was read")
        done += got


# ---------------------------------------------------------------------------------------------- writing


Progress = Callable[[int], None]
"""Told how many bytes were written since the last call."""


def write_files(
    folder: Path | None,
    tensors: Iterable[Stored],
    shard_size: int | None = None,
    progress: Progress | None = None,
    *,
    together: bool = False,
) -> None:
    """Write ``tensors`` in their order into ``folder``, which the caller made aside: one file, or, where they exceed
    ``shard_size`` bytes, numbered files of at most that (or one tensor) and an index.

    ``together``: reading is a collective. Ranks with ``folder`` None then read every piece and write none, and the one
    that writes goes on reading after an error of any kind, which it raises at the end. Raises
    :class:`WeightsError` naming a tensor that is not finite.
    """
    shards = plan_shards(list(tensors), shard_size)
    names = [WEIGHTS] if len(shards) == 1 else [shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
    failed: Exception | None = None
    for file, shard in zip(names, shards, strict=True):
        sink = _Sink(None if failed is not None or folder is None else folder / file, together)
        with sink:
            _write_file(sink, shard, progress)
        failed = failed or sink.failed
    if failed is not None:
        raise failed
    if folder is not None and len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        files = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def shard_name(number: int, count: int) -> str:
    """The name of a numbered file, from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def plan_shards(tensors: Sequence[Stored], shard_size: int | None) -> list[list[Stored]]:
    """``tensors`` in consecutive groups of at most ``shard_size`` bytes; a tensor above that is alone."""
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard size must be positive, got {shard_size}")
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if shard_size is not None and shards[-1] and filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


class _Sink:
    """A file to write to; after an error, if others must not be left waiting, one that takes no more and notes it."""

    def __init__(self, path: Path | None, together: bool):
        self.path, self.together = path, together
        self.failed: Exception | None = None
        self._file: Any = None

    def write(self, data: Callable[[], Any]) -> None:
        """``data`` is called only where there is a file to write to."""
        if self.path is None or self.failed is not None:
            return
        with self.noting():
            self._file = self._file or open(self.path, "wb")  # noqa: SIM115 (closed by __exit__)
            self._file.write(data())

    @contextmanager
    def noting(self) -> Iterator[None]:
        """An error of the block is kept for the end where others wait for this rank: any, for each would hang them."""
        try:
            yield
        except Exception as error:
            if not self.together:
                raise
            self.failed = self.failed or error

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with self.noting():  # closing writes what was held back: a full disk shows here
                self._file.close()


def file_head(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of ``tensors`` (name, dtype, shape) that follow each other in a safetensors file:
    the length of the header, and the header. All are aligned where the widest dtypes come first."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, in row-major order; not a copy of one that lies so."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _write_file(sink: _Sink, tensors: Sequence[Stored], progress: Progress | None) -> None:
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    head = file_head(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), {"format": "pt"})
    sink.write(lambda: head)
    for tensor in tensors:
        for start in range(0, tensor.numel, CHUNK):
            with sink.noting():  # what is gathered is there when a look at it raises
                piece = tensor.read(start, min(start + CHUNK, tensor.numel))
                sink.write(lambda tensor=tensor, piece=piece: _sound_bytes(tensor, piece))
                if progress is not None:
                    progress(piece.numel() * piece.itemsize)


def _sound_bytes(tensor: Stored, piece: Tensor) -> memoryview:
    tensor.require_finite(piece)
    return bytes_of(piece)
