"""Masked two-teacher distillation: sums equal a plain reference, images do not see each other, nothing leaks."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_pipelines.masking import MaskConfig, mask_patches
from mmagent.engine.checkpoint import load_weights
from mmagent.geometry import GeometryConfig, patchify
from mmagent.losses.standardisers import Cone
from mmagent.models.backbones import Backbone, GridFeatures
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.layers import initialise
from mmagent.models.teachers import Teacher, TeacherFeatures
from mmagent.objectives.distillation import Distillation, DistillationConfig
from mmagent.types import MaskedVision, PackedVision, VisionFeatures

GEOMETRY = GeometryConfig(min_tokens=1)


class Patches(nn.Module):
    """A stand-in teacher: one linear layer over patches of 16 pixels."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        self.cut = nn.Conv2d(3, width, 16, 16)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.cut.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.cut(pixels).flatten(2).transpose(1, 2)


def call(module: nn.Module, pixels: torch.Tensor, masked: torch.Tensor | None) -> GridFeatures:
    tokens = module(pixels).tanh()
    return GridFeatures(tokens, tokens.mean(dim=1))


def teacher(name: str, width: int, seed: int) -> Teacher:
    return Teacher(Backbone(Patches(width, seed), call, 16, width, width, (0.5,) * 3, (0.5,) * 3), name)


def batch_of(sizes: list[tuple[int, int]], seed: int = 0) -> MaskedVision:
    random = np.random.default_rng(seed)
    arrays = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    images = [patchify(a, GEOMETRY) for a in arrays]
    return MaskedVision(
        PackedVision.pack(images),
        torch.cat([mask_patches(image.grid, 2, MaskConfig(), random) for image in images]),
        tuple(torch.from_numpy(a).permute(2, 0, 1) / 255.0 for a in arrays),
        tuple(f"image-{n}" for n in range(len(arrays))),
    )


def split(batch: MaskedVision) -> list[MaskedVision]:
    sizes = batch.vision.grids.prod(dim=1).tolist()
    return [
        MaskedVision(PackedVision(patches, grid[None]), masked, (pixels,), (key,))
        for patches, grid, masked, pixels, key in zip(
            batch.vision.patches.split(sizes),
            batch.vision.grids,
            batch.masked.split(sizes),
            batch.pixels,
            batch.keys,
            strict=True,
        )
    ]


def objective(config: DistillationConfig | None = None, batch: MaskedVision | None = None) -> Distillation:
    torch.manual_seed(0)
    student = CogViT(CogViTConfig(width=32, depth=2, heads=2, ffn=64, mask_token=True, pooling="attention"))
    initialise(student)
    built = Distillation(student, [teacher("text", 12, 1), teacher("dense", 7, 2)], config or DistillationConfig())
    built.calibrate([batch or batch_of(SIZES)])
    return built


SIZES = [(56, 84), (28, 56), (56, 84), (112, 28)]


def test_sums_equal_the_plain_reference():
    batch = batch_of(SIZES)
    distillation = objective(batch=batch)
    out = distillation(batch)
    seen = distillation.student(batch.vision, masked=batch.masked)
    for one in distillation.teachers:
        head = distillation.heads[one.name]
        features = one(batch.pixels, batch.vision.grids, 2)
        total = torch.zeros(())
        for row in range(batch.masked.shape[0]):
            if batch.masked[row]:
                answer, target = head.patches(seen.tokens[row]), head.standardiser(features.tokens[row])
                cosine = (answer @ target) / (answer.norm() * target.norm())
                total = total + 0.9 * (1 - cosine) + 0.1 * F.smooth_l1_loss(answer, target)
        assert out.sums[f"{one.name}_patches"].item() == pytest.approx(total.item(), rel=1e-4)
        summary = F.cosine_similarity(head.summary(seen.pooled), features.summary).acos().square()
        expected = (summary / head.cone.dispersion).sum()
        assert out.sums[f"{one.name}_summary"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert set(out.sums) == set(distillation.weights) == set(distillation.counts(batch))


def test_counts_come_from_the_batch_alone():
    batch = batch_of([(56, 84), (28, 56)])
    counts = objective(DistillationConfig(visible_weight=0.5)).counts(batch)
    hidden = round(0.35 * 24) + round(0.35 * 8)
    assert {name: int(value) for name, value in counts.items() if name.startswith("text")} == {
        "text_patches": hidden,
        "text_summary": 2,
        "text_visible": 32 - hidden,
    }


@pytest.mark.parametrize("config", [DistillationConfig(), DistillationConfig(visible_weight=1.0, mlp=True)])
def test_packed_equals_one_by_one(config):
    batch = batch_of(SIZES)
    distillation = objective(config)

    def sums_and_gradients(batches: list[MaskedVision]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        distillation.zero_grad()
        total: dict[str, float] = {}
        for one in batches:
            sums = distillation(one).sums
            sum(distillation.weights[name] * value for name, value in sums.items()).backward()
            total = {name: total.get(name, 0.0) + value.item() for name, value in sums.items()}
        return total, {name: p.grad.clone() for name, p in distillation.named_parameters()}

    together, packed = sums_and_gradients([batch])
    alone, single = sums_and_gradients(split(batch))
    assert together == pytest.approx(alone, rel=1e-4)
    for name in packed:
        assert torch.allclose(packed[name], single[name], rtol=1e-3, atol=1e-4), name


def test_hidden_pixels_do_not_reach_the_student():
    batch = batch_of(SIZES)
    patches = batch.vision.patches.clone()
    patches[batch.masked] = 100.0
    other = MaskedVision(PackedVision(patches, batch.vision.grids), batch.masked, batch.pixels, batch.keys)
    for blind in ("token", "zero"):
        distillation = objective(DistillationConfig(blind=blind))
        one, two = distillation(batch).sums, distillation(other).sums
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_encoder_of_the_bare_protocol_can_be_a_student():
    class Plain(nn.Module):
        patch_size, merge_size, width = 14, 2, 8

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(1176, 8)

        def forward(self, vision: PackedVision, layers: tuple[int, ...] = ()) -> VisionFeatures:
            tokens = self.embed(vision.patches)
            sizes = vision.grids.prod(dim=1).tolist()
            return VisionFeatures(tokens, {}, torch.stack([t.mean(dim=0) for t in tokens.split(sizes)]))

    distillation = Distillation(Plain(), [teacher("t", 4, 0)], DistillationConfig(blind="zero"))
    distillation.calibrate([batch_of(SIZES)])
    assert distillation(batch_of(SIZES)).sums["t_patches"].isfinite()
    assert set(distillation.roles()) == {name for name, _ in distillation.named_parameters()}
    assert distillation.blocks() == ()


def test_teachers_are_neither_parameters_nor_state_and_their_statistics_are():
    distillation = objective()
    frozen = {id(p) for t in distillation.teachers for p in t.backbone.module.parameters()}
    assert not frozen & {id(p) for p in distillation.parameters()}
    state = distillation.state_dict()
    assert {"heads.text.standardiser.rotation", "heads.dense.cone.dispersion"} <= set(state)
    assert set(distillation.roles()) == {name for name, _ in distillation.named_parameters()}
    batch = batch_of(SIZES, seed=3)
    expected = distillation(batch).sums
    torch.manual_seed(5)
    other = Distillation(CogViT(distillation.student.config), distillation.teachers, distillation.config)
    initialise(other.student)
    other.load_state_dict(state)
    assert all(torch.equal(expected[name], value) for name, value in other(batch).sums.items())


def test_without_calibration_the_loss_is_not_a_number():
    torch.manual_seed(0)
    student = CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64, mask_token=True))
    distillation = Distillation(student, [teacher("t", 4, 0)], DistillationConfig())
    assert all(value.isnan() for value in distillation(batch_of(SIZES)).sums.values())
    with pytest.raises(ValueError, match="at least one batch"):
        distillation.calibrate([])


def test_calibration_equals_statistics_of_everything_at_once():
    batches = [batch_of(SIZES, seed) for seed in range(3)]
    distillation = objective()
    distillation.calibrate(iter(batches))
    for one in distillation.teachers:
        seen = [one(batch.pixels, batch.vision.grids, 2) for batch in batches]
        tokens = torch.cat([features.tokens for features in seen]).double()
        head = distillation.heads[one.name]
        # statistics are float64 until they are stored in float32
        torch.testing.assert_close(head.standardiser.mean, tokens.mean(dim=0).float())
        covariance = torch.cov(tokens.T, correction=0)
        torch.testing.assert_close(head.standardiser.phi, covariance.diagonal().mean().sqrt().float())
        rotation = head.standardiser.rotation.double()
        equal = (rotation @ covariance @ rotation.T).diagonal()
        torch.testing.assert_close(equal, covariance.diagonal().mean().expand_as(equal), rtol=1e-5, atol=0)
        cone = Cone(one.summary_width)
        cone.fit(torch.cat([features.summary for features in seen]))
        assert torch.equal(cone.direction, head.cone.direction)
        assert torch.equal(cone.dispersion, head.cone.dispersion)


def test_calibration_keeps_no_tokens():
    """An array lives as long as any tensor or view of its memory; the summaries here are views of the tokens."""
    arrays: list[weakref.ref] = []

    class Watched:
        name, width, summary_width, summary, named = "t", 4, 4, True, False

        def __call__(self, pixels, grids, merge_size, temporal_patch) -> TeacherFeatures:
            array = np.random.default_rng(len(arrays)).normal(size=(int(grids.prod(dim=1).sum()), 4))
            arrays.append(weakref.ref(array))
            tokens = torch.from_numpy(array)
            return TeacherFeatures(tokens, tokens[: len(grids)])

    def batches():
        for seed in range(5):
            yield batch_of(SIZES, seed)
            alive = [n for n, array in enumerate(arrays) if array() is not None]
            assert len(alive) <= 1, f"tokens of batches {alive} are still there"

    student = CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64, mask_token=True))
    Distillation(student, [Watched()], DistillationConfig()).calibrate(batches())
    assert len(arrays) == 5


def test_dropping_keeps_the_worst_teacher_of_every_image_and_does_not_depend_on_the_split():
    """Float32 sums in another order; a draw that depended on the micro-batch would move them by whole images."""
    batch = batch_of(SIZES * 4)
    distillation = objective(DistillationConfig(drop=0.5))
    first = {name: value.item() for name, value in distillation(batch).sums.items()}
    assert first == {name: value.item() for name, value in distillation(batch).sums.items()}
    parts = [distillation(one).sums for one in split(batch)]
    assert first == pytest.approx({name: sum(part[name].item() for part in parts) for name in first}, rel=1e-4)
    other = replace(batch, keys=tuple(f"{key} again" for key in batch.keys))
    assert first != {name: value.item() for name, value in distillation(other).sums.items()}
    whole = distillation.eval()(batch).sums
    assert all(first[name] <= whole[name].item() + 1e-4 for name in first)
    assert sum(first.values()) < sum(value.item() for value in whole.values())
    for one in split(batch):
        alone = distillation.eval()(one).sums
        worst = max(("text", "dense"), key=lambda name: alone[f"{name}_patches"].item())
        dropped = distillation.train()(one).sums
        assert torch.equal(dropped[f"{worst}_patches"], alone[f"{worst}_patches"])


def test_a_summary_that_nothing_trained_is_not_learned():
    batch = batch_of([(64, 96)])
    whole, dense = teacher("a", 24, 1), teacher("b", 48, 2)
    dense.summary = False
    distillation = Distillation(
        CogViT(CogViTConfig(32, 2, 2, 64, mask_token=True)), [whole, dense], DistillationConfig(drop=0.5)
    )
    distillation.calibrate([batch])
    terms = {"a_patches", "a_summary", "b_patches"}
    assert (
        set(distillation.train()(batch).sums) == set(distillation.weights) == set(distillation.counts(batch)) == terms
    )
    assert not any(name.startswith(("heads.b.summary", "heads.b.cone")) for name in distillation.state_dict())


def test_a_pooling_head_that_no_teacher_asks_for_still_gets_a_gradient():
    """Zero, so that engines do not wait for it."""
    dense = teacher("b", 48, 2)
    dense.summary = False
    student = CogViT(CogViTConfig(32, 2, 2, 64, mask_token=True, pooling="attention"))
    distillation = Distillation(student, [dense], DistillationConfig())
    distillation.calibrate([batch_of([(64, 96)])])
    sum(distillation(batch_of([(64, 96)])).sums.values()).backward()
    assert all(p.grad is not None for p in distillation.parameters())
    assert not any(p.grad.any() for p in student.pool.parameters())


def test_dropping_does_not_hide_the_losses_from_the_log():
    """The metrics are those of a run that drops nothing, and say how many images each teacher kept."""
    batch = batch_of(SIZES * 4)
    distillation = objective(DistillationConfig(drop=0.5, visible_weight=1.0), batch)
    plain, dropped = distillation.eval()(batch), distillation.train()(batch)
    counts = distillation.counts(batch)
    shares = []
    for name in ("text", "dense"):
        for term in ("patches", "visible", "summary"):
            for out in (plain, dropped):
                value = out.metrics[f"{name}/{term}"]
                assert int(value.denominator) == int(counts[f"{name}_{term}"])
                assert value.numerator.item() == pytest.approx(plain.sums[f"{name}_{term}"].item(), rel=1e-6)
                assert not value.numerator.requires_grad
        assert plain.metrics[f"{name}/kept"] == (16, 16)
        kept, images = dropped.metrics[f"{name}/kept"]
        assert images == 16
        shares.append(float(kept))
    assert 16 <= sum(shares) < 32  # one of two teachers of every image, and some others
    assert not any(name.endswith(("/kept", "/patches")) for name in objective()(batch).metrics)


def resumed(state: dict[str, torch.Tensor], teachers: list[Teacher]) -> Distillation:
    """A new objective that takes ``state`` up as a run does."""
    student = CogViT(CogViTConfig(width=32, depth=2, heads=2, ffn=64, mask_token=True, pooling="attention"))
    other = Distillation(student, teachers, DistillationConfig())
    load_weights(other, {name: tensor.clone() for name, tensor in state.items()})
    return other


def test_statistics_of_another_teacher_are_refused():
    batch = batch_of(SIZES)
    right = objective(batch=batch)
    state, out = right.state_dict(), right(batch)
    again = resumed(state, [teacher("text", 12, 1), teacher("dense", 7, 2)])
    assert all(torch.equal(value, again(batch).sums[name]) for name, value in out.sums.items())
    with pytest.raises(ValueError, match=r"teacher dense: .* other weights"):
        resumed(state, [teacher("text", 12, 1), teacher("dense", 7, 9)])(batch)
    changed = teacher("text", 12, 1)
    changed.backbone.module.temperature = 2.0
    with pytest.raises(ValueError, match=r"teacher text: .* other settings"):
        resumed(state, [changed, teacher("dense", 7, 2)])(batch)
    # what a newer library says of the same weights need not be what the older one said
    changed.fingerprint = changed.fingerprint._replace(versions="0" * 64)
    resumed(state, [changed, teacher("dense", 7, 2)])(batch)
    # an objective that has run already, and is given another's state then
    load_weights(again, objective_of(teacher("text", 12, 5), teacher("dense", 7, 2), batch).state_dict())
    with pytest.raises(ValueError, match="teacher text"):
        again(batch)


def objective_of(one: Teacher, other: Teacher, batch: MaskedVision) -> Distillation:
    student = CogViT(CogViTConfig(width=32, depth=2, heads=2, ffn=64, mask_token=True, pooling="attention"))
    initialise(student)
    built = Distillation(student, [one, other], DistillationConfig())
    built.calibrate([batch])
    return built


def test_a_teacher_whose_call_has_no_name_is_taken_at_its_word():
    class Call:
        def __call__(self, module: nn.Module, pixels: torch.Tensor, masked: torch.Tensor | None) -> GridFeatures:
            return call(module, pixels, masked)

    def nameless(seed: int) -> Teacher:
        return Teacher(Backbone(Patches(12, seed), Call(), 16, 12, 12, (0.5,) * 3, (0.5,) * 3), "text")

    batch = batch_of(SIZES)
    state = objective_of(nameless(1), teacher("dense", 7, 2), batch).state_dict()
    assert not state["heads.text.origin"].any()
    assert state["heads.dense.origin"].any()
    resumed(state, [nameless(3), teacher("dense", 7, 2)])(batch)


@pytest.mark.parametrize(
    "bad",
    [
        {"standardise": "phis"},
        {"blind": "eyes"},
        {"drop": 1.0},
        {"cosine": -0.1},
        {"smooth_l1": -1.0},
        {"summary_weight": -1.0},
        {"visible_weight": float("nan")},
        {"cosine": 0.0, "smooth_l1": 0.0, "summary_weight": 0.0},
    ],
)
def test_bad_configurations_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DistillationConfig(**bad)


def test_a_loss_of_nothing_is_refused():
    dense = teacher("b", 8, 2)
    dense.summary = False
    student = CogViT(CogViTConfig(32, 1, 2, 64, mask_token=True))
    with pytest.raises(ValueError, match="nothing would be learned"):
        Distillation(student, [dense], DistillationConfig(cosine=0.0, smooth_l1=0.0))


def test_teachers_need_names_of_their_own():
    student = CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64, mask_token=True))
    with pytest.raises(ValueError, match="names of their own"):
        Distillation(student, [teacher("a", 4, 0), teacher("a", 4, 1)], DistillationConfig())
