"""The vocabulary: text in, the same text out, and never a control id from text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmagent.vocab import NEVER_SAMPLED, SPECIAL_TOKENS, STOP_TOKENS, Vocab
from tests.chat_kit import RELEASED, released_tokenizer

VOCAB = Vocab.train(["the quick brown fox clicks the button at 123 456", "<div class='a'>x</div>"] * 3, 400)
CONTROL = {VOCAB.id(token) for token in SPECIAL_TOKENS}

anything = st.text(st.characters(exclude_categories=["Cs"]))
spiced = st.lists(st.one_of(anything, st.sampled_from(SPECIAL_TOKENS))).map("".join)


@given(spiced)
def test_text_survives_the_round_trip(text):
    assert VOCAB.decode(VOCAB.encode(text)) == text


@given(spiced)
def test_text_never_becomes_control(text):
    assert not CONTROL & set(VOCAB.encode(text))


def test_every_control_token_spelled_out_stays_text():
    full = Tokenizer.from_str(VOCAB.definition)
    for token in SPECIAL_TOKENS:
        assert full.encode(token, add_special_tokens=False).ids == [VOCAB.id(token)]  # what an ordinary reader does
        assert VOCAB.decode(VOCAB.encode(token)) == token
        assert len(VOCAB.encode(token)) > 1


@given(st.lists(st.one_of(anything, st.sampled_from(SPECIAL_TOKENS)), max_size=6))
def test_control_ids_decode_by_name_or_are_left_out(pieces):
    ids, shown, plain = [], "", ""
    for piece in pieces:
        if piece in SPECIAL_TOKENS:
            ids.append(VOCAB.id(piece))
            shown += piece
        else:
            ids += VOCAB.encode(piece)
            shown, plain = shown + piece, plain + piece
    assert VOCAB.decode(ids) == shown
    assert VOCAB.decode(ids, control=False) == plain


def test_numbers_are_spelled_digit_by_digit():
    assert len(VOCAB.encode("123")) == len(VOCAB.encode("987")) == 3
    assert set(VOCAB.encode("12")) < set(VOCAB.encode("123"))


def test_ids_lie_within_size_and_are_distinct():
    assert len(CONTROL) == len(SPECIAL_TOKENS)
    assert max(CONTROL) == VOCAB.size - 1 < 400
    assert VOCAB.end_id == VOCAB.id("<|endoftext|>")
    assert VOCAB.pad_id in VOCAB.never_sampled
    assert VOCAB.image_id == VOCAB.id("<|image|>")
    assert VOCAB.stop_ids == tuple(VOCAB.id(token) for token in STOP_TOKENS)
    assert VOCAB.never_sampled == tuple(VOCAB.id(token) for token in NEVER_SAMPLED)
    assert not set(VOCAB.stop_ids) & set(VOCAB.never_sampled)
    assert VOCAB.image_id in VOCAB.never_sampled


def test_save_and_load_agree(tmp_path):
    VOCAB.save(tmp_path)
    VOCAB.save(tmp_path / "again.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "again.json"):
        again = Vocab.load(path)
        assert again.size == VOCAB.size
        assert again.encode("the fox <|image|> 42") == VOCAB.encode("the fox <|image|> 42")
        assert [again.id(token) for token in SPECIAL_TOKENS] == [VOCAB.id(token) for token in SPECIAL_TOKENS]


def test_training_is_deterministic():
    texts = ["alpha beta gamma", "beta gamma delta"] * 5
    assert Vocab.train(texts, 330).definition == Vocab.train(texts, 330).definition


def test_errors_name_the_problem(tmp_path):
    with pytest.raises(ValueError, match="size 284 is below the 285"):
        Vocab.train(["x"], 284)
    with pytest.raises(ValueError, match="no tokenizer at"):
        Vocab.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'<tool>' is not a control token"):
        VOCAB.id("<tool>")
    parsed = json.loads(VOCAB.definition)
    parsed["added_tokens"] = [token for token in parsed["added_tokens"] if token["content"] != "<think>"]
    with pytest.raises(ValueError, match=r"lacks the control tokens \['<think>'\]"):
        Vocab(json.dumps(parsed))


def test_a_released_layout_loads(tmp_path):
    """All tokens we rely on are there, under other ids than ours; the rest is control, too, and not reached by text."""
    (tmp_path / "tokenizer.json").write_text(released_tokenizer(), encoding="utf-8")
    vocab, first = Vocab.load(tmp_path), json.loads(released_tokenizer())["added_tokens"][0]["id"]
    assert set(SPECIAL_TOKENS) < set(RELEASED) == set(vocab.control_tokens)
    assert [vocab.id(token) for token in RELEASED] == list(range(first, first + 36))
    assert [VOCAB.id(token) - VOCAB.id("<|endoftext|>") for token in SPECIAL_TOKENS] != [
        vocab.id(token) - first for token in SPECIAL_TOKENS
    ]
    assert (vocab.image_id, vocab.id("<|video|>"), vocab.size) == (first + 34, first + 35, first + 36)
    assert vocab.stop_ids == (first, first + 7, first + 9)
    assert set(vocab.barred(vocab.size + 28)) >= {first + 34, first + 35, vocab.pad_id, *range(first + 36, first + 64)}
    for token in RELEASED:
        ids = vocab.encode(f"a {token}\n\nb")
        assert not any(vocab.is_control(i) for i in ids)
        assert vocab.decode(ids) == f"a {token}\n\nb"


def test_a_tokenizer_whose_words_are_control_tokens_is_refused():
    """There a user's text could be tokenised into control, whatever is removed from the list of added tokens."""
    parsed = json.loads(VOCAB.definition)
    parsed["model"]["vocab"]["<think>"] = VOCAB.id("<think>")
    with pytest.raises(ValueError, match=r"\['<think>'\] are words of the model's own vocabulary"):
        Vocab(json.dumps(parsed))


def test_ids_of_short_texts_are_nobodys_to_change():
    vocab = Vocab.train(["ab abc abcd"], 300)
    first = vocab.encode("ab")
    first.append(7)
    assert vocab.encode("ab") == first[:-1]
