"""The dense teachers' own objective: a batch is described as its images are; classes count where they are seen."""

from __future__ import annotations

import numpy as np
import torch

from data_pipelines.masking import MaskConfig, mask_patches
from mmagent.geometry import GeometryConfig, patchify
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.objectives.reconstruction import MaskedReconstruction, ReconstructionConfig
from mmagent.testing import check_objective
from mmagent.types import MaskedVision, PackedVision

GEOMETRY = GeometryConfig(min_tokens=1)


def _batch(sizes: list[tuple[int, int]], known: bool = True) -> MaskedVision:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    images = [patchify(a, GEOMETRY) for a in arrays]
    masked = torch.cat([mask_patches(image.grid, 2, MaskConfig(), random) for image in images])
    classes = torch.from_numpy(random.integers(-1, 4, len(masked)))
    return MaskedVision(
        PackedVision.pack(images),
        masked,
        tuple(torch.from_numpy(a).permute(2, 0, 1) / 255.0 for a in arrays),
        tuple(f"image-{n}" for n in range(len(arrays))),
        classes if known else None,
    )


def _split(batch: MaskedVision) -> list[MaskedVision]:
    sizes = batch.vision.grids.prod(dim=1).tolist()
    columns = (batch.vision.patches.split(sizes), batch.vision.grids, batch.masked.split(sizes), batch.pixels)
    rows = zip(*columns, batch.keys, batch.classes.split(sizes), strict=True)
    return [MaskedVision(PackedVision(p, g[None]), m, (x,), (k,), c) for p, g, m, x, k, c in rows]


def _objective(classes: int = 4) -> MaskedReconstruction:
    torch.manual_seed(0)
    encoder = CogViT(CogViTConfig(width=32, depth=1, heads=2, ffn=64, mask_token=True))
    return MaskedReconstruction(encoder, ReconstructionConfig(classes=classes))


def test_descriptors_of_a_batch_are_those_of_its_images():
    batch = _batch([(56, 56), (56, 84), (56, 56), (60, 50)])
    objective = _objective()
    apart = torch.cat([objective.targets(single) for single in _split(batch)])
    torch.testing.assert_close(objective.targets(batch), apart, atol=1e-4, rtol=1e-4)  # sums in another order


def test_the_loss_does_not_depend_on_the_split():
    batch = _batch([(56, 56), (56, 84), (84, 56)])
    check_objective(_objective(), batch, _split(batch))


def test_classes_count_where_a_patch_is_seen_and_known():
    batch, objective = _batch([(56, 56), (56, 84)]), _objective()
    assert int(objective.counts(batch)["classes"]) == int(((batch.classes >= 0) & ~batch.masked).sum()) > 0
    unknown = _batch([(56, 56)], known=False)
    assert int(objective.counts(unknown)["classes"]) == 0
    assert float(objective(unknown).sums["classes"].detach()) == 0.0
    assert "classes" not in _objective(classes=0).weights
