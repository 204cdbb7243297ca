"""The process that runs programs nobody trusts: one at a time, each in a cell of its own that ends with it.

Run as ``python -I cell.py SOCKET_FD FOLDER MODULE...`` and never imported. It imports the modules, says ``ready``, and
waits. For every job it forks a keeper, which reads the job from the socket (so that no job ever lies in the memory of
another), goes into namespaces of its own and forks the first process of the cell, which forks the program:

* no network: an empty network namespace, and no socket can be made;
* files: a root of its own with what Python needs, read-only, and ``/work``, a small memory disk; no ``/proc``;
* processes: a process namespace that dies as a whole, and a user namespace in which they are counted;
* rights: nobody's user, no capability, none to be gained, and no call that changes mounts, namespaces or the kernel;
* time, memory, files: limits that the program cannot raise.

Whatever of this cannot be had ends the job with ``broken`` and the reason: nothing runs with less. Standard library
only and single-threaded, so that forking is safe.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import os
import platform
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
import traceback

NOBODY = 65534
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18
)  # fmt: skip
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
WORK = "/work"
DEVICES = ("null", "zero", "urandom")
ROOT_LINKS = ("lib", "lib32", "lib64", "bin", "sbin")
MOST_INODES = 512
COMMON = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442)
"""io_uring, the newer calls for mounts, and taking another process's files: numbered alike everywhere."""
CALLS = {  # architecture, pivot_root, capset, clone; refused: sockets, tracing, mounts, namespaces, keys, shared memory
    "x86_64": (0xC000003E, 155, 126, 56, (
        41, 101, 103, 133, 135, 155, 161, 163, 164, 165, 166, 167, 168, 169, 170, 171, 172, 173, 175, 176, 179, 227,
        246, 248, 249, 250, 259, 272, 298, 300, 303, 304, 305, 308, 310, 311, 312, 313, 319, 320, 321, 323,
        29, 64, 68, 240)),
    "aarch64": (0xC00000B7, 41, 91, 220, (
        198, 117, 116, 33, 92, 41, 51, 89, 170, 40, 39, 224, 225, 142, 161, 162, 105, 106, 60, 112,
        104, 217, 218, 219, 97, 241, 262, 264, 265, 266, 268, 270, 271, 272, 273, 279, 294, 280, 282,
        194, 190, 186, 180)),
}  # fmt: skip
CLONE3 = 435
X32 = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A function of the C library; its error as an ``OSError`` that names it."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source, target, kind=None, flags=0, data=None):
    """As mount(2), with its error as an ``OSError`` that names the place."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    number = ctypes.c_ulong(flags)
    if libc.mount(encoded[0], encoded[1], encoded[2], number, encoded[3]) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mounting {target}: {os.strerror(error)}")


# ---------------------------------------------------------------------------------------------- walls


def build_root(folder, paths, megabytes):
    """A root in ``folder`` with ``paths`` to read and a memory disk to write on, and nothing else; then go there."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for name in ROOT_LINKS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{folder}/{name}")
    for path in paths:
        bind(path, folder + path)
    os.makedirs(f"{folder}/dev", exist_ok=True)
    for name in DEVICES:
        with open(f"{folder}/dev/{name}", "w"):
            pass
        mount(f"/dev/{name}", f"{folder}/dev/{name}", None, MS_BIND)
    os.mkdir(folder + WORK)
    size = f"size={megabytes}m,nr_inodes={MOST_INODES},mode=777"
    mount("tmpfs", folder + WORK, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)
    os.symlink(WORK, f"{folder}/tmp")
    os.chdir(folder)
    pivot = CALLS[platform.machine()][1]
    if libc.syscall(pivot, b".", b".") < 0:
        raise OSError(ctypes.get_errno(), "pivot_root: " + os.strerror(ctypes.get_errno()))
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def bind(path, target):
    """Let a file or folder be read at ``target`` as well."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    mount(path, target, None, MS_BIND)
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def enter(folder, paths, megabytes):
    """Leave the machine: afterwards this process is nobody, in namespaces of its own, and its children are counted."""
    spaces = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    if os.geteuid() == 0:  # root builds as root, for the libraries may lie where nobody may look, and becomes nobody
        call("unshare", spaces)
        build_root(folder, paths, megabytes)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
        call("unshare", NEWUSER)
    else:
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", spaces | NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        build_root(folder, paths, megabytes)


def drop_rights():
    """No capability, and none to be gained by executing anything."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # beyond the last one it fails, as it should
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if libc.syscall(CALLS[platform.machine()][2], header, nothing) < 0:
        raise OSError(ctypes.get_errno(), "capset: " + os.strerror(ctypes.get_errno()))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def filter_calls():
    """Refuse the calls of :data:`CALLS`; those of another architecture end the process."""
    architecture, _, _, clone, refused = CALLS[platform.machine()]
    load, equal, at_least, test, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
    spaces = 0x7E020080  # every flag of clone that makes a namespace
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, X32), (give, 0, 0, kill)]
    code += [(equal, 0, 1, CLONE3), (give, 0, 0, 0x00050000 | errno.ENOSYS)]  # its flags cannot be seen: use clone
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (test, 0, 1, spaces), (give, 0, 0, refuse), (load, 0, 0, 0)]
    for number in (*refused, *COMMON):
        code += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    code.append((give, 0, 0, allow))
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(code), ctypes.cast(packed, ctypes.c_void_p))
    call("prctl", PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


def set_limits(job):
    """What the program cannot raise."""
    megabyte = 1 << 20
    held = job["held"]
    cpu = max(1, round(job["cpu_seconds"]))
    for name, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, held + job["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, job["files_mb"] * megabyte),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, job["processes"] + 2),  # the keeper and the cell's first process count as well
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(name, (value, value))


# ---------------------------------------------------------------------------------------------- one job


def receive(connection):
    """The job: its head, then its program and files, each as long as the head says."""
    head = json.loads(exactly(connection, struct.unpack("!I", exactly(connection, 4))[0]))
    head["program"] = exactly(connection, head["program_size"])
    head["given"] = [(name, exactly(connection, size)) for name, size in head["files"]]
    return head


def exactly(connection, size):
    """So many bytes; without the library at the other end there is no job."""
    parts, left = [], size
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            os._exit(0)  # the library has gone
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def reply(connection, head, blobs=()):
    """The answer, as the library reads it."""
    body = json.dumps({**head, "sizes": [len(blob) for blob in blobs]}).encode()
    connection.sendall(struct.pack("!I", len(body)) + body + b"".join(blobs))


def keep(connection, folder, paths):
    """One job from its first byte to its answer."""
    connection.setblocking(True)
    job = receive(connection)
    started = time.monotonic()
    with open("/proc/self/statm") as file:
        job["held"] = int(file.read().split()[0]) * resource.getpagesize()
    try:
        enter(folder, paths, job["files_mb"])
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for name, body in job["given"]:
            with open(f"{WORK}/{name}", "wb") as file:
                file.write(body)
    except (OSError, KeyError) as error:
        reply(connection, {"status": "broken", "reason": f"{type(error).__name__}: {error}"})
        return
    out, err, ready = os.pipe(), os.pipe(), os.pipe()
    first = os.fork()
    if first == 0:
        begin(job, out[1], err[1], ready[1])
    for pipe in (out, err, ready):
        os.close(pipe[1])
    status, texts = watch(connection, first, (out[0], err[0]), started + job["seconds"], job["output_bytes"])
    problem = os.read(ready[0], 4096)
    if problem != b"ready":
        reply(connection, {"status": "broken", "reason": problem.decode(errors="replace") or "the cell did not start"})
        return
    files = {name: body for name in job["wanted"] if (body := fetch(name, job["files_mb"] << 20)) is not None}
    head = {"status": status, "seconds": time.monotonic() - started, "names": list(files)}
    reply(connection, head, [*texts, *files.values()])


def fetch(name, most):
    """A plain file that the program left; nothing is followed, and everything that could change it is dead."""
    try:
        descriptor = os.open(f"{WORK}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most:
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def watch(connection, first, pipes, deadline, most):
    """Read what the program says, up to ``most`` bytes of either kind, until the cell ends or must."""
    texts = {pipe: bytearray() for pipe in pipes}
    open_pipes, status = set(pipes), None
    while status is None or open_pipes:
        if status is None:
            ended, value = os.waitpid(first, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(value)
        late = time.monotonic() > deadline
        if status is None and late:
            os.kill(first, signal.SIGKILL)  # with the first process its whole namespace dies
            os.waitpid(first, 0)
            status = "time"
        readable, _, _ = select.select([*open_pipes, connection], [], [], 0.005 if status is None else 0.0)
        if connection in readable:  # nothing is said during a job: the library has gone, or given the job up
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
            os._exit(1)
        for pipe in open_pipes & set(readable):
            part = os.read(pipe, 1 << 16)
            if part:
                texts[pipe] += part[: most - len(texts[pipe])]
            else:
                open_pipes.discard(pipe)
        if status is not None and not readable:
            break
    return status, [bytes(texts[pipe]) for pipe in pipes]


def begin(job, out, err, ready):
    """The cell's first process: give up all rights, start the program, bury the dead, end with it."""
    try:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for source, target in ((null, 0), (out, 1), (err, 2), (ready, 3)):
            os.dup2(source, target)
        os.closerange(4, 1 << 16)
        drop_rights()
        filter_calls()
        set_limits(job)
        program = os.fork()
        if program == 0:
            perform(job)
        os.write(3, b"ready")
    except BaseException as error:
        os.write(3, f"{type(error).__name__}: {error}".encode()[:4000])
        os._exit(1)
    os.closerange(0, 64)
    while True:
        ended, value = os.waitpid(-1, 0)
        if ended == program:
            code = os.waitstatus_to_exitcode(value)
            os._exit(code if 0 <= code < 128 else 128 - code)


def perform(job):
    """The program itself, as ``__main__``."""
    code = 1
    try:
        os.close(3)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update({"HOME": WORK, "TMPDIR": WORK, "MPLCONFIGDIR": WORK, "LANG": "C.UTF-8", "PATH": "/usr/bin"})
        os.chdir(WORK)
        sys.argv, sys.stdin = ["program.py"], open(os.devnull)  # noqa: SIM115 (the program's, for as long as it runs)
        names = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(job["program"], "program.py", "exec"), names)
        code = 0
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:
        traceback.print_exc(limit=-8)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # whatever the program has put in their place
            os._exit(code & 127)


# ---------------------------------------------------------------------------------------------- life


def readable_paths():
    """What a program may read: Python, its packages, and the system's libraries and fonts."""
    wanted = ["/usr", "/etc/ld.so.cache", sys.base_prefix, sys.prefix, *sys.path]
    wanted += [f"/{name}" for name in ROOT_LINKS if not os.path.islink(f"/{name}")]
    paths = []
    for path in sorted({os.path.realpath(path) for path in wanted if path and os.path.exists(path)}):
        if path != "/" and not any(path == known or path.startswith(known + "/") for known in paths):
            paths.append(path)
    return paths


def main():
    connection, folder, modules = socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:]
    if platform.machine() not in CALLS or sys.platform != "linux":
        reply(connection, {"status": "broken", "reason": f"no cells on {sys.platform}, {platform.machine()}"})
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the socket decides, not a terminal
        signal.signal(number, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    paths = readable_paths()
    sys.path[:] = [path for path in sys.path if path.startswith("/")]
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    reply(connection, {"status": "ready"})
    while True:
        select.select([connection], [], [])
        if not connection.recv(1, socket.MSG_PEEK):
            return
        keeper = os.fork()
        if keeper == 0:
            code = 1
            try:
                keep(connection, folder, paths)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(keeper, 0)
        if status:
            return


if __name__ == "__main__":
    main()
