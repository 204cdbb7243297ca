"""Encoders to be judged, from wherever they come: with both towers, where they have two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from mmagent.geometry import GeometryConfig
from mmagent.interop.encoder_folder import open_encoder
from mmagent.interop.image_text import ENCODER, ImageTextModel, load_image_text


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
    model, geometry, _ = open_encoder(str(folder / ENCODER) if aligned else source)
    both, why = None, ""
    if towers:
        try:
            both = load_image_text(source).to(device)
        except (ValueError, OSError) as error:  # most encoders are alone: whether that matters, the probes decide
            why = _first_line(error)
    geometry = geometry.within(max_patches) if max_patches else geometry
    geometry = replace(geometry, min_tokens=min(smallest, geometry.min_tokens)) if smallest else geometry
    return Judged(name or _named(source), model.to(device).eval(), geometry, both, why)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _named(source: str) -> str:
    """A short name: of ``runs/distill/encoder`` what tells it from another run's."""
    parts = [part for part in source.removeprefix("timm:").strip("/").split("/") if part not in ("", ".")]
    return parts[-2] if len(parts) > 1 and parts[-1] == ENCODER else parts[-1] if parts else source
