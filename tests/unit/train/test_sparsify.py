"""Scores at the gradient that the optimizer takes, zeros that stay, and runs that go on as if they had not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.interop.packed_folder import load_masks
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.models.memory import MemoryConfig
from mmagent.sparsity.patterns import PatternConfig, density, make_masks
from mmagent.sparsity.stages import SparsityConfig
from mmagent.train.health import HealthConfig
from mmagent.train.loop import fit
from mmagent.train.sparsify import Sparsifier, prunable
from mmagent.train.step import train_step
from tests.agent_kit import tiny_model
from tests.engine_kit import ALONE, Toy, ToyBatch, toy_run

NAME = "stacked.weight"  # the only matrix in a block of the toy


def staged(pattern: str = "tile-2d") -> SparsityConfig:
    return SparsityConfig([0.25, 0.5], score=3, steps=2, pattern=PatternConfig(pattern, granularity=2, delta=0.05))


def toy(clip: float, muon: bool = True) -> tuple[Toy, object, Sparsifier]:
    torch.manual_seed(0)
    objective = Toy()
    built = build_optimizer(objective, OptimConfig(lr=0.02, muon=muon))
    engine = build_engine(objective, built, EngineConfig(clip_norm=clip), ALONE)
    return objective, engine, Sparsifier(objective, built, staged())


def batches(seed: int, parts: int) -> list[ToyBatch]:
    values = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))
    return [ToyBatch(part) for part in values.split(12 // parts)]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_score_is_that_of_the_step_however_it_is_split(clip, parts):
    """A plain reference: autograd over the whole batch, one formula, clipped by the norm over all parameters."""
    objective, engine, sparsifier = toy(clip)
    wanted = torch.zeros_like(objective.stacked.weight)
    for step in range(3):
        plain = Toy()
        plain.load_state_dict(objective.state_dict())
        (whole,) = batches(step, 1)
        sums, counts = plain(whole).sums, plain.counts(whole)
        sum(plain.weights[t] * sums[t] / counts[t] for t in sums).backward()
        norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        share = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
        wanted += (share * plain.stacked.weight.grad * plain.stacked.weight.detach()) ** 2
        train_step(objective, engine, batches(step, parts), ALONE)
    torch.testing.assert_close(sparsifier.scores[NAME], wanted, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("muon", [True, False])
def test_zeros_stay_zeros_and_are_forgotten(muon):
    """Muon mixes all entries of a matrix in its step, and decay and momentum go on without a gradient."""
    objective, engine, sparsifier = toy(1.0, muon)
    for step in range(8):
        before = {n: s.clone() for n, s in sparsifier.scores.items()}
        train_step(objective, engine, batches(step, 2), ALONE)
        record: dict[str, float] = {}
        due = sparsifier.config.stage(step + 1) > sparsifier.stage
        if due:
            change = sparsifier.scores[NAME] - before[NAME]
            assert (change >= 0).all()
        left = density({NAME: sparsifier.masks[NAME]})
        sparsifier(step + 1, record)
        mask = sparsifier.masks[NAME]
        assert record["sparsity/asked"] == [0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.5][step]
        assert record["sparsity/density"] == pytest.approx(left)
        assert not due or density({NAME: mask}) < left
        assert (objective.stacked.weight[mask == 0] == 0).all()
        assert objective.stacked.weight[mask != 0].ne(0).any()
        assert not due or not sparsifier.scores[NAME].any()  # a stage begins with nothing
    assert (sparsifier.scores[NAME][mask == 0] == 0).all()  # and what is gone scores nothing


def test_masks_are_made_of_the_scores(tmp_path):
    objective, engine, sparsifier = toy(1.0)
    for step in range(2):
        train_step(objective, engine, batches(step, 2), ALONE)
    wanted = make_masks({NAME: sparsifier.scores[NAME].clone()}, 0.25, sparsifier.config.pattern)
    sparsifier.prune(1)
    assert torch.equal(sparsifier.masks[NAME], wanted[NAME])
    assert torch.equal(sparsifier.whole_masks()[NAME], wanted[NAME])
    remembered = {NAME: torch.ones(9, 6), "other": torch.ones(2)}
    cleaned = sparsifier.leave(remembered, tmp_path / "masks", "stacked")
    assert torch.equal(cleaned[NAME], wanted[NAME].float())
    assert cleaned["other"] is remembered["other"]
    masks, pattern = load_masks(tmp_path / "masks")
    assert pattern == sparsifier.config.pattern
    assert torch.equal(masks["weight"], wanted[NAME])


def train(folder: Path, upto: int, config: SparsityConfig, **options):
    toy = toy_run(folder, **options)
    sparsifier = Sparsifier(toy.objective, toy.engine.optimizer, config)
    toy.run.parts = {**toy.run.parts, "sparsity": sparsifier}
    records: list[dict[str, float]] = []

    def save(step: int, record: dict[str, float]) -> None:
        records.append(dict(record))
        toy.run.save(step)

    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=upto, last=9, hooks=[sparsifier, save])
    toy.run.settle()
    return toy, sparsifier, records


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
@pytest.mark.parametrize("pattern", ["tile-2d", "tile-element"])
def test_a_run_that_stopped_goes_on_bitwise(tmp_path, stop, pattern):
    """Before the first pruning, at one, between two, and at the last."""
    whole, masks, records = train(tmp_path / "whole", 9, staged(pattern))
    train(tmp_path / "parts", stop, staged(pattern))
    again, same, rest = train(tmp_path / "parts", 9, staged(pattern))
    state = whole.objective.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in again.objective.state_dict().items())
    assert torch.equal(same.masks[NAME], masks.masks[NAME])
    assert torch.equal(same.scores[NAME], masks.scores[NAME])
    shown = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in (*records[stop:], *rest)]
    assert [{**r, "rate": 0} for r in shown[: len(rest)]] == [{**r, "rate": 0} for r in shown[len(rest) :]]


def test_a_step_that_is_refused_leaves_no_trace(tmp_path):
    health = HealthConfig(on_not_finite="skip")
    _, sparsifier, records = train(tmp_path, 4, staged(), health=health, spoil={2: float("nan")})
    assert [r["health/left_out"] for r in records] == [0, 0, 1, 0]
    assert torch.isfinite(sparsifier.scores[NAME]).all()
    assert sparsifier.stage == 1  # a stage that ends with a step that was left out ends all the same


def test_going_back_takes_the_masks_along(tmp_path):
    """Back before a pruning, nothing is pruned; weights of a later checkpoint than the masks get their zeros."""
    toy, sparsifier, _ = train(tmp_path, 4, staged(), keep=9)
    toy.run.rollback(2)
    assert sparsifier.stage == 0
    assert sparsifier.masks[NAME].all()
    state = sparsifier.state_dict()
    state["masks"] = {NAME: torch.zeros(9, 6, dtype=torch.uint8)}
    sparsifier.load_state_dict({**state, "stage": 1})
    assert not toy.objective.stacked.weight.any()


def test_what_has_no_gradient_is_not_pruned_by_silence():
    objective, engine, sparsifier = toy(1.0)
    objective.stacked.weight.requires_grad_(False)
    for step in range(2):
        train_step(objective, engine, batches(step, 1), ALONE)
        sparsifier(step + 1, {})
    train_step(objective, engine, batches(2, 1), ALONE)
    with pytest.raises(ValueError, match=r"no gradient reached stacked\.weight"):
        sparsifier(3, {})


def test_an_engine_that_steps_another_optimizer_is_told():
    _, _, sparsifier = toy(1.0)
    with pytest.raises(ValueError, match="not by the optimizer"):
        sparsifier(1, {})
    sparsifier(1, {"health/left_out": 1.0})


def test_a_state_of_another_model_or_schedule_is_refused():
    _, _, sparsifier = toy(1.0)
    state = sparsifier.state_dict()
    with pytest.raises(ValueError, match="scores of Toy"):
        sparsifier.load_state_dict({**state, "scores": {}})
    with pytest.raises(ValueError, match="at level 3"):
        sparsifier.load_state_dict({**state, "stage": 3})


def test_no_levels_do_nothing(tmp_path):
    plain = toy_run(tmp_path / "plain")
    fit(plain.run, plain.objective, plain.engine, plain.stream, steps=3)
    off, sparsifier, records = train(tmp_path / "off", 3, SparsityConfig())
    state = plain.objective.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in off.objective.state_dict().items())
    assert sparsifier.state_dict() == {"stage": 0, "density": 1.0, "reached": {}, "scores": {}, "masks": {}}
    assert not [name for name in records[0] if name.startswith("sparsity")]


def test_what_is_pruned_of_an_agent():
    """Products inside blocks, of attention, feed-forwards and experts; no router, embedding, projector or head."""
    model = tiny_model()
    found = prunable(model)
    own = dict(model.named_parameters())
    assert {own[name].ndim for name in found} == {2, 3}
    assert set(found.values()) >= {"encoder", "decoder"}
    routers = {id(block.moe.router.weight) for block in model.decoder.blocks if block.moe is not None}
    outside = {id(p) for p in (*model.projector.parameters(), model.embedding.weight)} | routers
    assert routers
    assert not outside & {id(own[name]) for name in found}
    assert set(prunable(model, ["encoder"]).values()) == {"encoder"}
    model.set_memory(MemoryConfig(chunk_patches=64))
    assert prunable(model) == found
    with pytest.raises(ValueError, match=r"sparsity\.roles: no matrix in a block has the role projector"):
        prunable(model, ["projector"])
    with pytest.raises(ValueError, match="Linear has no blocks"):
        prunable(torch.nn.Linear(2, 2))
    assert set(prunable(CogViT(cogvit_debug())).values()) == {"encoder"}
