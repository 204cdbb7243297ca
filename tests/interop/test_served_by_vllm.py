"""Exported folders of the stock classes, served by vLLM: its greedy tokens and log-probs are ours, as they come and
through the policies over its token endpoints.

Facts about vLLM 0.32 on a CPU, which exports must heed:

- ``glm4v_moe``: its decoder reads ``text_config.use_qk_norm``, which the stock config does not have.
- ``glm_ocr``: without ``partial_rotary_factor`` among ``rope_parameters`` it turns half the channels, the stock class
  all of them (``AssertionError`` at ``sum(self.mrope_section) == rotary_dim // 2``): it must be written out.
- ``glm_ocr``: it sizes the merger by ``text_config.intermediate_size``, the stock class by three times
  ``vision_config.out_hidden_size``. Where they differ it cuts the weights without a word and sees something else; the
  released model has 4608 for both.

Tolerance: fp32 on both sides, log-probs of size 10. Where our first token leads the second by no more than a few times
that, either may be said, and what follows is no longer the same text: comparison ends there, and most tokens must come
before (asserted).
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmagent.chat import ChatConfig, Image, Text, render, user
from mmagent.generation.generator import Generator
from mmagent.generation.http import image_part
from mmagent.generation.http_transport import EndpointRefused, EndpointUnavailable
from mmagent.generation.http_vllm import VLLMCompletionsPolicy, VLLMPolicy
from mmagent.generation.token_endpoints import TokenServerConfig
from mmagent.geometry import GeometryConfig, patchify, visual_tokens
from mmagent.interop.agent_folder import Agent
from mmagent.interop.conversion import export_model
from mmagent.interop.glm import from_transformers
from mmagent.losses.language import language_loss
from mmagent.models.agent_model import AgentModel
from mmagent.models.mtp import MTPConfig
from mmagent.packing import pack
from mmagent.trajectories import Completion, Limits, Trajectory
from mmagent.types import Document, PatchedImage
from mmagent.vocab import Vocab
from tests.glm_kit import stock
from tests.vllm_kit import Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SIZE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 320, "pad_token_id": None,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"moe_intermediate_size": 64, "use_qk_norm": True, "n_group": 4, "topk_group": 2},
    "glm4v_moe": {"moe_intermediate_size": 64, "rope": {"mrope_section": [1, 2, 5]}},
    "glm_ocr": {"rope": {"mrope_section": [2, 5, 9]}, "intermediate_size": 3 * 128},
}
TOKENS, ATOL = 24, 2e-4
GEOMETRY, CHAT = GeometryConfig(), ChatConfig()
Prompt = tuple[list[int], list[PatchedImage]]


@dataclass
class Served:
    kind: str
    model: AgentModel
    vocab: Vocab
    server: Server


def agent(kind: str) -> Served:
    """Not served yet."""
    vocab = Vocab.train(["click the button type hello what is there"], 320)
    model = from_transformers(stock(kind, vision={"hidden_size": 64}, **(SIZE | KINDS[kind])), MTPConfig())
    model.config.image_id = vocab.image_id
    return Served(kind, model, vocab, Server(""))


def write(served: Served, folder: Path) -> None:
    export_model(folder, Agent(served.model, served.vocab, GEOMETRY, CHAT), served.kind)


def limits_of(kind: str) -> tuple[str, ...]:
    return () if kind == "glm4_moe" else ("--limit-mm-per-prompt", '{"image": 3, "video": 0}')


@pytest.fixture(scope="module", params=list(KINDS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = agent(request.param)
    with torch.no_grad():
        made.model.head.weight.mul_(4.0)  # margins between tokens as a trained model has them
    folder = tmp_path_factory.mktemp(made.kind)
    write(made, folder / "model")
    options = (*limits_of(made.kind), "--enable-scale-out")
    with serve(folder / "model", folder / "vllm.log", options) as made.server:
        yield made


def our_scores(served: Served, ids: Sequence[int], images: Sequence[PatchedImage] = ()) -> torch.Tensor:
    """``(L, V)`` logits of what follows every token."""
    flat = torch.tensor(list(ids))
    document = Document(flat, torch.zeros(len(flat), dtype=torch.bool), tuple(images), "prompt", "test")
    batch = pack([document], image_id=served.vocab.image_id, merge_size=2, multiple=1, pad_id=served.vocab.pad_id)
    with torch.no_grad():
        return served.model(batch, mtp=False).hidden @ served.model.head_weight.T


def our_tokens(served: Served, prompts: Sequence[Prompt]) -> list[tuple[Completion, int]]:
    """Of our generator, all prompts in one batch; and how many tokens come before the first close call."""
    trajectories = []
    for ids, images in prompts:
        trajectories.append(Trajectory("prompt", "test"))
        trajectories[-1].extend(ids, trainable=False, images=images)
    limits = Limits(TOKENS, temperature=0.0)
    completions = Generator(served.model, served.vocab).generate([(t, limits) for t in trajectories])
    barred = list(served.vocab.barred(served.model.config.vocab_size))
    sure = []
    for (ids, images), completion in zip(prompts, completions, strict=True):
        scores = our_scores(served, [*ids, *completion.ids], images)[len(ids) - 1 : -1]
        scores[:, barred] = float("-inf")
        first, second = scores.topk(2).values.unbind(1)
        sure.append(int((first - second > 5 * ATOL).int().cumprod(0).sum()))
    return list(zip(completions, sure, strict=True))


def greedy(served: Served) -> dict[str, Any]:
    """What a request says so that the server samples as our generator does."""
    rows = served.model.config.vocab_size
    barred = set(served.vocab.barred(rows))
    return {
        "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        "allowed_token_ids": [n for n in range(rows) if n not in barred],
    }  # fmt: skip


def ask(served: Served, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One request each, at the same time."""
    with ThreadPoolExecutor(len(messages)) as threads:
        body = greedy(served) | {"logprobs": True}
        answers = threads.map(lambda m: served.server.post("/v1/chat/completions", body | {"messages": [m]}), messages)
        return list(answers)


def compare(served: Served, prompts: Sequence[Prompt], answers: list[dict]) -> None:
    """Prompt ids, greedy tokens and their log-probs."""
    told = our_tokens(served, prompts)
    for (ids, _), (completion, sure), answer in zip(prompts, told, answers, strict=True):
        assert answer["prompt_token_ids"] == ids
        (choice,) = answer["choices"]
        assert choice["token_ids"][:sure] == list(completion.ids[:sure])
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        wanted = torch.tensor(completion.logprobs)[:sure]
        torch.testing.assert_close(torch.tensor(logprobs)[:sure], wanted, atol=ATOL, rtol=0)
    assert sum(sure for _, sure in told) > 0.75 * TOKENS * len(prompts)


def test_log_probs_of_prompts(served):
    """Token ids in, and the log-prob of every one of them."""
    generator = torch.Generator().manual_seed(0)
    for length in (2, 17, 90):
        ids = torch.randint(0, 256, (length,), generator=generator)  # bytes: no marks
        answer = served.server.post(
            "/v1/completions", {"prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        )
        told = answer["choices"][0]["prompt_logprobs"]
        assert told[0] is None
        got = torch.tensor([entry[str(n)]["logprob"] for n, entry in zip(ids[1:].tolist(), told[1:], strict=True)])
        wanted = our_scores(served, ids.tolist()).log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


def test_greedy_text(served):
    """Conversations through the exported chat template, many at a time."""
    texts = ["click", "what is there?", "type hello 12 times", "the button " * 12]
    prompts = [(render([user(text)], served.vocab, config=CHAT, generate=True).ids, []) for text in texts]
    compare(served, prompts, ask(served, [{"role": "user", "content": text} for text in texts]))


def test_greedy_images(served):
    """One image, two of unequal sides, one that must be resized, text around them; all through their processor."""
    if served.kind == "glm4_moe":
        pytest.skip("reads text alone")
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(112, 140), (196, 84), (119, 173)]]
    prompts, messages = [], []
    for parts in (["what is ", 0], [1, "or", 0, "there?"], [2, "click"], ["the button", 2, 1, 0, "hello"]):
        shown = [pictures[part] for part in parts if isinstance(part, int)]
        images = [patchify(picture, GEOMETRY) for picture in shown]
        spoken = [Image() if isinstance(part, int) else Text(part) for part in parts]
        tokens = [visual_tokens(image.grid, 2) for image in images]
        prompts.append((render([user(*spoken)], served.vocab, tokens, CHAT, generate=True).ids, images))
        content = [image_part(pictures[p]) if isinstance(p, int) else {"type": "text", "text": p} for p in parts]
        messages.append({"role": "user", "content": content})
    compare(served, prompts, ask(served, messages))


# ---------------------------------------------------------------------------------------------- as a policy

TEXTS = ["click", "what is there?", "type hello 12 times", "the button " * 12]


def trajectory(prompt: Prompt, key: str = "prompt") -> Trajectory:
    out = Trajectory(key, "test")
    out.extend(prompt[0], trainable=False, images=prompt[1])
    return out


def policy_of(served: Served, kind: type[VLLMPolicy] = VLLMPolicy) -> VLLMPolicy:
    config = TokenServerConfig(served.server.url + "/v1", "served", attempts=1)
    return kind(config, served.vocab, GEOMETRY, served.model.config.vocab_size)


def said_text(served: Served) -> list[Prompt]:
    return [(render([user(text)], served.vocab, config=CHAT, generate=True).ids, []) for text in TEXTS]


def said_images(served: Served) -> list[Prompt]:
    generator = np.random.default_rng(1)
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(112, 140), (196, 84), (119, 173)]]
    prompts = []
    for parts in (["what is ", 0], [1, "or", 0, "there?"], [2, 2, "click"]):
        images = [patchify(pictures[part], GEOMETRY) for part in parts if isinstance(part, int)]
        spoken = [Image() if isinstance(part, int) else Text(part) for part in parts]
        tokens = [visual_tokens(image.grid, 2) for image in images]
        prompts.append((render([user(*spoken)], served.vocab, tokens, CHAT, generate=True).ids, images))
    return prompts


def completed(policy: VLLMPolicy, prompts: Sequence[Prompt], limits: Limits) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        return await asyncio.gather(*(policy.complete(trajectory(prompt), limits) for prompt in prompts))

    return asyncio.run(all_of_them())


def as_ours(served: Served, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
    """Greedy tokens and their log-probs."""
    for (ours, sure), theirs in zip(our_tokens(served, prompts), completions, strict=True):
        assert theirs.ids[:sure] == ours.ids[:sure]
        got, wanted = torch.tensor(theirs.logprobs)[:sure], torch.tensor(ours.logprobs)[:sure]
        torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)
        assert (len(theirs.ids), theirs.reason) == (TOKENS, "length")


def prompts_of(served: Served) -> list[Prompt]:
    return said_text(served) + ([] if served.kind == "glm4_moe" else said_images(served))


@pytest.mark.parametrize("kind", [VLLMPolicy, VLLMCompletionsPolicy])
def test_greedy_completions_are_ours(served, kind):
    policy = policy_of(served, kind)
    asyncio.run(policy.wait_ready(60))
    prompts = prompts_of(served) if kind is VLLMPolicy else said_text(served)
    as_ours(served, prompts, completed(policy, prompts, Limits(TOKENS, temperature=0.0)))


def test_log_probs_of_what_is_sampled_are_the_trainer_s(served):
    """At the request's temperature, with what is barred left out; the same seed says the same again."""
    policy, limits = policy_of(served), Limits(TOKENS, temperature=0.8, seed=2**33 + 7)
    prompts = prompts_of(served)
    completions = completed(policy, prompts, limits)
    barred = list(served.vocab.barred(served.model.config.vocab_size))
    for (ids, images), completion in zip(prompts, completions, strict=True):
        scores = our_scores(served, [*ids, *completion.ids], images)[len(ids) - 1 : -1]
        scores[:, barred] = float("-inf")
        wanted = (scores / 0.8).log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=2 * ATOL, rtol=0)
        assert completion.versions == (0,)
    assert [c.ids for c in completed(policy, prompts[:1], limits)] == [completions[0].ids]
    assert len({c.ids[:4] for c in completions}) > 1


def test_a_stop_id_or_string_ends_a_completion(served):
    policy, (prompt, *_) = policy_of(served), said_text(served)
    (whole,) = completed(policy, [prompt], Limits(TOKENS, temperature=0.0))
    stop = whole.ids[5]
    (cut,) = completed(policy, [prompt], Limits(TOKENS, temperature=0.0, stop_ids=(stop,)))
    assert cut.ids == whole.ids[: whole.ids.index(stop) + 1]
    assert (cut.stopped, cut.reason) == (True, "stop")
    plain = [served.vocab.decode([index]) for index in whole.ids]
    string = next(text for text in plain if text.isascii() and text.isprintable() and text.strip())
    (cut,) = completed(policy, [prompt], Limits(TOKENS, temperature=0.0, stop_strings=(string,)))
    assert cut.stopped
    assert string in served.vocab.decode(cut.ids)
    assert string not in served.vocab.decode(cut.ids[:-1])


def test_what_nobody_waits_for_is_ended(served):
    policy, (prompt, *_) = policy_of(served), said_text(served)

    async def leave() -> None:
        task = asyncio.create_task(policy.complete(trajectory(prompt), Limits(480 - len(prompt[0]))))
        while not served.server.metric("num_requests_running"):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    started = time.monotonic()
    while served.server.metric("num_requests_running"):
        assert time.monotonic() - started < 5
        time.sleep(0.05)


def test_a_wrong_request_is_refused_by_name(served):
    policy = policy_of(served)
    too_long: Prompt = (said_text(served)[0][0] * 100, [])
    with pytest.raises(EndpointRefused, match="400"):
        completed(policy, [too_long], Limits(4))
    policy.config.model = "another"
    with pytest.raises(EndpointRefused, match="404"):
        completed(policy, said_text(served)[:1], Limits(4))


def test_weights_are_loaded_and_named(served, tmp_path):
    """Others, and those that were; a prompt that is known already must not be answered from what the first ones
    computed. What is in flight and not waited for says that two versions sampled it."""
    policy, limits, prompts = policy_of(served), Limits(TOKENS, temperature=0.0), prompts_of(served)
    other = Served(served.kind, copy.deepcopy(served.model), served.vocab, served.server)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(0.9)
    write(other, tmp_path / "other")
    write(served, tmp_path / "first")
    as_ours(served, prompts, completed(policy, prompts, limits))
    if served.kind != "glm_ocr":  # vLLM's CPU build does not pack reloaded experts for its kernel, which garbles them
        with pytest.raises(EndpointRefused, match="garbles weights"):
            asyncio.run(policy.update_weights(tmp_path / "other", 3))
        with pytest.raises(EndpointUnavailable, match="never confirmed"):
            completed(policy, prompts[:1], limits)
        return
    asyncio.run(policy.update_weights(tmp_path / "other", 3))
    after = completed(policy, prompts, limits)
    as_ours(other, prompts, after)
    assert {c.versions for c in after} == {(3,)}

    async def straddle() -> Completion:
        task = asyncio.create_task(policy.complete(trajectory(prompts[0]), Limits(400, temperature=0.0)))
        while served.server.metric("generation_tokens_total") < seen + 5:
            await asyncio.sleep(0.01)
        await policy.update_weights(tmp_path / "first", 4, wait=False)
        return await task

    seen = served.server.metric("generation_tokens_total")
    straddled = asyncio.run(straddle())
    assert straddled.versions == (3, 4)
    assert len(straddled.ids) == 400
    as_ours(served, prompts, completed(policy, prompts, limits))
    with pytest.raises((EndpointRefused, EndpointUnavailable)):
        asyncio.run(policy.update_weights(tmp_path / "nowhere", 5))
    with pytest.raises(EndpointUnavailable, match="version 5 was never confirmed"):
        completed(policy, prompts[:1], limits)
    asyncio.run(policy.update_weights(tmp_path / "first", 6))
    as_ours(served, prompts, completed(policy, prompts, limits))


# ---------------------------------------------------------------------------------------------- drafts of the MTP layer

STEP = 7
"""What the drafting models have learnt: byte ``n + STEP`` follows byte ``n``."""


def counted(start: int, length: int) -> list[int]:
    return [(start + STEP * n) % 256 for n in range(length)]


def train(model: AgentModel) -> None:
    """Until the model and its MTP layer both count: which byte comes next, and which after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(120):
        documents = [
            Document(torch.tensor(counted(17 * step + 31 * n, 24)), torch.ones(24, dtype=torch.bool), (), "n", "test")
            for n in range(8)
        ]
        batch = pack(documents, image_id=model.config.image_id, merge_size=2, multiple=1, pad_id=0)
        loss = language_loss(model(batch), batch.labels, batch.segments, model.head_weight)
        total = loss.next_token.total / loss.next_token.count + loss.mtp[0].total / loss.mtp[0].count
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert float(total.detach()) < 0.3, "it has not learnt to count; train longer"


@pytest.mark.parametrize("kind", ["glm4_moe", "glm_ocr"])
def test_drafts_of_the_exported_mtp_layer_are_accepted(kind, tmp_path):
    """vLLM finds the MTP layer behind the last one and drafts with it, mostly right: under wrong names or with its
    inputs in another order it would guess. What is said stays what greedy decoding says."""
    torch.manual_seed(0)
    served = agent(kind)
    train(served.model)
    write(served, tmp_path / "model")
    options = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}')
    with serve(tmp_path / "model", tmp_path / "vllm.log", (*limits_of(kind), *options)) as served.server:
        prompts: list[Prompt] = [(counted(start, 12), []) for start in (3, 50, 111, 200)]
        for (ids, _), (completion, sure) in zip(prompts, our_tokens(served, prompts), strict=True):
            answer = served.server.post("/v1/completions", greedy(served) | {"prompt": ids})
            assert answer["choices"][0]["token_ids"][:sure] == list(completion.ids[:sure])
            assert sure > TOKENS // 2
        drafted, accepted = (served.server.metric(f"spec_decode_num_{w}_tokens_total") for w in ("draft", "accepted"))
    assert drafted > TOKENS
    assert accepted / drafted > 0.8, f"{accepted:.0f} of {drafted:.0f} drafts"
