"""Distances against plain references, and where a naive formula breaks."""

from __future__ import annotations

import math

import pytest
import torch

from mmagent.losses.distillation import angle, angular_distance, feature_distance
from mmagent.losses.standardisers import Cone


def test_feature_distance_equals_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    student, target = torch.randn(2, 5, 7, generator=generator).unbind(0)
    for row, value in zip(range(5), feature_distance(student, target), strict=True):
        s, t = student[row].tolist(), target[row].tolist()
        dot = sum(a * b for a, b in zip(s, t, strict=True))
        cosine = dot / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))
        huber = [0.5 * d * d if d < 1 else d - 0.5 for d in (abs(a - b) for a, b in zip(s, t, strict=True))]
        assert value.item() == pytest.approx(0.9 * (1 - cosine) + 0.1 * sum(huber) / 7, rel=1e-5)


def test_feature_distance_computes_in_float32():
    half = torch.randn(4, 8).bfloat16()
    assert feature_distance(half, half).dtype == torch.float32


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        feature_distance(torch.zeros(3, 4), torch.zeros(3, 5))


@pytest.mark.parametrize("degrees", [0.0, 1e-2, 1.0, 45.0, 90.0, 179.0, 180.0])
def test_angle_is_exact_and_its_gradient_finite(degrees):
    theta = math.radians(degrees)
    student = torch.tensor([[2.0, 0.0]], requires_grad=True)
    target = torch.tensor([[3 * math.cos(theta), 3 * math.sin(theta)]])
    assert angle(student, target).item() == pytest.approx(theta, abs=1e-6, rel=1e-4)
    angular_distance(student, target, torch.tensor(1.0)).sum().backward()
    assert student.grad.isfinite().all()


def test_answering_the_mean_direction_costs_one_whatever_the_cone():
    generator = torch.Generator().manual_seed(1)
    for spread in (0.05, 0.5, 2.0):
        summaries = torch.randn(64, 6, generator=generator) * spread + torch.tensor([3.0, 1, 0, 0, 0, 0])
        cone = Cone(6)
        cone.fit(summaries)
        assert cone(cone.direction.expand_as(summaries), summaries).mean().item() == pytest.approx(1.0, rel=1e-5)


def test_a_cone_without_width_is_refused():
    with pytest.raises(ValueError, match="same way"):
        Cone(3).fit(torch.tensor([[1.0, 0, 0], [2.0, 0, 0]]))
