"""Masks: the exact share, whole units, the stream's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.masking import MaskConfig, mask_patches
from mmagent.geometry import patch_coordinates


@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    unit=st.integers(1, 2),
    ratio=st.floats(0.0, 0.95),
    style=st.sampled_from(["block", "uniform"]),
    seed=st.integers(0, 2**32),
)
def test_exactly_the_asked_share_is_hidden(rows, cols, unit, ratio, style, seed):
    grid = (1, 2 * rows, 2 * cols)
    config = MaskConfig(ratio, style, unit)
    masked = mask_patches(grid, 2, config, np.random.default_rng(seed))
    assert masked.dtype == torch.bool
    assert int(masked.sum()) == round(ratio * 4 * rows * cols)
    assert torch.equal(masked, mask_patches(grid, 2, config, np.random.default_rng(seed)))
    if unit == 2:  # visual tokens are hidden whole, all but one
        hidden = masked.view(-1, 4).sum(dim=1)
        assert int(((hidden > 0) & (hidden < 4)).sum()) <= 1


def test_the_published_case_hides_90_of_256():
    assert int(mask_patches((1, 16, 16), 2, MaskConfig(), np.random.default_rng(0)).sum()) == 90


def test_blocks_are_compact_and_uniform_is_not():
    """Neighbours of a hidden patch are hidden more often than chance, in the image's plane and not just the stream."""

    def clustering(style: str) -> float:
        together = 0.0
        for seed in range(20):
            masked = mask_patches((1, 16, 16), 2, MaskConfig(0.35, style, 1), np.random.default_rng(seed))
            plane = torch.zeros(16, 16, dtype=torch.bool)
            at = patch_coordinates((1, 16, 16), 2)
            plane[at[:, 0], at[:, 1]] = masked
            together += float((plane[1:] & plane[:-1]).sum() / plane[1:].sum())
        return together / 20

    assert clustering("block") > 0.65
    assert clustering("uniform") < 0.45


def test_frames_of_a_clip_share_one_mask():
    masked = mask_patches((3, 4, 6), 2, MaskConfig(), np.random.default_rng(1))
    assert torch.equal(masked[:24], masked[24:48])
    assert torch.equal(masked[:24], masked[48:])


@pytest.mark.parametrize("bad", [{"ratio": 1.0}, {"ratio": -0.1}, {"style": "stripes"}, {"unit": 0}])
def test_bad_configurations_are_refused(bad):
    with pytest.raises(ValueError, match="mask"):
        MaskConfig(**bad)


def test_a_grid_that_the_unit_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        mask_patches((1, 3, 4), 1, MaskConfig(unit=2), np.random.default_rng(0))
