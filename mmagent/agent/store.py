"""Trajectories on disk: saved rollouts that can be looked at, replayed into training, or carried over a restart.

A folder holds ``trajectories.json`` (keys, rewards, how each ended) and ``tensors.safetensors`` (ids, masks, log-probs,
recorded experts, and the patches of every distinct image once). Nothing is pickled. A folder appears whole or not
at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmagent.files import new_folder, require_own
from mmagent.geometry import ImageView
from mmagent.trajectories import Status, Trajectory
from mmagent.types import PatchedImage

FORMAT = 1
_INDEX, _TENSORS = "trajectories.json", "tensors.safetensors"


def save_trajectories(folder: Path | str, trajectories: Sequence[Trajectory]) -> None:
    """Write ``folder``, replacing an older one. Raises ``ValueError`` for one that holds anything else."""
    folder = Path(folder)
    require_own(folder, "folder of trajectories", (_INDEX, _TENSORS))
    images: dict[int, PatchedImage] = {id(image): image for row in trajectories for image in row.images}
    number = {key: n for n, key in enumerate(images)}
    tensors = {f"image/{n}": image.patches.contiguous() for n, image in enumerate(images.values())}
    tensors |= columns_of(trajectories)
    experts = [row for row in trajectories if row.routed_experts]
    tensors |= {f"experts/{row.key}": torch.stack(row.routed_experts) for row in experts}
    index = {
        "format": FORMAT,
        "images": [image_of(image) for image in images.values()],
        "trajectories": [describe(row, [number[id(image)] for image in row.images]) for row in trajectories],
    }
    with new_folder(folder) as beside:
        save_file(tensors, beside / _TENSORS)
        (beside / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def load_trajectories(folder: Path | str) -> list[Trajectory]:
    """Read what :func:`save_trajectories` wrote; images that were one object are one object again.

    Raises ``ValueError`` naming the folder when it is missing or of another format.
    """
    folder = Path(folder)
    if not (folder / _INDEX).is_file():
        raise ValueError(f"{folder} holds no saved trajectories")
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {index.get('format')!r}, this version reads {FORMAT}")
    tensors = load_file(folder / _TENSORS)
    images = [image_from(tensors[f"image/{n}"], about) for n, about in enumerate(index["images"])]
    out, at = [], 0
    for about in index["trajectories"]:
        span = slice(at, at + about["tokens"])
        columns = {name: tensors[name][span] for name in _COLUMNS}
        out.append(restore(about, columns, images, tensors.get(f"experts/{about['key']}")))
        at = span.stop
    if at != tensors["input_ids"].shape[0]:
        raise ValueError(f"{folder}: {tensors['input_ids'].shape[0]} tokens for trajectories of {at}")
    return out


_COLUMNS = ("input_ids", "trainable", "logprobs")


def columns_of(trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
    """Ids, mask and log-probs of all tokens, one trajectory behind the other."""
    return {
        "input_ids": torch.tensor([i for row in trajectories for i in row.input_ids], dtype=torch.int64),
        "trainable": torch.tensor([t for row in trajectories for t in row.trainable], dtype=torch.bool),
        "logprobs": torch.tensor([x for row in trajectories for x in row.logprobs], dtype=torch.float64),
    }


def image_of(image: PatchedImage) -> dict[str, Any]:
    """What JSON keeps of an image; its patches lie beside."""
    return {"grid": image.grid, "view": [image.view.original, image.view.seen]}


def image_from(patches: Tensor, about: Mapping[str, Any]) -> PatchedImage:
    return PatchedImage(patches, tuple(about["grid"]), ImageView(*(tuple(size) for size in about["view"])))


def describe(row: Trajectory, images: Sequence[int]) -> dict[str, Any]:
    """What JSON keeps of a trajectory; ``images`` are the numbers of its own."""
    return {
        "key": row.key,
        "source": row.source,
        "group": row.group,
        "policy_version": row.policy_version,
        "tokens": len(row),
        "images": list(images),
        "reward": row.reward,
        "parts": row.parts,
        "status": row.status.value,
        "note": row.note,
    }


def restore(
    about: Mapping[str, Any], columns: Mapping[str, Tensor], images: Sequence[PatchedImage], experts: Tensor | None
) -> Trajectory:
    """What :func:`describe` and :func:`columns_of` told of; ``images`` are all that its numbers count."""
    row = Trajectory(about["key"], about["source"], about["group"], about["policy_version"])
    row.input_ids, row.trainable, row.logprobs = (columns[name].tolist() for name in _COLUMNS)
    row.images = [images[n] for n in about["images"]]
    row.routed_experts = [] if experts is None else list(experts)
    row.reward, row.parts, row.note = about["reward"], dict(about["parts"]), about["note"]
    row.status = Status(about["status"])
    return row
