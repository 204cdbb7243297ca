"""The stand-in teachers' configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_pipelines.galleries import CLASSES, built_in
from mmagent.config import ConfigError
from mmagent.objectives.reconstruction import ReconstructionConfig
from recipes.teachers import dinov3, siglip2


@pytest.mark.parametrize("preset", [siglip2, dinov3])
def test_a_classifier_has_as_many_classes_as_the_pictures(preset):
    config = preset()
    assert built_in(config.mix, config.side, config.classes)(0).classes.max() < CLASSES[config.classes]
    for classes in ("things", "", "colours"):
        with pytest.raises(ConfigError, match=f"classes '{classes}' has {CLASSES.get(classes)} classes, the objective"):
            replace(config, classes=classes)
    replace(dinov3(), classes="surfaces", reconstruction=ReconstructionConfig(classes=CLASSES["surfaces"]))
