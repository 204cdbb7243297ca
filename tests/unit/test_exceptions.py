"""Exceptions go from one process to another: pickled and back, they are what they were."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILLED: dict[str, Any] = {"Sequence": ("one", "two"), "Iterable": ("one", "two"), "Mapping": {"one": "1"}}


def classes() -> list[tuple[str, str]]:
    """(module, name) of every exception of the library."""
    found = []
    for folder in ("mmagent", "data_pipelines", "evals", "recipes", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and any(
                    "Error" in ast.unparse(b) or "Exc" in ast.unparse(b) for b in node.bases
                ):
                    found.append((module, node.name))
    return found


@pytest.mark.parametrize("module, name", classes())
def test_an_exception_survives_the_way_between_processes(module, name):
    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, BaseException)
    arguments: list[Any] = ["text"]
    if "__init__" in vars(kind):
        parameters = list(inspect.signature(kind).parameters.values())
        arguments = [
            FILLED.get(str(p.annotation).partition("[")[0], p.name) for p in parameters if p.default is p.empty
        ]
    before = kind(*arguments)
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert (str(after), after.args, vars(after)) == (str(before), before.args, vars(before))


def test_they_are_found():
    names = [name for _, name in classes()]
    assert {"RefusedError", "RecordError", "ShardError", "PinsDiffer", "Refused"} <= {*names}
