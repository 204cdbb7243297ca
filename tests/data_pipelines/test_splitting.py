"""Long records in pieces: every message, part and image once and in order, and no piece that could be longer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.documents import DocumentBuilder
from data_pipelines.splitting import split
from mmagent.chat import Image, Message, Part, Text, Video, assistant, user
from mmagent.geometry import GeometryConfig
from mmagent.packing import Size
from mmagent.records import Record, RecordError, Region, encode_image, validate
from mmagent.vocab import Vocab

GEOMETRY = GeometryConfig(patch_size=4, min_tokens=2, max_tokens=48)
PICTURE = encode_image(np.zeros((16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.train(["what stands there? word after word, line by line 0 1 2 3 4 5 6 7 8 9"], 300)


def weight(record: Record) -> int:
    """A size of our own: characters, and ten an image."""
    parts = record.parts or [part for message in record.messages for part in message.parts]
    return sum(len(part.text) if isinstance(part, Text) else 0 for part in parts) + 10 * len(record.images)


def told(record: Record) -> str:
    return "".join(part.text if isinstance(part, Text) else "@" for part in record.parts)


PARTS = st.lists(
    st.one_of(
        st.text("ab \n", max_size=300).map(Text),
        st.just(Image()),
        st.integers(1, 3).map(lambda frames: Video(tuple(map(float, range(frames))))),
    ),
    min_size=1,
    max_size=12,
)


@given(PARTS, st.integers(128, 300))  # a word is 128 characters at most
def test_an_interleaved_document_is_whole_in_its_pieces(parts, limit):
    count = sum(len(p.timestamps) if isinstance(p, Video) else isinstance(p, Image) for p in parts)
    images = tuple(encode_image(np.full((8, 8, 3), n, np.uint8)) for n in range(count))
    boxes = tuple(Region(n, (0.0, 0.0, 4.0, 4.0), str(n)) for n in range(count))
    record = Record("long", "s", parts=tuple(parts), images=images, boxes=boxes)
    pieces = split(record, lambda piece: weight(piece) <= limit)
    assert "".join(map(told, pieces)) == told(record)
    assert tuple(image for piece in pieces for image in piece.images) == images
    assert [region.label for piece in pieces for region in piece.boxes] == [str(n) for n in range(count)]
    assert [piece.key for piece in pieces] == [f"long#{n}" for n in range(len(pieces))]
    for piece in pieces:
        validate(piece)  # places and images agree, boxes lie on images that are there
        alone = len(piece.parts) == 1 and not isinstance(piece.parts[0], Text)
        assert weight(piece) <= limit or alone  # an image cannot be cut
    for piece, after in pairwise(pieces):
        if isinstance(after.parts[0], Image) and not any(isinstance(part, Text) for part in piece.parts):
            assert weight(piece) + 10 > limit  # it had no room there


TURNS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=8)


@given(TURNS, st.integers(20, 90), st.booleans())
def test_a_conversation_is_cut_before_turns_of_the_user(turns, limit, headed):
    messages: list[Message] = [Message("system", (Text("rules"),))] if headed else []
    for n, (replies, images, length) in enumerate(turns):
        messages.append(user(*[Image()] * images, f"{n}" * length))
        for reply in range(replies):
            messages += [assistant(f"{n}.{reply}")]
            messages += [user("more")] if reply + 1 < replies else []
    count = sum(images for _, images, _ in turns)
    images = tuple(encode_image(np.full((8, 8, 3), n, np.uint8)) for n in range(count))
    record = Record("talk", "s", tuple(messages), images=images)
    pieces = split(record, lambda piece: weight(piece) <= limit)
    rest = [message for piece in pieces for message in piece.messages[headed:]]
    assert [*messages[:headed], *rest] == messages
    assert all(piece.messages[0] == messages[0] for piece in pieces if headed)
    assert all(piece.messages[headed].role == "user" for piece in pieces)
    assert all(piece.messages[-1].role == "assistant" for piece in pieces)
    assert tuple(image for piece in pieces for image in piece.images) == images
    for piece in pieces:
        validate(piece)


def test_text_is_cut_on_the_largest_border_that_allows_it():
    def cut(text: str, limit: int) -> list[str]:
        return [told(piece) for piece in split(Record("t", "s", parts=(Text(text),)), lambda r: weight(r) <= limit)]

    paragraphs = "one two\nthree\n\nfour five\nsix\n\nseven"
    assert cut(paragraphs, 20) == ["one two\nthree\n\n", "four five\nsix\n\nseven"]
    assert cut(paragraphs, 14) == ["one two\n", "three\n\n", "four five\n", "six\n\nseven"]
    assert cut("aaaa bbbb cccc", 10) == ["aaaa bbbb ", "cccc"]
    assert cut("One. Two three", 9) == ["One. ", "Two three"]
    assert cut("看见。看见看见看见", 64) == ["看见。看见看见看见"]
    assert cut("x" * 400, 150) == ["x" * 128] * 2 + ["x" * 144]


def builder(vocab: Vocab, tokens: int, split_long: bool = True) -> DocumentBuilder:
    return DocumentBuilder(vocab, GEOMETRY, limit=Size(tokens, 400), split_long=split_long)


def test_documents_of_a_long_record_are_full_and_trained_once(vocab):
    parts: tuple[Part, ...] = ()
    for n in range(30):
        parts += (Text(f"line {n} by line {n}\n"), Image())
    record = Record("long", "s", parts=parts, images=(PICTURE,) * 30)
    with pytest.raises(RecordError, match=r"long: tokens: \d+ exceed the limit of 120"):
        builder(vocab, 120, split_long=False).drafts(record)
    drafts = builder(vocab, 120).drafts(record)
    assert len(drafts) > 3
    assert all(draft.size.tokens <= 120 for draft in drafts)
    assert all(draft.size.tokens > 120 - 40 for draft in drafts[:-1])  # 40: a line and its picture
    whole = DocumentBuilder(vocab, GEOMETRY).draft(record)
    assert sum(int(d.trainable.sum()) for d in drafts) == int(whole.trainable.sum())
    assert drafts[-1].input_ids[-1] == vocab.end_id
    assert drafts[-1].trainable[-1]
    assert not any((draft.input_ids == vocab.end_id).any() for draft in drafts[:-1]), "the text goes on"
    short = Record("short", "s", parts=(Text("word"),))
    assert [draft.record.key for draft in builder(vocab, 120).drafts(short)] == ["short"]


def test_a_turn_that_no_pack_can_hold_is_named(vocab):
    turns = (user("what?"), assistant("there"), user("line by line " * 40), assistant("word"))
    with pytest.raises(RecordError, match=r"^talk: tokens: \d+ exceed the limit of 60, by talk#1 alone"):
        builder(vocab, 60).drafts(Record("talk", "s", turns))


def test_pieces_in_which_nothing_is_trained_are_left_out(vocab):
    words = "word after word " * 6
    turns = (user(words), replace(assistant(words), trainable=False), user(words), assistant("there"))
    drafts = builder(vocab, 80).drafts(Record("talk", "s", turns))
    assert [draft.record.key for draft in drafts] == ["talk#1"]


def test_a_book_is_cut_in_little_more_than_the_time_it_takes_to_read(vocab):
    asked = 0

    def fits(piece: Record) -> bool:
        nonlocal asked
        asked += weight(piece)
        return weight(piece) <= 16_000

    text = "\n\n".join("word " * (n % 90) for n in range(1000))
    pieces = split(Record("book", "s", parts=(Text(text),)), fits)
    assert len(pieces) > 12
    assert asked < 40 * len(text)  # each piece is found by doubling and halving, not paragraph by paragraph
