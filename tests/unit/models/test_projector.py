"""The two mergers: shapes, and the averaging one against its plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmagent.models.projector import Projector, ProjectorConfig


def test_the_averaging_merger_is_the_plain_formula():
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(ffn=24, merge="average"), 16, 2, 8)
    tokens = torch.randn(12, 16)
    means = torch.stack([tokens[4 * n : 4 * n + 4].mean(0) for n in range(3)])
    up = F.gelu(F.linear(F.layer_norm(means, (16,)), projector.up.weight, projector.up.bias))
    wanted = F.linear(up, projector.down.weight, projector.down.bias)
    torch.testing.assert_close(projector(tokens), wanted)


def test_a_merger_that_nobody_has_is_refused():
    with pytest.raises(ValueError, match="merge must be 'linear' or 'average'"):
        ProjectorConfig(merge="max")
