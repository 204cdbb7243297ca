"""Sheets of small screens with one to four controls anywhere on them: first lessons in pointing.

A page of the templates holds much and puts it where pages put it, so a model can do well by guessing. Here nothing but
the image says where a control is. A browser draws and reads one sheet of many tiles as fast as one page, and every
tile becomes a screen of its own.
"""

from __future__ import annotations

import dataclasses
import html
import random
from collections.abc import Iterator
from typing import TypeVar

from mmagent.worlds.elements import Box, Element, TextLine
from mmagent.worlds.pages import Scene
from mmagent.worlds.pages.themes import FONTS, Theme, make_theme
from mmagent.worlds.words import ACTIONS, FIELDS, OPTIONS, SECTIONS, Words

_Thing = TypeVar("_Thing", Element, TextLine)
MOST_CONTROLS = 4
_KINDS = ("button", "button", "block", "link", "textbox", "checkbox", "radio", "select", "text")
_GAP = 4


def tile_sheet(seed: int, columns: int, rows: int, width: int, height: int) -> str:
    """HTML of ``columns`` x ``rows`` tiles of ``width`` x ``height`` pixels, without gaps."""
    tiles = "".join(
        _tile(random.Random(f"tile {seed} {row} {column}"), column * width, row * height, width, height)
        for row in range(rows)
        for column in range(columns)
    )
    return f"<!DOCTYPE html>\n<style>body{{margin:0}}body *{{position:absolute;box-sizing:border-box}}</style>{tiles}\n"


def _tile(rng: random.Random, left: int, top: int, width: int, height: int) -> str:
    theme = make_theme(rng, 1)
    words, size = Words(rng), rng.randint(10, 14)
    count = rng.choices(range(1, MOST_CONTROLS + 1), (4, 3, 2, 1))[0]
    kinds = [rng.choice(_KINDS) for _ in range(count)]
    room = height // count  # of a control, from top to bottom
    parts = []
    for n, kind in enumerate(kinds):
        tall = min(room - _GAP, rng.randint(20, 70) if kind == "block" else size + 12)
        wide = rng.randint(24, 90) if kind == "block" else rng.randint(width // 3, width * 2 // 3)
        x = rng.randint(_GAP, max(_GAP, width - wide - _GAP))
        y = n * room + rng.randint(_GAP // 2, max(_GAP // 2, room - tall - _GAP // 2))
        place = f"left:{x}px;top:{y}px;max-width:{width - x - 1}px;overflow:hidden"  # whole in its tile, or cut short
        parts.append(_control(kind, rng, words, theme, place, wide, tall))
    place = f"left:{left}px;top:{top}px;width:{width}px;height:{height}px;overflow:hidden"
    look = f"background:{theme.ground};color:{theme.text};font:{size}px {rng.choice(FONTS)}"
    return f'<div style="{place};{look}">{"".join(parts)}</div>'


def _control(kind: str, rng: random.Random, words: Words, theme: Theme, place: str, wide: int, tall: int) -> str:
    font = f"{place};font:inherit;white-space:nowrap"
    if kind in ("button", "block"):
        look = rng.choice(("", "", f"background:{theme.accent};color:{theme.on_accent};border:0;border-radius:4px"))
        size = f"width:{wide}px;height:{tall}px;padding:0" if kind == "block" else "padding:2px 8px"
        return f'<button style="{font};{size};{look}">{html.escape(words.fresh(ACTIONS))}</button>'
    if kind == "link":
        return f'<a href="#" style="{font};color:{theme.accent}">{html.escape(words.fresh(SECTIONS))}</a>'
    if kind == "textbox":
        name = html.escape(words.fresh(FIELDS))
        value = f' value="{html.escape(words.thing())}"' if rng.random() < 0.3 else ""
        return f'<input aria-label="{name}" style="{font};width:{wide}px"{value}>'
    if kind == "select":
        chosen = html.escape(words.fresh(SECTIONS))
        return f'<select style="{font};width:{wide}px"><option>{chosen}</option></select>'
    if kind == "text":
        return f'<span style="{font}">{html.escape(words.thing())}</span>'
    checked = " checked" if rng.random() < 0.4 else ""
    text = html.escape(words.fresh(OPTIONS))
    return f'<label style="{font}"><input type="{kind}" style="position:static"{checked}> {text}</label>'


def cut(scene: Scene, columns: int, rows: int) -> Iterator[Scene]:
    """The tiles of a rendered sheet, row by row: each with its own pixels, elements and lines of text."""
    height, width = scene.image.shape[0] // rows, scene.image.shape[1] // columns
    for row in range(rows):
        for column in range(columns):
            x, y = column * width, row * height
            elements = tuple(_moved(e, x, y) for e in scene.elements if _within(e.box, x, y, width, height))
            lines = tuple(_moved(line, x, y) for line in scene.lines if _within(line.box, x, y, width, height))
            yield Scene(scene.image[y : y + height, x : x + width], scene.html, elements, lines)


def _within(box: Box, x: int, y: int, width: int, height: int) -> bool:
    return x <= box[0] and box[2] <= x + width and y <= box[1] and box[3] <= y + height


def _moved(thing: _Thing, x: int, y: int) -> _Thing:
    left, top, right, bottom = thing.box
    box = (left - x, top - y, right - x, bottom - y)
    if isinstance(thing, Element):
        return dataclasses.replace(thing, box=box, point=(thing.point[0] - x, thing.point[1] - y))
    return dataclasses.replace(thing, box=box)
