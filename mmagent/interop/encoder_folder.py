"""A trained encoder as a folder: what stages 1 and 2 leave behind, and what the stage after them reads; and the door
through which any other encoder comes in.

``FOLDER/config.yaml``         :class:`EncoderConfig`: the tower and its image geometry
``FOLDER/model.safetensors``   every parameter
``FOLDER/packing.json``        of a packed encoder alone: see :mod:`mmagent.interop.packed_folder`
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmagent.config import first_line, load_yaml, locate, to_yaml
from mmagent.files import new_folder, require_own
from mmagent.geometry import GeometryConfig
from mmagent.interop.live_model import load_weights
from mmagent.interop.packed_folder import PACKING, read_layout, write_layout
from mmagent.models.backbones import BackboneEncoder, architecture, from_architecture, load_backbone
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.packed import prepare_packed
from mmagent.ops.state import save_weights
from mmagent.protocols import VisionEncoder

KINDS = "an encoder folder, timm:NAME, a folder or hub id of transformers, or package.module:Class"
CONFIG, WEIGHTS = "config.yaml", "model.safetensors"


@dataclass
class EncoderConfig:
    """What ``config.yaml`` holds. ``custom`` is empty for the CogViT of ``vision``; else the import path of a custom
    encoder's factory (``package.module:name``, called without arguments), or a backbone's architecture as JSON."""

    vision: CogViTConfig = field(default_factory=CogViTConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    custom: str = ""


class Encoder(NamedTuple):
    """An encoder, the geometry that makes its patches, and ``custom`` as in :class:`EncoderConfig`."""

    model: Any
    geometry: GeometryConfig
    custom: str = ""


def build_encoder(config: EncoderConfig) -> nn.Module:
    """A new encoder of ``config``, with the weights it starts from. Raises ``ValueError`` where geometry and encoder do
    not fit, or the factory makes no encoder."""
    if config.custom.startswith("{"):
        return BackboneEncoder(from_architecture(json.loads(config.custom)), config.geometry)
    model = locate(config.custom)() if config.custom else CogViT(config.vision)
    check_geometry(model, config.geometry, config.custom or "CogViT")
    return model


def require_trust(custom: str, where: str) -> None:
    """Raises ``ValueError`` where ``custom`` (as in :class:`EncoderConfig`) is an import path: to build that encoder is
    to run code that the folder ``where`` names. A backbone's architecture runs none but its library's."""
    if custom and not custom.startswith("{"):
        raise ValueError(
            f"{where} names the encoder {custom}, which is imported and called: if you trust the folder and know that "
            f"code, say so (trust_code=True, --trust-code)"
        )


def check_geometry(encoder: Any, geometry: GeometryConfig, name: str) -> None:
    """Raises ``ValueError`` where ``encoder`` is none, or takes other patches than ``geometry`` makes."""
    if not isinstance(encoder, nn.Module) or not isinstance(encoder, VisionEncoder):
        raise ValueError(f"{name}: {type(encoder).__name__} is no encoder; mmagent.testing.check_encoder says why")
    for member in ("patch_size", "merge_size", "patch_values"):
        has, makes = getattr(encoder, member, None), getattr(geometry, member)
        if has != makes and not (has is None and member == "patch_values"):  # that one it need not say
            raise ValueError(f"{name}: the encoder's {member} is {has}, the image geometry's {makes}")


def open_encoder(source: Path | str, geometry: GeometryConfig | None = None) -> Encoder:
    """An encoder in evaluation mode on the CPU, from

    - a folder of :func:`save_encoder`,
    - ``package.module:name``, a factory of a custom encoder, called without arguments,
    - anything else that :func:`~mmagent.models.backbones.load_backbone` takes: ``timm:NAME``, a folder of transformers
      or timm, a hub id.

    ``geometry`` gives sizes and normalisation where ``source`` brings none of its own; patch and merge size always
    follow the encoder. Raises ``ValueError`` for what is none of these.
    """
    text, folder = str(source), Path(source)
    if not text:
        raise ValueError(f"an encoder's source is empty: give {KINDS}")
    if (folder / CONFIG).is_file():
        return load_encoder(folder)
    if is_factory(text):
        model = locate(text)()
        own = getattr(model, "geometry", None) or _geometry_of(model, geometry or GeometryConfig())
        check_geometry(model, own, text)
        return Encoder(model.eval(), own, text)
    if (folder.is_absolute() or text.startswith(".") or text.count("/") > 1) and not folder.is_dir():  # no hub id
        raise ValueError(f"{text}: no such folder; an encoder is {KINDS}")
    try:
        backbone = load_backbone(text)
    except (OSError, RuntimeError) as error:  # what hub and timm raise for names that they do not have
        raise ValueError(f"{text}: cannot be loaded: {first_line(error)}") from error
    own = replace(geometry or GeometryConfig(), patch_size=backbone.patch_size, mean=backbone.mean, std=backbone.std)
    return Encoder(BackboneEncoder(backbone, own).eval(), own, json.dumps(architecture(backbone)))


def can_hide(encoder: nn.Module) -> bool:
    """Whether an encoder takes ``masked`` patches: CogViT, a backbone with a mask token, or one of a user's own."""
    if isinstance(encoder, BackboneEncoder):
        return encoder.backbone.maskable
    return "masked" in inspect.signature(encoder.forward).parameters


def is_factory(source: str) -> bool:
    """Whether ``source`` is the import path of a factory, ``package.module:name``."""
    module, colon, _ = source.partition(":")
    return bool(colon) and module != "timm" and "/" not in module and not Path(source).is_dir()


def _geometry_of(model: Any, geometry: GeometryConfig) -> GeometryConfig:
    """``geometry`` with the sizes that a custom encoder says it has."""
    patch, merge = getattr(model, "patch_size", None), getattr(model, "merge_size", None)
    if not isinstance(patch, int) or not isinstance(merge, int):
        return geometry  # the check that follows says what is missing
    values = getattr(model, "patch_values", None)
    frames = values // (3 * patch**2) if isinstance(values, int) else geometry.temporal_patch
    return replace(geometry, patch_size=patch, merge_size=merge, temporal_patch=max(frames, 1))


def save_encoder(
    folder: Path | str,
    encoder: nn.Module,
    geometry: GeometryConfig,
    *,
    custom: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder beside its place and move it there whole, replacing an older one. ``custom`` as in
    :class:`EncoderConfig`. ``weights`` is the full state dict of a sharded encoder, gathered by all ranks; one rank
    writes. Raises ``ValueError`` for an encoder that is no CogViT and without ``custom``, and for a folder that holds
    anything but an encoder."""
    require_own(Path(folder), "encoder folder", (CONFIG, WEIGHTS), (PACKING,))
    if custom:
        config = EncoderConfig(geometry=geometry, custom=custom)
    elif type(encoder) is CogViT:  # a subclass may compute something else
        config = EncoderConfig(encoder.config, geometry)
    else:
        raise ValueError(f"custom: name the import path of the factory of {type(encoder).__name__}")
    with new_folder(Path(folder)) as beside:
        save_weights(encoder if weights is None else weights, beside / WEIGHTS)
        (beside / CONFIG).write_text(to_yaml(config), encoding="utf-8")
        write_layout(beside, encoder)


def load_encoder(folder: Path | str) -> Encoder:
    """Read a folder of :func:`save_encoder`; the encoder is on the CPU, in evaluation mode. What the folder names as
    its encoder is imported: it is for folders of your own.

    Raises ``ValueError`` naming the file that is missing, or the tensors that do not fit or are not finite.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is no encoder folder: {', '.join(missing)} missing; distillation and alignment leave one in "
            f"OUTPUT/encoder"
        )
    config = load_yaml(EncoderConfig(), folder / CONFIG)
    model = build_encoder(config)
    prepare_packed(model, read_layout(folder))
    load_weights(model, folder / WEIGHTS)
    return Encoder(model.eval(), config.geometry, config.custom)
