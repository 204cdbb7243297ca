"""timm's vision models as backbones: vision transformers, NaFlexVit, and convolutional and hierarchical ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmagent.files import new_folder, require_own
from mmagent.models.backbone import (
    Backbone,
    GridFeatures,
    as_tokens,
    layout_of,
    native_size,
    probe,
    square_patch,
)
from mmagent.ops.torchvision_shim import ensure_torchvision

ANY_SIZE: tuple[Mapping[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""How timm's constructors are told to take images of any size; the first that one understands is used."""
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TimmCall:
    """Calls a timm model: ``prefix`` tokens in front of the grid, ``layout`` of what ``forward_features`` returns."""

    patch_size: int
    prefix: int
    layout: str
    pooled: bool

    def __call__(self, module: Any, pixels: Tensor, masked: Tensor | None, layers: Sequence[int] = ()) -> GridFeatures:
        kind = type(module).__name__
        assert masked is None, "no forward of timm takes masks, so its backbones are not maskable"
        rows, cols = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        inner: dict[int, Tensor] = {}
        if layers:
            features, found = module.forward_intermediates(
                pixels, indices=list(layers), norm=False, output_fmt="NLC", intermediates_only=False
            )
            inner = dict(zip(layers, found, strict=True))
        else:
            features = module.forward_features(pixels)
        front, tokens = as_tokens(features, rows, cols, self.layout, self.prefix, kind)
        if self.pooled:
            summary = module.forward_head(features, pre_logits=True)
        else:
            summary = front[:, 0] if self.prefix else tokens.mean(dim=1)
        return GridFeatures(tokens, summary, inner)


def is_timm(module: nn.Module) -> bool:
    """Whether ``module`` has what every model of timm has."""
    return all(hasattr(module, name) for name in ("pretrained_cfg", "forward_features", "forward_head"))


def load_timm(name: str, dtype: torch.dtype) -> Backbone:
    """timm's model ``name`` with its pretrained weights: a registered name, ``hf_hub:ID`` or ``local-dir:FOLDER``."""
    if name.startswith("local-dir:") and not (Path(name.removeprefix("local-dir:")) / WEIGHTS).is_file():
        raise ValueError(f"{name.removeprefix('local-dir:')} holds no {WEIGHTS}, and nothing is unpickled")
    return wrap_timm(create_timm(name, pretrained=True).to(dtype).eval())


def create_timm(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """A timm model without a classifier, of any image size where it can."""
    ensure_torchvision()
    import timm

    # the class token is DINOv3's own summary; timm's default for its transformers is the mean of patches
    if "dinov3" in name and "vit_" in name:
        arguments.setdefault("global_pool", "token")
    arguments.setdefault("num_classes", 0)
    for option in ANY_SIZE:
        if any(key in arguments for key in option):
            continue
        try:
            return timm.create_model(name, pretrained=pretrained, **arguments, **option)
        except TypeError as error:
            if not any(key in str(error) for key in option):
                raise
    return timm.create_model(name, pretrained=pretrained, **arguments)


def wrap_timm(
    module: nn.Module,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pool: str = "own",
) -> Backbone:
    """A backbone around a timm model, measured by one forward of a tiny image.

    ``mean`` and ``std`` default to those of its ``pretrained_cfg``.
    """
    kind, any_module = type(module).__name__, _any(module)
    known = dict(any_module.pretrained_cfg or {})
    mean, std = mean or known.get("mean"), std or known.get("std")
    if not mean or not std:
        raise ValueError(f"{kind} does not say the mean and std of its pixels: give both")
    patch = _reduction(any_module)
    seen = probe(module, any_module.forward_features, patch, _native(any_module))
    prefix = int(getattr(module, "num_prefix_tokens", 0))
    layout = layout_of(seen.output, seen.rows, seen.cols, getattr(module, "output_fmt", None), kind)
    front, tokens = as_tokens(seen.output, seen.rows, seen.cols, layout, prefix if layout == "NLC" else 0, kind)
    with torch.no_grad():
        summary = any_module.forward_head(seen.output, pre_logits=True)
    pooled = isinstance(summary, Tensor) and summary.ndim == 2
    width = tokens.shape[-1]
    call = TimmCall(patch, front.shape[1], layout, pooled)
    return Backbone(
        module,
        call,
        patch,
        width,
        summary.shape[-1] if pooled and pool == "own" else width,
        tuple(mean),
        tuple(std),
        seen.fixed,
        _depth(any_module, layout),
        pool,
    )


def _any(module: nn.Module) -> Any:
    return module


def _reduction(module: Any) -> int:
    """Pixels on a side of a cell of the last features."""
    info = getattr(module, "feature_info", None)
    last = info[-1] if info else {}
    if isinstance(last, Mapping) and last.get("reduction"):
        return square_patch(last["reduction"], type(module).__name__)
    return square_patch(getattr(getattr(module, "patch_embed", None), "patch_size", None), type(module).__name__)


def _native(module: Any) -> tuple[int, int] | None:
    """``(height, width)`` that it was built for."""
    from timm.models import get_model_input_config

    return native_size(tuple(get_model_input_config(module)["input_size"][-2:]))


def _depth(module: Any, layout: str) -> int:
    """Blocks whose outputs ``forward_intermediates`` gives on the grid of the last features."""
    blocks = getattr(module, "blocks", None)
    if layout != "NLC" or blocks is None or not hasattr(module, "forward_intermediates"):
        return 0
    reductions = {info["reduction"] for info in module.feature_info}
    return len(blocks) if len(reductions) == 1 and len(module.feature_info) == len(blocks) else 0


def timm_architecture(module: Any) -> dict[str, Any]:
    """``model`` and ``arguments`` that build ``module`` again, as timm recorded them. Raises ``ValueError`` for a
    module that timm's own factory did not make."""
    from timm.models import get_model_args, is_model

    known = module.pretrained_cfg or {}
    name, tag = known.get("architecture") or "", known.get("tag") or ""
    if not is_model(name):
        raise ValueError(f"{type(module).__name__} cannot be described: {name!r} is no registered timm model")
    rates = {key: value for key, value in vars(module).get("_model_args", {}).items() if key.endswith("drop_rate")}
    return {"model": f"{name}.{tag}" if _registered(name, tag) else name, "arguments": get_model_args(module, rates)}


def _registered(name: str, tag: str) -> bool:
    from timm.models import list_pretrained

    return bool(tag) and f"{name}.{tag}" in list_pretrained(f"{name}.*")


def build_timm(described: Mapping[str, Any]) -> nn.Module:
    """What :func:`timm_architecture` described, with random weights."""
    ensure_torchvision()
    import timm

    return timm.create_model(described["model"], pretrained=False, **described["arguments"])


def save_timm(backbone: Backbone, folder: Path) -> None:
    """A folder that timm itself and :func:`load_timm` read. Raises ``ValueError`` where one holds anything else."""
    require_own(folder, "folder of a backbone", ("config.json", WEIGHTS), ("preprocessor_config.json",))
    from timm.models import save_for_hf

    arguments = timm_architecture(backbone.module)["arguments"]
    pixels = {"mean": list(backbone.mean), "std": list(backbone.std)}
    with new_folder(folder) as beside:
        save_for_hf(backbone.module, beside, model_args=arguments, safe_serialization=True, data_config=pixels)


def timm_blocks(module: nn.Module) -> tuple[nn.Module, ...]:
    """Its transformer blocks, or the stages of a hierarchical one."""
    for name in ("blocks", "stages", "layers"):
        found = getattr(module, name, None)
        if isinstance(found, nn.ModuleList | nn.Sequential):
            return tuple(found)
    return ()
