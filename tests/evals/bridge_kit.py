"""An endpoint that knows what our own harness asks to the letter, and says what it was told to say to that."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator

from evals.bridges.exam import Exam, Source
from evals.endpoint import OwnTalk
from mmagent.geometry import GeometryConfig

SOURCE = Source("worlds", tasks=("motion", "value", "objects"), limit=7)
"""Words alone, and charts and scenes."""
LOST = "I was never asked this"


def digest(messages: object) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def scripted(source: Source) -> dict[str, str]:
    """What to say to the very messages of each item: of three items in turn what is right, nonsense, and nothing."""
    exam = Exam(source.build(), source.limit)
    answers = {}
    try:
        for number, key in enumerate(exam.names()):
            task, item = exam.items[key]
            seen = asyncio.run(task.environment(item).reset())
            messages = OwnTalk(exam.suite.play.rules, GeometryConfig()).asked(seen)
            answers[digest(messages)] = (f"<think>well</think>{exam.gold(key)}", "nonsense", "")[number % 3]
    finally:
        exam.close()
    return answers


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        text = self.server.answers.get(digest(body["messages"]), LOST)
        reply = {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 3},
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Scripted(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answers: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.bodies = answers, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def serving(answers: dict[str, str]) -> Iterator[Scripted]:
    with Scripted(answers) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
