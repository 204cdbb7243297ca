"""Reinforcement of blocks: its expectation is the policy gradient of the steps that were taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmagent.models.agent_model import AgentModel
from mmagent.objectives.block_policy import BlockPolicyConfig, BlockPolicyGradient, policy_objective
from mmagent.objectives.noise import NoiseConfig, NoiseIds
from mmagent.objectives.policy_gradient import PolicyGradient, PolicyGradientConfig
from mmagent.protocols import Objective
from mmagent.testing import check_objective
from mmagent.trajectories import PolicyBatch, UnmaskingBatch
from mmagent.types import IGNORE
from tests.agent_kit import tiny_model, tiny_vocab
from tests.diffusion_kit import IDS, MASK, documents, make_model, naive_blocks, predict
from tests.model_kit import make_pack

ADVANTAGES = (0.7, -0.4, 1.1)


def known(chosen=(0, 1, 2), steps: int = 3) -> UnmaskingBatch:
    """Answers whose tokens were said in some order, and how much better each was."""
    every = documents()
    batch = replace(make_pack([every[n] for n in chosen]), keys=tuple(f"way {n}" for n in chosen))
    worth = torch.cat([torch.full((len(every[n]["ids"]),), ADVANTAGES[n]) for n in chosen])
    order = torch.cat([(torch.arange(len(every[n]["ids"])) * 5 + n) % steps for n in chosen])
    return UnmaskingBatch(batch, torch.where(batch.labels == IGNORE, -1, order), worth)


def rollout(known_ways: UnmaskingBatch) -> PolicyBatch:
    return PolicyBatch(known_ways.stream, known_ways.advantages, torch.zeros_like(known_ways.advantages))


def test_expectation_is_the_log_probability_of_the_steps_that_were_taken():
    """Every step of every block asked by itself, from the state that it was taken in."""
    model, ways = make_model(), known()
    wanted = 0.0
    for n, document in enumerate(documents()):
        blocks = naive_blocks(document["labels"], 4)
        start = ways.stream.segments.offsets()[n]
        order = ways.order[start : start + len(blocks)].tolist()
        said = [at for at, label in enumerate(document["labels"].tolist()) if label != IGNORE]
        total = 0.0
        for unit in sorted({blocks[at] for at in said}):
            inside = [at for at in said if blocks[at] == unit]
            past = [at for at in range(len(blocks)) if blocks[at] < unit]
            missing = -len(inside) % 4  # an answer's last block is as long as the others, and masks to its end
            first = document["positions"][:, inside[0], None]
            positions = torch.cat([document["positions"][:, past], first + torch.arange(4)], dim=1)
            for step in sorted({order[at] for at in inside}):
                state = [MASK if order[at] >= step else int(document["ids"][at]) for at in inside]
                ids = torch.cat([document["ids"][past], torch.tensor([*state, *[MASK] * missing])])
                logp = predict(model, document, [*(blocks[at] for at in past), *[unit] * 4], ids, positions)
                for place, at in enumerate(inside):
                    if order[at] == step:
                        total += float(logp[len(past) + place, document["ids"][at]])
        wanted -= ADVANTAGES[n] * total / len(said)
    copies = 600
    objective = BlockPolicyGradient(model, BlockPolicyConfig(NoiseConfig(4), copies=copies), IDS)
    with torch.no_grad():
        got = float(objective(ways).sums["policy"])
    assert got == pytest.approx(wanted, abs=0.25)  # four times 1.44 / sqrt(600): the spread of one draw, measured
    assert int(objective.counts(ways)["policy"]) == 3


def test_complementary_masks_ask_for_every_token_once():
    objective = BlockPolicyGradient(make_model(), BlockPolicyConfig(NoiseConfig(4), copies=3), IDS)
    batch = rollout(known())
    tokens = int((batch.stream.labels != IGNORE).sum())
    metrics = objective(batch).metrics
    assert float(metrics["asked_nll"].denominator) == 3 * tokens


@pytest.mark.parametrize("kind", [rollout, lambda ways: ways])
def test_reinforcement_does_not_depend_on_the_split(kind):
    objective = BlockPolicyGradient(make_model(), BlockPolicyConfig(NoiseConfig(4)), IDS)
    assert isinstance(objective, Objective)
    check_objective(objective, kind(known()), [kind(known((n,))) for n in range(3)], tolerance=5e-4)


def test_a_step_makes_better_answers_likelier_and_worse_ones_less_likely():
    model, batch = make_model(), rollout(known())
    objective = BlockPolicyGradient(model, BlockPolicyConfig(NoiseConfig(4), copies=8), IDS)
    up = replace_advantages(batch, 1.0)
    before = float(objective(up).sums["policy"].detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        objective(up).sums["policy"].backward()
        optimizer.step()
    assert float(objective(up).sums["policy"].detach()) < before
    down = replace_advantages(batch, -1.0)
    assert float(objective(down).sums["policy"].detach()) == pytest.approx(
        -float(objective(up).sums["policy"].detach()), rel=1e-5
    )


def replace_advantages(batch: PolicyBatch, value: float) -> PolicyBatch:
    return replace(batch, advantages=torch.full_like(batch.advantages, value))


def test_the_model_says_who_reinforces_it():
    model, vocab = tiny_model(), tiny_vocab()
    assert isinstance(policy_objective(model, PolicyGradientConfig(), vocab), PolicyGradient)
    blocks = AgentModel(replace(model.config, denoises=4))
    made = policy_objective(blocks, PolicyGradientConfig(), vocab)
    assert isinstance(made, BlockPolicyGradient)
    assert made.config.noise.block == 4
    assert not made.shares_prompts
    assert not set(made.ids.others.tolist()) & set(vocab.barred(blocks.config.vocab_size))
    assert made.ids.barred == (vocab.pad_id,)
    with pytest.raises(ValueError, match="says blocks"):
        PolicyGradient(blocks, PolicyGradientConfig())
    with pytest.raises(ValueError, match="temperature, kl_weight"):
        policy_objective(blocks, PolicyGradientConfig(kl_weight=0.1, temperature=0.5), vocab)
    for settings in ({"loss": "gspo"}, {"reduction": "token"}, {"clip_high": 0.4}, {"importance_band": [0.5, 2]}):
        with pytest.raises(ValueError, match=f"policy: {next(iter(settings))} cannot be had"):
            policy_objective(blocks, PolicyGradientConfig(**settings), vocab)


def test_what_cannot_be_reinforced_is_refused():
    with pytest.raises(ValueError, match="blocks of 0"):
        BlockPolicyConfig(NoiseConfig(0))
    objective = BlockPolicyGradient(make_model(), BlockPolicyConfig(NoiseConfig(4)), IDS)
    ways = known()
    with pytest.raises(ValueError, match="advantages"):
        objective.counts(UnmaskingBatch(ways.stream, ways.order))
    assert isinstance(objective.ids, NoiseIds)
