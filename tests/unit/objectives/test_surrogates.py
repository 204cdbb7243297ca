"""What the objective makes of a batch beyond the plain loss: a critic, a teacher, older policies, a user's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmagent.config import ConfigError
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.losses.policy import PolicySum
from mmagent.objectives.policy_gradient import PolicyGradientConfig
from mmagent.objectives.surrogates import CriticConfig, Surrogate
from mmagent.types import IGNORE
from tests.agent_kit import tiny_model
from tests.unit.objectives.test_policy_gradient import batches, gradients, objective, sampled_groups


def early_tokens(rows, trajectories):
    """A reduction: the first token of a trajectory alone."""
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    return first.float()


def only_good(tokens, config):
    """A loss: imitate what went well."""
    good = (tokens.advantages > 0) * tokens.weights
    return PolicySum(-(good * tokens.logprobs).sum(), torch.zeros(()))


def near(old, behavior):
    """A correction: no token that the sampler saw otherwise."""
    return ((old - behavior).abs() < 1e-2).float()


def takes_one(old):
    return old


def test_a_loss_a_reduction_and_a_correction_of_ones_own():
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    here = __name__
    own = objective(model, loss=f"{here}:only_good", reduction=f"{here}:early_tokens", correction=f"{here}:near")
    own(batch).sums["policy"].backward()
    found = gradients(model)
    model.zero_grad()
    assert own.counts(batch)["policy"] == 12  # trajectories
    reference = objective(model, reduction="token")
    marked = torch.zeros_like(batch.advantages)
    labels = batch.stream.labels != IGNORE
    first = labels.clone()
    first[1:] &= ~labels[:-1]
    marked[first & (batch.advantages > 0)] = 1.0
    reference(replace(batch, advantages=marked)).sums["policy"].backward()
    for name, expected in gradients(model).items():
        # the reference's ratios differ from one by the rounding of two kernels
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("key", ["loss", "reduction", "correction"])
def test_what_does_not_fit_is_refused_at_once(key):
    with pytest.raises(ValueError, match=rf"policy\.{key}: .*takes_one must take 2 positional"):
        Surrogate(PolicyGradientConfig(**{key: f"{__name__}:takes_one"}))
    with pytest.raises(ConfigError, match="did you mean 'only_good'"):
        Surrogate(PolicyGradientConfig(**{key: f"{__name__}:only_god"}))


def test_a_critic_makes_advantages_and_learns_what_to_expect():
    model = tiny_model()
    model.freeze(["encoder", "mtp"])
    (batch,) = batches(sampled_groups(model), estimator="raw")
    target = objective(model, critic=CriticConfig(weight=0.5, decay=1.0, clip=0.0))
    assert target.weights == {"policy": 1.0, "value": 0.5}
    out = target(batch)
    # a critic that says 0 leaves every token its trajectory's reward, and is wrong by half its square
    plain = objective(model)(batch)
    torch.testing.assert_close(out.sums["policy"], plain.sums["policy"])
    rewards = torch.tensor([row.reward for group in sampled_groups(model) for row in group.trajectories])
    assert out.sums["value"].item() == pytest.approx((rewards**2).sum().item() / 2)
    optimizer = build_optimizer(target, OptimConfig(lr=0.05, muon=False, weight_decay=0.0))
    assert {group["role"] for group in optimizer.param_groups} >= {"critic"}
    for _ in range(60):
        optimizer.zero_grad()
        target(batch).sums["value"].backward()
        assert model.head_weight.grad is None  # it looks at the trunk, and does not pull at it
        optimizer.step()
    assert target(batch).sums["value"].item() < 0.6 * out.sums["value"].item()


def test_a_teacher_is_an_advantage():
    model, teacher = tiny_model(), tiny_model(seed=1)
    (batch,) = batches(sampled_groups(model))
    silent = replace(batch, advantages=torch.zeros_like(batch.advantages))
    taught = objective(teacher).remember(silent, reference=True)
    with torch.no_grad():
        alike = objective(model).remember(silent, reference=True)
    assert alike.reference_logprobs is not None
    sampled = batch.stream.labels != IGNORE
    torch.testing.assert_close(alike.reference_logprobs[sampled], batch.behavior_logprobs[sampled], rtol=0, atol=1e-4)
    assert not alike.reference_logprobs[~sampled].any()
    target = objective(model, distill_weight=2.0, reduction="token")
    target(taught).sums["policy"].backward()
    found = gradients(model)
    model.zero_grad()
    assert taught.reference_logprobs is not None
    by_hand = replace(silent, advantages=2.0 * (taught.reference_logprobs - alike.reference_logprobs) * sampled)
    objective(model, reduction="token")(by_hand).sums["policy"].backward()
    for name, expected in gradients(model).items():
        bound = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ValueError, match="distill_weight need reference"):
        target(batch)


def test_ratios_against_the_trainers_own_policy_and_a_correction_for_the_samplers():
    """A sampler that was off by a constant: its ratio is a weight, and clips nothing."""
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    off = replace(batch, behavior_logprobs=batch.behavior_logprobs - 0.5)
    plain = objective(model, ratio="trainer", importance_cap=0.0)(off)
    cut = objective(model, ratio="trainer", importance_cap=1.2)(off)
    assert plain.metrics["clip_fraction"].numerator == 0
    torch.testing.assert_close(cut.sums["policy"], 1.2 * plain.sums["policy"])
    assert objective(model)(off).metrics["clip_fraction"].numerator > 0
    # before the second update: as remembered
    target = objective(model, ratio="trainer", importance_cap=0.0, critic=CriticConfig(weight=1.0))
    known = target.remember(off)
    assert known.old_values is not None
    with torch.no_grad():
        model.head_weight.mul_(1.5)
    moved = target(known)
    assert moved.metrics["clip_fraction"].numerator > 0
    assert target(off).metrics["clip_fraction"].numerator == 0
    assert known.to("cpu").old_logprobs is not None
