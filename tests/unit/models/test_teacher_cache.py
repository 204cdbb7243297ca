"""Teachers on clips, from configs, and with a cache: the same bits whether it was empty, half full or full."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.masking import MaskConfig, mask_patches
from mmagent.geometry import GeometryConfig, patchify
from mmagent.models.backbones import Backbone, GridFeatures, save_backbone, wrap
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.feature_cache import FeatureCache, FeatureCacheConfig
from mmagent.models.layers import initialise
from mmagent.models.teachers import Teacher, TeacherConfig, TeacherFeatures, load_teachers
from mmagent.objectives.distillation import Distillation, DistillationConfig
from mmagent.types import MaskedVision, PackedVision
from tests.backbone_kit import TIMM, timm_model, transformers_model

GEOMETRY = GeometryConfig(min_tokens=1)
HALF = (0.5, 0.5, 0.5)


def picture(height: int, width: int, seed: int, frames: int = 0) -> torch.Tensor:
    shape = (frames, 3, height, width) if frames else (3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def grids_of(pixels: list[torch.Tensor], temporal: int = 2) -> torch.Tensor:
    grids = [(-(-len(p) // temporal) if p.ndim == 4 else 1, p.shape[-2] // 16, p.shape[-1] // 16) for p in pixels]
    return torch.tensor(grids)


def cache_in(folder: Path, dtype: str = "float16", batch: int = 1) -> FeatureCache:
    return FeatureCache(FeatureCacheConfig(str(folder), dtype=dtype, batch=batch))


class Counted:
    """A teacher's backbone that counts the images it looks at."""

    def __init__(self, backbone: Backbone):
        self.images: list[int] = []
        self.backbone = backbone

    def teacher(self, cache: FeatureCache | None, **options) -> Teacher:
        teacher = Teacher(self.backbone, "t", cache=cache, **options)
        look = teacher._look

        def counted(frames, size):
            self.images.append(len(frames))
            return look(frames, size)

        teacher._look = counted
        return teacher


# ---------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("resolution", [0, 64])
@pytest.mark.parametrize("temporal", [2, 3])
@torch.no_grad()
def test_a_clip_is_the_mean_of_what_its_frames_show(temporal, resolution):
    teacher = Teacher(wrap(transformers_model("dinov3")), "d", resolution=resolution)
    pixels = [picture(32, 64, 1, frames=5), picture(32, 64, 2), picture(64, 32, 3, frames=2)]
    out = teacher(pixels, grids_of(pixels, temporal), 2, temporal)
    single = [teacher([f], torch.tensor([[1, 2, 4]]), 2) for f in pixels[0]]
    groups = -(-5 // temporal)
    padded = [*single, *[single[-1]] * (groups * temporal - 5)]
    expected = [
        torch.stack([f.tokens for f in padded[g * temporal : (g + 1) * temporal]]).mean(dim=0) for g in range(groups)
    ]
    # the single frames ran as batches of one
    assert torch.allclose(out.tokens[: 8 * groups], torch.cat(expected), atol=1e-5)
    assert torch.allclose(out.summary[0], torch.cat([f.summary for f in single]).mean(dim=0), atol=1e-5)
    still = teacher([pixels[1]], torch.tensor([[1, 2, 4]]), 2)
    assert torch.allclose(out.tokens[8 * groups : 8 * groups + 8], still.tokens, atol=1e-5)
    assert out.tokens.shape == (8 * groups + 8 + 8, 32)


def test_a_still_image_is_a_clip_of_its_own_frame_bit_for_bit():
    teacher = Teacher(wrap(transformers_model("siglip2")), "s")
    image, grid = picture(32, 64, 0), torch.tensor([[1, 2, 4]])
    assert torch.equal(teacher([image], grid, 2).tokens, teacher([torch.stack([image, image])], grid, 2).tokens)


def test_frames_and_grids_that_disagree_are_named():
    teacher = Teacher(wrap(transformers_model("dinov3")), "d")
    with pytest.raises(ValueError, match="image 0 has 3 frames, its grid 1 groups of up to 2"):
        teacher([picture(32, 32, 0, frames=3)], torch.tensor([[1, 2, 2]]), 2)
    with pytest.raises(ValueError, match="patch_limit"):
        Teacher(wrap(transformers_model("dinov3")), "d", patch_limit=0)


def test_no_forward_holds_more_patches_than_it_may():
    counted = Counted(wrap(transformers_model("dinov3")))
    pixels = [picture(32, 32, n) for n in range(7)] + [picture(64, 64, 9)]
    limited = counted.teacher(None, patch_limit=12)(pixels, grids_of(pixels), 2)
    assert counted.images == [3, 3, 1, 1]
    assert torch.allclose(limited.tokens, Teacher(counted.backbone, "t")(pixels, grids_of(pixels), 2).tokens, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_a_students_precision_is_not_the_teachers(cached, tmp_path):
    """Nor are its gradients: called within a student's forward, a teacher repeats what it says alone."""
    backbone = wrap(transformers_model("dinov3"))
    pixels = [picture(32, 64, 1).requires_grad_(), picture(64, 64, 2)]
    outs = []
    for n, on in enumerate((False, True)):
        teacher = Teacher(backbone, "t", cache=cache_in(tmp_path / str(n)) if cached else None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            outs.append(teacher(pixels, grids_of(pixels), 2))
        assert not outs[-1].tokens.requires_grad
        assert outs[-1].tokens.dtype == outs[-1].summary.dtype == torch.float32
    assert equal(*outs)


# ---------------------------------------------------------------------------------------------- configs


def test_teachers_are_loaded_by_config(tmp_path):
    """A third teacher is one entry; one without a source is left out; names and order are the config's."""
    save_backbone(wrap(transformers_model("siglip2")), tmp_path / "one")
    save_backbone(wrap(transformers_model("dinov2")), tmp_path / "two")
    save_backbone(wrap(timm_model("convnext_tiny.fb_in1k")), tmp_path / "three")
    configs = {
        "words": TeacherConfig(str(tmp_path / "one"), resolution=64),
        "nobody": TeacherConfig(),
        "texture": TeacherConfig(str(tmp_path / "two"), summary=False),
        "third": TeacherConfig(str(tmp_path / "three"), patch_limit=7),
    }
    cache = cache_in(tmp_path / "cache")
    teachers = load_teachers(configs, torch.bfloat16, cache=cache)
    assert [t.name for t in teachers] == ["words", "texture", "third"]
    assert [t.grid for t in teachers] == [(4, 4), None, None]
    assert [t.summary for t in teachers] == [True, False, True]
    assert teachers[2].patch_limit == 7
    for teacher in teachers:
        assert teacher.cache is cache
        assert {p.dtype for p in teacher.backbone.module.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in teacher.backbone.module.parameters())
        features = teacher([picture(64, 64, 0)], torch.tensor([[1, 2, 2]]), 2)
        assert features.tokens.dtype == torch.float32
        assert not features.tokens.requires_grad


def test_large_teachers_run_in_bfloat16_by_themselves(tmp_path, monkeypatch):
    from mmagent.models import teachers

    save_backbone(wrap(transformers_model("siglip2")), tmp_path)
    assert next(Teacher.load(tmp_path).backbone.module.parameters()).dtype == torch.float32
    monkeypatch.setattr(teachers, "LARGE", 1000)
    assert next(Teacher.load(tmp_path).backbone.module.parameters()).dtype == torch.bfloat16
    kept = Teacher.load(tmp_path, dtype=torch.float32).backbone.module
    assert next(kept.parameters()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------- the cache


def mixed() -> list[torch.Tensor]:
    """Images of two sizes, one twice, and a clip with a frame that repeats."""
    clip = picture(32, 64, 7, frames=3)
    clip[2] = clip[0]
    return [picture(32, 64, 1), picture(48, 40, 2), picture(32, 64, 3), picture(32, 64, 1), clip, picture(64, 64, 4)]


def equal(one: TeacherFeatures, other: TeacherFeatures) -> bool:
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.summary, other.summary)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["siglip2", "dinov3", "convnext", "aimv2"])
def test_cold_partly_warm_and_warm_are_bitwise_equal(kind, dtype, tmp_path):
    backbone = wrap(transformers_model(kind))
    pixels = mixed()
    grids = torch.tensor([[1, 2, 4], [1, 4, 2], [1, 2, 4], [1, 2, 4], [2, 2, 4], [1, 4, 4]])
    cold = Teacher(backbone, "t", cache=cache_in(tmp_path / "a", dtype))(pixels, grids, 2)
    warm = Counted(backbone)
    assert equal(warm.teacher(cache_in(tmp_path / "a", dtype))(pixels, grids, 2), cold)
    assert not warm.images
    for some in ([0], [1, 4], [2, 5]):  # what was cached by other batches
        cache = cache_in(tmp_path / f"b{some}", dtype)
        teacher = Teacher(backbone, "t", cache=cache)
        teacher([pixels[i] for i in some], grids[some], 2)
        assert equal(teacher(pixels, grids, 2), cold)
    plain = Teacher(backbone, "t")(pixels, grids, 2)
    # the storage rounds features of some units to 11, 8 or 24 bits
    scale = plain.tokens.abs().max().item()
    assert torch.allclose(
        cold.tokens, plain.tokens, atol=scale * {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}[dtype]
    )


def test_equal_images_run_once_and_hits_are_counted(tmp_path):
    counted = Counted(wrap(transformers_model("dinov3")))
    teacher = counted.teacher(cache_in(tmp_path))
    pixels = mixed()
    grids = torch.tensor([[1, 2, 4], [1, 4, 2], [1, 2, 4], [1, 2, 4], [2, 2, 4], [1, 4, 4]])
    teacher(pixels, grids, 2)
    assert counted.images == [1] * 6  # eight frames, of which one image and one frame stand twice
    assert (teacher.seen, teacher.hits) == (8, 0)
    teacher(pixels, grids, 1)  # another merge order: the same cells
    assert counted.images == [1] * 6
    assert (teacher.seen, teacher.hits) == (16, 8)


def test_batches_of_a_cache_have_one_size(tmp_path):
    """Whatever is found, rows are computed in batches of the size that the config says."""
    counted = Counted(wrap(transformers_model("dinov3")))
    pixels = [picture(32, 64, n) for n in range(10)]
    cold = counted.teacher(cache_in(tmp_path / "a", batch=4))(pixels, grids_of(pixels), 2)
    assert counted.images == [4, 4, 4]
    cache = cache_in(tmp_path / "b", batch=4)
    teacher = counted.teacher(cache)
    teacher(pixels[3:5], grids_of(pixels[3:5]), 2)
    warm = teacher(pixels, grids_of(pixels), 2)
    assert set(counted.images) == {4}
    assert torch.equal(cold.tokens, warm.tokens)  # on this machine's kernels, where a row's place does not matter


def test_whatever_changes_a_feature_changes_its_key(tmp_path):
    image, grid = picture(64, 64, 0), torch.tensor([[1, 4, 4]])
    keys = []

    def look(backbone: Backbone, cache: FeatureCache, pixels: torch.Tensor = image, **options) -> None:
        teacher = Teacher(backbone, "t", cache=cache, **options)
        keys.append(teacher._key(pixels, teacher.grid or (4, 4)))
        teacher([pixels], grid, 2)
        assert teacher.hits == 0

    cache = cache_in(tmp_path)
    look(wrap(transformers_model("dinov3")), cache)
    look(wrap(transformers_model("dinov3"), mean=(0.4, 0.4, 0.4)), cache)
    look(wrap(transformers_model("dinov3"), pool="mean"), cache)
    look(wrap(transformers_model("dinov3", layer_norm_eps=1e-3)), cache)
    look(wrap(transformers_model("dinov3", hidden_act="relu")), cache)
    look(wrap(transformers_model("dinov3", rope_theta=50.0)), cache)
    look(wrap(transformers_model("dinov3")), cache, resolution=32)
    look(wrap(transformers_model("dinov3")), cache, dtype=torch.bfloat16)
    look(wrap(transformers_model("dinov3")), cache_in(tmp_path, "bfloat16"))
    look(wrap(transformers_model("dinov3")), cache_in(tmp_path, batch=2))
    look(wrap(transformers_model("dinov3")), cache, image + 2**-12)
    changed = transformers_model("dinov3")
    with torch.no_grad():
        changed.get_parameter("norm.weight")[0] += 1e-4
    look(wrap(changed), cache)
    assert len(set(keys)) == len(keys)
    again = Teacher(wrap(transformers_model("dinov3")), "another name", cache=cache)
    again([image], grid, 2)
    assert again.hits == 1


@pytest.mark.parametrize("change", ["global_pool", "temperature", "_private", "pool"])
def test_what_is_no_weight_and_no_layer_tells_teachers_of_timm_apart(change, tmp_path):
    """Same weights, same layers, another value beside them: each has its own features."""
    name, cache = "vit_small_patch16_dinov3.lvd1689m", cache_in(tmp_path)
    one, other = (timm_model(name) for _ in range(2))
    options = {"pool": "mean"} if change == "pool" else {}
    if change == "global_pool":
        other = timm_model(name, global_pool="avg")
        assert repr(one) == repr(other)
    elif change == "temperature":
        other.rope.temperature = 7.0
    elif change == "_private":
        other.blocks[1].attn._scales = (0.5, [True, "x"])
    other.load_state_dict(one.state_dict())
    first, second = Teacher(wrap(one), "t", cache=cache), Teacher(wrap(other, **options), "t", cache=cache)
    assert first.fingerprint.weights == second.fingerprint.weights
    pixels = [picture(64, 64, 0)]
    seen = [teacher(pixels, grids_of(pixels), 2).summary for teacher in (first, second)]
    assert second.hits == 0
    assert change not in ("global_pool", "pool") or not torch.equal(*seen)


IDENTITIES = """
from mmagent.models.backbones import wrap
from mmagent.models.teachers import Teacher
from tests.backbone_kit import timm_model, transformers_model

kinds = ["dinov2", "dinov3", "siglip2", "beit", "convnext"]
for model in map(transformers_model, kinds):
    print(*Teacher(wrap(model), "t").fingerprint)
for name in ("vit_small_patch16_dinov3.lvd1689m", "naflexvit_base_patch16_siglip.v2_webli", "resnet18.a1_in1k"):
    print(*Teacher(wrap(timm_model(name)), "t").fingerprint)
"""


@pytest.mark.slow
def test_an_identity_is_the_same_in_every_process():
    """Order of sets, addresses and what is noted at random would each differ."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", IDENTITIES],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    said = [run.communicate(timeout=120)[0].splitlines() for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert len(set(said[0])) == 8
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", ["dinov2", "vit_small_patch16_dinov3.lvd1689m"])
def test_an_identity_follows_a_folder_that_moves_and_outlives_use(kind, tmp_path):
    make = timm_model if kind in TIMM else transformers_model
    save_backbone(wrap(make(kind)), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, other = (Teacher.load(tmp_path / name, "t") for name in "ab")
    pixels = [picture(64, 96, 0), picture(32, 32, 0)]
    other(pixels, grids_of(pixels), 2)
    assert one.fingerprint == other.fingerprint


def test_a_call_without_a_name_cannot_be_cached(tmp_path):
    class Call:
        def __call__(self, module, pixels, masked) -> GridFeatures:
            raise AssertionError("never called")

    backbone = Backbone(torch.nn.Linear(1, 1), Call(), 16, 1, 1, HALF, HALF)
    with pytest.raises(ValueError, match="function or a dataclass"):
        Teacher(backbone, "t", cache=cache_in(tmp_path))([picture(32, 32, 0)], torch.tensor([[1, 2, 2]]), 2)


def test_a_full_disk_changes_no_bit(tmp_path, monkeypatch):
    from mmagent.models import feature_cache

    backbone = wrap(transformers_model("dinov3"))
    pixels = [picture(32, 64, n) for n in range(3)]
    right = Teacher(backbone, "t", cache=cache_in(tmp_path / "a"))(pixels, grids_of(pixels), 2)

    def full(path, raw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "_write", full)
    teacher = Teacher(backbone, "t", cache=cache_in(tmp_path / "b"))
    with pytest.warns(UserWarning, match="ENOSPC"):
        assert equal(teacher(pixels, grids_of(pixels), 2), right)
    assert equal(teacher(pixels, grids_of(pixels), 2), right)


@pytest.mark.parametrize("cached", [False, True])
def test_autocast_of_the_student_is_none_of_a_teachers_business(cached, tmp_path):
    """Its features are stored in float16, which autocast to bfloat16 on a CPU cannot join."""
    torch.manual_seed(0)
    cache = cache_in(tmp_path) if cached else None
    teacher = Teacher(wrap(transformers_model("dinov3")), "dinov3", cache=cache)
    pixels = [picture(32, 64, 0), picture(32, 64, 1, frames=3)]
    plain = teacher(pixels, grids_of(pixels), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(teacher(pixels, grids_of(pixels), 2), plain)


def batch_of(seed: int) -> MaskedVision:
    random = np.random.default_rng(seed)
    sizes = [(56, 84), (28, 56), (56, 84)]
    arrays = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    clip = [random.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(3)]
    images = [*(patchify(a, GEOMETRY) for a in arrays), patchify(clip, GEOMETRY)]
    shown = [torch.from_numpy(a).permute(2, 0, 1) / 255.0 for a in arrays]
    shown.append(torch.from_numpy(np.stack(clip)).permute(0, 3, 1, 2) / 255.0)
    # a plain mask, as of stills: a clip's groups are masked alike
    masks = [mask_patches((1, *i.grid[1:]), 2, MaskConfig(), random).repeat(i.grid[0]) for i in images]
    return MaskedVision(PackedVision.pack(images), torch.cat(masks), tuple(shown), tuple("abcd"))


def train(folder: Path | None, steps: int) -> tuple[list[dict[str, float]], Distillation]:
    """A run over ``steps`` batches; losses of every step, and what was trained."""
    torch.manual_seed(0)
    student = CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64, mask_token=True, pooling="attention"))
    initialise(student)
    cache = None if folder is None else cache_in(folder)
    teachers = [Teacher(wrap(transformers_model(kind)), kind, cache=cache) for kind in ("siglip2", "dinov3")]
    objective = Distillation(student, teachers, DistillationConfig())
    objective.calibrate([batch_of(0)])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        out = objective(batch_of(step % 3))
        sum(out.sums.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        cached = {name: float(a / b) for name, (a, b) in out.metrics.items() if name.endswith("cached")}
        losses.append({**{name: value.item() for name, value in out.sums.items()}, **cached})
    return losses, objective


def test_a_run_with_a_warm_cache_equals_one_with_a_cold_cache_bitwise(tmp_path):
    """Losses and weights; and one whose cache was left by a run that was broken off."""
    cold, one = train(tmp_path / "a", 4)
    warm, other = train(tmp_path / "a", 4)
    train(tmp_path / "b", 2)
    partly, third = train(tmp_path / "b", 4)
    for again, trained in ((warm, other), (partly, third)):
        for step, found in zip(cold, again, strict=True):
            assert {n: v for n, v in step.items() if "/" not in n} == {n: v for n, v in found.items() if "/" not in n}
        state = trained.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert [step["time/dinov3_cached"] for step in cold] == [1.0, 0.0, 0.0, 1.0]  # the first batch was calibrated on
    assert [step["time/dinov3_cached"] for step in warm] == [1.0] * 4
    assert [step["time/dinov3_cached"] for step in partly] == [1.0, 1.0, 0.0, 1.0]
    plain, _ = train(None, 4)
    assert all("time/dinov3_cached" not in step for step in plain)
    # half precision moves targets by a thousandth
    assert math.isclose(plain[-1]["dinov3_patches"], cold[-1]["dinov3_patches"], rel_tol=1e-2)
