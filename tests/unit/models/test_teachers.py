"""Teachers answer like the models they wrap, on the student's grid and in the student's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmagent.geometry import CLIP_MEAN, CLIP_STD, GeometryConfig, patch_coordinates, patchify
from mmagent.models.backbone import resize_pixels
from mmagent.models.backbones import (
    Backbone,
    BackboneEncoder,
    GridFeatures,
    load_backbone,
    new_backbone,
    save_backbone,
    wrap,
)
from mmagent.models.teachers import Teacher
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import PackedVision

ensure_torchvision()
PATCH16 = GeometryConfig(patch_size=16, min_tokens=1)


def small(kind: str) -> torch.nn.Module:
    from transformers import (
        DINOv3ViTConfig,
        DINOv3ViTModel,
        Siglip2VisionConfig,
        Siglip2VisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "siglip2":
        return Siglip2VisionModel(Siglip2VisionConfig(**size, num_patches=16, patch_size=16)).eval()
    if kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**size, image_size=64, patch_size=16)).eval()
    return DINOv3ViTModel(DINOv3ViTConfig(**size, num_register_tokens=4, patch_size=16)).eval()


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def direct(kind: str, module: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The wrapped model called by hand with its own preprocessing: tokens in reading order, and the summary."""
    if kind == "dinov3":
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        output = module(((image - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None])
        return output.last_hidden_state[0, 5:], output.pooler_output[0]
    pixels = (image - 0.5) / 0.5
    if kind == "siglip":
        output = module(pixels[None], interpolate_pos_encoding=True)
    else:
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        cut = torch.from_numpy(convert_image_to_patches(pixels.numpy(), 16))
        shape = torch.tensor([[image.shape[1] // 16, image.shape[2] // 16]])
        output = module(cut[None], torch.ones(1, cut.shape[0], dtype=torch.int64), shape)
    return output.last_hidden_state[0], output.pooler_output[0]


@pytest.mark.parametrize("kind", ["siglip2", "siglip", "dinov3"])
@torch.no_grad()
def test_teacher_equals_the_model_it_wraps(kind):
    module = small(kind)
    images = [picture(64, 96, 1), picture(32, 32, 2), picture(64, 96, 3)]
    grids = torch.tensor([[1, image.shape[1] // 16, image.shape[2] // 16] for image in images])
    features = Teacher(wrap(module), kind)(images, grids, merge_size=2)
    assert features.tokens.shape == (24 + 4 + 24, 32)
    for image, grid, rows, summary in zip(
        images, grids.tolist(), features.tokens.split([24, 4, 24]), features.summary, strict=True
    ):
        tokens, pooled = direct(kind, module, image)
        at = patch_coordinates(grid, 2)
        assert torch.allclose(rows, tokens[at[:, 0] * grid[2] + at[:, 1]], atol=1e-5)
        assert torch.allclose(summary, pooled, atol=1e-5)


def colours(module: object, pixels: torch.Tensor, masked: torch.Tensor | None) -> GridFeatures:
    """A backbone whose feature of a patch is its mean colour, so that every patch can be told."""
    means = torch.nn.functional.avg_pool2d(pixels, 16)
    return GridFeatures(means.flatten(2).transpose(1, 2), pixels.mean(dim=(2, 3)))


@pytest.mark.parametrize("fixed", [None, (8, 12)])
@pytest.mark.parametrize("merge_size", [1, 2])
def test_features_stand_in_the_order_of_the_students_patches(fixed, merge_size):
    """The colour of a patch tells its row and column; teacher row n must have the colour of student patch n."""
    geometry = GeometryConfig(patch_size=14, merge_size=merge_size, min_tokens=1)
    rows, cols = 4, 6
    colour = np.zeros((rows, cols, 3), dtype=np.uint8)
    colour[..., 0], colour[..., 1] = np.arange(rows)[:, None] * 60, np.arange(cols)[None, :] * 50
    image = colour.repeat(14, axis=0).repeat(14, axis=1)
    student = patchify(image, geometry)
    mean = student.patches.view(rows * cols, 3, 2, 14, 14).mean(dim=(2, 3, 4))
    seen = mean * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    backbone = Backbone(torch.nn.Linear(1, 1), colours, 16, 3, 3, (0.0,) * 3, (1.0,) * 3, fixed)
    pixels = torch.from_numpy(colour.repeat(32, axis=0).repeat(32, axis=1)).permute(2, 0, 1) / 255.0
    features = Teacher(backbone, "colours")([pixels], torch.tensor([[1, rows, cols]]), merge_size)
    distance = torch.cdist(features.tokens, seen)
    assert torch.equal(distance.argmin(dim=1), torch.arange(rows * cols))
    assert float(distance.diagonal().max()) < 0.05


@pytest.mark.parametrize("kind", ["siglip2", "dinov3"])
@torch.no_grad()
def test_backbone_encoder_equals_the_teacher(kind):
    backbone = wrap(small(kind))
    encoder = BackboneEncoder(backbone)
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, size, dtype=np.uint8) for size in ((64, 96, 3), (128, 64, 3))]
    vision = PackedVision.pack([patchify(a, PATCH16) for a in arrays])
    out = encoder(vision)
    pixels = [torch.from_numpy(a).permute(2, 0, 1) / 255.0 for a in arrays]
    features = Teacher(backbone, kind)(pixels, vision.grids, 2)
    assert torch.allclose(out.tokens, features.tokens, atol=1e-4)
    assert torch.allclose(out.pooled, features.summary, atol=1e-4)


@torch.no_grad()
def test_backbone_encoder_hides_the_patches_it_is_told_to():
    encoder = BackboneEncoder(wrap(small("dinov3")))
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    other = image.copy()
    other[16:32, 32:48] = 255 - other[16:32, 32:48]  # row 1, column 2
    packs = [PackedVision.pack([patchify(a, PATCH16)]) for a in (image, other)]
    at = patch_coordinates((1, 4, 6), 2)
    masked = (at[:, 0] == 1) & (at[:, 1] == 2)
    hidden = [encoder(p, masked=masked).tokens for p in packs]
    assert torch.equal(*hidden)
    assert not torch.allclose(*[encoder(p).tokens for p in packs], atol=1e-3)


@pytest.mark.parametrize("kind", ["siglip2", "dinov3"])
@torch.no_grad()
def test_a_new_backbone_in_training_sees_an_image_alike_in_any_pack(kind):
    """Nothing is drawn at random in its forward, so a loss does not depend on the packs or the number of ranks."""
    torch.manual_seed(0)
    encoder = BackboneEncoder(new_backbone(kind, 32, 2, 2, 16)).train()
    random = np.random.default_rng(0)
    images = [patchify(random.integers(0, 256, (64, 64, 3), dtype=np.uint8), PATCH16) for _ in range(3)]
    together = encoder(PackedVision.pack(images)).tokens
    apart = [encoder(PackedVision.pack([image])).tokens for image in images]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)


def test_backbone_encoder_roles_cover_every_parameter():
    encoder = BackboneEncoder(wrap(small("siglip2")))
    roles = encoder.roles()
    assert set(roles) == {name for name, _ in encoder.named_parameters()}
    assert roles["module.embeddings.patch_embedding.weight"].matrix
    assert roles["module.encoder.layers.0.mlp.fc1.weight"].matrix


@pytest.mark.parametrize("kind", ["siglip2", "siglip", "dinov3"])
def test_a_folder_round_trip_is_bitwise(kind, tmp_path):
    backbone = wrap(small(kind), mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    save_backbone(backbone, tmp_path / kind)
    teacher = Teacher.load(tmp_path / kind)
    assert (teacher.name, teacher.backbone.mean, teacher.backbone.std) == (kind, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    assert list(tmp_path.glob("*/*.safetensors"))
    image, grids = picture(64, 64), torch.tensor([[1, 4, 4]])
    assert torch.equal(teacher([image], grids, 2).tokens, Teacher(backbone, kind)([image], grids, 2).tokens)


def test_an_image_text_model_gives_its_vision_tower(tmp_path):
    from transformers import Siglip2Config, Siglip2Model

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Siglip2Config(vision_config={**size, "num_patches": 16}, text_config={**size, "vocab_size": 64})
    whole = Siglip2Model(config).eval()
    whole.save_pretrained(tmp_path)
    image, grids = picture(64, 64), torch.tensor([[1, 4, 4]])
    ours = Teacher.load(tmp_path)([image], grids, 2)
    assert torch.equal(ours.summary, Teacher(wrap(whole.vision_model), "v")([image], grids, 2).summary)


def test_a_missing_weight_is_an_error_and_not_a_random_teacher(tmp_path):
    from safetensors.torch import load_file, save_file

    save_backbone(wrap(small("dinov3")), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "o_proj" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="o_proj"):
        load_backbone(tmp_path)


def test_unknown_models_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_backbone(tmp_path.parent)
    with pytest.raises(ValueError, match="Linear"):
        wrap(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224.v2_webli", "vit_small_patch16_dinov3.lvd1689m"])
@torch.no_grad()
def test_timm_editions(name, tmp_path):
    import timm

    torch.manual_seed(0)
    pool = {"global_pool": "token"} if "dinov3" in name else {}
    sizes = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    module = timm.create_model(name, num_classes=0, dynamic_img_size=True, **sizes, **pool).eval()
    backbone = wrap(module)
    image = picture(64, 96)
    features = Teacher(backbone, name)([image], torch.tensor([[1, 4, 6]]), 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    tokens = module.forward_features(((image - mean) / std)[None])
    assert torch.allclose(features.tokens, tokens[0, module.num_prefix_tokens :], atol=1e-5)
    if pool:
        assert torch.allclose(features.summary[0], tokens[0, 0], atol=1e-5)
        assert backbone.mean == pytest.approx((0.485, 0.456, 0.406))
    else:
        assert backbone.mean == pytest.approx((0.5, 0.5, 0.5))


def test_a_timm_folder_loads(tmp_path):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    module = timm.create_model("vit_small_patch16_dinov3", num_classes=0, global_pool="token", **sizes).eval()
    save_for_hf(module, tmp_path, model_args=sizes, safe_serialization=True)
    image, grids = picture(32, 32), torch.tensor([[1, 2, 2]])
    ours = Teacher.load(tmp_path)([image], grids, 2)
    assert torch.equal(ours.tokens, Teacher(wrap(module), "t")([image], grids, 2).tokens)


def test_a_timm_model_of_one_size_is_resampled():
    import timm

    sizes = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    module = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, img_size=64, **sizes)
    teacher = Teacher(wrap(module), "fixed")
    assert teacher.grid == (4, 4)
    assert teacher([picture(40, 90)], torch.tensor([[1, 4, 10]]), 2).tokens.shape == (40, 64)


def test_extreme_images_and_low_precision():
    teacher = Teacher(wrap(small("dinov3")), "d", dtype=torch.bfloat16)
    images = [torch.rand(3, 1, 1), torch.rand(3, 8, 2000)]
    features = teacher(images, torch.tensor([[1, 8, 8], [1, 2, 128]]), 2)
    assert features.tokens.dtype == torch.float32
    assert features.tokens.isfinite().all()


def test_bad_requests_are_named():
    teacher = Teacher(wrap(small("dinov3")), "d")
    with pytest.raises(ValueError, match="clip"):
        teacher([picture(32, 32)], torch.tensor([[2, 2, 2]]), 2)
    with pytest.raises(ValueError, match="1 images for 2 grids"):
        teacher([picture(32, 32)], torch.tensor([[1, 2, 2], [1, 2, 2]]), 2)
    with pytest.raises(ValueError, match="multiple of its patch size"):
        Teacher(wrap(small("dinov3")), "d", resolution=100)
    with pytest.raises(ValueError, match="no mask token"):
        wrap(small("siglip2"))(picture(32, 32)[None], torch.ones(1, 4, dtype=torch.bool))


def test_resizing_keeps_the_range():
    image = torch.zeros(3, 8, 8)
    image[:, :, 4:] = 1.0
    resized = resize_pixels(image, 21, 21)
    assert float(resized.min()) >= 0.0
    assert float(resized.max()) <= 1.0


@pytest.mark.parametrize(("error", "said"), [(OSError(), "OSError"), (OSError("no route\nto host"), "no route")])
def test_a_teacher_that_cannot_be_reached_is_named_with_the_reason(monkeypatch, error, said):
    from transformers import AutoConfig

    def unreachable(source):
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=rf"no teacher 'some/model'.*\({said}\)$"):
        load_backbone("some/model")
