"""What can go wrong with a browser, so that callers can tell a broken page from a broken machine."""

from __future__ import annotations


class BrowserError(RuntimeError):
    """The browser refused a command."""


class BrowserMissing(BrowserError):
    """No usable Chromium on this machine."""


class BrowserTimeout(BrowserError):
    """The page did not answer within its time limit (endless script, dialog loop, huge document)."""


class BrowserCrashed(BrowserError):
    """The browser process, or the page's renderer, died under the call."""


class BrowserClosed(RuntimeError):
    """Who opened the browser has closed it: no fault of a page, and nothing to try again."""


class ScriptError(BrowserError):
    """Script given to ``evaluate`` raised an exception in the page."""
