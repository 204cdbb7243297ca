"""All probes of one encoder on one set: every figure is that of the methods alone, and what is missing is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evals.encoder.battery import Example, Examples, Probing, measure, measure_towers
from evals.encoder.classify import fit_logistic, knn_predict
from evals.encoder.features import extract
from evals.encoder.page import painted, render, score_table, shaded
from mmagent.geometry import GeometryConfig
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.worlds.images import draw_scene

GEOMETRY = GeometryConfig(patch_size=14, merge_size=2, min_tokens=1)
HOW = Probing(ks=(3, 9), progress=False, pictures=4, patches_per_pack=200)


@pytest.fixture(scope="module")
def encoder() -> CogViT:
    torch.manual_seed(0)
    return CogViT(cogvit_debug()).eval()


def _example(n: int, labelled: bool = True) -> Example:
    scene = draw_scene(n, "test", (56, 56 + 28 * (n % 2)), level=0)
    far = np.where(scene.shapes > 0, 1.0, 2.0).astype(np.float32)
    return Example(
        f"scene {n}", scene.image, int(scene.colour) if labelled else None, (scene.caption,), scene.shapes, far
    )


def _examples(first: int, count: int, name: str = "scenes") -> Examples:
    made = [_example(n, labelled=n % 7 != 6) for n in range(first, first + count)]
    return Examples(name, lambda: iter(made), count)


@pytest.fixture(scope="module")
def sets() -> tuple[Examples, Examples]:
    return _examples(0, 36), _examples(1000, 30)


def test_figures_are_those_of_the_methods_alone(encoder, sets):
    """Images without a label take no part in classification, but do in dense probes."""
    train, test = sets
    out = measure(encoder, GEOMETRY, train, test, replace(HOW, probes=("knn", "linear", "dense")))
    parts = [[e for e in part.read() if e.label is not None] for part in sets]
    x, y = (extract(encoder, [e.image for e in part], GEOMETRY) for part in parts)
    labels, answers = (torch.tensor([e.label for e in part]) for part in parts)
    for k, predicted in knn_predict(x.pooled, labels, y.pooled, (3, 9)).items():
        assert out.scores[f"knn@{k}"].mean == pytest.approx(float((predicted == answers).double().mean()))
        assert out.scores[f"knn@{k}"].n == len(answers)
    linear = fit_logistic(x.whole("both"), labels).predict(y.whole("both"))
    # features of other packs differ in the last digits, which may turn one image
    assert out.scores["linear"].mean == pytest.approx(
        float((linear == answers).double().mean()), abs=1.5 / len(answers)
    )
    assert {"segmentation/miou", "depth/r2", "depth/rmse", "depth/delta_1.25"} < set(out.scores)
    assert out.scores["segmentation/miou"].n == 30  # all of them
    assert out.scores["depth/rmse"].mean < 0.5  # two values one apart: the mean alone would be off by less than a half
    assert len(out.shown) == 4
    one = out.shown["scene 1007"]
    assert one.label is None
    assert set(one.predicted) == {"knn@3", "knn@9", "linear"}
    assert one.predicted_mask.shape == one.mask.shape == one.image.shape[:2]


def test_what_was_measured_does_not_depend_on_packs_or_repeats(encoder, sets):
    how = replace(HOW, probes=("knn", "dense"))
    first = measure(encoder, GEOMETRY, *sets, how)
    again = measure(encoder, GEOMETRY, *sets, how)
    assert first.scores == again.scores
    other = measure(encoder, GEOMETRY, *sets, replace(how, patches_per_pack=10_000))
    for name, value in first.scores.items():
        assert value.mean == pytest.approx(other.scores[name].mean, abs=0.04), name  # an image of 26 may turn


def test_few_patches_are_kept_of_many_images(encoder, sets, monkeypatch):
    fitted = []
    real = fit_logistic
    monkeypatch.setattr(
        "evals.encoder.battery.fit_logistic", lambda x, y, **k: fitted.append(len(x)) or real(x, y, **k)
    )
    measure(encoder, GEOMETRY, *sets, replace(HOW, probes=("dense",), patches_per_image=5))
    measure(encoder, GEOMETRY, *sets, replace(HOW, probes=("dense",), patches=100))
    measure(encoder, GEOMETRY, *sets, replace(HOW, probes=("dense",), patches=1))
    assert fitted == [180, 72, 36]


def test_what_is_missing_is_named(encoder, sets):
    train, test = sets
    bare = Examples(
        "bare", lambda: (replace(e, label=None, mask=None, depth=None, captions=()) for e in test.read()), 30
    )
    with pytest.raises(ValueError, match="bare: no image has a label"):
        measure(encoder, GEOMETRY, bare, test, replace(HOW, probes=("knn",)))
    with pytest.raises(ValueError, match="bare: no image has a map of classes or of distances"):
        measure(encoder, GEOMETRY, bare, test, replace(HOW, probes=("dense",)))
    with pytest.raises(ValueError, match="bare: no image has a map to judge segmentation by"):
        measure(encoder, GEOMETRY, train, bare, replace(HOW, probes=("dense",)))
    with pytest.raises(ValueError, match="none: there is no image that can be used"):
        measure(encoder, GEOMETRY, Examples("none", lambda: iter(()), 0), test, replace(HOW, probes=("knn",)))
    assert measure(encoder, GEOMETRY, bare, bare, replace(HOW, probes=("retrieval",))).scores == {}


class Colours:
    """Two towers that agree: an image is its mean colour, and so is a text that names one."""

    texts = ("red", "green", "blue")

    def embed_images(self, images):
        return F.normalize(torch.stack([torch.from_numpy(i.reshape(-1, 3).mean(axis=0)) for i in images]), dim=1)

    def embed_texts(self, texts):
        return torch.eye(3)[[next(n for n, name in enumerate(self.texts) if name in text) for text in texts]]


def _plain(count: int, captions: bool = True) -> Examples:
    def read() -> Iterator[Example]:
        for n in range(count):
            image = np.zeros((8, 8 + n % 3, 3), np.uint8)
            image[..., n % 3] = 200
            said = (f"a {Colours.texts[n % 3]} one", f"so {Colours.texts[n % 3]}") if captions and n else ()
            yield Example(f"plain {n}", image, n % 3, said)

    return Examples("plain", read, count, Colours.texts)


def test_two_towers_are_asked_in_batches(monkeypatch):
    monkeypatch.setattr("evals.encoder.battery._TEXTS", 4)
    out = measure_towers(Colours(), _plain(10), torch.eye(3), HOW)
    assert out.scores["zero-shot/top-1"].mean == out.scores["zero-shot/class mean"].mean == 1.0
    assert out.scores["retrieval/text_to_image@1"].mean == 1.0
    assert out.scores["retrieval/image_to_text@1"].mean == 1.0
    assert out.facts["retrieval"] == "9 images, 18 captions, 6 of them different"
    assert {one.predicted["zero-shot"] - one.label for one in out.shown.values()} == {0}
    wrong = measure_towers(Colours(), _plain(10), torch.eye(3).roll(1, 0), replace(HOW, probes=("zero-shot",)))
    assert wrong.scores["zero-shot/top-1"].mean == 0.0
    with pytest.raises(ValueError, match="plain: no image has a caption"):
        measure_towers(Colours(), _plain(3, captions=False), None, replace(HOW, probes=("retrieval",)))
    with pytest.raises(ValueError, match="names of their classes"):
        measure_towers(Colours(), _plain(3), None, replace(HOW, probes=("zero-shot",)))


def test_towers_that_break_name_the_image():
    class Broken(Colours):
        def embed_images(self, images):
            return super().embed_images(images).index_fill(0, torch.tensor([2]), float("nan"))

    with pytest.raises(ValueError, match="plain 2: its embedding is not finite"):
        measure_towers(Broken(), _plain(5), torch.eye(3), HOW)


def test_the_table_is_aligned_and_the_page_stands_alone(encoder, sets):
    a = measure(encoder, GEOMETRY, *sets, replace(HOW, probes=("knn", "dense")))
    b = measure(encoder, GEOMETRY, *sets, replace(HOW, probes=("knn",)))
    results = {"first": {"scenes": a}, "<b>second</b>": {"scenes": b}}
    rows = score_table(results).splitlines()
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 1 + len(a.scores)
    assert rows[-1].endswith(" -")  # the second was not asked
    page = render(results, {"scenes": ("one", "two")}, {"data": "<i>x</i>"})
    assert "<b>second" not in page
    assert "<i>x" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert page.count("<img ") >= 4 * 5  # image, two maps, two predictions


def test_maps_are_painted():
    colours = painted(np.array([[-1, 0, 1, 12]]))
    assert colours[0, 0].tolist() == [255, 255, 255]
    assert (colours[0, 1] == colours[0, 3]).all()
    assert (colours[0, 1] != colours[0, 2]).any()
    shades = shaded(np.array([[np.nan, 0.0, 9.0, 99.0]]), (0.0, 9.0))
    assert shades[0].tolist() == [[255, 255, 255], [250, 225, 60], [60, 30, 90], [60, 30, 90]]
