"""Function calls of BFCL: its rule on cases worked by hand, its files, and the suite with answers of all kinds."""

from __future__ import annotations

import asyncio
import json

import pytest

import evals.__main__ as command
from evals.baselines import BaselineAgent
from evals.call_sets import Call, CallItem, load_calls, read_calls, wrong_call
from evals.runner import Options, evaluate_now
from evals.suites.calls import CallEnvironment, function_calls
from evals.suites.made_calls import make_calls
from evals.summary import summarise


def function(required=("x",), name="f", **types):
    properties = {key: {"type": kind} if isinstance(kind, str) else kind for key, kind in types.items()}
    return {"name": name, "parameters": {"type": "dict", "properties": properties, "required": list(required)}}


def listed(kind):
    return {"type": "array", "items": {"type": kind}}


@pytest.mark.parametrize(
    ("kind", "allowed", "value", "right"),
    [
        ("integer", [5], 5, True),
        ("integer", [5], 5.0, False),  # types are exact
        ("integer", [5], "5", False),
        ("integer", [1], True, False),
        ("float", [5.0], 5, True),  # but for an integer where a float is declared
        ("float", [5], 5, True),
        ("float", [0.5], 0.25, False),
        ("float", [0.5], -(10**400), False),
        ("boolean", [True], True, True),
        ("boolean", [True], 1, False),
        ("string", ["April 1, 2024"], "april 1 2024", True),
        ("string", ["New York, NY"], "new-york_ny.", True),
        ("string", ["it's"], 'it"s', True),
        ("string", ["a;b"], "ab", False),
        ("string", ["x", "y"], "z", False),
        ("string", ["", "x"], "", True),  # left out, as a text without letters
        ("any", ["x"], "X", True),
        ("integer", ["count"], "count", True),  # a variable: of the type that is allowed
        ("integer", ["count"], "Count", False),  # and to the letter
        ("integer", ["count"], 7, False),
        (listed("string"), [["Ada", "Grace"]], ["ada", "grace"], True),
        (listed("string"), [["Ada", "Grace"]], ["Grace", "Ada"], False),
        (listed("string"), [["Ada", "Grace"], ["Grace", "Ada"]], ["Grace", "Ada"], True),
        (listed("integer"), [[1, 2]], [1, 2.0], False),
        (listed("float"), [[1.0, 2.0]], [1, 2], False),  # no integers for floats within a list
        (listed("integer"), [[1, 2]], 1, False),
        (listed("integer"), ["", [1]], [], True),  # left out, as a list without members
        ("tuple", [[1, 2]], [1, 2], True),
        ("dict", [{"a": ["x"], "b": ["", 2]}], {"a": "X"}, True),
        ("dict", [{"a": ["x"], "b": ["", 2]}], {"a": "x", "b": 2}, True),
        ("dict", [{"a": ["x"], "b": ["", 2]}], {"b": 2}, False),
        ("dict", [{"a": ["x"]}], {"a": "x", "c": 1}, False),
        ("dict", ["", {"a": ["x"]}, {"a": ["y"]}], {"a": "y"}, True),
        (listed("dict"), [[{"a": [1]}, {"a": [2]}]], [{"a": 1}, {"a": 2}], True),
        (listed("dict"), [[{"a": [1]}, {"a": [2]}]], [{"a": 2}, {"a": 1}], False),
        (listed("dict"), [[{"a": [1]}, {"a": [2]}]], [{"a": 1}], False),
        (listed("dict"), [[{"a": [1]}]], ["a"], False),
    ],
)
def test_values_by_the_published_rule(kind, allowed, value, right):
    declared = kind if not isinstance(kind, str) or kind != "tuple" else {"type": "tuple", "items": {"type": "integer"}}
    assert (wrong_call(Call("f", {"x": value}), function(x=declared), {"x": allowed}) == "") is right


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call("f", {"x": 1}), ""),
        (Call("f", {"x": 1, "y": "b"}), ""),
        (Call("g", {"x": 1}), "g is called, not f"),
        (Call("f", {}), "f: x is missing"),
        (Call("f", {"x": 1, "z": 1}), "f: z is not asked for"),
        (Call("f", {"x": 1, "w": 1}), "f: w is not asked for"),  # declared, but not among what is right
        (Call("f", {"x": 2}), "f: x is not right"),
    ],
)
def test_parameters(call, said):
    declared = function(x="integer", y="string", w="integer")
    assert wrong_call(call, declared, {"x": [1], "y": ["", "b"]}) == said
    if not said:
        assert (wrong_call(call, declared, {"x": [1], "y": ["b"]}) == "f: y is left out") is ("y" not in call.arguments)


def test_several_calls_come_in_any_order_and_each_counts_once():
    item = CallItem("p", "parallel", "?", (function(x="integer"),), (("f", {"x": [1]}), ("f", {"x": [2]})))
    one, two = Call("f", {"x": 1}), Call("f", {"x": 2})
    assert item.wrong([one, two]) == item.wrong([two, one]) == ""
    assert item.wrong([one, one]) == "f: x is not right"
    assert item.wrong([one]) == "1 calls, 2 are right"
    assert item.wrong([one, two, two]) == "3 calls, 2 are right"
    nothing = CallItem("n", "irrelevance", "?", (function(x="integer"),), ())
    assert nothing.wrong([]) == ""
    assert nothing.wrong([one]) == "1 calls, 0 are right"


def test_calls_of_our_chat_format_are_typed():
    """It writes arguments as texts; one that reads as JSON is what it says, where no text is declared."""
    declared = function(x="integer", y="string", z=listed("float"))
    item = CallItem("s", "simple", "?", (declared,), (("f", {"x": [5], "y": ["7"], "z": [[1.5]]}),))
    (call,) = read_calls('{"name": "f", "arguments": {"x": "5", "y": "7", "z": "[1.5]"}}')
    assert item.typed(call).arguments == {"x": 5, "y": "7", "z": [1.5]}
    assert item.wrong([item.typed(call)]) == ""
    assert item.typed(Call("f", {"x": "five"})).arguments == {"x": "five"}
    assert item.typed(Call("g", {"x": "5"})).arguments == {"x": "5"}


def test_declarations_are_in_json_schema(tmp_path):
    items = function_calls()
    make_calls(tmp_path / "made")
    booked = next(item for item in load_calls(tmp_path / "made") if item.key == "simple_4")
    (declared,) = booked.declared()
    assert declared["parameters"]["type"] == declared["parameters"]["properties"]["guest"]["type"] == "object"
    assert declared["parameters"]["properties"]["nights"]["type"] == "integer"
    assert items.pins()["suite.data"].startswith("made, 16 items, ")


@pytest.mark.parametrize(("kind", "low", "high"), [("gold", 1.0, 1.0), ("null", 0.0, 0.0), ("random", 0.0, 0.1)])
def test_baselines(kind, low, high, tmp_path):
    run = evaluate_now(function_calls(), BaselineAgent(kind), tmp_path, Options(progress=False))
    assert len(run.judged) == 16
    assert low <= summarise(run.rows).score.mean <= high
    assert set(summarise(run.rows).by_slice["category"]) == {
        "simple", "multiple", "parallel", "parallel_multiple", "irrelevance",
    }  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        "{", "{}", "[" * 9000, '{"name": "f"}', '{"name": 1, "arguments": {}}', '{"name": "f", "arguments": []}',
        '{"a":' * 3000, "x" * 30_000, '{"name": "f", "arguments": {}}\n' * 100,
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": "' + "[" * 5000 + '"}}', "\ud800", '{"name": "f", "arguments": {"x": 1e999}}',
    ],
    ids=lambda text: text[:24].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_hostile_answers_score_nothing(answer):
    item = CallItem("s", "simple", "?", (function(x="integer"),), (("f", {"x": [5]}),))
    seen = asyncio.run(CallEnvironment(item).step(answer))
    assert seen.done
    assert seen.reward == 0.0


def published(folder, asked, right=None, category="simple"):
    (folder / "possible_answer").mkdir(parents=True)
    (folder / f"BFCL_v4_{category}.json").write_text(asked)
    if right is not None:
        (folder / "possible_answer" / f"BFCL_v4_{category}.json").write_text(right)
    return folder


def line(key="simple_0", **changes):
    row = {"id": key, "question": [[{"role": "user", "content": "?"}]], "function": [function(x="integer")]}
    return json.dumps(row | changes)


RIGHT = json.dumps({"id": "simple_0", "ground_truth": [{"f": {"x": [5]}}]})


def test_a_folder_as_published(tmp_path):
    folder = published(tmp_path / "b", line() + "\n\n", RIGHT)
    (folder / "BFCL_v4_java.json").write_text("not read")
    (item,) = load_calls(folder)
    assert (item.key, item.category, item.truth) == ("simple_0", "simple", (("f", {"x": [5]}),))
    suite = function_calls(folder)
    assert suite.data.startswith("b, 1 items")
    talk = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm?"}]]
    (item,) = load_calls(published(tmp_path / "c", line(question=talk), RIGHT))
    assert item.question == "Be brief.\n\nHm?"


@pytest.mark.parametrize(
    ("asked", "right", "said"),
    [
        (None, None, "holds no BFCL_v*_CATEGORY.json"),
        (line(), None, "possible_answer/BFCL_v4_simple.json is missing"),
        ("{", RIGHT, "BFCL_v4_simple.json, line 1: no JSON"),
        ("[]", RIGHT, "line 1: no object of JSON"),
        (line() + "\n" + line("simple_1"), RIGHT, "line 2: what is right for simple_1 is not in possible_answer"),
        ("{}", RIGHT, "line 1: not an item of BFCL (KeyError: 'id')"),
        (line(function=[function(x="int")]), RIGHT, "f: x is of type 'int', which is none of string"),
        (
            line(function=[function(name="g", x="integer")]),
            RIGHT,
            "simple_0: f is right, but not among its functions g",
        ),
    ],
)
def test_damaged_sets_are_named(tmp_path, capsys, asked, right, said):
    folder = tmp_path / "b"
    folder.mkdir() if asked is None else published(folder, asked, right)
    argv = ["function_calls", "--data", str(folder), "--baseline", "gold", "--out", str(tmp_path / "out")]
    assert command.main(argv) == 2
    assert said in capsys.readouterr().err
    assert command.main([*argv[:2], str(tmp_path / "nowhere"), *argv[3:]]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
