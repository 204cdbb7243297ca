"""Masks against a plain reference that was written from the text of arXiv 2008.13006, loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmagent.sparsity.patterns import KEPT, PATTERNS, SINGLE, PatternConfig, density, make_masks, restored, tiles_of
from mmagent.sparsity.stages import SparsityConfig

SHAPES = {"a": (20, 12), "b": (9, 30), "experts": (3, 10, 8)}


def scores(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) ** 3 for name, shape in SHAPES.items()}


def matrices(found: dict[str, Tensor]) -> dict[tuple[str, int], list[list[float]]]:
    return {(n, e): m.tolist() for n, t in found.items() for e, m in enumerate(t if t.ndim == 3 else t.unsqueeze(0))}


def drop(units: list[tuple[float, int, object]], share: float, budget: str) -> set[object]:
    """``(value, size, key)``: the keys of the lowest, as long as what goes is at most ``share``."""
    size = (lambda unit: unit[1]) if budget == "elements" else (lambda unit: 1)
    allowed, gone, out = share * sum(map(size, units)), 0, set()
    for unit in sorted(units, key=lambda unit: unit[0]):
        gone += size(unit)
        if gone > allowed * (1 + 1e-12):
            break
        out.add(unit[2])
    return out


def norm(values: list[float]) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in values)) / len(values)


def reference(
    found: dict[str, Tensor], sparsity: float, config: PatternConfig
) -> dict[tuple[str, int], list[list[int]]]:
    """The paper's x @ B with B (inputs, outputs); ``rows[o][i]`` here."""
    all_rows = matrices(found)
    two = config.pattern != "tile-1d"
    delta = config.delta if config.pattern == "tile-element" else 0.0
    share = 1 - math.sqrt(1 - sparsity - delta) if two else sparsity
    gone = set()
    if two:
        outputs = [(norm(row), len(row), (key, o)) for key, rows in all_rows.items() for o, row in enumerate(rows)]
        gone = drop(outputs, share, config.budget)
    segments = []
    for key, rows in all_rows.items():
        left = [o for o in range(len(rows)) if (key, o) not in gone]
        tiles = [left[s : s + config.granularity] for s in range(0, len(left), config.granularity)]
        for tile in tiles:
            for i in range(len(rows[0])):
                segments.append((norm([rows[o][i] for o in tile]), len(tile), (key, tuple(tile), i)))
    dropped = drop(segments, share, config.budget)
    masks = {key: [[0] * len(rows[0]) for _ in rows] for key, rows in all_rows.items()}
    for _, _, (key, tile, i) in segments:
        for o in tile:
            masks[key][o][i] = int((key, tile, i) not in dropped)
    if delta:
        outside = [
            (-rows[o][i], key, o, i)
            for key, rows in all_rows.items()
            for o in range(len(rows))
            for i in range(len(rows[0]))
            if not masks[key][o][i]
        ]
        total = sum(len(rows) * len(rows[0]) for rows in all_rows.values())
        for _, key, o, i in sorted(outside, key=lambda found: found[0])[: round(delta * total)]:
            masks[key][o][i] = SINGLE
    return masks


@pytest.mark.parametrize("budget", ["elements", "units"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("pattern", ["tile-1d", "tile-2d", "tile-element"])
def test_tiles_are_those_of_the_paper(pattern, sparsity, budget):
    config = PatternConfig(pattern, granularity=4, delta=0.03, budget=budget)
    for seed in range(3):
        found = scores(seed)
        assert matrices(make_masks(found, sparsity, config)) == reference(found, sparsity, config)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_density_is_what_was_asked_for(pattern):
    """To a unit: the largest, a block of 16 weights, is 2 % of these; vectors keep whole numbers of eight."""
    config = PatternConfig(pattern, granularity=4, vector=4, block=4)
    masks = make_masks({"a": scores()["a"], "experts": scores()["experts"]}, 0.5, config)
    assert density(masks) == pytest.approx(0.5, abs=0.05)
    assert restored(masks) == pytest.approx(0.02 if pattern == "tile-element" else 0.0, abs=0.003)


@pytest.mark.parametrize("pattern", ["tile-1d", "tile-2d", "tile-element", "element", "vector", "block"])
def test_the_scale_of_scores_does_not_matter(pattern):
    """Gradients of a large model are small, and their scores are squares: 2^-80 of these, whose squares no float32
    holds, rank as these do."""
    config = PatternConfig(pattern, granularity=4, vector=4, block=4)
    found = scores(5)
    small = {name: score * 2.0**-80 for name, score in found.items()}
    assert matrices(make_masks(small, 0.5, config)) == matrices(make_masks(found, 0.5, config))


def test_a_matrix_that_matters_less_loses_more():
    """Global ranking: the same numbers a thousand times smaller are all that goes."""
    found = {"big": torch.rand(8, 8) + 1.0, "small": (torch.rand(8, 8) + 1.0) / 1000}
    for pattern in ("tile-1d", "element", "block"):
        masks = make_masks(found, 0.5, PatternConfig(pattern, granularity=2, block=2))
        assert masks["big"].all()
        assert not masks["small"].any()


def test_outputs_are_kept_in_full_tiles():
    """Every tile but the last has so many surviving outputs, and is dense: no output of it misses an input."""
    found = {"w": torch.rand(64, 40)}
    mask = make_masks(found, 0.75, PatternConfig(granularity=8))["w"]
    tiles = tiles_of(mask, 8)
    assert [len(outputs) for outputs, _ in tiles[:-1]] == [8] * (len(tiles) - 1)
    for outputs, inputs in tiles:
        assert mask[outputs][:, inputs].eq(KEPT).all()
    assert sum(len(o) * len(i) for o, i in tiles) == mask.count_nonzero()


def test_what_is_gone_scores_nothing_and_goes_again():
    """A dropped weight is zero and so is its score: levels that rise nest, but for segments of tiles that were made
    anew, whose holes cost nothing to fill."""
    found = scores(3)
    for pattern in ("element", "block"):
        config = PatternConfig(pattern, block=4)
        before = make_masks(found, 0.4, config)
        after = make_masks({name: s * before[name].bool() for name, s in found.items()}, 0.6, config)
        assert all((after[name] <= before[name]).all() for name in found)
    before = make_masks(found, 0.4, PatternConfig(granularity=4))
    after = make_masks({name: s * before[name].bool() for name, s in found.items()}, 0.6, PatternConfig(granularity=4))
    assert all((after[name].any(-1) <= before[name].any(-1)).all() for name in found)  # outputs never come back


def test_two_of_four_and_vectors_keep_as_many_in_each():
    found = {"w": torch.rand(6, 16)}
    assert (make_masks(found, 0.5, PatternConfig("2:4"))["w"].view(6, 4, 4).sum(-1) == 2).all()
    mask = make_masks(found, 0.75, PatternConfig("vector", vector=8))["w"]
    assert (mask.view(6, 2, 8).sum(-1) == 2).all()
    best = found["w"].view(6, 2, 8).topk(2, -1).indices
    assert mask.view(6, 2, 8).gather(2, best).all()


@pytest.mark.parametrize(
    ("given", "sparsity", "config", "message"),
    [
        ({"v": torch.rand(4)}, 0.5, PatternConfig(), "v: a score of shape"),
        ({"v": torch.full((2, 2), math.nan)}, 0.5, PatternConfig(), "v: a score is negative or not finite"),
        ({"v": torch.rand(2, 6)}, 0.5, PatternConfig("2:4"), "v: 2:4 wants inputs in fours"),
        ({"v": torch.rand(2, 8)}, 0.75, PatternConfig("2:4"), "0.5 and cannot be 0.75"),
        ({"v": torch.rand(2, 8)}, 1.0, PatternConfig(), "sparsity 1.0"),
        ({"v": torch.rand(2, 8)}, 0.99, PatternConfig("tile-element"), "leave nothing"),
    ],
)
def test_what_cannot_be_pruned_is_named(given, sparsity, config, message):
    with pytest.raises(ValueError, match=message):
        make_masks(given, sparsity, config)


def test_stages_are_functions_of_the_step():
    config = SparsityConfig(levels=[0.25, 0.5, 0.75], score=4, steps=2)
    assert [config.stage(step) for step in range(1, 13)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert config.total == 10
    assert SparsityConfig().total == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": [0.5, 0.25]}, "must rise"),
        ({"levels": [1.0]}, "must rise"),
        ({"levels": [0.25, 0.5], "pattern": PatternConfig("2:4")}, "two of four"),
        ({"levels": [0.99], "pattern": PatternConfig("tile-element")}, "leave nothing"),
        ({"score": 0}, "at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**change)
