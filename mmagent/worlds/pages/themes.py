"""How pages look: colours, drawn from a hue or taken from a palette that a designer would have made."""

from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass

READABLE = 3.2
"""Least contrast of links and buttons against the page."""
FONTS = (
    "Arial",
    "sans-serif",
    "Georgia,serif",
    "Verdana,sans-serif",
    "monospace",
    "Times New Roman,serif",
    "system-ui",
    "DejaVu Sans,sans-serif",
    "DejaVu Serif,serif",
    "Liberation Sans Narrow,Arial Narrow,sans-serif",
    "Courier New,monospace",
)
PLAIN_FONTS = FONTS[:2]


@dataclass(frozen=True)
class Theme:
    """Colours as ``#rrggbb``."""

    dark: bool
    ground: str
    surface: str
    text: str
    muted: str
    accent: str
    on_accent: str
    border: str


PALETTES = {
    "paper": Theme(False, "#faf7f0", "#ffffff", "#2b2620", "#7a7062", "#a3481d", "#ffffff", "#ddd4c4"),
    "office": Theme(False, "#f3f2f1", "#ffffff", "#201f1e", "#605e5c", "#0b5cab", "#ffffff", "#c8c6c4"),
    "market": Theme(False, "#ffffff", "#f7f7f7", "#222222", "#6a6a6a", "#d6303f", "#ffffff", "#dddddd"),
    "meadow": Theme(False, "#f4faf4", "#ffffff", "#15301d", "#5b7361", "#1b7a3d", "#ffffff", "#cfe3d3"),
    "lilac": Theme(False, "#f7f4fc", "#ffffff", "#251b38", "#6f6485", "#6a3fb5", "#ffffff", "#ddd3ee"),
    "newsprint": Theme(False, "#ffffff", "#ffffff", "#000000", "#555555", "#000000", "#ffffff", "#000000"),
    "coast": Theme(False, "#eef6f8", "#ffffff", "#12303a", "#567480", "#087184", "#ffffff", "#c5dde3"),
    "candy": Theme(False, "#fff5f8", "#ffffff", "#3b1525", "#8a5a6d", "#c21f66", "#ffffff", "#f3cfdc"),
    "grid": Theme(False, "#e8eaed", "#f8f9fa", "#202124", "#5f6368", "#1967d2", "#ffffff", "#bdc1c6"),
    "night": Theme(True, "#121417", "#1d2126", "#e8eaed", "#9aa0a6", "#7cb0ff", "#0b1220", "#3a4047"),
    "console": Theme(True, "#0c0f0c", "#141a14", "#d6f5d6", "#7fa87f", "#43d17a", "#04140a", "#2b3a2b"),
    "plum": Theme(True, "#1d1626", "#2a2036", "#f0e8f8", "#ab9bbd", "#c792ea", "#1b1024", "#463757"),
    "ember": Theme(True, "#1b1512", "#281f1a", "#f6eae2", "#b29c8e", "#ff9a52", "#1f0f05", "#4a3a30"),
    "deep": Theme(True, "#0d1b2a", "#1b2b3d", "#eaf2f8", "#93a9bd", "#4fc3f7", "#06202c", "#33475c"),
}


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb``, 0..1 (WCAG 2, without its linear foot)."""
    red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1..21 (WCAG 2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def from_hue(hue: float, lightness: float, saturation: float) -> str:
    """``#rrggbb`` of a hue in turns, and the other two in 0..1."""
    return "#" + "".join(f"{round(255 * v):02x}" for v in colorsys.hls_to_rgb(hue % 1, lightness, saturation))


def make_theme(rng: random.Random, difficulty: int) -> Theme:
    """Light or dark, plain, tinted or of a palette; the higher the difficulty, the more often dark and the weaker the
    contrast."""
    dark = rng.random() < (0.0, 0.15, 0.25, 0.35, 0.4)[difficulty - 1]
    if rng.random() < 0.5:
        return rng.choice([theme for theme in PALETTES.values() if theme.dark == dark])
    return _tinted(rng, difficulty, dark)


def _tinted(rng: random.Random, difficulty: int, dark: bool) -> Theme:
    hue, tint = rng.random(), rng.choice((0.0, 0.0, 0.1, 0.35))
    fade = 0.04 * (difficulty - 1)
    dark_ground = rng.uniform(0.06, 0.16)
    accent_hue, accent_light, strength = hue + rng.choice((0, 0.33, 0.5, rng.random())), 0.4, rng.uniform(0.5, 1)
    light = rng.choice((1.0, 1.0, 0.97, 0.94, 0.9))
    ground = from_hue(hue, dark_ground if dark else light, tint)
    while contrast(accent := from_hue(accent_hue, accent_light, strength), ground) < READABLE:
        accent_light += 0.04 if dark else -0.04
    on_accent = "#ffffff" if luminance(accent) < 0.35 else "#111111"
    if dark:
        return Theme(
            dark=True,
            ground=ground,
            surface=from_hue(hue, dark_ground + 0.07, tint),
            text=from_hue(hue, 0.93 - fade, tint),
            muted=from_hue(hue, 0.66 - 0.6 * fade, tint),
            accent=accent,
            on_accent=on_accent,
            border=from_hue(hue, dark_ground + 0.2, tint),
        )
    return Theme(
        dark=False,
        ground=ground,
        surface="#ffffff" if light < 1 else from_hue(hue, 0.96, tint),
        text=from_hue(hue, 0.08 + fade, tint),
        muted=from_hue(hue, 0.38 + 0.6 * fade, tint),
        accent=accent,
        on_accent=on_accent,
        border=from_hue(hue, 0.78, tint),
    )
