"""The suites by name. A suite of one's own needs no entry here: it is a value that `evals.runner.evaluate` takes."""

from __future__ import annotations

from collections.abc import Callable

from evals.suite import Suite
from evals.suites.miniwob import miniwob
from evals.suites.pages import page_grounding, screenshot_to_html
from evals.suites.tasks import tasks
from evals.suites.worlds import worlds

SUITES: dict[str, Callable[[], Suite]] = {
    "miniwob": miniwob,
    "page_grounding": page_grounding,
    "screenshot_to_html": screenshot_to_html,
    "tasks": tasks,
    "worlds": worlds,
}
