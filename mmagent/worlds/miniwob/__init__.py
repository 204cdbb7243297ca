"""MiniWoB++: small web tasks on a 160 x 210 screen, from the pages of the installed ``miniwob`` package."""

from mmagent.worlds.miniwob.difficulty import LEVELS, Effort, efforts, pages_of
from mmagent.worlds.miniwob.experts import TASKS, Expert, expert
from mmagent.worlds.miniwob.groups import LEFT_OUT, RUNNING, UNTAUGHT, group_of
from mmagent.worlds.miniwob.pages import (
    HEIGHT,
    VIEW,
    WIDTH,
    Screen,
    html_folder,
    observe,
    restart,
    start,
    state,
)
from mmagent.worlds.seeds import SPLITS, seed_for

__all__ = [
    "HEIGHT",
    "LEFT_OUT",
    "LEVELS",
    "RUNNING",
    "SPLITS",
    "TASKS",
    "UNTAUGHT",
    "VIEW",
    "WIDTH",
    "Effort",
    "Expert",
    "Screen",
    "efforts",
    "expert",
    "group_of",
    "html_folder",
    "observe",
    "pages_of",
    "restart",
    "seed_for",
    "start",
    "state",
]
