"""A small process between the library and one Chromium, so that nothing survives whatever dies first.

Run as ``python -I -S supervisor.py COMMAND_FD EVENT_FD LIFELINE_FD DIRECTORY BINARY ARGUMENT...`` and never imported.
It starts the browser in a session of its own with the command pipe on descriptor 3 and the event pipe on 4, and
ends it with all its descendants, reaps them, and removes ``DIRECTORY`` as soon as

* the browser exits, or
* the lifeline closes: the library wants the browser gone, or the process that held it died, ``kill -9`` included, or
* the library's process is no longer the parent (a forked worker may still hold the lifeline open).

Standard library only, single-threaded, so that forking and executing is safe where the library's process is not.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ABSENT = 127
LOCK = "mmagent.lock"


def prctl(option, value):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start(command_fd, event_fd, argv):
    """Fork and execute the browser; it shares our standard error."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        command_fd, event_fd = os.dup(command_fd), os.dup(event_fd)  # neither may be 3 or 4 while those are replaced
        while min(command_fd, event_fd) <= 4:
            command_fd, event_fd = os.dup(command_fd), os.dup(event_fd)
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (command_fd, 3), (event_fd, 4)):
            os.dup2(source, target, inheritable=True)
        os.closerange(5, 1 << 16)
        os.execv(argv[0], argv)
    except OSError as error:
        os.write(2, f"cannot execute {argv[0]}: {error}\n".encode())
    finally:
        os._exit(ABSENT)


def alive(pid):
    """Reap every child that has ended; false once ``pid`` was among them."""
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if ended == pid:
            return False
        if ended == 0:
            return True


def children():
    """Process ids of everything handed to this process, or started by it."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def end(pid, patience=10.0):
    """Kill the browser's group and every descendant that was handed to us, and reap them all."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        for target, kill in [(pid, os.killpg)] + [(child, os.kill) for child in children()]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(target, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def clear(directory):
    """Remove it, the lock last: what is left of an interrupted removal can then still be swept."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            elif name != LOCK:
                os.unlink(path)
    shutil.rmtree(directory, ignore_errors=True)


def main():
    command_fd, event_fd, lifeline = (int(argument) for argument in sys.argv[1:4])
    directory, argv = sys.argv[4], sys.argv[5:]
    parent = os.getppid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the lifeline decides, not a terminal
        signal.signal(number, signal.SIG_IGN)
    pid = start(command_fd, event_fd, argv)
    os.close(command_fd)
    os.close(event_fd)
    while alive(pid):
        readable, _, _ = select.select([lifeline, wake_read], [], [], 1.0)
        if wake_read in readable:
            os.read(wake_read, 4096)
        if lifeline in readable or os.getppid() != parent:
            break
    end(pid)
    clear(directory)


if __name__ == "__main__":
    main()
