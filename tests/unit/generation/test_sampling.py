"""Random numbers and the draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmagent.generation.sampling import nucleus, sample, uniforms


def test_uniforms_are_uniform_and_independent():
    seeds, counters = np.meshgrid(np.arange(200), np.arange(200))
    values = uniforms(seeds.ravel(), counters.ravel())
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    assert np.histogram(values, 20, (0, 1))[0].std() < 0.05 * len(values) / 20
    grid = values.reshape(200, 200)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert uniforms(np.array([-5]), np.array([3])) == uniforms(np.array([-5]), np.array([3]))


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]]).repeat(20000, 1)
    uniform = torch.from_numpy(uniforms(np.arange(20000), np.zeros(20000)))
    for temperature in (1.0, 0.5):
        ids, logprobs = sample(logits, torch.full((20000,), temperature), None, uniform)
        expected = torch.softmax(logits[0] / temperature, -1)
        share = torch.bincount(ids, minlength=4) / 20000
        torch.testing.assert_close(share, expected, rtol=0, atol=0.015)
        torch.testing.assert_close(logprobs, expected.log()[ids])


def test_greedy_rows_take_the_best_and_others_are_drawn():
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    ids, logprobs = sample(logits, torch.tensor([0.0, 1.0]), None, torch.tensor([0.999, 0.0], dtype=torch.float64))
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[[0, 1], ids])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=9), st.floats(0.05, 1.0))
def test_the_nucleus_is_the_smallest_set_that_suffices(weights, top_p):
    p = torch.tensor([weights], dtype=torch.float64)
    p = p / p.sum()
    kept = nucleus(p, torch.tensor([top_p]))
    inside = kept > 0
    assert kept.sum() >= min(top_p, 1.0) - 1e-6
    if inside.sum() > 1:
        assert kept.sum() - kept[inside].min() < top_p + 1e-6
    if (~inside).any():
        assert kept[inside].min() >= p[~inside].max() - 1e-12


@pytest.mark.parametrize("point", [0.0, 0.5, 1.0 - 2.0**-53])
def test_a_barred_id_cannot_be_drawn_at_any_point(point):
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    ids, _ = sample(logits, torch.ones(1), None, torch.tensor([point], dtype=torch.float64))
    assert ids.item() in (1, 2)
