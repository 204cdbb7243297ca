"""Classes by name: the mean over templates and names, and templates that have a place for the name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmagent.interop.image_text import ImageTextModel
from mmagent.interop.zero_shot import CHINESE, ENGLISH, PLAIN, class_embeddings, load_templates


class Letters(ImageTextModel):
    """A text is how often each of 26 letters stands in it; longer texts reach farther."""

    width, logit_scale, logit_bias = 26, 1.0, 0.0

    def _prepare_text(self, text):
        return text, len(text)

    def _read(self, texts):
        return torch.stack([torch.tensor([1.0 * t.count(chr(97 + n)) for n in range(26)]) for t in texts])

    def _prepare_image(self, image: np.ndarray):
        raise AssertionError

    def _look(self, images):
        raise AssertionError


def unit(text: str) -> torch.Tensor:
    return F.normalize(Letters()._read([text])[0], dim=0)


def test_a_class_is_the_mean_of_its_names_in_all_templates():
    templates = ("a picture of {}", "{}")
    found = class_embeddings(Letters(), ["cat", ("dog", "hound")], templates)
    cat = unit("a picture of cat") + unit("cat")
    dog = sum(unit(t.replace("{}", name)) for name in ("dog", "hound") for t in templates)
    torch.testing.assert_close(found, torch.stack([F.normalize(cat, dim=0), F.normalize(dog, dim=0)]))


def test_names_may_hold_braces():
    torch.testing.assert_close(class_embeddings(Letters(), ["{0} x"], ["{} b"])[0], unit("{0} x b"))


@pytest.mark.parametrize("templates", [PLAIN, ENGLISH, CHINESE])
def test_built_in_templates_have_one_place_and_differ(templates):
    assert all(template.count("{}") == 1 for template in templates)
    assert len(set(templates)) == len(templates)


def test_languages_do_not_mix():
    assert all(template.isascii() for template in ENGLISH)
    assert not any(letter.isascii() and letter.isalpha() for template in CHINESE for letter in template)


def test_templates_come_from_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("\ufeffa photo of {}.\n\n  一张{}的照片\n", encoding="utf-8")
    assert load_templates(path) == ("a photo of {}.", "一张{}的照片")


def test_templates_without_a_place_are_named(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a photo of {}.\n\na photo of it\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"templates.txt, line 3: no \{\} in 'a photo of it'"):
        load_templates(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no template"):
        load_templates(path)
    with pytest.raises(ValueError, match="no templates at"):
        load_templates(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("names", "templates", "said"),
    [
        (["cat"], [], "nothing to embed"),
        ([], ["{}"], "nothing to embed"),
        (["cat"], ["{}", "it"], "'it' has no"),
        (["cat", []], ["{}"], "class 1 has no name"),
        (["cat", ["dog", " "]], ["{}"], "class 1 has no name, or an empty one"),
    ],
)
def test_classes_and_templates_are_checked(names, templates, said):
    with pytest.raises(ValueError, match=said):
        class_embeddings(Letters(), names, templates)
