"""What a generator notices of its model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.generation.weights import WeightVersions
from mmagent.trajectories import Limits
from tests.agent_kit import picture, prompt, tiny_model, tiny_vocab


@torch.no_grad()
def other(module: nn.Module) -> nn.Module:
    changed = copy.deepcopy(module)
    for parameter in changed.parameters():
        parameter.add_(parameter.std() * torch.randn_like(parameter))
    return changed


def test_a_module_that_is_replaced_is_another_version():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    versions = WeightVersions(model)
    seen = [versions.of()]
    assert versions.of() == seen[0]
    for change in (
        lambda: model[1].__setitem__(0, other(model[1][0])),
        lambda: torch.autograd.graph.increment_version(model[1][0].weight),
        lambda: setattr(model[1][0], "bias", nn.Parameter(torch.ones(2))),
        lambda: model.append(nn.Linear(2, 2)),
        lambda: model.__delitem__(2),
    ):
        change()
        seen.append(versions.of())
        assert versions.of() == seen[-1]
    assert len(set(seen)) == len(seen)


def test_nothing_is_found_of_a_layer_that_was_replaced():
    """Adapters, pruned layers and the like come as modules."""
    model, row = tiny_model(), prompt("click the red button " * 4, (picture(1),), key="a")
    generator = Generator(model, tiny_vocab(), GeneratorConfig())
    generator.generate([(row, Limits(4, 0.0))])
    assert generator.pool.known
    model.decoder.blocks[0] = other(model.decoder.blocks[0])
    (got,) = generator.generate([(row, Limits(4, 0.0))])
    (want,) = Generator(model, tiny_vocab(), GeneratorConfig()).generate([(row, Limits(4, 0.0))])
    assert got.cached_tokens == 0
    assert (got.ids, got.logprobs) == (want.ids, want.logprobs)
