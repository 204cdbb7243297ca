"""CogViT on packed images, forward and backward, against towers that pad, and against the same tower in transformers.

`long tail`, `equal`: Siglip2VisionModel of transformers and NaFlexVit of timm, with as many blocks, the same width and
heads, and two matrices of an MLP with as many parameters as the three of our SwiGLU. All sides see the same images and
give one mean vector an image. Siglip2 and NaFlexVit get theirs padded to the longest image of the batch, with a mask.
Their own loaders pad to a set longest length, which would make them slower. What else differs:

- we read two frames a patch (a still image twice: 1,176 values), they one (588); we also normalise queries and keys and
  turn them, they add a resampled table of places: both make us slower;
- `timm, our parts` is NaFlexVit with RMSNorm, normalised queries and keys, rotary places and SwiGLU: the same work,
  but for a mask that it makes of images without padding, too;
- building the padded batch is not timed, and neither is packing.

Long tail: patches an image are log-normal, with a deviation of 1.39 in the logarithm: an octave in the sides of an
image, about what web pages show (most images are small, few are large). Sizes are the quantiles (i + 1/2) / n, so
that no draw is lucky; aspects are log-uniform from 1:2 to 2:1. Small tower: 8 images, median 108 patches (145 pixels
square), cut at 16 and 1,024; large: median 430 (290 pixels), cut at 16 and 4,096. The `slots` row says what median,
mean and most came out, and how many patches are computed with padding for one without. Equal: 256 patches an image.

`growth`: images of 64 to 16,384 patches, as many as fill one stream, in bf16. `same weights`: GlmOcrVisionModel and its
merger, checked for equal outputs first. On CUDA everything runs in bf16 autocast alone: our attention is in bf16 there,
so fp32 peers would do other work. The default takes about five minutes on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, fmean, median

import torch
from torch import Tensor, nn

from mmagent.geometry import patch_coordinates
from mmagent.interop.glm_vision import vision_adapter, vision_configs
from mmagent.models.cogvit import CogViT, CogViTConfig
from mmagent.models.projector import Projector
from mmagent.ops.torchvision_shim import ensure_torchvision
from mmagent.types import PackedVision
from tools.benchmarks.row import Row, Settings, seconds, smaller_is_better, throughputs

PATCH, FRAMES, MERGE = 14, 2, 2
DEVIATION, SHORTEST = 1.39, 16
PEERS_STOP = 4096
"""Patches an image beyond which growth is measured for us alone: a peer's dense mask alone is a gigabyte at 16,384."""
Grids = list[tuple[int, int]]


@dataclass(frozen=True)
class Size:
    """A tower, and how much it is given: images of either kind, and patches of a stream of growing images."""

    width: int
    depth: int
    heads: int
    ffn: int
    images: int
    equal: int
    median: int
    longest: int
    stream: int


SIZES = {
    "small": Size(384, 6, 6, 1024, images=8, equal=8, median=108, longest=1024, stream=2048),
    "large": Size(1024, 24, 16, 4096, images=8, equal=32, median=430, longest=4096, stream=16384),
}
TINY = Size(64, 2, 2, 128, images=4, equal=2, median=32, longest=128, stream=256)


def rows(settings: Settings) -> Iterator[Row]:
    ensure_torchvision()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[settings.size or ("large" if device.type == "cuda" else "small")]
    size = TINY if settings.quick else size
    tail, equal = (Batch.of(grids, device) for grids in (long_tail(size), [(16, 16)] * size.equal))
    yield slots(tail)
    ours, siglip2, timm, alike = (side.to(device) for side in (Ours(size), Siglip2(size), Timm(size), Timm(size, True)))
    for peer in (siglip2, timm, alike):
        check_peer(peer, ours, Batch.of(long_tail(TINY), device))
    for bf16 in (True,) if device.type == "cuda" else (False, True):
        for name, batch, peers in (("long tail", tail, (siglip2, timm)), ("equal", equal, (siglip2, timm, alike))):
            row = f"{name} {len(batch.grids)} images, {'bf16' if bf16 else 'fp32'}"
            calls = {peer.name: step(peer, batch, bf16) for peer in peers}
            yield from throughputs(row, step(ours, batch, bf16), calls, len(batch.grids), "images/s", settings)
    yield from growth([ours, siglip2, timm], size, device, settings)
    yield from same_weights(size, tail, equal, device, settings)


def slots(tail: Batch) -> Row:
    lengths = sorted(rows * columns for rows, columns in tail.grids)
    name = f"long tail slots (median {median(lengths):.0f}, mean {fmean(lengths):.0f}, most {lengths[-1]})"
    return smaller_is_better(name, len(tail.rgb), tail.valid.numel(), "padded", "patches computed")


def long_tail(size: Size) -> Grids:
    """Rows and columns of patches of every image."""
    generator = torch.Generator().manual_seed(0)
    aspects = (2 ** (2 * torch.rand(size.images, generator=generator, dtype=torch.float64) - 1)).tolist()
    normal = NormalDist(math.log(size.median), DEVIATION)
    grids = []
    for n in torch.randperm(size.images, generator=generator).tolist():
        patches = min(max(math.exp(normal.inv_cdf((n + 0.5) / size.images)), SHORTEST), size.longest)
        sides = math.sqrt(patches * aspects[n]), math.sqrt(patches / aspects[n])
        rows, columns = (MERGE * max(round(side / MERGE), 1) for side in sides)
        grids.append((rows, columns))
    return grids


@dataclass(frozen=True)
class Batch:
    """The same images, packed for us and padded for the others.

    ``rgb (P, 588)`` is what a peer sees of each patch in the order of rows, ``padded (I, L, 588)`` the same padded,
    ``coordinates (I, L, 2)``, ``valid (I, L)``.
    """

    grids: Grids
    vision: PackedVision
    rgb: Tensor
    padded: Tensor
    coordinates: Tensor
    valid: Tensor

    @staticmethod
    def of(grids: Grids, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(len(grids))
        lengths = [rows * columns for rows, columns in grids]
        images = [torch.randn(n, 3 * PATCH**2, generator=generator) for n in lengths]
        padded = torch.zeros(len(grids), max(lengths), 3 * PATCH**2)
        coordinates = torch.zeros(len(grids), max(lengths), 2, dtype=torch.int64)
        valid = torch.zeros(len(grids), max(lengths), dtype=torch.bool)
        stream = []
        for n, ((rows, columns), image) in enumerate(zip(grids, images, strict=True)):
            padded[n, : lengths[n]], valid[n, : lengths[n]] = image, True
            coordinates[n, : lengths[n]] = patch_coordinates((1, rows, columns), 1)
            places = patch_coordinates((1, rows, columns), MERGE)  # our order: block by block
            stream.append(image[places[:, 0] * columns + places[:, 1]])
        frames = torch.cat(stream).unflatten(1, (3, 1, -1)).expand(-1, -1, FRAMES, -1).flatten(1)
        vision = PackedVision(frames, torch.tensor([(1, *grid) for grid in grids]))
        tensors = torch.cat(images), padded, coordinates, valid
        return Batch(grids, vision.to(device), *(x.to(device) for x in tensors))


class Ours(nn.Module):
    name = "mmagent"

    def __init__(self, size: Size):
        super().__init__()
        config = CogViTConfig(width=size.width, depth=size.depth, heads=size.heads, ffn=size.ffn)
        self.tower = CogViT(config)

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(batch.vision).pooled


class Siglip2(nn.Module):
    name = "transformers Siglip2"

    def __init__(self, size: Size):
        super().__init__()
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        config = Siglip2VisionConfig(
            hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.heads,
            intermediate_size=3 * size.ffn // 2, patch_size=PATCH, num_patches=256, vision_use_head=False,
        )  # fmt: skip
        self.tower = Siglip2VisionModel._from_config(config, attn_implementation="sdpa")

    def forward(self, batch: Batch) -> Tensor:
        shapes = torch.tensor(batch.grids)  # stays on the host: read image by image there
        tokens = self.tower(batch.padded, batch.valid.int(), shapes).last_hidden_state
        weights = batch.valid.to(tokens.dtype).unsqueeze(2)
        return (tokens * weights).sum(1) / weights.sum(1)


class Timm(nn.Module):
    """``alike``: with the parts that CogViT has, where its own variants have others."""

    def __init__(self, size: Size, alike: bool = False):
        super().__init__()
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        self.name = "timm, our parts" if alike else "timm NaFlexVit"
        parts = (
            {"pos_embed": "none", "rope_type": "axial", "qk_norm": True, "swiglu_mlp": True, "norm_layer": "rmsnorm"}
            if alike
            else {"act_layer": "gelu_tanh", "pos_embed_interp_mode": "bilinear"}
        )
        config = NaFlexVitCfg(
            patch_size=PATCH, embed_dim=size.width, depth=size.depth, num_heads=size.heads, fc_norm=False,
            mlp_ratio=(1.0 if alike else 1.5) * size.ffn / size.width, global_pool="avg", **parts,
        )  # fmt: skip
        self.tower = NaFlexVit(config, in_chans=3, num_classes=0)

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(
            {"patches": batch.padded, "patch_coord": batch.coordinates, "patch_valid": batch.valid}
        )  # its collator's names


def step(model: nn.Module, batch: Batch, bf16: bool) -> Callable[[], None]:
    """A call of forward and backward."""

    def run() -> None:
        device = batch.rgb.device.type
        context: AbstractContextManager = torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()
        with context:
            pooled = model(batch)
        pooled.float().square().mean().backward()
        model.zero_grad()

    return run


def check_peer(peer: nn.Module, ours: nn.Module, batch: Batch) -> None:
    """A comparison of speed is void unless a peer is as large as we are, sees all patches, and nothing of padding."""
    blocks = [
        sum(p.numel() for name, p in side.named_parameters() if "embed" not in name and p.ndim == 2)
        for side in (ours, peer)
    ]
    assert blocks[0] == blocks[1], f"{peer.name}: {blocks[1]} parameters in the blocks' matrices, ours {blocks[0]}"
    assert int(batch.valid.sum()) == len(batch.rgb) == len(batch.vision.patches)
    with torch.no_grad():
        together = peer(batch)
        assert together.shape == ours(batch).shape == (len(batch.grids), ours.tower.width)
        for n, grid in enumerate(batch.grids):
            length = grid[0] * grid[1]
            alone = replace(
                batch, grids=[grid], padded=batch.padded[n : n + 1, :length], valid=batch.valid[n : n + 1, :length],
                coordinates=batch.coordinates[n : n + 1, :length],
            )  # fmt: skip
            torch.testing.assert_close(peer(alone)[0], together[n], atol=1e-4, rtol=1e-3)


def growth(sides: list[nn.Module], size: Size, device: torch.device, settings: Settings) -> Iterator[Row]:
    """Patches a second by patches an image; what the peers cannot hold is compared with our own at 64 patches."""
    base = 0.0
    for side in (8, 16) if settings.quick else (8, 16, 32, 64, 128):
        patches = side * side
        batch = Batch.of([(side, side)] * max(size.stream // patches, 1), device)
        ours, *peers = (step(model, batch, bf16=True) for model in sides)
        name, work = f"growth {patches} patches, bf16", len(batch.rgb)
        if patches <= PEERS_STOP:
            few = replace(settings, repeats=min(settings.repeats, 3 if patches < PEERS_STOP else 1))
            named = {model.name: call for model, call in zip(sides[1:], peers, strict=True)}
            found = throughputs(name, ours, named, work, "patches/s", few)
            base = base or found[0].ours
            yield from found
        else:
            speed = work / seconds(ours)
            yield Row(name, speed, base, "ours at 64 (peers skipped)", speed / base, "patches/s", 0.0)


class Merged(nn.Module):
    """CogViT and the projector with the weights of a tower of transformers."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        vision, projector = vision_configs(theirs.config)
        self.encoder = CogViT(vision)
        self.projector = Projector(projector, vision.width, vision.merge_size, vision.width)
        vision_adapter(vision, projector, vision.width).load(self, theirs.state_dict())

    def forward(self, batch: Batch) -> Tensor:
        return self.projector(self.encoder(batch.vision).tokens)


class GlmOcr(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionConfig, GlmOcrVisionModel

        config = GlmOcrVisionConfig(
            depth=size.depth, hidden_size=size.width, num_heads=size.heads, intermediate_size=size.ffn,
            out_hidden_size=size.width,
        )  # fmt: skip
        self.tower = GlmOcrVisionModel._from_config(config)

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(batch.vision.patches, batch.vision.grids.to(batch.rgb.device)).pooler_output


def same_weights(size: Size, tail: Batch, equal: Batch, device: torch.device, settings: Settings) -> Iterator[Row]:
    theirs = GlmOcr(size)
    ours = Merged(theirs.tower).to(device)
    theirs.to(device)
    for name, batch in (("long tail", tail), ("one size", equal)):
        with torch.no_grad():
            # On CUDA our attention is in bf16: its rounding, a few in a thousand, over many blocks.
            bound = 1e-1 if device.type == "cuda" else 1e-3
            torch.testing.assert_close(ours(batch), theirs(batch), atol=bound, rtol=bound)
        for bf16 in (True,) if device.type == "cuda" or settings.quick else (False, True):
            row = f"same weights, {name}, {'bf16' if bf16 else 'fp32'}"
            mine, peer = step(ours, batch, bf16), step(theirs, batch, bf16)
            yield from throughputs(row, mine, {"transformers GlmOcr": peer}, len(batch.rgb), "patches/s", settings)


def plot(rows: list[Row], path: Path) -> None:
    """Microseconds a patch by patches an image, both logarithmic, one line a side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.name.startswith("growth "):
            patches = int(row.name.split()[1])
            lines.setdefault("CogViT, packed", {})[patches] = 1e6 / row.ours
            if not row.peer_name.startswith("ours"):
                lines.setdefault(row.peer_name, {})[patches] = 1e6 / row.peer
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, points), marker in zip(lines.items(), "osd", strict=False):
        axes.plot(list(points), list(points.values()), marker=marker, label=name)
    ticks = sorted({n for points in lines.values() for n in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set_xlabel("patches an image")
    axes.set_ylabel("µs a patch, forward and backward")
    axes.set_title("How cost grows with an image's size (bf16)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
