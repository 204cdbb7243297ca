"""The suites by name. A suite of one's own needs no entry here: it is a value that `evals.runner.evaluate` takes."""

from __future__ import annotations

from collections.abc import Callable

from evals.suite import Suite
from evals.suites.miniwob import miniwob

SUITES: dict[str, Callable[[], Suite]] = {"miniwob": miniwob}
