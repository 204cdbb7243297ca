"""Visual embeddings kept by what the images show."""

from __future__ import annotations

import gc

import pytest
import torch

from mmagent.generation.features import ImageFeatures, chunks
from mmagent.generation.generator import Generator, GeneratorConfig
from mmagent.trajectories import Limits
from mmagent.types import PatchedImage
from tests.agent_kit import picture, prompt, tiny_model, tiny_vocab


def again(image: PatchedImage, **changes: object) -> PatchedImage:
    """Another object."""
    fields = {"patches": image.patches.clone(), "grid": image.grid, "view": image.view}
    return PatchedImage(**(fields | changes))


def test_keys_are_of_pixels_and_grid_and_nothing_else():
    features = ImageFeatures(tiny_model(), 64, 64)
    image = picture(1, 56, 84)
    frames, rows, cols = image.grid
    other = image.patches.clone()
    other[-1, -1] += 1e-6
    different = [
        again(image, grid=(frames, cols, rows)),
        again(image, grid=(2, rows // 2, cols)),
        again(image, patches=other),
        again(image, patches=image.patches.bfloat16()),
        picture(2, 56, 84),
    ]
    assert features.key(again(image)) == features.key(image) == features.key(image)
    assert len({features.key(x) for x in (image, *different)}) == 1 + len(different)
    cut = image.patches.repeat(2, 1)[: len(image.patches)]  # a view into more memory
    assert features.key(again(image, patches=cut)) == features.key(image)
    assert features.key(again(image, patches=image.patches.t().contiguous().t())) == features.key(image)


def test_what_was_read_is_forgotten_with_its_object():
    features = ImageFeatures(tiny_model(), 64, 64)
    keys = {features.key(picture(n, 56, 56)) for n in range(20)}  # their ids may be the same, one after the other
    gc.collect()
    assert len(keys) == 20
    assert not features._keys


def test_an_image_is_encoded_once_whoever_brings_it():
    model = tiny_model()
    features = ImageFeatures(model, 5, 64)
    a, b, wide = picture(1, 56, 56), picture(2, 56, 56), picture(3, 56, 84)
    with torch.inference_mode():
        first = features.encode([a, wide, again(a), b])
        assert features.encoded == 3
        alone = [ImageFeatures(model, 64, 0).encode([image])[0] for image in (a, wide, a, b)]
        for got, want in zip(first, alone, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, features.encode([again(b), a]), (first[3], first[0])))
        assert features.encoded == 3
        features.forget()
        features.encode([a])
    assert features.encoded == 4


def test_the_longest_unused_go_and_no_more_is_held_than_was_said():
    features = ImageFeatures(tiny_model(), 64, 12)
    images = [picture(n, 56, 56) for n in range(5)]  # of 4 tokens
    with torch.inference_mode():
        features.encode(images[:3])
        features.encode([images[0]])
        features.encode([images[3]])  # in place of the second
        assert list(features._kept) == [features.key(images[n]) for n in (2, 0, 3)]
        assert features.encoded == 4
        got = features.encode(images)  # more than may be kept: they are there while they are needed
        assert [len(tokens) for tokens in got] == [4] * 5
        assert sum(len(tokens) for tokens in features._kept.values()) == 12
        features.encode([picture(9, 112, 112)])  # more than may be kept by itself
    assert not features._kept


def test_what_is_kept_holds_no_memory_of_what_is_not():
    features = ImageFeatures(tiny_model(), 64, 4)
    with torch.inference_mode():
        features.encode([picture(n, 56, 56) for n in range(8)])
    (kept,) = features._kept.values()
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_what_is_not_finite_is_not_kept():
    model = tiny_model()
    features = ImageFeatures(model, 64, 64)
    sound = picture(1, 56, 56)
    sick = again(sound, patches=torch.full_like(sound.patches, float("nan")))
    with torch.inference_mode():
        good, bad = features.encode([sound, sick])
        assert good.isfinite().all()
        assert not bad.isfinite().any()
        assert list(features._kept) == [features.key(sound)]
        features.encode([sick])
    assert features.encoded == 3


@pytest.mark.parametrize(("feature_tokens", "encodings"), [(64, 2), (0, 0)])
def test_prompts_in_pieces_cut_images_anywhere(feature_tokens, encodings):
    model = tiny_model().double()
    images = (picture(1), picture(2, 56, 84))  # of 12 and 6 tokens
    row, limits = prompt("click", images), Limits(5, 1.0, seed=1)
    (whole,) = Generator(model, tiny_vocab()).generate([(row, limits)])
    for size in (1, 2, 5, 7, 13):
        generator = Generator(model, tiny_vocab(), GeneratorConfig(prefill_tokens=size, feature_tokens=feature_tokens))
        (got,) = generator.generate([(row, limits)])
        assert got.ids == whole.ids
        assert got.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
        assert not encodings or generator.features.encoded == encodings


def test_chunks_are_of_at_most_the_budget_but_never_empty():
    assert list(chunks([3, 4, 9, 1, 1, 5], lambda n: n, 7)) == [[3, 4], [9], [1, 1, 5]]
    assert list(chunks([], lambda n: n, 7)) == []
