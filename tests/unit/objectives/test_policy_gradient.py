"""The policy-gradient objective: its gradient, its counts, what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmagent.agent.advantages import Group
from mmagent.agent.batching import policy_batches
from mmagent.agent.codec import Codec
from mmagent.config import resolve
from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.objectives.policy_gradient import PolicyGradient, PolicyGradientConfig
from mmagent.objectives.surrogates import CriticConfig
from mmagent.packing import Size
from mmagent.testing import check_objective
from mmagent.train.step import train_step
from mmagent.trajectories import Limits, PolicyBatch, Status
from mmagent.types import IGNORE
from tests.agent_kit import GEOMETRY, picture, prompt, tiny_model, tiny_vocab
from tests.engine_kit import ALONE

BUDGET = Size(tokens=4000, patches=4000)


def sampled_groups(model, groups: int = 3, size: int = 4, tokens: int = 6, routing: bool = False) -> list[Group]:
    """Trajectories that ``model`` itself sampled, with made-up rewards."""
    generator = Generator(model, tiny_vocab(), GeneratorConfig(record_routing=routing))
    rows = []
    for g in range(groups):
        image = picture(g, 56 + 28 * g, 84)
        rows += [prompt(f"click number {g}", (image,), group=f"g{g}", key=f"g{g}#{n}") for n in range(size)]
    stops = Codec(tiny_vocab(), GEOMETRY).stop_ids
    limits = [Limits(tokens - n % 3, 1.0, stop_ids=stops, seed=n) for n in range(len(rows))]
    for n, (row, done) in enumerate(zip(rows, generator.generate(list(zip(rows, limits, strict=True))), strict=True)):
        row.extend(done.ids, trainable=True, logprobs=done.logprobs, routed_experts=done.routed_experts)
        row.reward, row.status = float(n % 3 == 0), Status.FINISHED
    return [Group(f"g{g}", tuple(rows[g * size : (g + 1) * size]), 0) for g in range(groups)]


def batches(groups, budget=BUDGET, share_prompts=False, **kwargs) -> list[PolicyBatch]:
    settings = {"image_id": tiny_vocab().image_id, "merge_size": 2, "share_prompts": share_prompts}
    return policy_batches(groups, budget, **settings, **kwargs)


def objective(model, **settings) -> PolicyGradient:
    return PolicyGradient(model, PolicyGradientConfig(**settings), tiny_vocab().barred(model.config.vocab_size))


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "two_sided", "reinforce"])
def test_on_policy_with_advantage_one_it_is_the_gradient_of_minus_logprob(loss):
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    ones = PolicyBatch(batch.stream, torch.ones_like(batch.advantages), batch.behavior_logprobs)
    objective(model, loss=loss, reduction="token")(ones).sums["policy"].backward()
    found = gradients(model)
    model.zero_grad()

    hidden = model(batch.stream, mtp=False).hidden
    scores = F.linear(hidden, model.head_weight)
    scores[:, list(tiny_vocab().barred(model.config.vocab_size))] = float("-inf")
    logp = torch.log_softmax(scores[:-1], -1)
    labels = batch.stream.labels[1:]
    (-logp[torch.arange(len(labels)), labels.clamp(min=0)][labels != IGNORE].sum()).backward()
    for name, expected in gradients(model).items():
        # the sampler's log-probs differ from the trainer's by rounding, and gspo weighs a whole trajectory by them
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_sampler_and_trainer_agree():
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    out = objective(model)(batch)
    tokens = out.metrics["drift"].denominator
    assert tokens == (batch.stream.labels != IGNORE).sum()
    assert out.metrics["drift"].numerator / tokens < 1e-5
    assert out.metrics["drift_outliers"].numerator == 0
    assert out.metrics["clip_fraction"].numerator == 0
    assert 0 < out.metrics["entropy"].numerator / tokens < 6
    assert abs(out.metrics["approx_kl"].numerator) < 1e-4


def test_the_largest_drift_is_that_of_the_whole_step():
    model = tiny_model()
    target = objective(model)
    first, second = batches(sampled_groups(model), packs=2)
    behavior = second.behavior_logprobs.clone()
    behavior[(second.stream.labels != IGNORE).nonzero()[3]] -= 1.5
    for batch in (first, PolicyBatch(second.stream, second.advantages, behavior)):
        target(batch)
    assert target.after_step()["drift_peak"] == pytest.approx(1.5, abs=1e-3)
    assert target.after_step()["drift_peak"] == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "gspo", "reduction": "token"},
        {"loss": "cispo"},
        {"loss": "two_sided"},
        {"critic": CriticConfig(weight=0.5, trunk=True)},
        {"reduction": "tests.unit.objectives.test_surrogates:early_tokens"},
    ],
)
def test_the_public_kit_finds_no_fault(settings):
    model = tiny_model()
    groups = sampled_groups(model)
    (whole,) = batches(groups)
    check_objective(objective(model, **settings), whole, batches(groups, packs=4), tolerance=1e-3, atol=1e-4)


def test_reductions_by_hand():
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    lengths = [sum(row.trainable) for g in sampled_groups(model) for row in g.trajectories]
    owner = batch.stream.segments.ids()[batch.stream.labels != IGNORE]
    advantages = batch.advantages[batch.stream.labels != IGNORE]
    per_row = torch.tensor([advantages[owner == n].mean() for n in range(len(lengths))])

    def value(**settings):
        target = objective(model, **settings)
        return (target(batch).sums["policy"] / target.counts(batch)["policy"]).item()

    # on policy every ratio is 1, so the losses are means of minus the advantages
    assert value(reduction="trajectory") == pytest.approx(-per_row.mean().item(), abs=1e-5)
    assert value(reduction="token") == pytest.approx(-advantages.mean().item(), abs=1e-5)
    total = advantages.sum().item() / (len(lengths) * 32)
    assert value(reduction="constant", constant_tokens=32) == pytest.approx(-total, abs=1e-5)


@pytest.mark.parametrize("reduction", ["trajectory", "token", "constant"])
@pytest.mark.parametrize("mtp", [False, True])
def test_the_gradient_does_not_depend_on_packs_or_shared_prompts(reduction, mtp):
    model = tiny_model()
    groups = sampled_groups(model)
    target = objective(model, reduction=reduction, mtp_weight=0.3 if mtp else 0.0)
    shared = [] if mtp else [{"share_prompts": True}, {"share_prompts": True, "packs": 5}]
    results = []
    for kwargs in [{}, {"packs": 3}, {"packs": 14}, {"budget": Size(150, 200)}, *shared]:
        model.zero_grad()
        packs = batches(groups, **kwargs)
        counts = {k: sum(target.counts(b)[k] for b in packs) for k in target.weights}
        for batch in packs:
            out = target(batch)
            sum(target.weights[k] * out.sums[k] / counts[k] for k in out.sums).backward()
            assert out.metrics["drift"].numerator <= 1e-4 * out.metrics["drift"].denominator
        results.append(gradients(model))
        assert len(packs) >= kwargs.get("packs", 1)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, expected in results[0].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_shared_prompts_and_mtp_exclude_each_other():
    model = tiny_model()
    (batch,) = batches(sampled_groups(model), share_prompts=True)
    with pytest.raises(ValueError, match="MTP needs every document whole"):
        objective(model, mtp_weight=0.3)(batch)


def _train(world: World, packs: int) -> tuple[float, float, np.ndarray]:
    """One step on this rank's share of the same groups."""
    model = tiny_model()
    groups = sampled_groups(model)[world.rank :: world.size]
    model.freeze(["encoder", "mtp"])
    target = objective(model)
    engine = build_engine(
        target,
        build_optimizer(model, OptimConfig(lr=1e-2, muon=False)),
        EngineConfig(parallel="ddp" if world.size > 1 else "none"),
        world,
    )
    result = train_step(target, engine, batches(groups, packs=packs), world)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return result.loss, result.grad_norm, weights.numpy()


def test_the_step_does_not_depend_on_ranks():
    """AdamW's first step is the rate, 1e-2, times ``g / (|g| + 1e-8)``: where a gradient is hardly larger than that,
    rounding moves a weight by some thousandths of the rate; a lost sample would move most weights by all of it."""
    (alone,) = run_ranks(_train, 1, 1)
    first, second = run_ranks(_train, 2, 2)
    assert np.array_equal(first[2], second[2])
    assert alone[0] == pytest.approx(first[0], abs=1e-5)
    assert alone[1] == pytest.approx(first[1], rel=1e-4)
    np.testing.assert_allclose(first[2], alone[2], rtol=0, atol=1e-4)


def test_mtp_learns_without_touching_anything_else():
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    out = objective(model, mtp_weight=0.3)(batch)
    assert set(out.sums) == {"policy", "mtp_1", "mtp_2"}
    (out.sums["mtp_1"] + out.sums["mtp_2"]).backward()
    touched = {name for name, gradient in gradients(model).items() if gradient.abs().max() > 0}
    assert touched
    assert all(name.startswith("mtp.") for name in touched)


def test_drafts_are_accepted_where_they_say_what_the_policy_drew():
    model = tiny_model()
    groups = sampled_groups(model)
    (batch,) = batches(groups)
    metrics = objective(model, mtp_weight=0.3)(batch).metrics
    with torch.no_grad():
        drafts = [F.linear(hidden, model.head_weight).argmax(-1) for hidden in model(batch.stream).mtp_hidden]
    ids, drawn = batch.stream.input_ids, batch.stream.labels != IGNORE
    for depth in (1, 2):
        tried = [t for t in range(len(ids) - depth - 1) if drawn[t + 1 : t + depth + 2].all()]
        accepted = [t for t in tried if all(drafts[k][t] == ids[t + k + 2] for k in range(depth))]
        assert (metrics[f"mtp_{depth}/accept"].numerator, metrics[f"mtp_{depth}/accept"].denominator) == (
            len(accepted), len(tried),
        )  # fmt: skip
        assert len(tried) == sum(max(sum(row.trainable) - depth, 0) for group in groups for row in group.trajectories)
        assert metrics[f"mtp_{depth}/accept_after_image"] == metrics[f"mtp_{depth}/accept"]  # every prompt has one


def test_router_bias_and_an_empty_pack_are_left_alone():
    model = tiny_model()
    before = [r.router.bias.clone() for r in model._routers()]
    target = objective(model, mtp_weight=0.3)
    empty = batches([], packs=1)[0]
    out = target(empty)
    assert {k: v.item() for k, v in target.counts(empty).items()} == {"policy": 0, "mtp_1": 0, "mtp_2": 0}
    sum(out.sums.values()).backward()
    assert all(not g.any() for g in gradients(model).values())
    assert all(m.denominator == 0 for m in out.metrics.values())
    assert target.after_step() == {"drift_peak": 0.0}
    assert all(torch.equal(a, r.router.bias) for a, r in zip(before, model._routers(), strict=True))


def test_replayed_experts_are_used():
    model = tiny_model()
    (batch,) = batches(sampled_groups(model, routing=True))
    assert batch.routed_experts is not None
    plain = objective(model)(PolicyBatch(batch.stream, batch.advantages, batch.behavior_logprobs)).sums["policy"]
    torch.testing.assert_close(objective(model)(batch).sums["policy"], plain, rtol=0, atol=1e-4)
    other = PolicyBatch(
        batch.stream, batch.advantages, batch.behavior_logprobs, routed_experts=(batch.routed_experts + 1) % 4
    )
    assert abs(objective(model)(other).metrics["drift"].numerator) > 0.1


@pytest.mark.parametrize("where", ["layer", "trajectory", "micro-batch"])
def test_a_replay_that_does_not_fit_moves_no_weight(where):
    """Experts of the wrong tokens are valid ids: only the routers' own choices tell that something is amiss. One of
    several layers, trajectories or micro-batches is enough, though the others agree."""
    model = tiny_model()
    groups = sampled_groups(model, routing=True)
    given = [batches(groups[:1])[0], batches(groups[1:])[0]]
    experts = given[1].routed_experts
    opposite = model.config.decoder.moe.top_k  # so many on, of twice as many, are those that were not chosen
    turned = torch.where(experts < 0, -1, (experts + opposite) % (2 * opposite))
    assert model.config.decoder.moe.experts == 2 * opposite == 4
    segments, layer = given[1].stream.segments.ids(), torch.arange(experts.shape[1])
    spoilt = {
        "layer": (layer == 1).view(1, -1, 1),
        "trajectory": (segments == 2).view(-1, 1, 1),
        "micro-batch": torch.ones(1, 1, 1, dtype=torch.bool),
    }[where]
    wrong = replace(given[1], routed_experts=torch.where(spoilt, turned, experts))
    told = {"layer": model.router_names()[1], "trajectory": f"trajectory {given[1].stream.keys[2]}"}
    target = objective(model)
    engine = build_engine(
        target, torch.optim.SGD(target.parameters(), lr=0.1), EngineConfig("none", allow_unused=True), ALONE
    )
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    with pytest.raises(ValueError, match=rf"rank 0, micro-batch 1 of .*{told.get(where, 'replay: ')}.* agrees with"):
        train_step(target, engine, [given[0], wrong], ALONE)
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert target.objections() == []  # forgotten
    lenient = objective(model, replay_floor=0.0)
    lenient.eval()(wrong)
    assert lenient.objections() == []  # what does not train is not judged


def test_a_replay_that_fits_is_taken():
    model = tiny_model()
    given = batches(sampled_groups(model, routing=True))
    target = objective(model)
    engine = build_engine(
        target, torch.optim.SGD(target.parameters(), lr=0.0), EngineConfig("none", allow_unused=True), ALONE
    )
    assert train_step(target, engine, given, ALONE).metrics["router/replay_agreement"] > 0.99  # but for ties
    twice = replace(given[0], routed_experts=torch.where(given[0].routed_experts < 0, -1, 0))
    with pytest.raises(ValueError, match="name one twice"):
        target.counts(twice)


@pytest.mark.parametrize("reduction", ["trajectory", "token"])
def test_the_entropy_term_is_that_of_the_sampled_tokens(reduction):
    """Against full logits and autograd, with each token's weight in the policy's own reduction."""
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    target = objective(model, entropy_weight=0.1, reduction=reduction)
    assert target.weights == {"policy": 1.0, "entropy": 0.1}
    assert target.counts(batch)["entropy"] == target.counts(batch)["policy"]
    target(batch).sums["entropy"].backward()
    found = gradients(model)
    model.zero_grad()

    scores = F.linear(model(batch.stream, mtp=False).hidden, model.head_weight)
    scores[:, list(tiny_vocab().barred(model.config.vocab_size))] = -1e4  # no infinity in p log p
    logp = torch.log_softmax(scores[:-1], -1)
    kept = batch.stream.labels[1:] != IGNORE
    entropy = -(logp.exp() * logp).sum(-1)[kept]
    owner = batch.stream.segments.ids()[1:][kept]
    weights = 1 / torch.bincount(owner)[owner] if reduction == "trajectory" else torch.ones(len(owner))
    (-entropy * weights).sum().backward()
    for name, expected in gradients(model).items():
        bound = 5e-6 * max(1.0, expected.abs().max().item())  # rounding is that of the largest: 2e-6 of it was seen
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_kl_needs_a_reference():
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    with pytest.raises(ValueError, match="reference"):
        objective(model, kl_weight=0.1)(batch)
    same = PolicyBatch(batch.stream, batch.advantages, batch.behavior_logprobs, batch.behavior_logprobs)
    out = objective(model, kl_weight=0.1)(same)
    assert out.sums["kl"].item() == pytest.approx(0.0, abs=1e-6)
    assert objective(model, kl_weight=0.1).weights == {"policy": 1.0, "kl": 0.1}


def test_bands_drop_tokens_and_settings_are_checked():
    with pytest.raises(ValueError, match=r"policy\.entropy_weight: -0\.1"):
        PolicyGradientConfig(entropy_weight=-0.1)
    model = tiny_model()
    (batch,) = batches(sampled_groups(model))
    far = PolicyBatch(batch.stream, batch.advantages, batch.behavior_logprobs - 5.0)
    assert objective(model, importance_band=(0.5, 2.0))(far).sums["policy"].item() == 0.0
    config = resolve(PolicyGradientConfig(), ["importance_band=[0.5,2.0]", "loss=cispo"])
    assert tuple(config.importance_band) == (0.5, 2.0)
    for wrong in ({"loss": "dpo"}, {"reduction": "mean"}, {"temperature": 0.0}):
        with pytest.raises(ValueError):
            PolicyGradientConfig(**wrong)
