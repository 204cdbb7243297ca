"""A page and four tasks on it, told twice: to the real BrowserGym in a browser where it is installed, and else to a
double of its environment, which takes the same strings and shows the same kind of observation.

Run in the guest's interpreter: nothing of ours is imported here.
"""

from __future__ import annotations

import ast
import importlib.util

import gymnasium
import numpy as np

WIDTH, HEIGHT = 400, 300
FIELD, PAD, LIST, GOAL = (20, 20, 170, 50), (20, 80, 120, 140), (200, 20, 380, 120), (20, 200, 120, 260)
"""x1, y1, x2, y2 in pixels."""
TASKS = {
    "form": ("Write new into the field and press Enter.", lambda s: s["log"][-1:] == ["enter"] and s["value"] == "new"),
    "mouse": ("Use the mouse in every way.", lambda s: s["log"] == WAYS and s["scrolled"] == 60),
    "answer": ("Which number is shown?", lambda s: s["said"] == "7"),
    "missing": ("Buy a thing that is not there.", lambda s: s["infeasible"] == "it is not there"),
}
WAYS = ["click", "dblclick", "contextmenu", "middle", "triple", "over", "drag"]
HTML = """<!doctype html><style>body {margin: 0} body > * {position: absolute; box-sizing: border-box}</style>
<input style="left:20px;top:20px;width:150px;height:30px" value="old">
<div id=pad style="left:20px;top:80px;width:100px;height:60px;background:#48c;user-select:none"></div>
<div id=list style="left:200px;top:20px;width:180px;height:100px;overflow:scroll"><p style="height:900px">7</p></div>
<div id=goal style="left:20px;top:200px;width:100px;height:60px;background:#c84"></div>
<script>
const log = [], pad = document.querySelector('#pad'), goal = document.querySelector('#goal'), was = {};
const field = document.querySelector('input'), once = name => { if (!was[name]) { was[name] = 1; log.push(name); } };
pad.addEventListener('click', e => once(e.detail === 1 ? 'click' : e.detail === 2 ? 'second' : 'triple'));
pad.addEventListener('dblclick', () => once('dblclick'));
pad.addEventListener('contextmenu', e => { e.preventDefault(); once('contextmenu'); });
pad.addEventListener('auxclick', e => { if (e.button === 1) once('middle'); });
goal.addEventListener('mousemove', () => { if (!held) once('over'); });
let held = false;
pad.addEventListener('mousedown', e => { held = e.button === 0; });
document.addEventListener('mouseup', e => { if (held && goal.contains(e.target)) once('drag'); held = false; });
field.addEventListener('keydown', e => { if (e.key === 'Enter') log.push('enter'); });
window.state = () => ({log: log.filter(name => name !== 'second'), value: field.value,
                        scrolled: document.querySelector('#list').scrollTop});
</script>"""


def inside(box, x, y):
    return box[0] <= x < box[2] and box[1] <= y < box[3]


class Page:
    """The page above for events alone."""

    def __init__(self):
        self.log, self.value, self.scrolled, self.focus, self.marked = [], "old", 0, False, False

    def once(self, name):
        if name not in self.log:
            self.log.append(name)

    def press(self, x, y, name):
        self.focus = inside(FIELD, x, y)
        if inside(PAD, x, y):
            self.once(name)


def double_actions(page, env):
    """The calls that BrowserGym knows, as far as a mouse and a keyboard go."""

    def mouse_click(x, y, button="left"):
        page.press(x, y, {"left": "click", "right": "contextmenu", "middle": "middle"}[button])

    def mouse_dblclick(x, y, button="left"):
        page.press(x, y, "dblclick")

    def mouse_tripleclick(x, y):
        page.press(x, y, "triple")

    def mouse_move(x, y):
        if inside(GOAL, x, y):
            page.once("over")

    def mouse_drag_and_drop(from_x, from_y, to_x, to_y):
        if inside(PAD, from_x, from_y) and inside(GOAL, to_x, to_y):
            page.once("drag")

    def scroll_at(x, y, dx, dy):
        if inside(LIST, x, y):
            page.scrolled = max(page.scrolled + dy, 0)

    def keyboard_type(text):
        if page.focus:
            page.value, page.marked = text if page.marked else page.value + text, False

    def keyboard_press(key):
        parts = key.split("+")
        if any(part not in ("Control", "Alt", "Shift", "Meta") for part in parts[:-1]):
            raise ValueError(f'Unknown key: "{key}"')
        if page.focus and key == "Enter":
            page.log.append("enter")
        page.marked = page.focus and key == "Control+a"

    def send_msg_to_user(text):
        env.chat.append({"role": "assistant", "timestamp": 0.0, "message": text})

    def report_infeasible(reason):
        env.infeasible = reason

    def noop(wait_ms=1000):
        pass

    return {name: function for name, function in locals().items() if callable(function)}


class Double(gymnasium.Env):
    """``BrowserEnv`` as its callers know it: an action that fails is told in ``last_action_error``, not raised."""

    metadata = {"render_modes": None}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, kind: str):
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.page, self.chat, self.infeasible, self.error = Page(), [], None, ""
        self.goal = [{"type": "text", "text": TASKS[self.kind][0]}]
        self.chat.append({"role": "assistant", "timestamp": 0.0, "message": "Hi! I am your UI assistant."})
        self.chat.append({"role": "user", "timestamp": 0.0, "message": TASKS[self.kind][0]})
        return self.seen(), {}

    def step(self, action):
        self.error = ""
        try:
            known = double_actions(self.page, self)
            calls = [statement.value for statement in ast.parse(action).body]
            if len(calls) != 1 or not isinstance(calls[0], ast.Call):
                raise ValueError(f"Received an unexpected action {action!r}")
            name = calls[0].func.id
            if name not in known:
                raise NameError(f"Invalid action type '{name}'.")
            known[name](*(ast.literal_eval(argument) for argument in calls[0].args))
        except Exception as error:  # as the real one does
            self.error = f"{type(error).__name__}: {error}"
        said = [one["message"] for one in self.chat if one["role"] == "assistant"][1:]
        state = {**vars(self.page), "said": said[-1] if said else None, "infeasible": self.infeasible}
        won = TASKS[self.kind][1](state)
        if self.kind == "answer" and not won and not said:
            self.chat.append({"role": "user", "timestamp": 0.0, "message": "A number, please."})
        return self.seen(), float(won), bool(won or said or self.infeasible is not None), False, {}

    def seen(self):
        screen = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
        screen[PAD[1] : PAD[3], PAD[0] : PAD[2]] = (0x44, 0x88, 0xCC)
        return {
            "screenshot": screen, "goal": TASKS[self.kind][0], "goal_object": tuple(self.goal),
            "chat_messages": tuple(self.chat), "last_action_error": self.error,
        }  # fmt: skip


class Broken(Double):
    """Raises, hangs, dies or shows nonsense, as its kind says."""

    def reset(self, *, seed=None, options=None):
        import os
        import time

        kind = self.kind
        self.kind = "form"
        seen, info = super().reset(seed=seed)
        if kind == "raises":
            raise RuntimeError("no such site")
        if kind == "hangs":
            time.sleep(60)
        if kind == "dies":
            os._exit(3)
        if kind == "blank":
            seen["screenshot"] = np.zeros((0, 4, 3), np.uint8)
        if kind == "talks":
            print("a word on the standard output, which is no answer", flush=True)
        if kind == "shows":
            dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
            seen["goal_object"] = (
                *self.goal,
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{dot}"}},
            )
        return seen, info

    def close(self):
        if self.kind == "form":
            raise RuntimeError("cannot be closed")


def register_real():
    """The tasks for BrowserGym itself."""
    from browsergym.core.registration import register_task
    from browsergym.core.task import AbstractBrowserTask

    class PageTask(AbstractBrowserTask):
        def __init__(self, seed, kind):
            super().__init__(seed)
            self.kind, self.viewport, self.slow_mo = kind, {"width": WIDTH, "height": HEIGHT}, 0

        def setup(self, page):
            page.set_content(HTML)
            return TASKS[self.kind][0], {}

        def validate(self, page, chat_messages):
            said = [one["message"] for one in chat_messages if one["role"] == "assistant"][1:]
            gave_up = [one["message"] for one in chat_messages if one["role"] == "infeasible"]
            state = {**page.evaluate("state()"), "said": said[-1] if said else None,
                     "infeasible": gave_up[-1] if gave_up else None}  # fmt: skip
            won = bool(TASKS[self.kind][1](state))
            return float(won), bool(won or said), "", {}

        def teardown(self):
            pass

    for kind in TASKS:
        register_task(f"page.{kind}", PageTask, task_kwargs={"kind": kind})


if importlib.util.find_spec("browsergym"):
    register_real()
else:
    for kind in TASKS:
        gymnasium.register(f"browsergym/page.{kind}", lambda kind=kind: Double(kind))
for kind in ("raises", "hangs", "dies", "blank", "talks", "shows"):
    gymnasium.register(f"browsergym/broken.{kind}", lambda kind=kind: Broken(kind))
