"""A pool of headless Chromium over its debugging protocol: render, DOM truth, input, no network beyond the page."""

from mmagent.browser.errors import (
    BrowserClosed,
    BrowserCrashed,
    BrowserError,
    BrowserMissing,
    BrowserTimeout,
    ScriptError,
)
from mmagent.browser.find import find_chromium, require_chromium
from mmagent.browser.page import Page
from mmagent.browser.perform import perform
from mmagent.browser.pool import BrowserPool, PoolStats
from mmagent.browser.sync import in_thread, run_sync

__all__ = [
    "BrowserClosed",
    "BrowserCrashed",
    "BrowserError",
    "BrowserMissing",
    "BrowserPool",
    "BrowserTimeout",
    "Page",
    "PoolStats",
    "ScriptError",
    "find_chromium",
    "in_thread",
    "perform",
    "require_chromium",
    "run_sync",
]
