"""Frozen teachers behind one adapter: SigLIP, SigLIP2 and DINOv3 of transformers, and their timm editions.

A :class:`Backbone` knows how to call one architecture: pixels in, a grid of features and a summary out, class and
register tokens dropped. :class:`Teacher` is a frozen backbone that follows a student's patch grid and answers in the
student's order. :class:`BackboneEncoder` is the same backbone as a trainable
:class:`~mmagent.protocols.VisionEncoder`, so that small teachers are trained, probed and compared like any encoder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagent.geometry import CLIP_MEAN, CLIP_STD, GeometryConfig, from_patches, patch_coordinates
from mmagent.models.layers import collect_roles, matrix_std
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import PackedVision, ParamRole, VisionFeatures

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = "preprocessor_config.json"


class GridFeatures(NamedTuple):
    """``tokens (B, rows * cols, W)`` in reading order and ``summary (B, S)`` of B images of one size."""

    tokens: Tensor
    summary: Tensor


class Call(Protocol):
    """Runs a module on normalised ``pixels (B, 3, height, width)``; ``masked (B, rows * cols)`` hides patches."""

    def __call__(self, module: Any, pixels: Tensor, masked: Tensor | None) -> GridFeatures: ...


@dataclass(frozen=True)
class Backbone:
    """One vision module and how to use it: ``patch_size`` in pixels, widths of its features and of its summary, mean
    and deviation of its pixels, and ``fixed (rows, cols)`` where it accepts one grid only."""

    module: nn.Module
    call: Call
    patch_size: int
    width: int
    summary_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed: tuple[int, int] | None = None

    def __call__(self, pixels: Tensor, masked: Tensor | None = None) -> GridFeatures:
        """``pixels (B, 3, rows * patch_size, cols * patch_size)`` in [0, 1]."""
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        dtype = next(self.module.parameters()).dtype
        features = self.call(self.module, ((pixels - mean) / std).to(dtype), masked)
        cells = pixels.shape[-2] // self.patch_size * (pixels.shape[-1] // self.patch_size)
        assert features.tokens.shape[1] == cells, f"{features.tokens.shape[1]} tokens for {cells} patches"
        return features


class TeacherFeatures(NamedTuple):
    """``tokens (P, W)`` float32, one row a patch of the student's stream and in its order; ``summary (I, S)``."""

    tokens: Tensor
    summary: Tensor


class Teacher:
    """A frozen backbone that looks at images on a student's patch grid.

    Deliberately no ``nn.Module``: an objective that holds one neither trains, shards nor checkpoints it.

    ``resolution`` 0 resizes each image so that the teacher's grid *is* the student's (256 pixels at patch 16 where the
    student sees 224 at patch 14); a positive one shows the teacher squares of that many pixels, its training size, and
    resamples its features to the student's grid. A backbone that accepts one grid only always does the latter.
    ``summary`` is false for a backbone whose summary nothing has trained: only its patches teach then.
    """

    def __init__(
        self,
        backbone: Backbone,
        name: str,
        *,
        resolution: int = 0,
        dtype: torch.dtype | None = None,
        summary: bool = True,
    ):
        self.name = name.replace(".", "_")  # names of heads and metrics, where a dot would be a path
        self.summary = summary
        self.width, self.summary_width = backbone.width, backbone.summary_width
        self.backbone = backbone
        backbone.module.requires_grad_(False).eval()
        if dtype is not None:
            backbone.module.to(dtype)
        patch = backbone.patch_size
        if resolution % patch:
            raise ValueError(f"teacher {name}: resolution {resolution} is no multiple of its patch size {patch}")
        self.grid = backbone.fixed or ((resolution // patch,) * 2 if resolution else None)

    @classmethod
    def load(
        cls,
        source: str | Path,
        name: str = "",
        *,
        resolution: int = 0,
        dtype: torch.dtype | None = None,
        summary: bool = True,
    ) -> Teacher:
        """From a local folder, a hub id, or ``timm:`` and a model name: see :func:`load_backbone`."""
        name = name or Path(str(source)).name
        return cls(load_backbone(source), name, resolution=resolution, dtype=dtype, summary=summary)

    def to(self, device: torch.device | str) -> Teacher:
        self.backbone.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Sequence[Tensor], grids: Tensor, merge_size: int) -> TeacherFeatures:
        """Features on the student's ``grids (I, 3)`` of still images: I of ``(3, h, w)`` in [0, 1], of any size.

        Images of equal grids run as one batch. Raises ``ValueError`` for clips.
        """
        if len(pixels) != grids.shape[0]:
            raise ValueError(f"teacher {self.name}: {len(pixels)} images for {grids.shape[0]} grids")
        tokens: list[Tensor] = [torch.empty(0)] * len(pixels)
        summaries: list[Tensor] = [torch.empty(0)] * len(pixels)
        for grid, members in equal_grids(grids).items():
            rows, cols = self.grid or grid[1:]
            patch = self.backbone.patch_size
            seen = torch.stack([resize_pixels(pixels[i], rows * patch, cols * patch) for i in members])
            with torch.autocast(seen.device.type, enabled=False):  # its precision is its own, not the student's
                features = self.backbone(seen)
            plane = features.tokens.float().unflatten(1, (rows, cols))
            order = _stream_order(grid, merge_size, seen.device)
            ordered = resample(plane, grid[1:]).flatten(1, 2)[:, order]
            for place, i in enumerate(members):
                tokens[i], summaries[i] = ordered[place], features.summary[place].float()
        return TeacherFeatures(torch.cat(tokens), torch.stack(summaries))


class BackboneEncoder(nn.Module):
    """A backbone as a :class:`~mmagent.protocols.VisionEncoder` over the library's own patches, for still images.

    The patches' CLIP normalisation is undone and the backbone's own applied, so nothing but the merge order differs
    from calling it directly.
    """

    def __init__(self, backbone: Backbone, merge_size: int = 2):
        super().__init__()
        self.backbone = backbone
        self.module = backbone.module
        self.patch_size, self.merge_size, self.width = backbone.patch_size, merge_size, backbone.width
        self.geometry = GeometryConfig(patch_size=self.patch_size, merge_size=merge_size)
        self.patch_values = self.geometry.patch_values

    def forward(self, vision: PackedVision, layers: Sequence[int] = (), masked: Tensor | None = None) -> VisionFeatures:
        """``tokens (P, W)`` and ``pooled (I, S)``; ``masked (P,)`` hides patches if the backbone has a mask token."""
        if layers:
            raise ValueError("a teacher's backbone returns its last features only, no inner layers")
        mean, std = (torch.tensor(v, device=vision.patches.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        sizes = vision.grids.prod(dim=1).tolist()
        patches = vision.patches.split(sizes)
        hidden = None if masked is None else masked.split(sizes)
        tokens: list[Tensor] = [torch.empty(0)] * len(sizes)
        pooled: list[Tensor] = [torch.empty(0)] * len(sizes)
        for grid, members in equal_grids(vision.grids).items():
            order = _stream_order(grid, self.merge_size, vision.patches.device)
            back = order.argsort()
            planes = torch.stack([from_patches(patches[i], grid, self.geometry)[0] for i in members])
            blind = None if hidden is None else torch.stack([hidden[i][back] for i in members])
            features = self.backbone(planes * std + mean, blind)
            for place, i in enumerate(members):
                tokens[i], pooled[i] = features.tokens[place][order], features.summary[place]
        return VisionFeatures(torch.cat(tokens), {}, torch.stack(pooled))

    def roles(self) -> Mapping[str, ParamRole]:
        """By the types of the backbone's layers."""
        return collect_roles(self.module, "encoder", prefix="module.")

    def blocks(self) -> Iterable[nn.Module]:
        return ()

    def leaves(self) -> Iterable[nn.Module]:
        return ()


def resize_pixels(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased resize of one ``(3, h, w)`` image in [0, 1]."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    resized = F.interpolate(pixels.unsqueeze(0), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0.0, 1.0)


def resample(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, rows, cols, W)`` features to another grid: bilinear, antialiased where it gets coarser."""
    if plane.shape[1:3] == size:
        return plane
    channels = plane.permute(0, 3, 1, 2)
    out = F.interpolate(channels, size, mode="bilinear", antialias=True, align_corners=False)
    return out.permute(0, 2, 3, 1)


def equal_grids(grids: Tensor) -> dict[tuple[int, int, int], list[int]]:
    """Which of ``grids (I, 3)`` are alike, so that they can run as one batch. Raises ``ValueError`` for clips."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, grid in enumerate(grids.tolist()):
        if grid[0] != 1:
            raise ValueError(f"image {i} is a clip of {grid[0]} frame groups; teachers look at still images")
        groups.setdefault(tuple(grid), []).append(i)
    return groups


def _stream_order(grid: tuple[int, int, int], merge_size: int, device: torch.device) -> Tensor:
    """``(p,)``: index in reading order of every patch of the merge-block-major stream."""
    coordinates = patch_coordinates(grid, merge_size)
    return (coordinates[:, 0] * grid[2] + coordinates[:, 1]).to(device)


def load_backbone(source: str | Path) -> Backbone:
    """A backbone with its weights, from

    - a local folder that transformers wrote (``model_type`` siglip2, siglip or dinov3_vit; whole image-text models
      give their vision tower) or that timm wrote (``architecture``),
    - a hub id of either kind of transformers model,
    - ``timm:NAME``, a timm model with its pretrained weights.

    Only safetensors are read from folders. Raises ``ValueError`` where the model is of no known kind, or a weight is
    missing.
    """
    text = str(source)
    if text.startswith("timm:"):
        return _timm_backbone(text.removeprefix("timm:"), pretrained=True)
    folder = Path(source)
    config = folder / "config.json"
    if folder.is_dir() and not config.is_file():
        raise ValueError(f"{folder} holds no config.json")
    if config.is_file() and "architecture" in json.loads(config.read_text(encoding="utf-8")):
        return _timm_backbone(f"local-dir:{folder}", pretrained=True)
    return _transformers_backbone(text)


def _transformers_backbone(source: str) -> Backbone:
    ensure_torchvision()
    from transformers import AutoConfig, DINOv3ViTModel, Siglip2VisionModel, SiglipVisionModel
    from transformers.utils import cached_file

    classes: dict[str, Any] = {
        "siglip2": Siglip2VisionModel,
        "siglip2_vision_model": Siglip2VisionModel,
        "siglip": SiglipVisionModel,
        "siglip_vision_model": SiglipVisionModel,
        "dinov3_vit": DINOv3ViTModel,
    }
    try:
        kind = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"no teacher {source!r}: it must be the folder of a model (recipes.teachers leaves one in OUTPUT/teacher), "
            f"or a hub id that can be reached from here ({said[0]})"
        ) from error
    if kind not in classes:
        raise ValueError(f"{source} is a {kind!r} model; known teachers are {', '.join(classes)}")
    module, report = classes[kind].from_pretrained(source, use_safetensors=True, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks the weights {', '.join(sorted(report['missing_keys'])[:8])}")
    found = cached_file(source, PREPROCESSOR, _raise_exceptions_for_missing_entries=False)
    pixels = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    return wrap(module, mean=pixels.get("image_mean"), std=pixels.get("image_std"))


def _timm_backbone(name: str, pretrained: bool) -> Backbone:
    ensure_torchvision()
    import timm

    # the class token is DINOv3's own summary; timm's default for it is the mean of patches
    pool = {"global_pool": "token"} if "dinov3" in name else {}
    return wrap(timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **pool))


def wrap(module: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Backbone:
    """A backbone around a module you hand in: a transformers SigLIP, SigLIP2 or DINOv3 vision model, or a timm ViT.

    ``mean`` and ``std`` default to those its family was trained with. For any other module build a :class:`Backbone`.
    """
    ensure_torchvision()
    from transformers import DINOv3ViTModel, Siglip2VisionModel, SiglipVisionModel

    fixed = None
    if isinstance(module, Siglip2VisionModel | SiglipVisionModel | DINOv3ViTModel):
        config = module.config
        calls = {Siglip2VisionModel: _siglip2, SiglipVisionModel: _siglip, DINOv3ViTModel: _dinov3}
        call = next(c for kind, c in calls.items() if isinstance(module, kind))
        patch, width = int(config.patch_size), int(config.hidden_size)
        dino = isinstance(module, DINOv3ViTModel)
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if dino else (HALF, HALF)
    elif "timm" in sys.modules and isinstance(module, _timm_classes()):  # importing it takes seconds
        call, patch, width = _timm, int(module.patch_embed.patch_size[0]), int(module.num_features)
        pretrained = module.pretrained_cfg or {}
        defaults = (pretrained.get("mean", HALF), pretrained.get("std", HALF))
        fixed = None if module.dynamic_img_size else tuple(module.patch_embed.grid_size)
    else:
        raise ValueError(f"{type(module).__name__} is no known teacher; describe it with a Backbone of your own")
    return Backbone(module, call, patch, width, width, tuple(mean or defaults[0]), tuple(std or defaults[1]), fixed)


def new_backbone(kind: str, width: int, depth: int, heads: int, patch_size: int) -> Backbone:
    """An untrained ``siglip2`` or ``dinov3`` of transformers, to be trained on the spot. Raises ``ValueError`` for
    another kind."""
    ensure_torchvision()
    from transformers import DINOv3ViTConfig, DINOv3ViTModel, Siglip2VisionConfig, Siglip2VisionModel

    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": patch_size,
    }
    if kind == "siglip2":
        module: Any = Siglip2VisionModel(Siglip2VisionConfig(num_patches=64, **sizes))
    elif kind == "dinov3":
        # its random scale of positions is drawn once a forward: a loss would depend on which images share a micro-batch
        module = DINOv3ViTModel(DINOv3ViTConfig(pos_embed_rescale=None, **sizes))
    else:
        raise ValueError(f"kind {kind!r} is neither siglip2 nor dinov3")
    module.set_attn_implementation("eager")  # torch's fused attention is slow backwards in bf16 on a CPU
    for layer in module.modules():  # their own 0.02 is meant for wide models
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=matrix_std(layer.weight[0].numel(), 0))
    return wrap(module)


def _timm_classes() -> tuple[type, ...]:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer, Eva


def _siglip2(module: Any, pixels: Tensor, masked: Tensor | None) -> GridFeatures:
    """NaFlex: images arrive as rows of patches, channels last, with their grids."""
    _no_masks(module, masked)
    patch = module.config.patch_size
    images, channels, height, width = pixels.shape
    rows, cols = height // patch, width // patch
    cut = pixels.view(images, channels, rows, patch, cols, patch).permute(0, 2, 4, 3, 5, 1)
    grids = torch.tensor([[rows, cols]]).expand(images, 2)
    output = module(cut.reshape(images, rows * cols, -1), pixel_attention_mask=None, spatial_shapes=grids)
    return _pooled(output)


def _siglip(module: Any, pixels: Tensor, masked: Tensor | None) -> GridFeatures:
    _no_masks(module, masked)
    native = (module.config.image_size,) * 2
    return _pooled(module(pixels, interpolate_pos_encoding=tuple(pixels.shape[-2:]) != native))


def _dinov3(module: Any, pixels: Tensor, masked: Tensor | None) -> GridFeatures:
    output = module(pixels, bool_masked_pos=masked)
    return GridFeatures(output.last_hidden_state[:, 1 + module.config.num_register_tokens :], output.pooler_output)


def _timm(module: Any, pixels: Tensor, masked: Tensor | None) -> GridFeatures:
    _no_masks(module, masked)
    tokens = module.forward_features(pixels)
    return GridFeatures(tokens[:, module.num_prefix_tokens :], module.forward_head(tokens, pre_logits=True))


def _pooled(output: Any) -> GridFeatures:
    """Towers without a pooling head are summarised by the mean of their patches."""
    tokens = output.last_hidden_state
    return GridFeatures(tokens, tokens.mean(dim=1) if output.pooler_output is None else output.pooler_output)


def _no_masks(module: nn.Module, masked: Tensor | None) -> None:
    if masked is not None:
        raise ValueError(f"{type(module).__name__} has no mask token")


def save_backbone(backbone: Backbone, folder: Path | str) -> None:
    """Write a transformers backbone as a folder that :func:`load_backbone` (and transformers itself) reads."""
    module: Any = backbone.module
    if not hasattr(module, "save_pretrained"):
        raise ValueError(f"{type(module).__name__} is no transformers model")
    module.save_pretrained(folder)
    pixels = {"image_mean": list(backbone.mean), "image_std": list(backbone.std)}
    (Path(folder) / PREPROCESSOR).write_text(json.dumps(pixels, indent=1), encoding="utf-8")
