"""Handwritten digits: no handwriting is in two splits, and a picture shows what it is labelled as."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mmagent.worlds import digits
from mmagent.worlds.digits import DIGITS, draw_digit, handwriting
from mmagent.worlds.drawing import COLOURS


def test_splits_share_no_handwriting_and_leave_none_out():
    bunch = load_digits()
    rows = {s: [image.tobytes() for image in handwriting(s)[0]] for s in ("train", "test", "validation")}
    assert [len(rows[s]) for s in rows] == [697, 1000, 100]
    together = [row for part in rows.values() for row in part]
    assert sorted(together) == sorted(image.tobytes() for image in bunch.images)
    assert len(set(together)) == 1797  # no digit is there twice, so none can be in two splits
    label = {image.tobytes(): digit for image, digit in zip(bunch.images, bunch.target, strict=True)}
    images, known = handwriting("train")
    assert [label[image.tobytes()] for image in images] == known.tolist()
    with pytest.raises(ValueError, match="'dev' is none of"):
        handwriting("dev")


def test_a_seed_gives_the_same_digit_for_ever():
    one, two = draw_digit(3), draw_digit(3)
    assert np.array_equal(one.image, two.image)
    assert one.caption == two.caption
    assert not np.array_equal(one.image, draw_digit(3, "test").image)
    with pytest.raises(ValueError, match="'dev' is none of"):
        draw_digit(0, "dev")


def test_a_picture_shows_the_digit_it_is_labelled_as(monkeypatch):
    """Made-up handwriting: digit d inks d + 1 of 8 columns, so that the ink's width over its height tells it."""
    known = np.arange(1797) % 8
    images = np.zeros((1797, 8, 8))
    for digit in range(8):
        images[known == digit, :, : digit + 1] = 16
    monkeypatch.setattr(digits, "_written", lambda: (images, known, np.arange(1797)))
    seen = set()
    for seed in range(60):
        digit = draw_digit(seed, size=(112, 140))
        rows, columns = np.flatnonzero(digit.inside.any(axis=1)), np.flatnonzero(digit.inside.any(axis=0))
        share = (columns.max() - columns.min() + 1) / (rows.max() - rows.min() + 1)
        assert round(8 * share) == digit.digit + 1
        assert f"the digit {DIGITS[digit.digit]} " in digit.caption
        seen.add(digit.digit)
    assert seen == set(range(8))


def test_ink_and_ground_have_the_colours_that_are_named():
    names = list(COLOURS)
    for seed in range(40):
        digit = draw_digit(seed, "test", (112, 112))
        assert digit.caption.split(" in ")[1].startswith(f"{names[digit.colour]} on ")
        assert digit.caption.endswith(f"{names[digit.ground]} ground")
        paper = np.median(digit.image.reshape(-1, 3), axis=0)  # handwriting covers less than half of a picture
        assert np.abs(paper - COLOURS[names[digit.ground]]).max() < 30  # a large digit's blur reaches far
        ink, paint = digit.image[digit.inside].mean(axis=0), np.asarray(COLOURS[names[digit.colour]])
        assert np.linalg.norm(ink - paint) < np.linalg.norm(ink - paper)  # blurred, but nearer to the ink


def test_sizes_are_what_was_asked_for():
    for size in ((28, 28), (40, 200), (224, 160)):
        assert draw_digit(1, size=size).image.shape == (*size, 3)
        assert draw_digit(1, size=size).inside.shape == size
