"""Averages of checkpoints: the formulas, piece by piece, strict about what is averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmagent.engine.checkpoint import CheckpointError
from mmagent.engine.merging import MergeConfig, merge, merged_checkpoints, merged_folders
from mmagent.ops import tensor_files
from mmagent.ops.tensor_files import WeightsError, stored
from mmagent.train.loop import fit
from tests.engine_kit import ALONE, toy_run


def states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "weight": torch.randn(7, 5, generator=generator).to(dtype),
            "router.bias": torch.randn(4, generator=generator),
            "seen": torch.tensor(n),
        }
        for n in range(count)
    ]


def sources(given_states: list[dict[str, torch.Tensor]]) -> list[dict[str, tensor_files.Stored]]:
    return [{k: stored(k, t, f"file {n}") for k, t in state.items()} for n, state in enumerate(given_states)]


@given(kind=st.sampled_from(["sma", "ema", "wma"]), count=st.integers(1, 12), alpha=st.floats(0.05, 1.0))
def test_coefficients_are_those_of_the_recursions(kind, count, alpha):
    """EMA by its recursion ``m = alpha x + (1 - alpha) m``, WMA and SMA by their sums, on one number a checkpoint."""
    values = [float(n * n + 1) for n in range(count)]
    found = sum(c * v for c, v in zip(MergeConfig(kind, 0, alpha).coefficients(count), values, strict=True))
    if kind == "ema":
        expected = values[0]
        for value in values[1:]:
            expected = alpha * value + (1 - alpha) * expected
    else:
        weights = [1.0] * count if kind == "sma" else list(range(1, count + 1))
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_merge_is_the_sum_in_float32_however_it_is_read(dtype):
    """Of bfloat16 the sum is rounded once, at the end; integers are the last checkpoint's."""
    given_states = states(4, dtype)
    config = MergeConfig("wma")
    found = merge(sources(given_states), config.coefficients(4))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.zeros(7, 5, dtype=wide)
    for state, coefficient in zip(given_states, config.coefficients(4), strict=True):
        expected += coefficient * state["weight"].to(wide)
    # one rounding of each product and sum apart: the order of operations is the same, a fused product is not
    torch.testing.assert_close(found["weight"].whole(), expected.to(dtype))
    pieces = [piece for _, piece in found["weight"].chunks(3)]
    assert torch.equal(torch.cat(pieces).view(7, 5), found["weight"].whole())
    assert found["seen"].whole().item() == 3
    assert found["router.bias"].dtype == torch.float32
    alone = merge(sources(given_states[-1:]), (1.0,))
    assert all(torch.equal(alone[name].whole(), tensor) for name, tensor in given_states[-1].items())


def test_what_does_not_fit_is_named():
    good, other = states(2)
    for change, told in (
        ({"extra": torch.ones(1)}, "file 0 does not fit the others: 1 unexpected: extra"),
        ({"weight": torch.ones(7, 4)}, "1 misshapen: weight"),
        ({"weight": torch.ones(7, 5, dtype=torch.bfloat16)}, r"weight is torch\.bfloat16, elsewhere torch\.float32"),
    ):
        with pytest.raises(WeightsError, match=told):
            merge(sources([good | change, other]), (0.5, 0.5))
    bad = merge(sources([good | {"weight": torch.full((7, 5), float("nan"))}, other]), (0.5, 0.5))
    with pytest.raises(WeightsError, match="weight in file 0 is not finite"):
        bad["weight"].whole()
    with pytest.raises(ValueError, match="1 checkpoints cannot be merged by 2 coefficients"):
        merge(sources([good]), (0.5, 0.5))


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"kind": "mean"}, "is none of sma, ema, wma"), ({"count": 1}, "merge.count"), ({"alpha": 0.0}, "merge.alpha")],
)
def test_configs_that_make_no_sense_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        MergeConfig(**fields)


def test_the_newest_checkpoints_of_a_run_are_merged(tmp_path):
    toy = toy_run(tmp_path, ALONE, keep=5)
    seen = {}

    def remember(step: int, record: dict[str, float]) -> None:
        toy.run.finish(step)
        seen[step] = {name: t.detach().clone() for name, t in toy.objective.state_dict().items()}

    fit(toy.run, toy.objective, toy.engine, toy.stream, steps=6, hooks=[remember])
    for before, expected in ((None, (4, 5, 6)), (5, (2, 3, 4))):
        with merged_checkpoints(toy.run.checkpoints, "model", MergeConfig(count=3), before) as merged:
            assert merged.steps == expected
            for name, tensor in merged.tensors.items():
                mean = sum(seen[step][name].double() for step in expected) / 3
                torch.testing.assert_close(tensor.whole().double(), mean, rtol=1e-6, atol=1e-6)
    with (
        pytest.raises(CheckpointError, match="holds 5 checkpoints, 6 are to be merged: keep more"),
        merged_checkpoints(toy.run.checkpoints, "model", MergeConfig(count=6)),
    ):
        pass


def test_folders_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK", 8)
    folders: list[Path] = []
    for n, state in enumerate(states(3)):
        folders.append(tmp_path / str(n))
        folders[-1].mkdir()
        save_file(state, folders[-1] / "model.safetensors")
    with merged_folders(folders, MergeConfig()) as tensors:
        assert max(len(piece) for _, piece in tensors["weight"].chunks()) == 8
        mean = torch.stack([state["weight"] for state in states(3)]).mean(0)
        torch.testing.assert_close(tensors["weight"].whole(), mean)
