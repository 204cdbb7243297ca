"""MiniWoB++: small web tasks on a 160 x 210 screen, from the pages of the installed ``miniwob`` package."""

from __future__ import annotations

from mmagent.worlds.miniwob.pages import html_folder

__all__ = ["html_folder"]
