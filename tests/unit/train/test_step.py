"""The one formula, its zero counts, and how it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmagent.engine.build import build_engine
from mmagent.engine.config import EngineConfig
from mmagent.engine.optim import OptimConfig, build_optimizer
from mmagent.engine.torch_engine import TorchEngine
from mmagent.train.metrics import keys_of, volume_of
from mmagent.train.step import train_step
from mmagent.types import PackedVision, PairedBatch, Ratio, Segments, StepOutput
from tests.engine_kit import ALONE, Toy, ToyBatch


def batches(n: int = 3) -> list[ToyBatch]:
    torch.manual_seed(5)
    return [ToyBatch(torch.randn(i + 1, 6), tuple(f"b{i}s{j}" for j in range(i + 1))) for i in range(n)]


def engine_for(toy: Toy, clip_norm: float = 0.0, **config) -> TorchEngine:
    optimizer = torch.optim.SGD(toy.parameters(), lr=1.0)
    return build_engine(toy, optimizer, EngineConfig("none", clip_norm=clip_norm, **config), ALONE)


def step(toy: Toy, given: list[ToyBatch], lr_scale: float = 1.0, **config):
    return train_step(toy, engine_for(toy, **config), given, ALONE, lr_scale)


def fresh() -> Toy:
    torch.manual_seed(0)
    return Toy()


def test_it_divides_global_sums_by_global_counts():
    toy, given = fresh(), batches()
    whole = ToyBatch(torch.cat([b.values for b in given]))
    sums, counts = toy.eval()(whole).sums, toy.counts(whole)
    loss = sum(toy.weights[t] * sums[t] / counts[t] for t in sums)
    wanted = torch.autograd.grad(loss, list(toy.parameters()))
    before = [p.detach().clone() for p in toy.parameters()]
    result = step(toy.train(), given)
    for parameter, start, gradient in zip(toy.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(start - parameter, gradient)
    assert result.loss == pytest.approx(loss.item())
    assert result.losses == pytest.approx({t: (sums[t] / counts[t]).item() for t in sums})
    assert result.counts == {t: float(c) for t, c in counts.items()}
    assert result.metrics["error"] == pytest.approx((sums["common"] / counts["common"]).item())
    assert result.metrics["seen"] == 6.0  # what after_step returned
    assert result.volume == {"tokens": 6.0, "patches": 0.0, "documents": 6.0}
    assert result.grad_norm == pytest.approx(torch.stack([g.norm() for g in wanted]).norm().item())


def test_an_objective_may_see_all_micro_batches_first():
    """Once a step, before any graph, and through the forward that follows: here in the engine's precision."""

    class Peeking(Toy):
        def __init__(self):
            super().__init__()
            self.calls: list[object] = []

        def prepare(self, micro_batches, forward):
            with torch.no_grad():
                self.calls.append([float(forward(batch).sums["common"]) for batch in micro_batches])

        def forward(self, batch):
            output = super().forward(batch)
            if torch.is_grad_enabled():
                self.calls.append(float(output.sums["common"].detach()))
            return output

    torch.manual_seed(0)
    toy, given = Peeking(), batches()
    step(toy, given, dtype="bfloat16")
    (first, *later) = toy.calls
    assert first == later
    assert len(later) == len(given)


def test_the_record_is_flat_and_names_never_collide():
    record = step(fresh(), batches()).record()
    assert {"loss", "loss/common", "loss/rare", "error", "tokens", "grad_norm"} <= set(record)
    assert all(isinstance(value, float) for value in record.values())


def test_a_term_that_nothing_counts_is_harmless_and_left_out():
    toy = fresh()
    result = step(toy, [ToyBatch(torch.ones(2, 6))])
    assert result.counts["rare"] == 0
    assert "rare" not in result.losses
    assert result.loss == pytest.approx(result.losses["common"])
    assert all(torch.isfinite(p).all() for p in toy.parameters())


def test_nothing_counted_at_all_moves_nothing():
    class Silent(Toy):
        def counts(self, batch):
            return dict.fromkeys(self.weights, torch.tensor(0))

        def forward(self, batch):
            output = super().forward(batch)
            return StepOutput({t: 0.0 * s for t, s in output.sums.items()})

    torch.manual_seed(0)
    toy = Silent()
    before = {n: p.clone() for n, p in toy.named_parameters()}
    result = step(toy, batches())
    assert (result.loss, result.losses, result.grad_norm) == (0, {}, 0.0)
    assert all(torch.equal(before[n], p) for n, p in toy.named_parameters())


def test_lr_scale_scales_the_step():
    full, half = fresh(), fresh()
    start = fresh().experts.detach()
    step(full, batches())
    step(half, batches(), lr_scale=0.5)
    torch.testing.assert_close(2 * (half.experts - start), full.experts - start)


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    toy = fresh()
    before = torch.cat([p.detach().flatten() for p in toy.parameters()])
    result = step(toy, batches(), clip_norm=0.25)
    moved = before - torch.cat([p.detach().flatten() for p in toy.parameters()])
    assert result.grad_norm > 0.25
    assert moved.norm().item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_samples_and_changes_nothing(bad):
    toy, given = fresh(), batches()
    given[1] = replace(given[1], values=torch.full((2, 6), bad))
    before = {n: p.clone() for n, p in toy.named_parameters()}
    with pytest.raises(
        FloatingPointError, match=r"rank 0, micro-batch 1: common is (nan|inf); samples: b1s0, b1s1"
    ) as e:
        step(toy, given)
    assert "b0s0" not in str(e.value)
    assert all(torch.equal(before[n], p) for n, p in toy.named_parameters())


def test_a_gradient_that_is_not_finite_names_the_parameters():
    class Steep(Toy):
        def forward(self, batch):
            output = super().forward(batch)
            trap = (self.experts[0, 0, 0] * 0).sqrt()  # zero, with an infinite slope
            return StepOutput({**output.sums, "common": output.sums["common"] + trap})

    toy = Steep()
    with pytest.raises(FloatingPointError, match=r"gradient norm is nan; first seen in experts"):
        step(toy, batches())


def test_terms_must_agree():
    toy = fresh()
    toy.weights = {"common": 1.0}
    with pytest.raises(ValueError, match=r"counts \['common', 'rare'\], but its weights are for \['common'\]"):
        step(toy, batches())
    toy = fresh()
    toy.forward = lambda batch: StepOutput({"common": toy.experts.sum()})
    with pytest.raises(ValueError, match=r"returned sums \['common'\]"):
        step(toy, batches())
    with pytest.raises(ValueError, match="at least one"):
        step(fresh(), [])


def test_parameters_that_nothing_uses_or_trains_are_errors():
    toy = fresh()
    toy.forgotten = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"no gradient reached: forgotten. Freeze"):
        step(toy, batches())
    step(toy, batches(), allow_unused=True)
    toy.forgotten.requires_grad_(False)
    step(toy, batches())
    bare = fresh()
    optimizer = build_optimizer(bare, OptimConfig())
    bare.late = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="not in the optimizer: late"):
        build_engine(bare, optimizer, EngineConfig("none"), ALONE)


def test_engine_configs_are_checked():
    for wrong in ({"parallel": "dpp"}, {"dtype": "float16"}, {"clip_norm": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EngineConfig(**wrong)
    toy = fresh()
    with pytest.raises(ValueError, match="2 ranks"):
        build_engine(toy, torch.optim.SGD(toy.parameters()), EngineConfig("none"), replace(ALONE, size=2))


def test_keys_and_volume_of_batches():
    vision = PackedVision(torch.zeros(8, 3), torch.tensor([[1, 2, 2], [1, 2, 2]]))
    pairs = PairedBatch(vision, torch.arange(5), Segments([2, 3]), ("a", "b"))
    assert keys_of(pairs) == ("a", "b")
    assert volume_of(pairs) == {"tokens": 5, "patches": 8, "documents": 2}
    assert keys_of({"a": 1}) == ()  # a method named keys is not a list of samples
    assert volume_of({}) == {"tokens": 0, "patches": 0, "documents": 0}
    assert Ratio(torch.ones(()), torch.ones(())).denominator == 1
