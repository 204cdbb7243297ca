"""Where Chromium is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmagent.browser.errors import BrowserMissing

VARIABLE = "MMAGENT_CHROMIUM"
NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PLACES = (  # before the names: what stands on the path may be a shell script that outlives its browser
    "/usr/lib/chromium/chromium-headless-shell",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
HOW_TO_INSTALL = (
    "no Chromium found. Install the small headless one (Debian and Ubuntu: `apt-get install chromium-headless-shell "
    f"fonts-liberation`), or any Chromium or Chrome, or set {VARIABLE} to the path of its binary"
)


def find_chromium() -> Path | None:
    """The binary to use, the headless shell first: it alone draws frames on demand, several times faster.

    ``MMAGENT_CHROMIUM`` overrides the search; ``ValueError`` if it names no executable file.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        path = shutil.which(chosen)
        if path is None:
            raise ValueError(f"{VARIABLE}={chosen!r} is no executable file")
        return Path(path)
    for name in (*PLACES, *NAMES):
        path = shutil.which(name)
        if path is not None:
            return Path(path)
    return None


def require_chromium() -> Path:
    """As :func:`find_chromium`, but :class:`BrowserMissing` says how to install one."""
    path = find_chromium()
    if path is None:
        raise BrowserMissing(HOW_TO_INSTALL)
    return path
