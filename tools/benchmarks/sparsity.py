"""A linear layer of which tile-wise sparsity has left a half or a quarter, packed, against the dense layer.

Shapes of BERT-base as in arXiv 2008.13006 (512 tokens, 128 outputs a tile), whose mark is 1.95 times at 75 %, and of
one GLM-4.5-Air expert, with many tokens and with few. Scores are random: which weights go changes no time.
`element` rows multiply the same share as a CSR matrix, `2:4` rows by the accelerator's own sparse product where it has
one (a CPU has none, and reads a 2:4 matrix as any dense one), `TEW` rows add 2 % of single weights to tiles. Ratios of
work are what is multiplied, those that fill tiles up included; the true density is in the row's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmagent.ops.tile_packed import PackedMatrix, pack, packed_linear
from mmagent.sparsity.patterns import SINGLE, PatternConfig, density, make_masks, tiles_of
from tools.benchmarks.row import Row, Settings, throughput

SHAPES = {  # tokens, inputs, outputs
    "BERT-base attention": (512, 768, 768),
    "BERT-base up": (512, 768, 3072),
    "BERT-base down": (512, 3072, 768),
    "GLM expert gate and up": (256, 4096, 2816),
    "GLM expert down": (256, 1408, 4096),
    "GLM expert gate and up, 8 tokens": (8, 4096, 2816),
}
QUICK = {"BERT-base attention": (64, 192, 256)}
LEVELS = (0.5, 0.75)


def rows(settings: Settings) -> Iterator[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in (QUICK if settings.quick else SHAPES).items():
            yield from _layer(name, shape, dtype, device, settings)


def _layer(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, settings: Settings
) -> Iterator[Row]:
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator).to(device, dtype)
    weight, scores = (torch.randn(outputs, inputs, generator=generator) for _ in range(2))
    weight = (weight * inputs**-0.5).to(device, dtype)
    dense, scores, told = _calls(F.linear, x, weight), scores.square(), f"{name}, {str(dtype).removeprefix('torch.')}"

    def row(kind: str, mask: Tensor, ours: Callable[[], object]) -> Row:
        label = f"{kind}, {100 * density({name: mask}):.1f} % left: {told}"
        work = 2e-9 * tokens * inputs * outputs  # of the dense layer: what a caller gets done
        return throughput(label, ours, dense, "dense", work, "GFLOP/s", settings)

    for level in LEVELS:
        for kind, pattern in (("tile-wise", "tile-2d"), ("TEW", "tile-element")):
            mask = make_masks({name: scores}, level, PatternConfig(pattern))[name]
            packed = packed_of(weight, mask)
            yield row(f"{kind} {100 * level:.0f}", mask, _calls(packed_linear, x, packed))
    yield from _baselines(row, name, x, weight, scores)


def _baselines(
    row: Callable[[str, Tensor, Callable[[], object]], Row], name: str, x: Tensor, weight: Tensor, scores: Tensor
) -> Iterator[Row]:
    if x.dtype == torch.float32 or x.is_cuda:  # a CPU has no sparse product of half precision
        mask = make_masks({name: scores}, 0.75, PatternConfig("element"))[name]
        sparse = (weight * mask.bool().to(weight.device)).to_sparse_csr()
        yield row("element 75", mask, lambda: torch.mm(sparse, x.T))
    if x.is_cuda and x.dtype == torch.bfloat16:
        mask = make_masks({name: scores}, 0.5, PatternConfig("2:4"))[name]
        halved = torch.sparse.to_sparse_semi_structured(weight * mask.bool().to(weight.device))
        yield row("2:4", mask, _calls(F.linear, x, halved))


def packed_of(weight: Tensor, mask: Tensor) -> PackedMatrix:
    """``weight`` packed by ``mask``, which it need not have been pruned by."""
    kept = mask.to(weight.device)
    return pack(weight * kept.bool(), tiles_of(kept, PatternConfig().granularity), kept == SINGLE)


def _calls(function: Callable[..., Tensor], *arguments: object) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return function(*arguments)

    return call
