"""Action styles of other houses, by name: ``python -m evals ... --style NAME``."""

from __future__ import annotations

from collections.abc import Mapping

from evals.dialects.base import CENTRE, Dialect, Turn, look, moved
from evals.dialects.glm import Glm
from evals.dialects.tools import Anthropic, OpenAI, Qwen
from evals.dialects.ui_tars import UiTars

STYLES: Mapping[str, Dialect] = {
    style.name: style
    for style in (
        UiTars("ui-tars", pixels=False),
        UiTars("ui-tars-1.5", pixels=True),
        Glm(),
        Qwen("qwen2.5-vl", pixels=True),
        Qwen("qwen3-vl", pixels=False),
        OpenAI(),
        Anthropic(),
    )
}

__all__ = ["CENTRE", "STYLES", "Dialect", "Turn", "look", "moved"]
