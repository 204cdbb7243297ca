"""Small models with random weights of the families that backbones are made of."""

from __future__ import annotations

from typing import Any

import torch

from mmagent.ops.torchvision_shim import ensure_torchvision

ensure_torchvision()

_SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_SQUARE = {**_SIZE, "intermediate_size": 64, "image_size": 64, "patch_size": 16}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip2": ("Siglip2VisionModel", {**_SIZE, "intermediate_size": 64, "num_patches": 16, "patch_size": 16}),
    "siglip": ("SiglipVisionModel", _SQUARE),
    "dinov3": (
        "DINOv3ViTModel",
        {**_SIZE, "intermediate_size": 64, "num_register_tokens": 4, "patch_size": 16, "pos_embed_rescale": None},
    ),
    "dinov3 convnext": ("DINOv3ConvNextModel", _STAGES),
    "dinov2": ("Dinov2Model", {**_SIZE, "image_size": 64, "patch_size": 16}),
    "dinov2 registers": ("Dinov2WithRegistersModel", {**_SIZE, "image_size": 64, "patch_size": 16}),
    "clip": ("CLIPVisionModel", _SQUARE),
    "vit": ("ViTModel", _SQUARE),
    "deit": ("DeiTModel", _SQUARE),
    "beit": (
        "BeitModel",
        {**_SQUARE, "use_mask_token": True, "use_relative_position_bias": True, "drop_path_rate": 0.0},
    ),
    "aimv2": ("Aimv2VisionModel", _SQUARE),
    "convnext": ("ConvNextModel", _STAGES),
    "convnextv2": ("ConvNextV2Model", _STAGES),
    "resnet": (
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    ),
    "swin": ("SwinModel", {**_SWIN, "window_size": 2, "image_size": 64}),
    "swinv2": ("Swinv2Model", {**_SWIN, "window_size": 4, "image_size": 128}),
    "hiera": ("HieraModel", {**_SWIN, "image_size": [64, 64]}),
}

_VIT = {"depth": 3, "embed_dim": 32, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {
    "vit_base_patch16_siglip_224.v2_webli": _VIT,
    "vit_small_patch16_dinov3.lvd1689m": {**_VIT, "global_pool": "token"},
    "vit_base_patch14_reg4_dinov2.lvd142m": _VIT,
    "vit_base_patch16_clip_224.openai": _VIT,
    "beit_base_patch16_224.in22k_ft_in22k": {**_VIT, "img_size": 64},
    "eva02_tiny_patch14_224.mim_in22k": _VIT,
    "deit_tiny_distilled_patch16_224.fb_in1k": _VIT,
    "naflexvit_base_patch16_siglip.v2_webli": _VIT,
    "convnext_tiny.fb_in1k": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet18.a1_in1k": {"channels": (8, 16, 24, 32)},
    "swin_tiny_patch4_window7_224.ms_in1k": {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "hiera_tiny_224.mae": {"embed_dim": 12, "stages": (1, 1, 1, 1), "num_heads": 1, "img_size": (64, 64)},
}


def transformers_model(kind: str, **options: Any) -> Any:
    """A model of :data:`TRANSFORMERS` in evaluation mode; the same weights every time."""
    import transformers

    name, sizes = TRANSFORMERS[kind]
    model = getattr(transformers, name)
    torch.manual_seed(0)
    return model(model.config_class(**{**sizes, **options})).eval()


def timm_model(name: str, **options: Any) -> Any:
    """A model of :data:`TIMM` in evaluation mode; the same weights every time."""
    from mmagent.models.timm_backbones import create_timm

    torch.manual_seed(0)
    return create_timm(name, **{**TIMM[name], **options}).eval()
