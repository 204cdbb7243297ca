"""Seeded pictures: the same forever, truth that fits the pixels, splits that do not overlap."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from mmagent.worlds.images import COLOURS, MATERIALS, PHOTO_KINDS, SHAPES, crop_photo, draw_panel, draw_scene


def test_a_seed_gives_the_same_picture_for_ever():
    for draw in (draw_scene, draw_panel, lambda seed: crop_photo(seed, "natural")):
        one, two = draw(3), draw(3)
        assert np.array_equal(one.image, two.image)
        assert one.caption == two.caption
        assert not np.array_equal(one.image, draw(4).image)


def test_splits_never_share_a_picture():
    for draw in (draw_scene, draw_panel, lambda seed, split: crop_photo(seed, "scientific", split)):
        train = {zlib.crc32(draw(seed, "train").image.tobytes()) for seed in range(50)}
        test = {zlib.crc32(draw(seed, "test").image.tobytes()) for seed in range(50)}
        assert not train & test
    with pytest.raises(ValueError, match="validation"):
        draw_scene(0, "validation")


def test_maps_fit_the_picture_and_the_words():
    seen_shapes, seen_materials = set(), set()
    for seed in range(80):
        scene = draw_scene(seed)
        assert scene.image.shape == (*scene.shapes.shape, 3)
        assert scene.materials.shape == scene.shapes.shape
        named = {1 + n for n, name in enumerate(SHAPES) if name in scene.caption}
        assert set(np.unique(scene.shapes)) - {0} <= named  # a shape may hide behind another
        assert SHAPES[scene.label] in scene.caption.split(" in the ")[0]
        assert not any(f" {material} " in scene.caption for material in MATERIALS)
        seen_shapes |= set(np.unique(scene.shapes))
        seen_materials |= set(np.unique(scene.materials))
    assert seen_shapes == set(range(len(SHAPES) + 1))
    assert seen_materials == set(range(len(MATERIALS)))


def test_a_plain_shape_has_the_colour_its_caption_names():
    checked = 0
    for seed in range(200):
        scene = draw_scene(seed, size=(120, 120))
        plain = (scene.shapes > 0) & (scene.materials == 0)
        if scene.caption.count(" in the ") == 1 and plain.any():
            colour = scene.caption.split()[1]
            mean = scene.image[plain].mean(axis=0)
            assert np.abs(mean - COLOURS[colour]).max() < 12
            checked += 1
    assert checked > 3


def test_sizes_are_what_was_asked_for():
    assert draw_scene(0, size=(50, 200)).image.shape == (50, 200, 3)
    assert draw_panel(0, size=(64, 150)).image.shape == (64, 150, 3)
    for kind in PHOTO_KINDS:
        assert crop_photo(0, kind, size=(70, 90)).image.shape == (70, 90, 3)
    with pytest.raises(ValueError, match="at most 512x512"):
        draw_scene(0, size=(600, 100))
    with pytest.raises(ValueError, match="modern"):
        crop_photo(0, "modern")
