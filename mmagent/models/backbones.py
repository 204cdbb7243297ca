"""Any vision model of transformers or timm behind one call, and as a trainable encoder.

A :class:`Backbone` knows how to call one model: pixels in, a grid of features and a summary out, class and register
tokens dropped. :class:`BackboneEncoder` is the same backbone as a :class:`~mmagent.protocols.VisionEncoder`, so that it
is trained, probed and compared like any encoder; :class:`~mmagent.models.teachers.Teacher` freezes one.

Of a hierarchical model (ConvNeXt, ResNet, Swin) the grid is that of its last stage, and ``patch_size`` its total
reduction. The summary is what the model itself pools; where it does not, its class token; where it has none, the mean
of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmagent.geometry import GeometryConfig, from_patches
from mmagent.models.backbone import (
    SUMMARIES,
    Backbone,
    Call,
    GridFeatures,
    equal_planes,
    quietly,
    resample,
    resize_pixels,
    stream_order,
)
from mmagent.models.layers import collect_roles, matrix_std
from mmagent.models.timm_backbones import (
    build_timm,
    is_timm,
    load_timm,
    save_timm,
    timm_architecture,
    timm_blocks,
    wrap_timm,
)
from mmagent.models.transformers_backbones import (
    build_transformers,
    is_transformers,
    load_transformers,
    save_transformers,
    transformers_architecture,
    transformers_blocks,
    wrap_transformers,
)
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import PackedVision, ParamRole, VisionFeatures

__all__ = [
    "Backbone",
    "BackboneEncoder",
    "Call",
    "GridFeatures",
    "architecture",
    "from_architecture",
    "load_backbone",
    "new_backbone",
    "save_backbone",
    "wrap",
]


def load_backbone(source: str | Path, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone with its weights, from

    - a local folder that transformers or timm wrote (image-text models give their vision tower),
    - a hub id of either kind,
    - ``timm:NAME``, a timm model with its pretrained weights (``timm:hf_hub:ID`` as timm itself reads it).

    Mean and deviation of its pixels are those of the preprocessor's config beside the weights, else those its family
    was trained with. Only safetensors are read from folders. Raises ``ValueError`` where the model is no vision model,
    cannot give a grid of features, or a weight is missing.
    """
    text = str(source)
    if text.startswith("timm:"):
        return load_timm(text.removeprefix("timm:"), dtype)
    folder = Path(source)
    config = folder / "config.json"
    if folder.is_dir() and not config.is_file():
        raise ValueError(f"{folder} holds no config.json")
    if config.is_file() and "architecture" in json.loads(config.read_text(encoding="utf-8")):
        return load_timm(f"local-dir:{folder}", dtype)
    if not folder.is_dir() and text.startswith("timm/"):  # where the hub keeps timm's own weights
        return load_timm(f"hf_hub:{text}", dtype)
    return load_transformers(text, dtype)


def wrap(
    module: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, pool: str = "own"
) -> Backbone:
    """A backbone around a module you hand in: a vision (or image-text) model of transformers, or a timm model.

    It is run once on a tiny image, to see what it returns. ``mean`` and ``std`` default to those its family was trained
    with; ``pool`` takes its ``own`` summary or the ``mean`` of its tokens. For any other module build a
    :class:`Backbone`. Raises ``ValueError`` for a module that gives no grid of features, and says why.
    """
    if pool not in SUMMARIES:
        raise ValueError(f"pool {pool!r} is none of {', '.join(SUMMARIES)}")
    if is_timm(module):
        return wrap_timm(module, mean, std, pool)
    if is_transformers(module):
        return wrap_transformers(module, mean, std, pool)
    raise ValueError(f"{type(module).__name__} is no model of transformers or timm; describe it with a Backbone")


def save_backbone(backbone: Backbone, folder: Path | str) -> None:
    """Write a folder that :func:`load_backbone`, and the library that the model is of, read; an older one is replaced.

    Raises ``ValueError`` for a module of neither library, and for a folder that holds anything else.
    """
    module = backbone.module
    if is_timm(module):
        save_timm(backbone, Path(folder))
    elif is_transformers(module):
        save_transformers(backbone, Path(folder))
    else:
        raise ValueError(f"{type(module).__name__} is no model of transformers or timm")


def architecture(backbone: Backbone) -> dict[str, Any]:
    """All but the weights, as values that JSON and YAML hold: what :func:`from_architecture` builds the backbone from.

    ``library`` (``transformers`` or ``timm``), ``mean``, ``std``, ``pool``, ``model`` and how that is built. Building
    is tried before anything is promised: raises ``ValueError`` where the module cannot be described so that its
    parameters and layers come out alike.
    """
    module = backbone.module
    if is_timm(module):
        described = {"library": "timm", **timm_architecture(module)}
    elif is_transformers(module):
        described = {"library": "transformers", **transformers_architecture(module)}
    else:
        raise ValueError(f"{type(module).__name__} is no model of transformers or timm")
    pixels = {"mean": list(backbone.mean), "std": list(backbone.std), "pool": backbone.pool}
    described = json.loads(json.dumps({**described, **pixels}))
    again = _build(described)
    if repr(again) != repr(module) or _shapes(again) != _shapes(module):
        raise ValueError(f"{type(module).__name__} was changed after it was built: it cannot be described")
    return described


def from_architecture(described: Mapping[str, Any]) -> Backbone:
    """The backbone of :func:`architecture`, with random weights, in evaluation mode. Raises ``ValueError`` for a
    description of neither library."""
    return wrap(_build(described), described["mean"], described["std"], described["pool"])


def _build(described: Mapping[str, Any]) -> nn.Module:
    builders = {"timm": build_timm, "transformers": build_transformers}
    if described.get("library") not in builders:
        raise ValueError(f"library {described.get('library')!r} is none of {', '.join(builders)}")
    with torch.random.fork_rng(devices=[]):  # weights that nobody keeps: a run's own draws stay as they were
        return builders[described["library"]](described).eval()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


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


class BackboneEncoder(nn.Module):
    """A backbone as a :class:`~mmagent.protocols.VisionEncoder` over the library's own patches.

    The normalisation of ``geometry`` is undone and the backbone's own applied, so nothing but the merge order differs
    from calling it directly. Frames of equal grids run as one batch and others in one of their own: nothing is padded,
    so nothing leaks. A clip's frame group is seen as the mean of its frames, and its ``pooled`` is the mean over
    groups. A backbone of one size only sees images resized to it, and its features are resampled to their grids.

    Batch norms keep their running statistics in training as well (their gains and biases train): statistics of a
    batch would let the images of a pack see each other. What neither tokens nor summary depend on is frozen: a head
    whose place the mean of tokens took, and, with ``mask_token`` false, the mask token, for training that hides
    nothing. Randomness of the model itself (dropout, DINOv3's random scale of positions) is left on in training; its
    config turns it off.
    """

    def __init__(self, backbone: Backbone, geometry: GeometryConfig | None = None, mask_token: bool = True):
        super().__init__()
        self.geometry = geometry or GeometryConfig(patch_size=backbone.patch_size)
        if self.geometry.patch_size != backbone.patch_size:
            raise ValueError(
                f"geometry cuts patches of {self.geometry.patch_size} pixels, {type(backbone.module).__name__} sees "
                f"{backbone.patch_size}"
            )
        if backbone.summary_width != backbone.width:
            raise ValueError(
                f"{type(backbone.module).__name__}: its summary has {backbone.summary_width} values, its tokens "
                f"{backbone.width}; wrap it with pool='mean'"
            )
        self.backbone = backbone
        self.module = backbone.module
        self.patch_size, self.merge_size = self.geometry.patch_size, self.geometry.merge_size
        self.width, self.patch_values = backbone.width, self.geometry.patch_values
        self.train(self.module.training)
        _freeze_idle(backbone, mask_token)

    def train(self, mode: bool = True) -> BackboneEncoder:
        """As every module's, but for batch norms, which stay in evaluation mode."""
        super().train(mode)
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def forward(self, vision: PackedVision, layers: Sequence[int] = (), masked: Tensor | None = None) -> VisionFeatures:
        """``tokens (P, W)``, ``pooled (I, W)``, and of ``layers`` the outputs of those blocks, by index, negative from
        the end; ``masked (P,)`` hides patches.

        Raises ``ValueError`` where the backbone has no mask token, or no such layers.
        """
        device = vision.patches.device
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.geometry.mean, self.geometry.std))
        sizes = vision.grids.prod(dim=1).tolist()
        patches = vision.patches.split(sizes)
        if masked is None and self.backbone.maskable and self.backbone.fixed is None:
            masked = torch.zeros(sum(sizes), dtype=torch.bool, device=device)  # its token must not lack a gradient
        hidden = None if masked is None else masked.split(sizes)
        out: dict[str | int, list[Tensor]] = {key: [torch.empty(0)] * len(sizes) for key in ("tokens", *layers)}
        pooled: list[Tensor] = [torch.empty(0)] * len(sizes)
        for (rows, cols), members in equal_planes(vision.grids).items():
            order = stream_order(rows, cols, self.merge_size, device)
            groups = [int(vision.grids[i, 0]) for i in members]
            planes = torch.cat(
                [self._frames(patches[i], (n, rows, cols)) for i, n in zip(members, groups, strict=True)]
            )
            blind = None
            if hidden is not None:
                blind = torch.cat([hidden[i].unflatten(0, (-1, rows * cols)) for i in members])[:, order.argsort()]
            features = self._look(planes * std + mean, (rows, cols), blind, layers)
            for key, values in (("tokens", features.tokens), *features.layers.items()):
                for i, own in zip(members, values[:, order].split(groups), strict=True):
                    out[key][i] = own.flatten(0, 1)
            for i, own in zip(members, features.summary.split(groups), strict=True):
                pooled[i] = own.mean(dim=0)
        inner = {layer: torch.cat(out[layer]) for layer in layers}
        return VisionFeatures(torch.cat(out["tokens"]), inner, torch.stack(pooled))

    def _frames(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """``(groups, 3, height, width)``: the mean of every group's frames."""
        return from_patches(patches, grid, self.geometry).unflatten(0, (grid[0], -1)).mean(dim=1)

    def _look(
        self, pixels: Tensor, grid: tuple[int, int], masked: Tensor | None, layers: Sequence[int]
    ) -> GridFeatures:
        fixed = self.backbone.fixed
        if fixed is None or fixed == grid:
            return self.backbone(pixels, masked, layers)
        if masked is not None:
            raise ValueError(
                f"{type(self.module).__name__} sees {fixed} patches only: those of {grid} cannot be hidden"
            )
        side = self.patch_size
        features = self.backbone(
            torch.stack([resize_pixels(p, fixed[0] * side, fixed[1] * side) for p in pixels]), None, layers
        )
        again = [
            resample(t.unflatten(1, fixed), grid).flatten(1, 2) for t in (features.tokens, *features.layers.values())
        ]
        return GridFeatures(again[0], features.summary, dict(zip(features.layers, again[1:], strict=True)))

    def roles(self) -> Mapping[str, ParamRole]:
        """By the types of the backbone's layers."""
        return collect_roles(self.module, "encoder", prefix="module.")

    def blocks(self) -> Iterable[nn.Module]:
        """The model's repeated blocks, to shard one by one."""
        if is_timm(self.module):
            return timm_blocks(self.module)
        return transformers_blocks(self.module) if is_transformers(self.module) else ()

    def leaves(self) -> Iterable[nn.Module]:
        return ()


def _freeze_idle(backbone: Backbone, hides: bool) -> None:
    """Freeze the parameters that a forward of a tiny image, with a hidden patch if ``hides``, does not use."""
    trained = [parameter for parameter in backbone.module.parameters() if parameter.requires_grad]
    if not trained:
        return
    rows, cols = backbone.fixed or (2, 3)

    def look(pixels: Tensor) -> GridFeatures:
        hidden = torch.zeros(len(pixels), rows * cols, dtype=torch.bool, device=pixels.device)
        hidden[:, 0] = True
        with torch.enable_grad():
            return backbone(pixels, hidden if hides and backbone.maskable else None)

    features = quietly(backbone.module, look, (rows * backbone.patch_size, cols * backbone.patch_size))
    with torch.enable_grad():
        used = features.tokens.float().sum() + features.summary.float().sum()
    for parameter, gradient in zip(trained, torch.autograd.grad(used, trained, allow_unused=True), strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
