"""A trained encoder as a folder: what stages 1 and 2 leave behind, and what the stage after them reads.

``FOLDER/config.yaml``         :class:`EncoderConfig`: the tower and its image geometry
``FOLDER/model.safetensors``   every parameter
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mmagent.config import load_yaml, to_yaml
from mmagent.files import new_folder
from mmagent.geometry import GeometryConfig
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.ops.state import load_weights, save_weights

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"


@dataclass
class EncoderConfig:
    """What ``config.yaml`` holds."""

    vision: CogViTConfig = field(default_factory=CogViTConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)


class Encoder(NamedTuple):
    """An encoder with the geometry it was trained at."""

    model: CogViT
    geometry: GeometryConfig


def save_encoder(
    folder: Path | str, encoder: CogViT, geometry: GeometryConfig, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the folder beside its place and move it there whole, replacing an older one. ``weights`` is the full state
    dict of a sharded encoder, gathered by all ranks; one rank writes."""
    with new_folder(Path(folder)) as beside:
        save_weights(encoder if weights is None else weights, beside / WEIGHTS)
        (beside / CONFIG).write_text(to_yaml(EncoderConfig(encoder.config, geometry)), encoding="utf-8")


def load_encoder(folder: Path | str) -> Encoder:
    """Read a folder of :func:`save_encoder`; the encoder is on the CPU, in evaluation mode.

    Raises ``ValueError`` naming the file that is missing, or the tensors that do not fit.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is no encoder folder: {', '.join(missing)} missing; distillation and alignment leave one in "
            f"OUTPUT/encoder"
        )
    config = load_yaml(EncoderConfig(), folder / CONFIG)
    model = CogViT(config.vision)
    load_weights(model, folder / WEIGHTS)
    return Encoder(model.eval(), config.geometry)
