"""The chat renderer: append-only, a mask that supervises turns and their ends, and the released formats."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer

from mmagent.chat import (
    Box,
    ChatConfig,
    Generation,
    Image,
    Message,
    Part,
    Text,
    Thinking,
    Tool,
    ToolCall,
    Video,
    assistant,
    completion_text,
    observation,
    render,
    render_parts,
    turn_opening,
    user,
)
from mmagent.vocab import SPECIAL_TOKENS, Vocab

VOCAB = Vocab.train(["click the button type hello"], 320)
CONTROL = {VOCAB.id(token): token for token in SPECIAL_TOKENS}

words = st.text(st.sampled_from("ab c\n<|think>"), max_size=8)
thoughts = st.text(st.sampled_from("xyz "), max_size=6)
calls = st.builds(ToolCall, st.just("click"), st.dictionaries(st.sampled_from(["x", "y"]), words, max_size=2))
listening = st.lists(st.one_of(words.map(Text), st.just(Image()), st.just(Video((0.0, 1.5)))), max_size=3).map(tuple)
configs = st.builds(ChatConfig, st.sampled_from(Generation), st.booleans(), st.booleans())


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Turns in an order that the renderer accepts; may end anywhere."""
    messages = [Message("system", (Text(draw(words)),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(listening)))
        for _ in range(draw(st.integers(0, 2))):
            spoken: list[Part] = [Text(draw(words)), *draw(st.lists(calls, min_size=1, max_size=2))]
            messages.append(Message("assistant", (Thinking(draw(thoughts)), *spoken), draw(st.booleans())))
            for _ in range(draw(st.integers(1, 2))):
                messages.append(Message("observation", draw(listening)))
        messages.append(Message("assistant", (Thinking(draw(thoughts)), Text(draw(words))), draw(st.booleans())))
    return messages[: draw(st.integers(1, len(messages)))]


def image_counts(messages: list[Message]) -> list[int]:
    places = [
        1 if isinstance(part, Image) else len(part.timestamps)
        for message in messages
        for part in message.parts
        if isinstance(part, Image | Video)
    ]
    return [n % 3 + 1 for n in range(sum(places))]


def names(ids: list[int]) -> list[str]:
    return [CONTROL.get(i, "text") for i in ids]


@given(conversations(), configs)
def test_rendering_is_append_only(messages, config):
    whole = render(messages, VOCAB, image_counts(messages), config)
    for end in range(1, len(messages)):
        if config.thinking and not config.preserve_thinking and any(m.role == "user" for m in messages[end:]):
            continue  # a new user turn collapses earlier thoughts, as the released templates do
        part = render(messages[:end], VOCAB, image_counts(messages[:end]), config)
        assert whole.ids[: len(part.ids)] == part.ids
        assert whole.trainable[: len(part.ids)] == part.trainable


@given(conversations(), configs)
def test_generation_starts_where_training_continues(messages, config):
    """What the policy is shown is what it was trained on: ids up to the completion, bit for bit."""
    for n, message in enumerate(messages):
        if message.role == "assistant" and n == len(messages) - 1:
            shown = render(messages[:n], VOCAB, image_counts(messages[:n]), config, generate=True)
            trained = render(messages, VOCAB, image_counts(messages), config)
            assert trained.ids[: len(shown.ids)] == shown.ids
            assert not any(shown.trainable[len(shown.ids) - len(turn_opening(VOCAB, config)) :])
            assert shown.ids[-len(turn_opening(VOCAB, config)) :] == turn_opening(VOCAB, config)


@given(conversations(), configs)
def test_the_mask_supervises_whole_assistant_turns_with_their_end(messages, config):
    rendered = render(messages, VOCAB, image_counts(messages), config)
    spans: list[tuple[str, int, list[int]]] = []  # role, its token's place, places of its content
    for at, name in enumerate(names(rendered.ids)):
        if name in ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"):
            spans.append((name[2:-2], at, []))
        elif spans:
            spans[-1][2].append(at)
    turns = iter([m for m in messages if m.role == "assistant"])
    before: Message | None = None
    for role, at, content in spans:
        assert rendered.trainable[at] == (before is not None and before.trainable)
        before = None
        if role != "assistant":
            assert not any(rendered.trainable[place] for place in content)
            continue
        before = next(turns)
        closed = next(place for place in content if rendered.ids[place] == VOCAB.id("</think>"))
        answer = [place for place in content if place > closed]
        assert all(rendered.trainable[place] == before.trainable for place in answer)
        for place in content:
            if rendered.ids[place] == VOCAB.id("<think>"):
                assert not rendered.trainable[place]
    assert not rendered.trainable[0]
    assert not any(t for i, t in zip(rendered.ids, rendered.trainable, strict=True) if i == VOCAB.image_id)


def test_the_end_of_a_turn_is_the_next_role_and_is_supervised():
    talk = render([user("q"), assistant("a")], VOCAB)
    assert (names(talk.ids)[-1], talk.trainable[-1]) == ("<|user|>", True)
    call = render([user("q"), assistant(ToolCall("go", {}))], VOCAB)
    assert (names(call.ids)[-1], call.trainable[-1]) == ("<|observation|>", True)
    context = render([user("q"), assistant("bad", trainable=False)], VOCAB)
    assert not any(context.trainable)
    asked = render([user("q")], VOCAB)
    assert names(asked.ids)[-1] != "<|user|>"


@given(st.lists(words, min_size=1, max_size=4))
@settings(max_examples=30)
def test_tool_content_as_text_or_as_a_list_of_texts_is_the_same(texts):
    before = [user("q"), assistant(ToolCall("go", {}))]
    assert (
        render([*before, observation("\n".join(texts))], VOCAB).ids == render([*before, observation(*texts)], VOCAB).ids
    )


def test_a_tool_answer_keeps_its_images():
    before = [user("q"), assistant(ToolCall("shot", {}))]
    rendered = render([*before, observation("screen", Image(), "done")], VOCAB, [3])
    assert rendered.ids.count(VOCAB.image_id) == 3
    assert not any(rendered.trainable[rendered.ids.index(VOCAB.id("<|begin_of_image|>")) :])


def test_thoughts_before_the_last_user_turn_collapse_unless_preserved():
    messages = [user("a"), assistant(Thinking("old"), "b"), user("c"), assistant(Thinking("new"), "d")]
    short = VOCAB.decode(render(messages, VOCAB, config=ChatConfig(thinking=True)).ids)
    assert "old" not in short
    assert "<think>new</think>" in short
    full = VOCAB.decode(render(messages, VOCAB, config=ChatConfig(thinking=True, preserve_thinking=True)).ids)
    assert "<think>old</think>" in full
    agentic = [user("a"), assistant(Thinking("plan"), ToolCall("go", {})), observation("ok"), assistant("done")]
    assert "<think>plan</think>" in VOCAB.decode(render(agentic, VOCAB, config=ChatConfig(thinking=True)).ids)
    off = VOCAB.decode(render(messages, VOCAB, config=ChatConfig(thinking=False)).ids)
    assert "new" not in off
    assert off.count("/nothink") == 2


# The released formats, written down independently as templates for strings. Roles stand before a newline in GLM-4.5
# and before nothing in GLM-4.7, whose answers without thoughts have the closing mark only.
FORMATS = {
    Generation.GLM45: """[gMASK]<sop>{% for m in messages %}
{% if m.role == 'observation' %}{% if loop.previtem.role != 'observation' %}<|observation|>{% endif %}

<tool_response>
{{ m.text }}
</tool_response>{% elif m.role == 'assistant' %}<|assistant|>
{{- '\n<think>' ~ (m.thought.strip() if thinking and loop.index0 > last_user else '') ~ '</think>' }}
{%- if m.text.strip() %}{{ '\n' ~ m.text.strip() }}{% endif %}
{%- for call in m.calls %}{{ '\n<tool_call>' ~ call.name ~ '\n' }}
{%- for k, v in call.arguments.items() %}
{{- '<arg_key>' ~ k ~ '</arg_key>\n<arg_value>' ~ v ~ '</arg_value>\n' }}
{%- endfor %}</tool_call>{% endfor %}
{% else %}<|{{ m.role }}|>
{{- '\n' ~ m.text }}{% if m.role == 'user' and not thinking %}/nothink{% endif %}
{% endif %}
{%- endfor %}{% if generate %}<|assistant|>{{ '\n<think>' if thinking else '\n<think></think>' }}{% endif %}""",
    Generation.GLM47: """[gMASK]<sop>{% for m in messages %}
{% if m.role == 'observation' %}{% if loop.previtem.role != 'observation' %}<|observation|>{% endif %}
<tool_response>{{ m.text }}</tool_response>{% elif m.role == 'assistant' %}<|assistant|>
{%- if thinking and loop.index0 > last_user %}<think>{{ m.thought.strip() }}{% endif %}</think>{{ m.text.strip() }}
{%- for call in m.calls %}<tool_call>{{ call.name }}
{%- for k, v in call.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>
{%- endfor %}</tool_call>{% endfor %}
{% else %}<|{{ m.role }}|>{{ m.text }}{% endif %}
{%- endfor %}{% if generate %}<|assistant|>{{ '<think>' if thinking else '</think>' }}{% endif %}""",
}


@given(conversations(), st.sampled_from(Generation), st.booleans(), st.booleans())
@settings(deadline=None)
def test_ids_are_those_of_the_released_format(messages, generation, thinking, generate):
    messages = [
        Message(m.role, tuple(_without_marks(p) for p in m.parts if not isinstance(p, Image | Video)), m.trainable)
        for m in messages
    ]
    generate = generate and messages[-1].role in ("user", "observation")
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(FORMATS[generation])
    text = template.render(
        messages=[
            {
                "role": m.role,
                "text": "\n".join(
                    p.text.strip() if m.role == "assistant" else p.text for p in m.parts if isinstance(p, Text)
                ),
                "thought": "".join(p.text for p in m.parts if isinstance(p, Thinking)),
                "calls": [p for p in m.parts if isinstance(p, ToolCall)],
            }
            for m in messages
        ],
        last_user=max((n for n, m in enumerate(messages) if m.role == "user"), default=-1),
        thinking=thinking,
        generate=generate,
    )
    ours = render(messages, VOCAB, config=ChatConfig(generation, thinking), generate=generate).ids
    if messages[-1].role == "assistant":
        ours = ours[:-1]  # the closing role token, which a template writes with the next turn
    assert ours == Tokenizer.from_str(VOCAB.definition).encode(text, add_special_tokens=False).ids


def _without_marks(part: Part) -> Part:
    """A template for strings reads marks spelled in text as control; ours does not, so they are left out here."""
    match part:
        case Text(text):
            return Text(text.replace("<", "").replace("|", ""))
        case ToolCall(name, arguments):
            return ToolCall(name, {k: v.replace("<", "").replace("|", "") for k, v in arguments.items()})
    return part


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([user("q"), Message("system", (Text("s"),))], "message 1: a system message must come first"),
        ([user("q"), observation("o")], "message 1: an observation must follow a tool call"),
        ([user("q"), assistant(ToolCall("f", {})), user("r")], "message 2: a tool call must be answered"),
        ([assistant("a")], "message 0: an assistant turn must follow"),
        ([user("q"), assistant("a"), assistant("b")], "message 2: an assistant turn must follow"),
    ],
)
def test_turns_out_of_order_are_refused(messages, problem):
    with pytest.raises(ValueError, match=problem):
        render(messages, VOCAB)


def test_what_a_role_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="role 'bot' is none of"):
        Message("bot", ())
    with pytest.raises(ValueError, match="ToolCall in a user message"):
        user(ToolCall("f", {}))
    with pytest.raises(ValueError, match="Image in a assistant message"):
        assistant(Image())
    with pytest.raises(ValueError, match="generate: the conversation must end with a user"):
        render([user("q"), assistant("a")], VOCAB, generate=True)
    with pytest.raises(ValueError, match="Thinking can only stand in an assistant turn"):
        render_parts([Thinking("x")], VOCAB)


def test_images_and_counts_must_agree():
    with pytest.raises(ValueError, match="more images in the conversation than counts"):
        render([user(Image(), Image())], VOCAB, [2])
    with pytest.raises(ValueError, match="3 given, 1 images"):
        render([user(Image())], VOCAB, [2, 2, 2])
    with pytest.raises(ValueError, match="2 given, 1 images"):
        render_parts([Image()], VOCAB, [2, 2])


def test_the_visible_answer_of_a_completion():
    ids = [*VOCAB.encode("hidden"), VOCAB.id("</think>"), *VOCAB.encode("\nclick(1)"), VOCAB.id("<|user|>")]
    assert completion_text(ids, VOCAB) == "click(1)"
    assert completion_text([*VOCAB.encode(" click(2) "), VOCAB.id("<|endoftext|>")], VOCAB) == "click(2)"


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Text("a\ud83d"), r"text: U\+D83D at character 1 is half of a surrogate"),
        (lambda: Text(b"bytes"), "text must be text, got bytes"),
        (lambda: Thinking("\udc00"), r"thinking: U\+DC00"),
        (lambda: Box("\udc00"), r"box: U\+DC00"),
        (lambda: ToolCall("f", {"x": "\ud83d"}), r"tool call 'f': argument 'x': U\+D83D"),
        (lambda: Tool('{"name": "f", "description": "\\ud83d"}'), r"tool 'f': U\+D83D"),
        (lambda: Tool('{"name": "f\\n"}'), "must be one line"),
        (lambda: Tool('{"name": "f", "parameters": []}'), "tool 'f': parameters must be dict"),
        (lambda: Tool('{"name": "f", "description": 3}'), "tool 'f': description must be str"),
        (lambda: Tool('{"name": "f", "name": "g"}'), "must be JSON: 'name' is said twice"),
        (lambda: Tool("[" * 100_000), "must be JSON: lists and objects stand in each other too deep"),
        (lambda: user("q", "a\ud83d"), r"a user message: text: U\+D83D at character 1"),
        (lambda: observation("\ud83d"), r"a observation message: text: U\+D83D"),
        (lambda: assistant("\ud83d"), r"a assistant message: text: U\+D83D"),
        (lambda: Message("user", ("a\ud83d",)), r"a user message: 'a\\ud83d' is no part; texts are Text"),
        (lambda: user(3), "a user message: 3 is no part"),
        (lambda: ToolCall("f", None), "a tool call is a name and a mapping, got 'f' and None"),
        (lambda: ToolCall(3, {}), "a tool call is a name and a mapping, got 3"),
    ],
)
def test_what_no_tokenizer_takes_is_refused_where_it_is_made(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


def test_half_a_character_that_came_in_later_is_no_accident_of_the_tokenizer():
    """A call's arguments can be changed behind its back; captions come without messages."""
    arguments = {"x": "1"}
    talk = [user("q"), assistant(ToolCall("f", arguments))]
    for text in ("a\ud83d", "a\ud83d" * 99):
        arguments["x"] = text
        for encode in (lambda: render(talk, VOCAB), lambda text=text: VOCAB.caption_ids(text, 9)):
            with pytest.raises(ValueError, match=r"no text that can be encoded: 'a\\ud83d"):
                encode()
