"""A small set of function calls in BFCL's format, to try the suite where nothing can be downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Function = Mapping[str, Any]
Row = tuple[str, Sequence[Function], Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]]


def _function(name: str, about: str, required: Sequence[str], **properties: Mapping[str, Any]) -> Function:
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    return {"name": name, "description": about, "parameters": parameters}


def _is(kind: str, about: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "description": about, **more}


WEATHER = _function(
    "weather.now", "The weather in a city at this moment.", ["city"],
    city=_is("string", "City and country."), unit=_is("string", "Of temperatures.", enum=["celsius", "fahrenheit"]),
)  # fmt: skip
TRIANGLE = _function(
    "triangle_area", "Area of a triangle.", ["base", "height"],
    base=_is("integer", "In units."), height=_is("float", "In units."), rounded=_is("boolean", "To a whole number."),
)  # fmt: skip
MEAN = _function(
    "mean", "Mean of numbers.", ["numbers"], numbers=_is("array", "The numbers.", items={"type": "float"})
)  # fmt: skip
INVITE = _function(
    "invite", "Invite people to a meeting.", ["people", "date"],
    people=_is("array", "Their names.", items={"type": "string"}), date=_is("string", "As in May 3, 2026."),
)  # fmt: skip
BOOK = _function(
    "book_room", "Book a room of a hotel.", ["guest", "nights"],
    guest=_is("dict", "Who stays.", properties={"name": {"type": "string"}, "age": {"type": "integer"}}),
    nights=_is("integer", "How many."), breakfast=_is("boolean", "Whether with breakfast."),
)  # fmt: skip
ORDER = _function(
    "order", "Order goods.", ["lines"],
    lines=_is("array", "What is ordered.", items={
        "type": "dict", "properties": {"article": {"type": "string"}, "count": {"type": "integer"}}
    }),
)  # fmt: skip

SIMPLE: Sequence[Row] = (
    ("How warm is it in Oslo, Norway right now, in Celsius?", [WEATHER],
     [{"weather.now": {"city": ["Oslo, Norway", "Oslo"], "unit": ["celsius"]}}]),
    ("A triangle has a base of 10 units and a height of 5 units. What is its area?", [TRIANGLE],
     [{"triangle_area": {"base": [10], "height": [5.0], "rounded": ["", False]}}]),
    ("Give me the mean of 3.5, 4.5 and 10.25.", [MEAN], [{"mean": {"numbers": [[3.5, 4.5, 10.25]]}}]),
    ("Invite Ada and Grace to a meeting on May 3, 2026.", [INVITE],
     [{"invite": {"people": [["Ada", "Grace"], ["Grace", "Ada"]], "date": ["May 3, 2026", "2026-05-03"]}}]),
    ("Book three nights for Ines Roth, who is 41. No breakfast, please.", [BOOK],
     [{"book_room": {"guest": [{"name": ["Ines Roth"], "age": [41]}], "nights": [3], "breakfast": ["", False]}}]),
    ("Order 2 lamps and 5 chairs, in this order.", [ORDER],
     [{"order": {"lines": [[{"article": ["lamp", "lamps"], "count": [2]},
                            {"article": ["chair", "chairs"], "count": [5]}]]}}]),
)  # fmt: skip
MULTIPLE: Sequence[Row] = (
    ("What is the mean of 1.5 and 2.5?", [WEATHER, MEAN, TRIANGLE], [{"mean": {"numbers": [[1.5, 2.5]]}}]),
    ("Do I need a coat in Lima, Peru?", [INVITE, WEATHER, BOOK],
     [{"weather.now": {"city": ["Lima, Peru", "Lima"], "unit": ["", "celsius", "fahrenheit"]}}]),
    ("Lea Ott, 29, wants to sleep here for one night, with breakfast.", [ORDER, BOOK],
     [{"book_room": {"guest": [{"name": ["Lea Ott"], "age": [29]}], "nights": [1], "breakfast": [True]}}]),
)  # fmt: skip
PARALLEL: Sequence[Row] = (
    ("Compare the weather in Cairo, Egypt and in Quito, Ecuador.", [WEATHER],
     [{"weather.now": {"city": [city, place], "unit": ["", "celsius", "fahrenheit"]}}
      for city, place in (("Cairo, Egypt", "Cairo"), ("Quito, Ecuador", "Quito"))]),
    ("Areas of two triangles, please: base 4 and height 2.5, base 6 and height 1.", [TRIANGLE],
     [{"triangle_area": {"base": [4], "height": [2.5], "rounded": ["", False]}},
      {"triangle_area": {"base": [6], "height": [1.0], "rounded": ["", False]}}]),
)  # fmt: skip
PARALLEL_MULTIPLE: Sequence[Row] = (
    ("Order 3 tables, and invite Tom on June 1, 2026.", [ORDER, INVITE, MEAN],
     [{"order": {"lines": [[{"article": ["table", "tables"], "count": [3]}]]}},
      {"invite": {"people": [["Tom"]], "date": ["June 1, 2026", "2026-06-01"]}}]),
    ("How is the weather in Hanoi, Vietnam? And what is the mean of 2.0 and 8.0?", [WEATHER, MEAN],
     [{"weather.now": {"city": ["Hanoi, Vietnam", "Hanoi"], "unit": ["", "celsius", "fahrenheit"]}},
      {"mean": {"numbers": [[2.0, 8.0]]}}]),
)  # fmt: skip
IRRELEVANCE: Sequence[Row] = (
    ("Who painted the ceiling of the Sistine Chapel?", [WEATHER, MEAN], []),
    ("Play some jazz.", [BOOK], []),
    ("What is the capital of Mongolia?", [TRIANGLE, INVITE], []),
)


def make_calls(folder: Path) -> None:
    """Write the set into ``folder`` as BFCL is published."""
    (folder / "possible_answer").mkdir(parents=True)
    rows = {
        "simple": SIMPLE,
        "multiple": MULTIPLE,
        "parallel": PARALLEL,
        "parallel_multiple": PARALLEL_MULTIPLE,
        "irrelevance": IRRELEVANCE,
    }
    for category, items in rows.items():
        asked, right = [], []
        for number, (words, functions, truth) in enumerate(items):
            key = f"{category}_{number}"
            question = [[{"role": "user", "content": words}]]
            asked.append(json.dumps({"id": key, "question": question, "function": list(functions)}))
            right.append(json.dumps({"id": key, "ground_truth": list(truth)}))
        name = f"BFCL_v3_{category}.json"
        (folder / name).write_text("\n".join(asked) + "\n", encoding="utf-8")
        if category != "irrelevance":
            (folder / "possible_answer" / name).write_text("\n".join(right) + "\n", encoding="utf-8")
