"""Small web apps with a state of their own, all in one page and without a network: a shop, mail, a calendar, a board, a
wiki. A seed gives the data, the look and an errand whose end is judged by the data as they then are."""

from __future__ import annotations

import html
import json
import random
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mmagent.worlds.sites import calendar, kanban, mail, shop, wiki
from mmagent.worlds.sites.errand import LEVELS, Data, Draw, Errand, Kinds, told

WIDTH, HEIGHT = 800, 600
SITES: Mapping[str, Kinds] = {
    "shop": shop.KINDS,
    "mail": mail.KINDS,
    "calendar": calendar.KINDS,
    "kanban": kanban.KINDS,
    "wiki": wiki.KINDS,
}
"""Makers of errands by site and kind."""
NAMES = {"shop": "Shop", "mail": "Mail", "calendar": "Calendar", "kanban": "Board", "wiki": "Wiki"}
STATE = "site.db"
"""The JavaScript expression that tells a site's data."""
__all__ = [
    "HEIGHT", "LEVELS", "SITES", "STATE", "WIDTH", "Data", "Errand", "document", "levels_of", "make_errand", "told",
]  # fmt: skip


def make_errand(site: str, kind: str, seed: int) -> Errand:
    """The errand that ``seed`` describes. Raises ``ValueError`` for an unknown site or kind."""
    kinds = SITES.get(site)
    if kinds is None or kind not in kinds:
        known = ", ".join(f"{name}/{kind}" for name, kinds in SITES.items() for kind in kinds)
        raise ValueError(f"no errand {site}/{kind}; there are {known}")
    return kinds[kind](Draw(f"{site} {kind} {seed}"))


@cache
def levels_of(site: str, kind: str) -> tuple[int, ...]:
    """The levels that at least one in twenty errands of a kind are of, by a hundred of them."""
    found = Counter(make_errand(site, kind, seed).level for seed in range(100))
    return tuple(sorted(level for level, count in found.items() if count >= 5))


def document(site: str, db: Data, seed: int) -> str:
    """The page of ``site`` with these data; colours, sizes and the site's name follow from ``seed``."""
    rng = random.Random(f"look {seed}")
    style = _source("style.css")
    look = {"HUE": str(rng.randrange(360)), "SIZE": str(rng.choice((13, 14, 15))), "RADIUS": str(rng.choice((0, 3, 8))),
            "FONT": rng.choice(("Arial, sans-serif", "Georgia, serif", "Verdana, sans-serif"))}  # fmt: skip
    for name, value in look.items():
        style = style.replace(name, value)
    name = html.escape(f"{rng.choice(('Blue', 'North', 'Open', 'Daily', 'Little'))} {NAMES[site]}")
    data = json.dumps(db, ensure_ascii=False).replace("</", "<\\/")
    script = _source("kit.js").replace("DATA", data, 1) + _source(f"{site}.js") + "draw();"
    return (
        f"<!DOCTYPE html>\n<title>{name}</title><style>{style}</style>\n"
        f'<header><b>{name}</b><div id="nav"></div></header><div id="main"></div>\n<script>{script}</script>\n'
    )


@cache
def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
