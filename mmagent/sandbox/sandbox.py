"""Cells for Python programs that nobody trusts, kept ready with their libraries imported.

What protects is Linux itself, and nothing else is needed: namespaces for files, network, processes and users, a filter
of system calls, and limits (:mod:`mmagent.sandbox.cell` says which). Before the first program a probe tries to get out;
where it can, or where a wall cannot be built, :class:`SandboxUnavailable` says so and nothing runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

CELL = Path(__file__).with_name("cell.py")
START_LIMIT = 120.0
GRACE = 10.0
"""Seconds beyond a program's own after which its cell is taken for broken."""
MOST_PROGRAM = 2_000_000
RECYCLE = 500
"""Programs after which a worker is replaced."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}")
_KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")  # of the environment: no key or token gets near a cell


class SandboxError(RuntimeError):
    """The sandbox itself failed, not the program in it: an error, and no verdict about the program."""


class SandboxUnavailable(SandboxError):
    """This machine cannot hold a program back; the message says what is missing."""


@dataclass(frozen=True)
class CellLimits:
    """Of one program: ``seconds`` on the clock and ``cpu_seconds`` of work; ``memory_mb`` beyond what the imported
    libraries hold; ``processes``, threads included; ``files_mb`` in all of its files; ``output_bytes`` that are kept of
    what it prints, to either side."""

    seconds: float = 10.0
    cpu_seconds: float = 8.0
    memory_mb: int = 1024
    processes: int = 1
    files_mb: int = 32
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"CellLimits: {name} must be positive, got {value}")


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``status`` is "ok" (exit code 0), "failed" (another one, an exception, a signal) or "time".

    ``out`` and ``err`` are the beginnings of what it printed; ``files`` those of the wanted names that it left as plain
    files within the limit; ``seconds`` on the clock, the cell's own included.
    """

    status: str
    code: int
    out: bytes
    err: bytes
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    seconds: float = 0.0

    @property
    def complaint(self) -> str:
        """The last line that it wrote to its standard error, or how it ended."""
        lines = self.err.decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"{self.status}, exit code {self.code}"


class Sandbox:
    """``async with Sandbox() as sandbox: outcome = await sandbox.run("print(1)")``

    ``workers`` programs run at a time, others wait. ``preload``: modules that are imported once and that every program
    then finds imported, whatever else is installed can be imported as well. It belongs to the event loop that it was
    started on. Raises :class:`SandboxUnavailable` at its start where it cannot protect.
    """

    def __init__(self, workers: int = 1, preload: Sequence[str] = (), limits: CellLimits | None = None):
        if workers < 1:
            raise ValueError(f"Sandbox: at least one worker is needed, got {workers}")
        self.limits = limits or CellLimits()
        self.started = 0
        self._preload, self._count = tuple(preload), workers
        self._free: asyncio.Queue[_Worker | None] = asyncio.Queue()
        self._alive: set[_Worker] = set()
        self._open = False

    async def __aenter__(self) -> Sandbox:
        worker = await self._start()
        try:
            await _probe(worker)
        except BaseException:
            await self._end(worker)
            raise
        self._free.put_nowait(worker)
        for _ in range(self._count - 1):
            self._free.put_nowait(None)  # started when it is needed
        self._open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open = False
        await asyncio.gather(*(self._end(worker) for worker in list(self._alive)))

    async def run(
        self,
        program: str,
        files: Mapping[str, bytes] | None = None,
        wanted: Sequence[str] = (),
        limits: CellLimits | None = None,
    ) -> Outcome:
        """Run ``program`` as ``__main__`` beside ``files``, in a folder that is gone afterwards.

        What the program does is told by the outcome. Raises ``ValueError`` for a program of more than two megabytes or
        a name that is no plain one, and :class:`SandboxError` where the sandbox broke.
        """
        if not self._open:
            raise RuntimeError("Sandbox: not started, or closed; use `async with Sandbox() as sandbox`")
        job = _pack(program, files or {}, wanted, limits or self.limits)
        async with self._borrow() as worker:
            return await worker.run(job, (limits or self.limits).seconds)

    @contextlib.asynccontextmanager
    async def _borrow(self) -> AsyncIterator[_Worker]:
        worker = await self._free.get()
        sound = False
        try:
            if worker is None:
                worker = await self._start()
            yield worker
            sound = worker.served < RECYCLE
        finally:
            if not sound and worker is not None:
                await asyncio.shield(self._end(worker))
            self._free.put_nowait(worker if sound else None)

    async def _start(self) -> _Worker:
        worker = await _Worker.start(self._preload)
        self.started += 1
        self._alive.add(worker)
        return worker

    async def _end(self, worker: _Worker) -> None:
        self._alive.discard(worker)
        await worker.close()


def _pack(program: str, files: Mapping[str, bytes], wanted: Sequence[str], limits: CellLimits) -> bytes:
    body = program.encode("utf-8", "backslashreplace")  # a lone surrogate is no program, and Python will say so
    if len(body) > MOST_PROGRAM:
        raise ValueError(f"a program of {len(body)} bytes; at most {MOST_PROGRAM} are run")
    for name in (*files, *wanted):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no plain file name")
    sizes = [(name, len(content)) for name, content in files.items()]
    if sum(size for _, size in sizes) > limits.files_mb << 19:
        raise ValueError(f"files of {sum(size for _, size in sizes)} bytes for a disk of {limits.files_mb} MiB")
    head = {**asdict(limits), "program_size": len(body), "files": sizes, "wanted": list(wanted)}
    told = json.dumps(head).encode()
    return b"".join([struct.pack("!I", len(told)), told, body, *files.values()])


@dataclass(eq=False)
class _Worker:
    """One process that holds cells, and the socket to it."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    folder: Path
    served: int = 0

    @classmethod
    async def start(cls, preload: Sequence[str]) -> _Worker:
        folder = Path(tempfile.mkdtemp(prefix="mmagent-cell-"))
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", str(CELL), str(theirs.fileno()), str(folder), *preload,
                pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
                env={**environment, **threads, "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0"},
            )  # fmt: skip
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = cls(process, reader, writer, folder)
        try:
            async with asyncio.timeout(START_LIMIT):
                head, _ = await worker._answer()
        except BaseException as error:
            await worker.close()
            if isinstance(error, TimeoutError | OSError | EOFError):
                raise SandboxError(f"no cell within {START_LIMIT:g} s: {error!r}") from error
            raise
        if head["status"] != "ready":
            await worker.close()
            raise SandboxUnavailable(f"programs cannot be held back here: {head.get('reason')}")
        return worker

    async def run(self, job: bytes, seconds: float) -> Outcome:
        self.served += 1
        try:
            async with asyncio.timeout(seconds + GRACE):
                self.writer.write(job)
                await self.writer.drain()
                head, blobs = await self._answer()
        except (TimeoutError, OSError, EOFError) as error:
            raise SandboxError(f"a cell broke: {error!r}") from error
        if head["status"] == "broken":
            raise SandboxUnavailable(f"programs cannot be held back here: {head['reason']}")
        code = head["status"] if isinstance(head["status"], int) else -1
        status = "time" if code < 0 or code == _KILLED else "ok" if code == 0 else "failed"
        out, err, *contents = blobs
        return Outcome(status, code, out, err, dict(zip(head["names"], contents, strict=True)), head["seconds"])

    async def _answer(self) -> tuple[dict, list[bytes]]:
        size = struct.unpack("!I", await self.reader.readexactly(4))[0]
        head = json.loads(await self.reader.readexactly(size))
        return head, [await self.reader.readexactly(length) for length in head["sizes"]]

    async def close(self) -> None:
        """End the process, and with it whatever runs in its cell."""
        self.writer.close()
        try:
            async with asyncio.timeout(GRACE):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_KILLED = 128 + 9
"""Exit code of a program that was killed: by the limit on its work, for nobody else may."""

_PROBE = """
import ctypes, json, os, socket
told = {}
def tried(name, act):
    try:
        act()
    except (OSError, RuntimeError) as error:
        told[name] = "refused"
    else:
        told[name] = "done"
tried("a socket", lambda: socket.socket())
tried("reading another file", lambda: open(FOREIGN).read())
tried("listing /proc", lambda: os.listdir("/proc"))
tried("writing outside", lambda: open("/usr/probe", "w"))
tried("becoming root", lambda: os.setuid(0))
tried("a second process", lambda: os.fork() or os._exit(0))
libc = ctypes.CDLL(None, use_errno=True)
def unshare():
    if libc.unshare(0x10000000) < 0:
        raise OSError
tried("a user namespace", unshare)
told["process number"] = os.getpid()
print(json.dumps(told))
"""


async def _probe(worker: _Worker) -> None:
    """Try to get out."""
    with tempfile.NamedTemporaryFile(prefix="mmagent-probe-") as foreign:
        os.chmod(foreign.name, 0o644)
        program = f"FOREIGN = {foreign.name!r}\n{_PROBE}"
        outcome = await worker.run(_pack(program, {}, (), CellLimits()), CellLimits().seconds)
    if outcome.status != "ok":
        raise SandboxUnavailable(f"the probe of the sandbox did not run: {outcome.complaint}")
    told = json.loads(outcome.out)
    number = told.pop("process number")
    leaks = [name for name, verdict in told.items() if verdict != "refused"]
    if leaks or number > 10:
        raise SandboxUnavailable(f"programs cannot be held back here: possible are {', '.join(leaks) or number}")
