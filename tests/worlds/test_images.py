"""Seeded pictures: the same forever, truth that fits the pixels, splits that do not overlap."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmagent.worlds import drawing, images
from mmagent.worlds.images import COLOURS, MATERIALS, PHOTO_KINDS, PLACES, SHAPES, crop_photo, draw_panel, draw_scene


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
        held_out = {zlib.crc32(draw(seed, "validation").image.tobytes()) for seed in range(50)}
        assert not train & test
        assert not held_out & (train | test)
    with pytest.raises(ValueError, match="'dev' is none of"):
        draw_scene(0, "dev")


def test_splits_never_share_a_pixel_of_a_photograph(monkeypatch):
    photo = np.zeros((301, 400, 3), dtype=np.uint8)
    photo[:, :266, 0] = photo[:150, 266:, 1] = photo[150:, 266:, 2] = 200
    monkeypatch.setattr(images, "_photo", lambda package, name: photo)
    for split, channel in (("train", 0), ("validation", 1), ("test", 2)):
        for seed in range(60):
            seen = crop_photo(seed, "natural", split, (64, 48)).image
            assert (seen == 200 * (np.arange(3) == channel)).all()


def test_maps_fit_the_picture_and_the_words():
    seen_shapes, seen_materials = set(), set()
    for seed in range(80):
        scene = draw_scene(seed, level=2)
        assert scene.image.shape == (*scene.shapes.shape, 3)
        assert scene.materials.shape == scene.shapes.shape
        named = {1 + n for n, name in enumerate(SHAPES) if name in scene.caption}
        assert set(np.unique(scene.shapes)) - {0} <= named  # a shape may hide behind another
        main = f"{list(COLOURS)[scene.colour]} {SHAPES[scene.shape]} in the {PLACES[scene.place]}"
        assert scene.caption.split(",")[0].split(" ", 1)[1] == main
        assert not any(f" {material} " in scene.caption for material in MATERIALS)
        seen_shapes |= set(np.unique(scene.shapes))
        seen_materials |= set(np.unique(scene.materials))
    assert seen_shapes == set(range(len(SHAPES) + 1))
    assert seen_materials == set(range(len(MATERIALS)))


def test_a_plain_shape_has_the_colour_its_caption_names():
    checked = 0
    for seed in range(60):
        scene = draw_scene(seed, size=(120, 120), level=1)
        plain = (scene.shapes > 0) & (scene.materials == 0)
        if scene.caption.count(" in the ") == 1 and plain.any():
            colour = scene.caption.split()[1]
            mean = scene.image[plain].mean(axis=0)
            assert np.abs(mean - COLOURS[colour]).max() < 12
            checked += 1
    assert checked > 3


def test_levels_grade_the_difficulty():
    for seed in range(20):
        easy, hard = draw_scene(seed, level=0), draw_scene(seed, level=2)
        assert set(np.unique(easy.materials)) == {0}
        assert len(np.unique(easy.shapes)) == 2
        assert easy.caption.count(" in the ") == 1
        assert hard.caption.count(" in the ") <= 3
    with pytest.raises(ValueError, match="levels 0 to 2"):
        draw_scene(0, level=3)


def test_sizes_are_what_was_asked_for():
    assert draw_scene(0, size=(50, 200)).image.shape == (50, 200, 3)
    assert draw_panel(0, size=(64, 150)).image.shape == (64, 150, 3)
    for kind in PHOTO_KINDS:
        assert crop_photo(0, kind, size=(70, 90)).image.shape == (70, 90, 3)
    with pytest.raises(ValueError, match="at most 512x512"):
        draw_scene(0, size=(600, 100))
    with pytest.raises(ValueError, match="modern"):
        crop_photo(0, "modern")


def test_many_threads_load_a_photograph_once(monkeypatch):
    """Eight makers start at once; without a lock each of them would load and decode every photograph."""
    opened = []
    real = images.Image.open
    monkeypatch.setattr(images.Image, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest))
    fresh = drawing.once(images._photo.__wrapped__)
    with ThreadPoolExecutor(8) as threads:
        photos = list(threads.map(lambda _: fresh("sklearn", "flower.jpg"), range(8)))
    assert len(opened) == 1
    assert all(photo is photos[0] for photo in photos)
