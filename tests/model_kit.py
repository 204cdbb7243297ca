"""Documents, packs and gradients for tests of models: small, seeded, without the data pipelines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmagent.geometry import document_positions
from mmagent.types import IGNORE, PackedBatch, PackedVision, Segments

IMAGE = 1


def image_patches(grid: Sequence[int], seed: int, values: int = 1176) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(torch.tensor(grid).prod()), values, generator=generator)


def make_document(parts: Sequence[int | tuple[int, int, int]], seed: int, vocabulary: int = 256) -> dict:
    """``parts``: an int is that many text tokens, a triple is an image of that grid. Text is supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids, grids, patches = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(torch.randint(2, vocabulary, (part,), generator=generator))
        else:
            ids.append(torch.full((part[0] * part[1] * part[2] // 4,), IMAGE))
            grids.append(part)
            patches.append(image_patches(part, seed * 100 + len(grids)))
    flat = torch.cat(ids)
    labels = torch.where(flat == IMAGE, IGNORE, flat)
    labels[0] = IGNORE
    positions = document_positions(flat == IMAGE, grids, 2)
    return {"ids": flat, "labels": labels, "positions": positions, "grids": grids, "patches": patches}


def make_pack(documents: Sequence[dict], tail: int = 0, flat_positions: bool = False) -> PackedBatch:
    ids = torch.cat([d["ids"] for d in documents] + [torch.zeros(tail, dtype=torch.int64)])
    labels = torch.cat([d["labels"] for d in documents] + [torch.full((tail,), IGNORE)])
    positions = torch.cat([d["positions"] for d in documents] + [torch.zeros(3, tail, dtype=torch.int64)], dim=1)
    grids = [g for d in documents for g in d["grids"]]
    vision = None
    if grids:
        vision = PackedVision(torch.cat([p for d in documents for p in d["patches"]]), torch.tensor(grids))
    names = tuple(f"document-{n}" for n in range(len(documents)))
    if flat_positions:
        positions = torch.cat([torch.arange(len(d["ids"])) for d in documents] + [torch.zeros(tail, dtype=torch.int64)])
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        positions=positions,
        segments=Segments([len(d["ids"]) for d in documents] + ([tail] if tail else [])),
        visual_slots=(ids == IMAGE).nonzero().squeeze(1),
        vision=vision,
        sources=tuple("image" if d["grids"] else "text" for d in documents),
        keys=names,
        tail=tail,
    ).validate(IMAGE, 2)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
