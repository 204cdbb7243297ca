"""Encoders to be judged, from wherever they come: with both towers, where they have two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from mmagent.config import locate
from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import load_encoder
from mmagent.interop.image_text import ENCODER, ImageTextModel, load_image_text
from mmagent.models.backbones import BackboneEncoder, load_backbone
from mmagent.protocols import VisionEncoder

KINDS = "an encoder folder, timm:NAME, a folder or hub id of transformers, or package.module:Class"


@dataclass(frozen=True)
class Judged:
    """An encoder and how it is shown images; its ``towers``, or ``why_blind`` to texts it is."""

    name: str
    encoder: nn.Module
    geometry: GeometryConfig
    towers: ImageTextModel | None
    why_blind: str = ""


def open_judged(argument: str, device: str, max_patches: int = 0, smallest: int = 0, towers: bool = True) -> Judged:
    """``[NAME=]SOURCE``, on ``device``. ``max_patches`` and ``smallest``, in patches and tokens, bound what it is
    shown; 0 leaves that to its own geometry. ``towers`` false does not look for a text tower. Raises ``ValueError`` in
    one line for what cannot be opened."""
    name, _, source = argument.partition("=") if "=" in argument else ("", "", argument)
    folder = Path(source)
    aligned = (folder / ENCODER).is_dir()
    model, geometry = open_encoder(str(folder / ENCODER) if aligned else source)
    both, why = None, ""
    if towers:
        try:
            both = load_image_text(source).to(device)
        except (ValueError, OSError) as error:  # most encoders are alone: whether that matters, the probes decide
            why = _first_line(error)
    geometry = geometry.within(max_patches) if max_patches else geometry
    geometry = replace(geometry, min_tokens=min(smallest, geometry.min_tokens)) if smallest else geometry
    return Judged(name or _named(source), model.to(device).eval(), geometry, both, why)


def open_encoder(source: str) -> tuple[nn.Module, GeometryConfig]:
    """An encoder with the geometry it looks through: see :data:`KINDS`. A class is called without arguments, and its
    ``geometry``, if it has one, is used. Raises ``ValueError`` in one line for what cannot be opened."""
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        return load_encoder(folder)
    if folder.is_absolute() or source.startswith(".") or source.count("/") > 1:  # no hub id looks so
        if not folder.is_dir():
            raise ValueError(f"{source}: no such folder; an encoder is {KINDS}")
    elif ":" in source and not source.startswith("timm:"):
        model = locate(source)()
        if not isinstance(model, nn.Module) or not isinstance(model, VisionEncoder):
            raise ValueError(f"{source}: makes a {type(model).__name__}, which is no encoder (mmagent.protocols)")
        known = getattr(model, "geometry", None)
        plain = GeometryConfig(patch_size=model.patch_size, merge_size=model.merge_size)
        return model, known if isinstance(known, GeometryConfig) else plain
    try:
        encoder = BackboneEncoder(load_backbone(source))
    except (OSError, RuntimeError) as error:  # what the hub and timm raise for names that they do not have
        raise ValueError(f"{source}: cannot be loaded: {_first_line(error)}") from error
    return encoder, encoder.geometry


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _named(source: str) -> str:
    """A short name: of ``runs/distill/encoder`` what tells it from another run's."""
    parts = [part for part in source.removeprefix("timm:").strip("/").split("/") if part not in ("", ".")]
    return parts[-2] if len(parts) > 1 and parts[-1] == ENCODER else parts[-1] if parts else source
