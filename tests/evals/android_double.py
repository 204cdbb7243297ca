"""A double of AndroidWorld's server: a real HTTP server with the routes, the checks and the refusals of the real one
(``server/android_server.py``, ``json_action.py``, ``actuation.py``, ``task_eval.py``), before a phone of a few rules.

As FastAPI does, it answers 422 for a query that is missing or of another kind, 405 for another method and a bare 500
for any exception of what it serves, which is one thing at a time.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from urllib.parse import parse_qs, urlsplit

import numpy as np

HEIGHT, WIDTH = 80, 36
ACTION_TYPES = (
    "click", "double_tap", "scroll", "swipe", "input_text", "navigate_home", "navigate_back", "keyboard_enter",
    "open_app", "status", "wait", "long_press", "answer", "unknown",
)  # fmt: skip
FIELDS = ("action_type", "index", "x", "y", "text", "direction", "goal_status", "app_name", "keycode", "clear_text")
DIRECTIONS = ("left", "right", "down", "up")
APPS = {"clock": (90, 200, 120), "notes": (200, 180, 60), "files": (80, 120, 220)}
BUTTON = (10, 33, 24, 44)
"""x1, y1, x2, y2 in pixels of the one thing that an app lets be touched."""


class Phone:
    """Which app is open, how far it is scrolled, what was done to its button, typed and answered."""

    def __init__(self):
        self.interaction_cache = ""
        self.closed = False
        self.clean()

    def clean(self) -> None:
        self.app, self.scrolled, self.shade, self.typed, self.done = "", 0, False, "", []

    def pixels(self) -> np.ndarray:
        screen = np.full((HEIGHT, WIDTH, 3), APPS.get(self.app, (30, 30, 30)), np.uint8)
        if self.app:
            x1, y1, x2, y2 = BUTTON
            screen[y1:y2, x1:x2] = 255 - 20 * min(len(self.done), 10)
        if self.shade:
            screen[:7] = (250, 0, 0)
        return screen

    def execute(self, said: dict) -> None:
        unknown = set(said) - set(FIELDS)
        if unknown:
            raise TypeError(f"JSONAction.__init__() got an unexpected keyword argument {unknown.pop()!r}")
        kind, x, y, index = (said.get(name) for name in ("action_type", "x", "y", "index"))
        if kind not in ACTION_TYPES:
            raise ValueError(f"Invalid action type: {kind}")
        if index is not None and (x is not None or y is not None):
            raise ValueError("Either an index or a <x, y> should be provided.")
        direction = said.get("direction")
        if direction and direction not in DIRECTIONS:
            raise ValueError(f"Invalid scroll direction: {direction}")
        if kind == "answer":
            self.interaction_cache = said["text"]
        elif kind in ("click", "double_tap", "long_press"):
            if x is None or y is None:
                raise ValueError("Invalid click action")
            x1, y1, x2, y2 = BUTTON
            if self.app and x1 <= x < x2 and y1 <= y < y2:
                self.done.append(kind)
        elif kind == "input_text":
            if self.done[-1:] == ["click"] and said.get("text"):
                self.typed = "" if said.get("clear_text") else self.typed
                self.typed += said["text"] + "\n"  # press_enter_button follows every text
        elif kind == "keyboard_enter":
            self.typed += "\n" if self.done[-1:] == ["click"] else ""
        elif kind in ("navigate_home", "navigate_back"):
            self.app = ""
        elif kind == "scroll":
            self.scrolled += {"down": 1, "up": -1}.get(direction, 0)
        elif kind == "swipe":
            self.shade = {"down": True, "up": False}.get(direction, self.shade)  # from the top edge: the shade opens
        elif kind == "open_app":
            if said.get("app_name") not in APPS:
                raise ValueError(f"no app {said.get('app_name')}")
            self.app, self.scrolled = said["app_name"], 0


class Task:
    """What ``TaskEval`` demands of whoever drives it."""

    def __init__(self, goal: str, success):
        self.goal, self.success, self.initialized = goal, success, False

    def initialize_task(self, phone: Phone) -> None:
        phone.interaction_cache = ""
        if self.initialized:
            raise RuntimeError("initialize_task() is already called.")
        phone.clean()
        self.initialized = True

    def is_successful(self, phone: Phone) -> float:
        if not self.initialized:
            raise RuntimeError("initialize_task() must be called before is_successful().")
        return float(self.success(phone))

    def tear_down(self, phone: Phone) -> None:
        phone.clean()
        self.initialized = False


def create_suite(combinations: int, seed: int) -> dict[str, list[Task]]:
    """Five tasks, sorted by name as in the real suite, their parameters drawn from ``seed``."""

    def number(n: int) -> int:
        return (7 * seed + 3 * n) % 50 + 3

    kinds = {
        "ClockStopWatchRunning": lambda n: Task("Run the stopwatch.", lambda p: p.app == "clock" and "click" in p.done),
        "FilesDeleteFile": lambda n: Task(
            f"Delete the file {number(n)}.txt.",
            lambda p: p.app == "files" and p.scrolled >= 2 and p.done[-2:] == ["long_press", "double_tap"],
        ),
        "MarkorCreateNote": lambda n: Task(
            f"Write the note {number(n)}.", lambda p: p.app == "notes" and p.typed == f"{number(n)}\n\n"
        ),
        "NotesTodoItemCount": lambda n: Task(
            f"How many to-dos? There are {number(n)}.", lambda p: p.interaction_cache == str(number(n))
        ),
        "SystemShade": lambda n: Task("Pull the shade down, from home.", lambda p: p.shade and not p.app),
    }
    return {name: [make(n) for n in range(combinations)] for name, make in sorted(kinds.items())}


GOLD = {
    "ClockStopWatchRunning": ['open_app("clock")', "click(500,479)", "finished()"],
    "FilesDeleteFile": ['open_app("files")', "scroll(500,500,0,300)", "scroll(10,10,2,30)", "long_press(400,450)",
                        "double_click(300,530)", "wait()", "finished()"],
    "MarkorCreateNote": ['open_app("notes")', "click(460,500)", 'type("{}")', 'key("Enter")', "finished()"],
    "NotesTodoItemCount": ['open_app("notes")', "go_back()", 'finished("{}")'],
    "SystemShade": ['open_app("files")', "go_home()", "drag(500,10,480,800)", "finished()"],
}  # fmt: skip
"""What solves them; ``{}`` is the number in the goal."""
GET = {"/screenshot": {"wait_to_stabilize": bool}, "/suite/task_list": {"max_index": int},
       "/suite/task_length": {"task_type": str}, "/suite/reinitialize": {}, "/health": {},
       "/task/score": {"task_type": str, "task_idx": int}, "/task/goal": {"task_type": str, "task_idx": int},
       "/task/template": {"task_type": str, "task_idx": int}}  # fmt: skip
POST = {"/reset": {"go_home": bool}, "/execute_action": {}, "/close": {},
        "/task/initialize": {"task_type": str, "task_idx": int},
        "/task/tear_down": {"task_type": str, "task_idx": int}}  # fmt: skip
READ = {bool: {"true": True, "false": False, "True": True, "False": False}.__getitem__, int: int, str: str}


class AndroidDouble(http.server.ThreadingHTTPServer):
    """``faults[path]`` are played out first, one a request: "drop" (the connection), "hang", a status, or bytes that
    are the answer; then ``down``, while set, drops everything."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.phone, self.suite = Phone(), create_suite(2, 42)
        self.asked: list[str] = []
        self.said: list[dict] = []
        self.errors: list[str] = []
        self.faults: dict[str, list[object]] = {}
        self.down = False
        self.busy = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def restart(self) -> None:
        """As a container that crashed and came back."""
        self.phone, self.suite = Phone(), create_suite(2, 42)

    def handle_error(self, request, client_address):
        pass

    def answer(self, method: str, path: str, query: dict, body) -> object:
        task = self.suite[query["task_type"]][query["task_idx"]] if "task_idx" in query else None
        match path:
            case "/reset":
                self.phone.app = "" if query["go_home"] else self.phone.app
                self.phone.interaction_cache = ""
            case "/screenshot":
                return {"pixels": self.phone.pixels().tolist()}
            case "/execute_action":
                self.said.append(body)
                self.phone.execute(body)
            case "/suite/task_list":
                names, most = list(self.suite), query["max_index"]
                return {"task_list": names if most > len(names) or most < 0 else names[:most]}
            case "/suite/task_length":
                return {"length": len(self.suite[query["task_type"]])}
            case "/suite/reinitialize":
                self.suite = create_suite(int(query.get("n_task_combinations", 2)), int(query.get("seed", 42)))
            case "/task/initialize":
                task.initialize_task(self.phone)
            case "/task/tear_down":
                task.tear_down(self.phone)
            case "/task/score":
                return {"score": task.is_successful(self.phone)}
            case "/task/goal":
                return {"goal": task.goal}
            case "/health":
                return {"status": "success"}
        return {"status": "success", "message": "done"}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.serve("GET", GET, POST)

    def do_POST(self):
        self.serve("POST", POST, GET)

    def serve(self, method: str, routes: dict, others: dict) -> None:
        server: AndroidDouble = self.server
        split = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.asked.append(split.path)
        fault = server.faults[split.path].pop(0) if server.faults.get(split.path) else None
        if server.down or fault == "drop":
            self.close_connection = True
            return
        if fault == "hang":
            time.sleep(3.0)
            self.close_connection = True
            return
        if isinstance(fault, bytes):
            self.reply(200, fault)
        elif fault is not None:
            self.reply(int(fault), b"Internal Server Error")
        elif split.path not in routes:
            self.reply(405 if split.path in others else 404, b'{"detail":"no such route"}')
        else:
            self.work(method, split.path, routes[split.path], parse_qs(split.query), raw)

    def work(self, method: str, path: str, wanted: dict, given: dict, raw: bytes) -> None:
        server: AndroidDouble = self.server
        query = {name: values[0] for name, values in given.items()}
        try:
            query |= {name: READ[kind](query[name]) for name, kind in wanted.items()}
            body = json.loads(raw) if path == "/execute_action" else None
            if path == "/execute_action" and not isinstance(body, dict):
                raise ValueError("not a dictionary")
        except (KeyError, ValueError) as error:
            server.errors.append(f"{path}: {error!r}")
            self.reply(422, b'{"detail":[{"type":"missing"}]}')
            return
        try:
            with server.busy:  # its handlers are coroutines that block: one request at a time
                said = json.dumps(server.answer(method, path, query, body)).encode()
        except Exception as error:  # as the real server: the reason stays in its log
            server.errors.append(f"{path}: {error}")
            self.reply(500, b"Internal Server Error")
            return
        self.reply(200, said)

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
