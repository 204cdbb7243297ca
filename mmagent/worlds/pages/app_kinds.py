"""All kinds of apps, and the page that a seed describes."""

from __future__ import annotations

from mmagent.worlds.pages.apps import App, Maker
from mmagent.worlds.pages.apps_forms import FORMS
from mmagent.worlds.pages.apps_lists import LISTS
from mmagent.worlds.pages.kit import LEVELS, Kit

APPS: dict[str, Maker] = {maker.__name__: maker for maker in (*FORMS, *LISTS)}
"""Kinds of apps by name."""
_RUNTIME = """const $ = s => document.querySelector(s), $$ = s => [...document.querySelectorAll(s)];
const on = (s, type, f) => $$(s).forEach((e, n) => e.addEventListener(type, event => f(e, n, event)));
const show = (s, yes) => { $(s).style.display = yes ? '' : 'none'; };
const state = {};
"""


def generate_app(
    seed: int, width: int, height: int, difficulty: int = 3, kind: str | None = None, spoken: str = "en"
) -> App:
    """The app that ``seed`` describes for a screen of ``width`` x ``height`` pixels.

    ``difficulty`` 1..5: more to choose from and more steps. ``kind``: one of :data:`APPS`, None draws it from the seed.
    Goals are in English and quote the page, which speaks ``spoken``. Use :func:`mmagent.worlds.seeds.seed_for` for
    seeds that keep training and evaluation apart.
    """
    if not 1 <= difficulty <= LEVELS:
        raise ValueError(f"difficulty {difficulty} is not in 1..{LEVELS}")
    if kind is not None and kind not in APPS:
        raise ValueError(f"app {kind!r} is none of {', '.join(APPS)}")
    if width < 200 or height < 160:
        raise ValueError(f"an app of {width}x{height} pixels is too small to work in; at least 200x160")
    k = Kit(seed, width, height, difficulty, spoken, "app")
    drawn = k.rng.choice(tuple(APPS))
    name = kind or drawn
    plan = APPS[name](k)
    k.rule("*", "caret-color:transparent;user-select:none")
    html = k.document(f"{plan.body}<script>{_RUNTIME}{plan.script}</script>")
    return App(html, width, height, name, difficulty, seed, spoken, plan.goal, plan.steps, plan.wanted)
