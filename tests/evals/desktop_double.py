"""A checkout of OSWorld with a double of ``DesktopEnv``: the same constructor, the same order of calls, the same
special actions, and a pyautogui that knows its own signatures, names of keys and the bug with ``<``.

:func:`checkout` writes it into a folder; the rest runs in the guest.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 192, 108
FIELD, BUTTON, LIST = (10, 10, 90, 30), (10, 50, 50, 70), (100, 10, 180, 100)
KEYS = {"enter", "tab", "esc", "escape", "backspace", "delete", "space", "home", "end", "pageup", "pagedown", "insert",
        "left", "right", "up", "down", "ctrl", "alt", "shift", "win", *(f"f{n}" for n in range(1, 13)),
        *(chr(n) for n in range(32, 127)), "\n", "\t"}  # fmt: skip
EXAMPLES = {
    "writer": {
        "write": ("Write a<b and a new line.", {"func": "text", "expected": "a<b\n"}),
        "retype": ("Replace all by new.", {"func": "text", "expected": "new"}),
    },
    "os": {
        "mouse": ("Use the mouse in every way.", {"func": "mouse"}),
        "half": ("Click the button, and scroll.", {"func": ["clicked", "scrolled"]}),
        "impossible": ("Do what cannot be done.", {"func": "infeasible"}),
    },
    "broken": {
        kind: (f"This one {kind}.", {"func": "infeasible"})
        for kind in ("raises", "dies", "hangs", "blind", "garbled", "misjudges", "overrates")
    },
}
WAYS = ["click", "double", "triple", "right", "middle", "move", "drag", "up", "sideways"]


def checkout(folder: Path) -> Path:
    """A folder that looks like OSWorld's."""
    (folder / "desktop_env").mkdir(parents=True)
    (folder / "desktop_env" / "__init__.py").touch()
    (folder / "desktop_env" / "desktop_env.py").write_text("from desktop_double import DesktopEnv\n")
    for domain, tasks in EXAMPLES.items():
        place = folder / "evaluation_examples" / "examples" / domain
        place.mkdir(parents=True)
        for key, (instruction, evaluator) in tasks.items():
            config = {"id": key, "snapshot": domain, "instruction": instruction, "config": [], "evaluator": evaluator}
            (place / f"{key}.json").write_text(json.dumps(config))
    listed = {domain: list(tasks) for domain, tasks in EXAMPLES.items() if domain != "broken"}
    (folder / "evaluation_examples" / "test_all.json").write_text(json.dumps(listed))
    (folder / "evaluation_examples" / "test_broken.json").write_text(json.dumps({"broken": list(EXAMPLES["broken"])}))
    return folder


def inside(box, x, y):
    return box[0] <= x < box[2] and box[1] <= y < box[3]


class Pyautogui:
    """What the lines may call, on a desktop with a field, a button and a list."""

    def __init__(self):
        self.at, self.text, self.log, self.focus, self.marked = (0, 0), "old", [], False, False
        self.scrolled = 0

    def once(self, name):
        if name not in self.log:
            self.log.append(name)

    def press_at(self, x, y, name):
        if not (isinstance(x, int) and isinstance(y, int) and 0 <= x < WIDTH and 0 <= y < HEIGHT):
            raise ValueError(f"({x}, {y}) is not on the screen")
        self.at, self.focus = (x, y), inside(FIELD, x, y)
        if inside(BUTTON, x, y):
            self.once(name)

    def click(self, x=None, y=None, clicks=1, interval=0.0, button="left"):
        self.press_at(x, y, {"left": "click", "right": "right", "middle": "middle"}[button])

    def doubleClick(self, x=None, y=None, interval=0.0, button="left"):
        self.press_at(x, y, "double")

    def tripleClick(self, x=None, y=None, interval=0.0, button="left"):
        self.press_at(x, y, "triple")

    def moveTo(self, x=None, y=None, duration=0.0):
        self.at = (x, y)
        if inside(LIST, x, y):
            self.once("move")

    def dragTo(self, x=None, y=None, duration=0.0, button="left"):
        if inside(BUTTON, *self.at) and inside(LIST, x, y):
            self.once("drag")
        self.at = (x, y)

    def scroll(self, clicks):
        if inside(LIST, *self.at):
            self.scrolled -= clicks
            if clicks > 0:
                self.once("up")

    def hscroll(self, clicks):
        if inside(LIST, *self.at):
            self.once("sideways")

    def write_char(self, char):
        if self.focus:
            self.text, self.marked = ("" if self.marked else self.text) + char, False

    def typewrite(self, message, interval=0.0):
        for char in message:
            if char in KEYS:  # others are left out without a word
                self.write_char(">" if char == "<" else char)

    def press(self, key):
        if key not in KEYS:
            return
        if len(key) == 1 or key == "enter":
            self.typewrite("\n" if key == "enter" else key)

    def hotkey(self, *keys):
        if any(key not in KEYS for key in keys):
            raise ValueError(keys)
        if keys == ("shift", ","):
            self.write_char("<")
        self.marked = self.focus and keys == ("ctrl", "a")


class DesktopEnv:
    """As far as ``lib_run_single.py`` goes."""

    def __init__(self, provider_name="vmware", region=None, path_to_vm=None, snapshot_name="init_state",
                 action_space="pyautogui", cache_dir="cache", screen_size=(1920, 1080), headless=False,
                 require_a11y_tree=True, require_terminal=False, os_type="Ubuntu", enable_proxy=False,
                 client_password=""):  # fmt: skip
        if provider_name not in ("vmware", "docker"):
            raise ValueError(f"Invalid provider name: {provider_name}")
        assert action_space in ["computer_13", "pyautogui", "claude_computer_use", "autoglm_computer_use"]
        self.provider_name, self.headless = provider_name, headless
        self.note("started")

    def note(self, what):
        with open("machines.txt", "a") as log:
            log.write(f"{what}\n")

    def reset(self, task_config=None, seed=None, options=None):
        self.task_id, self.instruction = task_config["id"], task_config["instruction"]
        self.evaluator, self.action_history, self.desktop = task_config["evaluator"], [], Pyautogui()
        if self.task_id == "raises":
            raise RuntimeError("Environment setup failed after 5 attempts")
        if self.task_id == "dies":
            import os

            os._exit(1)
        if self.task_id == "hangs":
            import time

            time.sleep(60)
        return self._get_obs()

    def _get_obs(self):
        data = io.BytesIO()
        screen = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
        Image.fromarray(screen).save(data, "PNG")
        shown = {"blind": None, "garbled": data.getvalue()[:60]}.get(self.task_id, data.getvalue())
        return {"screenshot": shown, "accessibility_tree": None, "terminal": None, "instruction": self.instruction}

    def step(self, action, pause=2):
        self.action_history.append(action)
        done = action in ("FAIL", "DONE")
        if action not in ("WAIT", "FAIL", "DONE"):
            with open("said.txt", "a") as log:
                log.write(f"{action}\n")
            try:  # in the machine, by `python -c`: whether it failed there is not told
                exec(action, {"pyautogui": self.desktop})
            except Exception as error:
                self.note(f"{type(error).__name__}: {error}")
        return self._get_obs(), 0, done, {}

    def evaluate(self):
        func, desktop = self.evaluator["func"], self.desktop
        failed = self.action_history[-1:] == ["FAIL"]
        if self.task_id == "misjudges":
            raise KeyError("result")
        if self.task_id == "overrates":
            return 7
        if func == "infeasible" or failed:
            return int(func == "infeasible" and failed)
        found = {
            "text": desktop.text == self.evaluator.get("expected"), "mouse": desktop.log == WAYS,
            "clicked": "click" in desktop.log, "scrolled": desktop.scrolled == 3,
        }  # fmt: skip
        if isinstance(func, list):
            return sum(found[one] for one in func) / len(func)
        return int(found[func])

    def close(self):
        self.note("stopped")
