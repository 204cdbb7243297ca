"""Negatives from the whole step: value and gradient are those of one process that holds it as one batch, whatever the
ranks, micro-batches and sharding, and the graph of one micro-batch is the most that is ever held."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from mmagent.dist import World, run_ranks
from mmagent.engine.build import build_engine
from mmagent.engine.checkpoint import gather_weights
from mmagent.engine.config import EngineConfig
from mmagent.objectives.alignment import Alignment, AlignmentConfig
from mmagent.testing import check_objective
from mmagent.train.step import StepResult, train_step
from mmagent.types import Segments
from tests.alignment_kit import CLASSES, PLACES, pairs, plain_loss, small_alignment
from tests.engine_kit import ALONE

PAIRS = 12
WHOLE = ((tuple(range(PAIRS)),),)
CONTRAST = AlignmentConfig(width=16)
EVERYTHING = AlignmentConfig(width=16, words_weight=0.5, words_rarity=True, classes=CLASSES, places=PLACES)


@dataclass(frozen=True)
class Case:
    """``split[rank][micro-batch]`` lists pairs, or none."""

    split: tuple[tuple[tuple[int, ...], ...], ...]
    parallel: str = "ddp"
    dtype: str = "float32"
    config: AlignmentConfig = field(default_factory=lambda: EVERYTHING)


SPLITS = {
    1: [(((0, 1, 2, 3, 4), (5,), (6, 7, 8, 9, 10, 11)),)],
    2: [(((0, 1, 2), (3,)), ((4, 5, 6, 7, 8, 9), (10, 11))), (((0,), (1, 2), (3, 4, 5)), ((6,), (7, 8, 9, 10), (11,)))],
    3: [(((0,), (1, 2)), ((3, 4, 5, 6), (7,)), ((8, 9), (10, 11)))],
    4: [(((0, 1), (2,)), ((3,), ()), ((), ()), ((4, 5, 6, 7, 8, 9, 10), (11,)))],
}


def train(world: World, case: Case) -> tuple[dict[str, Tensor], list[StepResult]]:
    """Two steps, so that rarity has counted. Without clipping and at rate 0.1, weights move by the gradient itself:
    they are some 0.2 large and their gradients some 1, so that the weight's own rounding hides nothing."""
    objective = small_alignment(case.config)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    engine = build_engine(objective, optimizer, EngineConfig(case.parallel, case.dtype, clip_norm=0.0), world)
    batches = [pairs(part) for part in case.split[world.rank]]
    results = [train_step(objective, engine, batches, world) for _ in range(2)]
    return gather_weights(objective), results


def train_all(world: World, cases: Sequence[Case]) -> list[tuple[dict[str, Tensor], list[StepResult]]]:
    return [train(world, case) for case in cases]


def compare(got, wanted, atol: float = 5e-6, rtol: float = 1e-4) -> None:
    """By default up to the order in which float32 sums of some hundred terms near 1 are taken, twice."""
    weights, results = got
    assert set(weights) == set(wanted[0])
    for name, tensor in wanted[0].items():
        torch.testing.assert_close(weights[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    for result, expected in zip(results, wanted[1], strict=True):
        assert result.loss == pytest.approx(expected.loss, rel=max(rtol, 1e-5))
        assert result.losses == pytest.approx(expected.losses, rel=max(rtol, 1e-5))
        assert result.counts == expected.counts
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=10 * rtol)
        if rtol < 1e-3:
            assert result.metrics == pytest.approx(expected.metrics, rel=1e-4)


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], list[StepResult]]:
    return train(ALONE, Case(WHOLE))


def test_the_reference_is_the_formula_over_all_pairs(reference):
    model, batch = small_alignment(EVERYTHING), pairs(range(PAIRS))
    images, texts = model.embed_images(batch.vision), model.embed_texts(batch.text_ids, batch.segments)
    expected = plain_loss(images, texts, *model.temperature()).item() / PAIRS
    assert reference[1][0].losses["contrastive"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_and_micro_batches_change_nothing(ranks, reference):
    kinds = ("ddp", "fsdp2") if ranks == 2 else ("ddp",)
    cases = [Case(split, parallel) for parallel in kinds for split in SPLITS[ranks]]
    for outcome in run_ranks(train_all, ranks, cases)[0]:
        compare(outcome, reference)


def moved(weights: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] - tensor for name, tensor in start.items()}


def test_bfloat16_follows():
    """Autocast is the same in both passes. Against one process in float32, bfloat16 moves some parameter 4 % off in two
    steps; against one in bfloat16, splitting must cost less. FSDP2 rounds parameters that autocast leaves alone, such
    as norms: twice that. It may not round the temperature: a scale of 10 would be seen as 9.94."""
    cases = [Case(SPLITS[2][1], parallel, "bfloat16", CONTRAST) for parallel in ("ddp", "fsdp2")]
    start = {name: tensor.clone() for name, tensor in small_alignment(CONTRAST).state_dict().items()}
    weights, results = train(ALONE, Case(WHOLE, dtype="bfloat16", config=CONTRAST))
    wanted = moved(weights, start)
    for (got, (first, second)), case in zip(run_ranks(train_all, 2, cases)[0], cases, strict=True):
        assert first.loss == pytest.approx(results[0].loss, rel=1e-2)
        assert first.metrics["top1"] == pytest.approx(results[0].metrics["top1"], abs=0.1)
        assert first.metrics["scale"] == pytest.approx(10.0, rel=1e-6)
        for name in ("scale", "bias"):
            assert second.metrics[name] == pytest.approx(results[1].metrics[name], rel=2e-3)  # of bfloat16: 16e-3
        for name, way in moved(got, start).items():
            worst = (way - wanted[name]).norm() / wanted[name].norm()
            assert worst < (0.03 if case.parallel == "ddp" else 0.08), f"{name} under {case.parallel}: {worst:.3f}"


def test_negatives_of_the_micro_batch_are_fewer():
    """Pairs that start at even odds: three micro-batches of 4 meet a third of the pairs that 12 do."""
    even = {"width": 16, "scale": 0.01, "bias": 0.0}
    losses = []
    for negatives in ("step", "microbatch"):
        thirds = (((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)),)
        case = Case(thirds, config=AlignmentConfig(**even, negatives=negatives))
        losses.append(train(ALONE, case)[1][0].loss)
    assert losses == pytest.approx([12 * math.log(2), 4 * math.log(2)], rel=0.01)


def test_the_public_check_sees_no_split():
    """Sums, counts, metrics and gradients, the temperature's among them, over three micro-batches or one."""
    parts = [pairs(part) for part in SPLITS[1][0][0]]
    check_objective(small_alignment(EVERYTHING), pairs(range(PAIRS)), parts, tolerance=5e-4)


class Noisy(nn.Module):
    """A text tower that forgets half of what it found, at random."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower, self.config, self.width = tower, tower.config, tower.width
        self.dropout = nn.Dropout(0.5)

    def forward(self, text_ids: Tensor, segments: Segments) -> Tensor:
        return self.dropout(self.tower(text_ids, segments))


def noisy() -> Alignment:
    built = small_alignment(CONTRAST)
    built.text_tower = Noisy(built.text_tower)
    return built.train()


def test_both_passes_draw_the_same_random_numbers():
    """The gradient is that of one graph over all embeddings, drawn once; and no number is drawn twice afterwards."""
    batches = [pairs(part) for part in SPLITS[1][0][0]]
    model = noisy()
    torch.manual_seed(7)
    images = [model.embed_images(b.vision) for b in batches]
    texts = [model.embed_texts(b.text_ids, b.segments) for b in batches]
    after = torch.rand(3)
    loss = plain_loss(torch.cat(images), torch.cat(texts), *model.temperature())
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(7)
    model.prepare(batches, model)
    sums = [model(batch).sums["contrastive"] for batch in batches]
    assert torch.equal(torch.rand(3), after)
    torch.testing.assert_close(sum(sums), loss, rtol=1e-5, atol=0.0)
    for got, gradient in zip(torch.autograd.grad(sum(sums), list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-4)  # gradients of sums over pairs: some 10 large


def test_one_micro_batch_is_seen_once_and_the_order_matters():
    model, seen = small_alignment(CONTRAST), []
    model.encoder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    engine = build_engine(model, torch.optim.SGD(model.parameters()), EngineConfig("none"), ALONE)
    train_step(model, engine, [pairs(range(3))], ALONE)
    assert seen == [True]
    train_step(model, engine, [pairs(range(3)), pairs(range(3, 5))], ALONE)
    assert seen == [True, False, False, True, True]
    model.prepare([pairs([0]), pairs([1])], model)
    with pytest.raises(ValueError, match=r"pair 1.*prepare saw.*pair 0"):
        model(pairs([1]))


def test_a_loss_that_is_not_finite_names_its_pair():
    model = small_alignment(CONTRAST)
    engine = build_engine(model, torch.optim.SGD(model.parameters()), EngineConfig("none"), ALONE)
    bad = pairs([3])
    bad.vision.patches[0] = float("nan")
    with pytest.raises(FloatingPointError, match="micro-batch 1: contrastive is nan; samples: pair 3"):
        train_step(model, engine, [pairs([0, 1]), bad], ALONE)


def peak(micro_batches: int, negatives: str) -> int:
    """The most values that the graphs of a step hold at one time, of tensors saved for the backward."""
    held, most = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor):
            nonlocal held, most
            self.tensor = tensor
            held += tensor.numel()
            most = max(most, held)
            weakref.finalize(self, release, tensor.numel())

    def release(values: int) -> None:
        nonlocal held
        held -= values

    model = small_alignment(AlignmentConfig(width=16, negatives=negatives))
    engine = build_engine(model, torch.optim.SGD(model.parameters()), EngineConfig("none"), ALONE)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        train_step(model, engine, [pairs([0, 1, 2])] * micro_batches, ALONE)
    assert held == 0
    return most


def test_memory_is_that_of_one_micro_batch():
    """Equal micro-batches, 1 to 8 of them: the same to the value as with no negatives between them."""
    once = peak(1, "microbatch")
    assert [peak(n, "step") for n in (1, 2, 8)] == [once] * 3
