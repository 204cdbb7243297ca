"""A model that learns by blocks says by blocks what it learnt: training and decoding see the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmagent.generation.block_decoding import BlockConfig, BlockGenerator, make_generator
from mmagent.models.agent_model import AgentModel
from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.noise import NoiseConfig, NoiseIds
from mmagent.packing import pack
from mmagent.trajectories import Limits, Trajectory
from tests.agent_kit import GEOMETRY, tiny_model, tiny_vocab

VOCAB = tiny_vocab()
STOP = VOCAB.stop_ids[1]
LETTERS = [VOCAB.encode(letter)[0] for letter in "abcdefgh"]
BLOCK = 4


def asked(rng: np.random.Generator, key: str) -> tuple[Trajectory, list[int]]:
    """A letter and a number: so many letters from that one on. Few answers end where a block does."""
    first, many = int(rng.integers(len(LETTERS))), int(rng.integers(3, 8))
    prompt = Trajectory(key, "count")
    prompt.extend([LETTERS[first], *VOCAB.encode(str(many)), VOCAB.id("<|assistant|>")], trainable=False)
    return prompt, [*(LETTERS[(first + n) % len(LETTERS)] for n in range(many)), STOP]


def trained(steps: int, noise: NoiseConfig) -> AgentModel:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight.div_(20.0)
    ids = NoiseIds.of_vocab(VOCAB, model.config.vocab_size)
    objective = BlockDiffusion(model, BlockDiffusionConfig(noise, copies=2), ids).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    rng = np.random.default_rng(0)
    for step in range(steps):
        documents = []
        for n in range(32):
            prompt, answer = asked(rng, f"{step}-{n}")
            prompt.extend(answer, trainable=True, logprobs=[0.0] * len(answer))
            documents.append(prompt.document())
        batch = pack(documents, image_id=VOCAB.image_id, merge_size=GEOMETRY.merge_size)
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        loss = objective(batch).sums["mask"] / float(objective.counts(batch)["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
    return model.eval()


@pytest.mark.slow
def test_what_is_learnt_by_blocks_is_said_by_blocks():
    """Answers that end within a block, at once where it is sure: right, stopped, and in fewer looks than tokens."""
    model = trained(150, NoiseConfig(BLOCK))
    rng = np.random.default_rng(1)
    pairs = [asked(rng, f"test {n}") for n in range(40)]
    limits = Limits(16, 0.0, stop_ids=VOCAB.stop_ids)
    config = BlockConfig(block=BLOCK, threshold=0.9)
    generator = BlockGenerator(model, VOCAB, config)
    done = generator.generate([(prompt, limits) for prompt, _ in pairs])
    right = sum(list(c.ids) == answer and c.stopped for c, (_, answer) in zip(done, pairs, strict=True))
    assert right >= 36, right
    tokens = sum(len(c.ids) for c in done)
    assert tokens > 1.5 * generator.counts["looks"]
    slow = BlockGenerator(model, VOCAB, replace(config, threshold=2.0))
    once = slow.generate([(prompt, limits) for prompt, _ in pairs])
    assert sum(list(c.ids) == a for c, (_, a) in zip(once, pairs, strict=True)) >= right - 2


@pytest.mark.slow
def test_what_is_learnt_at_once_is_said_at_once():
    """Every token sees every other (LLaDA), answers of 4 to 8 tokens stand among 8 places: the decoder is not told how
    long they are."""
    model = trained(400, NoiseConfig(0, span=8))
    model.config = replace(model.config, denoises=8, bidirectional=True)
    rng = np.random.default_rng(1)
    pairs = [asked(rng, f"test {n}") for n in range(40)]
    limits = Limits(16, 0.0, stop_ids=VOCAB.stop_ids)
    for block in (8, 4):
        generator = make_generator(model, VOCAB, BlockConfig(block=block, threshold=0.9))
        done = generator.generate([(prompt, limits) for prompt, _ in pairs])
        right = sum(list(c.ids) == answer and c.stopped for c, (_, answer) in zip(done, pairs, strict=True))
        assert right >= 36, (block, right)
        assert sum(len(c.ids) for c in done) > 2 * generator.counts["looks"]
