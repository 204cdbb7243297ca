"""A model whose layers are packed computes what it computed with zeros, and is stored and loaded like any other."""

from __future__ import annotations

import pytest
import torch

from mmagent.models.layers import SwiGLU
from mmagent.models.moe import Experts
from mmagent.models.packed import PackedExperts, PackedLinear, dense_state, layout_of, pack_model, prepare_packed
from mmagent.sparsity.patterns import PatternConfig, make_masks
from tests.agent_kit import tiny_model


def prune(module: torch.nn.Module, names: list[str], pattern: str = "tile-2d", sparsity: float = 0.5):
    """Masks for ``names``, and the weights made zero by them."""
    config = PatternConfig(pattern, granularity=8, delta=0.05)
    own = dict(module.named_parameters())
    masks = make_masks({name: own[name].detach().square() for name in names}, sparsity, config)
    with torch.no_grad():
        for name, mask in masks.items():
            own[name] *= mask.bool()
    return masks


@pytest.mark.parametrize("pattern", ["tile-2d", "tile-element", "element"])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_packed_experts_are_the_experts(pattern, tokens):
    torch.manual_seed(0)
    experts = Experts(4, 24, 16, 2)
    masks = prune(experts, ["gate_up", "down"], pattern)
    holder = torch.nn.ModuleDict({"experts": experts})
    x, gates = torch.randn(tokens, 24), torch.rand(tokens, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    wanted = experts(x, chosen, gates)
    pack_model(holder, {f"experts.{name}": mask for name, mask in masks.items()}, 8, step=4)
    assert isinstance(holder["experts"], PackedExperts)
    torch.testing.assert_close(holder["experts"](x, chosen, gates), wanted, atol=1e-5, rtol=1e-4)


def test_a_layer_in_full_precision_and_low():
    torch.manual_seed(0)
    layer = SwiGLU(24, 40, bias=True)
    torch.nn.init.normal_(layer.gate_up.bias)
    masks = prune(layer, ["gate_up.weight", "down.weight"])
    x = torch.randn(3, 7, 24)
    wanted = layer(x)
    pack_model(layer, masks, 8, step=4)
    assert isinstance(layer.down, PackedLinear)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)
    low = layer.to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(low.float(), wanted, atol=0.05, rtol=0.05)  # three roundings to 8 bits


def test_the_way_back_and_the_way_through_a_state_dict():
    model = tiny_model()
    names = [name for name, p in model.decoder.named_parameters() if p.ndim == 2 and p.shape[1] % 2 == 0]
    names = [
        name for name in names if isinstance(model.decoder.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
    ]
    before = {name: t.clone() for name, t in model.decoder.state_dict().items()}
    masks = prune(model.decoder, names, "tile-element")
    pruned = {name: t.clone() for name, t in model.decoder.state_dict().items()}
    pack_model(model.decoder, masks, 8)
    assert set(layout_of(model.decoder)) == {name.removesuffix(".weight") for name in names}
    back = dense_state(model.decoder)
    assert set(back) == set(before)
    assert all(torch.equal(back[name], pruned[name]) for name in before)
    other = tiny_model(seed=1).decoder
    prepare_packed(other, layout_of(model.decoder))
    other.load_state_dict(model.decoder.state_dict())
    assert all(torch.equal(t, pruned[name]) for name, t in dense_state(other).items())


def test_what_does_not_fit_is_named():
    layer = SwiGLU(8, 16)
    masks = prune(layer, ["down.weight"])
    with pytest.raises(ValueError, match=r"that no linear layer and no experts have: up\.weight"):
        pack_model(SwiGLU(8, 16), {"up.weight": masks["down.weight"]}, 8)
    with pytest.raises(ValueError, match=r"down\.weight: a mask \(8, 16\) for a weight \(4, 16\)"):
        pack_model(SwiGLU(4, 16), masks, 8)
    with pytest.raises(ValueError, match=r"down\.weight: \d+ weights that are not zero"):
        pack_model(SwiGLU(8, 16), masks, 8)
    pack_model(layer, masks, 8)
    with pytest.raises(ValueError, match=r"down\.weight: packed from matrices of another size"):
        prepare_packed(SwiGLU(4, 16), layout_of(layer))
    with pytest.raises(ValueError, match="down: this model has no layer"):
        prepare_packed(torch.nn.Linear(4, 4), layout_of(layer))
