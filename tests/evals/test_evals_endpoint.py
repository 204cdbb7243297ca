"""An OpenAI-compatible endpoint on the loopback: what is sent, what is tried again, what is not."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from android_double import HEIGHT, WIDTH, AndroidDouble
from evals_kit import Guess, guess_suite
from PIL import Image

from evals.__main__ import main
from evals.dialects import STYLES
from evals.endpoint import EndpointAgent, EndpointConfig, answered, visible
from evals.runner import Options, evaluate_now
from evals.suite import Play, choose_tasks
from evals.suites.androidworld import androidworld
from evals.summary import summarise
from mmagent.actions import ActionError, DoubleClick, parse_action
from mmagent.geometry import ImageView
from mmagent.tasks.base import score_of
from mmagent.trajectories import Observation

OPTIONS = Options(progress=False, retries=2, backoff=0.001, concurrency=4)


class Stub(http.server.ThreadingHTTPServer):
    """Answers the brightness of the last image; ``script[key]`` holds faults to play out first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.faults: dict[str, list[object]] = {}
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server: Stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        text = " ".join(part["text"] for part in content if part["type"] == "text")
        key = re.search(r"test-\d+|$", text)[0]
        with server.lock:
            server.requests.append({"path": self.path, **body})
            server.headers.append(dict(self.headers))
            server.asked[key] += 1
            faults = server.faults.get(key, [])
            fault = faults.pop(0) if faults else None
        if fault == "drop":
            self.connection.close()
            return
        if isinstance(fault, int):
            self.send_error(fault, "as told")
            return
        images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(images[-1].partition(",")[2]))))
        answer = f"<think>hm</think> {pixels[0, 0, 0]}" if fault is None else fault
        reason = "length" if fault == "cut" else "stop"
        reply = {
            "choices": [{"message": {"content": answer}, "finish_reason": reason}],
            "usage": {"prompt_tokens": 90, "completion_tokens": 7},
        }
        data = json.dumps(reply).encode() if fault != "garbage" else b'{"choices": ['
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def test_the_same_screens_and_words_reach_the_endpoint(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    agent = EndpointAgent(EndpointConfig(stub.url, "some-model", key_variable="MY_KEY"))
    suite = guess_suite(2, ["dim"], play=Play(1, 8, rules="Say a number."))
    run = evaluate_now(suite, agent, tmp_path, OPTIONS)
    assert summarise(run.rows).score.mean == 1.0
    sent = stub.requests[0]
    assert sent["path"] == "/v1/chat/completions"
    assert sent["messages"][0] == {"role": "system", "content": "Say a number."}
    assert [part["type"] for part in sent["messages"][1]["content"]] == ["image_url", "text"]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("some-model", 8, 0.0)
    assert {r["seed"] for r in stub.requests} != {sent["seed"]}
    assert stub.headers[0]["Authorization"] == "Bearer secret-key"
    assert (run.rows[0].prompt_tokens, run.rows[0].completion_tokens) == (90, 7)
    assert run.pins["policy.model"] == "some-model"
    assert "secret-key" not in (tmp_path / "run.json").read_text()
    assert "max_tokens 8000" in run.pins["image_geometry"]


def test_transport_faults_are_retried_logic_faults_not(stub, tmp_path):
    stub.faults = {
        "test-0": ["drop"],
        "test-1": [503, 429],
        "test-2": [400],
        "test-3": ["garbage", "garbage", "garbage"],
        "test-4": ["no idea"],
        "test-5": ["cut"],
    }
    agent = EndpointAgent(EndpointConfig(stub.url, "m"))
    run = evaluate_now(guess_suite(6, ["dim"]), agent, tmp_path, OPTIONS)
    rows = {row.item: row for row in run.rows}
    assert dict(stub.asked) == {"test-0": 2, "test-1": 3, "test-2": 1, "test-3": 3, "test-4": 1, "test-5": 1}
    assert (rows["test-0"].value, rows["test-1"].value, rows["test-4"].value) == (1.0, 1.0, 0.0)
    assert "EndpointRefused" in rows["test-2"].error
    assert "400" in rows["test-2"].error
    assert "EndpointUnavailable" in rows["test-3"].error
    assert summarise(run.rows).errors == 2
    assert (rows["test-5"].status, rows["test-5"].value, rows["test-5"].steps[0].action) == ("truncated", 0.0, "cut")
    assert rows["test-0"].steps[0].said.startswith("<think>hm</think>")


class Lenient(Guess):
    """Judges a cut answer."""

    def environment(self, item):
        environment = super().environment(item)
        reset = environment.reset

        async def shown():
            return replace(await reset(), takes_cut=True)

        environment.reset = shown
        return environment


def test_a_cut_answer_is_judged_where_the_environment_takes_it(stub, tmp_path):
    @contextlib.asynccontextmanager
    async def opened(names):
        yield [Lenient("lenient")]

    stub.faults = {"test-0": ["cut"]}  # the stub's reply, whose finish reason is "length"
    run = evaluate_now(guess_suite(2, open=opened), EndpointAgent(EndpointConfig(stub.url, "m")), tmp_path, OPTIONS)
    cut, whole = sorted(run.rows, key=lambda row: row.item)
    assert (cut.status, cut.value, cut.steps[0].action, cut.steps[0].note) == ("truncated", 0.0, "cut", "wrong")
    assert (whole.status, whole.value) == ("finished", 1.0)


def test_nobody_listens(tmp_path):
    agent = EndpointAgent(EndpointConfig("http://127.0.0.1:9/v1", "m"))
    run = evaluate_now(guess_suite(1, ["dim"]), agent, tmp_path, OPTIONS)
    assert "EndpointUnavailable" in run.rows[0].error
    assert run.rows[0].attempts == 3


class Countdown(Guess):
    """Says done at the third action; each screen is new."""

    def environment(self, item):
        inner = super().environment(item)

        class Environment:
            left = 3

            async def reset(self):
                return await inner.reset()

            async def step(self, action):
                self.left -= 1
                seen = await inner.reset()
                return replace(seen, done=not self.left, reward=float(not self.left))

            async def close(self):
                await inner.close()

        return Environment()


@pytest.mark.parametrize("steps, status, value", [(5, "finished", 1.0), (2, "truncated", 0.0)])
def test_several_turns(stub, tmp_path, steps, status, value):
    @contextlib.asynccontextmanager
    async def opened(names):
        yield [Countdown("long")]

    suite = guess_suite(1, open=opened, play=Play(steps, 8))
    run = evaluate_now(suite, EndpointAgent(EndpointConfig(stub.url, "m")), tmp_path, OPTIONS)
    row = run.rows[0]
    assert (row.status, row.value) == (status, value)
    assert len(row.steps) == min(steps, 3)
    roles = [m["role"] for m in stub.requests[-1]["messages"]]
    assert roles == ["user", "assistant"] * (min(steps, 3) - 1) + ["user"]
    assert row.completion_tokens == 7 * min(steps, 3)


def test_answered():
    assert answered("<p>half")
    assert answered("<think>hm</think><p>half")
    assert not answered(" <think>a <p> would")


def test_visible():
    assert visible("<think>click(1,1)</think>\nclick(2,2)") == "click(2,2)"
    assert visible(" <|begin_of_box|>click(1,2)<|end_of_box|>") == "click(1,2)"
    assert visible("click(1,2)") == "click(1,2)"


def test_config_is_checked():
    with pytest.raises(ValueError, match="http"):
        EndpointConfig("localhost:8000", "m")
    with pytest.raises(ValueError, match="model"):
        EndpointConfig("http://127.0.0.1/v1", "")


def styled(stub, tmp_path, style: str, said: list[str], **options):
    """One page_grounding-like item answered in a style: the row, and the requests."""
    stub.faults[""] = list(said)
    suite = guess_suite(1, ["dim"], open=_pointing, tasks=("point",), play=Play(4, 64, rules="Ours.", acts=True))
    agent = EndpointAgent(EndpointConfig(stub.url, "some-model", style=style))
    run = evaluate_now(suite, agent, tmp_path / style, OPTIONS)
    return run.rows[0], stub.requests, run.pins


@contextlib.asynccontextmanager
async def _pointing(names):
    yield [Pointing()]


class Pointing(Guess):
    """A screen of 500 x 400 pixels; right is a double click at pixel (100, 300) after any other action."""

    def __init__(self):
        super().__init__("point")

    def environment(self, item):
        return PointingEnvironment()

    async def score(self, item, trajectory):
        return score_of(trajectory)


class PointingEnvironment:
    async def reset(self):
        return Observation("Open the file.", (np.zeros((400, 500, 3), np.uint8),))

    async def step(self, action):
        try:
            did = parse_action(action)
        except ActionError as error:
            return Observation(str(error), done=True, reward=0.0, parts={"malformed": 1.0})
        if isinstance(did, DoubleClick):
            x, y = ImageView((400, 500), (400, 500)).from_frame(did.x, did.y)
            return Observation("", done=True, reward=float(abs(x - 100) < 0.6 and abs(y - 300) < 0.6))
        return Observation("", (np.full((400, 500, 3), 9, np.uint8),))

    async def close(self):
        pass


def test_a_foreign_model_is_asked_and_understood_in_its_own_style(stub, tmp_path):
    calls = [{"action": "mouse_move", "coordinate": [100.8, 294]}, {"action": "double_click"}]  # of 504 x 392 pixels
    said = [f"<tool_call>{json.dumps({'name': 'computer_use', 'arguments': call})}</tool_call>" for call in calls]
    row, requests, pins = styled(stub, tmp_path, "qwen2.5-vl", said)
    assert (row.value, row.error) == (1.0, None)
    assert (row.prompt_tokens, row.completion_tokens) == (2 * 90, 2 * 7)  # both requests are paid for in full
    assert [step.action for step in row.steps] == ["move(200.0,750.0)", "double_click(200.0,750.0)"]
    assert row.steps[0].points == ((200.0, 750.0),)
    assert "computer_use" in requests[0]["messages"][0]["content"]
    assert "Ours." not in json.dumps(requests)
    assert "504x392" in json.dumps(requests[0])
    assert pins["policy.style"] == "qwen2.5-vl, version 2"


def test_an_answer_that_cannot_be_read_is_reported_as_such(stub, tmp_path):
    row, _, _ = styled(stub, tmp_path, "qwen2.5-vl", ["click(200,750)"])  # in our words, which are not its own
    assert (row.value, row.error, row.parts["malformed"]) == (0.0, None, 1.0)
    assert "no <tool_call>" in row.steps[0].action
    assert row.steps[0].said == "click(200,750)"
    with pytest.raises(ValueError, match="style 'qwen' is none of ui-tars"):
        EndpointConfig(stub.url, "m", style="qwen")


def test_a_foreign_model_is_told_of_a_phone_where_there_is_one(stub, tmp_path, capsys):
    height, width = STYLES["ui-tars-1.5"].size(HEIGHT, WIDTH)
    tap = f"Thought: the button.\nAction: click(point='<point>{width // 2} {round(height * 0.48)}</point>')"
    stub.faults[""] = ["Action: open_app(app_name='clock')", tap, "Action: finished(content='')"]
    with AndroidDouble() as phone:
        threading.Thread(target=phone.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        suite = choose_tasks(androidworld(phone.url), ["ClockStopWatchRunning"])
        agent = EndpointAgent(EndpointConfig(stub.url, "some-model", style="ui-tars-1.5"))
        (row,) = evaluate_now(suite, agent, tmp_path / "ui-tars", OPTIONS).rows
        who = ["--url", stub.url, "--model", "m", "--style", "anthropic", "--out", str(tmp_path / "refused")]
        refused = main(["androidworld", "--data", phone.url, *who])
        phone.shutdown()
    assert (row.value, row.error) == (1.0, None)
    assert [step.action for step in row.steps][::2] == ['open_app("clock")', "finished()"]
    asked = json.dumps(stub.requests[0])
    assert "open_app(app_name='')" in asked
    assert "right_single" not in asked
    assert refused == 2  # before a single request
    assert "style anthropic has no actions of a phone: its house publishes none" in capsys.readouterr().err
    assert len(stub.requests) == 3


def test_glm_clears_a_field_of_a_phone_and_types(stub, tmp_path):
    """Its one action is two of ours, after each of which the phone is looked at; the end is its own."""
    told = [
        {"action_type": "open_app", "app_name": "clock"},
        {"action_type": "input_text", "text": "milk", "box_2d": [[280, 420, 660, 540]], "override": False},
        {"action_type": "input_text", "text": "oats", "box_2d": [[280, 420, 660, 540]], "override": True},
        {"action_type": "status", "goal_status": "complete"},
    ]
    stub.faults[""] = [f"Memory: None\nReason: So.\nAction: {json.dumps(action)}" for action in told]
    with AndroidDouble() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        suite = choose_tasks(androidworld(server.url), ["ClockStopWatchRunning"])
        agent = EndpointAgent(EndpointConfig(stub.url, "some-model", style="glm-4.5v"))
        typed = []
        execute = server.phone.execute
        server.phone.execute = lambda said: (execute(said), typed.append(server.phone.typed))
        (row,) = evaluate_now(suite, agent, tmp_path, OPTIONS).rows
        server.shutdown()
    assert (row.value, row.error) == (1.0, None)
    assert typed == ["", "", "milk\n", "milk\n", "oats\n"]
    assert len(stub.requests) == 4
    words = stub.requests[-1]["messages"][0]["content"][0]["text"]
    assert [f"Step {n}:" in words for n in range(4)] == [True, True, True, False]
