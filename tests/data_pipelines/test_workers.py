"""Rows read in processes: in order, whatever the processes do, and none of them can take more than a row with it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe, current_process
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.workers import LimitsConfig, _tell, _Worker, in_order


@dataclass(frozen=True)
class Rows:
    """What to do for each row."""

    acts: tuple[str, ...]
    known: bool = True

    @property
    def rows(self) -> int | None:
        return len(self.acts) if self.known else None


def work(task: Rows, start: int) -> Iterator[str]:
    for act in task.acts[start:]:
        yield do(act)


def do(act: str) -> str:
    match act.partition(" "):
        case "sleep", _, seconds:
            time.sleep(float(seconds))
        case "await", _, path:  # another process
            while not os.path.exists(path):
                time.sleep(0.01)
        case "spin", _, _:
            while True:
                pass
        case "crash", _, _:
            ctypes.string_at(0)
        case "exit", _, code:
            os._exit(int(code))
        case "kill", _, _:
            os.kill(os.getpid(), signal.SIGKILL)
        case "take", _, megabytes:
            try:
                return str(len(bytearray(int(megabytes) << 20)))
            except MemoryError:
                return "no memory"
        case "large", _, megabytes:
            return "x" * (int(megabytes) << 20)
        case "raise", _, words:
            raise KeyError(words)
        case "note", _, path:
            with open(path, "a") as file:
                file.write("x")
    return act


def lost(task: Rows, row: int, problem: str, rest: bool) -> str:
    return f"LOST {task.acts[row]}: {problem}{' and the rest' if rest else ''}"


def answers(tasks: list[Rows], **limits: float) -> list[str]:
    settings = LimitsConfig(**({"processes": 2, "seconds": 0.5, "megabytes": 200} | limits))
    return [answer for _, _, answer in in_order(work, lost, ((task, 0) for task in tasks), settings)]


def test_answers_come_in_order_and_a_hostile_row_costs_itself_alone():
    tasks = [
        Rows(("sleep 0.2", "a")),
        Rows(("b", "spin", "c")),
        Rows(("crash", "crash", "d")),
        Rows(("exit 3",)),
        Rows(("take 1000", "take 10", "kill", "e")),
        Rows(()),
        Rows(("f",)),
    ]
    assert answers(tasks) == [
        *("sleep 0.2", "a", "b", "LOST spin: takes more than 0.5 s to read", "c"),
        "LOST crash: the process that reads it dies (SIGSEGV)",
        "LOST crash: the process that reads it dies (SIGSEGV)",
        *("d", "LOST exit 3: the process that reads it dies (exit status 3)"),
        *("no memory", str(10 << 20)),
        "LOST kill: the process that reads it was killed, for want of memory it seems",
        *("e", "f"),
    ]


def test_who_dies_twice_without_a_row_is_given_up_where_nobody_knows_how_many_rows_there_are():
    endless = Rows(("a", *["crash"] * 50), known=False)
    assert answers([endless, Rows(("b",))]) == [
        "a",
        "LOST crash: the process that reads it dies (SIGSEGV)",
        "LOST crash: the process that reads it dies (SIGSEGV) and the rest",
        "b",
    ]


def test_an_error_of_the_program_is_raised_and_no_row_of_the_data():
    with pytest.raises(KeyError, match="mine"):
        answers([Rows(("a", "raise mine"))])


def test_who_is_ahead_waits(tmp_path):
    """While the first row is waited for, another process answers at most one message more than it may be ahead."""
    note = tmp_path / "note"
    tasks = [Rows((f"await {note}", "sleep 0.5")), Rows(("large 20", f"note {note}") * 12)]
    stream = in_order(work, lost, ((task, 0) for task in tasks), LimitsConfig(2, 30, 500))
    assert [next(stream)[2] for _ in range(2)] == [f"await {note}", "sleep 0.5"]
    assert 1 <= len(note.read_text()) <= 5  # of 12: 64 MB are four of 20, and one is in the pipe
    assert len(list(stream)) == 24


@given(st.lists(st.sampled_from((0, 1, 5, 1 << 16, 1 << 20, 3 << 20)), max_size=8), st.sampled_from((1000, 1 << 20)))
@settings(max_examples=15, deadline=None)
def test_messages_are_found_wherever_the_pipe_cuts_them(sizes, width):
    """Written by a thread into a pipe of any width; the last one is cut off by a death and counts for nothing."""
    reading, writing = Pipe(duplex=False)
    worker = _Worker(current_process(), reading, reading)
    messages = [bytes([n]) * size for n, size in enumerate(sizes)]

    def write() -> None:
        for message in messages:
            _tell(writing, message)
        os.write(writing.fileno(), b"\xff\0\0")
        writing.close()

    thread = Thread(target=write)
    thread.start()
    found: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipelines.workers._PIPE", width)
        while len(found) < len(messages) or len(worker.unread) < 3:
            found += [ForkingPickler.loads(data) for data in worker.gathered()]
        with pytest.raises(EOFError):
            worker.gathered()
    thread.join()
    reading.close()
    assert found == messages


def test_what_was_answered_before_a_death_is_not_lost_and_not_done_again(tmp_path):
    """A hundred rows in the pipe while nobody reads, then a death: each was read once, and only the one is lost."""
    note = tmp_path / "note"
    rows = Rows((*[f"note {note}"] * 100, "crash", f"note {note}"))
    found = answers([Rows(("sleep 0.3",)), rows], seconds=5)
    assert found[1:101] == [f"note {note}"] * 100
    assert found[101].startswith("LOST crash")
    assert note.read_text() == "x" * 101


def test_waiting_is_not_reading():
    """A process that is ahead stands still for longer than a row may take, and is not ended for it."""
    tasks = [Rows(("sleep 2.4",)), Rows(("large 20",) * 6)]
    assert [len(a) for a in answers(tasks, seconds=0.2, megabytes=500)][1:] == [20 << 20] * 6


def test_processes_go_when_nobody_asks_any_more():
    stream = in_order(work, lost, [(Rows(("a", "sleep 60")), 0)], LimitsConfig(1))
    assert next(stream)[2] == "a"
    before = children()
    stream.close()
    assert before - children()


def children() -> set[str]:
    """Live processes of this session's process group that serve."""
    mine = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if "State:\tZ" not in text:
            mine.append(path.parent.name)
    return {pid for pid in mine if _serves(pid)}


def _serves(pid: str) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_without_processes_everything_is_read_here():
    stream = in_order(work, lost, [(Rows(("a", "b", "c")), 1)], LimitsConfig(processes=0))
    assert [(row, answer) for _, row, answer in stream] == [(1, "b"), (2, "c")]


def test_limits_are_checked():
    for wrong, told in (
        ({"processes": -1}, "processes -1 must be 0 .* or more"),
        ({"seconds": 0}, "seconds 0 must be positive"),
        ({"megabytes": 0}, "megabytes 0 must be positive"),
    ):
        with pytest.raises(ValueError, match=told):
            LimitsConfig(**wrong)
