"""PHI-S and its peers: what the statistics promise, and that a checkpoint keeps them."""

from __future__ import annotations

import pytest
import torch

from mmagent.losses.standardisers import (
    LayerStandardiser,
    Moments,
    NoStandardiser,
    PhiS,
    Whitening,
    equalising_rotation,
    hadamard,
)

WIDTHS = [1, 2, 3, 7, 12, 20, 28, 36, 52, 60, 96]


def skewed_features(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated features whose channel deviations span three orders of magnitude, off centre."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-2, 1, width)
    return torch.randn(rows, width, generator=generator) @ mixing + torch.randn(width, generator=generator) * 5


def fitted(features: torch.Tensor) -> PhiS:
    moments = Moments(features.shape[1])
    moments.add(features)
    standardiser = PhiS(features.shape[1])
    standardiser.fit(moments)
    return standardiser


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 28, 36, 60, 72, 96, 192, 384, 768, 1152])
def test_hadamard_is_orthogonal_with_entries_of_one_size(width):
    matrix = hadamard(width)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5))


@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_gives_every_channel_the_mean_variance(width):
    values = torch.rand(width, generator=torch.Generator().manual_seed(width)).double() ** 6
    rotation = equalising_rotation(values)
    assert torch.allclose(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    diagonal = (rotation @ torch.diag(values) @ rotation.T).diagonal()
    assert torch.allclose(diagonal, values.mean().expand(width), atol=1e-12)


@pytest.mark.parametrize("width", [3, 16, 52])
def test_phi_s_is_unit_variance_isotropic_in_scale_and_invertible(width):
    features = skewed_features(4000, width)
    targets = fitted(features)(features)
    assert torch.allclose(targets.mean(dim=0), torch.zeros(width), atol=1e-3)
    assert torch.allclose(targets.var(dim=0, unbiased=False), torch.ones(width), atol=2e-3)
    # one scale for all directions: distances keep their ratios, which per-channel standardising would not
    ratio = torch.pdist(targets[:50]) / torch.pdist(features[:50])
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=2e-3)
    assert torch.allclose(fitted(features).invert(targets), features, rtol=1e-4, atol=1e-3)


def test_moments_do_not_depend_on_how_rows_arrive():
    features = skewed_features(100, 6)
    whole, parts = Moments(6), Moments(6)
    whole.add(features)
    for part in features.split([1, 49, 50]):
        parts.add(part)
    assert torch.allclose(whole.covariance(), parts.covariance(), rtol=1e-10)
    assert torch.allclose(whole.covariance().float(), torch.cov(features.T, correction=0), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_carries_the_statistics():
    features = skewed_features(500, 8)
    one = fitted(features)
    other = PhiS(8)
    assert other(features).isnan().all()  # never silently the identity
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(features), one(features))


def test_constant_features_are_refused():
    with pytest.raises(ValueError, match="do not vary"):
        fitted(torch.ones(10, 4))


def test_layer_and_identity_need_no_statistics():
    features = skewed_features(20, 8)
    rows = LayerStandardiser()(features)
    assert torch.allclose(rows.mean(dim=1), torch.zeros(20), atol=1e-5)
    assert torch.allclose(rows.var(dim=1, unbiased=False), torch.ones(20), atol=1e-3)
    assert torch.equal(NoStandardiser()(features), features)
    assert not LayerStandardiser().state_dict()


def test_whitening_makes_every_direction_weigh_alike():
    torch.manual_seed(0)
    features = torch.randn(4000, 6) @ torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0, 0.3, 0.2])) @ torch.randn(6, 6) + 2.0
    moments = Moments(6)
    moments.add(features)
    whitening = Whitening(6, shrinkage=0.0)
    whitening.fit(moments)
    torch.testing.assert_close(torch.cov(whitening(features).T), torch.eye(6), atol=2e-3, rtol=0)  # 3999 against 4000
    constant = Moments(6)
    constant.add(torch.ones(5, 6))
    with pytest.raises(ValueError, match="do not vary"):
        whitening.fit(constant)
