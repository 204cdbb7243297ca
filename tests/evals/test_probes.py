"""Probes: simple methods that read what is there, and nothing where there is nothing."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from evals.encoder.classify import class_mean_accuracy, knn_accuracy, linear_accuracy
from evals.probes import ProbeReport, probe_scores, probe_sets
from mmagent.geometry import WHITE_MEAN, GeometryConfig, patch_labels
from mmagent.models.cogvit import CogViT, cogvit_laptop
from mmagent.types import PackedVision, VisionFeatures
from mmagent.worlds.charts import CHARTS, draw_chart
from mmagent.worlds.digits import handwriting
from mmagent.worlds.icons import ICONS, draw_icon
from mmagent.worlds.images import PHOTO_CAPTIONS, draw_scene


def _clusters(classes: int, each: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(classes * each, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(classes).repeat_interleave(each)
    return centres[labels] + spread * noise, labels


def test_separable_features_are_read_and_noise_is_not():
    train, test = _clusters(4, 50, 0.1, 1), _clusters(4, 25, 0.1, 2)
    assert knn_accuracy(*train, *test) == 1.0
    assert linear_accuracy(*train, *test) == 1.0
    shuffled = train[1][torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    assert linear_accuracy(train[0], shuffled, *test) < 0.6  # chance is a quarter


def test_classes_weigh_alike():
    labels = torch.tensor([0] * 9 + [1])
    assert class_mean_accuracy(torch.zeros(10, dtype=torch.long), labels) == 0.5


def test_a_patch_takes_its_commonest_class_in_the_order_of_the_stream():
    mask = np.zeros((56, 56), dtype=np.int64)
    mask[:14, 14:28] = 3  # row 0, column 1: the second patch of the first merge block
    labels = patch_labels(mask, (1, 4, 4), 2)
    assert labels.tolist() == [0, 3] + [0] * 14


# ---------------------------------------------------------------------------------------------- the built-in sets

GEOMETRY = GeometryConfig(mean=WHITE_MEAN)
PAIRS = ("digits", "scenes", "icons", "charts", "photographs", "places")
CLASSES = {"digit": 10, "shape": 8, "colour": 8, "icon": len(ICONS), "chart": len(CHARTS), "photo": 16}


class RawPixels(nn.Module):
    """No model at all: a patch is 2 x 2 means of its pixels, an image all of its patches in a row."""

    patch_size, merge_size, width = 14, 2, 12

    def __init__(self, noise: bool = False):
        super().__init__()
        self.noise = torch.Generator().manual_seed(0) if noise else None
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, vision: PackedVision, layers: Sequence[int] = ()) -> VisionFeatures:
        assert not layers
        cells = vision.patches.view(-1, 2, 3, 2, 7, 2, 7)[:, 0].mean(dim=(3, 5)).flatten(1)
        if self.noise is not None:
            cells = torch.randn(cells.shape, generator=self.noise)
        pooled = [image.flatten() for image in cells.split(vision.grids.prod(dim=1).tolist())]
        return VisionFeatures(cells, {}, torch.stack(pooled))


@pytest.fixture(scope="module")
def sets():
    return probe_sets(200, 120)


def test_sets_are_the_same_every_time_and_their_halves_share_no_picture(sets):
    again = probe_sets.__wrapped__(200, 120)
    for name in PAIRS:
        train, test = getattr(sets, name)
        assert (len(train.images), len(test.images)) == (200, 120)
        for one, two in zip((train, test), getattr(again, name), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one.images, two.images, strict=True))
            assert all(torch.equal(one.labels[q], two.labels[q]) for q in one.labels)
        seen = [{image.tobytes() for image in half.images} for half in (train, test)]
        assert not seen[0] & seen[1]


def test_no_gallery_shows_what_is_asked(sets):
    """Of photographs tests/worlds knows it, by pixels."""
    train = {
        (np.kron(image * (255 / 16), np.ones((7, 7)))).astype(np.uint8).tobytes() for image in handwriting("train")[0]
    }
    assert len(train) == 697
    asked = [image[..., 0] for half in sets.digits for image in half.images]
    assert asked[0].tobytes() not in train
    assert not train & {image.tobytes() for image in asked}
    for name, draw in (("scenes", draw_scene), ("icons", draw_icon), ("charts", draw_chart)):
        level = {} if name == "charts" else {"level": 0}
        drawn = {draw(seed, "train", (112, 112), **level).image.tobytes() for seed in range(320)}
        assert not drawn & {image.tobytes() for half in getattr(sets, name) for image in half.images}


def test_answers_are_those_of_the_worlds(sets):
    for seed in range(0, 200, 20):
        assert int(sets.icons[0].labels["icon"][seed]) == draw_icon(seed, "test", (112, 112), level=0).icon
        chart = draw_chart(200 + seed // 2, "test", (112, 112))
        assert int(sets.charts[1].labels["chart"][seed // 2]) == chart.kind
        assert np.array_equal(sets.charts[1].maps["parts"][seed // 2], chart.regions())
    assert sets.digits[0].labels["digit"].tolist() == handwriting("test")[1][:200].tolist()
    assert sets.digits[1].labels["digit"].tolist() == handwriting("test")[1][200:320].tolist()
    assert len(PHOTO_CAPTIONS) == 16
    for half in sets.photographs:
        assert set(half.labels["photo"].tolist()) == set(range(16))


def test_more_digits_than_there_are_share_them_in_proportion():
    from evals.probes import _digits

    assert [len(half.images) for half in _digits(1200, 800, 112)] == [600, 400]
    assert [len(half.images) for half in _digits(600, 400, 112)] == [600, 400]


def test_raw_pixels_know_what_never_moves(sets):
    """The baseline that needs no model. A digit of half the size has exactly its 8 x 8 pixels, which neighbours are
    known to tell apart, and an icon is always in the middle; shapes move and turn too much for a row of pixels."""
    scores = probe_scores(RawPixels(), GEOMETRY, sets)
    dense = [f"dense/{question}" for question in ("shapes", "materials", "parts")]
    assert list(scores) == [*(f"semantic/{question}" for question in CLASSES), *dense]
    assert scores["semantic/digit"] > 0.85
    assert scores["semantic/colour"] > 0.2
    assert scores["semantic/chart"] > 0.3
    assert scores["semantic/icon"] > 0.2
    assert scores["semantic/shape"] < 1 / 8 + 0.14
    for question in dense:
        assert scores[question] < 0.4
    again = probe_scores(RawPixels(), GEOMETRY, sets)
    assert scores == again
    report = ProbeReport(scores, again)
    assert report.overall() == (report.mean("semantic") + report.mean("dense")) / 2
    assert report.table().count("\n") == len(scores) + 3


def test_noise_scores_as_chance_does(sets):
    """Of 120 answers a share has a deviation of at most 4.6 points; three of them are allowed."""
    scores = probe_scores(RawPixels(noise=True), GEOMETRY, sets)
    for question, classes in CLASSES.items():
        assert scores[f"semantic/{question}"] < 1 / classes + 0.14, question
    assert scores["dense/shapes"] < 1 / 9 + 0.03  # thousands of patches
    assert scores["dense/materials"] < 1 / 8 + 0.03
    assert scores["dense/parts"] < 1 / 4 + 0.03


def test_random_weights_pass_colours_on_and_know_few_icons(sets):
    torch.manual_seed(0)
    scores = probe_scores(CogViT(cogvit_laptop()).eval(), GEOMETRY, sets)
    assert scores["semantic/colour"] > 0.5
    assert 1 / len(ICONS) < scores["semantic/icon"] < 0.35
    assert 1 / len(CHARTS) + 0.1 < scores["semantic/chart"] < 0.9
    assert scores["dense/shapes"] < 0.3
