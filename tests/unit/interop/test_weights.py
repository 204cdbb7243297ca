"""Rules move bits in both directions, and name what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmagent.interop.glm import agent_adapter
from mmagent.interop.weights import Adapter, Rule, rename, stack
from mmagent.models import presets
from mmagent.models.agent_model import AgentModel


def adapter() -> Adapter:
    return Adapter(
        [
            *stack("ours", ("theirs.q", "theirs.k"), (2, 1)),
            *rename("norm", "their_norm"),
            Rule("conv.weight", ("their_conv.weight",), permute=(0, 2, 3, 1), their_shape=(2, 3, 2, 2)),
        ]
    )


def their_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"theirs.q": (2, 4), "theirs.k": (1, 4), "their_norm": (3,), "their_conv": (2, 3, 2, 2)}
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def test_round_trip_is_bitwise():
    theirs = their_state()
    ours = adapter().to_ours(theirs)
    assert {name: tuple(t.shape) for name, t in ours.items()} == {
        "ours.weight": (3, 4), "norm.weight": (3,), "conv.weight": (2, 12),
    }  # fmt: skip
    back = adapter().to_theirs(ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_a_convolution_is_the_matrix_of_its_window():
    convolution = nn.Conv2d(3, 2, 2, stride=2, bias=False)
    rule = adapter().rules[-1]
    window = torch.randn(1, 3, 2, 2)
    flat = window.permute(0, 2, 3, 1).reshape(1, -1)  # patch by patch, each with all its channels
    matrix = rule.to_ours([convolution.weight])
    torch.testing.assert_close(flat @ matrix.T, convolution(window).flatten(1))


def test_what_does_not_fit_is_named():
    theirs = their_state()
    with pytest.raises(ValueError, match=r"1 missing: theirs\.k\.weight"):
        adapter().to_ours({k: v for k, v in theirs.items() if k != "theirs.k.weight"})
    with pytest.raises(ValueError, match=r"1 unknown: extra\.weight"):
        adapter().to_ours(theirs | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(1, 1\) rows, expected \(2, 1\)"):
        adapter().to_ours(theirs | {"theirs.q.weight": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match=r"their_conv\.weight: shape"):
        adapter().to_ours(theirs | {"their_conv.weight": torch.zeros(2, 3, 4)})
    with pytest.raises(ValueError, match=r"our state dict: 1 missing: norm\.weight"):
        adapter().to_theirs({"ours.weight": torch.zeros(3, 4), "conv.weight": torch.zeros(2, 12)})
    with pytest.raises(ValueError, match="two rules for"):
        Adapter([*rename("a", "b"), *rename("a", "c")])


def test_nothing_is_written_when_one_shape_is_wrong():
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(3, 2, bias=False)})
    before = module["a"].weight.clone()
    rules = Adapter([*rename("a", "x"), *rename("b", "y")])
    with pytest.raises(ValueError, match=r"b\.weight: shape \(2, 2\), the module has \(2, 3\)"):
        rules.load(module, {"x.weight": torch.zeros(2, 2), "y.weight": torch.zeros(2, 2)})
    assert torch.equal(before, module["a"].weight)


@pytest.mark.parametrize("kind", ["glm4v_moe", "glm_ocr"])
def test_rules_cover_every_tensor_of_the_model(kind):
    """With MTP, as in a released checkpoint: nothing of ours is left out on export."""
    config = presets.glm_ocr() if kind == "glm_ocr" else presets.debug()
    if kind == "glm4v_moe":
        config.mtp.depths = 1
    covered = {rule.ours for rule in agent_adapter(config, kind, mtp=True).rules}
    model = AgentModel(config) if kind == "glm4v_moe" else presets.on_meta(config)
    assert covered == set(model.state_dict())


def test_the_published_models_convert_name_by_name():
    for preset, kind in ((presets.glm45_air(), "glm4_moe"), (presets.glm45(), "glm4_moe")):
        rules = agent_adapter(preset, kind, mtp=True).rules
        names = {name for rule in rules for name in rule.theirs}
        last = preset.decoder.layers
        assert f"model.layers.{last}.eh_proj.weight" in names
        assert f"model.layers.{last - 1}.mlp.experts.gate_up_proj" in names
