"""The encoder: counts, layers, masks, pooling, and images that do not see each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmagent.models.cogvit import (
    POSITION_STD,
    CogViT,
    CogViTConfig,
    PositionTable,
    cogvit_403m,
    cogvit_debug,
    packed_coordinates,
    seed_vit,
    sine_cosine_2d,
)
from mmagent.models.layers import collect_roles
from mmagent.types import PackedVision
from tests.model_kit import gradients, image_patches

GRIDS = [(1, 4, 6), (1, 2, 2), (2, 2, 4)]


def vision(grids=GRIDS) -> PackedVision:
    return PackedVision(torch.cat([image_patches(g, i) for i, g in enumerate(grids)]), torch.tensor(grids))


def build(**changes) -> CogViT:
    torch.manual_seed(0)
    config = cogvit_debug()
    for name, value in changes.items():
        setattr(config, name, value)
    return CogViT(config)


def test_published_count():
    """24 blocks hold 403,024,896 parameters; patch embedding and final norm come on top."""
    with torch.device("meta"):
        model = CogViT(cogvit_403m())
    assert sum(p.numel() for p in model.blocks.parameters()) == 403_024_896
    assert sum(p.numel() for p in model.parameters()) == 403_024_896 + 1176 * 1024 + 1024 + 1024


def test_seed_vit_is_532m():
    """Blocks of 4 W^2 attention and 8 W^2 MLP: with patch embedding, biases and norms the 532M of arXiv 2505.07062."""
    with torch.device("meta"):
        model = CogViT(seed_vit())
    assert len(model.blocks) == 27
    assert sum(p.numel() for p in model.parameters()) == 531_980_416


def test_a_gelu_block_is_the_plain_formula():
    block = build(mlp="gelu").blocks[0].ffn
    x = torch.randn(5, 32)
    up, down = block.up, block.down
    torch.testing.assert_close(block(x), F.gelu(x @ up.weight.T + up.bias) @ down.weight.T + down.bias)


@pytest.mark.parametrize("changes", [{}, {"pooling": "attention", "position_table": 3}, {"mlp": "gelu"}])
def test_gradients_of_a_pack_are_the_sums_of_those_of_images_alone(changes):
    """A loss over tokens and summaries. Float32 sums in another order: gradients here are of the size 1 to 100."""
    model, pack = build(**changes), vision()
    directions = torch.randn(pack.patches.shape[0], 32), torch.randn(len(GRIDS), 32)

    def backward(rows: slice, images: slice) -> None:
        seen = model(PackedVision(pack.patches[rows], pack.grids[images]))
        ((seen.tokens * directions[0][rows]).sum() + (seen.pooled * directions[1][images]).sum()).backward()

    backward(slice(None), slice(None))
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    at = 0
    for index, size in enumerate(pack.grids.prod(1).tolist()):
        backward(slice(at, at + size), slice(index, index + 1))
        at += size
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, together[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_images_of_a_pack_equal_images_alone(pooling):
    model, pack = build(pooling=pooling, position_table=3), vision()
    together = model(pack, layers=(0, -1))
    at = 0
    for index, grid in enumerate(GRIDS):
        size = grid[0] * grid[1] * grid[2]
        alone = model(PackedVision(pack.patches[at : at + size], torch.tensor([grid])), layers=(0,))
        torch.testing.assert_close(together.tokens[at : at + size], alone.tokens, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.layers[0][at : at + size], alone.layers[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.pooled[index], alone.pooled[0], atol=1e-5, rtol=1e-4)
        at += size


def test_frames_do_not_see_each_other():
    model, pack = build(), vision([(2, 2, 4)])
    with torch.no_grad():
        before = model(pack).tokens[:8]
        pack.patches[8:] *= -5
        assert torch.equal(before, model(pack).tokens[:8])


def test_layers_are_outputs_of_blocks():
    model, pack = build(), vision()
    features = model(pack, layers=(0, 1, -1))
    assert set(features.layers) == {0, 1, -1}
    assert features.layers[1] is features.layers[-1]
    torch.testing.assert_close(model.norm(features.layers[1]), features.tokens)
    with pytest.raises(ValueError, match="layer 2 asked of an encoder with 2 blocks"):
        model(pack, layers=(2,))


def test_masked_patches_are_not_seen():
    model, pack = build(mask_token=True), vision()
    masked = torch.zeros(pack.patches.shape[0], dtype=torch.bool)
    masked[[0, 5, 30]] = True
    with torch.no_grad():
        before = model(pack, masked=masked).tokens
        pack.patches[masked] = 99.0
        assert torch.equal(before, model(pack, masked=masked).tokens)
    with pytest.raises(ValueError, match="mask_token=True"):
        build()(pack, masked=masked)


@pytest.mark.parametrize("masks", [True, False])
def test_every_parameter_gets_a_gradient(masks):
    model, pack = build(mask_token=True, pooling="attention", position_table=4, embedding_norm=True), vision()
    features = model(pack, masked=torch.rand(pack.patches.shape[0]) < 0.3 if masks else None)
    (features.tokens.sum() + features.pooled.sum()).backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert bool(model.mask_token.grad.abs().sum() > 0) is masks


def test_attention_pooling_equals_a_loop():
    model, pack = build(pooling="attention"), vision()
    features = model(pack)
    pool, at = model.pool, 0
    for index, grid in enumerate(GRIDS):
        size = grid[0] * grid[1] * grid[2]
        keys, values = pool.kv(features.tokens[at : at + size]).unflatten(-1, (2, 2, 16)).unbind(1)
        weights = torch.softmax(torch.einsum("phd,hd->ph", keys, pool.query.view(2, 16)) / 4, dim=0)
        pooled = pool.out(torch.einsum("ph,phd->hd", weights, values).flatten())
        torch.testing.assert_close(features.pooled[index], pooled + pool.ffn(pool.norm(pooled)), atol=1e-5, rtol=1e-4)
        at += size


def test_recomputation_gives_the_same_gradients():
    model, pack = build(), vision()
    model(pack).tokens.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    for block in model.blocks:
        block.recompute = True
    model(pack).tokens.square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_roles_of_a_lone_encoder():
    roles = collect_roles(build(pooling="attention", mask_token=True, position_table=2), "encoder")
    assert roles["blocks.0.attention.qkv.weight"] == ("encoder", True, (32, 32, 32), True)
    assert roles["blocks.0.ffn.gate_up.weight"].splits == (64, 64)
    assert not roles["mask_token"].decay
    assert not roles["pool.query"].decay


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        CogViTConfig(width=36, heads=6)
    with pytest.raises(ValueError, match="pooling"):
        CogViTConfig(pooling="max")


@pytest.mark.parametrize("side, width", [(16, 128), (24, 64)])
def test_rows_and_columns_are_read_off_a_new_position_table(side, width):
    """A linear map from a new table finds them to half a place; off a random table of as many numbers it cannot where
    places outnumber them. And what is learned at one place holds beside it: neighbours resemble each other."""
    table = sine_cosine_2d(side, width)
    assert table.square().mean().item() == pytest.approx(1.0, abs=0.1)
    assert table.std(dim=0).min() > 0.3, "no column says nothing"
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    for codes, most in ((table, 0.5), (torch.randn_like(table), None)):
        told = torch.cat([codes, torch.ones(side * side, 1)], dim=1).double()
        known = torch.rand(side * side, generator=torch.Generator().manual_seed(0)) < 0.5  # enough to find the rest
        fitted = torch.linalg.lstsq(told[known], places[known].double(), driver="gelsd").solution
        error = (told[~known] @ fitted - places[~known]).abs().max().item()
        assert error < most if most else error > 2
    grid = table.unflatten(0, (side, side))
    near = torch.cosine_similarity(grid[0, 0], grid[0, 1], dim=0)
    assert near > torch.cosine_similarity(grid[0, 0], grid[0, side // 2], dim=0)
    assert near > torch.cosine_similarity(grid[0, 0], grid[side - 1, side - 1], dim=0)


def test_a_new_encoder_has_its_table_at_the_scale_that_is_said():
    table = build(position_table=8).positions
    assert table.weight.square().mean().sqrt().item() == pytest.approx(POSITION_STD, rel=0.1)


def test_the_position_table_is_resampled_as_grid_sample_does_it():
    """The stock tower of GLM-4.1V samples every patch by itself; ours shares separable weights between images."""
    torch.manual_seed(0)
    table = PositionTable(6, 16)
    grids = torch.tensor([[1, 4, 6], [1, 12, 2], [2, 4, 6], [1, 6, 6], [1, 20, 14]])
    coordinates = packed_coordinates(grids, 2, torch.device("cpu"))
    sizes = torch.repeat_interleave(grids[:, 1:], grids.prod(1), dim=0)
    points = ((coordinates + 0.5) / sizes * 2 - 1).flip(-1).view(1, -1, 1, 2)
    plane = table.weight.unflatten(0, (6, 6)).permute(2, 0, 1).unsqueeze(0)
    expected = F.grid_sample(plane, points, mode="bicubic", padding_mode="border", align_corners=False)[0, :, :, 0].T
    torch.testing.assert_close(table(grids, coordinates), expected, atol=1e-5, rtol=1e-5)  # sums in another order
