"""What page templates are made of: a theme, sizes that follow the screen, and small pieces of HTML."""

from __future__ import annotations

import html
import random

from mmagent.worlds.languages import language
from mmagent.worlds.pages.themes import FONTS, PLAIN_FONTS, from_hue, make_theme
from mmagent.worlds.words import Words

LEVELS = 5
DENSITIES = (0.7, 1.0, 1.0, 1.3)
"""How wide distances are, against the size of the text."""
ICONS = {
    "☰": "Menu", "★": "Favourite", "♥": "Like", "✎": "Edit", "✉": "Mail", "⚙": "Settings", "⌂": "Home", "✓": "OK",
    "✕": "Close", "＋": "Add", "▶": "Play", "■": "Stop", "↑": "Up", "↓": "Down", "→": "Forward", "↺": "Undo",
    "⚑": "Flag", "♪": "Music", "☀": "Brightness", "⚠": "Warning",
}  # fmt: skip
"""Signs on buttons, and what they mean to everyone."""


class Kit:
    """Draws everything a template needs from one seed. ``size``: font size in pixels; ``unit``: about half of it, the
    measure of all distances. Style rules are kept once each, so that the HTML stays short."""

    def __init__(self, seed: int, width: int, height: int, difficulty: int, spoken: str = "en", what: str = "page"):
        self.rng = random.Random(f"{what} {seed} {width} {height} {difficulty} {spoken}")
        self.words = Words(self.rng, language(spoken))
        self.width, self.height, self.difficulty = width, height, difficulty
        self.theme = make_theme(self.rng, difficulty)
        scale = (1.15, 1.05, 1.0, 0.92, 0.86)[difficulty - 1]
        self.size = max(9, round(min(max(width / 24, 10), 15) * scale * self.rng.uniform(0.92, 1.08)))
        self.unit = max(3, round(self.size / 2 * self.rng.choice(DENSITIES)))
        if not self.words.language.spaces:
            self.size = max(self.size, 11)  # smaller, their characters are blots
        self.radius = self.rng.choice((0, 2, 4, 8))
        self.font = self.rng.choice(FONTS if difficulty > 1 else PLAIN_FONTS)
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
        """As :meth:`count`, but no more than fit: ``used`` and ``each`` are heights in lines of text. What is said of
        a small screen grows with a tall one."""
        line, tall = 1.35 * self.size, max(1.0, self.height / 360)
        fitting = int((self.height - used * line) / (each * line))
        return max(min(self.count(round(low * tall), round(high * tall)), fitting), 1)

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
        code = self.words.language.code
        opening = "" if code == "en" else f'<html lang="{code}">'
        return f"<!DOCTYPE html>\n{opening}<style>{base}{rules}</style>\n{body}\n"

    def framed(self, body: str) -> str:
        """``body`` below what stands on top of every page of a site, where the screen is large and nothing of it is
        placed by itself."""
        placed = "body" in self._rules or any("position:" in rule for rule in self._rules.values())
        if self.width < 560 or self.height < 400 or placed or self.chance(0.3):
            return body
        theme, unit = self.theme, self.unit
        look = f"background:{theme.accent};color:{theme.on_accent}" if self._filled else f"background:{theme.surface}"
        self.rule(".zz", f"display:flex;gap:{3 * unit}px;align-items:center;padding:{unit}px {2 * unit}px;{look}")
        if self._filled:
            self.rule(".zz a", f"color:{theme.on_accent}")
        self.rule(".zz .r", f"margin:0 0 0 auto;width:{18 * self.size}px")
        brand = self.text(self.words.fresh(self.words.thing))
        links = "".join(self.link() for _ in range(self.count(2, 5)))
        name = self.say("Search")
        self.field("", filled=False)
        search = f'<div class="r"><input class="f" placeholder="{name}"></div>' if self.chance(0.6) else ""
        return f'<div class="zz"><b>{brand}</b>{links}{search}{self.icon()}</div>{body}'

    def say(self, phrase: str) -> str:
        """A phrase of the templates in the page's language, escaped."""
        return self.text(self.words.say(phrase))

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
        label = self.text(text if text is not None else self.words.new("actions"))
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
        """A button with a sign and no word; the sign is what is seen of it, its title what it means."""
        sign = self.words.fresh(tuple(ICONS))
        self.button(" ")
        return f'<button title="{ICONS[sign]}">{sign}</button>'

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
        return f'<a href="#">{self.text(text or self.words.new("sections"))}</a>'

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
        name = self.text(label or self.words.new("fields"))
        full = self.chance(0.15 * self.difficulty) if filled is None else filled
        value = f' value="{self.text(self._value(name))}"' if full else ""
        if self.chance(0.25):
            return f'<div class="r"><input class="f" type="{kind}" placeholder="{name}"{value}></div>'
        self.rule("label.l", f"display:block;margin-bottom:{unit // 3}px;color:{theme.muted}")
        return f'<div class="r"><label class="l">{name}</label><input class="f" type="{kind}"{value}></div>'

    def _value(self, label: str) -> str:
        words = self.words
        known = {"Email": words.email, "Date": words.date, "Time": words.time, "Price": words.price,
                 "Amount": words.price, "Full name": words.name}  # fmt: skip
        return known.get(label, words.thing)()

    def option(self, kind: str = "checkbox", group: str = "g", label: str | None = None) -> str:
        """A checkbox or radio button with its label."""
        checked = " checked" if self.chance(0.35) else ""
        name = f' name="{group}"' if kind == "radio" else ""
        text = self.text(label or self.words.new("options"))
        self.rule("label.o", f"display:block;margin:{self.unit // 2}px 0")
        return f'<label class="o"><input type="{kind}"{name}{checked}> {text}</label>'

    def select(self, choices: list[str]) -> str:
        self.rule("select", f"font:inherit;background:{self.theme.surface};color:{self.theme.text}")
        options = "".join(f"<option>{self.text(choice)}</option>" for choice in choices)
        return f"<select>{options}</select>"

    def figure(self, width: int, height: int) -> str:
        """A drawn picture: flat hills, a sun, or stripes."""
        first, second = from_hue(self.rng.random(), 0.6, 0.5), from_hue(self.rng.random(), 0.4, 0.5)
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
