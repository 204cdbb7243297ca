"""The suites by name."""

from __future__ import annotations

from collections.abc import Callable

from evals.suite import Suite

SUITES: dict[str, Callable[[], Suite]] = {}
