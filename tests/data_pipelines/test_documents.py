"""Records to documents: what is accepted is exact, what is not is named, counted and, past a share, fatal."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from shard_samples import record

from data_pipelines.documents import DocumentBuilder, Quarantine, QuarantineConfig, QuarantineError, read_quarantine
from mmagent.chat import (
    ChatConfig,
    Generation,
    Image,
    Message,
    Text,
    Thinking,
    Tool,
    ToolCall,
    Video,
    assistant,
    observation,
    render,
    user,
)
from mmagent.geometry import GeometryConfig, patchify, visual_tokens
from mmagent.packing import Size
from mmagent.records import (
    EncodedImage,
    Record,
    RecordError,
    decode_image,
    encode_image,
    from_sample,
    to_sample,
)
from mmagent.vocab import Vocab

GEOMETRY = GeometryConfig(patch_size=4, min_tokens=2, max_tokens=64)


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.train(["question answer 0 1 2 3 4 5 6 7 8 9"], 300)


@pytest.fixture(scope="module")
def builder(vocab: Vocab) -> DocumentBuilder:
    return DocumentBuilder(vocab, GEOMETRY, ChatConfig())


def picture(height: int, width: int, **save: object) -> EncodedImage:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(buffer, **({"format": "PNG"} | save))
    return EncodedImage(buffer.getvalue(), "png")


def with_image(image: EncodedImage) -> Record:
    return replace(record(1), images=(image,))


def test_a_document_is_the_rendered_conversation_with_its_patches(builder, vocab):
    one = record(7, images=2)
    document = builder.document(one)
    patched = [patchify(decode_image(image.data, "k"), GEOMETRY) for image in one.images]
    rendered = render(one.messages, vocab, [visual_tokens(p.grid, 2) for p in patched])
    assert document.input_ids.tolist() == rendered.ids
    assert document.trainable.tolist() == rendered.trainable
    assert (document.key, document.source) == ("sample-000007", "test")
    for image, expected in zip(document.images, patched, strict=True):
        assert torch.equal(image.patches, expected.patches)
        assert image.grid == expected.grid


def test_a_draft_knows_both_sizes_before_decoding(builder):
    for height, width in ((1, 1), (8, 12), (300, 20), (33, 34), (700, 900)):
        draft = builder.draft(with_image(picture(height, width)))
        document = builder.finish(draft)
        assert draft.size == Size(len(document), document.num_patches)


def test_sideways_photographs_are_sized_upright(builder):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    draft = builder.draft(with_image(picture(40, 80, exif=exif)))
    assert draft.grids == ((1, 20, 10),)
    assert builder.finish(draft).images[0].view.original == (80, 40)


def test_interleaved_parts_supervise_text_and_the_end(builder, vocab):
    parts = (Text("ab "), Image(), Text("cd"), Text("ef"))
    document = builder.document(Record("k", "web", parts=parts, images=(picture(8, 16),)))
    ids = document.input_ids.tolist()
    image = [vocab.id("<|begin_of_image|>"), *[vocab.image_id] * 2, vocab.id("<|end_of_image|>")]
    before, after = vocab.encode("ab "), vocab.encode("cdef")
    start = [vocab.id("[gMASK]"), vocab.id("<sop>")]
    assert ids == [*start, *before, *image, *after, vocab.id("<|endoftext|>")]
    assert document.trainable.tolist() == [
        *[False] * 2,
        *[True] * len(before),
        *[False] * 4,
        *[True] * (len(after) + 1),
    ]


def test_every_frame_of_a_video_follows_its_timestamp(builder, vocab):
    clip = (picture(8, 8), picture(8, 8), picture(8, 8))
    one = Record("k", "v", (user(Video((0.0, 1.0, 2.5)), "what?"), assistant("x")), images=clip)
    document = builder.document(one)
    assert len(document.images) == 3
    assert "2.5 seconds" in vocab.decode(document.input_ids.tolist())


@pytest.mark.parametrize(
    "height, width, problem",
    [(8, 20000, "aspect ratio 2500"), (20000, 8, "aspect ratio 2500"), (1, 1, None), (3, 500, None)],
)
def test_odd_shapes_are_accepted_or_refused_as_geometry_says(builder, height, width, problem):
    if problem is None:
        assert builder.document(with_image(picture(height, width))).num_patches > 0
    else:
        with pytest.raises(RecordError, match=rf"sample-000001: images\[0\]: .*{problem}"):
            builder.draft(with_image(picture(height, width)))


def test_a_truncated_image_is_found_when_decoded(builder):
    whole = picture(60, 60)
    draft = builder.draft(with_image(EncodedImage(whole.data[:-2000], "png")))
    with pytest.raises(RecordError, match=r"sample-000001: images\[0\]: cannot decode"):
        builder.finish(draft)
    with pytest.raises(RecordError, match=r"images\[0\]: cannot decode image: no PNG, JPEG"):
        builder.draft(with_image(EncodedImage(b"no image", "png")))


def test_what_exceeds_a_limit_is_refused_whole(vocab):
    small = DocumentBuilder(vocab, GEOMETRY, limit=Size(40, 20))
    small.draft(record(3))
    with pytest.raises(RecordError, match=r"sample-000003: patches: 48 exceed the limit of 20"):
        small.draft(replace(record(3), images=(picture(24, 32),)))
    with pytest.raises(RecordError, match=r"long: tokens: \d+ exceed the limit of 40"):
        small.draft(Record("long", "s", (user("q" * 60), assistant("a"))))


LOOK = Tool('{"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}')


def talk(key: str = "talk") -> Record:
    """Pictures from a user and from a tool, thoughts, and a call with two arguments."""
    turns = (
        user(Image(), "0 1 2"),
        assistant(Thinking("3 4"), "5", ToolCall("look", {"at": "6", "how": "7 8"})),
        observation("9", Image()),
        assistant(Thinking("0"), "1 2 3"),
    )
    return Record(key, "s", turns, images=(picture(8, 8), picture(8, 16)), tools=(LOOK,))


@pytest.mark.parametrize("generation", list(Generation))
@pytest.mark.parametrize("thinking", [True, False])
def test_no_limit_cuts_an_image_a_call_or_a_thought(vocab, generation, thinking):
    """At every limit a document is whole, or refused by its key: it holds all its pictures, all its calls."""
    chat = ChatConfig(generation, thinking)
    whole = DocumentBuilder(vocab, GEOMETRY, chat).draft(talk())
    assert whole.input_ids.tolist().count(vocab.image_id) == sum(visual_tokens(grid, 2) for grid in whole.grids)
    for limit in range(1, whole.size.tokens + 2):
        builder = DocumentBuilder(vocab, GEOMETRY, chat, limit=Size(limit, whole.size.patches))
        if limit < whole.size.tokens:
            with pytest.raises(RecordError, match=rf"^talk: tokens: {whole.size.tokens} exceed the limit of {limit}"):
                builder.draft(talk())
            continue
        document = builder.document(talk())
        assert torch.equal(document.input_ids, whole.input_ids)
        assert torch.equal(document.trainable, whole.trainable)
        assert len(document.images) == 2
    tight = Size(whole.size.tokens, whole.size.patches - 1)
    with pytest.raises(RecordError, match=rf"^talk: patches: {whole.size.patches} exceed the limit of {tight.patches}"):
        DocumentBuilder(vocab, GEOMETRY, chat, limit=tight).draft(talk())


def test_a_record_with_tools_trains_what_the_renderer_says(vocab):
    chat = ChatConfig(thinking=True)
    again = from_sample(to_sample(talk()))
    assert again == talk()
    document = DocumentBuilder(vocab, GEOMETRY, chat).document(again)
    counts = [visual_tokens(image.grid, 2) for image in document.images]
    rendered = render(talk().messages, vocab, counts, chat, tools=[LOOK])
    assert document.input_ids.tolist() == rendered.ids
    assert document.trainable.tolist() == rendered.trainable
    text = vocab.decode(rendered.ids)
    assert f"<tools>\n{LOOK.declaration}\n</tools>" in text
    trained = vocab.decode([i for i, t in zip(rendered.ids, rendered.trainable, strict=True) if t])
    assert "<tool_call>look\n<arg_key>at</arg_key>" in trained
    assert trained.count("<|observation|>") == trained.count("<|user|>") == 1
    assert "9" not in trained
    assert "<tools>" not in trained


def test_conversations_of_a_hybrid_model_choose_their_mode(vocab):
    builder = DocumentBuilder(vocab, GEOMETRY, ChatConfig(hybrid=True))
    silent = replace(talk(), messages=(user("0"), assistant("1")), images=(), tools=())
    loud = replace(silent, messages=(user("0"), assistant(Thinking("2"), "1")))
    texts = [vocab.decode(builder.draft(one).input_ids.tolist()) for one in (silent, loud)]
    assert texts[0] == "[gMASK]<sop><|user|>\n0/nothink<|assistant|>\n<think></think>\n1<|user|>"
    assert texts[1] == "[gMASK]<sop><|user|>\n0<|assistant|>\n<think>2</think>\n1<|user|>"


def test_nothing_to_train_on_is_refused(builder):
    for messages in ((user("alone"),), (user("q"), assistant("a", trainable=False))):
        with pytest.raises(RecordError, match="k: messages: nothing to train on"):
            builder.draft(Record("k", "s", messages))


def test_roles_out_of_order_are_named(builder):
    with pytest.raises(RecordError, match=r"k: messages: message 0: an observation must follow"):
        builder.draft(Record("k", "s", (Message("observation", (Text("x"),)), assistant("a"))))


def test_control_tokens_spelled_in_text_stay_text(builder, vocab):
    spelled = "<|image|> <|user|> </think> <|endoftext|> [gMASK]<sop>"
    conversation = builder.document(Record("k", "s", (user(spelled), assistant(spelled))))
    plain = builder.document(Record("k", "s", (user("q"), assistant("a"))))
    special = set(range(vocab.id("<|endoftext|>"), vocab.size))
    count = [sum(i in special for i in document.input_ids.tolist()) for document in (conversation, plain)]
    assert count[0] == count[1]
    assert vocab.image_id not in conversation.input_ids.tolist()


def quarantine(folder, **settings) -> Quarantine:
    return Quarantine(QuarantineConfig(str(folder), **settings))


def test_quarantine_writes_each_sample_once(tmp_path):
    for _ in range(2):  # the second is a resumed run
        log = quarantine(tmp_path)
        log.good("web")
        log.add("web", "a.tar@0", RecordError("k1", "images[3]", "cannot decode"))
        log.add("web", "a.tar@512", RecordError("k2", "json", "is missing"))
        log.add("web", "a.tar@0", RecordError("k1", "images[3]", "cannot decode"))
        log.torn("web", "b.tar", 77, "cut")
        assert log.total == 3
        assert dict(log.reasons) == {"images": 2, "json": 1, "torn shard": 1}
    lines = read_quarantine(tmp_path / "quarantine-0.jsonl")
    assert [(line["shard"], line["key"], line["reason"]) for line in lines] == [
        ("a.tar@0", "k1", "images"),
        ("a.tar@512", "k2", "json"),
        ("b.tar@77", "", "torn shard"),
    ]


def test_every_newly_bad_sample_is_told_of_once(tmp_path, caplog):
    for _ in range(2):  # the second is a resumed run, which knows
        log = quarantine(tmp_path)
        for _ in range(2):
            log.add("web", "a.tar@0", RecordError("k1", "images[3]", "cannot decode"))
        log.torn("web", "b.tar", 77, "cut")
        assert log.tails == 1
    assert [record.getMessage() for record in caplog.records] == [
        "source 'web', a.tar@0: k1 left out (images: cannot decode)",
        "source 'web', b.tar@77: the rest left out (torn shard: cut)",
    ]
    Quarantine(QuarantineConfig(), tell=False).add("web", "c.tar@0", RecordError("k2", "json", "x"))
    other = Quarantine(QuarantineConfig(), rank=1)
    other.torn("web", "b.tar", 77, "cut")
    assert other.tails == 1
    assert len(caplog.records) == 2


def test_a_run_without_a_folder_for_bad_samples_keeps_them_in_its_own():
    assert QuarantineConfig(max_share=0.5).within("runs/a") == QuarantineConfig("runs/a/quarantine", 0.5)
    assert QuarantineConfig("elsewhere").within("runs/a").folder == "elsewhere"


def test_a_line_torn_by_a_kill_is_mended(tmp_path):
    quarantine(tmp_path).add("web", "a.tar@0", RecordError("k1", "json", "x"))
    path = tmp_path / "quarantine-0.jsonl"
    path.write_text(path.read_text() + '{"source": "we')
    quarantine(tmp_path).add("web", "a.tar@512", RecordError("k2", "json", "x"))
    assert [line["key"] for line in read_quarantine(path)] == ["k1", "k2"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_past_a_share_of_one_source_the_run_stops(tmp_path):
    log = quarantine(tmp_path, max_share=0.1, min_seen=20)
    for n in range(300):
        log.good("large")
        if n % 10 == 0:
            log.good("small")
    log.add("small", "s.tar@0", RecordError("k0", "json", "x"))
    log.add("small", "s.tar@1", RecordError("k1", "json", "x"))
    log.add("small", "s.tar@2", RecordError("k2", "json", "x"))
    with pytest.raises(QuarantineError, match=r"source 'small': 4 of 34 .*10\.00%.*json: 3, images: 1.*k3: images"):
        log.add("small", "s.tar@3", RecordError("k3", "images", "x"))


def test_few_samples_are_not_judged():
    log = Quarantine(QuarantineConfig(max_share=0.0, min_seen=5))
    for n in range(4):
        log.add("s", f"a@{n}", RecordError("k", "json", "x"))
    with pytest.raises(QuarantineError):
        log.add("s", "a@5", RecordError("k", "json", "x"))
    with pytest.raises(ValueError, match=r"max_share 2\.0"):
        Quarantine(QuarantineConfig(max_share=2.0))


def test_an_unchanged_image_survives_disk_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_image(pixels).data, "k"), pixels)
