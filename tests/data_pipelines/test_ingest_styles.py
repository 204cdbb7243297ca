"""Rows of other people's data sets as records: one golden row of every style, and what is refused of each."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_kit import data_uri, encoded, only, read

from data_pipelines.ingest.files import RefusedError, Root
from data_pipelines.ingest.grounding import _span, read_marks
from data_pipelines.ingest.inputs import Row
from data_pipelines.ingest.styles import recognise
from mmagent.chat import Image, Message, Text, Thinking, Tool, ToolCall, assistant, observation, user
from mmagent.messages import read_conversation, write_message
from mmagent.records import Record, RecordError, Region

PNG = encoded()
WIDE = encoded(500, 2000, "JPEG")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def style_of(cells: dict[str, object]) -> str:
    return recognise(Row("k", "w", cells, Root(".", ".")), {})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "images" / f"{n}.png").write_bytes(encoded(seed=n))
    return tmp_path


def test_openai_messages_with_tools_come_back_as_they_were(folder):
    """Thoughts, calls, answers of tools, images as a path, a file: address, a data: URI and inside an answer."""
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Which is larger?"},
                    {"type": "image_url", "image_url": {"url": "images/0.png", "detail": "high"}},
                    {"type": "image_url", "image_url": {"url": (folder / "images/1.png").as_uri()}},
                    {"type": "image_url", "image_url": {"url": data_uri(PNG)}},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "I must look.",
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "look", "arguments": '{"n": 1, "deep": true}'},
                    },
                    {"id": "b", "type": "function", "function": {"name": "look", "arguments": "{}"}},
                ],
            },
            {"role": "tool", "tool_call_id": "b", "content": "second"},
            {
                "role": "tool",
                "tool_call_id": "a",
                "content": [{"type": "image_url", "image_url": {"url": "images/2.png"}}],
            },
            {"role": "assistant", "content": "The first.", "weight": 0},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [TOOL],
    }
    assert style_of(row) == "messages"
    record = only("messages", row, folder)
    assert record.messages == (
        Message("system", (Text("Be brief."),)),
        user("Which is larger?", Image(), Image(), Image()),
        assistant(Thinking("I must look."), ToolCall("look", {"n": "1", "deep": "true"}), ToolCall("look", {})),
        observation(Image()),
        observation("second"),
        assistant("The first.", trainable=False),
        user("Sure?"),
        assistant("Yes."),
    )
    assert record.tools == (Tool(json.dumps(TOOL)),)
    assert [image.data for image in record.images] == [encoded(seed=0), encoded(seed=1), PNG, encoded(seed=2)]
    again = [write_message(message) for message in record.messages]
    assert read_conversation(again, row["tools"]).messages == record.messages


def test_tools_may_be_json_and_calls_of_the_first_kind():
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"x": "y"}'}},
            {"role": "function", "name": "look", "content": "seen"},
            {"role": "assistant", "content": "a"},
        ],
        "functions": json.dumps([TOOL["function"]]),
    }
    record = only("messages", row)
    assert record.messages[1:3] == (assistant(ToolCall("look", {"x": "y"})), observation("seen"))
    assert [tool.name for tool in record.tools] == ["look"]


@pytest.mark.parametrize("content", ["<image>\nWhat is\n<image>\nthis?", None])
def test_images_in_a_column_fill_their_places_in_order(folder, content):
    parts = [
        {"type": "image"},
        {"type": "text", "text": "What is"},
        {"type": "image"},
        {"type": "text", "text": "this?"},
    ]
    row = {
        "messages": [{"role": "user", "content": content or parts}, {"role": "assistant", "content": "a"}],
        "images": ["images/0.png", {"bytes": encoded(seed=1), "path": None}],
    }
    record = only("messages", row, folder)
    assert record.messages[0] == user(Image(), "What is", Image(), "this?")
    assert [image.data for image in record.images] == [encoded(seed=0), encoded(seed=1)]


def test_llava(folder):
    row = {
        "id": "000000033471",
        "image": "images/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors?"},
            {"from": "gpt", "value": "White and <image> red."},
            {"from": "human", "value": "Why?\n<image>"},
            {"from": "gpt", "value": "<think>Hm.</think>So."},
        ],
    }
    assert style_of(row) == "llava"
    with pytest.raises(RefusedError, match="images: 1 images for 2 places"):
        only("llava", row, folder)
    got = read("llava", row | {"image": ["images/1.png", "images/2.png"]}, folder)
    (record,) = got.records
    assert record.messages == (
        user(Image(), "What are the colors?"),
        assistant("White and <image> red."),  # what the assistant says is said
        user("Why?", Image()),
        assistant(Thinking("Hm."), "So."),
    )
    assert got.aside == ("id",)


def test_an_answer_that_talks_of_thoughts_loses_nothing():
    def answered(text: str) -> Record:
        return only("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]})

    text = "Before. <think>x</think> After."
    assert answered(text).messages[1] == assistant(text)
    assert answered("<think>x</think>y").messages[1] == assistant(Thinking("x"), "y")
    with pytest.raises(ValueError, match="message 1: content: </think> without <think>"):
        answered("Write </think> to close.")


def test_sharegpt_with_system_and_tools():
    row = {
        "system": "You help.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Look at <image>, a tag."},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": [1, 2]}}'},
            {"from": "observation", "value": "a tag"},
            {"from": "gpt", "value": "It is one."},
        ],
    }
    assert style_of(row) == "sharegpt"
    assert only("sharegpt", row).messages == (
        Message("system", (Text("You help."),)),
        user("Look at <image>, a tag."),
        assistant(ToolCall("look", {"at": "[1, 2]"})),
        observation("a tag"),
        assistant("It is one."),
    )


@pytest.mark.parametrize(
    "turns, problem",
    [
        ([{"from": "gpt", "value": "a"}], "message 0: an assistant turn must follow"),
        ([{"from": "human", "value": "q"}], "nothing to train on"),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}], "nothing to train on"),
        (
            [{"from": "human", "value": "q"}] * 2 + [{"from": "robot", "value": "a"}],
            "message 2: from 'robot' is none of",
        ),
        ([{"from": "human", "value": None}], "message 0: value must be text, got NoneType"),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "{"}], "json: does not parse"),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "[]"}], "message 1: content: is missing"),
        (["q"], "message 0: must be an object"),
        ([], "none of the columns"),
    ],
)
def test_conversations_that_nobody_could_train_on(turns, problem):
    with pytest.raises(ValueError, match=problem):
        only("sharegpt", {"conversations": turns})


# A 2000 x 500 image: thousandths of the frame are 2 pixels across and half a pixel down, so (100, 200), (300, 400) is
# x from 100 * 2 = 200 to 300 * 2 = 600 and y from 200 / 2 = 100 to 400 / 2 = 200.
SIZE = (500, 2000)


@pytest.mark.parametrize(
    "text, told, boxes",
    [
        (
            "<ref>the dog</ref><box>(100,200),(300,400)</box>",
            "the dog 100,200,300,400",
            [((200, 100, 600, 200), "the dog")],
        ),
        (
            "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>.",
            "the dog 100,200,300,400.",
            [((200, 100, 600, 200), "the dog")],
        ),
        ("<box>(0,0),(1000,1000)</box>", "0,0,999,999", [((0, 0, 2000, 500), "")]),
        (
            "Two <ref>dogs</ref><box>(0,0),(10,10)</box><box>(20,20),(30,30)</box> and <ref>a cat</ref> "
            "<box>(1,2),(3,4)</box>",
            "Two dogs 0,0,10,10; 20,20,30,30 and a cat 1,2,3,4",
            [((0, 0, 20, 5), "dogs"), ((40, 10, 60, 15), "dogs"), ((2, 1, 6, 2), "a cat")],
        ),
        ("at <box>(500,500)</box>", "at 500,500", []),
        (
            "<ref>sign</ref><quad>(10,10),(20,12),(20,22),(10,20)</quad>",
            "sign 10,10,20,12,20,22,10,20",
            [((20, 5, 40, 11), "sign")],
        ),
        ("Find <ref>the dog</ref>.", "Find the dog.", []),
    ],
)
def test_places_of_qwen_by_hand(text, told, boxes):
    read = read_marks(text, 0, SIZE)
    assert read.text == told
    assert read.boxes == tuple(Region(0, box, label) for box, label in boxes)
    assert read_marks(text, 0, None).text == told


@pytest.mark.parametrize(
    "text, problem",
    [
        ("<box>(1,2),(3,4)", "<box> without its other half"),
        ("<box>(a,b),(c,d)</box>", "is no place"),
        ("<box>(1,2),(1001,4)</box>", "outside the frame"),
        ("<box>(3,2),(3,4)</box>", "empty or inverted"),
        ("<box>(1,2),(3,4),(5,6)</box>", "is no place"),
        ("<box></box>", "is no place"),
        ("<ref>x", "<ref> without"),
    ],
)
def test_marks_that_mark_nothing_are_refused(text, problem):
    with pytest.raises(RefusedError, match=problem):
        read_marks(text, 0, SIZE)


def test_both_generations_of_qwen(folder):
    (folder / "images/wide.png").write_bytes(encoded(50, 200))
    old = {
        "conversations": [
            {
                "from": "user",
                "value": "Picture 1: <img>images/0.png</img>\nPicture 2: <img>images/wide.png</img>\nFind it.",
            },
            {"from": "assistant", "value": "<ref>It</ref><box>(100,200),(300,400)</box>"},
        ]
    }
    new = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "images/0.png"},
                    {"type": "image", "image": (folder / "images/wide.png").as_uri(), "min_pixels": 3136},
                    {"type": "text", "text": "Find it."},
                ],
            },
            {"role": "assistant", "content": "<|box_start|>(100,200),(300,400)<|box_end|>"},
        ]
    }
    assert style_of(old) == style_of(new) == "qwen"
    record = only("qwen", old, folder)
    assert record.messages == (
        user("Picture 1: ", Image(), "\nPicture 2: ", Image(), "\nFind it."),
        assistant("It 100,200,300,400"),
    )
    assert record.boxes == (Region(1, (20.0, 10.0, 60.0, 20.0), "It"),)  # of the last image before it
    record = only("qwen", new, folder)
    assert record.messages[1] == assistant("100,200,300,400")
    assert record.boxes == (Region(1, (20.0, 10.0, 60.0, 20.0)),)
    with pytest.raises(RefusedError, match="boxes: a place before the first image"):
        only("qwen", {"conversations": [{"from": "user", "value": "q"}, old["conversations"][1]]}, folder)


def written(box: list[int]) -> str:
    """An answer as these models give it."""
    return f'```json\n[{{"bbox_2d": {box}, "label": "it"}}, {{"point_2d": {box[:2]}}}]\n```'


@pytest.mark.parametrize(
    "coordinates, answer, told, box",
    [
        # 2000 x 500 pixels are resized to 1988 x 504: multiples of 28, fewer than 1280 * 28 * 28 pixels
        ("pixels", [497, 126, 994, 252], [250, 250, 500, 500], (500, 125, 1000, 250)),
        ("thousandths", [250, 250, 500, 1000], [250, 250, 500, 999], (500, 125, 1000, 500)),
    ],
)
def test_json_of_later_generations_of_qwen(coordinates, answer, told, box):
    talk = [
        {"from": "human", "value": '<image>Find it; answer {"bbox_2d": [x1, y1, x2, y2], "label": ...}.'},
        {
            "from": "gpt",
            "value": f'```json\n[{{"bbox_2d": {answer}, "label": "it"}}, {{"point_2d": {answer[:2]}}}]\n```',
        },
    ]
    row = {"image": WIDE, "conversations": talk}
    assert style_of(row) == "qwen"
    record = only("qwen", row, coordinates=coordinates)
    assert record.messages[0].parts[1] == Text(talk[0]["value"].removeprefix("<image>"))
    assert record.messages[1] == assistant(written(told))
    (region,), (point,) = record.boxes, record.points
    assert (region.image, region.label) == (0, "it")
    assert region.coordinates == pytest.approx(box)
    assert point.coordinates == pytest.approx(box[:2])


@pytest.mark.parametrize(
    "coordinates, answer, problem",
    [
        ("", "[1, 2, 3, 4]", "--coordinates says"),
        ("thousandths", "[1, 2, 1100, 4]", "outside of 1000x1000, so it is not in thousandths"),
        ("pixels", "[1, 2, 3, 600]", "outside of 1988x504, so it is not in pixels"),
        ("pixels", "[3, 2, 3, 4]", "empty or inverted"),
        ("pixels", "[1, 2, 3]", "is no place"),
        ("pixels", "null", "is no place"),
        ("pixels", "[1, 2, NaN, 4]", "outside of"),
    ],
)
def test_json_that_may_mean_another_place_is_refused(coordinates, answer, problem):
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": f'{{"bbox_2d": {answer}}}'}]
    with pytest.raises(RefusedError, match=problem):
        only("qwen", {"image": WIDE, "conversations": talk}, coordinates=coordinates)
    part = {"type": "image", "image": data_uri(WIDE), "max_pixels": 50_000}
    own = [{"role": "user", "content": [part]}, {"role": "assistant", "content": '{"bbox_2d": [1, 2, 3, 4]}'}]
    with pytest.raises(RefusedError, match="whose size the row sets"):
        only("qwen", {"messages": own}, coordinates="pixels")


@given(st.integers(28, 6000), st.integers(28, 6000))
@settings(deadline=None)
def test_images_are_resized_as_qwen_does(height, width):
    """By hand: sides to multiples of 28, and where there are more than 1280 squares of them, shrunk by the root."""
    if max(height, width) > 200 * min(height, width):
        return
    sides = [28 * round(side / 28) for side in (height, width)]
    if sides[0] * sides[1] > 28 * 28 * 1280:
        shrink = math.sqrt(height * width / (28 * 28 * 1280))
        sides = [max(28, 28 * math.floor(side / shrink / 28)) for side in (height, width)]
    elif sides[0] * sides[1] < 56 * 56:
        grow = math.sqrt(56 * 56 / (height * width))
        sides = [28 * math.ceil(side * grow / 28) for side in (height, width)]
    assert _span((height, width), "pixels") == tuple(sides)


@pytest.mark.parametrize(
    "size, told",
    [
        ((8, 3000), "3000x8 pixels: aspect ratio 375 exceeds 200"),
        ((20, 90), "an image of 90x20: the resized size of a side below 28 is not agreed on"),
        (None, "pixels of a video, whose resized size"),
    ],
)
def test_an_image_whose_resized_size_nobody_knows_is_called_what_it_is(size, told):
    with pytest.raises(RefusedError, match=told):
        _span(size, "pixels")


def test_captions_become_documents_or_answers(folder):
    row = {"file_name": "images/0.png", "texts": ["a dog", " ", "two dogs"], "width": 60}
    assert style_of(row) == "captions"
    got = read("captions", row, folder)
    assert [record.key for record in got.records] == ["key#1", "key#2"]
    assert got.records[1].parts == (Image(), Text("two dogs"))
    assert got.aside == ("width",)
    record = only("captions", row | {"texts": "a dog"}, folder, prompt="What is it?")
    assert record.messages == (user(Image(), "What is it?"), assistant("a dog"))
    with pytest.raises(RefusedError, match="text: is empty"):
        read("captions", {"image": PNG, "text": ""}, folder)
    with pytest.raises(RefusedError, match="text: is empty"):
        read("captions", {"image": PNG, "alt": None}, folder, columns={"text": "alt"})
    for cells in ({"image": PNG}, {"image": PNG, "height": 3}):
        with pytest.raises(RefusedError, match=r"text: no caption in texts, .*--column text=COLUMN"):
            only("captions", cells)
    with pytest.raises(RefusedError, match="text: is empty"):
        only("captions", {"image": PNG, "text": " "})
    with pytest.raises(RefusedError, match="images: there is neither"):
        only("captions", {"text": "x"})


def test_pairs_texts_and_interleaved(folder):
    row = {"image": "images/0.png", "question": "<image>\nHow many?", "answers": ["two", "2"]}
    assert style_of(row) == "pairs"
    assert only("pairs", row, folder).messages == (user(Image(), "How many?"), assistant("two"))
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be exact."}
    assert only("pairs", row).messages == (Message("system", (Text("Be exact."),)), user("Add.\n1 2"), assistant("3"))
    assert style_of({"text": "x", "url": "y"}) == "text"
    assert only("text", {"text": "words"}).parts == (Text("words"),)
    row = {"texts": ["one", None, "two"], "images": [None, "images/0.png", None]}
    assert style_of(row) == "interleaved"
    assert only("interleaved", row, folder).parts == (Text("one"), Image(), Text("two"))
    with pytest.raises(RefusedError, match="either a text or an image"):
        only("interleaved", {"texts": [None], "images": [None]})
    assert style_of({"a": 1}) == ""


def test_columns_can_be_called_by_other_names(folder):
    record = only("captions", {"pic": "images/0.png", "alt": "a"}, folder, columns={"image": "pic", "text": "alt"})
    assert record.parts == (Image(), Text("a"))


@pytest.mark.parametrize(
    "path, problem",
    [
        ("../secret.png", "leads out of the data set's folder"),
        ("/etc/passwd", "leads out of the data set's folder"),
        ("file:///etc/passwd", "leads out of the data set's folder"),
        ("images/../../secret.png", "leads out"),
        ("link.png", "leads out"),
        ("linked/secret.png", "leads out"),
        ("circle.png", "cannot be opened|is no path"),
        ("http://host/x.png", "is an address, and nothing is downloaded"),
        ("HTTPS://host/x.png", "is an address"),
        ("s3://bucket/x.png", "is an address"),
        ("a\0b.png", "is no path|cannot be opened"),
        ("pipe.png", "is no regular file"),
        ("images", "is no regular file|cannot be opened"),
        ("missing.png", "cannot be opened: No such file"),
        ("x" * 5000, "cannot be opened: File name too long|is no path"),
        ("", "images: a place for an image, and no image|images: there is neither"),
        ("data:image/png,abc", "a data: URI that is not base64"),
        ("data:image/png;base64,@@@", "base64 that cannot be read"),
    ],
)
def test_paths_do_not_lead_out_and_nothing_hangs(tmp_path, path, problem):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(PNG)
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "linked").symlink_to(tmp_path)
    (data / "circle.png").symlink_to(data / "circle.png")
    os.mkfifo(data / "pipe.png")
    with pytest.raises(RefusedError, match=problem):
        only("captions", {"image": path, "text": "x"}, data)


def test_what_is_allowed_to_lead_out_does(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.png").write_bytes(PNG)
    root = Root(str(tmp_path / "in"), str(tmp_path / "in"), outside=True)
    assert root.read("../a.png") == PNG
    assert Root(str(tmp_path / "in"), str(tmp_path)).read("../a.png") == PNG


def test_images_that_are_none_are_named_by_their_number(folder):
    (folder / "images/1.png").write_bytes(b"")
    with pytest.raises(RecordError, match=r"key: images\[1\]: cannot decode image: it has no bytes"):
        only("captions", {"images": ["images/0.png", "images/1.png"], "text": "x"}, folder)


def test_headers_can_be_trusted():
    cut = {"image": encoded(200, 300)[:-3000], "text": "x"}
    assert only("captions", cut, decode=False).images[0].extension == "png"
    with pytest.raises(RecordError, match="cannot decode"):
        only("captions", cut)


def test_one_row_cannot_name_a_file_until_memory_is_full(folder, monkeypatch):
    monkeypatch.setattr("data_pipelines.ingest.files.MAX_RECORD", 10 * len(PNG))
    with pytest.raises(RefusedError, match="bytes of images in one row"):
        only("captions", {"images": ["images/0.png"] * 1000, "text": "x"}, folder)
    with pytest.raises(RefusedError, match="row: a list of 10001, the limit is 10000"):
        only("captions", {"images": ["images/0.png"] * 10_001, "text": "x"}, folder)
