"""One contract for every server of tokens, played by stand-ins that speak its protocol: what is asked, what is
believed, what is tried again, what a caller who leaves leaves behind, and whose weights a completion came from."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmagent.generation.http_sglang import SGLangPolicy
from mmagent.generation.http_transport import EndpointRefused, EndpointUnavailable
from mmagent.generation.http_vllm import VLLMCompletionsPolicy, VLLMPolicy
from mmagent.generation.token_endpoints import TokenPolicy, TokenServerConfig
from mmagent.geometry import patchify, unpatchify
from mmagent.trajectories import Completion, Limits, Trajectory
from tests.agent_kit import GEOMETRY, picture, prompt, tiny_vocab
from tests.token_servers import (
    EXPERTS,
    LAYERS,
    ROWS,
    Mended,
    SGLangServer,
    Status,
    TokenServer,
    VLLMServer,
    experts_of,
    next_token,
    running,
    waited,
)

VOCAB = tiny_vocab()
STOPS = VOCAB.stop_ids
IMPOSSIBLE = VOCAB.image_id


class SGLangDoor:
    """How to bend one protocol's answers."""

    server, policy, path, seed = SGLangServer, SGLangPolicy, "/generate", "sampling_seed"
    straddled = (0, 1)  # whose weights they were, is not told

    def sampling(self, body: dict[str, Any]) -> dict[str, Any]:
        return body["sampling_params"]

    def pictures(self, server: TokenServer) -> list[str]:
        return server.sampled(self.path)[-1]["image_data"]

    def asking(self, server: TokenServer, most: int) -> dict[str, Any]:
        body = server.sampled(self.path)[-1]
        return body | {"sampling_params": body["sampling_params"] | {"max_new_tokens": most}}

    def ended(self, server: TokenServer) -> None:
        assert server.aborted == [server.sampled(self.path)[-1]["rid"]]

    def lose_experts(self, answer: dict[str, Any]) -> None:
        answer["meta_info"].pop("routed_experts")

    def set_id(self, answer: dict[str, Any], place: int, value: Any) -> None:
        answer["output_ids"][place] = answer["meta_info"]["output_token_logprobs"][place][1] = value

    def set_logprob(self, answer: dict[str, Any], place: int, value: Any) -> None:
        answer["meta_info"]["output_token_logprobs"][place][0] = value

    def set_prompt_tokens(self, answer: dict[str, Any], count: int) -> None:
        answer["meta_info"]["prompt_tokens"] = count

    def set_reason(self, answer: dict[str, Any], reason: str, matched: Any = None) -> None:
        answer["meta_info"]["finish_reason"] = {"type": reason, "matched": matched}

    def lose_logprob(self, answer: dict[str, Any]) -> None:
        answer["meta_info"]["output_token_logprobs"].pop()

    def lose_everything(self, answer: dict[str, Any]) -> None:
        answer.pop("meta_info")


class VLLMDoor:
    """The same of vLLM's."""

    server, policy, path, seed = VLLMServer, VLLMPolicy, "/inference/v1/generate", "seed"
    straddled = (1,)  # as it tells: the stand-in samples when the gate opens

    def sampling(self, body: dict[str, Any]) -> dict[str, Any]:
        return body["sampling_params"]

    def pictures(self, server: TokenServer) -> list[str]:
        return [part["url"] for part in server.sampled(self.path)[-1]["content_parts"]]

    def asking(self, server: TokenServer, most: int) -> dict[str, Any]:
        body = server.sampled(self.path)[-1]
        return body | {"sampling_params": body["sampling_params"] | {"max_tokens": most}}

    def ended(self, server: TokenServer) -> None:
        """A connection that closes is enough."""

    def lose_experts(self, answer: dict[str, Any]) -> None:
        answer["choices"][0]["routed_experts"] = None

    def set_id(self, answer: dict[str, Any], place: int, value: Any) -> None:
        choice = answer["choices"][0]
        choice["token_ids"][place] = choice["logprobs"]["content"][place]["token_id"] = value

    def set_logprob(self, answer: dict[str, Any], place: int, value: Any) -> None:
        answer["choices"][0]["logprobs"]["content"][place]["logprob"] = value

    def set_prompt_tokens(self, answer: dict[str, Any], count: int) -> None:
        answer["usage"]["prompt_tokens"] = count

    def set_reason(self, answer: dict[str, Any], reason: str, matched: Any = None) -> None:
        answer["choices"][0] |= {"finish_reason": reason, "stop_reason": matched}

    def lose_logprob(self, answer: dict[str, Any]) -> None:
        answer["choices"][0]["logprobs"]["content"].pop()

    def lose_everything(self, answer: dict[str, Any]) -> None:
        answer.pop("choices")


class CompletionsDoor(VLLMDoor):
    """Its older endpoint, for text."""

    policy, path, straddled = VLLMCompletionsPolicy, "/v1/completions", (0, 1)

    def sampling(self, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def asking(self, server: TokenServer, most: int) -> dict[str, Any]:
        return server.sampled(self.path)[-1] | {"max_tokens": most}

    def set_id(self, answer: dict[str, Any], place: int, value: Any) -> None:
        choice = answer["choices"][0]
        choice["token_ids"][place], choice["logprobs"]["tokens"][place] = value, f"token_id:{value}"

    def set_logprob(self, answer: dict[str, Any], place: int, value: Any) -> None:
        answer["choices"][0]["logprobs"]["token_logprobs"][place] = value

    def lose_logprob(self, answer: dict[str, Any]) -> None:
        answer["choices"][0]["logprobs"]["tokens"].pop()


DOORS = [SGLangDoor(), VLLMDoor(), CompletionsDoor()]


@pytest.fixture(params=DOORS, ids=lambda door: door.policy.__name__)
def door(request) -> Any:
    return request.param


@pytest.fixture
def server(door) -> Iterator[TokenServer]:
    with running(door.server()) as made:
        yield made


@pytest.fixture
def policy(door, server) -> TokenPolicy:
    return policy_of(door, server)


def policy_of(door: Any, server: TokenServer, version: int = 0, **settings) -> TokenPolicy:
    config = TokenServerConfig(server.url, "served", **({"backoff": 0.001, "rehearse": False} | settings))
    return door.policy(config, VOCAB, GEOMETRY, ROWS, version)


def wanted(row: Trajectory, count: int, seed: int = 0, weights: int = 0) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    logprobs: list[float] = []
    for _ in range(count):
        index, logprob = next_token([*row.input_ids, *ids], weights, seed)
        ids.append(index)
        logprobs.append(logprob)
    return ids, logprobs


def complete(policy: TokenPolicy, row: Trajectory, limits: Limits) -> Completion:
    return asyncio.run(policy.complete(row, limits))


def test_ids_in_and_ids_and_log_probs_out(door, server, policy):
    row = prompt("what is there?")
    done = complete(policy, row, Limits(9, seed=5))
    assert (list(done.ids), list(done.logprobs)) == wanted(row, 9, seed=5)
    assert (done.stopped, done.reason, done.versions) == (False, "length", (0,))


def test_a_stop_id_ends_it_and_is_included(door, server, policy):
    server.stop_after = 4
    done = complete(policy, prompt("x"), Limits(9, stop_ids=STOPS))
    assert (len(done.ids), done.ids[-1]) == (5, STOPS[0])
    assert (done.stopped, done.reason) == (True, "stop")
    done = complete(policy, prompt("x"), Limits(5, stop_ids=STOPS))  # as the last that fits
    assert (done.stopped, done.reason) == (True, "stop")


def test_pictures_arrive_as_the_policy_sees_them(door, server, policy):
    if door.policy is VLLMCompletionsPolicy:
        with pytest.raises(ValueError, match="takes no pictures"):
            complete(policy, prompt("x", (picture(1),)), Limits(2))
        return
    pictures = (picture(1), picture(2, 140, 84))
    row = prompt("what changed?", pictures)
    done = complete(policy, row, Limits(6))
    assert list(done.ids) == wanted(row, 6)[0]
    for url, image in zip(door.pictures(server), pictures, strict=True):
        pixels = np.asarray(PILImage.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
        torch.testing.assert_close(patchify(pixels, GEOMETRY).patches, image.patches)
        np.testing.assert_array_equal(pixels, unpatchify(image, GEOMETRY))


def test_what_cannot_be_sampled_is_told_to_the_server(door, server, policy):
    complete(policy, prompt("x"), Limits(2))
    biased = door.sampling(server.sampled(door.path)[0])["logit_bias"]
    assert {int(index) for index in biased} == set(VOCAB.barred(ROWS))
    assert max(biased.values()) <= -100


@pytest.mark.parametrize("limits", [Limits(3, temperature=0.0), Limits(3, temperature=0.7, seed=2**40 + 3)])
def test_how_it_is_sampled_is_told(door, server, policy, limits):
    complete(policy, prompt("x"), limits)
    asked = door.sampling(server.sampled(door.path)[0])
    assert asked["temperature"] == limits.temperature
    assert asked[door.seed] == limits.seed % 2**31


@pytest.mark.parametrize(
    "bend, said",
    [
        (lambda door, a: door.set_id(a, 1, IMPOSSIBLE), "none that can be"),
        (lambda door, a: door.set_id(a, 1, ROWS), "none that can be"),
        (lambda door, a: door.set_id(a, 1, -1), "none that can be"),
        (lambda door, a: door.set_id(a, 1, True), "none that can be"),
        (lambda door, a: door.set_id(a, 1, STOPS[0]), "behind the stop id"),
        (lambda door, a: door.set_logprob(a, 2, math.nan), "log-prob nan"),
        (lambda door, a: door.set_logprob(a, 2, None), "log-prob None"),
        (lambda door, a: door.set_logprob(a, 2, 0.5), "log-prob 0.5"),
        (lambda door, a: door.set_logprob(a, 2, -math.inf), "log-prob -inf"),
        (lambda door, a: door.set_logprob(a, 2, -9999.0), "log-prob -9999"),
        (lambda door, a: door.set_prompt_tokens(a, 7), "it read 7 tokens"),
        (lambda door, a: door.set_prompt_tokens(a, None), "it read None tokens"),
        (lambda door, a: door.set_reason(a, "stop", "NaN happened"), "not asked for"),
        (lambda door, a: door.set_reason(a, "content_filter"), "ended for 'content_filter'"),
        (lambda door, a: door.lose_logprob(a), "log-probs"),
        (lambda door, a: door.lose_everything(a), "no answer"),
    ],
)
def test_what_cannot_be_true_is_refused_by_the_request_s_name_and_not_tried_again(door, server, policy, bend, said):
    server.faults = [Mended(lambda answer: bend(door, answer))]
    with pytest.raises(EndpointRefused, match=said) as error:
        complete(policy, prompt("x", key="episode-7"), Limits(4, stop_ids=STOPS))
    assert "episode-7" in str(error.value)
    assert len(server.sampled(door.path)) == 1


def test_more_than_was_asked_for_is_refused(door, server, policy):
    server.faults = [Mended(lambda answer: server.answer(door.path, door.asking(server, 9)))]
    with pytest.raises(EndpointRefused, match="it sampled 9 tokens, asked for 1 to 4"):
        complete(policy, prompt("x"), Limits(4))


@pytest.mark.parametrize("fault", ["drop", "half", Status(503), Status(429, {"Retry-After": "0"})])
def test_what_broke_on_the_way_is_tried_again(door, server, policy, fault):
    server.faults = [fault] * 3
    row = prompt("x")
    assert list(complete(policy, row, Limits(4)).ids) == wanted(row, 4)[0]
    assert len(server.sampled(door.path)) == 4
    server.faults = [fault] * 4
    with pytest.raises(EndpointUnavailable):
        complete(policy, row, Limits(4))


def test_what_a_server_gave_up_is_tried_again(door, server, policy):
    server.faults = [Mended(lambda answer: door.set_reason(answer, "abort"))]
    row = prompt("x")
    assert list(complete(policy, row, Limits(4)).ids) == wanted(row, 4)[0]


def test_a_wrong_request_is_not_tried_again(door, server, policy):
    server.faults = [Status(400)]
    with pytest.raises(EndpointRefused, match="400"):
        complete(policy, prompt("x"), Limits(4))
    assert len(server.sampled(door.path)) == 1


def test_nothing_hangs(door, server):
    server.faults = ["slow"]
    started = time.monotonic()
    with pytest.raises(EndpointUnavailable, match=r"within 0\.2 s"):
        complete(policy_of(door, server, timeout=0.2, attempts=1), prompt("x"), Limits(4))
    assert time.monotonic() - started < 5
    waited(server.hung_up)


def test_a_cancelled_request_is_ended_over_there(door, server, policy):
    server.faults = ["slow"]

    async def leave():
        task = asyncio.create_task(policy.complete(prompt("x"), Limits(4)))
        await asyncio.to_thread(waited, server.arrived)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(waited, server.hung_up)

    asyncio.run(leave())
    door.ended(server)


def test_what_no_server_could_make_right_is_not_sent(door, server, policy):
    row = prompt("x", (picture(1),), key="odd")
    row.images.append(picture(2))
    clip = prompt("x")
    frames = patchify([np.zeros((56, 56, 3), np.uint8)] * 4, GEOMETRY)
    clip.extend([VOCAB.image_id] * 8, trainable=False, images=[frames])
    for wrong, limits, said in [
        (row, Limits(4), "odd: 12 places"),
        (clip, Limits(4), "x: a clip"),
        (prompt("x"), Limits(0), "no room"),
        (Trajectory("empty", "toy"), Limits(4), "empty: nothing"),
    ]:
        with pytest.raises(ValueError, match=said):
            complete(policy, wrong, limits)
    assert not server.requests


# ---------------------------------------------------------------------------------------------- weights


def test_a_version_counts_once_it_is_confirmed(door, server, policy):
    row = prompt("x")

    async def play():
        before = await policy.complete(row, Limits(4))
        await policy.update_weights("/weights/1", 7)
        return before, await policy.complete(row, Limits(4))

    before, after = asyncio.run(play())
    assert (list(before.ids), before.versions) == (wanted(row, 4)[0], (0,))
    assert (list(after.ids), after.versions) == (wanted(row, 4, weights=1)[0], (7,))
    assert policy.version == 7
    with pytest.raises(ValueError, match="serves already"):
        asyncio.run(policy.update_weights("/weights/1", 7))


def test_requests_in_flight_end_on_their_version_and_new_ones_wait(door, server, policy):
    server.faults = ["slow"]
    row = prompt("x")

    async def play():
        flying = asyncio.create_task(policy.complete(row, Limits(4)))
        await asyncio.to_thread(waited, server.arrived)
        update = asyncio.create_task(policy.update_weights("/weights/1", 1))
        await asyncio.sleep(0)
        late = asyncio.create_task(policy.complete(row, Limits(4)))
        await asyncio.sleep(0.1)
        assert [path for path, _ in server.requests] == [door.path]  # neither loaded nor asked
        with pytest.raises(ValueError, match="under way"):
            await policy.update_weights("/weights/2", 2)
        server.gate.set()
        await update
        return await flying, await late

    flying, late = asyncio.run(play())
    assert (list(flying.ids), flying.versions) == (wanted(row, 4)[0], (0,))
    assert (list(late.ids), late.versions) == (wanted(row, 4, weights=1)[0], (1,))


def test_requests_that_are_not_waited_for_are_marked(door, server, policy):
    server.faults = ["slow"]

    async def play():
        flying = asyncio.create_task(policy.complete(prompt("x"), Limits(4)))
        await asyncio.to_thread(waited, server.arrived)
        await policy.update_weights("/weights/1", 1, wait=False)
        server.gate.set()
        return await flying, await policy.complete(prompt("x"), Limits(4))

    straddled, after = asyncio.run(play())
    assert straddled.versions == door.straddled
    assert after.versions == (1,)


def test_weights_that_nobody_confirmed_are_not_sampled_from(door, server, policy):
    server.refuses_weights = True
    row = prompt("x")

    async def play():
        with pytest.raises((EndpointRefused, EndpointUnavailable)):
            await policy.update_weights("/weights/1", 1)
        assert policy.version == 0
        with pytest.raises(EndpointUnavailable, match="version 1 was never confirmed"):
            await policy.complete(row, Limits(4))
        server.refuses_weights = False
        await policy.update_weights("/weights/2", 2)
        return await policy.complete(row, Limits(4))

    assert asyncio.run(play()).versions == (2,)
    assert len(server.sampled(door.path)) == 1


def test_the_first_update_is_rehearsed(door, server):
    policy = policy_of(door, server, rehearse=True)

    async def play():
        await policy.update_weights("/weights/1", 1)
        probes = len(server.sampled(door.path))
        await policy.update_weights("/weights/2", 2)
        return probes, await policy.complete(prompt("x"), Limits(4))

    probes, done = asyncio.run(play())
    assert (probes, len(server.sampled(door.path))) == (8, 9)
    assert done.versions == (2,)


def test_weights_that_a_server_garbles_are_not_sampled_from(door, server):
    """It confirms them, under the right name."""
    server.garbles = 1
    policy = policy_of(door, server, rehearse=True)
    with pytest.raises(EndpointRefused, match="garbles weights"):
        asyncio.run(policy.update_weights("/weights/1", 1))
    assert policy.version == 0
    with pytest.raises(EndpointUnavailable, match="loaded again, were never confirmed"):
        complete(policy, prompt("x"), Limits(4))
    loaded = server.weights
    with pytest.raises(EndpointRefused, match="garbles weights"):
        asyncio.run(policy.update_weights("/weights/1", 1))
    assert server.weights == loaded  # it was not asked to load anything again


@pytest.mark.parametrize("fault", ["drop", "half", Status(500), Status(400)])
def test_a_rehearsal_that_broke_is_begun_anew_by_the_next_update(door, server, fault):
    """The server is left with half of its weights: what it says then is not what it must say again."""
    policy = policy_of(door, server, rehearse=True, attempts=1)
    server.load_faults = [fault]

    async def play():
        with pytest.raises((EndpointRefused, EndpointUnavailable)):
            await policy.update_weights("/weights/1", 1)
        with pytest.raises(EndpointUnavailable, match="loaded again, were never confirmed"):
            await policy.complete(prompt("x"), Limits(4))
        await policy.update_weights("/weights/2", 2)
        return await policy.complete(prompt("x"), Limits(4))

    assert asyncio.run(play()).versions == (2,)
    assert server.weights == 2
    assert len(server.sampled(door.path)) == 4 + 4 + 1  # before, after the rehearsal that held, and the turn


def test_an_update_gives_up_on_requests_that_do_not_end(door, server):
    policy = policy_of(door, server, timeout=0.6, attempts=1)
    server.faults = ["slow"]

    async def play():
        stuck = asyncio.create_task(policy.complete(prompt("x"), Limits(4)))
        await asyncio.to_thread(waited, server.arrived)
        policy.config.timeout = 0.1
        with pytest.raises(EndpointUnavailable, match="1 requests are still in flight"):
            await policy.update_weights("/weights/1", 1)
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        return await policy.complete(prompt("x"), Limits(4))  # nothing was loaded: nothing is in doubt

    assert asyncio.run(play()).versions == (0,)


def test_readiness(door, server, policy):
    asyncio.run(policy.wait_ready(5.0))
    nobody = door.policy(TokenServerConfig("http://127.0.0.1:9", "served"), VOCAB, GEOMETRY, ROWS)
    with pytest.raises(EndpointUnavailable, match="not ready"):
        asyncio.run(nobody.wait_ready(0.2))


def test_many_at_once_share_connections(door, server):
    policy = policy_of(door, server, concurrency=16)
    rows = [prompt(f"number {n}") for n in range(100)]

    async def all_of_them():
        return await asyncio.gather(*(policy.complete(row, Limits(3)) for row in rows))

    for row, done in zip(rows, asyncio.run(all_of_them()), strict=True):
        assert list(done.ids) == wanted(row, 3)[0]
    assert server.connections <= 16


def test_a_server_that_was_started_again_is_noticed(door, server, policy):
    """It serves the weights it was started with, under their name, as if nothing had been loaded."""
    if door.policy is VLLMCompletionsPolicy:
        pytest.skip("does not tell whose weights it samples from")

    async def play():
        await policy.update_weights("/weights/1", 1)
        server.weights, server.name = 0, "default"
        with pytest.raises(EndpointRefused, match="sampled by version 0, not by \\(1,\\)"):
            await policy.complete(prompt("x"), Limits(4))
        server.name = "somebody's"
        with pytest.raises(EndpointRefused, match="somebody"):
            await policy.complete(prompt("x"), Limits(4))

    asyncio.run(play())


# ---------------------------------------------------------------------------------------------- one protocol alone


def test_sglang_is_not_sent_a_picture_s_prompt_that_it_would_read_otherwise():
    """Letters one by one, which its tokenizer would join; and a mark that somebody only spelled."""
    with running(SGLangServer()) as server:
        policy = policy_of(SGLangDoor, server)
        assert len(VOCAB.encode("word")) < 4
        spelled = prompt("say <|user|>", (picture(1),), key="spelled")
        split = prompt("x", (picture(1),), key="split")
        split.extend([index for letter in "word" for index in VOCAB.encode(letter)], trainable=False)
        for row in (spelled, split):
            with pytest.raises(ValueError, match=f"{row.key}: SGLang .* makes other ids"):
                complete(policy, row, Limits(4))
        assert not server.requests
        text = prompt("say <|user|>")  # ids alone are taken as they are
        assert list(complete(policy, text, Limits(4)).ids) == wanted(text, 4)[0]


def test_sglang_is_told_of_what_broke_and_not_of_what_it_refused():
    with running(SGLangServer()) as server:
        server.faults = [Status(503), "half", "drop"]
        complete(policy_of(SGLangDoor, server), prompt("x"), Limits(4))
        _, *broken, _ = [body["rid"] for body in server.sampled("/generate")]
        assert server.aborted == broken
        assert len({*broken}) == 2


def test_a_server_that_does_not_name_its_own_weights_cannot_rehearse(monkeypatch):
    """It is set aside for that, by whoever has others; no mistake of ours ends the run."""
    answer = SGLangServer.answer

    def nameless(self, path, body):
        said = answer(self, path, body)
        return {"weight_version": "default"} if path == "/get_model_info" else said

    monkeypatch.setattr(SGLangServer, "answer", nameless)
    with running(SGLangServer()) as server:
        policy = policy_of(SGLangDoor, server, rehearse=True)
        with pytest.raises(EndpointRefused, match="/get_model_info names no model_path to load again"):
            asyncio.run(policy.update_weights("/weights/1", 1))
    assert "/update_weights_from_disk" not in [path for path, _ in server.requests]


def test_sglang_tells_whose_weights_each_token_is_of():
    with running(SGLangServer()) as server:
        server.spans = True
        policy = policy_of(SGLangDoor, server, version=5)
        change = {
            "weight_versions": [{"version": "5", "start": 0, "end": 2}, {"version": "default", "start": 2, "end": 4}]
        }
        server.faults = [Mended(lambda answer: answer["meta_info"].update(change))]
        assert complete(policy, prompt("x"), Limits(4)).versions == (5,)


def test_vllm_s_raw_log_probs_are_found_out():
    for door in (VLLMDoor, CompletionsDoor):
        with running(VLLMServer()) as server:
            server.raw = True
            with pytest.raises(EndpointRefused, match="--logprobs-mode processed_logprobs"):
                asyncio.run(policy_of(door, server).wait_ready(5.0))


@pytest.mark.parametrize("limits", [Limits(4, top_p=0.9), Limits(4, top_k=3), Limits(4, min_p=0.1)])
def test_vllm_s_log_probs_of_what_is_left_are_not_asked_for(limits):
    with running(VLLMServer()) as server:
        with pytest.raises(ValueError, match="leave"):
            complete(policy_of(VLLMDoor, server), prompt("x"), limits)
        assert complete(policy_of(VLLMDoor, server), prompt("x"), replace(limits, temperature=0.0)).ids


def test_vllm_forgets_what_other_weights_computed_before_it_goes_on():
    with running(VLLMServer()) as server:
        policy = policy_of(VLLMDoor, server)
        asyncio.run(policy.update_weights("/weights/1", 1))
        first, last = server.steps.index("/collective_rpc"), server.steps.index("/resume")
        assert (server.steps[0], last) == ("/pause?mode=keep", len(server.steps) - 1)
        assert {path.partition("?")[0] for path in server.steps[first + 1 : last]} == {
            "/reset_prefix_cache", "/reset_encoder_cache", "/reset_mm_cache", "/update_weight_version",
        }  # fmt: skip
        server.keeps_cache = True
        with pytest.raises(EndpointRefused, match="keeps what other weights computed"):
            asyncio.run(policy.update_weights("/weights/2", 2))
        assert server.paused
        assert policy.version == 1


# ---------------------------------------------------------------------------------------------- routed experts

LAYOUT = {"layers": LAYERS, "moe_layers": (1, 2), "experts_per_token": EXPERTS}


def test_the_experts_of_every_sampled_token_but_the_last(door, server):
    row = prompt("x")
    done = complete(policy_of(door, server, **LAYOUT), row, Limits(4))
    assert len(done.routed_experts) == 4
    for n, got in enumerate(done.routed_experts[:-1]):
        np.testing.assert_array_equal(got.numpy(), experts_of(len(row) + n)[[1, 2]])
    assert (done.routed_experts[-1] == -1).all()
    row.extend(done.ids, trainable=True, logprobs=done.logprobs, routed_experts=done.routed_experts)
    assert complete(policy_of(door, server, **LAYOUT), prompt("x"), Limits(1)).routed_experts[0].shape == (2, EXPERTS)


def test_experts_that_are_missing_are_refused(door, server):
    server.faults = [Mended(door.lose_experts)]
    with pytest.raises(EndpointRefused, match=r"x: .*experts none"):
        complete(policy_of(door, server, **LAYOUT), prompt("x"), Limits(4))


def test_settings_that_cannot_be():
    for wrong in ({"update_timeout": 0.0}, {"layers": 2, "moe_layers": (2,), "experts_per_token": 1}):
        with pytest.raises(ValueError):
            TokenServerConfig("http://x", "m", **wrong)
