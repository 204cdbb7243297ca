"""Where the MiniWoB++ pages are."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def html_folder() -> Path:
    """The folder of the installed ``miniwob`` package that holds its pages; the package itself is not imported."""
    spec = importlib.util.find_spec("miniwob")
    if spec is None or spec.origin is None:
        raise ValueError("the MiniWoB++ pages are missing: `pip install miniwob`")
    return Path(spec.origin).parent / "html"
