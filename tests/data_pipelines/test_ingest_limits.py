"""What passes by its format and is worth nothing: ribbons, dots and empty answers are refused and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ingest_kit import INLINE, encoded, run
from shard_samples import record

from data_pipelines.ingest.report import REFUSED
from data_pipelines.plausible import LEAST_SIDE, MOST_ASPECT, check_said, picture_sizes
from data_pipelines.shards import ShardWriter
from data_pipelines.validate import examine
from mmagent.chat import Box, Message, Text, Thinking, ToolCall, assistant, user
from mmagent.geometry import GeometryConfig
from mmagent.records import EncodedImage, Record, RecordError


def pictured(width: int, height: int) -> Record:
    return replace(record(0), images=(EncodedImage(encoded(height, width), "png"),))


def said(*parts: object, trainable: bool = True) -> Record:
    return replace(record(0), messages=(user("q"), Message("assistant", parts, trainable=trainable)), images=())


@pytest.mark.parametrize("width, height", [(LEAST_SIDE, LEAST_SIDE), (LEAST_SIDE * MOST_ASPECT, LEAST_SIDE), (28, 28)])
def test_the_smallest_and_the_longest_pictures_pass(width, height):
    assert picture_sizes(pictured(width, height)) == ((height, width),)


@pytest.mark.parametrize(
    "width, height, told",
    [
        (1, 1, "1x1 pixels: a side of less than 8"),
        (7, 500, "a side of less than 8"),
        (3000, 8, "3000x8 pixels: its sides are as 375 to 1"),
        (8, 1601, "200 to 1"),
    ],
)
def test_dots_and_ribbons_are_told(width, height, told):
    with pytest.raises(RecordError, match=told):
        picture_sizes(pictured(width, height))


def test_what_training_refuses_is_refused_before_it():
    assert GeometryConfig().max_aspect == MOST_ASPECT


def test_an_answer_says_something():
    for parts in ((), (Text(""),), (Text(" \n\t"), Box("")), (Thinking("\n"),)):
        with pytest.raises(RecordError, match="message 1: the assistant says nothing"):
            check_said(said(*parts))
    for parts in ((Text("a"),), (Text(""), ToolCall("look", {})), (Thinking("so"), ToolCall("look", {})), (Box("3"),)):
        check_said(said(*parts))
    with pytest.raises(RecordError, match="message 1: the assistant thinks, and says nothing"):
        check_said(said(Thinking("so"), Text(" ")))
    check_said(said(Text(""), trainable=False))  # context only
    with pytest.raises(RecordError, match="nothing but blanks"):
        check_said(Record("k", "s", parts=(Text(" \n"),)))


def rows(folder: Path) -> Path:
    """Two good rows, and four that are not."""
    for name, (width, height) in {"good": (60, 40), "ribbon": (3000, 8), "dot": (1, 1)}.items():
        (folder / f"{name}.png").write_bytes(encoded(height, width))
    asked = [("good", "fine"), ("ribbon", "a"), ("dot", "b"), ("good", ""), ("good", " \n"), ("good", "fine, too")]
    lines = [
        {"image": f"{name}.png", "messages": [
            {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": answer}
        ]}
        for name, answer in asked
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"


def test_ingestion_refuses_them_and_counts_by_reason(tmp_path):
    report = run([rows(tmp_path)], tmp_path / "to")
    assert (report["records"], report["refused"]) == (2, 4)
    assert {name: kind["count"] for name, kind in report["kinds"].items()} == {
        "images: 3000x8 pixels: its sides are as 375 to 1, more than 200 to 1": 1,
        "images: 1x1 pixels: a side of less than 8 shows nothing": 1,
        "messages: message 1: the assistant says nothing": 2,
    }
    lines = [json.loads(line) for line in (tmp_path / "to" / REFUSED).read_text().splitlines()]
    assert [line["shard"] for line in lines] == [f"rows.jsonl:{n}" for n in (2, 3, 4, 5)]


def test_validation_finds_them_in_shards_of_anybody(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for n, one in enumerate([pictured(60, 40), pictured(3000, 8), said(Text("")), replace(said(), messages=(
            user("q"), assistant("a")
        ))]):  # fmt: skip
            writer.write(replace(one, key=f"k{n}"))
    found = examine([str(tmp_path)], limits=INLINE)
    assert (found.tally.records, found.wrong) == (2, 2)
    assert sorted(name.partition(":")[0] for name in found.tally.kinds) == ["images", "messages"]
