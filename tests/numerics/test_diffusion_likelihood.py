"""The bound on the likelihood against enumeration over a toy vocabulary, with a reference of its own.

Three letters can be said, so a response of three has 27 texts; each can be said in 6 orders, in each of which a place
is asked for while those not yet said are masks. The reference uses none of the library's noise, packs or attention.
"""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch

from mmagent.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from mmagent.objectives.likelihood import likelihood_bound
from mmagent.objectives.noise import NoiseConfig, NoiseIds
from tests.diffusion_kit import MASK, make_model, predict
from tests.model_kit import make_document, make_pack

LETTERS, ROWS = (3, 4, 5), 6
IDS = NoiseIds.of(MASK, LETTERS[0], ROWS, barred=(0, 1))
LENGTH = 3


@pytest.fixture(scope="module")
def model():
    return make_model(ROWS, seed=1)


def told(text: tuple[int, ...], name: str = "") -> dict:
    """A prompt with a picture, and what is said."""
    document = make_document([2, (1, 2, 2), 1], 3, ROWS)
    prompt = torch.where(document["ids"] == 1, 1, 4 + document["ids"] % 2)
    at = len(prompt)
    follow = document["positions"].max() + 1 + torch.arange(len(text))
    ids = torch.cat([prompt, torch.tensor(text)])
    labels = torch.full_like(ids, -100)
    labels[at:] = ids[at:]
    positions = torch.cat([document["positions"], follow.expand(3, -1)], dim=1)
    return {**document, "ids": ids, "labels": labels, "positions": positions}


class Enumerated:
    """log p of each place, given which are masked: ``[state][place] -> (3,)`` log-probabilities of the letters."""

    def __init__(self, model, block: int):
        self.model, self.block, self.known = model, block, {}

    def step(self, seen: tuple[int, ...], begin: int, place: int, letter: int) -> float:
        """Of ``letter`` at ``place`` of the block that begins at ``begin``; ``seen`` are the clean past and that block,
        with masks."""
        key = (seen, begin)
        if key not in self.known:
            document = told(seen)
            prompt = len(document["ids"]) - len(seen)
            if self.block:
                blocks = [*range(prompt), *(prompt + n // self.block for n in range(len(seen)))]
            else:
                blocks = [0] * len(document["ids"])
            self.known[key] = predict(self.model, document, blocks, document["ids"], document["positions"])[prompt:]
        return float(self.known[key][place, letter])

    def orders(self, text: tuple[int, ...]) -> list[list[float]]:
        """Of every block, the log-probability of saying it in every order."""
        size = self.block or len(text)
        out = []
        for begin in range(0, len(text), size):
            own = range(begin, min(begin + size, len(text)))
            found = []
            for order in permutations(own):
                seen, total = [*text[:begin], *[MASK] * len(own)], 0.0
                for place in order:
                    total += self.step(tuple(seen), begin, place, text[place])
                    seen[place] = text[place]
                found.append(total)
            out.append(found)
        return out

    def bound(self, text: tuple[int, ...]) -> float:
        return -sum(sum(found) / len(found) for found in self.orders(text))

    def likelihood(self, text: tuple[int, ...]) -> float:
        """Of a sampler that says one token at a time, at an even choice of places."""
        return math.prod(sum(map(math.exp, found)) / len(found) for found in self.orders(text))


@pytest.mark.parametrize("block", [3, 2, 1, 0])
def test_enumeration_is_a_distribution_and_the_bound_is_one(model, block):
    truth = Enumerated(model, block)
    texts = list(product(LETTERS, repeat=LENGTH))
    likelihoods = [truth.likelihood(text) for text in texts]
    assert sum(likelihoods) == pytest.approx(1.0, abs=1e-5)
    bounds = [truth.bound(text) for text in texts]
    gaps = [bound + math.log(likelihood) for bound, likelihood in zip(bounds, likelihoods, strict=True)]
    assert min(gaps) > -1e-6
    assert max(gaps) < 1e-6 if block == 1 else max(gaps) > 1e-3  # one token a block is the chain rule itself


@pytest.mark.parametrize("block", [3, 2, 1, 0])
def test_bound_by_exact_masking_is_the_mean_over_orders(model, block):
    texts = [(3, 5, 4), (5, 5, 3), (4, 3, 3)]
    truth = Enumerated(model, block)
    batch = make_pack([told(text) for text in texts], tail=2)
    noise = NoiseConfig(block, fill=False)
    nats, error = likelihood_bound(model, batch, IDS, noise, draws=1500, together=50)
    wanted = torch.tensor([truth.bound(text) for text in texts], dtype=torch.float64)
    assert bool(((nats - wanted).abs() < 4 * error + 1e-5).all()), (nats, wanted, error)
    assert bool((error < 0.1).all())
    if block == 1:
        torch.testing.assert_close(nats, wanted, rtol=1e-4, atol=1e-4)
        assert bool((error < 1e-5).all())


@pytest.mark.parametrize("block", [2, 0])
def test_the_loss_that_is_trained_on_has_the_same_mean(model, block):
    """Independent masks of a random chance, weighed by its inverse: the same bound, but for chances below ``least``."""
    text = (3, 5, 4)
    config = BlockDiffusionConfig(NoiseConfig(block, fill=False, least=1e-3), copies=50)
    objective = BlockDiffusion(model, config, IDS).train()
    batch, found = make_pack([told(text)]), []
    for step in range(60):
        objective.draws.step = step
        with torch.no_grad():
            found.append(float(objective(batch).sums["mask"]) / 50)
    model.eval()
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 60**0.5
    assert float(mean) == pytest.approx(Enumerated(model, block).bound(text), abs=4 * float(error) + 0.01)
    assert float(error) < 0.1


def test_at_once_the_end_belongs_to_what_is_said(model):
    """A span of four fills three letters up with the end: the bound is that of a response which says it."""
    short, long = (5, 4, 3), (5, 4, 3, LETTERS[0])
    filled = likelihood_bound(model, make_pack([told(short)]), IDS, NoiseConfig(0, span=4), draws=8)
    plain = likelihood_bound(model, make_pack([told(long)]), IDS, NoiseConfig(0, fill=False), draws=8)
    torch.testing.assert_close(filled, plain, rtol=1e-5, atol=1e-5)


def test_draws_share_a_forward_and_say_the_same(model):
    batch = make_pack([told((3, 5, 4)), told((4, 4, 4))])
    noise = NoiseConfig(2, fill=True)
    alone = likelihood_bound(model, batch, IDS, noise, draws=6, together=1)
    together = likelihood_bound(model, batch, IDS, noise, draws=6, together=4)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)  # float32 logits under float64 sums
    with pytest.raises(ValueError, match="two draws"):
        likelihood_bound(model, batch, IDS, noise, draws=1)
