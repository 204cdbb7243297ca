"""Text code with tests: a function is asked for in words, and what is written runs in the sandbox on inputs that were
not shown.

The program gets inputs and leaves outputs; they are compared here, with truth that never enters its cell. So there is
nothing in there to be read, patched or overwritten that would help: who leaves right outputs has worked them out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmagent.sandbox import CellLimits, Sandbox
from mmagent.tasks.base import malformed
from mmagent.tasks.seeded import SeededTask
from mmagent.trajectories import Item, Observation, Score

LIMITS = CellLimits(seconds=3.0, cpu_seconds=2.0, memory_mb=256, files_mb=4)
LONGEST = 20_000
"""Characters of an answer that is read."""
SHOWN, HIDDEN = 2, 10
"""Examples in the question, and inputs on which an answer is tried."""
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_DRIVER = """
import json
with open("inputs.json") as file:
    inputs = json.load(file)
scope = {"__name__": "solution"}
with open("solution.py") as file:
    exec(compile(file.read(), "solution.py", "exec"), scope)
outputs = []
for values in inputs:
    try:
        outputs.append(json.dumps(scope["solve"](values)))
    except Exception:
        outputs.append(None)
with open("outputs.json", "w") as file:
    json.dump(outputs, file)
"""
Value = list[int] | int


@dataclass(frozen=True)
class Operation:
    """One thing that is done to a list: in ``words``, as a ``line`` of Python that makes ``values`` of ``values``, and
    done by ``apply``."""

    words: str
    line: str
    apply: Callable[[list[int]], Value]


@dataclass(frozen=True)
class Problem:
    """Operations in their order, and lists to try them on: the first :data:`SHOWN` are examples in the question."""

    operations: tuple[Operation, ...]
    inputs: tuple[tuple[int, ...], ...]

    def told(self) -> str:
        return repr(([one.line for one in self.operations], self.inputs))

    def output(self, values: Sequence[int]) -> Value:
        """What the function must return."""
        out: Value = list(values)
        for operation in self.operations:
            assert isinstance(out, list), "only the last operation gives a number"
            out = operation.apply(out)
        return out

    @property
    def question(self) -> str:
        steps = "\n".join(f"{n}. {one.words}" for n, one in enumerate(self.operations, start=1))
        shown = "\n".join(f"solve({list(v)}) returns {self.output(v)}" for v in self.inputs[:SHOWN])
        return (
            f"Write a Python function solve(values) for a list of whole numbers. In this order:\n{steps}\nIt returns "
            f"what that gives. For example:\n{shown}\nAnswer with the function in a code block."
        )

    @property
    def program(self) -> str:
        """A function that is right."""
        lines = "\n".join(f"    {one.line}" for one in self.operations)
        return f"def solve(values):\n{lines}\n    return values"


def _changes(n: int) -> list[Operation]:
    """From a list to a list."""
    return [
        Operation(
            "Keep the even numbers.",
            "values = [v for v in values if v % 2 == 0]",
            lambda a: [v for v in a if v % 2 == 0],
        ),
        Operation("Keep the odd numbers.", "values = [v for v in values if v % 2]", lambda a: [v for v in a if v % 2]),
        Operation(
            f"Keep what is greater than {n}.",
            f"values = [v for v in values if v > {n}]",
            lambda a: [v for v in a if v > n],
        ),
        Operation(f"Add {n} to each.", f"values = [v + {n} for v in values]", lambda a: [v + n for v in a]),
        Operation(f"Multiply each by {n}.", f"values = [v * {n} for v in values]", lambda a: [v * n for v in a]),
        Operation("Square each.", "values = [v * v for v in values]", lambda a: [v * v for v in a]),
        Operation("Reverse the order.", "values = values[::-1]", lambda a: a[::-1]),
        Operation("Sort them, the smallest first.", "values = sorted(values)", sorted),
        Operation(
            "Keep the first of equal numbers, in their order.",
            "values = list(dict.fromkeys(values))",
            lambda a: list(dict.fromkeys(a)),
        ),
        Operation(
            "Replace each by the sum of all up to it, itself included.",
            "values = [sum(values[: n + 1]) for n in range(len(values))]",
            lambda a: [sum(a[: n + 1]) for n in range(len(a))],
        ),
        Operation(
            "Replace them by the differences of neighbours, the later minus the earlier.",
            "values = [b - a for a, b in zip(values, values[1:])]",
            lambda a: [y - x for x, y in pairwise(a)],
        ),
        Operation("Keep every second one, beginning with the first.", "values = values[::2]", lambda a: a[::2]),
    ]


def _results(n: int) -> list[Operation]:
    """From a list to a number."""
    return [
        Operation("Add them up; 0 for none.", "values = sum(values)", sum),
        Operation("Count them.", "values = len(values)", len),
        Operation("Take the greatest; 0 for none.", "values = max(values, default=0)", lambda a: max(a, default=0)),
        Operation("Count the different ones.", "values = len(set(values))", lambda a: len(set(a))),
        Operation(
            f"Count the multiples of {n}.",
            f"values = sum(v % {n} == 0 for v in values)",
            lambda a: sum(v % n == 0 for v in a),
        ),
        Operation(
            "Give the greatest minus the smallest; 0 for none.",
            "values = max(values) - min(values) if values else 0",
            lambda a: max(a) - min(a) if a else 0,
        ),
    ]


class ProgramTask(SeededTask[Problem]):
    """Level n has n + 1 operations, one after the other. An answer is right when every output is; the parts tell how
    many are."""

    name, category, levels = "programs", "text-code", 4

    def __init__(self, sandbox: Sandbox, level: int | None = None):
        super().__init__(level)
        self.sandbox = sandbox

    def draw(self, random: np.random.Generator, level: int) -> Problem | None:
        changes = _changes(int(random.integers(2, 10)))
        chosen = [changes[int(n)] for n in random.permutation(len(changes))[: level + 1]]
        if level and random.random() < 0.6:
            results = _results(int(random.integers(2, 6)))
            chosen[-1] = results[int(random.integers(len(results)))]
        inputs = [
            tuple(int(v) for v in random.integers(-9, 21, size=int(random.integers(4, 10))))
            for _ in range(SHOWN + HIDDEN - 2)
        ]
        inputs += [(), (int(random.integers(-9, 21)),)]
        problem = Problem(tuple(chosen), tuple(inputs))
        outputs = {repr(problem.output(values)) for values in inputs}
        changed = sum(problem.output(values) != list(values) for values in inputs)
        return problem if len(outputs) >= 6 and changed >= 8 else None

    def environment(self, item: Item) -> ProgramEnvironment:
        return ProgramEnvironment(self.sandbox, self.scene(item))

    def gold(self, item: Item) -> Iterator[str]:
        yield f"```python\n{self.scene(item).program}\n```"


async def judge(sandbox: Sandbox, problem: Problem, program: str) -> Score:
    """Run ``program`` on the inputs that were not shown. Raises ``SandboxError`` where the sandbox itself broke."""
    hidden = problem.inputs[SHOWN:]
    files = {"inputs.json": json.dumps(hidden).encode(), "solution.py": program.encode("utf-8", "replace")}
    outcome = await sandbox.run(_DRIVER, files, wanted=("outputs.json",), limits=LIMITS)
    said = read_outputs(outcome.files.get("outputs.json", b""), len(hidden))
    if outcome.status == "time":
        return Score(0.0, {"right": 0.0, "time": 1.0})
    if said is None:
        return Score(0.0, {"right": 0.0, "failed": 1.0})
    good = [same(one, problem.output(values)) for one, values in zip(said, hidden, strict=True)]
    return Score(float(all(good)), {"right": float(all(good)), "share": sum(good) / len(good)})


def read_outputs(written: bytes, count: int) -> list[object] | None:
    """What a program left: so many JSON texts, None for each input that it failed on. None for anything else."""
    try:
        texts = json.loads(written)
        if not isinstance(texts, list) or len(texts) != count:
            return None
        return [json.loads(text) if isinstance(text, str) else None for text in texts]
    except (ValueError, RecursionError):  # whoever wrote it is not to be trusted
        return None


def same(said: object, truth: Value) -> bool:
    """Equal in kind, too: neither 1.0 nor true is 1."""
    if isinstance(truth, list):
        return isinstance(said, list) and len(said) == len(truth) and all(map(same, said, truth))
    return type(said) is int and said == truth


class ProgramEnvironment:
    """One question, one program."""

    def __init__(self, sandbox: Sandbox, problem: Problem):
        self.sandbox, self.problem = sandbox, problem

    async def reset(self) -> Observation:
        return Observation(self.problem.question)

    async def step(self, action: str) -> Observation:
        program = program_of(action)
        if program is None:
            return malformed("no function solve, more than one block of code, or too long an answer")
        score = await judge(self.sandbox, self.problem, program)
        return Observation("judged", done=True, reward=score.value, parts=score.parts)

    async def close(self) -> None:
        """Nothing is held."""


def program_of(answer: str) -> str | None:
    """The code of an answer: what its one block holds, or all of it without any. None without a function ``solve``."""
    if len(answer) > LONGEST:
        return None
    blocks = _FENCE.findall(answer)
    program = blocks[0] if len(blocks) == 1 else answer if not blocks else ""
    return program if "def solve(" in program else None
