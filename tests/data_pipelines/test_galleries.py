"""Built-in galleries: the train split of every drawn world, and classes of one numbering whatever is mixed."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.galleries import CLASSES, built_in
from mmagent.worlds.charts import CHARTS, PARTS, draw_chart
from mmagent.worlds.digits import DIGITS, draw_digit
from mmagent.worlds.icons import ICONS, draw_icon
from mmagent.worlds.images import MATERIALS, PHOTO_KINDS, SHAPES, crop_photo, draw_panel, draw_scene

DRAWN = {"scenes": draw_scene, "panels": draw_panel, "charts": draw_chart, "icons": draw_icon, "digits": draw_digit}
DRAWN |= {kind: lambda seed, split, size, kind=kind: crop_photo(seed, kind, split, size) for kind in PHOTO_KINDS}


@pytest.mark.parametrize("name", DRAWN)
def test_a_gallery_shows_the_train_split_of_its_world(name):
    gallery = built_in({name: 1.0}, side=56)
    for position in range(5):
        picture, drawn = gallery(position), DRAWN[name](position, "train", (56, 56))
        assert np.array_equal(picture.image, drawn.image)
        assert picture.caption == drawn.caption
        assert not np.array_equal(picture.image, DRAWN[name](position, "test", (56, 56)).image)
    assert built_in({name: 1.0})(0).image.shape != (56, 56, 3)
    prints = {built_in({name: 1.0}, side, classes).fingerprint() for side in (0, 56) for classes in CLASSES}
    assert len(prints) == 2 * len(CLASSES)


def test_galleries_have_keys_of_their_own():
    pictures = built_in(dict.fromkeys(DRAWN, 1.0), side=56)
    keys = [pictures(position).key for position in range(3 * len(DRAWN))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("classes", CLASSES)
def test_classes_stay_below_their_number(classes):
    known = set()
    for name in DRAWN:
        gallery = built_in({name: 1.0}, 112, classes)
        for position in range(200 if name == "icons" else 40):
            truth = gallery(position).classes
            assert truth is None or truth.shape == (112, 112)
            known |= set() if truth is None else set(np.unique(truth).tolist())
    assert known <= set(range(CLASSES[classes]))
    assert len(known) >= 0.9 * CLASSES[classes]  # of 200 icons one of 47 may be missing


def test_things_are_numbered_one_after_another():
    things = {n: built_in({n: 1.0}, 112, "things") for n in ("scenes0", "icons", "digits", "charts", "natural")}
    for position in range(30):
        shape = draw_scene(position, size=(112, 112), level=0).shape
        icon, digit = draw_icon(position, size=(112, 112)), draw_digit(position, size=(112, 112))
        expected = {
            "scenes0": 1 + shape,
            "icons": 1 + len(SHAPES) + icon.icon,
            "digits": 1 + len(SHAPES) + len(ICONS) + digit.digit,
            "charts": 1 + len(SHAPES) + len(ICONS) + len(DIGITS) + draw_chart(position, size=(112, 112)).kind,
        }
        for name, number in expected.items():
            assert set(np.unique(things[name](position).classes)) == {0, number}
        assert (things["icons"](position).classes[icon.inside] > 0).all()
        assert things["natural"](position).classes is None
    assert CLASSES["things"] == 1 + len(SHAPES) + len(ICONS) + len(DIGITS) + len(CHARTS)


def test_surfaces_are_materials_and_then_parts_of_charts():
    surfaces = {n: built_in({n: 1.0}, 112, "surfaces") for n in ("scenes", "charts", "icons")}
    for position in range(10):
        assert np.array_equal(surfaces["scenes"](position).classes, draw_scene(position, size=(112, 112)).materials)
        chart, known = draw_chart(position, size=(112, 112)), surfaces["charts"](position).classes
        assert (known[chart.parts == PARTS.index("mark")] == len(MATERIALS) + 2).all()
        assert set(np.unique(known)) <= {0, *range(len(MATERIALS), len(MATERIALS) + 3)}
        assert surfaces["icons"](position).classes is None


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="unknown galleries \\['graphs'\\]"):
        built_in({"graphs": 1.0})
    with pytest.raises(ValueError, match="classes 'colours' are none of materials, shapes"):
        built_in({"scenes": 1.0}, classes="colours")
