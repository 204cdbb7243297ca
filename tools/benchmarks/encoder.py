"""CogViT on packed images of many sizes, forward and backward, against the same tower in transformers and timm.

`transformers`: GlmOcrVisionModel with the same weights, frames split by its own ``cu_seqlens`` path. `timm`: a
NaFlexVit of the same width, depth, heads and parameter count, images padded to the longest. Images of many sizes hold
64 to 576 patches, those of one size 192.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmagent.geometry import patch_coordinates
from mmagent.interop.glm_vision import vision_adapter, vision_configs
from mmagent.models.cogvit import CogViT
from mmagent.models.projector import Projector
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import PackedVision
from tools.benchmarks.row import Row, Settings, throughput

WIDTH, DEPTH, HEADS, FFN, OUT = 192, 6, 6, 512, 256


def images(count: int, equal: bool) -> PackedVision:
    generator = torch.Generator().manual_seed(count)
    sides = 2 * torch.randint(4, 13, (count, 2), generator=generator)
    sides[0] = 24  # the longest image is in every set: what padding pads to
    if equal:
        sides[:] = torch.tensor([16, 12])
    grids = torch.cat([torch.ones(count, 1, dtype=torch.int64), sides], dim=1)
    return PackedVision(torch.randn(int(grids.prod(1).sum()), 1176, generator=generator), grids)


class Ours(nn.Module):
    def __init__(self, theirs: nn.Module):
        super().__init__()
        vision, projector = vision_configs(theirs.config)
        self.encoder = CogViT(vision)
        self.projector = Projector(projector, vision.width, vision.merge_size, OUT)
        vision_adapter(vision, projector, OUT).load(self, theirs.state_dict())

    def forward(self, vision: PackedVision) -> Tensor:
        return self.projector(self.encoder(vision).tokens)


def transformers_tower() -> nn.Module:
    from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionConfig, GlmOcrVisionModel

    config = GlmOcrVisionConfig(
        depth=DEPTH, hidden_size=WIDTH, num_heads=HEADS, intermediate_size=FFN, out_hidden_size=OUT
    )
    torch.manual_seed(0)
    return GlmOcrVisionModel._from_config(config)


def timm_tower() -> nn.Module:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    config = NaFlexVitCfg(
        patch_size=14, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, qk_norm=True, global_pool="",
        mlp_ratio=1.5 * FFN / WIDTH,  # two matrices with as many parameters as the three of a SwiGLU
    )  # fmt: skip
    return NaFlexVit(config, in_chans=6, num_classes=0)  # 6 channels: a patch holds two frames


def padded(vision: PackedVision) -> dict[str, Tensor]:
    sizes = vision.grids.prod(1).tolist()
    longest, starts = max(sizes), [0, *torch.tensor(sizes).cumsum(0).tolist()]
    patches = torch.zeros(len(sizes), longest, vision.patches.shape[1])
    coordinates = torch.zeros(len(sizes), longest, 2, dtype=torch.int64)
    valid = torch.zeros(len(sizes), longest, dtype=torch.bool)
    for n, size in enumerate(sizes):
        patches[n, :size] = vision.patches[starts[n] : starts[n + 1]]
        coordinates[n, :size] = patch_coordinates(vision.grids[n].tolist(), 2)
        valid[n, :size] = True
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def trained(model: nn.Module, forward: Callable[[], Tensor], bf16: bool) -> Callable[[], None]:
    """A call of forward and backward."""

    def step() -> None:
        context: AbstractContextManager = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with context:
            loss = forward().float().square().mean()
        loss.backward()
        model.zero_grad()

    return step


def rows(settings: Settings) -> Iterator[Row]:
    ensure_torchvision()
    theirs, naflex = transformers_tower(), timm_tower()
    ours = Ours(theirs)
    for count in (2,) if settings.quick else (8, 32):
        for equal, bf16 in ((False, True),) if settings.quick else ((False, False), (False, True), (True, True)):
            vision = images(count, equal)
            check(ours, theirs, vision)
            batch = padded(vision)
            name = f"{count} images of {'one size' if equal else 'many sizes'}, {'bf16' if bf16 else 'fp32'}"
            mine = trained(ours, lambda v=vision: ours(v), bf16)
            peers = {
                "transformers": trained(theirs, lambda v=vision: theirs(v.patches, v.grids).pooler_output, bf16),
                "timm, padded": trained(naflex, lambda b=batch: naflex.forward_features(**b)["patches"], bf16),
            }
            for peer_name, peer in peers.items():
                yield throughput(name, mine, peer, peer_name, vision.patches.shape[0], "patches/s", settings)


def check(ours: nn.Module, theirs: nn.Module, vision: PackedVision) -> None:
    """A comparison of speed is void unless both sides compute the same."""
    with torch.no_grad():
        torch.testing.assert_close(
            ours(vision), theirs(vision.patches, vision.grids).pooler_output, atol=1e-4, rtol=1e-3
        )
