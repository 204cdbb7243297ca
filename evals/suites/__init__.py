"""The suites by name. A suite of one's own needs no entry here: it is a value that `evals.runner.evaluate` takes."""

from __future__ import annotations

from collections.abc import Callable

from evals.suite import Suite
from evals.suites.coding import chart_to_code, design2code, svg_code, ui_repair
from evals.suites.miniwob import miniwob
from evals.suites.pages import page_grounding, screenshot_to_html
from evals.suites.worlds import worlds

SUITES: dict[str, Callable[..., Suite]] = {
    "chart_to_code": chart_to_code,
    "design2code": design2code,
    "miniwob": miniwob,
    "page_grounding": page_grounding,
    "screenshot_to_html": screenshot_to_html,
    "svg_code": svg_code,
    "ui_repair": ui_repair,
    "worlds": worlds,
}
"""Those whose items can be chosen take ``data``, a folder or the name of a dataset."""
