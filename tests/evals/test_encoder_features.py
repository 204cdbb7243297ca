"""Features are those of each image alone, whatever the packs; what goes wrong names the image."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from evals.encoder.features import ahead, extract, stream_features
from mmagent.geometry import GeometryConfig, patchify
from mmagent.models.cogvit import CogViT, cogvit_debug
from mmagent.types import PackedVision


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return CogViT(cogvit_debug())


@pytest.fixture(scope="module")
def geometry(encoder):
    return GeometryConfig(patch_size=encoder.patch_size, merge_size=encoder.merge_size, min_tokens=1)


def _images(count: int = 7) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (28 * (1 + n % 3), 28 * (1 + n % 2), 3), dtype=np.uint8) for n in range(count)]


@pytest.mark.parametrize("budget", [1, 13, 4096])
def test_features_do_not_depend_on_the_packs(encoder, geometry, budget):
    images = _images()
    encoder.train()
    got = extract(encoder, iter(images), geometry, budget)
    assert encoder.training  # as it was before
    encoder.eval()
    at = 0
    for n, image in enumerate(images):
        patched = patchify(image, geometry)
        with torch.no_grad():
            alone = encoder(PackedVision.pack([patched]))
        count = len(patched.patches)
        # sums of fp32 products in another order
        torch.testing.assert_close(got.pooled[n], alone.pooled[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.tokens[at : at + count], alone.tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.means[n], alone.tokens.mean(dim=0), atol=1e-4, rtol=1e-4)
        assert tuple(got.grids[n].tolist()) == patched.grid
        at += count
    assert at == len(got.tokens)
    assert got.whole("both").shape == (7, got.pooled.shape[1] + got.means.shape[1])
    assert torch.equal(got.whole("mean"), got.means)


def test_patches_are_left_out_and_halved_precision_is_near(encoder, geometry):
    whole = extract(encoder, _images(), geometry)
    lean = extract(encoder, _images(), geometry, tokens=False)
    assert lean.tokens.shape == (0, encoder.width)
    assert torch.equal(lean.means, whole.means)
    half = extract(encoder, _images(), geometry, dtype=torch.bfloat16)
    assert half.pooled.dtype == torch.float32
    likeness = torch.cosine_similarity(half.pooled, whole.pooled, dim=1)
    assert likeness.min() > 0.99  # eight bits of mantissa through a few layers
    assert not torch.equal(half.pooled, whole.pooled)


def test_images_are_asked_for_as_they_are_needed(encoder, geometry):
    asked = []

    def images():
        for n, image in enumerate(_images(40)):
            asked.append(n)
            yield f"image {n}", image

    stream = stream_features(encoder, images(), geometry, patches_per_pack=24)
    assert next(stream).name == "image 0"
    assert len(asked) < 12


def test_what_goes_wrong_names_the_image(encoder, geometry):
    with pytest.raises(ValueError, match="no image"):
        extract(encoder, [], geometry)
    odd = [*_images(2), np.zeros((1, 900, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"wide\.png: .*aspect"):
        extract(encoder, odd, geometry, names=["a.png", "b.png", "wide.png"])

    class Broken(CogViT):
        def forward(self, vision, layers=(), **more):
            features = super().forward(vision, layers, **more)
            features.pooled[-1, 0] = float("nan")
            return features

    with pytest.raises(ValueError, match="image 2: the encoder's features are not finite"):
        extract(Broken(cogvit_debug()), _images(3), geometry)
    with pytest.raises(ValueError, match="patches_per_pack"):
        extract(encoder, _images(), geometry, 0)


def test_progress_is_silent_when_quick_and_tells_the_time_left_when_slow(encoder, geometry, capsys, monkeypatch):
    extract(encoder, _images(3), geometry, progress="features")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("evals.encoder.features._QUIET", 0.01)

    def slow():
        for image in _images(12):
            time.sleep(0.03)
            yield "x", image

    list(stream_features(encoder, slow(), geometry, 8, progress="features", total=12))
    err = capsys.readouterr().err
    assert "features" in err
    assert "<00:" in err  # time left


def test_reading_ahead_keeps_the_order_and_a_bound():
    started = []
    lock = threading.Lock()

    def make(n: int) -> int:
        with lock:
            started.append(n)
        time.sleep(0.002 * (n % 3))
        if n == 30:
            raise ValueError("thirty")
        return n * n

    stream = ahead(make, range(1000), workers=3)
    for n in range(10):
        assert next(stream) == n * n
        assert len(started) <= n + 8
    with pytest.raises(ValueError, match="thirty"):
        list(stream)
    assert list(ahead(str, [], 2)) == []
