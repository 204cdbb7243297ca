"""Process groups, reductions and seeds: the only module that talks to ``torch.distributed`` directly.

Everything works without ``torchrun`` as well: a lone process is a world of size one, and no collective runs.
"""

from __future__ import annotations

import atexit
import faulthandler
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_HEADER = 5  # of the vector that World.sum reduces: two checksums, their squares, and a flag


@dataclass(frozen=True)
class World:
    """Who I am among how many, and on which device my tensors live.

    ``context`` neighbouring ranks work on one pack together (context parallelism): what feeds a rank goes by
    ``data_rank`` of ``data_size``, what collectives span by ``rank`` of ``size``. ``timeout`` (seconds) bounds the
    collectives of groups made here.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    context: int = 1
    timeout: float = 600.0
    _names: dict[str, list[str]] = field(default_factory=dict, repr=False, compare=False)
    _meshes: dict[tuple[Any, ...], tuple[Any, DeviceMesh]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        return self.size // self.context

    def with_context(self, ranks: int) -> World:
        """This world with ``ranks`` neighbours to every pack. ``ValueError`` where they do not divide the world."""
        if ranks < 1 or self.size % ranks:
            raise ValueError(
                f"{self.size} ranks cannot form contexts of {ranks}: context_parallel must divide their number "
                f"(--nproc_per_node)"
            )
        return replace(self, context=ranks)

    def mesh(self, sizes: Mapping[str, int] | None = None) -> DeviceMesh:
        """All ranks in dimensions of these names and sizes, neighbours along the last; by default in one, ``dp``.

        Of eight ranks ``{"replicas": 2, "ep": 4}`` makes the groups 0..3 and 4..7 of ``mesh["ep"]``. To be called by
        all ranks; equal sizes give the same mesh again. A lone process gets a group of its own. Raises ``ValueError``
        where the sizes do not multiply to the number of ranks.
        """
        sizes = dict(sizes or {"dp": self.size})
        if min(sizes.values()) < 1 or math.prod(sizes.values()) != self.size:
            asked = " x ".join(f"{size} {name}" for name, size in sizes.items())
            raise ValueError(f"{self.size} ranks cannot be laid out as {asked}")
        if not torch_dist.is_initialized():
            torch_dist.init_process_group(_backend(self.device), store=torch_dist.HashStore(), rank=0, world_size=1)
            atexit.register(_leave)
        if len(sizes) == 1:
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=tuple(sizes))
        world_group, key = torch_dist.group.WORLD, (self.timeout, *sizes.items())
        known = self._meshes.get(key)
        if known is None or known[0] is not world_group:  # of a world that was left and joined anew
            known = self._meshes[key] = (world_group, self._new_mesh(sizes))
        return known[1]

    def _new_mesh(self, sizes: Mapping[str, int]) -> DeviceMesh:
        """Groups are made one by one, as those that a mesh makes itself would wait half an hour for a lost rank."""
        layout = torch.arange(self.size).view(*sizes.values())
        own = []
        for dim in range(layout.ndim):
            for ranks in layout.movedim(dim, -1).reshape(-1, layout.shape[dim]).tolist():
                group = torch_dist.new_group(ranks, timeout=timedelta(seconds=self.timeout))
                if self.rank in ranks:
                    own.append(group)
        return DeviceMesh.from_group(own, self.device.type, mesh=layout, mesh_dim_names=tuple(sizes))

    def all_reduce(self, vector: Tensor) -> Tensor:
        """Sum ``vector`` over ranks, in place, and return it. Shapes must agree; see :meth:`sum` for named scalars."""
        return all_reduce(vector)

    def sum(self, values: Mapping[str, Tensor | float], layout: str = "") -> dict[str, float]:
        """Sum named scalars over ranks, in float64, in one collective.

        Ranks may bring different names: a missing one counts as zero. Whether they do is found out in the same
        collective (the checksums ``h`` of all ranks are equal iff ``size * sum(h**2) == sum(h)**2``); only then do
        names travel, and the union is remembered under ``layout``, so that the next call needs one collective again.
        """
        if self.size == 1:
            return dict(zip(values, self._stack(values.values()).tolist(), strict=True)) if values else {}
        known = self._names.setdefault(layout, [])  # the same on every rank, and so is the length of the vector
        while True:
            names = sorted({*known, *values})
            vector = torch.zeros(_HEADER + 128 + 2 * len(known), dtype=torch.float64, device=self.device)
            fits = len(names) <= vector.numel() - _HEADER
            low, high = divmod(zlib.crc32("\n".join(names).encode()), 1 << 16)
            vector[:_HEADER] = torch.tensor([low, low * low, high, high * high, 0 if fits else 1])
            if fits and names:
                vector[_HEADER : _HEADER + len(names)] = self._stack(values.get(name, 0.0) for name in names)
            total = self.all_reduce(vector).tolist()
            if total[4] == 0 and all(self.size * int(total[i + 1]) == int(total[i]) ** 2 for i in (0, 2)):
                known[:] = names
                return dict(zip(names, total[_HEADER:], strict=False))
            known[:] = sorted({name for some in self.gather_objects(names) for name in some})

    def _stack(self, values: Iterable[Tensor | float]) -> Tensor:
        """One float64 vector on the device, so that reading it waits for the device once and not once a name."""
        scalars = [torch.as_tensor(v).detach().to(self.device, torch.float64).reshape(()) for v in values]
        return torch.stack(scalars)

    def gather_objects(self, value: Any) -> list[Any]:
        """``value`` (anything JSON can hold) of every rank, in rank order, on every rank."""
        return [json.loads(json.dumps(value))] if self.size == 1 else gather_objects(value, self.device)


def init(timeout: float = 600.0, threads: int | None = None) -> World:
    """Join the world that ``torchrun``, ``accelerate launch`` or MPI describes in the environment, or be alone.

    NCCL carries GPU tensors and gloo CPU tensors. ``timeout`` (seconds) bounds every collective, so that a lost rank
    is an error and not a wait for ever. ``threads`` of each rank default to its share of the processors this process
    may use; torchrun's own default is one, which leaves most of a CPU machine idle. ``ValueError`` for a launcher that
    started several processes without telling them of each other, or asks for what it does not decide here.
    """
    _understand_launcher()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(threads or default_threads(local_size))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that NCCL remembers, for the dump of a hang
    if size > 1 and not torch_dist.is_initialized():
        wait = timedelta(seconds=timeout)
        store, *_ = next(torch_dist.rendezvous("env://", rank, size, timeout=wait))
        # torchrun's store outlives its restarts: without a name of its own a restarted rank would find the addresses
        # of those that were killed, and wait for them
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch_dist.PrefixStore(f"mmagent/life-{life}", store)
        torch_dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size, timeout=wait)
        atexit.register(_leave)
    return World(rank, size, local_rank, device, timeout=timeout)


_BY_MPI = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
"""What Open MPI, MPICH with its kin (Intel MPI), and MVAPICH call what torchrun calls so."""


def _understand_launcher() -> None:
    """Complete the environment to what torchrun would have set, so that everyone may read that."""
    for switch, instead in (
        ("ACCELERATE_USE_DEEPSPEED", "engine.parallel=zero1, zero2 or zero3"),
        ("ACCELERATE_USE_FSDP", "engine.parallel=fsdp2 or hsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "engine.parallel"),
    ):
        if os.environ.get(switch, "").lower() in ("true", "1"):
            raise ValueError(f"{switch}: accelerate only launches here, engines are ours: leave it out, set {instead}")
    if (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise ValueError(f"accelerate asks for mixed precision {asked!r}: it only launches here; set engine.dtype")
    if "WORLD_SIZE" in os.environ:
        return
    found = {ours: os.environ[t] for ours, theirs in _BY_MPI.items() for t in theirs if t in os.environ}
    if int(found.get("WORLD_SIZE", 1)) > 1:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ValueError(
                f"MPI started {found['WORLD_SIZE']} ranks, but {' and '.join(missing)} are not set, where they could "
                f"meet: export them (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
            )
        os.environ.update(found)
    elif "MASTER_ADDR" in os.environ and any(name.startswith("ACCELERATE_") for name in os.environ):
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever --num_processes says, and it would train alone: use "
            "accelerate launch --multi_gpu --num_processes N, which starts N ranks on CPUs as well, or torchrun"
        )


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def default_threads(local_size: int) -> int:
    """This rank's share of the processors, unless the user set ``OMP_NUM_THREADS``: torchrun sets it to 1 unasked where
    it starts several ranks on a machine, and there alone."""
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked and not ("TORCHELASTIC_RUN_ID" in os.environ and asked == "1" and local_size > 1):
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def shutdown() -> None:
    """The end of a run that went well: leave the process group, if there is one, once all ranks are here. Who left
    first would take its end of connections along that others still use."""
    barrier()
    _leave()


def _leave() -> None:
    """Leave without a word: a process that ends, perhaps for an error, must not wait for others."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        _let_threads_rest()


def _let_threads_rest(limit: float = 1.0) -> None:
    """Give other threads of this process the interpreter until none of them has anything to do; ``limit`` seconds.

    Gloo's threads let go of the tensors of a collective some time after it is over, and need the interpreter for those
    that Python knows. One that asks for it while it is being taken down aborts the process, and the launcher ends the
    other ranks for it (pytorch issue 190489; seen once, on a machine with more to do than it has cores).
    """
    deadline, quiet = time.monotonic() + limit, 0
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(0.005)  # hands over the interpreter, and the core
        quiet = quiet + 1 if not _busy_threads() else 0


def _busy_threads() -> int:
    """Threads of this process but the calling one that run, or would if they had a core; 0 where Linux does not say."""
    busy = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            state = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
            busy += state == "R" and int(stat.parent.name) != threading.get_native_id()
    return busy


def all_reduce(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum ``tensor`` over the ranks of ``group`` (all of them), in place, and return it: for buffers such as router
    loads. Alone: unchanged."""
    if torch_dist.is_initialized() and torch_dist.get_world_size(group) > 1:
        torch_dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_each(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> None:
    """Sum each of ``tensors`` over the ranks of ``group``, in place; all of them are on their way at one time."""
    if torch_dist.is_initialized() and torch_dist.get_world_size(group) > 1:
        for work in [torch_dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]:
            work.wait()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sends: tuple[int, ...], receives: tuple[int, ...], group: ProcessGroup | None
    ) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        out = rows.new_empty(sum(receives), *rows.shape[1:])
        torch_dist.all_to_all_single(out, rows.contiguous(), list(receives), list(sends), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.receives, ctx.sends, ctx.group), None, None, None


def all_to_all(rows: Tensor, sends: Sequence[int], receives: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """The first ``sends[0]`` of ``rows (n, ...)`` to rank 0 of ``group``, the next ``sends[1]`` to rank 1, and so on;
    returns the rows that came, ``receives[r]`` from rank ``r``, in order of ranks. Gradients travel back.

    A collective, in the forward and in the backward: a rank that gives or gets nothing must call it, too, with rows
    that need a gradient where those of its peers do, and let what it got take part in its loss.
    """
    if rows.shape[0] != sum(sends):
        raise ValueError(f"all_to_all: {rows.shape[0]} rows, but {sum(sends)} to send")
    return _AllToAll.apply(rows, tuple(sends), tuple(receives), group)


def gather_rows(rows: Tensor, group: ProcessGroup | None = None) -> list[Tensor]:
    """``rows (n, ...)`` of every rank of ``group``, in order of ranks, on every rank; ``n`` may differ, and be 0. Rows
    that lie on the host do not pass through the accelerator."""
    if not torch_dist.is_initialized() or torch_dist.get_world_size(group) == 1:
        return [rows]
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(torch_dist.get_world_size(group))]
    torch_dist.all_gather(counts, count, group=group)
    longest = max(int(n) for n in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    torch_dist.all_gather(everyone, padded, group=group)
    return [some[: int(n)] for some, n in zip(everyone, counts, strict=True)]


def gather_objects(value: Any, device: torch.device | str = "cpu", group: ProcessGroup | None = None) -> list[Any]:
    """``value`` (anything JSON can hold) of every rank of ``group`` (all of them), in order of ranks, on every rank.
    ``device`` is where this world's tensors live."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(some.cpu().numpy().tobytes()) for some in gather_rows(data.to(device), group)]


def exchange(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: ProcessGroup | None = None
) -> None:
    """Send each tensor to its rank while filling each buffer from its rank; returns when all have arrived.

    Pairs of ``(tensor, rank)``, ranks being those of the world, in ``group`` (all of them) as well. Two ranks that
    exchange several tensors must list them in matching order.
    """
    with exchanging(sends, receives, group):
        pass


@contextmanager
def exchanging(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: ProcessGroup | None = None
) -> Iterator[None]:
    """:func:`exchange` while the block runs; what is sent must not change in it, and buffers are full after it."""
    operations = [torch_dist.P2POp(torch_dist.isend, tensor.contiguous(), rank, group) for tensor, rank in sends]
    operations += [torch_dist.P2POp(torch_dist.irecv, buffer, rank, group) for buffer, rank in receives]
    works = torch_dist.batch_isend_irecv(operations) if operations else []
    yield
    for work in works:
        work.wait()


def gather_ints(value: int, device: torch.device | str = "cpu") -> list[int]:
    """``value`` of every rank, in rank order, on every rank. ``device`` is where this world's tensors live."""
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return [value]
    everyone = torch.zeros(torch_dist.get_world_size(), dtype=torch.int64, device=device)
    everyone[torch_dist.get_rank()] = value
    return [int(n) for n in all_reduce(everyone).tolist()]


def gather_pieces(piece: Tensor, sizes: Sequence[int]) -> Tensor:
    """The flat ``piece (sizes[rank],)`` of every rank, one after the other, on every rank. A collective."""
    if len(sizes) == 1:
        return piece
    padded = piece.new_zeros(max(sizes))
    padded[: piece.numel()] = piece
    everyone = padded.new_empty(len(sizes), max(sizes))
    torch_dist.all_gather(list(everyone.unbind()), padded)
    return torch.cat([row[:size] for row, size in zip(everyone, sizes, strict=True)])


def rank() -> int:
    """This process's rank; 0 when alone."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are; 1 when alone."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def broadcast(tensor: Tensor, source: int = 0, group: ProcessGroup | None = None) -> Tensor:
    """Overwrite ``tensor`` with that of the rank ``source`` on the ranks of ``group`` (all of them), in place, and
    return it. Alone: unchanged."""
    if torch_dist.is_initialized() and torch_dist.get_world_size(group) > 1:
        torch_dist.broadcast(tensor, source, group=group)
    return tensor


def broadcast_ahead(tensor: Tensor, source: int, group: ProcessGroup | None = None) -> Callable[[], object]:
    """:func:`broadcast` that goes on while others compute. Call what is returned before ``tensor`` is read or, on the
    source, changed. Collectives of ``group`` keep the order in which they were begun; see :func:`twin`."""
    work = torch_dist.broadcast(tensor, source, group=group, async_op=True)
    return work.wait


def gather_into(everyone: Tensor, rows: Tensor, group: ProcessGroup | None = None) -> None:
    """``rows (n, ...)`` of every rank, as many of each, into ``everyone (R * n, ...)``, in order of ranks."""
    gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor  # its name since 2.13
    gather(everyone, rows, group=group)


def twin(group: ProcessGroup | None, timeout: float, device: torch.device | str = "cpu") -> ProcessGroup:
    """A new group of the ranks of ``group`` (all of them): what is under way in one waits for nothing in the other.

    To be called by all ranks of the world, each with a group of its own or one that it shares; these must not overlap
    in part. ``timeout`` (seconds) bounds collectives.
    """
    firsts = gather_ints(0 if group is None else first_of(group), device)
    made = {
        first: torch_dist.new_group([r for r, f in enumerate(firsts) if f == first], timedelta(seconds=timeout))
        for first in sorted(set(firsts))
    }
    return made[firsts[rank()]]


def abort(group: ProcessGroup) -> None:
    """Leave ``group``, which is of no use any more, in the middle of something. Whoever waits there gets a
    ``RuntimeError``: of gloo once nothing refers to the group and its work here any more, of NCCL at its timeout."""
    group.abort()
    torch_dist.destroy_process_group(group)


def first_of(group: ProcessGroup, number: int = 0) -> int:
    """The rank, in the world, of the first member of ``group``, or of another by its ``number``."""
    return torch_dist.get_global_rank(group, number)


def barrier() -> None:
    """Wait until every rank is here."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def is_main() -> bool:
    """Whether this process writes logs and shared files."""
    return not torch_dist.is_initialized() or torch_dist.get_rank() == 0


def said_by_main(text: str, patience: float = 5.0) -> bool:
    """Whether this rank need not say ``text`` (of an error), as the main rank does.

    The main rank leaves its text with the store that ranks meet by; the others wait for it, ``patience`` seconds at
    most, or until SIGTERM. Who has not found it by then, or cannot ask, has to say it. No process group is needed:
    setting up may fail before there is one.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return False
    key, wait = f"mmagent/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", timedelta(seconds=patience)
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with _noting_sigterm() as ended:  # a launcher whose main rank died would end us with the error unsaid
            store = torch_dist.TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)
            if rank == 0:
                store.set(key, text)
                return False
            deadline = time.monotonic() + patience
            while not store.check([key]):  # not store.get, in which no handler of a signal runs
                if ended.wait(0.1) or time.monotonic() > deadline:
                    return False
            return store.get(key) == text.encode()
    except (KeyError, RuntimeError):  # no address, or nobody there
        return False


@contextmanager
def _noting_sigterm() -> Iterator[threading.Event]:
    """Within the block SIGTERM sets the event and ends nothing; only the main thread can have it so."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextmanager
def main_first() -> Iterator[None]:
    """The main rank runs the block before the others do: for caches that one process should fill."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch. Build models under one seed on every rank; pass ``rank`` for what differs."""
    mixed = rank_seed(seed, rank)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def rank_seed(seed: int, rank: int) -> int:
    """A seed of 63 bits that differs for every ``(seed, rank)``; rank 0 keeps ``seed`` itself."""
    return seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> 1)


def stable_seed(*parts: object) -> int:
    """63 bits that are the same on every machine and in every process, from anything with a stable ``repr``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``fn(world, *args)`` in ``world_size`` fresh gloo processes and return what they return, in rank order.

    ``fn`` must be importable (no lambda). A child's error is raised here with the child's traceback, and its peers are
    stopped; after ``timeout`` seconds all are, with their stacks printed, and ``TimeoutError`` is raised.
    """
    context = multiprocessing.get_context("forkserver")  # one import of torch, and of what it loads late, serves all
    context.set_forkserver_preload([__name__, "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"])
    folder = Path(tempfile.mkdtemp(prefix="mmagent-ranks-"))
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    children = [
        context.Process(
            target=_rank_main, args=(pipes[r][1], r, world_size, str(folder / "store"), timeout, fn, args), daemon=False
        )
        for r in range(world_size)
    ]
    try:
        for child, (_, sender) in zip(children, pipes, strict=True):
            child.start()
            sender.close()
        return _collect([receiver for receiver, _ in pipes], timeout)
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()
        shutil.rmtree(folder, ignore_errors=True)


def _collect(receivers: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(receivers):
        waiting = [r for i, r in enumerate(receivers) if i not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [i for i in range(len(receivers)) if i not in results]
            raise TimeoutError(f"ranks {late} did not finish within {timeout:.0f} s")
        failures = []
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                results[rank], error = pickle.loads(receiver.recv_bytes())  # from our own child
            except EOFError:
                results[rank], error = None, "the process died without a word (killed, or out of memory)"
            if error is not None:
                failures.append(f"rank {rank} of {len(receivers)}: {error}")
        if failures:
            raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(
    sender: Connection, rank: int, size: int, store: str, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(max(1.0, timeout - 2.0), exit=False, file=sys.__stderr__)
    torch.set_num_threads(1)
    try:
        torch_dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        result = fn(World(rank, size, rank, torch.device("cpu"), timeout=timeout), *args)
        barrier()
        # not sender.send: torch would hand over tensors as shared memory that dies with this process
        sender.send_bytes(pickle.dumps((result, None)))
    except BaseException:  # the parent raises it again, so nothing is swallowed
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        _leave()
        faulthandler.cancel_dump_traceback_later()
