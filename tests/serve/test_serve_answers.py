"""What clients of the API are told, over a real connection, by a policy that says what it is told to."""

from __future__ import annotations

import json

import openai
import pytest

from mmagent.chat import ChatConfig
from mmagent.trajectories import Limits, Trajectory
from tests.serve.serve_kit import END, VOCAB, ScriptedPolicy, ids_of, image_part, png_url, said, serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = ids_of(
    "\nI look.\n", "<tool_call>", "weather\n", "<arg_key>", "place", "</arg_key>", "\n", "<arg_value>", "Köln",
    "</arg_value>", "\n", "<arg_key>", "days", "</arg_key>", "\n", "<arg_value>", "3", "</arg_value>", "\n",
    "</tool_call>", "<|observation|>",
)  # fmt: skip
ANSWER = ids_of("\n", "The answer is ", "<|begin_of_box|>", "42 €", "<|end_of_box|>", " 🙂 \n", "<|user|>")
TEXT = "The answer is 42 € 🙂"


def client(port_url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=port_url + "/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def server():
    def script(prompt: Trajectory, limits: Limits) -> list[int]:
        text = VOCAB.decode(prompt.input_ids)
        return CALL if "Köln?" in text else ANSWER

    with serving(ScriptedPolicy(script, cached=5), context=2048) as running:
        yield running


def test_a_chat(server):
    answer = client(server.url).chat.completions.create(model="tiny", messages=said("Hello"), logprobs=True)
    (choice,) = answer.choices
    assert choice.message.content == TEXT
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    tokens = choice.logprobs.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == VOCAB.decode(ANSWER)
    assert [token.logprob for token in tokens] == [-0.25 * (n + 1) for n in range(len(ANSWER))]
    prompt = server.policy.prompts[-1]
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(ANSWER)
    assert answer.usage.total_tokens == len(prompt) + len(ANSWER)
    assert answer.usage.prompt_tokens_details.cached_tokens == 5
    assert answer.system_fingerprint == "policy-7"


def test_a_stream_adds_up_to_the_whole_and_ends_with_its_counts(server):
    chunks = list(
        client(server.url).chat.completions.create(
            model="tiny", messages=said("Hello"), stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    )
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(delta.delta.content or "" for delta in deltas) == TEXT
    assert len([delta for delta in deltas if delta.delta.content]) > 3, "in pieces"
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    told = [token.logprob for delta in deltas if delta.logprobs for token in delta.logprobs.content]
    assert told == [-0.25 * (n + 1) for n in range(len(ANSWER))]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(ANSWER)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_ends_with_done(server):
    status, headers, data = server.raw(
        "/v1/chat/completions", {"model": "tiny", "messages": said("Hello"), "stream": True}
    )
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = data.decode().split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in data.decode(), "unasked"


def test_tools(server):
    asked = [{"role": "user", "content": "Weather in Köln?"}]
    answer = client(server.url).chat.completions.create(model="tiny", messages=asked, tools=[WEATHER])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"place": "Köln", "days": 3}

    chunks = client(server.url).chat.completions.create(model="tiny", messages=asked, tools=[WEATHER], stream=True)
    deltas = [chunk.choices[0] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.delta.tool_calls or ()]
    assert [(c.index, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        (0, "weather", {"place": "Köln", "days": 3})
    ]
    assert deltas[-1].finish_reason == "tool_calls"

    # and the answer of the tool goes back in
    said_back = [
        *asked,
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "rain? Bonn"},
    ]
    server.chat(messages=said_back, tools=[WEATHER])
    prompt = VOCAB.decode(server.policy.prompts[-1].input_ids)
    assert "<tool_response>" in prompt
    assert "rain? Bonn" in prompt
    assert '"name": "weather"' in prompt
    assert "<arg_value>3</arg_value>" in prompt


def test_a_stream_tells_of_a_call_that_fits_no_tool_as_the_whole_does(server):
    _, whole = server.chat(messages=said("Köln?"))
    _, stream = server.chat(messages=said("Köln?"), stream=True)
    last = json.loads(stream.split("\n\n")[-3].removeprefix("data: "))
    assert last["choices"][0]["format_problem"] == whole["choices"][0]["format_problem"]


def test_what_was_called_and_is_no_tool_is_told_as_it_is(server):
    status, answer = server.chat(messages=said("Köln?"))
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"place": "Köln", "days": "3"}
    assert "none of the tools" in choice["format_problem"]
    status, answer = server.chat(messages=said("Köln?"), tools=[WEATHER], tool_choice="none")
    assert "# Tools" not in VOCAB.decode(server.policy.prompts[-1].input_ids)


def test_pictures_reach_the_policy_as_the_codec_would_show_them(server):
    from mmagent.geometry import patchify
    from mmagent.records import decode_image
    from tests.serve.serve_kit import GEOMETRY, png

    parts = [{"type": "text", "text": "left"}, image_part(png_url(1)), image_part(png_url(2, 200, 60)), "right"]
    status, answer = server.chat(messages=said(*parts))
    assert status == 200, answer
    prompt = server.policy.prompts[-1]
    assert len(prompt.images) == 2
    expected = patchify(decode_image(png(1), ""), GEOMETRY)
    assert prompt.images[0].grid == expected.grid
    assert (prompt.images[0].patches == expected.patches).all()
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_choices_seeds_and_limits_reach_the_policy(server):
    server.policy.limits.clear()
    status, answer = server.chat(
        n=3, seed=5, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, max_completion_tokens=9, stop=["x", "yz"]
    )
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert sorted(limits.seed for limits in server.policy.limits) == [5, 6, 7]
    limits = server.policy.limits[0]
    assert (limits.temperature, limits.top_p, limits.top_k, limits.min_p) == (0.5, 0.9, 4, 0.1)
    assert (limits.max_tokens, limits.stop_strings, limits.stop_ids) == (9, ("x", "yz"), VOCAB.stop_ids)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert "format_problem" not in answer["choices"][0], "a cut answer is no malformed one"
    assert answer["usage"]["prompt_tokens"] == len(server.policy.prompts[-1]), "once for all choices"
    server.chat()
    assert server.policy.limits[-1].max_tokens == 2048 - len(server.policy.prompts[-1]), "what the context leaves"


def test_choices_of_a_stream_keep_their_numbers(server):
    chunks = list(client(server.url).chat.completions.create(model="tiny", messages=said("Hi"), n=3, stream=True))
    texts = {n: "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == n) for n in range(3)}
    assert texts == dict.fromkeys(range(3), TEXT)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_not_told(server, stream):
    status, _, data = server.raw(
        "/v1/chat/completions",
        {"model": "tiny", "messages": said("Hello"), "stop": ["wer is", "zz"], "stream": stream},
    )
    assert status == 200
    if stream:
        events = [json.loads(line[6:]) for line in data.decode().split("\n\n") if line.startswith("data: {")]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        text = json.loads(data)["choices"][0]["message"]["content"]
    assert text == "The ans"


def test_thoughts_stand_apart():
    ids = ids_of("I think ", "therefore\n", "</think>", "\nI am", "<|user|>")
    with serving(ScriptedPolicy(ids), chat=ChatConfig(thinking=True)) as server:
        answer = client(server.url).chat.completions.create(model="tiny", messages=said("Hello"))
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("I think therefore", "I am")
        assert answer.usage.completion_tokens_details.reasoning_tokens == ids.index(VOCAB.id("</think>")) + 1
        chunks = list(client(server.url).chat.completions.create(model="tiny", messages=said("Hi"), stream=True))
        thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks)
        assert thought == "I think therefore"
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "I am"
        # asked without thoughts: the prompt closes them, and the answer is read without
        server.policy.script = ids_of("\nNo thought", "<|user|>")
        status, said_now = server.chat(chat_template_kwargs={"enable_thinking": False})
        assert status == 200
        assert said_now["choices"][0]["message"]["content"] == "No thought"
        assert VOCAB.decode(server.policy.prompts[-1].input_ids[-2:]) == "<think></think>"


def test_texts_and_ids_are_continued(server):
    answer = client(server.url).completions.create(
        model="tiny", prompt="Once", max_tokens=64, logprobs=0, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert choice.text == "\nThe answer is 42 € 🙂 \n", "as it is, but for control tokens"
    assert choice.finish_reason == "stop"
    assert choice.token_ids == ANSWER
    assert choice.prompt_token_ids == ids_of("[gMASK]", "<sop>", "Once")
    assert choice.logprobs.token_logprobs == [-0.25 * (n + 1) for n in range(len(ANSWER))]
    assert len(choice.logprobs.text_offset) == len(ANSWER)

    ids = ids_of("[gMASK]", "<sop>", "<|user|>", "a")
    answer = client(server.url).completions.create(model="tiny", prompt=ids)
    assert server.policy.prompts[-1].input_ids == ids, "ids are taken as they are"
    assert server.policy.limits[-1].max_tokens == 16, "OpenAI's own default"

    answer = client(server.url).completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=64)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    chunks = client(server.url).completions.create(model="tiny", prompt="Once", max_tokens=64, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_token_ids_in_and_out(server):
    asked = {"input_ids": ids_of("[gMASK]", "<sop>", "a"), "return_logprob": True, "rid": "mine"}
    status, answer = server.ask("/generate", asked | {"sampling_params": {"max_new_tokens": 64, "temperature": 0}})
    assert status == 200, answer
    assert answer["output_ids"] == ANSWER
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "stop", "matched": END}
    assert [pair[:2] for pair in meta["output_token_logprobs"]] == [[-0.25 * (n + 1), i] for n, i in enumerate(ANSWER)]
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, len(ANSWER), 5)
    assert meta["policy_versions"] == [7]
    status, answer = server.ask("/generate", asked | {"sampling_params": {"max_new_tokens": 2}})
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    stopping = {"max_new_tokens": 64, "stop_token_ids": [ANSWER[3]], "ignore_eos": True, "sampling_seed": 9}
    status, answer = server.ask("/generate", asked | {"sampling_params": stopping})
    assert answer["output_ids"] == ANSWER[:4]
    assert server.policy.limits[-1].stop_ids == (ANSWER[3],)
    assert server.policy.limits[-1].seed == 9


def test_pictures_beside_token_ids(server):
    one = ids_of("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
    status, answer = server.ask("/generate", {"input_ids": [*one, *one], "image_data": [png_url(1), png_url(2)]})
    assert status == 200, answer
    whole = list(server.policy.prompts[-1].input_ids)
    assert whole.count(VOCAB.image_id) == 2 * 12, "one place becomes all of the picture"
    status, answer = server.ask("/generate", {"input_ids": whole, "image_data": [png_url(1), png_url(2)]})
    assert server.policy.prompts[-1].input_ids == whole
    status, answer = server.ask("/generate", {"input_ids": whole[:-2], "image_data": [png_url(1), png_url(2)]})
    assert status == 400
    assert "23 image ids for 2 pictures of 24 visual tokens" in answer["error"]["message"]


def test_models_health_figures_and_the_page(server):
    names = [model.id for model in client(server.url).models.list()]
    assert names == ["tiny"]
    assert client(server.url).models.retrieve("tiny").max_model_len == 2048
    server.chat()
    status, health = server.ask("/health", None, "GET")
    assert status == 200
    assert health["status"] == "ready"
    assert health["tokens_served"] >= len(ANSWER)
    assert health["policy_version"] == 7
    status, text = server.ask("/metrics", None, "GET")
    assert 'mmagent_requests_total{status="200"}' in text
    assert "mmagent_tokens_total" in text
    status, headers, page = server.raw("/", None, "GET")
    assert status == 200
    assert headers["refresh"]
    assert b"tokens a second" in page
    assert b"http://" not in page.replace(b"http://www.w3.org", b""), "it needs nothing from anywhere"


def test_a_completion_that_a_watchdog_gave_up_is_an_error():
    with serving(ScriptedPolicy(ANSWER, reason="sick")) as server:
        status, answer = server.chat()
        assert (status, answer["error"]["code"]) == (500, "sick")
        with pytest.raises(openai.APIError, match="watchdog"):
            list(client(server.url).chat.completions.create(model="tiny", messages=said("Hi"), stream=True))
