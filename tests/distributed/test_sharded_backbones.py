"""Foreign models as students, sharded block by block over two ranks."""

from __future__ import annotations

import pytest
import torch

from mmagent import dist
from mmagent.geometry import GeometryConfig
from mmagent.models.backbones import BackboneEncoder, wrap
from mmagent.types import PackedVision
from tests.backbone_kit import TIMM, timm_model, transformers_model


def _sharded(world, kind: str) -> float:
    """How far tokens and gradients of an encoder with every block sharded are from the whole one's."""
    from torch.distributed.fsdp import fully_shard

    make = timm_model if kind in TIMM else transformers_model
    encoder, whole = (BackboneEncoder(wrap(make(kind)), GeometryConfig(16, merge_size=1)) for _ in range(2))
    blocks = list(encoder.blocks())
    assert len(blocks) >= 3
    for block in (*blocks, encoder):
        fully_shard(block, mesh=world.mesh())
    grids = torch.tensor([[1, 2, 3], [2, 2, 2], [1, 2, 3]])
    patches = torch.randn(20, encoder.patch_values, generator=torch.Generator().manual_seed(0))
    outs = [e(PackedVision(patches, grids)) for e in (encoder, whole)]
    for out in outs:
        (out.tokens.square().sum() + out.pooled.square().sum()).backward()
    worst = float((outs[0].tokens - outs[1].tokens).abs().max())
    for (_, one), (_, other) in zip(encoder.named_parameters(), whole.named_parameters(), strict=True):
        if other.grad is not None:  # not that of a mask token
            scale = float(other.grad.abs().max()) + 1.0
            worst = max(worst, float((one.grad.full_tensor() - other.grad).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("kind", ["dinov3", "naflexvit_base_patch16_siglip.v2_webli"])
def test_blocks_can_be_sharded_one_by_one(kind):
    """FSDP2 on two ranks averages equal gradients: single precision's rounding is all that may differ."""
    assert max(dist.run_ranks(_sharded, 2, kind)) < 1e-4
