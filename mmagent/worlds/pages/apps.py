"""Small programs in pages: scripts that really work, a goal in words, the steps of an expert, and what must then hold.

A page keeps what was done in its ``state``; whether the goal is reached is asked of that, not of how it was reached.
:mod:`mmagent.worlds.traces` plays the steps with a mouse and a keyboard and believes none that it did not see work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmagent.worlds.pages.kit import Kit

Kind = Literal["click", "double_click", "right_click", "drag", "type", "key", "hotkey", "scroll"]


@dataclass(frozen=True)
class Step:
    """What an expert does. ``at``: CSS selector of what the mouse acts on, at ``spot`` (shares of its width and height)
    or, where that is None, wherever a click reaches it. ``to``: where a drag ends, or what a scroll brings into sight.
    ``text``: what is typed, or the key or keys."""

    kind: Kind
    at: str = ""
    to: str = ""
    text: str = ""
    spot: tuple[float, float] | None = None
    end: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """What a kind of app makes of a kit: the ``body`` of the page, its ``script``, the ``goal`` in words, the ``steps``
    that lead there, and the ``wanted`` values of JavaScript expressions once it is reached."""

    body: str
    script: str
    goal: str
    steps: tuple[Step, ...]
    wanted: Mapping[str, Any]


@dataclass(frozen=True)
class App:
    """A page with a script for ``width`` x ``height`` pixels, and how to use it."""

    html: str
    width: int
    height: int
    kind: str
    difficulty: int
    seed: int
    spoken: str
    goal: str
    steps: tuple[Step, ...]
    wanted: Mapping[str, Any]


Maker = Callable[[Kit], Plan]


def data(value: Any) -> str:
    """A JavaScript literal that cannot end its script."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")
