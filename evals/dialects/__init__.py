"""Action styles of other houses, by name: ``python -m evals ... --style NAME``."""

from __future__ import annotations

from collections.abc import Mapping

from evals.dialects.base import CENTRE, Dialect, Turn, look, moved
from evals.dialects.glm import Glm
from evals.dialects.glm_phone import GlmPhone
from evals.dialects.tools import Anthropic, OpenAI, Qwen, QwenPhone
from evals.dialects.ui_tars import UiTars, UiTarsPhone

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
PHONE_STYLES: Mapping[str, Dialect] = {
    style.name: style
    for style in (
        UiTarsPhone("ui-tars", pixels=False),
        UiTarsPhone("ui-tars-1.5", pixels=True),
        GlmPhone(),
        QwenPhone("qwen2.5-vl", pixels=True),
        QwenPhone("qwen3-vl", pixels=False),
    )
}
"""The same houses' styles for phones, where actions are others; of the same version as for computers."""
NO_PHONE = {
    "openai": "OpenAI's computer tool knows windows, mac, linux, ubuntu and browser, a mouse and a keyboard",
    "anthropic": "Anthropic's computer tool is for a desktop with a mouse and a keyboard",
}
"""Houses that publish no actions of a phone, and what they publish."""


def style_of(name: str, phone: bool) -> Dialect:
    """The style ``name`` for a computer or a phone. Raises ``ValueError`` for a house that has none for phones: what a
    model may do there it would neither be told nor have learnt."""
    if not phone:
        return STYLES[name]
    if name not in PHONE_STYLES:
        raise ValueError(
            f"style {name} has no actions of a phone: its house publishes none ({NO_PHONE[name]}). Those of "
            f"{', '.join(PHONE_STYLES)} have, and without --style a model is told ours"
        )
    return PHONE_STYLES[name]


__all__ = ["CENTRE", "NO_PHONE", "PHONE_STYLES", "STYLES", "Dialect", "Turn", "look", "moved", "style_of"]
