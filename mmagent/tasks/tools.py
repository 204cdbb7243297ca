"""Episodes with tools: calls are answered by text and pictures in later turns, until the policy answers without one.

A call is a line of JSON, ``{"name": ..., "arguments": {...}}``, which is how :class:`mmagent.agent.codec.Codec` hands
over the calls of a policy's own format; models that know no format write the same. What is wrong with a call is the
tool's answer, never an exception, and the session goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from mmagent.chat import JSON, Tool, ToolCall, argument_text, json_text, parse_json
from mmagent.replies import arguments_of
from mmagent.tasks.base import malformed
from mmagent.tasks.seeded import Scene, SeededTask
from mmagent.trajectories import Item, Observation, Score
from mmagent.worlds.examples import answer_of

MOST_CALLS = 4
"""Calls of one turn; more are refused, so that a runaway generation does not become a thousand pictures."""
LONGEST = 20_000
"""Characters of a turn that is read."""
HOW = 'To call a tool, write one line of JSON: {"name": NAME, "arguments": {...}}. Tools:'


class ToolError(ValueError):
    """What a tool says to arguments that it cannot work with."""


@dataclass(frozen=True)
class Result:
    """What a call brings back."""

    text: str
    images: tuple[np.ndarray, ...] = ()


class Session(Protocol):
    """One episode's tools and what they have done so far."""

    def call(self, name: str, arguments: Mapping[str, JSON]) -> Result:
        """Do what was asked, with arguments of the declared types. Raises :class:`ToolError`."""
        ...

    def judge(self, answer: str) -> Score:
        """How right the final answer is, and what was done."""
        ...


S = TypeVar("S", bound=Scene)


class ToolTask(SeededTask[S]):
    """``tools`` are declared in the first turn, unless ``declare`` is false: then the policy knows them already (give
    them to its :class:`~mmagent.agent.codec.Codec`)."""

    tools: tuple[Tool, ...]
    max_steps = 8

    def __init__(self, level: int | None = None, *, declare: bool = True):
        super().__init__(level)
        self.declare = declare

    def session(self, scene: S) -> Session:
        raise NotImplementedError

    def opening(self, scene: S) -> Observation:
        """What is shown first, without the tools."""
        raise NotImplementedError

    def solve(self, scene: S) -> Iterator[str]:
        """The turns of an expert."""
        raise NotImplementedError

    def environment(self, item: Item) -> ToolEnvironment:
        return ToolEnvironment(self, self.scene(item))

    def gold(self, item: Item) -> Iterator[str]:
        yield from self.solve(self.scene(item))


class ToolEnvironment:
    """Turns with calls are answered, the first without any ends the episode. Parts: ``calls``, ``refused`` ones."""

    def __init__(self, task: ToolTask, scene: Scene):
        self.task, self.shown = task, scene
        self._session = task.session(scene)
        self._turns = self._calls = self._refused = 0

    async def reset(self) -> Observation:
        seen = self.task.opening(self.shown)
        if not self.task.declare:
            return seen
        declared = "\n".join([seen.text, HOW, *(tool.declaration for tool in self.task.tools)])
        return Observation(declared, seen.images)

    async def step(self, action: str) -> Observation:
        if len(action) > LONGEST:
            return malformed(f"a turn of {len(action)} characters, at most {LONGEST} are read")
        self._turns += 1
        lines = [line for line in action.splitlines() if line.lstrip().startswith("{")]
        calls = [line for line in lines if '"name"' in line]
        if not calls:
            return self._end(answer_of(action))
        if self._turns >= self.task.max_steps:
            return Observation(f"no answer within {self._turns} turns", done=True, reward=0.0, parts=self._parts())
        results = [self._answer(call) for call in calls[:MOST_CALLS]]
        if len(calls) > MOST_CALLS:
            self._refused += len(calls) - MOST_CALLS
            results.append(Result(f"error: at most {MOST_CALLS} calls a turn; the others were not made"))
        images = tuple(image for result in results for image in result.images)
        return Observation("\n".join(result.text for result in results), images)

    async def close(self) -> None:
        """Nothing is held."""

    def _answer(self, line: str) -> Result:
        self._calls += 1
        try:
            call = read_call(line)
            return self._session.call(call.name, arguments_of(call, self.task.tools))
        except ValueError as error:  # ToolError among them
            self._refused += 1
            return Result(f"error: {str(error)[:300]}")

    def _end(self, answer: str | None) -> Observation:
        if answer is None:
            return malformed("neither a call nor one answer")
        score = self._session.judge(answer)
        return Observation("judged", done=True, reward=score.value, parts={**self._parts(), **score.parts})

    def _parts(self) -> dict[str, float]:
        return {"calls": float(self._calls), "refused": float(self._refused)}


def read_call(line: str) -> ToolCall:
    """A call from its line. Raises ``ValueError`` that says what is wrong with it."""
    try:
        found = parse_json(line.strip())
    except ValueError as error:
        raise ValueError(f"a call must be one line of JSON: {error}") from error
    if not isinstance(found, dict) or set(found) != {"name", "arguments"} or not isinstance(found["arguments"], dict):
        raise ValueError('a call is {"name": NAME, "arguments": {...}} and nothing else')
    if not isinstance(found["name"], str):
        raise ValueError("the name of a call must be a text")
    return ToolCall(found["name"], {key: argument_text(value) for key, value in found["arguments"].items()})


def write_call(name: str, /, **arguments: JSON) -> str:
    """A call as its line."""
    return json_text({"name": name, "arguments": arguments})


def tool(name: str, description: str, /, **arguments: str) -> Tool:
    """A declaration; ``arguments`` are types of JSON Schema by name, all of them required."""
    properties: dict[str, JSON] = {key: {"type": kind} for key, kind in arguments.items()}
    parameters: JSON = {"type": "object", "properties": properties, "required": list(arguments)}
    return Tool(json.dumps({"name": name, "description": description, "parameters": parameters}))


def whole_numbers(name: str, arguments: Mapping[str, JSON], keys: Sequence[str], low: int, high: int) -> list[int]:
    """Arguments that must lie from ``low`` to ``high``. Raises :class:`ToolError`."""
    found = []
    for key in keys:
        value = arguments[key]
        if not isinstance(value, int) or not low <= value <= high:
            raise ToolError(f"{name}: {key} must be a whole number from {low} to {high}")
        found.append(value)
    return found
