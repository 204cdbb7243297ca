"""Packed products against the dense layer with the same zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmagent.ops.tile_packed import pack, packed_linear, unpack
from mmagent.sparsity.patterns import PATTERNS, SINGLE, PatternConfig, make_masks, tiles_of

SHAPES = [(37, 50), (64, 96), (5, 3), (16, 16)]


def case(pattern: str, shape: tuple[int, int], sparsity: float = 0.5, whole: bool = False, step: int = 4):
    torch.manual_seed(0)
    weight = torch.randint(-4, 5, shape).double() if whole else torch.randn(shape)
    mask = make_masks({"w": torch.rand(shape)}, sparsity, PatternConfig(pattern, granularity=8, block=4, delta=0.1))[
        "w"
    ]
    weight = weight * mask.bool()
    return weight, pack(weight, tiles_of(mask, 8), mask == SINGLE, step)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["tile-1d", "tile-2d", "tile-element", "element", "block"])
def test_packed_is_the_dense_layer(pattern, shape):
    """Of whole numbers sums are exact in any order, so nothing may differ at all. Any mask can be packed."""
    weight, packed = case(pattern, shape, whole=True)
    x = torch.randint(-9, 10, (11, shape[1])).double()
    assert torch.equal(packed_linear(x, packed), F.linear(x, weight))
    assert torch.equal(unpack(packed, shape[1]), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["tile-2d", "tile-element"])
def test_packed_in_low_precision(pattern, dtype):
    """Sums of 96 numbers in another order; bfloat16 rounds each output, and the addend's, once: 2^-8 of their size."""
    weight, packed = case(pattern, (64, 96))
    x = torch.randn(33, 96)
    low = packed._replace(
        batches=tuple(b._replace(weight=b.weight.to(dtype)) for b in packed.batches),
        singles=packed.singles and packed.singles._replace(values=packed.singles.values.to(dtype)),
    )
    exact = F.linear(x.to(dtype).double(), weight.to(dtype).double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2 * exact.abs().max().item()
    assert (packed_linear(x.to(dtype), low).double() - exact).abs().max() < bound


def test_bias_autocast_and_no_tokens():
    weight, packed = case("tile-2d", (64, 96))
    x, bias = torch.randn(7, 96), torch.randn(64)
    torch.testing.assert_close(packed_linear(x, packed, bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = packed_linear(x, packed, bias)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low, F.linear(x, weight, bias), atol=0.15, rtol=0.02)  # two roundings, not one
    assert packed_linear(x[:0], packed, bias).shape == (0, 64)


@pytest.mark.parametrize("pattern", ["tile-2d", "tile-element"])
def test_gradients_reach_what_is_fed(pattern):
    weight, packed = case(pattern, (64, 96), whole=True)
    x, there = torch.randn(5, 96).double().requires_grad_(), torch.randn(5, 64).double()
    (packed_linear(x, packed) * there).sum().backward()
    torch.testing.assert_close(x.grad, there @ weight)
    with torch.no_grad():
        assert torch.equal(packed_linear(x, packed), packed_linear(x.detach(), packed))


def test_nothing_is_kept_of_some_outputs_or_of_all():
    mask = torch.zeros(6, 8, dtype=torch.uint8)
    packed = pack(torch.zeros(6, 8), tiles_of(mask, 4), mask == SINGLE)
    assert packed.multiplied == 0
    assert torch.equal(packed_linear(torch.randn(3, 8), packed), torch.zeros(3, 6))
    mask[2, 5] = SINGLE
    packed = pack(mask.ne(0).float(), tiles_of(mask, 4), mask == SINGLE)
    assert packed.multiplied == 1
    x = torch.randn(3, 8)
    assert torch.equal(packed_linear(x, packed), F.linear(x, mask.eq(SINGLE).float()))


def test_tiles_of_one_size_are_one_batch():
    """At 75 % a quarter is multiplied, and what fills tiles up: here at most three inputs of a tile."""
    weight, packed = case("tile-2d", (64, 96), 0.75)
    kept = int(weight.count_nonzero())
    assert kept <= packed.multiplied <= kept + 4 * 8 * 3
    full = pack(weight, tiles_of(weight.ne(0).to(torch.uint8), 8), weight == 99, step=96)
    assert len(full.batches) <= 2  # all tiles of eight outputs, and the rest


def test_a_mask_of_another_matrix_is_refused():
    weight, _ = case("tile-2d", (16, 16))
    other = make_masks({"w": torch.rand(16, 16)}, 0.5, PatternConfig(granularity=8))["w"]
    with pytest.raises(ValueError, match="weights that are not zero are in no tile"):
        pack(weight, tiles_of(other, 8), other == SINGLE)


def test_every_pattern_can_be_packed():
    for pattern in PATTERNS:
        weight, packed = case(pattern, (16, 16))
        assert torch.equal(unpack(packed, 16), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["tile-2d", "tile-element"])
def test_an_accelerator_computes_the_same(pattern, dtype):
    """Sums of 96 numbers; TF32 and bfloat16 keep 8 to 11 bits of each factor."""
    weight, _ = case(pattern, (64, 96))
    mask = weight.ne(0).to(torch.uint8)
    low = weight.to("cuda", dtype)
    packed = pack(low, tiles_of(mask.cuda(), 8), torch.zeros_like(mask, dtype=torch.bool, device="cuda"), 8)
    x = torch.randn(40, 96).to("cuda", dtype)
    exact = F.linear(x.double(), low.double())
    assert (packed_linear(x, packed).double() - exact).abs().max() < 2e-2 * exact.abs().max()
