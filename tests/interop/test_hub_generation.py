"""Greedy tokens of our generator against transformers' own generate on the exported folder: pictures and a clip, turns
that go on from the cache, prompts in pieces, drafts, and a cache that is too small for all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmagent.generation import generator as generator_module
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.geometry import patchify
from mmagent.interop.agent_folder import Agent
from mmagent.interop.conversion import export_model
from mmagent.trajectories import Limits, Trajectory
from mmagent.types import PatchedImage
from tests.agent_kit import GEOMETRY, picture, prompt, recompute, tiny_vocab
from tests.interop.hub_kit import batch_of, tiny_agent

STOPS, TURNS, TOKENS = tiny_vocab().stop_ids, 3, 14


def clip(seed: int) -> PatchedImage:
    """Two groups of frames: its positions differ in time as well."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    return patchify(list(pixels), GEOMETRY)


def drafting_agent() -> Agent:
    """Its MTP head says, roughly, what its decoder's own head says of the next token: it is right
    now and then, which is what matters here."""
    agent = tiny_agent()
    with torch.no_grad():
        for head in agent.model.mtp.heads:
            width = head.project.weight.shape[0]
            head.project.weight[:, width:] += 8 * torch.eye(width)
    return agent


def openings() -> list[Trajectory]:
    shared = picture(1)
    return [
        prompt("click the red button", (shared,)),
        prompt("click the blue one", (shared, picture(2, 56, 56))),
        prompt("what moved", (clip(3),)),
        prompt("words alone, and rather more of them than the others have"),
    ]


def goes_on(row: Trajectory, turn: int, ids: list[int]) -> None:
    """What was said, and a text with another picture, or a clip, behind it."""
    image = clip(60 + turn) if turn % 2 else picture(50 + turn, 56, 56)
    slots = [tiny_vocab().image_id] * (len(image.patches) // GEOMETRY.merge_size**2)
    row.extend(ids, trainable=True, logprobs=[0.0] * len(ids))
    row.extend([*tiny_vocab().encode("next"), *slots, *tiny_vocab().encode(" go")], trainable=False, images=[image])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """By turn and prompt, of the model that transformers loads from the folder."""
    from transformers import AutoModelForImageTextToText

    folder: Path = tmp_path_factory.mktemp("generation") / "agent"
    export_model(folder, drafting_agent(), "hub")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    rows, said = openings(), []
    for turn in range(TURNS):
        out = [
            model.generate(**batch_of([row], tiny_vocab().pad_id), max_new_tokens=TOKENS)[0, len(row) :].tolist()
            for row in rows
        ]
        said.append(out)
        for row, ids in zip(rows, out, strict=True):
            goes_on(row, turn, ids)
    return said


@pytest.mark.parametrize("speculate", [0, 1, 4])
@pytest.mark.parametrize(
    ("settings", "happened"),
    [
        ({}, "cached"),
        ({"reuse": False}, ""),
        ({"prefill_tokens": 7}, "cached"),
        ({"cache_tokens": 260, "prefill_tokens": 40}, "preempted"),
        ({"steady": True}, ""),
    ],
)
def test_greedy_tokens_are_those_of_transformers(theirs, speculate, settings, happened, monkeypatch):
    monkeypatch.setitem(generator_module.BLOCK_TOKENS, "cpu", 4)
    config = partial(GeneratorConfig, speculate=speculate, speculate_least=0.0)
    generator = Generator(drafting_agent().model, tiny_vocab(), config(**settings))
    rows = openings()
    for turn, expected in enumerate(theirs):
        done = generator.generate([(row, Limits(TOKENS, 0.0, stop_ids=STOPS)) for row in rows])
        assert [list(completion.ids) for completion in done] == expected, turn
        for row, ids in zip(rows, expected, strict=True):
            goes_on(row, turn, ids)
    assert not happened or generator.counts[happened]
    if speculate:
        stats = generator.drafter.stats
        accepted, tried = (
            sum(stats[c, 1, what] for c in ("text_only", "after_image")) for what in ("accepted", "tried")
        )
        assert 0 < accepted < tried


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("settings", [{}, {"prefill_tokens": 7}, {"cache_tokens": 260, "prefill_tokens": 40}])
def test_logprobs_are_the_trainer_s_however_they_came(speculate, settings, monkeypatch):
    """In float32: found prefixes, pieces of prompts, drafts, experts, pictures, clips, who was pushed out."""
    monkeypatch.setitem(generator_module.BLOCK_TOKENS, "cpu", 4)
    model, rows = drafting_agent().model, openings()
    generator = Generator(model, tiny_vocab(), GeneratorConfig(speculate=speculate, speculate_least=0.0, **settings))
    for turn in range(TURNS):
        limits = [Limits(TOKENS, 0.8, top_p=0.95, seed=10 * turn + n) for n in range(len(rows))]
        done = generator.generate(list(zip(rows, limits, strict=True)))
        for row, completion in zip(rows, done, strict=True):
            start = len(row)
            goes_on(row, turn, list(completion.ids))
            expected = recompute(model, row, 0.8)[-len(completion.ids) :]
            assert row.input_ids[start : start + len(completion.ids)] == list(completion.ids)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)
    assert generator.counts["cached"]
    assert bool(generator.counts["preempted"]) == ("cache_tokens" in settings)
