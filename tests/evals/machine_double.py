"""The server inside OSWorld's machines (``desktop_env/server/main.py``) as its own host side calls it: ``GET
/screenshot`` and ``POST /execute`` with a command of ``python -c``, before the double's desktop.

With it the real ``DesktopEnv`` and its real controller run, where the package ``desktop-env`` is; what sets files and
programs up in a machine, what starts one and the metrics (each wants packages by the dozen) are stubs in a checkout.
"""

from __future__ import annotations

import builtins
import http.server
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
from desktop_double import EXAMPLES, HEIGHT, WAYS, WIDTH, Pyautogui
from PIL import Image

PREFIX = ["python", "-c"]
STUBS = {
    "evaluators/__init__.py": "from . import getters, metrics\n",
    "evaluators/getters.py": '''
import json
import urllib.request

def get_desktop(env, config):
    with urllib.request.urlopen(f"{env.controller.http_server}/state") as answer:
        return json.load(answer)
''',
    "evaluators/metrics.py": f'''
def text(state, expected):
    return float(state["text"] == expected)

def mouse(state):
    return float(state["log"] == {WAYS!r})

def clicked(state):
    return float("click" in state["log"])

def scrolled(state):
    return float(state["scrolled"] == 3)

def infeasible():
    raise AssertionError("is never called")
''',
    "controllers/__init__.py": "",
    "controllers/setup.py": '''
import urllib.request

class SetupController:
    def __init__(self, vm_ip, server_port, **rest):
        self.url = f"http://{vm_ip}:{server_port}/restart"

    def reset_cache_dir(self, folder):
        self.cache_dir = folder

    def setup(self, config, use_proxy=False):
        return True
''',
    "providers/__init__.py": '''
import os
import urllib.request

class Provider:
    def start_emulator(self, path, headless, os_type, *rest):
        urllib.request.urlopen(f"http://{os.environ['MACHINE']}/restart").close()

    def get_ip_address(self, path):
        host, port = os.environ["MACHINE"].split(":")
        return f"{host}:{port}:9222:8006:8080"

    def revert_to_snapshot(self, path, snapshot):
        return path

    def stop_emulator(self, path, *rest):
        urllib.request.urlopen(f"http://{os.environ['MACHINE']}/stopped").close()

class Manager:
    def get_vm_path(self, **rest):
        return "machine.qcow2"

def create_vm_manager_and_provider(name, region, use_proxy=False):
    return Manager(), Provider()
''',
}  # fmt: skip


def real_checkout(folder: Path) -> Path:
    """A folder like OSWorld's, with its own ``DesktopEnv`` and controller, the rest as stubs."""
    package = Path(importlib.util.find_spec("desktop_env").submodule_search_locations[0])
    inside = folder / "desktop_env"
    for name, text in {**STUBS, "__init__.py": ""}.items():
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_text(text)
    for name in ("desktop_env.py", "actions.py", "controllers/python.py"):
        (inside / name).write_bytes((package / name).read_bytes())
    listed = {domain: list(tasks) for domain, tasks in EXAMPLES.items() if domain != "broken"}
    for domain, keys in listed.items():
        place = folder / "evaluation_examples" / "examples" / domain
        place.mkdir(parents=True)
        for key in keys:
            instruction, judge = EXAMPLES[domain][key]
            several = isinstance(judge["func"], list)
            evaluator = {"func": judge["func"], "result": [{"type": "desktop"}] * 2 if several else {"type": "desktop"}}
            if "expected" in judge:  # a getter of OSWorld's own kind gives the rule; here the metric takes it
                evaluator |= {"options": {"expected": judge["expected"]}}
            config = {"id": key, "instruction": instruction, "config": [{"type": "none"}], "evaluator": evaluator}
            (place / f"{key}.json").write_text(json.dumps(config))
    (folder / "evaluation_examples" / "test_all.json").write_text(json.dumps(listed))
    return folder


class Machine(http.server.ThreadingHTTPServer):
    """``commands`` are the lines that came, ``errors`` what went wrong in them, ``stopped`` how often it was given
    back, ``typed`` what each desktop had in its field when it was set back."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.desktop, self.commands, self.errors, self.stopped, self.typed = Pyautogui(), [], [], 0, []

    def handle_error(self, request, client_address):
        pass

    def run(self, code: str) -> None:
        """``python -c CODE`` in the machine, where ``import pyautogui`` finds the desktop."""
        self.commands.append(code)

        def known(name, *rest):
            return self.desktop if name == "pyautogui" else __import__(name, *rest)

        try:
            exec(code, {"__builtins__": {**vars(builtins), "__import__": known}})
        except Exception as error:  # the real one answers 200 with the error's text
            self.errors.append(f"{type(error).__name__}: {error}")


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        machine: Machine = self.server
        if self.path == "/screenshot":
            data = io.BytesIO()
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), 200, np.uint8)).save(data, "PNG")
            self.reply(200, data.getvalue(), "image/png")
            return
        if self.path == "/state":
            self.reply(200, json.dumps(vars(machine.desktop)).encode())
            return
        if self.path == "/restart":
            machine.typed.append(machine.desktop.text)
            machine.desktop = Pyautogui()
        if self.path == "/stopped":
            machine.stopped += 1
        self.reply(200 if self.path in ("/restart", "/stopped") else 404, b"{}")

    def do_POST(self):
        machine: Machine = self.server
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/execute" or said["command"][:2] != PREFIX or said["shell"] is not False:
            self.reply(404, b"{}")
            return
        machine.run(said["command"][2])
        self.reply(200, b'{"status": "success", "output": "", "error": "", "returncode": 0}')
