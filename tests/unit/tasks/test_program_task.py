"""Programs of policies: right ones are right however they are written, and none is rewarded for anything else."""

from __future__ import annotations

import asyncio
import sys
from itertools import islice

import pytest

from mmagent.sandbox import Sandbox
from mmagent.tasks import open_tasks
from mmagent.tasks.programs import SHOWN, ProgramTask, program_of, read_outputs, same
from mmagent.testing import check_task

linux = pytest.mark.skipif(sys.platform != "linux", reason="cells are Linux")


def scored(answers, level=0):
    """Each answer, made of the problem, to the first item of a level."""

    async def work():
        async with Sandbox() as sandbox:
            task = ProgramTask(sandbox, level)
            item = next(task.items("train", 0))
            problem, out = task.scene(item), []
            for make in answers:
                environment = task.environment(item)
                await environment.reset()
                seen = await environment.step(make(problem))
                out.append((seen.reward, dict(seen.parts)))
            return out

    return asyncio.run(work())


@linux
def test_the_public_kit_finds_no_fault():
    async def work():
        async with open_tasks(["programs", "programs/level-3"]) as tasks:
            await check_task(tasks[0], count=4)
            await check_task(tasks[1], count=1, hostile=())

    asyncio.run(work())


@linux
def test_only_right_outputs_on_what_was_not_shown_are_rewarded():
    def by_heart(problem):
        known = {tuple(v): problem.output(v) for v in problem.inputs[:SHOWN]}
        return f"def solve(values):\n    return {known!r}.get(tuple(values), [])"

    answers = [
        lambda p: p.program,
        lambda p: f"Here it is:\n```python\n{p.program}\n```\nDone.",
        lambda p: p.program + "\nprint('noise' * 1000)",
        by_heart,
        lambda p: "def solve(values):\n    return values",
        lambda p: f"```python\n{p.program}\n```\nor\n```python\ndef solve(values): return 1\n```",
        lambda p: p.program.replace("return values", "return [float(v) for v in values]"),
        lambda p: "def solve(values):\n  class Same(list):\n    __eq__ = lambda self, other: True\n  return Same()",
        lambda p: "import json\ndef solve(values): pass\njson.dumps = lambda *a, **k: 'true'",
    ]
    assert [reward for reward, _ in scored(answers)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@linux
def test_programs_that_misbehave_score_nothing_and_end():
    hostile = {
        "while True: pass\ndef solve(values): pass": "time",
        "def solve(values): return solve(values)": "share",
        "import os\ndef solve(values): pass\nos._exit(0)": "failed",
        "import os\ndef solve(values): pass\nwhile True: os.fork()": "failed",
        "def solve(values): pass\nx = 'a' * 10**11": "failed",
        "def solve(values): pass\nopen('outputs.json', 'w').write('[1, 2]')\nimport os; os._exit(0)": "failed",
        "def solve(values): return 9**9**7": "time",
        "def solve(values: return 1": "failed",
        "def solve(values): return values\nraise SystemExit": "failed",
        "import socket\ndef solve(values): return socket.create_connection(('1.1.1.1', 80))": "share",
    }
    found = scored([lambda p, program=program: program for program in hostile])
    for (reward, parts), (program, part) in zip(found, hostile.items(), strict=True):
        assert reward == 0.0, program
        assert part in parts, (program, parts)


@linux
def test_what_is_true_is_not_in_the_cell():
    """A program that hands over all files it can see tells no output."""
    look = "import os\ndef solve(values):\n    return sorted(os.listdir('.'))"
    ((reward, parts),) = scored([lambda p: look])
    assert (reward, parts["share"]) == (0.0, 0.0)


def test_reference_programs_do_what_the_operations_do():
    """The generator's own code, run here, against the operations that the truth comes from."""
    task = ProgramTask(None)
    for item in islice(task.items("train", 0), 60):
        problem, scope = task.scene(item), {}
        exec(problem.program, scope)
        for values in problem.inputs:
            assert same(scope["solve"](list(values)), problem.output(values)), problem.program


def test_splits_share_no_problem():
    task = ProgramTask(None)
    train = {task.scene(item).told() for item in islice(task.items("train", 0), 60)}
    assert not train & {task.scene(item).told() for item in islice(task.items("test", 0), 60)}


def test_outputs_are_read_without_trust():
    assert read_outputs(b'["1", null, "[2]"]', 3) == [1, None, [2]]
    for written in (b"", b"[]", b"{}", b"[1, 2, 3", b"\xff\xfe", b'["1"]', b"[" * 100_000, b'["[[", "1", "1"]'):
        assert read_outputs(written, 3) is None
    assert same([1, 2], [1, 2])
    for said in ([1, 2.0], [True, 2], [1], "12", None, [[1], 2], 12):
        assert not same(said, [1, 2])
    assert not same(True, 1)


def test_code_is_found_in_its_block():
    assert program_of("```py\ndef solve(values): pass\n```") == "def solve(values): pass\n"
    assert program_of("no code") is None
    assert program_of("```\nx = 1\n```\ndef solve(values): pass") is None
    assert program_of("def solve(values): pass" + " " * 30_000) is None
