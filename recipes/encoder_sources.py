"""Encoders to be judged, from wherever they come: with both towers, where they have two."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mmagent.config import first_line, load_yaml
from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import open_encoder
from mmagent.interop.image_text import (
    CONFIG,
    ENCODER,
    TOKENIZER,
    AlignedTowers,
    ImageTextConfig,
    ImageTextModel,
    load_image_text,
)
from mmagent.models.backbone import Backbone, native_size
from mmagent.models.backbones import BackboneEncoder

PATCHES = 1024
"""The most patches of an image that an encoder is shown which says no size of its own: 448 x 448 at 14 pixels."""


@dataclass(frozen=True)
class Judged:
    """An encoder and how it is shown images; its ``towers``, or ``why_blind`` to texts it is. ``limit`` tells how large
    an image it is shown at most, and why."""

    name: str
    encoder: nn.Module
    geometry: GeometryConfig
    towers: ImageTextModel | None
    why_blind: str = ""
    limit: str = ""


def open_judged(argument: str, device: str, max_patches: int = 0, smallest: int = 0, towers: bool = True) -> Judged:
    """``[NAME=]SOURCE``, on ``device``. ``max_patches`` and ``smallest``, in patches and tokens, bound what it is
    shown. With ``max_patches`` 0 that is what aligned towers saw in training, the size that a foreign model was made
    for, and else what its geometry allows, though at most :data:`PATCHES`: far beyond what they know, encoders are not
    what they are. ``towers`` false does not look for a text tower. Raises ``ValueError`` in one line for what cannot be
    opened."""
    name, _, source = argument.partition("=") if "=" in argument else ("", "", argument)
    folder = Path(source)
    aligned = (folder / ENCODER).is_dir()
    model, geometry, _ = open_encoder(str(folder / ENCODER) if aligned else source)
    both, why = None, ""
    if towers:
        try:
            both = load_image_text(source).to(device)
        except (ValueError, OSError) as error:  # most encoders are alone: whether that matters, the probes decide
            why = first_line(error)
    pair = aligned and (folder / TOKENIZER).is_file()
    trained = load_yaml(ImageTextConfig(), folder / CONFIG).max_patches if pair else 0
    geometry, limit = _limited(model, geometry, max_patches, trained)
    if isinstance(both, AlignedTowers):
        both.geometry = geometry  # all probes see the same picture
    elif both is not None:
        limit += "; beside its text tower as its own processor makes them"
    geometry = replace(geometry, min_tokens=min(smallest, geometry.min_tokens)) if smallest else geometry
    return Judged(name or _named(source), model.to(device).eval(), geometry, both, why, limit)


def _limited(model: nn.Module, geometry: GeometryConfig, asked: int, trained: int) -> tuple[GeometryConfig, str]:
    """The geometry that images are shown in, and in words the limit and whose it is."""
    native = native_patches(model.backbone, geometry.merge_size) if isinstance(model, BackboneEncoder) else 0
    own = geometry.max_tokens * geometry.merge_size**2
    known = (
        (asked, "as asked"),
        (trained, "as its training had"),
        (native, "as the model was made for"),
        (own if own <= PATCHES else 0, "by its geometry"),
        (PATCHES, "by default"),
    )
    patches, whose = next(pair for pair in known if pair[0])
    geometry = geometry.within(patches)
    return geometry, f"{geometry.max_tokens * geometry.merge_size**2} patches an image at most, {whose}"


def native_patches(backbone: Backbone, merge_size: int = 1) -> int:
    """How many cells the grid of a foreign model has at the size that it was made for, lifted to whole tokens of
    ``merge_size`` cells a side; 0 where it does not say."""
    module: Any = backbone.module
    config, known = getattr(module, "config", None), getattr(module, "pretrained_cfg", None) or {}
    size = native_size(getattr(config, "image_size", None))
    size = size or native_size(getattr(getattr(module, "patch_embed", None), "img_size", None))
    size = size or native_size(tuple(known.get("input_size") or ())[-2:] or None)
    grid = backbone.fixed or (size and tuple(round(side / backbone.patch_size) for side in size))
    if not grid:  # SigLIP2 of any aspect counts patches
        return int(getattr(config, "num_patches", 0) or 0)
    return math.prod(max(-(-side // merge_size), 1) * merge_size for side in grid)


def _named(source: str) -> str:
    """A short name: of ``runs/distill/encoder`` what tells it from another run's."""
    parts = [part for part in source.removeprefix("timm:").strip("/").split("/") if part not in ("", ".")]
    return parts[-2] if len(parts) > 1 and parts[-1] == ENCODER else parts[-1] if parts else source
