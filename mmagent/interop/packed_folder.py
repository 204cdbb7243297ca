"""Sparse models on disk, three forms of one:

dense with zeros    an agent or encoder folder like any other; every reader, converter and stock class loads it
masks               ``sparsity.safetensors``: by parameter name, with the pattern that they have in its header
packed              the same folder with packed weights and ``packing.json``, the sizes of packed layers, beside them;
                    :func:`~mmagent.interop.agent_folder.load_agent` and
                    :func:`~mmagent.interop.encoder_folder.load_encoder` see it there
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmagent.models.packed import Layout, MatrixLayout, layout_of
from mmagent.ops.state import save_weights
from mmagent.sparsity.patterns import PatternConfig, density

MASKS, PACKING = "sparsity.safetensors", "packing.json"
_HEADER = "sparsity"


class Masks(NamedTuple):
    """``uint8`` masks by parameter name (:func:`~mmagent.sparsity.patterns.make_masks`) and the pattern they have."""

    masks: dict[str, Tensor]
    pattern: PatternConfig


def save_masks(path: Path | str, masks: Mapping[str, Tensor], pattern: PatternConfig) -> None:
    """Write ``masks`` to one file; its header tells the pattern, and the density that was counted."""
    header = json.dumps({"pattern": asdict(pattern), "density": density(masks)})
    save_weights(masks, path, {_HEADER: header})


def load_masks(path: Path | str) -> Masks:
    """Read a file of :func:`save_masks`. Raises ``ValueError`` for a file that is none."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no masks there; a run that prunes leaves them in OUTPUT/{MASKS}")
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as masks: {error}") from error
    if header is None or any(mask.dtype != torch.uint8 for mask in masks.values()):
        raise ValueError(f"{path} holds no masks; a run that prunes leaves them in OUTPUT/{MASKS}")
    return Masks(masks, PatternConfig(**json.loads(header)["pattern"]))


def write_layout(folder: Path, model: nn.Module) -> None:
    """``packing.json`` in ``folder``, where something in ``model`` is packed."""
    if layout := layout_of(model):
        plain = {
            name: {key: [asdict(s) for s in sheets] for key, sheets in own.items()} for name, own in layout.items()
        }
        (folder / PACKING).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def read_layout(folder: Path) -> Layout:
    """What :func:`write_layout` left; empty for a folder without. Raises ``ValueError`` for what is no layout."""
    path = folder / PACKING
    if not path.is_file():
        return {}
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: [_matrix(s) for s in sheets] for key, sheets in own.items()} for name, own in plain.items()}
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no layout of packed layers: {error!r}") from error


def _matrix(plain: Mapping[str, object]) -> MatrixLayout:
    batches = tuple(tuple(int(n) for n in batch) for batch in plain["batches"])  # type: ignore[attr-defined]
    if any(len(batch) != 3 for batch in batches):
        raise ValueError(f"a batch has three sizes, got {batches}")
    return MatrixLayout(int(plain["outputs"]), int(plain["inputs"]), batches, int(plain["singles"]))  # type: ignore
