"""What page templates are made of: a theme, sizes that follow the screen, and small pieces of HTML."""

from __future__ import annotations

import colorsys
import html
import random
from dataclasses import dataclass

from mmagent.worlds.words import ACTIONS, FIELDS, OPTIONS, SECTIONS, Words

FONTS = (
    "Arial",
    "sans-serif",
    "Georgia,serif",
    "Verdana,sans-serif",
    "monospace",
    "Times New Roman,serif",
    "system-ui",
)
LEVELS = 5
READABLE = 3.2
"""Least contrast of links and buttons against the page."""
ICONS = ("☰", "★", "♥", "✎", "✉", "⚙", "⌂", "✓", "✕", "＋", "▶", "■", "↑", "↓", "→", "↺", "⚑", "♪", "☀", "⚠")


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


def _hex(hue: float, lightness: float, saturation: float) -> str:
    return "#" + "".join(f"{round(255 * v):02x}" for v in colorsys.hls_to_rgb(hue % 1, lightness, saturation))


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb``, 0..1 (WCAG 2, without its linear foot)."""
    red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1..21 (WCAG 2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def make_theme(rng: random.Random, difficulty: int) -> Theme:
    """Light or dark, plain or tinted; the higher the difficulty, the more often dark and the weaker the contrast."""
    hue, tint = rng.random(), rng.choice((0.0, 0.0, 0.1, 0.35))
    dark = rng.random() < (0.0, 0.15, 0.25, 0.35, 0.4)[difficulty - 1]
    fade = 0.05 * (difficulty - 1)
    dark_ground = rng.uniform(0.06, 0.16)
    accent_hue, accent_light, strength = hue + rng.choice((0, 0.33, 0.5, rng.random())), 0.4, rng.uniform(0.5, 1)
    ground = _hex(hue, dark_ground, tint) if dark else "#ffffff"
    while contrast(accent := _hex(accent_hue, accent_light, strength), ground) < READABLE:
        accent_light += 0.04 if dark else -0.04
    on_accent = "#ffffff" if luminance(accent) < 0.35 else "#111111"
    if dark:
        return Theme(
            dark=True,
            ground=ground,
            surface=_hex(hue, dark_ground + 0.07, tint),
            text=_hex(hue, 0.93 - fade, tint),
            muted=_hex(hue, 0.66 - 0.6 * fade, tint),
            accent=accent,
            on_accent=on_accent,
            border=_hex(hue, dark_ground + 0.2, tint),
        )
    light = rng.choice((1.0, 1.0, 0.97, 0.94, 0.9))
    return Theme(
        dark=False,
        ground=_hex(hue, light, tint),
        surface="#ffffff" if light < 1 else _hex(hue, 0.96, tint),
        text=_hex(hue, 0.08 + fade, tint),
        muted=_hex(hue, 0.38 + 0.6 * fade, tint),
        accent=accent,
        on_accent=on_accent,
        border=_hex(hue, 0.78, tint),
    )


class Kit:
    """Draws everything a template needs from one seed. ``size``: font size in pixels; ``unit``: half of it, the
    measure of all distances. Style rules are kept once each, so that the HTML stays short."""

    def __init__(self, seed: int, width: int, height: int, difficulty: int):
        self.rng = random.Random(f"page {seed} {width} {height} {difficulty}")
        self.words = Words(self.rng)
        self.width, self.height, self.difficulty = width, height, difficulty
        self.theme = make_theme(self.rng, difficulty)
        scale = (1.15, 1.05, 1.0, 0.92, 0.86)[difficulty - 1]
        self.size = max(9, round(min(max(width / 24, 10), 15) * scale * self.rng.uniform(0.92, 1.08)))
        self.unit = max(3, self.size // 2)
        self.radius = self.rng.choice((0, 2, 4, 8))
        self.font = self.rng.choice(FONTS if difficulty > 1 else FONTS[:2])
        self._rules: dict[str, str] = {}
        self._filled = self.rng.random() < 0.6

    # ------------------------------------------------------------------ choice

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def count(self, low: int, high: int) -> int:
        """Between ``low`` and ``high``, more with difficulty."""
        middle = low + (high - low) * (self.difficulty - 1) / (LEVELS - 1)
        return min(max(round(self.rng.gauss(middle, (high - low) / 8)), low), high)

    def rows(self, used: float, each: float, low: int, high: int) -> int:
        """As :meth:`count`, but no more than fit: ``used`` and ``each`` are heights in lines of text."""
        line = 1.35 * self.size
        fitting = int((self.height - used * line) / (each * line))
        return max(min(self.count(low, high), fitting), 1)

    @property
    def columns(self) -> int:
        """Columns of content that the width carries."""
        return max(1, min(4, self.width // (13 * self.size)))

    # -------------------------------------------------------------------- html

    def rule(self, selector: str, *declarations: str) -> None:
        self._rules[selector] = ";".join(declarations)

    def document(self, body: str) -> str:
        """The finished page."""
        theme = self.theme
        base = f"body{{margin:0;font:{self.size}px {self.font};background:{theme.ground};color:{theme.text}}}"
        rules = "".join(f"{selector}{{{declarations}}}" for selector, declarations in self._rules.items())
        return f"<!DOCTYPE html>\n<style>{base}{rules}</style>\n{body}\n"

    @staticmethod
    def text(text: str) -> str:
        return html.escape(text, quote=True)

    def button(self, text: str | None = None, primary: bool = False) -> str:
        theme, unit = self.theme, self.unit
        self.rule(
            "button",
            "font:inherit",
            f"padding:{unit // 2}px {unit}px",
            f"border:1px solid {theme.border}",
            f"border-radius:{self.radius}px",
            f"background:{theme.surface}",
            f"color:{theme.text}",
        )
        label = self.text(text if text is not None else self.words.fresh(ACTIONS))
        if not primary:
            return f"<button>{label}</button>"
        look = f"background:{theme.accent};color:{theme.on_accent}" if self._filled else f"border-color:{theme.accent}"
        self.rule("button.p", f"{look};font-weight:bold")
        return f'<button class="p">{label}</button>'

    def buttons(self, count: int) -> str:
        """``count`` buttons, the main one first or last."""
        main = self.rng.choice((0, count - 1))
        return " ".join(self.button(primary=n == main) for n in range(count))

    def icon(self) -> str:
        """A button with a sign and no word; its name is its title."""
        sign, name = self.rng.choice(ICONS), self.text(self.words.fresh(ACTIONS))
        self.button(" ")
        return f'<button title="{name}" aria-label="{name}">{sign}</button>'

    def heading(self, text: str | None = None, level: int = 2) -> str:
        scale = {1: 1.7, 2: 1.35, 3: 1.1}[level]
        self.rule(f"h{level}", f"margin:{self.unit}px 0;font-size:{round(self.size * scale)}px")
        return f"<h{level}>{self.text(text or self.words.fresh(self.words.title))}</h{level}>"

    def paragraph(self, sentences: int, muted: bool = False) -> str:
        self.rule("p", f"margin:{self.unit}px 0;line-height:1.35")
        if muted:
            self.rule(".m", f"color:{self.theme.muted}")
        kind = ' class="m"' if muted else ""
        return f"<p{kind}>{self.text(self.words.paragraph(sentences))}</p>"

    def link(self, text: str | None = None) -> str:
        self.rule("a", f"color:{self.theme.accent}" + self.rng.choice(("", ";text-decoration:none")))
        return f'<a href="#">{self.text(text or self.words.fresh(SECTIONS))}</a>'

    def field(self, label: str | None = None, kind: str = "text", filled: bool | None = None) -> str:
        """A labelled text field: the label above it, beside it, or inside as a placeholder."""
        theme, unit = self.theme, self.unit
        self.rule(
            "input.f",
            "font:inherit",
            "box-sizing:border-box",
            "width:100%",
            f"padding:{unit // 2}px",
            f"border:1px solid {theme.border}",
            f"border-radius:{self.radius}px",
            f"background:{theme.surface}",
            f"color:{theme.text}",
        )
        name = self.text(label or self.words.fresh(FIELDS))
        full = self.chance(0.15 * self.difficulty) if filled is None else filled
        value = f' value="{self.text(self._value(name))}"' if full else ""
        if self.chance(0.25):
            return f'<div class="r"><input class="f" type="{kind}" placeholder="{name}"{value}></div>'
        self.rule("label.l", f"display:block;margin-bottom:{unit // 3}px;color:{theme.muted}")
        return f'<div class="r"><label class="l">{name}</label><input class="f" type="{kind}"{value}></div>'

    def _value(self, label: str) -> str:
        known = {"Email": self.words.email, "Date": self.words.date, "Time": self.words.time, "Price": self.words.price,
                 "Amount": self.words.price, "Full name": self.words.name}  # fmt: skip
        return known.get(label, self.words.thing)()

    def option(self, kind: str = "checkbox", group: str = "g", label: str | None = None) -> str:
        """A checkbox or radio button with its label."""
        checked = " checked" if self.chance(0.35) else ""
        name = f' name="{group}"' if kind == "radio" else ""
        text = self.text(label or self.words.fresh(OPTIONS))
        self.rule("label.o", f"display:block;margin:{self.unit // 2}px 0")
        return f'<label class="o"><input type="{kind}"{name}{checked}> {text}</label>'

    def select(self, choices: list[str]) -> str:
        self.rule("select", f"font:inherit;background:{self.theme.surface};color:{self.theme.text}")
        options = "".join(f"<option>{self.text(choice)}</option>" for choice in choices)
        return f"<select>{options}</select>"

    def figure(self, width: int, height: int) -> str:
        """A drawn picture: flat hills, a sun, or stripes."""
        first, second = _hex(self.rng.random(), 0.6, 0.5), _hex(self.rng.random(), 0.4, 0.5)
        kind = self.rng.choice(("hills", "sun", "stripes"))
        shapes = {
            "hills": f'<path d="M0 {height}L{width // 3} {height // 3}L{width} {height}Z" fill="{second}"/>',
            "sun": f'<circle cx="{width * 2 // 3}" cy="{height // 2}" r="{min(width, height) // 4}" fill="{second}"/>',
            "stripes": f'<rect x="{width // 4}" width="{width // 3}" height="{height}" fill="{second}"/>',
        }
        return (
            f'<svg width="{width}" height="{height}" role="img" aria-label="{kind}"><rect width="{width}" '
            f'height="{height}" fill="{first}"/>{shapes[kind]}</svg>'
        )

    def panel(self) -> str:
        """Declarations of a raised surface."""
        theme = self.theme
        shadow = ";box-shadow:0 1px 4px #0004" if self.chance(0.4) else ""
        return f"background:{theme.surface};border:1px solid {theme.border};border-radius:{self.radius}px{shadow}"
