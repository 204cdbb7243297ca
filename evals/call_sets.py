"""Function calls of the Berkeley leaderboard (BFCL) as they are published, and its rule of what a right call is.

A folder holds ``BFCL_v*_CATEGORY.json``, a line of JSON an item (``id``, ``question``: turns of messages, ``function``:
declarations), and ``possible_answer/`` with files of the same names (``id``, ``ground_truth``: calls as ``{name:
{parameter: [allowed values]}}``, in which ``""`` says that a parameter may be left out). Taken are the categories of
one turn in Python and those where no function fits; the others of the leaderboard run code or other languages.

The rule is that of its ``ast_checker`` for Python, written anew: types are exact but for an integer where a float is
declared; texts compare without case, spaces and ``,./-_*^``; a value of the type of the allowed ones, where that is not
the declared one, is a variable and compares as it stands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmagent.chat import parse_json

TAKEN = tuple(
    f"{origin}{kind}"
    for origin in ("", "live_")
    for kind in ("simple", "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
)
TYPES: Mapping[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str,
}  # fmt: skip
SCHEMA = {"float": "number", "tuple": "array", "dict": "object", "any": "string"}
"""Its types by their names in JSON Schema, where those differ."""
MOST_CALLS = 64
_IGNORED = re.compile(r"[ ,./\-_*^]")
_CATEGORY = re.compile(r"BFCL_v\d+_(\w+)\.json")

Allowed = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Call:
    """One call, with arguments as JSON says them."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallItem:
    """``functions`` as declared, ``truth``: for each call its name and what its parameters may be; empty where no
    function fits."""

    key: str
    category: str
    question: str
    functions: tuple[Mapping[str, Any], ...]
    truth: tuple[tuple[str, Allowed], ...]

    def wrong(self, calls: Sequence[Call]) -> str:
        """Why ``calls`` are not right; empty where they are. Several may come in any order."""
        if len(calls) != len(self.truth):
            return f"{len(calls)} calls, {len(self.truth)} are right"
        left = list(calls)
        for name, allowed in self.truth:
            function = next(one for one in self.functions if one["name"] == name)
            reasons = []
            for call in left:
                reason = wrong_call(call, function, allowed)
                if not reason:
                    left.remove(call)
                    break
                reasons.append(reason)
            else:
                return reasons[0]
        return ""

    def declared(self) -> list[dict[str, Any]]:
        """The functions with parameters in JSON Schema."""
        return [{**function, "parameters": _schema(function["parameters"])} for function in self.functions]

    def typed(self, call: Call) -> Call:
        """The call with texts read as JSON where no text is declared: our chat format writes all arguments as texts."""
        function = next((one for one in self.functions if one["name"] == call.name), None)
        if function is None:
            return call
        properties = function["parameters"]["properties"]
        arguments = {
            name: _read(value) if TYPES.get(properties.get(name, {}).get("type"), str) is not str else value
            for name, value in call.arguments.items()
        }
        return Call(call.name, arguments)

    def gold(self) -> list[Call]:
        """Calls that are right: of every parameter that must be given the first allowed value."""
        return [Call(name, _chosen(allowed)) for name, allowed in self.truth]


def load_calls(folder: Path | str) -> list[CallItem]:
    """The items of a folder, by category and in their order. Raises ``ValueError`` naming file and line."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; it should hold BFCL_v*_CATEGORY.json and possible_answer/")
    files = {
        match[1]: path for path in sorted(folder.glob("BFCL_v*.json")) if (match := _CATEGORY.fullmatch(path.name))
    }
    items: list[CallItem] = []
    for category in (name for name in TAKEN if name in files):
        path = files[category]
        truths: dict[str, Any] = {}
        if not category.endswith("irrelevance"):
            answers = folder / "possible_answer" / path.name
            if not answers.is_file():
                raise ValueError(f"{answers} is missing: what is right for {path.name}")
            truths = {str(row.get("id")): row for _, row in _lines(answers)}
        for where, row in _lines(path):
            try:
                items.append(_item(row, category, truths))
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(f"{where}: not an item of BFCL ({type(error).__name__}: {error})") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    if not items:
        raise ValueError(f"{folder} holds no BFCL_v*_CATEGORY.json of {', '.join(TAKEN)}")
    return items


def digest(items: Sequence[CallItem]) -> str:
    """Of all that is asked and of what is right."""
    found = hashlib.sha256()
    for item in items:
        found.update(repr(item).encode("utf-8", "backslashreplace") + b"\0")
    return found.hexdigest()[:12]


def wrong_call(call: Call, function: Mapping[str, Any], allowed: Allowed) -> str:
    """Why one call is not right; empty where it is."""
    name, parameters = function["name"], function["parameters"]
    if call.name != name:
        return f"{call.name} is called, not {name}"
    for parameter in parameters["required"]:
        if parameter not in call.arguments:
            return f"{name}: {parameter} is missing"
    for parameter, value in call.arguments.items():
        if parameter not in parameters["properties"] or parameter not in allowed:
            return f"{name}: {parameter} is not asked for"
        if not _right(value, parameters["properties"][parameter], allowed[parameter]):
            return f"{name}: {parameter} is not right"
    for parameter, values in allowed.items():
        if parameter not in call.arguments and "" not in values:
            return f"{name}: {parameter} is left out"
    return ""


def _right(value: Any, declared: Mapping[str, Any], allowed: Sequence[Any]) -> bool:
    kind = TYPES[declared["type"]]
    inner = TYPES[declared["items"]["type"]] if declared["type"] in ("array", "tuple") else None
    if kind is float and type(value) is int:
        if abs(value) >= 1 << 1023:  # some of which no float can be, and nothing right is near
            return False
        value = float(value)
    variable = _variable(value, kind, inner, allowed)
    if variable is None:
        return False
    if not variable:
        if kind is dict:
            return any(_right_dict(value, one) for one in allowed if one != "")
        if inner is dict:
            return any(
                len(value) == len(one) and all(map(_right_dict, value, one))
                for one in allowed
            )  # fmt: skip
        if kind is str:
            return plain(value) in [plain(one) for one in allowed if type(one) is str]
        if kind is list:
            return [plain(part) for part in value] in [[plain(part) for part in one] for one in allowed]
    return value in allowed


def _variable(value: Any, kind: type, inner: type | None, allowed: Sequence[Any]) -> bool | None:
    """Whether ``value`` stands for one, being of another type than declared; None where its type is wrong."""
    known = next((type(one) for one in allowed if one != ""), None)
    if type(value) is kind:
        if inner is not None and not any(
            type(one) is not list or all(_variable(part, inner, None, one) is not None for part in value)
            for one in allowed
        ):
            return None
        return known is not None and known is not kind
    return True if known is not None and type(value) is known else None


def _right_dict(value: Any, allowed: Mapping[str, Sequence[Any]]) -> bool:
    if not isinstance(value, dict):
        return False
    for key, part in value.items():
        if key not in allowed or plain(part) not in [plain(one) for one in allowed[key]]:
            return False
    return all(key in value or "" in values for key, values in allowed.items())


def plain(value: Any) -> Any:
    """A text without what does not count; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def read_calls(answer: str) -> list[Call]:
    """The calls of an answer, each a line of JSON; lines that begin otherwise are talk. Raises ``ValueError`` for a
    line that begins like one and is none."""
    lines = [line.strip() for line in answer.splitlines() if line.lstrip().startswith("{")]
    if len(lines) > MOST_CALLS:
        raise ValueError(f"{len(lines)} calls, at most {MOST_CALLS} are read")
    calls = []
    for line in lines:
        found = parse_json(line)
        if set(found) != {"name", "arguments"} or not isinstance(found["arguments"], dict):
            raise ValueError('a call is {"name": NAME, "arguments": {...}} and nothing else')
        if not isinstance(found["name"], str):
            raise ValueError("the name of a call must be a text")
        calls.append(Call(found["name"], found["arguments"]))
    return calls


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value  # a text, and judged as one


def _chosen(allowed: Allowed) -> dict[str, Any]:
    return {name: _first(values) for name, values in allowed.items() if "" not in values}


def _first(values: Sequence[Any]) -> Any:
    value = values[0]
    if isinstance(value, dict):
        return _chosen(value)
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [_chosen(one) for one in value]
    return value


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: no object of JSON")
        yield where, row


def _item(row: Mapping[str, Any], category: str, truths: Mapping[str, Mapping[str, Any]]) -> CallItem:
    key = row["id"]
    functions = tuple(row["function"])
    for function in functions:
        _check(function["name"], function["parameters"])
    truth: tuple[tuple[str, Allowed], ...] = ()
    if not category.endswith("irrelevance"):
        if key not in truths:
            raise ValueError(f"what is right for {key} is not in possible_answer")
        truth = tuple(next(iter(call.items())) for call in truths[key]["ground_truth"])
        names = {function["name"] for function in functions}
        for name, _ in truth:
            if name not in names:
                raise ValueError(f"{key}: {name} is right, but not among its functions {', '.join(sorted(names))}")
    messages = row["question"][0]
    words = [message["content"] for message in messages]
    if any(message["role"] == "assistant" for message in messages):
        words = [f"{message['role']}: {message['content']}" for message in messages]
    return CallItem(key, category, "\n\n".join(words), functions, truth)


def _check(name: str, parameters: Mapping[str, Any]) -> None:
    for parameter, declared in parameters["properties"].items():
        kinds = [declared["type"], *([declared["items"]["type"]] if declared["type"] in ("array", "tuple") else [])]
        for kind in kinds:
            if kind not in TYPES:
                raise ValueError(f"{name}: {parameter} is of type {kind!r}, which is none of {', '.join(TYPES)}")
    if not isinstance(parameters["required"], list):
        raise ValueError(f"{name}: required is no list")


def _schema(declared: Any) -> Any:
    """A declaration with the types of JSON Schema, wherever one stands."""
    if isinstance(declared, list):
        return [_schema(part) for part in declared]
    if not isinstance(declared, dict):
        return declared
    return {
        key: SCHEMA.get(value, value) if key == "type" and isinstance(value, str) else _schema(value)
        for key, value in declared.items()
    }
