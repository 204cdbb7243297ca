"""The suites by name. A suite of one's own needs no entry here: it is a value that `evals.runner.evaluate` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from evals.suite import Suite
from evals.suites.androidworld import androidworld
from evals.suites.browsergym import browsergym
from evals.suites.calls import function_calls
from evals.suites.coding import chart_to_code, design2code, svg_code, ui_repair
from evals.suites.corpus import corpus_search
from evals.suites.miniwob import miniwob, miniwob_all
from evals.suites.osworld import osworld
from evals.suites.pages import page_grounding, screenshot_to_html
from evals.suites.questions import question_suites
from evals.suites.screens import screen_suites
from evals.suites.search import crop_search, small_search, vstar_crop
from evals.suites.sites import sites
from evals.suites.tasks import tasks
from evals.suites.worlds import worlds

SUITES: dict[str, Callable[..., Suite]] = {
    "androidworld": androidworld,
    "browsergym": browsergym,
    "chart_to_code": chart_to_code,
    "corpus_search": corpus_search,
    "design2code": design2code,
    "function_calls": function_calls,
    "miniwob": miniwob,
    "miniwob_all": miniwob_all,
    "osworld": osworld,
    "page_grounding": page_grounding,
    "screenshot_to_html": screenshot_to_html,
    "svg_code": svg_code,
    "ui_repair": ui_repair,
    "sites": sites,
    "small_search": small_search,
    "crop_search": crop_search,
    "tasks": tasks,
    "vstar_crop": vstar_crop,
    "worlds": worlds,
    **screen_suites(),
    **question_suites(),
}
FOREIGN = frozenset({"androidworld", "browsergym", "osworld"})
"""Suites that drive environments of other houses: they have tasks only where ``--data`` says where those are."""
WITH_DATA = frozenset(
    {
        *("chart_to_code", "corpus_search", "design2code", "function_calls", "svg_code", "vstar_crop"),
        *screen_suites(),
        *question_suites(),
        *FOREIGN,
    }
)
"""Suites whose builder takes where published data are."""


def named_suite(text: str, known: Mapping[str, Callable[..., Suite]] = SUITES) -> Suite:
    """The suite of ``known`` that ``NAME`` is, or ``NAME=WHERE`` with its published data. Raises ``ValueError`` for an
    unknown one, and for data that it does not take."""
    name, given, where = text.partition("=")
    if name not in known:
        raise ValueError(f"no suite {name!r}; see: {', '.join(known)}")
    if given and (not where or name not in WITH_DATA):
        raise ValueError(f"{text}: suite {name} takes no data" if where else f"{text}: where are the data?")
    return known[name](where) if where else known[name]()
